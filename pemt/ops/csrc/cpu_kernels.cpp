// The fused kernels on the CPU: OpenMP over blocks of tokens, vectors of the compiler inside.
// Blocks have a fixed size, so the sums do not depend on the number of threads.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace pemt {
namespace {

constexpr int kBlock = 64;  // tokens per partial sum

template <class T>
Real<T> dot(const T* left, const T* right, int64_t count) {
  using R = Real<T>;
  R sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += R(left[i]) * R(right[i]);
  return sum;
}

template <class T>
Real<T> norm(const T* row, int64_t count) {
  return std::sqrt(dot(row, row, count));
}

template <class T>
const T* row_of(const Read& rows, int64_t n) {
  return static_cast<const T*>(rows.data) + n * rows.stride;
}

template <class T>
T* row_of(const Write& rows, int64_t n) {
  return static_cast<T*>(rows.data) + n * rows.stride;
}

template <class R>
std::vector<R> mean_gates(const Shape& shape, const Experts& experts, const R* gates) {
  std::vector<R> mean(experts.count, R(0));
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int k = 0; k < experts.count; ++k) mean[k] += gates[b * experts.count + k];
  for (R& value : mean) value /= R(std::max<int64_t>(1, shape.batch));
  return mean;
}

template <class T>
void gate_latent_of(
    const Shape& shape, const Experts& experts, Read latents, const Real<T>* gates, T* gated) {
  using R = Real<T>;
  const int64_t rows = shape.batch * shape.tokens;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < rows; ++n)
    for (int k = 0; k < experts.count; ++k) {
      const R factor = gates[n / shape.tokens * experts.count + k] * R(experts.scale[k]);
      const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
      const T* latent = row_of<T>(latents, n) + start;
      T* to = gated + n * experts.total + start;
#pragma omp simd
      for (int i = 0; i < rank; ++i) to[i] = T(R(latent[i]) * factor);
    }
}

// One token: adds to the gates' sums, and turns its projection into the latent's gradient.
template <class T>
void mixture_backward_row(const Experts& experts, const MixtureBackward& args, int64_t n,
    const Real<T>* gates, Real<T>* sums) {
  using R = Real<T>;
  for (int k = 0; k < experts.count; ++k) {
    const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
    const T* projection = static_cast<const T*>(args.projection) + n * experts.total + start;
    T* dlatent = row_of<T>(args.dlatent, n) + start;
    const R scale = R(experts.scale[k]), factor = gates[k] * scale;
    sums[k] += dot(row_of<T>(args.latent, n) + start, projection, rank) * scale;
    if (args.sparsity_gate) {
#pragma omp simd
      for (int i = 0; i < rank; ++i) dlatent[i] = T(R(projection[i]) * factor + R(dlatent[i]));
    } else {
#pragma omp simd
      for (int i = 0; i < rank; ++i) dlatent[i] = T(R(projection[i]) * factor);
    }
  }
}

template <class T>
void mixture_backward_of(const Shape& shape, const Experts& experts, const MixtureBackward& args) {
  using R = Real<T>;
  const int count = experts.count;
  const int64_t chunks = mixture_partials(shape);
  const R* gates = static_cast<const R*>(args.gates);
  R* partials = static_cast<R*>(args.partials);
  R* dgates = static_cast<R*>(args.dgates);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < shape.batch * chunks; ++block) {
    const int64_t b = block / chunks, first = block % chunks * kBlock;
    std::fill(partials + block * count, partials + (block + 1) * count, R(0));
    for (int64_t s = first; s < std::min(first + kBlock, shape.tokens); ++s)
      mixture_backward_row<T>(
          experts, args, b * shape.tokens + s, gates + b * count, partials + block * count);
  }
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int k = 0; k < count; ++k) {
      const R* other = static_cast<const R*>(args.sparsity_gate);
      R sum = other ? other[b * count + k] : R(0);
      for (int64_t c = 0; c < chunks; ++c) sum += partials[(b * chunks + c) * count + k];
      dgates[b * count + k] = sum;
    }
}

template <class T>
void sparsity_forward_row(const Shape& shape, const Experts& experts, const SparsityForward& args,
    int64_t n, Real<T>* sums) {
  using R = Real<T>;
  const int count = experts.count;
  R* stats = static_cast<R*>(args.stats) + n * (2 * count + 1);
  const R norm_z = norm(static_cast<const T*>(args.z) + n * shape.d_model, shape.d_model);
  const R weight = args.token_weights ? static_cast<const R*>(args.token_weights)[n]
                                      : R(1) / R(shape.batch * shape.tokens);
  for (int k = 0; k < count; ++k) {
    const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
    const T* latent = row_of<T>(args.latent, n) + start;
    const T* projection = static_cast<const T*>(args.projection) + n * experts.total + start;
    const R norm_k = norm(latent, rank) * std::abs(R(experts.scale[k]));
    const R cosine = dot(projection, latent, rank) * R(experts.scale[k]) /
                     (std::max(norm_k, R(kCosineEps)) * std::max(norm_z, R(kCosineEps)));
    stats[k] = cosine;
    stats[count + k] = norm_k;
    sums[k] += weight * (R(1) - cosine);
  }
  stats[2 * count] = norm_z;
}

template <class T>
void sparsity_forward_of(const Shape& shape, const Experts& experts, const SparsityForward& args) {
  using R = Real<T>;
  const int count = experts.count;
  const int64_t tokens = shape.batch * shape.tokens, blocks = sparsity_partials(shape);
  R* partials = static_cast<R*>(args.partials);
  R* distance = static_cast<R*>(args.distance);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    R* sums = partials + block * count;
    std::fill(sums, sums + count, R(0));
    for (int64_t n = block * kBlock; n < std::min((block + 1) * kBlock, tokens); ++n)
      sparsity_forward_row<T>(shape, experts, args, n, sums);
  }
  const auto mean = mean_gates(shape, experts, static_cast<const R*>(args.gates));
  double loss = 0;
  for (int k = 0; k < count; ++k) {
    double sum = 0;  // many blocks: float would round at each
    for (int64_t block = 0; block < blocks; ++block) sum += partials[block * count + k];
    distance[k] = R(sum);
    loss += mean[k] * sum;
  }
  *static_cast<R*>(args.loss) = R(loss);
}

template <class T>
void sparsity_backward_row(const Shape& shape, const Experts& experts, const SparsityBackward& args,
    int64_t n, const std::vector<Real<T>>& grad_gates) {
  using R = Real<T>;
  const int count = experts.count;
  const R* stats = static_cast<const R*>(args.stats) + n * (2 * count + 1);
  const R norm_z = stats[2 * count], safe_z = std::max(norm_z, R(kCosineEps));
  const R weight = args.token_weights ? static_cast<const R*>(args.token_weights)[n]
                                      : R(1) / R(shape.batch * shape.tokens);
  R shrink_z = 0;
  for (int k = 0; k < count; ++k) {
    const int start = experts.offset[k], rank = experts.offset[k + 1] - start;
    const int64_t at = n * experts.total + start;
    const T* latent = row_of<T>(args.latent, n) + start;
    const T* projection = static_cast<const T*>(args.projection) + at;
    T* mix = static_cast<T*>(args.mix) + at;
    T* dlatent = row_of<T>(args.dlatent, n) + start;
    const R scale = R(experts.scale[k]), norm_k = stats[count + k];
    const R safe_k = std::max(norm_k, R(kCosineEps)), push = grad_gates[k] * weight;
    // cosine_similarity clamps its norms outside of autograd: the clamped value divides, the
    // gradient is that of the unclamped norm, and 0 at 0.
    const R along = -push * scale / (safe_k * safe_z);
    const R shrink = norm_k > 0 ? push * stats[k] * scale * scale / (safe_k * norm_k) : R(0);
    shrink_z += push * stats[k];
#pragma omp simd
    for (int i = 0; i < rank; ++i) {
      mix[i] = T(along * R(latent[i]));
      dlatent[i] = T(along * R(projection[i]) + shrink * R(latent[i]));
    }
  }
  shrink_z = norm_z > 0 ? shrink_z / (safe_z * norm_z) : R(0);
  const T* z = static_cast<const T*>(args.z) + n * shape.d_model;
  T* whole = row_of<T>(args.whole_dz, n);
  if (args.dz) {
    const T* dz = static_cast<const T*>(args.dz) + n * shape.d_model;
#pragma omp simd
    for (int64_t i = 0; i < shape.d_model; ++i) whole[i] = T(shrink_z * R(z[i]) + R(dz[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < shape.d_model; ++i) whole[i] = T(shrink_z * R(z[i]));
  }
}

template <class T>
void sparsity_backward_of(
    const Shape& shape, const Experts& experts, const SparsityBackward& args) {
  using R = Real<T>;
  const int count = experts.count;
  const int64_t tokens = shape.batch * shape.tokens;
  const R grad = *static_cast<const R*>(args.grad);
  auto grad_gates = mean_gates(shape, experts, static_cast<const R*>(args.gates));
  for (R& value : grad_gates) value *= grad;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < tokens; ++n)
    sparsity_backward_row<T>(shape, experts, args, n, grad_gates);
  R* dgates = static_cast<R*>(args.dgates);
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int k = 0; k < count; ++k)
      dgates[b * count + k] = grad * static_cast<const R*>(args.distance)[k] / R(shape.batch);
}

}  // namespace

int64_t mixture_partials(const Shape& shape) { return (shape.tokens + kBlock - 1) / kBlock; }

int64_t sparsity_partials(const Shape& shape) {
  return (shape.batch * shape.tokens + kBlock - 1) / kBlock;
}

void gate_latent(void*, Dtype dtype, const Shape& shape, const Experts& experts, Read latent,
    const void* gates, void* gated) {
  with_type<c10::BFloat16, c10::Half>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gate_latent_of(
        shape, experts, latent, static_cast<const Real<T>*>(gates), static_cast<T*>(gated));
  });
}

void mixture_backward(
    void*, Dtype dtype, const Shape& shape, const Experts& experts, const MixtureBackward& args) {
  with_type<c10::BFloat16, c10::Half>(dtype, [&](auto* type) {
    mixture_backward_of<std::remove_pointer_t<decltype(type)>>(shape, experts, args);
  });
}

void sparsity_forward(
    void*, Dtype dtype, const Shape& shape, const Experts& experts, const SparsityForward& args) {
  with_type<c10::BFloat16, c10::Half>(dtype, [&](auto* type) {
    sparsity_forward_of<std::remove_pointer_t<decltype(type)>>(shape, experts, args);
  });
}

void sparsity_backward(
    void*, Dtype dtype, const Shape& shape, const Experts& experts, const SparsityBackward& args) {
  with_type<c10::BFloat16, c10::Half>(dtype, [&](auto* type) {
    sparsity_backward_of<std::remove_pointer_t<decltype(type)>>(shape, experts, args);
  });
}

}  // namespace pemt
