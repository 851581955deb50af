// The bodies of ops.h: ATen's matrix products with the fused kernels of kernels.h between them.
//
// B batch, S tokens, N = B * S, F d_ff, D d_model, K experts, T the sum of the ranks.
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#ifdef PEMT_CUDA
#  include <c10/cuda/CUDAGuard.h>
#  include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "kernels.h"

namespace pemt {
namespace {

constexpr int64_t kMostRows = 256;  // as MOST_ROWS in products.py

#ifdef PEMT_CUDA
using Guard = c10::cuda::CUDAGuard;
void* stream_of(const Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
}
#else
struct Guard {
  explicit Guard(const c10::Device&) {}
};
void* stream_of(const Tensor&) { return nullptr; }
#endif

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK(false, "pemt: no kernel for dtype ", tensor.scalar_type());
  }
}

at::ScalarType real_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor reals(const Tensor& tensor, const Tensor& like) {
  return tensor.to(real_of(like)).contiguous();
}

#ifndef PEMT_CUDA
using ProductKey = std::array<int64_t, 5>;
std::shared_mutex chosen_mutex;
std::map<ProductKey, bool> chosen;

using NoScalars = c10::List<std::optional<at::Scalar>>;
using Linear = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
    NoScalars, std::optional<c10::string_view>);

// A private op of PyTorch's: where it is another one than here, at::mm serves.
std::optional<c10::TypedOperatorHandle<Linear>> find_onednn() {
  const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  try {
    if (found) return found->typed<Linear>();
  } catch (const c10::Error&) {
  }
  return std::nullopt;
}

bool onednn_multiplies(const Tensor& left, const Tensor& right) {
  if (!at::globalContext().userEnabledMkldnn() || left.scalar_type() != at::kFloat ||
      !left.is_contiguous() || left.numel() == 0)
    return false;
  int64_t rows = 1;  // as rows_like in products.py
  while (rows < std::min<int64_t>(left.size(0), kMostRows)) rows *= 2;
  const ProductKey key{
      rows, right.size(0), right.size(1), !right.is_contiguous(), at::get_num_threads()};
  const std::shared_lock lock(chosen_mutex);
  const auto found = chosen.find(key);
  return found != chosen.end() && found->second;
}
#endif

// left [N,I] right [I,O], a product with frozen weights.
Tensor times(const Tensor& left, const Tensor& right) {
#ifndef PEMT_CUDA
  static const auto onednn = find_onednn();
  if (onednn && onednn_multiplies(left, right))
    return onednn->call(left, right.t(), std::nullopt, "none", NoScalars(), std::nullopt);
#endif
  return at::mm(left, right);
}

Experts experts_of(at::ArrayRef<double> scales, at::IntArrayRef ranks) {
  TORCH_CHECK(ranks.size() <= kMaxExperts && scales.size() == ranks.size());
  Experts experts{};
  experts.count = int(ranks.size());
  for (size_t k = 0; k < ranks.size(); ++k) {
    experts.scale[k] = scales[k];
    experts.offset[k + 1] = experts.offset[k] + int(ranks[k]);
  }
  experts.total = experts.offset[ranks.size()];
  return experts;
}

Tensor rows_of(const Tensor& tensor) {  // [B,S,X] -> [N,X]
  return tensor.reshape({tensor.size(0) * tensor.size(1), tensor.size(2)});
}

const void* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor> expert_mixture(const Tensor& x, const Tensor& weight, const Tensor& down,
    const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks) {
  const Guard guard(x.device());
  const auto experts = experts_of(scales, ranks);
  const Shape shape{x.size(0), x.size(1), weight.size(0)};
  const Tensor x_NF = rows_of(x), gates_BK = reals(gates, x);
  Tensor y_ND = times(x_NF, weight.t());
  const Tensor latent_NT = times(x_NF, down.t());
  const void* latents = latent_NT.const_data_ptr();
  const void* gate_values = gates_BK.const_data_ptr();
  const bool expanded =
      up.is_contiguous() && expand_small(stream_of(x), dtype_of(x), shape, experts, latents,
                                gate_values, up.const_data_ptr(), y_ND.mutable_data_ptr());
  if (!expanded) {
    Tensor gated_NT = at::empty_like(latent_NT);
    gate_latent(stream_of(x), dtype_of(x), shape, experts, latents, gate_values,
        gated_NT.mutable_data_ptr());
    y_ND.addmm_(gated_NT, up.t());
  }
  return {y_ND.view({shape.batch, shape.tokens, shape.d_model}),
      latent_NT.view({shape.batch, shape.tokens, experts.total})};
}

std::tuple<Tensor, Tensor> expert_mixture_backward(const Tensor& dy, const OptionalTensor& dlatent,
    const Tensor& latent, const Tensor& weight, const Tensor& down, const Tensor& up,
    const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks, bool need_dx) {
  const Guard guard(dy.device());
  const auto experts = experts_of(scales, ranks);
  const Shape shape{dy.size(0), dy.size(1), dy.size(2)};
  const Tensor dy_ND = rows_of(dy), latent_NT = rows_of(latent).contiguous();
  const Tensor gates_BK = reals(gates, dy);
  OptionalTensor outer;
  if (dlatent.has_value()) outer = dlatent->contiguous();
  Tensor projection_NT = times(dy_ND, up);
  const Tensor partials =
      at::empty({shape.batch, mixture_partials(shape), experts.count}, gates_BK.options());
  Tensor dgates = at::empty_like(gates_BK);
  mixture_backward(stream_of(dy), dtype_of(dy), shape, experts,
      {latent_NT.const_data_ptr(), projection_NT.mutable_data_ptr(), pointer(outer),
          gates_BK.const_data_ptr(), partials.mutable_data_ptr(), dgates.mutable_data_ptr(),
          need_dx});
  dgates = dgates.to(gates.scalar_type());
  if (!need_dx) return {at::empty({0}, dy.options()), dgates};
  Tensor dx_NF = times(dy_ND, weight);
  dx_NF.addmm_(projection_NT, down);
  return {dx_NF.view({shape.batch, shape.tokens, weight.size(1)}), dgates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> task_sparsity(const Tensor& z, const Tensor& latent,
    const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights) {
  const Guard guard(z.device());
  const auto experts = experts_of(scales, ranks);
  const Shape shape{z.size(0), z.size(1), z.size(2)};
  const Tensor z_ND = rows_of(z).contiguous(), latent_NT = rows_of(latent).contiguous();
  const Tensor gates_BK = reals(gates, z);
  OptionalTensor weights;
  if (token_weights.has_value()) weights = reals(*token_weights, z);
  const Tensor projection_NT = times(z_ND, up);
  const auto options = gates_BK.options();
  const Tensor stats = at::empty({shape.batch, shape.tokens, 2 * experts.count + 1}, options);
  const Tensor partials = at::empty({sparsity_partials(shape), experts.count}, options);
  const Tensor distance = at::empty({experts.count}, options), loss = at::empty({}, options);
  sparsity_forward(stream_of(z), dtype_of(z), shape, experts,
      {z_ND.const_data_ptr(), latent_NT.const_data_ptr(), projection_NT.const_data_ptr(),
          gates_BK.const_data_ptr(), pointer(weights), stats.mutable_data_ptr(),
          partials.mutable_data_ptr(), distance.mutable_data_ptr(), loss.mutable_data_ptr()});
  return {loss, projection_NT.view({shape.batch, shape.tokens, experts.total}), stats, distance};
}

std::tuple<Tensor, Tensor, Tensor> task_sparsity_backward(const Tensor& grad, const Tensor& z,
    const Tensor& latent, const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales,
    at::IntArrayRef ranks, const OptionalTensor& token_weights, const Tensor& projection,
    const Tensor& stats, const Tensor& distance) {
  const Guard guard(z.device());
  const auto experts = experts_of(scales, ranks);
  const Shape shape{z.size(0), z.size(1), z.size(2)};
  const Tensor z_ND = rows_of(z).contiguous(), latent_NT = rows_of(latent).contiguous();
  const Tensor gates_BK = reals(gates, z), grad_1 = reals(grad, z);
  const Tensor projection_NT = projection.contiguous(), stats_NC = stats.contiguous();
  OptionalTensor weights;
  if (token_weights.has_value()) weights = reals(*token_weights, z);
  Tensor dz_ND = at::empty_like(z_ND), mix_NT = at::empty_like(latent_NT);
  const Tensor dlatent_NT = at::empty_like(latent_NT), dgates = at::empty_like(gates_BK);
  sparsity_backward(stream_of(z), dtype_of(z), shape, experts,
      {grad_1.const_data_ptr(), z_ND.const_data_ptr(), latent_NT.const_data_ptr(),
          projection_NT.const_data_ptr(), gates_BK.const_data_ptr(), pointer(weights),
          stats_NC.const_data_ptr(), distance.const_data_ptr(), dz_ND.mutable_data_ptr(),
          mix_NT.mutable_data_ptr(), dlatent_NT.mutable_data_ptr(), dgates.mutable_data_ptr()});
  dz_ND.addmm_(mix_NT, up.t());
  return {dz_ND.view({shape.batch, shape.tokens, shape.d_model}),
      dlatent_NT.view({shape.batch, shape.tokens, experts.total}), dgates.to(gates.scalar_type())};
}

std::tuple<Tensor, Tensor> prompt_mean(const Tensor& x, int64_t prompt_length) {
  return {x, at::mean(x.narrow(1, 0, prompt_length), 1, false, real_of(x))};
}

#ifndef PEMT_CUDA
void choose_onednn(at::IntArrayRef product, bool onednn) {
  TORCH_CHECK(product.size() == 5);
  const std::unique_lock lock(chosen_mutex);
  chosen[{product[0], product[1], product[2], product[3], product[4]}] = onednn;
}

Tensor few_rows(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.is_cpu() && weight.is_cpu() && x.scalar_type() == at::kFloat &&
                  weight.scalar_type() == at::kFloat && weight.dim() == 2 && x.dim() > 0 &&
                  x.size(-1) == weight.size(1),
      "pemt: few_rows takes float x [...,I] and weight [O,I] on a CPU; found ", x.sizes(), " and ",
      weight.sizes());
  const Tensor x_NI = x.contiguous(), weight_OI = weight.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor y_NO = at::empty(shape, x.options());
  const int64_t rows = y_NO.numel() / std::max<int64_t>(1, weight.size(0));
  few_rows(x_NI.const_data_ptr<float>(), weight_OI.const_data_ptr<float>(),
      y_NO.mutable_data_ptr<float>(), rows, weight.size(1), weight.size(0));
  return y_NO;
}
#endif

}  // namespace pemt
