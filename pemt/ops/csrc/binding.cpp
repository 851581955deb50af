// How PyTorch sees the ops of ops.h: their names, and their gradients.
//
// The gradients are C++ because with small batches a GPU waits for the host (docs/kernels.md).
// PEMT_LIBRARY names the torch.library namespace.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace pemt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// For as long as it lives, ATen's ops record no gradient and no cast.
struct Below {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  c10::impl::ExcludeDispatchKeyGuard no_casts{c10::autocast_dispatch_keyset};
};

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

void check_first_derivative() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
      "pemt.ops: there is no second derivative; use create_graph=False");
}

struct FfnOutput : torch::autograd::Function<FfnOutput> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& gates,
      const OptionalTensor& adapter_down, const OptionalTensor& adapter_down_bias,
      const OptionalTensor& adapter_up, const OptionalTensor& adapter_up_bias,
      const Tensor& stacked, const Tensor& up, const OptionalTensor& token_weights,
      at::ArrayRef<double> scales, at::IntArrayRef ranks, bool sparsity, Output* kept) {
    const Below below;
    *kept = ffn_output(x, stacked, up, gates, adapter_down, adapter_down_bias, adapter_up,
        adapter_up_bias, scales, ranks, token_weights, sparsity);
    const auto& [z, loss, mixed, hidden, active, projection, stats, distance] = *kept;
    const Tensor nothing;
    context->save_for_backward({sparsity ? z : nothing, mixed, hidden, active, projection, stats,
        distance, stacked, up, gates, adapter_down.value_or(nothing), adapter_up.value_or(nothing),
        token_weights.value_or(nothing)});
    context->saved_data["scales"] = scales.vec();
    context->saved_data["ranks"] = ranks.vec();
    context->set_materialize_grads(false);
    return {z, loss};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list found(13);
    if (!gradients[0].defined() && !gradients[1].defined()) return found;
    check_first_derivative();
    const auto saved = context->get_saved_variables();  // may recompute a checkpointed block
    const Below below;
    const bool need_dx = context->needs_input_grad(0);
    const auto [dx, dgates, ddown, ddown_bias, dup, dup_bias] = ffn_output_backward(
        optional(gradients[0]), optional(gradients[1]), saved[0], saved[1], saved[2], saved[3],
        saved[4], saved[5], saved[6], saved[7], saved[8], saved[9], optional(saved[10]),
        optional(saved[11]), context->saved_data["scales"].toDoubleVector(),
        context->saved_data["ranks"].toIntVector(), optional(saved[12]), need_dx);
    if (need_dx) found[0] = dx;
    found[1] = dgates;
    if (saved[10].defined()) {
      found[2] = ddown;
      found[3] = ddown_bias;
      found[4] = dup;
      found[5] = dup_bias;
    }
    return found;
  }
};

// Hands x on, so that the mean's gradient is added into x's where that lies: as a gradient of its
// own it would be a tensor of x's size, zero but for the prompt.
struct PromptMean : torch::autograd::Function<PromptMean> {
  static variable_list forward(AutogradContext* context, const Tensor& x, int64_t prompt_length) {
    const Below below;
    context->saved_data["prompt_length"] = prompt_length;
    const auto [same, mean] = prompt_mean(x, prompt_length);
    return {same, mean};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    check_first_derivative();
    const Below below;
    const Tensor& given = gradients[0];
    // as PyTorch's InputBuffer asks before it adds in place
    const bool is_ours = !at::isTensorSubclassLike(given) && !given._is_zerotensor() &&
                         !given.is_nested() && given.is_non_overlapping_and_dense() &&
                         given.use_count() == 1 && given.has_storage() &&
                         given.storage().use_count() == 1;
    const Tensor dx = is_ours ? given : given.clone();
    const int64_t prompt_length = context->saved_data["prompt_length"].toInt();
    const Tensor each = (gradients[1] / prompt_length).to(dx.scalar_type()).unsqueeze(1);
    dx.narrow(1, 0, prompt_length).add_(each);
    return {dx, {}};
  }
};

Output ffn_output_autograd(const Tensor& x, const Tensor& stacked, const Tensor& up,
    const Tensor& gates, const OptionalTensor& adapter_down,
    const OptionalTensor& adapter_down_bias, const OptionalTensor& adapter_up,
    const OptionalTensor& adapter_up_bias, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights, bool sparsity) {
  Output kept;
  const auto found = FfnOutput::apply(x, gates, adapter_down, adapter_down_bias, adapter_up,
      adapter_up_bias, stacked, up, token_weights, scales, ranks, sparsity, &kept);
  std::get<0>(kept) = found[0];
  std::get<1>(kept) = found[1];
  return kept;
}

std::tuple<Tensor, Tensor> prompt_mean_autograd(const Tensor& x, int64_t prompt_length) {
  const auto found = PromptMean::apply(x, prompt_length);
  return {found[0], found[1]};
}

#ifdef PEMT_CUDA
constexpr auto kDevice = c10::DispatchKey::CUDA;
#else
constexpr auto kDevice = c10::DispatchKey::CPU;
#endif

}  // namespace
}  // namespace pemt

// expand the first argument
#define PEMT_DEFINE(name, library) TORCH_LIBRARY(name, library)
#define PEMT_DIFFERENTIATE(name, library) TORCH_LIBRARY_IMPL(name, Autograd, library)

PEMT_DEFINE(PEMT_LIBRARY, library) {
  using torch::dispatch;
  library.def("ffn_output", dispatch(pemt::kDevice, TORCH_FN(pemt::ffn_output)));
  library.def("ffn_output_backward", dispatch(pemt::kDevice, TORCH_FN(pemt::ffn_output_backward)));
  library.def("prompt_mean(Tensor(a) x, int prompt_length) -> (Tensor(a), Tensor)",
      dispatch(pemt::kDevice, TORCH_FN(pemt::prompt_mean)));
#ifndef PEMT_CUDA
  library.def("choose_onednn", TORCH_FN(pemt::choose_onednn));
  library.def("few_rows", dispatch(pemt::kDevice, TORCH_FN(pemt::few_rows)));
#endif
}

PEMT_DIFFERENTIATE(PEMT_LIBRARY, library) {
  library.impl("ffn_output", TORCH_FN(pemt::ffn_output_autograd));
  library.impl("prompt_mean", TORCH_FN(pemt::prompt_mean_autograd));
}
