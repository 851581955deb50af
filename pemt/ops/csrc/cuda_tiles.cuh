// What the CUDA kernels share: rows in 16-byte packs, block sums, Gram products, launch arithmetic.
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
constexpr double kCosineEps = 1e-8;

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
constexpr int kTile = kPerToken * kPack<T>;  // ranks of one Gram tile

template <class T>
struct alignas(16) Pack {
  T value[kPack<T>];
};

// kPack reals from memory, zeros past `valid`; one wide load where the address allows it.
template <class T>
__device__ void load(const T* from, int valid, bool wide, Real<T> (&to)[kPack<T>]) {
  if (wide && valid >= kPack<T>) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) to[i] = real(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) to[i] = i < valid ? real(from[i]) : Real<T>(0);
  }
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

// Sums over one tile of the contraction on the ordinary cores.
template <class R, int Tile, int Width>
__device__ void multiply(const R (&rows)[kTokens][Tile + 1], const R (&squares)[Tile][Tile + 1],
    const Place& place, R (&product)[Width]) {
  for (int i = 0; i < Tile; ++i)
#pragma unroll
    for (int c = 0; c < Width; ++c)
      product[c] += rows[place.row][i] * squares[place.column * Width + c][i];
}

template <class T>
__device__ uint32_t pair_at(const T* two) {
  uint32_t bits;
  memcpy(&bits, two, sizeof bits);
  return bits;
}

// Sums over one tile on the tensor cores: each warp has 16 tokens and 2 x 8 columns. The Gram
// matrix comes as a sum of two half-width numbers, so that it keeps 16 bits and more.
template <class T, int Stride>
__device__ void multiply(const T (&rows)[kTokens][Stride], const T (&high)[kTile<T>][Stride],
    const T (&low)[kTile<T>][Stride], int columns, float (&sums)[2][4]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, pair = lane % 4 * 2;
  const int token = warp % 2 * 16 + group;
  for (int i = pair; i < kTile<T>; i += 16) {
    const uint32_t a[4] = {pair_at(&rows[token][i]), pair_at(&rows[token + 8][i]),
        pair_at(&rows[token][i + 8]), pair_at(&rows[token + 8][i + 8])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = (warp / 2 * 2 + n) * 8;
      if (column >= columns) continue;  // the whole warp agrees
      const T* high_row = high[column + group];
      const T* low_row = low[column + group];
      tensor_core_product<T>(sums[n], a, {pair_at(high_row + i), pair_at(high_row + i + 8)});
      tensor_core_product<T>(sums[n], a, {pair_at(low_row + i), pair_at(low_row + i + 8)});
    }
  }
}

// The Gram tile at (row, column) of expert k into shared memory, zeros past its rank; as two halves
// where the products run on the tensor cores. All loads are on their way before the first store.
template <class T, int Parts, int Stride>
__device__ void load_squares(const Experts& experts, int k, int row, int column,
    const Real<T>* gram, bool wide, T (&squares)[Parts][kTile<T>][Stride]) {
  using R = Real<T>;
  constexpr int per_row = kTile<T> / kPack<R>, packs = kTile<T> * per_row;
  constexpr int rounds = (packs + kThreads - 1) / kThreads;
  const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
  R values[rounds][kPack<R>];
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * kThreads + threadIdx.x, at = column + i % per_row * kPack<R>;
    const int valid = i < packs && row + i / per_row < rank ? rank - at : 0;
    load(gram + int64_t(start + row + i / per_row) * experts.gram_width + at, valid, wide,
        values[round]);
  }
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const int i = round * kThreads + threadIdx.x;
    if (i >= packs) break;
#pragma unroll
    for (int c = 0; c < kPack<R>; ++c) {
      const int to = i % per_row * kPack<R> + c;
      const T high = rounded<T>(values[round][c]);
      squares[0][i / per_row][to] = high;
      if constexpr (Parts == 2)
        squares[1][i / per_row][to] = rounded<T>(values[round][c] - real(high));
    }
  }
}

// product[c] = sum_i latent[token, i] gram_k[i, start + c], for the thread's token and its own
// kPack columns of the tile that begins at `tile`. All threads of the block must call it.
template <class T>
__device__ void gram_product(const Place& place, const Experts& experts, int k, int tile,
    const T* latent, const Real<T>* gram, bool wide, Real<T> (&product)[kPack<T>]) {
  using R = Real<T>;
  constexpr int width = kTile<T>;
  constexpr bool halves = sizeof(T) == 2;
  constexpr int stride = width + (halves ? 8 : 1);  // rows start in different banks
  alignas(16) __shared__ T rows[kTokens][stride];
  alignas(16) __shared__ T squares[halves ? 2 : 1][width][stride];
  const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
  const T* own = latent + (place.first + place.row) * experts.total + start;
  float sums[2][4] = {};
#pragma unroll
  for (int c = 0; c < kPack<T>; ++c) product[c] = 0;
  for (int inner = 0; inner < rank; inner += width) {
    const int own_at = inner + place.column * kPack<T>;
    R values[kPack<T>];
    load(own + own_at, place.row < place.count ? rank - own_at : 0, wide, values);
    __syncthreads();  // the previous tile has been used up
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c)
      rows[place.row][place.column * kPack<T> + c] = rounded<T>(values[c]);
    load_squares<T>(experts, k, tile, inner, gram, wide, squares);  // symmetric: rows are columns
    __syncthreads();
    if constexpr (halves) multiply<T>(rows, squares[0], squares[1], rank - tile, sums);
    else multiply(rows, squares[0], place, product);
  }
  if constexpr (halves) {
    __shared__ float out[kTokens][width + 4];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int token = warp % 2 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[token + i / 2 % 2 * 8][(warp / 2 * 2 + i / 4) * 8 + lane % 4 * 2 + i % 2] =
          sums[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) product[c] = out[place.row][place.column * kPack<T> + c];
  }
}

inline int64_t blocks_of(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
bool ranks_aligned(const Experts& experts) {  // every rank begins a pack
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
