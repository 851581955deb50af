// The mixture's kernels on CUDA. Raw pointers and the caller's stream: no synchronisation, no
// float atomics, so runs repeat bit by bit and graphs can capture them.
//
// Every (token, expert) touches contiguous ranks; a grid's y runs over the experts, which are
// independent. What each must move, in numbers of the tensors' type (beside it the rest is small):
//     gate_latent 2 NT, expand_small DT + NT + 2 ND,
//     mixture_backward 4 NT (3 NT where the latent has no gradient from outside).
#include "cuda_tiles.cuh"

namespace pemt {
namespace {

// Per block: kChunk tokens of any sample and one expert.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_latent_kernel(Shape shape, const __grid_constant__ Experts experts, const T* latent,
        const Real<T>* gates, T* gated, bool wide) {
  using R = Real<T>;
  const int k = blockIdx.y, rank = experts.offset[k + 1] - experts.offset[k];
  const int packs = (rank + kPack<T> - 1) / kPack<T>;
  const int64_t first = int64_t(blockIdx.x) * kChunk, tokens = shape.batch * shape.tokens;
  for (int i = threadIdx.x; i < kChunk * packs; i += kThreads) {
    const int64_t n = first + i / packs;
    if (n >= tokens) break;
    const int column = i % packs * kPack<T>;
    const int64_t at = n * experts.total + experts.offset[k] + column;
    const R factor = gates[n / shape.tokens * experts.count + k] * R(experts.scale[k]);
    R value[kPack<T>];
    load(latent + at, rank - column, wide, value);
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) value[c] *= factor;
    store(value, rank - column, wide, gated + at);
  }
}

// For decoding, where N is small. A lane is a token, a warp has kSmallColumns columns of y.
constexpr int kSmallTokens = 64, kSmallColumns = 2, kSmallRanks = 64, kSmallThreads = 128;
constexpr int kSmallBlocks = 4;  // on one multiprocessor: leaves the registers that it needs
constexpr int kBlockColumns = kSmallThreads / kWarp * kSmallColumns;

template <class T>
__global__ void __launch_bounds__(kSmallThreads, kSmallBlocks)
    expand_small_kernel(Shape shape, const __grid_constant__ Experts experts, const T* latent,
        const Real<T>* gates, const T* up, T* y) {
  using R = Real<T>;
  __shared__ R gated[kWarp][kSmallRanks + 1], rows[kBlockColumns][kSmallRanks];
  const int64_t tokens = shape.batch * shape.tokens, first = int64_t(blockIdx.y) * kWarp;
  const int64_t first_column = int64_t(blockIdx.x) * kBlockColumns;
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * kSmallColumns;
  R sums[kSmallColumns] = {};
  for (int k = 0; k < experts.count; ++k) {
    const int rank = experts.offset[k + 1] - experts.offset[k];
    for (int begin = 0; begin < rank; begin += kSmallRanks) {
      const int start = experts.offset[k] + begin;
      const int width = rank - begin < kSmallRanks ? rank - begin : kSmallRanks;
      __syncthreads();  // the previous ranks have been used up
      for (int i = threadIdx.x; i < kWarp * kSmallRanks; i += kSmallThreads) {
        const int64_t token = first + i / kSmallRanks;
        const int at = i % kSmallRanks;
        gated[i / kSmallRanks][at] = token < tokens && at < width
                                         ? real(latent[token * experts.total + start + at]) *
                                               R(experts.scale[k]) *
                                               gates[token / shape.tokens * experts.count + k]
                                         : R(0);
      }
      for (int i = threadIdx.x; i < kBlockColumns * kSmallRanks; i += kSmallThreads) {
        const int64_t column = first_column + i / kSmallRanks;
        const int at = i % kSmallRanks;
        rows[i / kSmallRanks][at] = column < shape.d_model && at < width
                                        ? real(up[column * experts.total + start + at])
                                        : R(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < kSmallRanks; ++i)
#pragma unroll
        for (int c = 0; c < kSmallColumns; ++c) sums[c] += gated[lane][i] * rows[own + c][i];
    }
  }
#pragma unroll
  for (int c = 0; c < kSmallColumns; ++c) {
    const int64_t n = first + lane, column = first_column + own + c;
    if (n >= tokens || column >= shape.d_model) continue;
    T* to = y + n * shape.d_model + column;
    *to = rounded<T>(real(*to) + sums[c]);
  }
}

// Per block: kChunk tokens of one sample and one expert.
template <class T>
__global__ void __launch_bounds__(kThreads) mixture_backward_kernel(Shape shape,
    const __grid_constant__ Experts experts, MixtureBackward args, int64_t chunks, bool wide) {
  using R = Real<T>;
  const int k = blockIdx.y, rank = experts.offset[k + 1] - experts.offset[k];
  const int packs = (rank + kPack<T> - 1) / kPack<T>;
  const int64_t b = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  const R scale = R(experts.scale[k]);
  const R factor = static_cast<const R*>(args.gates)[b * experts.count + k] * scale;
  const T* outer_rows = static_cast<const T*>(args.dlatent);
  T* projections = static_cast<T*>(args.projection);
  R sum = 0;
  for (int i = threadIdx.x; i < kChunk * packs; i += kThreads) {
    if (first + i / packs >= shape.tokens) break;
    const int column = i % packs * kPack<T>, valid = rank - column;
    const int64_t at =
        (b * shape.tokens + first + i / packs) * experts.total + experts.offset[k] + column;
    R latent[kPack<T>], projection[kPack<T>], outer[kPack<T>] = {};
    load(static_cast<const T*>(args.latent) + at, valid, wide, latent);
    load(projections + at, valid, wide, projection);
    if (outer_rows) load(outer_rows + at, valid, wide, outer);
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) {
      sum += latent[c] * projection[c];
      projection[c] = projection[c] * factor + outer[c];
    }
    if (args.need_dlatent) store(projection, valid, wide, projections + at);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0)
    static_cast<R*>(args.partials)[int64_t(blockIdx.x) * experts.count + k] = sum * scale;
}

// One thread per gate; a warp reads neighbouring gates of a chunk together.
template <class R>
__global__ void sum_chunks_kernel(
    int64_t gates, int count, int64_t chunks, const R* partials, R* dgates) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= gates) return;
  R sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    sum += partials[(at / count * chunks + chunk) * count + at % count];
  dgates[at] = sum;
}

}  // namespace

int64_t mixture_partials(const Shape& shape) { return blocks_of(shape.tokens, kChunk); }

bool expand_small(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const void* latent, const void* gates, const void* up, void* y) {
  const int64_t tokens = shape.batch * shape.tokens;
  if (tokens == 0 || tokens > kSmallTokens) return false;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid(
        unsigned(blocks_of(shape.d_model, kBlockColumns)), unsigned(blocks_of(tokens, kWarp)));
    launch(expand_small_kernel<T>, grid, kSmallThreads, stream, shape, experts,
        static_cast<const T*>(latent), static_cast<const Real<T>*>(gates),
        static_cast<const T*>(up), static_cast<T*>(y));
  });
  return true;
}

void gate_latent(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const void* latent, const void* gates, void* gated) {
  const int64_t blocks = blocks_of(shape.batch * shape.tokens, kChunk);
  if (blocks == 0) return;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(gate_latent_kernel<T>, dim3(unsigned(blocks), experts.count), kThreads, stream, shape,
        experts, static_cast<const T*>(latent), static_cast<const Real<T>*>(gates),
        static_cast<T*>(gated), ranks_aligned<T>(experts) && aligned(latent, gated));
  });
}

void mixture_backward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const MixtureBackward& args) {
  if (shape.batch == 0) return;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using R = Real<T>;
    const int64_t chunks = mixture_partials(shape), gates = shape.batch * experts.count;
    const bool wide =
        ranks_aligned<T>(experts) && aligned(args.latent, args.projection, args.dlatent);
    if (chunks > 0)
      launch(mixture_backward_kernel<T>, dim3(unsigned(shape.batch * chunks), experts.count),
          kThreads, stream, shape, experts, args, chunks, wide);
    launch(sum_chunks_kernel<R>, dim3(unsigned(blocks_of(gates, kThreads))), kThreads, stream,
        gates, experts.count, chunks, static_cast<const R*>(args.partials),
        static_cast<R*>(args.dgates));
  });
}

}  // namespace pemt
