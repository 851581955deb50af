// The fused kernels on CUDA. Raw pointers and the caller's stream: no host synchronisation, no
// float atomics, so runs repeat bit by bit and graphs can capture them.
//
// Every (token, expert) touches contiguous ranks; a grid's y runs over the experts where they are
// independent. Sums over tokens go through per-block partials and a second, small kernel.
#include <algorithm>

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

// A lane is a token, a warp's columns share its latents: for decoding, where N is small.
constexpr int kSmallTokens = 64, kSmallColumns = 2, kSmallRanks = 64, kSmallThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSmallThreads)
expand_small_kernel(Shape shape, const __grid_constant__ Experts experts, const T* latent,
                    const Real<T>* gates, const T* up, T* y) {
  using R = Real<T>;
  __shared__ R gated[kWarp][kSmallRanks + 1];
  const int64_t tokens = shape.batch * shape.tokens, first = int64_t(blockIdx.y) * kWarp;
  const int64_t n = first + threadIdx.x % kWarp;
  const int64_t column =
      (int64_t(blockIdx.x) * (kSmallThreads / kWarp) + threadIdx.x / kWarp) * kSmallColumns;
  R sums[kSmallColumns] = {};
  for (int k = 0; k < experts.count; ++k) {
    const int rank = experts.offset[k + 1] - experts.offset[k];
    for (int begin = 0; begin < rank; begin += kSmallRanks) {
      const int start = experts.offset[k] + begin;
      const int width = rank - begin < kSmallRanks ? rank - begin : kSmallRanks;
      __syncthreads();  // the previous ranks have been used up
      for (int i = threadIdx.x; i < kWarp * width; i += kSmallThreads) {
        const int64_t token = first + i / width;
        gated[i / width][i % width] = token < tokens
            ? real(latent[token * experts.total + start + i % width]) * R(experts.scale[k]) *
                  gates[token / shape.tokens * experts.count + k] : R(0);
      }
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kSmallColumns; ++c) {
        if (column + c >= shape.d_model) continue;
        const T* row = up + (column + c) * experts.total + start;
        for (int i = 0; i < width; ++i) sums[c] += gated[threadIdx.x % kWarp][i] * real(row[i]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kSmallColumns; ++c)
    if (n < tokens && column + c < shape.d_model) {
      T* to = y + n * shape.d_model + column + c;
      *to = rounded<T>(real(*to) + sums[c]);
    }
}

// Per block: kChunk tokens of one sample and one expert.
template <class T>
__global__ void __launch_bounds__(kThreads)
mixture_backward_kernel(Shape shape, const __grid_constant__ Experts experts,
                        MixtureBackward args, int64_t chunks, bool wide) {
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
    const int64_t at = (b * shape.tokens + first + i / packs) * experts.total +
                       experts.offset[k] + column;
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
__global__ void sum_chunks_kernel(int64_t gates, int count, int64_t chunks, const R* partials,
                                  R* dgates) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= gates) return;
  R sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    sum += partials[(at / count * chunks + chunk) * count + at % count];
  dgates[at] = sum;
}

template <class R> __device__ R mean_gate(const Shape& shape, int count, int k, const R* gates) {
  R sum = 0;  // one warp, in the same order wherever it is needed
  for (int64_t b = threadIdx.x % kWarp; b < shape.batch; b += kWarp) sum += gates[b * count + k];
  return lane_sum<kWarp>(sum) / R(shape.batch > 0 ? shape.batch : 1);
}

template <class R> __device__ R token_weight(const Shape& shape, const void* weights, int64_t n) {
  return weights ? static_cast<const R*>(weights)[n] : R(1) / R(shape.batch * shape.tokens);
}

constexpr int kSparsityBlocks = 2;  // on one multiprocessor; asking for more makes registers spill

// Per block: kTokens tokens and all experts, so that z is read once.
template <class T>
__global__ void __launch_bounds__(kThreads, kSparsityBlocks)
sparsity_forward_kernel(Shape shape, const __grid_constant__ Experts experts,
                        SparsityForward args, bool wide, bool wide_z) {
  using R = Real<T>;
  __shared__ R norm_z[kTokens], distance[kTokens];
  const Place place(blockIdx.x, shape.batch * shape.tokens);
  const int lane = threadIdx.x % kWarp, count = experts.count;
  const int64_t n = place.first + place.row, token_at = n * experts.total;
  for (int row = threadIdx.x / kWarp; row < place.count; row += kThreads / kWarp) {
    const T* z = static_cast<const T*>(args.z) + (place.first + row) * shape.d_model;
    R sum = 0, value[kPack<T>];
    for (int64_t i = lane * kPack<T>; i < shape.d_model; i += kWarp * kPack<T>) {
      load(z + i, int(min(shape.d_model - i, int64_t(kPack<T>))), wide_z, value);
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) sum += value[c] * value[c];
    }
    sum = lane_sum<kWarp>(sum);
    if (lane == 0) norm_z[row] = sqrt(sum);
  }
  __syncthreads();
  R* stats = static_cast<R*>(args.stats) + n * (2 * count + 1);
  const bool present = place.row < place.count;
  for (int k = 0; k < count; ++k) {
    const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
    R dot = 0, square = 0, product[kPack<T>], latent[kPack<T>], projection[kPack<T>];
    for (int tile = 0; tile < rank; tile += kTile<T>) {
      gram_product<T>(place, experts, k, tile, static_cast<const T*>(args.latent),
                      static_cast<const R*>(args.gram), product);
      const int column = tile + place.column * kPack<T>, valid = present ? rank - column : 0;
      load(static_cast<const T*>(args.latent) + token_at + start + column, valid, wide, latent);
      load(static_cast<const T*>(args.projection) + token_at + start + column, valid, wide, projection);
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) {
        dot += latent[c] * projection[c];
        square += latent[c] * product[c];
      }
    }
    dot = lane_sum<kPerToken>(dot) * R(experts.scale[k]);
    square = lane_sum<kPerToken>(square);
    if (place.column == 0) {
      const R norm = sqrt(max(square, R(0))) * abs(R(experts.scale[k]));
      const R safe_z = present ? max(norm_z[place.row], R(kCosineEps)) : R(1);
      const R cosine = dot / (max(norm, R(kCosineEps)) * safe_z);
      distance[place.row] = present ? token_weight<R>(shape, args.token_weights, n) * (1 - cosine) : R(0);
      if (present) {
        stats[k] = cosine;
        stats[count + k] = norm;
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const R sum = lane_sum<kWarp>(distance[lane]);
      if (lane == 0) static_cast<R*>(args.partials)[int64_t(blockIdx.x) * count + k] = sum;
    }
    __syncthreads();
  }
  if (present && place.column == 0) stats[2 * count] = norm_z[place.row];
}

// One block; a warp per expert.
template <class R>
__global__ void __launch_bounds__(kThreads)
sum_distances_kernel(Shape shape, int count, int64_t blocks, SparsityForward args) {
  __shared__ R parts[kMaxExperts];
  const int lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < count; k += kThreads / kWarp) {
    R sum = 0;
    for (int64_t block = lane; block < blocks; block += kWarp)
      sum += static_cast<const R*>(args.partials)[block * count + k];
    sum = lane_sum<kWarp>(sum);
    const R mean = mean_gate(shape, count, k, static_cast<const R*>(args.gates));
    if (lane == 0) {
      static_cast<R*>(args.distance)[k] = sum;
      parts[k] = mean * sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    R loss = 0;
    for (int k = 0; k < count; ++k) loss += parts[k];
    *static_cast<R*>(args.loss) = loss;
  }
}

// Per block: kTokens tokens and all experts; block 0 does the gates as well.
template <class T>
__global__ void __launch_bounds__(kThreads, kSparsityBlocks)
sparsity_backward_kernel(Shape shape, const __grid_constant__ Experts experts,
                         SparsityBackward args, bool wide, bool wide_z) {
  using R = Real<T>;
  __shared__ R push_all[kMaxExperts], shrink_z[kTokens];
  const Place place(blockIdx.x, shape.batch * shape.tokens);
  const int lane = threadIdx.x % kWarp, count = experts.count;
  const int64_t n = place.first + place.row, token_at = n * experts.total;
  const bool present = place.row < place.count;
  const R grad = *static_cast<const R*>(args.grad);
  for (int k = threadIdx.x / kWarp; k < count; k += kThreads / kWarp) {
    const R mean = mean_gate(shape, count, k, static_cast<const R*>(args.gates));
    if (lane == 0) push_all[k] = grad * mean;
  }
  if (blockIdx.x == 0)
    for (int64_t i = threadIdx.x; i < shape.batch * count; i += kThreads)
      static_cast<R*>(args.dgates)[i] =
          grad * static_cast<const R*>(args.distance)[i % count] / R(shape.batch);
  __syncthreads();

  const R* stats = static_cast<const R*>(args.stats) + n * (2 * count + 1);
  const R norm = present ? stats[2 * count] : R(0), safe_z = max(norm, R(kCosineEps));
  const R weight = present ? token_weight<R>(shape, args.token_weights, n) : R(0);
  R shrink_sum = 0;
  for (int k = 0; k < count; ++k) {
    const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
    const R scale = R(experts.scale[k]), push = push_all[k] * weight;
    const R cosine = present ? stats[k] : R(0), norm_k = present ? stats[count + k] : R(0);
    const R safe_k = max(norm_k, R(kCosineEps));
    // cosine_similarity clamps its norms outside of autograd: the clamped value divides, the
    // gradient is that of the unclamped norm, and 0 at 0.
    const R along = -push * scale / (safe_k * safe_z);
    const R shrink = norm_k > 0 ? push * cosine * scale * scale / (safe_k * norm_k) : R(0);
    shrink_sum += push * cosine;
    R product[kPack<T>], latent[kPack<T>], projection[kPack<T>];
    for (int tile = 0; tile < rank; tile += kTile<T>) {
      gram_product<T>(place, experts, k, tile, static_cast<const T*>(args.latent),
                      static_cast<const R*>(args.gram), product);
      const int column = tile + place.column * kPack<T>, valid = present ? rank - column : 0;
      const int64_t at = token_at + start + column;
      load(static_cast<const T*>(args.latent) + at, valid, wide, latent);
      load(static_cast<const T*>(args.projection) + at, valid, wide, projection);
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) {
        projection[c] = along * projection[c] + shrink * product[c];
        latent[c] *= along;
      }
      store(latent, valid, wide, static_cast<T*>(args.mix) + at);
      store(projection, valid, wide, static_cast<T*>(args.dlatent) + at);
    }
  }
  if (place.column == 0) shrink_z[place.row] = norm > 0 ? shrink_sum / (safe_z * norm) : R(0);
  __syncthreads();
  for (int row = threadIdx.x / kWarp; row < place.count; row += kThreads / kWarp) {
    const int64_t at = (place.first + row) * shape.d_model;
    R value[kPack<T>];
    for (int64_t i = lane * kPack<T>; i < shape.d_model; i += kWarp * kPack<T>) {
      const int valid = int(min(shape.d_model - i, int64_t(kPack<T>)));
      load(static_cast<const T*>(args.z) + at + i, valid, wide_z, value);
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) value[c] *= shrink_z[row];
      store(value, valid, wide_z, static_cast<T*>(args.dz) + at + i);
    }
  }
}

int64_t blocks_of(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

template <class... Pointers> bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T> bool ranks_aligned(const Experts& experts) {  // every rank begins a pack
  return std::all_of(experts.offset, experts.offset + experts.count + 1,
                     [](int offset) { return offset % kPack<T> == 0; });
}

// Calls `run` with a null pointer of the tensors' type.
template <class Run> void with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32: return run(static_cast<float*>(nullptr));
    case Dtype::f64: return run(static_cast<double*>(nullptr));
    case Dtype::bf16: return run(static_cast<bf16*>(nullptr));
    case Dtype::f16: return run(static_cast<f16*>(nullptr));
  }
}

}  // namespace

int64_t mixture_partials(const Shape& shape) { return blocks_of(shape.tokens, kChunk); }

int64_t sparsity_partials(const Shape& shape) {
  return blocks_of(shape.batch * shape.tokens, kTokens);
}

bool expand_small(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
                  const void* latent, const void* gates, const void* up, void* y) {
  const int64_t tokens = shape.batch * shape.tokens;
  if (tokens == 0 || tokens > kSmallTokens) return false;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid(unsigned(blocks_of(shape.d_model, kSmallThreads / kWarp * kSmallColumns)),
                    unsigned(blocks_of(tokens, kWarp)));
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
    const bool wide = ranks_aligned<T>(experts) && aligned(args.latent, args.projection, args.dlatent);
    if (chunks > 0)
      launch(mixture_backward_kernel<T>, dim3(unsigned(shape.batch * chunks), experts.count),
             kThreads, stream, shape, experts, args, chunks, wide);
    launch(sum_chunks_kernel<R>, dim3(unsigned(blocks_of(gates, kThreads))), kThreads, stream,
           gates, experts.count, chunks, static_cast<const R*>(args.partials),
           static_cast<R*>(args.dgates));
  });
}

void sparsity_forward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
                      const SparsityForward& args) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = sparsity_partials(shape);
    const bool wide = ranks_aligned<T>(experts) && aligned(args.latent, args.projection);
    const bool wide_z = shape.d_model % kPack<T> == 0 && aligned(args.z);
    if (blocks > 0)
      launch(sparsity_forward_kernel<T>, dim3(unsigned(blocks)), kThreads, stream, shape, experts,
             args, wide, wide_z);
    launch(sum_distances_kernel<Real<T>>, dim3(1), kThreads, stream, shape, experts.count, blocks,
           args);
  });
}

void sparsity_backward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
                       const SparsityBackward& args) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = std::max<int64_t>(1, sparsity_partials(shape));  // one for the gates
    const bool wide = ranks_aligned<T>(experts) &&
                      aligned(args.latent, args.projection, args.mix, args.dlatent);
    const bool wide_z = shape.d_model % kPack<T> == 0 && aligned(args.z, args.dz);
    launch(sparsity_backward_kernel<T>, dim3(unsigned(blocks)), kThreads, stream, shape, experts,
           args, wide, wide_z);
  });
}

}  // namespace pemt
