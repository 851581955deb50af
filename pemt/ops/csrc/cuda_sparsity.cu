// The sparsity loss's kernels on CUDA. Raw pointers and the caller's stream: no synchronisation, no
// float atomics, so runs repeat bit by bit and graphs can capture them.
//
// A block has all experts of its tokens, so that z is read once. What each must move, in numbers of
// the tensors' type: sparsity_forward ND + 2 NT, sparsity_backward 3 ND + 4 NT (2 ND where
// z has no gradient from elsewhere).
#include <algorithm>

#include "cuda_tiles.cuh"

namespace pemt {
namespace {

template <class R>
__device__ R mean_gate(const Shape& shape, int count, int k, const R* gates) {
  R sum = 0;  // one warp, in the same order wherever it is needed
  for (int64_t b = threadIdx.x % kWarp; b < shape.batch; b += kWarp) sum += gates[b * count + k];
  return lane_sum<kWarp>(sum) / R(shape.batch > 0 ? shape.batch : 1);
}

template <class R>
__device__ R token_weight(const Shape& shape, const void* weights, int64_t n) {
  return weights ? static_cast<const R*>(weights)[n] : R(1) / R(shape.batch * shape.tokens);
}

constexpr int kSparsityBlocks = 2;  // on one multiprocessor; asking for more makes registers spill

// Per block: kTokens tokens and all experts, so that z is read once.
template <class T>
__global__ void __launch_bounds__(kThreads, kSparsityBlocks) sparsity_forward_kernel(Shape shape,
    const __grid_constant__ Experts experts, SparsityForward args, bool wide, bool wide_z) {
  using R = Real<T>;
  constexpr int step = kWarp * kPack<T>;
  __shared__ R norm_z[kTokens];
  __shared__ R distance[kTokens][kMaxExperts];
  const Place place(blockIdx.x, shape.batch * shape.tokens);
  const int lane = threadIdx.x % kWarp, count = experts.count;
  const int64_t n = place.first + place.row;
  for (int row = threadIdx.x / kWarp; row < place.count; row += kThreads / kWarp) {
    const T* z = static_cast<const T*>(args.z) + (place.first + row) * shape.d_model;
    R sum = 0;
    for (int64_t i = lane * kPack<T>; i < shape.d_model; i += kInFlight * step) {
      const T* from[kInFlight];
      int valid[kInFlight];
      Pack<T> value[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        from[j] = z + i + j * step;
        valid[j] = left_of<T>(shape.d_model, i + j * step);
      }
      load(from, valid, wide_z, value);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
#pragma unroll
        for (int c = 0; c < kPack<T>; ++c) sum += real(value[j].value[c]) * real(value[j].value[c]);
    }
    sum = lane_sum<kWarp>(sum);
    if (lane == 0) norm_z[row] = sqrt(sum);
  }
  __syncthreads();
  R* stats = static_cast<R*>(args.stats) + n * (2 * count + 1);
  const bool present = place.row < place.count;
  const R safe_z = present ? max(norm_z[place.row], R(kCosineEps)) : R(1);
  const T* latents = row_of<T>(args.latent, n);
  const T* projections = static_cast<const T*>(args.projection) + n * experts.total;
  R dot = 0, square = 0;
  for (Tiles<T> tiles; tiles.k < count;) {
    tiles.next(experts, place, latents, projections, wide);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int k = tiles.expert[j];
      if (k >= count) continue;  // all threads of the block agree
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) {
        const R latent = real(tiles.found[j].value[c]);
        dot += latent * real(tiles.found[j + kPairs].value[c]);
        square += latent * latent;
      }
      if (!tiles.ends[j]) continue;
      dot = lane_sum<kPerToken>(dot) * R(experts.scale[k]);
      const R norm = sqrt(lane_sum<kPerToken>(square)) * abs(R(experts.scale[k]));
      const R cosine = dot / (max(norm, R(kCosineEps)) * safe_z);
      if (place.column == 0) {
        distance[place.row][k] =
            present ? token_weight<R>(shape, args.token_weights, n) * (1 - cosine) : R(0);
        if (present) {
          stats[k] = cosine;
          stats[count + k] = norm;
        }
      }
      dot = square = 0;
    }
  }
  if (present && place.column == 0) stats[2 * count] = norm_z[place.row];
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += kThreads) {
    R sum = 0;
    for (int row = 0; row < kTokens; ++row) sum += distance[row][k];
    static_cast<R*>(args.partials)[int64_t(blockIdx.x) * count + k] = sum;
  }
}

// One block; a warp per expert.
template <class R>
__global__ void __launch_bounds__(kThreads)
    sum_distances_kernel(Shape shape, int count, int64_t blocks, SparsityForward args) {
  __shared__ double parts[kMaxExperts];
  const int lane = threadIdx.x % kWarp;
  for (int k = threadIdx.x / kWarp; k < count; k += kThreads / kWarp) {
    double sum = 0;  // many blocks: float would round at each
    for (int64_t block = lane; block < blocks; block += kWarp)
      sum += static_cast<const R*>(args.partials)[block * count + k];
    sum = lane_sum<kWarp>(sum);
    const R mean = mean_gate(shape, count, k, static_cast<const R*>(args.gates));
    if (lane == 0) {
      static_cast<R*>(args.distance)[k] = R(sum);
      parts[k] = mean * sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double loss = 0;
    for (int k = 0; k < count; ++k) loss += parts[k];
    *static_cast<R*>(args.loss) = R(loss);
  }
}

// Per block: kTokens tokens and all experts; block 0 does the gates as well.
template <class T>
__global__ void __launch_bounds__(kThreads, kSparsityBlocks) sparsity_backward_kernel(Shape shape,
    const __grid_constant__ Experts experts, SparsityBackward args, bool wide, bool wide_z) {
  using R = Real<T>;
  constexpr int step = kWarp * kPack<T>;
  __shared__ R push_all[kMaxExperts], shrink_z[kTokens];
  const Place place(blockIdx.x, shape.batch * shape.tokens);
  const int lane = threadIdx.x % kWarp, count = experts.count;
  const int64_t n = place.first + place.row;
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
  const T* latents = row_of<T>(args.latent, n);
  const T* projections = static_cast<const T*>(args.projection) + n * experts.total;
  R shrink_sum = 0;
  for (Tiles<T> tiles; tiles.k < count;) {
    tiles.next(experts, place, latents, projections, wide);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int k = tiles.expert[j], valid = tiles.valid[j];
      if (valid <= 0 && place.column > 0) continue;
      if (k >= count) continue;
      const R scale = R(experts.scale[k]), push = push_all[k] * weight;
      const R cosine = present ? stats[k] : R(0), norm_k = present ? stats[count + k] : R(0);
      const R safe_k = max(norm_k, R(kCosineEps));
      // cosine_similarity clamps its norms outside of autograd: the clamped value divides, the
      // gradient is that of the unclamped norm, and 0 at 0.
      const R along = -push * scale / (safe_k * safe_z);
      const R shrink = norm_k > 0 ? push * cosine * scale * scale / (safe_k * norm_k) : R(0);
      if (tiles.begins[j]) shrink_sum += push * cosine;
      R mix[kPack<T>], dlatent[kPack<T>];
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) {
        const R latent = real(tiles.found[j].value[c]);
        mix[c] = along * latent;
        dlatent[c] = along * real(tiles.found[j + kPairs].value[c]) + shrink * latent;
      }
      if (valid <= 0) continue;
      store(mix, valid, wide, static_cast<T*>(args.mix) + n * experts.total + tiles.at[j]);
      store(dlatent, valid, wide, row_of<T>(args.dlatent, n) + tiles.at[j]);
    }
  }
  if (place.column == 0) shrink_z[place.row] = norm > 0 ? shrink_sum / (safe_z * norm) : R(0);
  __syncthreads();
  for (int row = threadIdx.x / kWarp; row < place.count; row += kThreads / kWarp) {
    const int64_t token = place.first + row;
    const T* z = static_cast<const T*>(args.z) + token * shape.d_model;
    const T* dz = args.dz ? static_cast<const T*>(args.dz) + token * shape.d_model : z;
    T* whole = row_of<T>(args.whole_dz, token);
    for (int64_t i = lane * kPack<T>; i < shape.d_model; i += kPairs * step) {
      const T* from[2 * kPairs];
      int valid[2 * kPairs];
      Pack<T> found[2 * kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        valid[j] = left_of<T>(shape.d_model, i + j * step);
        valid[j + kPairs] = args.dz ? valid[j] : 0;
        from[j] = z + i + j * step;
        from[j + kPairs] = dz + i + j * step;
      }
      load(from, valid, wide_z, found);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        R value[kPack<T>];
#pragma unroll
        for (int c = 0; c < kPack<T>; ++c)
          value[c] = shrink_z[row] * real(found[j].value[c]) + real(found[j + kPairs].value[c]);
        store(value, valid[j], wide_z, whole + i + j * step);
      }
    }
  }
}

}  // namespace

int64_t sparsity_partials(const Shape& shape) {
  return blocks_of(shape.batch * shape.tokens, kTokens);
}

void sparsity_forward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const SparsityForward& args) {
  with_type<bf16, f16>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = sparsity_partials(shape);
    const bool wide =
        ranks_aligned<T>(experts) && aligned<T>(args.latent) && aligned(args.projection);
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
  with_type<bf16, f16>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = std::max<int64_t>(1, sparsity_partials(shape));  // one for the gates
    const bool wide = ranks_aligned<T>(experts) && aligned<T>(args.latent) &&
                      aligned(args.projection, args.mix) && aligned<T>(args.dlatent);
    const bool wide_z =
        shape.d_model % kPack<T> == 0 && aligned(args.z, args.dz) && aligned<T>(args.whole_dz);
    launch(sparsity_backward_kernel<T>, dim3(unsigned(blocks)), kThreads, stream, shape, experts,
        args, wide, wide_z);
  });
}

}  // namespace pemt
