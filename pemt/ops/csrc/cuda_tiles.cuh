// What the CUDA kernels share: rows in 16-byte packs, block sums, launch arithmetic.
#pragma once

#include <algorithm>

#include "kernels.h"
#ifdef PEMT_EMULATE_CUDA
#  include "cuda_emulation.h"
#else
#  include "cuda_device.cuh"
#endif

namespace pemt {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kTokens = 32;                    // tokens of one block in the sparsity kernels
constexpr int kPerToken = kThreads / kTokens;  // threads that share a token
constexpr int kChunk = 64;                     // tokens of one block in the mixture's backward
constexpr int kGatedChunk = 128;               // tokens of one block in gate_latent
constexpr int kInFlight = 4;                   // 16-byte reads that a thread waits for together

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

template <class T>
constexpr int kPack = 16 / sizeof(T);  // elements of one wide access
template <class T>
constexpr int kTile =
    kPerToken * kPack<T>;  // ranks of an expert that a token's threads read at a time

template <class T>
struct alignas(16) Pack {
  T value[kPack<T>];
};

// Packs from memory, zeros from `valid` elements on. With wide accesses a row is whole packs, and
// all reads are on their way before the first is waited for.
template <int Count, class T>
__device__ void load(
    const T* const (&from)[Count], const int (&valid)[Count], bool wide, Pack<T> (&to)[Count]) {
  if (wide) {
#pragma unroll
    for (int j = 0; j < Count; ++j)
      to[j] = valid[j] > 0 ? *reinterpret_cast<const Pack<T>*>(from[j]) : Pack<T>{};
  } else {
#pragma unroll
    for (int j = 0; j < Count; ++j)
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i)
        to[j].value[i] = i < valid[j] ? from[j][i] : Pack<T>{}.value[i];
  }
}

template <class T>
__device__ int left_of(int64_t width, int64_t at) {  // elements of a row from `at` on, as `valid`
  return int(width - at < kPack<T> ? width - at : kPack<T>);
}

template <class T>
__device__ void store(const Real<T> (&from)[kPack<T>], int valid, bool wide, T* to) {
  if (wide && valid >= kPack<T>) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.value[i] = rounded<T>(from[i]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      if (i < valid) to[i] = rounded<T>(from[i]);
  }
}

template <int Lanes, class R>
__device__ R lane_sum(R value) {  // the same in all `Lanes` lanes
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class R>
__device__ R block_sum(R value) {  // thread 0 has it
  __shared__ R sums[kThreads / kWarp];
  value = lane_sum<kWarp>(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0)
    for (R part : sums) value += part;
  return value;
}

template <class T>
__device__ const T* row_of(const Read& rows, int64_t n) {
  return static_cast<const T*>(rows.data) + n * rows.stride;
}

template <class T>
__device__ T* row_of(const Write& rows, int64_t n) {
  return static_cast<T*>(rows.data) + n * rows.stride;
}

// The tokens of one block, and the thread's place among them.
struct Place {
  int64_t first;  // the block's first token
  int count;      // tokens that exist, at most kTokens
  int row;        // this thread's token
  int column;     // which kPack of the tile's ranks it owns
  __device__ Place(int64_t block, int64_t tokens)
      : first(block * kTokens),
        count(int(tokens - first < kTokens ? tokens - first : kTokens)),
        row(threadIdx.x / kPerToken),
        column(threadIdx.x % kPerToken) {}
};

// The next tile of an expert's ranks for the threads of a token; after an expert's last, the next
// expert's.
struct Tile {
  int k = 0, start = 0;
  template <class T>
  __device__ void advance(const Experts& experts) {
    start += kTile<T>;
    if (k < experts.count && start >= experts.offset[k + 1] - experts.offset[k]) ++k, start = 0;
  }
};

inline int64_t blocks_of(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
bool aligned(const Read& rows) {  // every row begins a pack
  return rows.stride % kPack<T> == 0 && aligned(rows.data);
}
template <class T>
bool aligned(const Write& rows) {
  return aligned<T>(Read{rows.data, rows.stride});
}

template <class T>
bool ranks_aligned(const Experts& experts) {  // every expert begins a pack
  return std::all_of(experts.offset, experts.offset + experts.count + 1,
      [](int offset) { return offset % kPack<T> == 0; });
}

// Calls `run` with a null pointer of the tensors' type.
template <class Run>
void with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32:
      return run(static_cast<float*>(nullptr));
    case Dtype::f64:
      return run(static_cast<double*>(nullptr));
    case Dtype::bf16:
      return run(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return run(static_cast<f16*>(nullptr));
  }
}

}  // namespace pemt
