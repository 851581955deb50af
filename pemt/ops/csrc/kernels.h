// What stands between the matrix products, as raw pointers and a stream: declared once here,
// defined for the CPU in cpu_*.cpp and for CUDA in cuda_*.cu. No torch header.
//
// B batch, S tokens, N = B * S, D d_model, K experts, R rank, T the sum of the ranks.
// The experts' up projections have orthonormal columns: the norm of an output is that of its
// latent. "Reals" are float, or double where the tensors are double; all sums run in them.
#pragma once

#include <cstdint>

namespace pemt {

constexpr int kMaxExperts = 128;     // as MAX_EXPERTS in checks.py
constexpr double kCosineEps = 1e-8;  // torch.nn.functional.cosine_similarity's default

enum class Dtype { f32, f64, bf16, f16 };

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

// Calls `run` with a null pointer of the tensors' type; half types are each device's own.
template <class Bf16, class F16, class Run>
void with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32:
      return run(static_cast<float*>(nullptr));
    case Dtype::f64:
      return run(static_cast<double*>(nullptr));
    case Dtype::bf16:
      return run(static_cast<Bf16*>(nullptr));
    case Dtype::f16:
      return run(static_cast<F16*>(nullptr));
  }
}

struct Experts {  // small enough to be a kernel's argument
  int count;
  int total;
  int offset[kMaxExperts + 1];  // expert k owns the ranks offset[k] .. offset[k + 1]
  double scale[kMaxExperts];
};

struct Shape {
  int64_t batch;
  int64_t tokens;
  int64_t d_model;
};

// Rows of a matrix that may stand in a wider one, as y and latent do in [y | latent].
template <class Pointer>
struct Rows {
  Pointer data;
  int64_t stride;  // elements from one row to the next
};
using Read = Rows<const void*>;
using Write = Rows<void*>;

// Per-block sums that a second stage adds up in a fixed order: same bits in every run.
int64_t mixture_partials(const Shape& shape);   // blocks per sample; the buffer is [B, this, K]
int64_t sparsity_partials(const Shape& shape);  // blocks in all; the buffer is [this, K]

// gated[n,t] = latent[n,t] * gate[b,k] * scale[k]; gated [N,T] is contiguous
void gate_latent(void* stream, Dtype dtype, const Shape& shape, const Experts& experts, Read latent,
    const void* gates, void* gated);

struct MixtureBackward {
  Read latent;             // [N,T]
  const void* projection;  // [N,T], dy up
  Write dlatent;           // [N,T]; the mixture's part is added to the loss's, or written
  const void* gates;       // [B,K] reals
  const void*
      sparsity_gate;  // [B,K] reals: the loss's part of dgates, or null: no part of it anywhere
  void* partials;     // [B, mixture_partials, K] reals
  void* dgates;       // [B,K] reals
};
void mixture_backward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const MixtureBackward& args);

struct SparsityForward {
  const void* z;              // [N,D]
  Read latent;                // [N,T]
  const void* projection;     // [N,T], z up
  const void* gates;          // [B,K] reals
  const void* token_weights;  // [N] reals, or null for 1/N each
  void* stats;                // [N,2K+1] reals: cosines, norms of the outputs, norm of z
  void* partials;             // [sparsity_partials, K] reals
  void* distance;             // [K] reals
  void* loss;                 // one real
};
void sparsity_forward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const SparsityForward& args);

struct SparsityBackward {
  const void* grad;           // one real: the loss's gradient
  const void* dz;             // [N,D]: z's gradient from elsewhere, or null
  const void* z;              // [N,D]
  Read latent;                // [N,T]
  const void* projection;     // [N,T]
  const void* gates;          // [B,K] reals
  const void* token_weights;  // [N] reals or null
  const void* stats;          // [N,2K+1] reals
  const void* distance;       // [K] reals
  Write whole_dz;             // [N,D]: dz and the loss's part along z; the caller adds mix upᵀ
  void* mix;                  // [N,T]
  Write dlatent;              // [N,T]
  void* dgates;               // [B,K] reals
};
void sparsity_backward(void* stream, Dtype dtype, const Shape& shape, const Experts& experts,
    const SparsityBackward& args);

// y [rows,outputs] = x [rows,inputs] w^T, a product of its own; cpu_few_rows.cpp alone has it
void few_rows(
    const float* x, const float* w, float* y, int64_t rows, int64_t inputs, int64_t outputs);

}  // namespace pemt
