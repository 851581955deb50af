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

Read read(const Tensor& tensor_NX) { return {tensor_NX.const_data_ptr(), tensor_NX.stride(0)}; }
Write write(const Tensor& tensor_NX) { return {tensor_NX.mutable_data_ptr(), tensor_NX.stride(0)}; }

// What all parts of one call share.
struct Call {
  Experts experts;
  Shape shape;
  Tensor gates_BK;
  OptionalTensor weights_N;
  void* stream;
  Dtype dtype;

  Call(const Tensor& like_BSX, int64_t d_model, const Tensor& gates, at::ArrayRef<double> scales,
      at::IntArrayRef ranks, const OptionalTensor& token_weights)
      : experts(experts_of(scales, ranks)),
        shape{like_BSX.size(0), like_BSX.size(1), d_model},
        gates_BK(reals(gates, like_BSX)),
        stream(stream_of(like_BSX)),
        dtype(dtype_of(like_BSX)) {
    if (token_weights.has_value()) weights_N = reals(*token_weights, like_BSX);
  }

  Tensor in_rows(const Tensor& tensor_NX) const {  // [N,X] -> [B,S,X]
    return tensor_NX.view({shape.batch, shape.tokens, tensor_NX.size(1)});
  }
};

struct Loss {
  Tensor loss, projection, stats, distance;
};

Loss sparsity_of(const Call& call, const Tensor& z_ND, const Tensor& latent_NT, const Tensor& up) {
  const auto options = call.gates_BK.options();
  const int64_t count = call.experts.count;
  const Tensor projection_NT = times(z_ND, up);
  const Tensor stats = at::empty({call.shape.batch, call.shape.tokens, 2 * count + 1}, options);
  const Tensor partials = at::empty({sparsity_partials(call.shape), count}, options);
  const Tensor distance = at::empty({count}, options), loss = at::empty({}, options);
  sparsity_forward(call.stream, call.dtype, call.shape, call.experts,
      {z_ND.const_data_ptr(), read(latent_NT), projection_NT.const_data_ptr(),
          call.gates_BK.const_data_ptr(), pointer(call.weights_N), stats.mutable_data_ptr(),
          partials.mutable_data_ptr(), distance.mutable_data_ptr(), loss.mutable_data_ptr()});
  return {loss, call.in_rows(projection_NT), stats, distance};
}

}  // namespace

Output ffn_output(const Tensor& x, const Tensor& stacked, const Tensor& up, const Tensor& gates,
    const OptionalTensor& adapter_down, const OptionalTensor& adapter_down_bias,
    const OptionalTensor& adapter_up, const OptionalTensor& adapter_up_bias,
    at::ArrayRef<double> scales, at::IntArrayRef ranks, const OptionalTensor& token_weights,
    bool sparsity) {
  const Guard guard(x.device());
  const int64_t d_model = up.size(0), total = up.size(1);
  const Call call(x, d_model, gates, scales, ranks, token_weights);
  const Tensor x_NF = rows_of(x);
  const auto nothing = [&] {
    return at::empty({0}, x.options());
  };  // outputs may not be one tensor
  Tensor mixed, y_ND;
  if (adapter_down.has_value()) {  // y is kept: the adapter's weights want it
    mixed = times(x_NF, stacked.t());
    y_ND = mixed.narrow(1, 0, d_model);
  } else {
    y_ND = times(x_NF, stacked.narrow(0, 0, d_model).t());
    mixed = times(x_NF, stacked.narrow(0, d_model, total).t());
  }
  const Tensor latent_NT = mixed.narrow(1, mixed.size(1) - total, total);
  const Tensor gated_NT = at::empty({latent_NT.size(0), total}, x.options());
  gate_latent(call.stream, call.dtype, call.shape, call.experts, read(latent_NT),
      call.gates_BK.const_data_ptr(), gated_NT.mutable_data_ptr());
  y_ND.addmm_(gated_NT, up.t());
  Tensor z_ND = y_ND, hidden = nothing(), active = nothing();
  if (adapter_down.has_value()) {
    hidden = at::addmm(*adapter_down_bias, y_ND, adapter_down->t());
    active = at::gelu(hidden, "tanh");
    z_ND = at::addmm(*adapter_up_bias, active, adapter_up->t()).add_(y_ND);
    hidden = call.in_rows(hidden);
    active = call.in_rows(active);
  }
  Loss found{nothing(), nothing(), nothing(), nothing()};
  if (sparsity) found = sparsity_of(call, z_ND, latent_NT, up);
  return {call.in_rows(z_ND), found.loss, call.in_rows(mixed), hidden, active, found.projection,
      found.stats, found.distance};
}

Gradients ffn_output_backward(const OptionalTensor& dz, const OptionalTensor& dloss,
    const Tensor& z, const Tensor& mixed, const Tensor& hidden, const Tensor& active,
    const Tensor& projection, const Tensor& stats, const Tensor& distance, const Tensor& stacked,
    const Tensor& up, const Tensor& gates, const OptionalTensor& adapter_down,
    const OptionalTensor& adapter_up, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights, bool need_dx) {
  const Guard guard(mixed.device());
  const int64_t d_model = up.size(0), total = up.size(1);
  const Call call(mixed, d_model, gates, scales, ranks, token_weights);
  const Tensor mixed_NX = rows_of(mixed);
  const auto nothing = [&] { return at::empty({0}, mixed.options()); };
  const Tensor latent_NT = mixed_NX.narrow(1, mixed_NX.size(1) - total, total);
  // the gradient of [y | latent]: each product adds to its part of it; of the latent alone where
  // nothing is added to y's
  const bool both = dloss.has_value() || adapter_down.has_value();
  const Tensor whole =
      at::empty({latent_NT.size(0), (both ? d_model : 0) + total}, mixed.options());
  Tensor dy_ND = both ? whole.narrow(1, 0, d_model) : rows_of(*dz);
  const Tensor dlatent_NT = whole.narrow(1, whole.size(1) - total, total);
  OptionalTensor sparsity_gate;
  if (dloss.has_value()) {
    OptionalTensor outer;
    if (dz.has_value()) outer = dz->contiguous();
    const Tensor grad_1 = reals(*dloss, mixed), z_ND = rows_of(z).contiguous();
    const Tensor mix_NT = at::empty({latent_NT.size(0), total}, mixed.options());
    sparsity_gate = at::empty_like(call.gates_BK);
    const Tensor projection_NT = projection.contiguous(), stats_NC = stats.contiguous();
    sparsity_backward(call.stream, call.dtype, call.shape, call.experts,
        {grad_1.const_data_ptr(), pointer(outer), z_ND.const_data_ptr(), read(latent_NT),
            projection_NT.const_data_ptr(), call.gates_BK.const_data_ptr(), pointer(call.weights_N),
            stats_NC.const_data_ptr(), distance.const_data_ptr(), write(dy_ND),
            mix_NT.mutable_data_ptr(), write(dlatent_NT), sparsity_gate->mutable_data_ptr()});
    dy_ND.addmm_(mix_NT, up.t());
  } else if (both) {
    dy_ND.copy_(rows_of(*dz));
  }
  Tensor ddown = nothing(), ddown_bias = nothing(), dup = nothing(), dup_bias = nothing();
  if (adapter_down.has_value()) {
    dup_bias = dy_ND.sum(0);
    dup = at::mm(dy_ND.t(), rows_of(active));
    const Tensor dhidden = at::gelu_backward(at::mm(dy_ND, *adapter_up), rows_of(hidden), "tanh");
    ddown_bias = dhidden.sum(0);
    ddown = at::mm(dhidden.t(), mixed_NX.narrow(1, 0, d_model));
    dy_ND.addmm_(dhidden, *adapter_down);
  }
  const Tensor from_y_NT = times(dy_ND, up);
  const Tensor partials =
      at::empty({call.shape.batch, mixture_partials(call.shape), call.experts.count},
          call.gates_BK.options());
  const Tensor dgates = at::empty_like(call.gates_BK);
  mixture_backward(call.stream, call.dtype, call.shape, call.experts,
      {read(latent_NT), from_y_NT.const_data_ptr(), write(dlatent_NT),
          call.gates_BK.const_data_ptr(), pointer(sparsity_gate), partials.mutable_data_ptr(),
          dgates.mutable_data_ptr()});
  Tensor dx = nothing();
  if (need_dx) {
    dx = both ? times(whole, stacked) : times(dy_ND, stacked.narrow(0, 0, d_model));
    if (!both) dx.addmm_(dlatent_NT, stacked.narrow(0, d_model, total));
    dx = call.in_rows(dx);
  }
  return {dx, dgates.to(gates.scalar_type()), ddown, ddown_bias, dup, dup_bias};
}

std::tuple<Tensor, Tensor> gates_of(
    const Tensor& x, const Tensor& gate, const OptionalTensor& context, int64_t prompt_length) {
  const auto real = real_of(x);
  const Tensor read_BC = context.has_value()
                             ? context->to(real)
                             : at::mean(x.narrow(1, 0, prompt_length), 1, false, real);
  return {read_BC, at::_softmax(at::mm(read_BC, gate.to(real)), 1, false)};
}

std::tuple<Tensor, Tensor> gates_backward(
    const Tensor& dgates, const Tensor& gates, const Tensor& read, const Tensor& gate) {
  const auto real = gates.scalar_type();
  const Tensor dlogits_BK = at::_softmax_backward_data(dgates, gates, 1, real);
  return {
      at::mm(dlogits_BK, gate.to(real).t()), at::mm(read.t(), dlogits_BK).to(gate.scalar_type())};
}

void add_mean_gradient(const Tensor& dx, const Tensor& dmean, int64_t prompt_length) {
  const Tensor each_BC = (dmean / prompt_length).to(dx.scalar_type());
  dx.narrow(1, 0, prompt_length).add_(each_BC.unsqueeze(1));
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
