// The kernels of kernels.h on small inputs in memory as a GPU has it: every buffer ends at a page
// that nobody may touch, or begins after one, the host cannot touch any, and what is not written
// is NaN. Prints every result, to be held against those of the same program over cpu_kernels.cpp.
//
// B batch, S tokens, N = B * S, D d_model, K experts, T the sum of the ranks.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#ifdef PEMT_EMULATE_CUDA
#  include "cuda_emulation.h"
#endif

namespace {

constexpr size_t kPage = 4096;
struct half_word {  // bfloat16, by cutting off
  uint16_t bits;
};

template <class T>
T number(double value) {
  if constexpr (std::is_same_v<T, half_word>) {
    const float narrow = float(value);
    uint32_t wide;
    std::memcpy(&wide, &narrow, sizeof wide);
    return {uint16_t(wide >> 16)};
  } else {
    return T(value);
  }
}

template <class T>
double back(T value) {
  if constexpr (std::is_same_v<T, half_word>) {
    const uint32_t wide = uint32_t{value.bits} << 16;
    float narrow;
    std::memcpy(&narrow, &wide, sizeof narrow);
    return narrow;
  } else {
    return value;
  }
}

void device_memory_is(int protection) {
#ifdef PEMT_EMULATE_CUDA
  emulation::memory().allow(protection);
#endif
}

struct Layout {
  bool at_end;  // a buffer ends at the forbidden page, or begins after the one before it
  int odd;      // which one begins an element beside a boundary of 16 bytes
  int number = 0;
};

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count;

  Buffer(size_t count_, Layout& layout) : count(count_) {
    const size_t bytes = (count + 16) * sizeof(T), pages = (bytes + kPage - 1) / kPage * kPage;
    char* whole = static_cast<char*>(
        mmap(nullptr, pages + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* usable = whole + kPage;
    mprotect(usable, pages, PROT_READ | PROT_WRITE);
    const size_t at =
        layout.at_end ? pages - count * sizeof(T) : (layout.number == layout.odd) * sizeof(T);
    ++layout.number;
    data = reinterpret_cast<T*>(usable + at);
    for (size_t i = 0; i < count; ++i)
      data[i] = number<T>(std::numeric_limits<double>::quiet_NaN());
#ifdef PEMT_EMULATE_CUDA
    emulation::memory().regions.push_back({usable, pages, {}, {}, {}});
#endif
  }

  void fill(double scale = 1) {
    static uint64_t state = 1;
    for (size_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      data[i] = number<T>(scale * (double(state >> 40) / (1 << 23) - 1));
    }
  }

  void print(const char* name) const {
    device_memory_is(PROT_READ | PROT_WRITE);
    std::printf("%s", name);
    for (size_t i = 0; i < count; ++i) std::printf(" %.9g", back(data[i]));
    std::printf("\n");
    device_memory_is(PROT_NONE);
  }
};

template <class T>
void run(
    pemt::Dtype dtype, pemt::Shape shape, const std::vector<int>& ranks, Layout layout, bool all) {
  using Real = float;
  pemt::Experts experts{};
  experts.count = int(ranks.size());
  for (size_t k = 0; k < ranks.size(); ++k) {
    experts.scale[k] = 1 - 0.25 * double(k);
    experts.offset[k + 1] = experts.offset[k] + ranks[k];
  }
  experts.total = experts.offset[ranks.size()];
  const int64_t rows = shape.batch * shape.tokens, wide = shape.d_model + experts.total;
  const int64_t count = experts.count, total = experts.total;
  device_memory_is(PROT_READ | PROT_WRITE);
  Buffer<T> mixed(rows * wide, layout), projection(rows * total, layout),
      z(rows * shape.d_model, layout);
  Buffer<T> dz(rows * shape.d_model, layout), whole(rows * wide, layout);
  Buffer<T> gated(rows * total, layout), mix(rows * total, layout);
  Buffer<Real> gates(shape.batch * count, layout), weights(rows, layout), grad(1, layout);
  Buffer<Real> stats(rows * (2 * count + 1), layout), distance(count, layout), loss(1, layout);
  Buffer<Real> sums(pemt::sparsity_partials(shape) * count, layout);
  Buffer<Real> chunks(shape.batch * pemt::mixture_partials(shape) * count, layout);
  Buffer<Real> outer(shape.batch * count, layout), dgates(shape.batch * count, layout);
  for (Buffer<T>* each : {&mixed, &projection, &z, &dz}) each->fill();
  for (Buffer<Real>* each : {&gates, &grad}) each->fill();
  weights.fill(0.01);
  device_memory_is(PROT_NONE);

  const pemt::Read latent{mixed.data + shape.d_model, wide};
  const pemt::Write dy{whole.data, wide}, dlatent{whole.data + shape.d_model, wide};
  pemt::gate_latent(nullptr, dtype, shape, experts, latent, gates.data, gated.data);
  gated.print("gated");
  pemt::sparsity_forward(nullptr, dtype, shape, experts,
      {z.data, latent, projection.data, gates.data, all ? weights.data : nullptr, stats.data,
          sums.data, distance.data, loss.data});
  stats.print("stats");
  distance.print("distance");
  loss.print("loss");
  if (all) {
    pemt::sparsity_backward(nullptr, dtype, shape, experts,
        {grad.data, dz.data, z.data, latent, projection.data, gates.data, weights.data, stats.data,
            distance.data, dy, mix.data, dlatent, outer.data});
    whole.print("whole");
    mix.print("mix");
    outer.print("outer");
  } else {
    pemt::sparsity_backward(nullptr, dtype, shape, experts,
        {grad.data, nullptr, z.data, latent, projection.data, gates.data, nullptr, stats.data,
            distance.data, dy, mix.data, dlatent, outer.data});
    whole.print("whole");
  }
  pemt::mixture_backward(nullptr, dtype, shape, experts,
      {latent, projection.data, dlatent, gates.data, all ? outer.data : nullptr, chunks.data,
          dgates.data});
  whole.print("whole");
  dgates.print("dgates");
#ifdef PEMT_EMULATE_CUDA
  emulation::memory().regions.clear();
#endif
}

}  // namespace

int main() {
  const std::vector<int> even{8, 64, 16}, odd{5, 66, 9};
  for (const bool at_end : {true, false})
    for (const auto& ranks : {even, odd})
      for (const int64_t d_model : {64, 37}) {
        run<float>(pemt::Dtype::f32, {3, 70, d_model}, ranks, {at_end, -1}, true);
        run<half_word>(pemt::Dtype::bf16, {2, 33, d_model}, ranks, {at_end, -1}, false);
      }
  for (int buffer = 0; buffer < 7; ++buffer)
    run<float>(pemt::Dtype::f32, {1, 40, 64}, even, {false, buffer}, true);
}
