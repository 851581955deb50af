// The mixture's kernels on CUDA. Raw pointers and the caller's stream: no synchronisation, no
// float atomics, so runs repeat bit by bit and graphs can capture them.
//
// Every (token, expert) touches contiguous ranks; a grid's y runs over the experts, which are
// independent. What each must move, in numbers of the tensors' type (beside it the rest is small):
//     gate_latent 2 NT, mixture_backward 4 NT (3 NT without a loss, whose part it adds to).
#include "cuda_tiles.cuh"

namespace pemt {
namespace {

// Per block: kGatedChunk tokens of any sample and one expert.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_latent_kernel(Shape shape, const __grid_constant__ Experts experts, Read latents,
        const Real<T>* gates, T* gated, bool wide) {
  using R = Real<T>;
  const int k = blockIdx.y, start = experts.offset[k], rank = experts.offset[k + 1] - start;
  const int packs = (rank + kPack<T> - 1) / kPack<T>;
  const int64_t first = int64_t(blockIdx.x) * kGatedChunk, tokens = shape.batch * shape.tokens;
  for (int i = threadIdx.x; i < kGatedChunk * packs; i += kInFlight * kThreads) {
    const T* from[kInFlight];
    int64_t token[kInFlight];
    int column[kInFlight], valid[kInFlight];
    Pack<T> latent[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int at = i + j * kThreads;
      token[j] = first + at / packs;
      column[j] = at % packs * kPack<T>;
      const bool present = at < kGatedChunk * packs && token[j] < tokens;
      valid[j] = present ? left_of<T>(rank, column[j]) : 0;
      from[j] = row_of<T>(latents, token[j]) + start + column[j];
    }
    load(from, valid, wide, latent);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (valid[j] <= 0) continue;
      const R factor = gates[token[j] / shape.tokens * experts.count + k] * R(experts.scale[k]);
      R value[kPack<T>];
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) value[c] = real(latent[j].value[c]) * factor;
      store(value, valid[j], wide, gated + token[j] * experts.total + start + column[j]);
    }
  }
}

// Per block: kChunk tokens of one sample and one expert; each pair has the loss's part as a third.
template <class T>
__global__ void __launch_bounds__(kThreads) mixture_backward_kernel(Shape shape,
    const __grid_constant__ Experts experts, MixtureBackward args, int64_t chunks, bool wide) {
  using R = Real<T>;
  const int k = blockIdx.y, start = experts.offset[k], rank = experts.offset[k + 1] - start;
  const int packs = (rank + kPack<T> - 1) / kPack<T>;
  const int64_t b = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  const R scale = R(experts.scale[k]);
  const R factor = static_cast<const R*>(args.gates)[b * experts.count + k] * scale;
  R sum = 0;
  for (int i = threadIdx.x; i < kChunk * packs; i += kPairs * kThreads) {
    const T* from[3 * kPairs];
    T* to[kPairs];
    int valid[3 * kPairs];
    Pack<T> found[3 * kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int at = i + j * kThreads, column = at % packs * kPack<T>;
      const int64_t s = first + at / packs, n = b * shape.tokens + s;
      valid[j] = at < kChunk * packs && s < shape.tokens ? left_of<T>(rank, column) : 0;
      valid[j + kPairs] = valid[j];
      valid[j + 2 * kPairs] = args.sparsity_gate ? valid[j] : 0;
      to[j] = row_of<T>(args.dlatent, n) + start + column;
      from[j] = row_of<T>(args.latent, n) + start + column;
      from[j + kPairs] =
          static_cast<const T*>(args.projection) + n * experts.total + start + column;
      from[j + 2 * kPairs] = to[j];
    }
    load(from, valid, wide, found);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      R value[kPack<T>];
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) {
        const R projection = real(found[j + kPairs].value[c]);
        sum += real(found[j].value[c]) * projection;
        value[c] = projection * factor + real(found[j + 2 * kPairs].value[c]);
      }
      store(value, valid[j], wide, to[j]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0)
    static_cast<R*>(args.partials)[int64_t(blockIdx.x) * experts.count + k] = sum * scale;
}

// One thread per gate; a warp reads neighbouring gates of a chunk together.
template <class R>
__global__ void sum_chunks_kernel(
    int64_t gates, int count, int64_t chunks, const R* partials, const R* other, R* dgates) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= gates) return;
  R sum = other ? other[at] : R(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    sum += partials[(at / count * chunks + chunk) * count + at % count];
  dgates[at] = sum;
}

}  // namespace

int64_t mixture_partials(const Shape& shape) { return blocks_of(shape.tokens, kChunk); }

void gate_latent(void* stream, Dtype dtype, const Shape& shape, const Experts& experts, Read latent,
    const void* gates, void* gated) {
  const int64_t blocks = blocks_of(shape.batch * shape.tokens, kGatedChunk);
  if (blocks == 0) return;
  with_type<bf16, f16>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(gate_latent_kernel<T>, dim3(unsigned(blocks), experts.count), kThreads, stream, shape,
        experts, latent, static_cast<const Real<T>*>(gates), static_cast<T*>(gated),
        ranks_aligned<T>(experts) && aligned<T>(latent) && aligned(gated));
  });
}

void mixture_backward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const MixtureBackward& args) {
  if (shape.batch == 0) return;
  with_type<bf16, f16>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using R = Real<T>;
    const int64_t chunks = mixture_partials(shape), gates = shape.batch * experts.count;
    const bool wide = ranks_aligned<T>(experts) && aligned<T>(args.latent) &&
                      aligned(args.projection) && aligned<T>(args.dlatent);
    if (chunks > 0)
      launch(mixture_backward_kernel<T>, dim3(unsigned(shape.batch * chunks), experts.count),
          kThreads, stream, shape, experts, args, chunks, wide);
    launch(sum_chunks_kernel<R>, dim3(unsigned(blocks_of(gates, kThreads))), kThreads, stream,
        gates, experts.count, chunks, static_cast<const R*>(args.partials),
        static_cast<const R*>(args.sparsity_gate), static_cast<R*>(args.dgates));
  });
}

}  // namespace pemt
