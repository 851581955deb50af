// Device code that the kernels share: rows in 16-byte packs, block sums, Gram products.
#pragma once

#include "kernels.h"
#ifdef PEMT_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include "cuda_device.cuh"
#endif

namespace pemt {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kTokens = 32;                      // tokens of one block in the sparsity kernels
constexpr int kPerToken = kThreads / kTokens;    // threads that share a token
constexpr int kChunk = 64;                       // tokens of one block in the mixture's backward
constexpr double kCosineEps = 1e-8;

template <class T> struct RealOf { using type = float; };
template <> struct RealOf<double> { using type = double; };
template <class T> using Real = typename RealOf<T>::type;

template <class T> constexpr int kPack = 16 / sizeof(T);           // elements of one wide access
template <class T> constexpr int kTile = kPerToken * kPack<T>;     // ranks of one Gram tile

template <class T> struct alignas(16) Pack {
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

template <int Lanes, class R> __device__ R lane_sum(R value) {  // the same in all `Lanes` lanes
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class R> __device__ R block_sum(R value) {  // thread 0 has it
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

template <class T> __device__ uint32_t pair_at(const T* two) {
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

// product[c] = sum_i latent[token, i] gram_k[i, start + c], for the thread's token and its own
// kPack columns of the tile that begins at `tile`. All threads of the block must call it.
template <class T>
__device__ void gram_product(const Place& place, const Experts& experts, int k, int tile,
                             const T* latent, const Real<T>* gram, Real<T> (&product)[kPack<T>]) {
  using R = Real<T>;
  constexpr int width = kTile<T>;
  constexpr bool halves = sizeof(T) == 2;
  constexpr int stride = width + (halves ? 8 : 1);  // rows start in different banks
  alignas(16) __shared__ T rows[kTokens][stride];
  alignas(16) __shared__ T squares[halves ? 2 : 1][width][stride];
  const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
  float sums[2][4] = {};
#pragma unroll
  for (int c = 0; c < kPack<T>; ++c) product[c] = 0;
  for (int inner = 0; inner < rank; inner += width) {
    __syncthreads();  // the previous tile has been used up
    for (int i = threadIdx.x; i < kTokens * width; i += kThreads) {
      const int row = i / width, rank_at = inner + i % width;
      rows[row][i % width] = row < place.count && rank_at < rank
          ? latent[(place.first + row) * experts.total + start + rank_at] : rounded<T>(R(0));
    }
    for (int i = threadIdx.x; i < width * width; i += kThreads) {
      const int row = tile + i / width, rank_at = inner + i % width;  // symmetric: rows are columns
      const R square = row < rank && rank_at < rank
          ? gram[int64_t(start + row) * experts.gram_width + rank_at] : R(0);
      squares[0][i / width][i % width] = rounded<T>(square);
      if constexpr (halves)
        squares[1][i / width][i % width] = rounded<T>(square - real(squares[0][i / width][i % width]));
    }
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
      out[token + i / 2 % 2 * 8][(warp / 2 * 2 + i / 4) * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) product[c] = out[place.row][place.column * kPack<T> + c];
  }
}

}  // namespace pemt
