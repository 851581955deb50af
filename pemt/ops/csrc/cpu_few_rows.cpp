// y = x w^T for few rows of x, in float: what answering a token at a time consists of. A product
// made for many rows lays w out anew before it multiplies; here w is read once, as it lies.
//
// A tile is kRows rows of x by kOutputs rows of w, its sums stay in registers. Every output is the
// work of one thread, in one order: the same bits with any number of rows and of threads.
#include <algorithm>

#include "kernels.h"

namespace pemt {
namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 4, kOutputs = 4;  // 32 registers
#else
constexpr int kLanes = 8, kRows = 4, kOutputs = 2;  // 16 registers
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

using Rows = const float* [kRows];
using Weights = const float* [kOutputs];

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

float sum_of(const Vector& lanes) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// sums[r][o] = x[r] · w[o]; meanwhile the rows from next_begin to next_end come into the cache.
void tile(const Rows& x, const Weights& w, int64_t inputs, const float* const* next_begin,
    const float* const* next_end, float (&sums)[kRows][kOutputs]) {
  Vector products[kRows][kOutputs] = {};
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    for (auto next = next_begin; next < next_end; ++next) __builtin_prefetch(*next + i, 0, 2);
    Vector row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = load(x[r] + i);
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const Vector weights = load(w[o] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) products[r][o] += row[r] * weights;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      sums[r][o] = sum_of(products[r][o]);
      for (int64_t rest = i; rest < inputs; ++rest) sums[r][o] += x[r][rest] * w[o][rest];
    }
}

// A tile that reaches past the end has the last row again, and what comes of it is not kept.
template <int count>
void rows_from(
    const float* matrix, int64_t first, int64_t rows, int64_t width, const float* (&found)[count]) {
  for (int r = 0; r < count; ++r) found[r] = matrix + std::min(first + r, rows - 1) * width;
}

}  // namespace

void few_rows(
    const float* x, const float* w, float* y, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t groups = (rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static)
  for (int64_t output = 0; output < outputs; output += kOutputs) {
    Weights weights, next;
    rows_from(w, output, outputs, inputs, weights);
    rows_from(w, output + kOutputs, outputs, inputs, next);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * kRows;
      Rows some;
      rows_from(x, first, rows, inputs, some);
      float sums[kRows][kOutputs];
      // The groups share the fetching: memory is busy all the time, and gives each line once.
      tile(some, weights, inputs, next + group * kOutputs / groups,
          next + (group + 1) * kOutputs / groups, sums);
      for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - first); ++r)
        for (int64_t o = 0; o < std::min<int64_t>(kOutputs, outputs - output); ++o)
          y[(first + r) * outputs + output + o] = sums[r][o];
    }
  }
}

}  // namespace pemt
