// y = x w^T for few rows of x, in float: what answering a token at a time consists of. Each weight
// is read once, as it lies.
//
// A tile is kRows rows of x by kOutputs rows of w, its sums stay in registers. Every output is the
// work of one thread, in one order: the same bits with any number of threads.
#include <algorithm>
#include <utility>

#include "kernels.h"

namespace pemt {
namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 4, kOutputs = 4;  // 32 registers
#else
constexpr int kLanes = 8, kRows = 4, kOutputs = 2;  // 16 registers
#endif
static_assert(kRows * kOutputs == kLanes);
constexpr int64_t kBlock = 32;  // outputs that a thread takes at a time

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using Rows = const float* [kRows];
using Weights = const float* [kOutputs];

struct Product {
  const float* x;
  const float* w;
  float* y;
  int64_t rows, inputs, outputs;
};

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// Where lane `lane` of a folded vector has its first term among left's lanes and right's behind
// them; its second lies `width` further.
constexpr int place(int lane, int width) {
  return lane / width % 2 * kLanes + lane / width / 2 * 2 * width + lane % width;
}

// Every `width` lanes added to the next `width`: those of left and those of right, in turn.
template <int width, int... lanes>
Vector fold(const Vector& left, const Vector& right, std::integer_sequence<int, lanes...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(left, right, place(lanes, width)...) +
         __builtin_shufflevector(left, right, width + place(lanes, width)...);
#else  // GCC before 12
  typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
  const Places first = {place(lanes, width)...};
  return __builtin_shuffle(left, right, first) + __builtin_shuffle(left, right, first + width);
#endif
}

// Lane j is the sum over the lanes of vectors[j], each in the same order.
template <int count>
Vector sums_of(const Vector* vectors) {
  if constexpr (count == 1) {
    return vectors[0];
  } else {
    Vector half[count / 2];
#pragma GCC unroll 8
    for (int j = 0; j < count / 2; ++j)
      half[j] = fold<count / 2>(
          vectors[j], vectors[j + count / 2], std::make_integer_sequence<int, kLanes>());
    return sums_of<count / 2>(half);
  }
}

// sums[r][o] = x[r] · w[o]; meanwhile the rows from next_begin to next_end come into the cache.
void tile(const Rows& x, const Weights& w, int64_t inputs, const float* const* next_begin,
    const float* const* next_end, float (&sums)[kRows][kOutputs]) {
  Vector products[kRows * kOutputs] = {};
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
      for (int r = 0; r < kRows; ++r) products[r * kOutputs + o] += row[r] * weights;
    }
  }
  const Vector total = sums_of<kLanes>(products);
  __builtin_memcpy(sums, &total, sizeof(sums));
  for (; i < inputs; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int o = 0; o < kOutputs; ++o) sums[r][o] += x[r][i] * w[o][i];
}

// A tile that reaches past the end has the last row again, and what comes of it is not kept.
template <int count>
void rows_from(
    const float* matrix, int64_t first, int64_t rows, int64_t width, const float* (&found)[count]) {
  for (int r = 0; r < count; ++r) found[r] = matrix + std::min(first + r, rows - 1) * width;
}

// Adds to the outputs from `output` on what the inputs from `begin` to `end` give.
void add_outputs(const Product& p, int64_t output, int64_t begin, int64_t end) {
  const int64_t groups = (p.rows + kRows - 1) / kRows;
  Weights weights, next;
  rows_from(p.w + begin, output, p.outputs, p.inputs, weights);
  rows_from(p.w + begin, output + kOutputs, p.outputs, p.inputs, next);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * kRows;
    Rows some;
    rows_from(p.x + begin, first, p.rows, p.inputs, some);
    float sums[kRows][kOutputs];
    // The groups share the fetching: memory is busy all the time, and gives each line once.
    tile(some, weights, end - begin, next + group * kOutputs / groups,
        next + (group + 1) * kOutputs / groups, sums);
    for (int64_t r = 0; r < std::min<int64_t>(kRows, p.rows - first); ++r)
      for (int64_t o = 0; o < std::min<int64_t>(kOutputs, p.outputs - output); ++o) {
        float& y = p.y[(first + r) * p.outputs + output + o];
        y = (begin > 0 ? y : 0) + sums[r][o];
      }
  }
}

}  // namespace

void few_rows(
    const float* x, const float* w, float* y, int64_t rows, int64_t inputs, int64_t outputs) {
  const Product product{x, w, y, rows, inputs, outputs};
  // Pieces of 8 rows that stay in the first cache; of more rows, in the second.
  const int64_t widest = rows <= 8 ? 512 : 1024;
  const int64_t pieces = std::max<int64_t>(1, (inputs + widest - 1) / widest);
  const int64_t vectors = (inputs + kLanes * pieces - 1) / (kLanes * pieces);
  const int64_t piece = kLanes * std::max<int64_t>(1, vectors);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < outputs; block += kBlock)
    for (int64_t begin = 0; begin == 0 || begin < inputs; begin += piece)
      for (int64_t output = block; output < std::min(block + kBlock, outputs); output += kOutputs)
        add_outputs(product, output, begin, std::min(begin + piece, inputs));
}

}  // namespace pemt
