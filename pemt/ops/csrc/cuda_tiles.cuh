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

constexpr int kPairs = kInFlight / 2;  // a latent and a projection each, or z and its gradient

// A token's latents and projections, kPairs tiles at a time for the threads that share it; after
// an expert's last tile comes the next expert's first.
template <class T>
struct Tiles {
  int k = 0, start = 0;  // where the next one begins
  int expert[kPairs], at[kPairs], valid[2 * kPairs];
  bool begins[kPairs], ends[kPairs];  // the expert
  Pack<T> found[2 * kPairs];          // latents, then projections

  __device__ void next(const Experts& experts, const Place& place, const T* latents,
      const T* projections, bool wide) {
    const T* from[2 * kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int own = k < experts.count ? k : 0, first = experts.offset[own];
      const int rank = experts.offset[own + 1] - first, column = start + place.column * kPack<T>;
      const bool present = place.row < place.count && k < experts.count;
      expert[j] = k;
      at[j] = first + column;
      valid[j] = valid[j + kPairs] = present ? left_of<T>(rank, column) : 0;
      from[j] = latents + at[j];
      from[j + kPairs] = projections + at[j];
      begins[j] = start == 0;
      start += kTile<T>;
      if (k < experts.count && start >= rank) ++k, start = 0;
      ends[j] = start == 0;
    }
    load(from, valid, wide, found);
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

}  // namespace pemt
