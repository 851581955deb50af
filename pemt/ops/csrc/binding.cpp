// How PyTorch sees the ops of ops.h: their names, and their gradients.
//
// The gradients are C++ because with small batches a GPU waits for the host (docs/kernels.md).
// PEMT_LIBRARY names the torch.library namespace.
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

// What a gate reads is given as gate_context, or as the first prompt_length tokens of x; no gate:
// the gates themselves are given.
struct FfnOutput : torch::autograd::Function<FfnOutput> {
  static variable_list forward(AutogradContext* context, const Tensor& x,
      const OptionalTensor& gates, const OptionalTensor& adapter_down,
      const OptionalTensor& adapter_down_bias, const OptionalTensor& adapter_up,
      const OptionalTensor& adapter_up_bias, const OptionalTensor& gate,
      const OptionalTensor& gate_context, int64_t prompt_length, const Tensor& stacked,
      const Tensor& up, const OptionalTensor& token_weights, at::ArrayRef<double> scales,
      at::IntArrayRef ranks, bool sparsity, Output* kept) {
    const Below below;
    Tensor read, used = gates.value_or(Tensor());
    if (gate.has_value()) std::tie(read, used) = gates_of(x, *gate, gate_context, prompt_length);
    *kept = ffn_output(x, stacked, up, used, adapter_down, adapter_down_bias, adapter_up,
        adapter_up_bias, scales, ranks, token_weights, sparsity);
    const auto& [z, loss, mixed, hidden, active, projection, stats, distance] = *kept;
    const Tensor nothing;
    context->save_for_backward({sparsity ? z : nothing, mixed, hidden, active, projection, stats,
        distance, stacked, up, used, adapter_down.value_or(nothing), adapter_up.value_or(nothing),
        token_weights.value_or(nothing), read, gate.value_or(nothing)});
    context->saved_data["scales"] = scales.vec();
    context->saved_data["ranks"] = ranks.vec();
    context->saved_data["prompt_length"] = prompt_length;
    context->set_materialize_grads(false);
    if (!gate.has_value()) return {z, loss};
    context->mark_non_differentiable({used});
    return {z, loss, used};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list found(16);
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
    const Tensor &read = saved[13], &gate = saved[14];
    if (!gate.defined()) {
      found[1] = dgates;
    } else {
      const auto [dread, dgate] = gates_backward(dgates, saved[9], read, gate);
      found[6] = dgate;
      const int64_t prompt_length = context->saved_data["prompt_length"].toInt();
      if (prompt_length == 0) found[7] = dread;
      else if (need_dx) add_mean_gradient(dx, dread, prompt_length);
    }
    if (saved[10].defined()) {
      found[2] = ddown;
      found[3] = ddown_bias;
      found[4] = dup;
      found[5] = dup_bias;
    }
    return found;
  }
};

Output ffn_output_autograd(const Tensor& x, const Tensor& stacked, const Tensor& up,
    const Tensor& gates, const OptionalTensor& adapter_down,
    const OptionalTensor& adapter_down_bias, const OptionalTensor& adapter_up,
    const OptionalTensor& adapter_up_bias, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights, bool sparsity) {
  Output kept;
  const auto found = FfnOutput::apply(x, OptionalTensor(gates), adapter_down, adapter_down_bias,
      adapter_up, adapter_up_bias, OptionalTensor(), OptionalTensor(), 0, stacked, up,
      token_weights, scales, ranks, sparsity, &kept);
  std::get<0>(kept) = found[0];
  std::get<1>(kept) = found[1];
  return kept;
}

// {z, loss, gates}: ffn_output with the gates of gates_of. With gradients or without.
std::tuple<Tensor, Tensor, Tensor> gated_output(const Tensor& x, const Tensor& stacked,
    const Tensor& up, const Tensor& gate, const OptionalTensor& gate_context, int64_t prompt_length,
    const OptionalTensor& adapter_down, const OptionalTensor& adapter_down_bias,
    const OptionalTensor& adapter_up, const OptionalTensor& adapter_up_bias,
    at::ArrayRef<double> scales, at::IntArrayRef ranks, const OptionalTensor& token_weights,
    bool sparsity) {
  Output kept;
  const auto found = FfnOutput::apply(x, OptionalTensor(), adapter_down, adapter_down_bias,
      adapter_up, adapter_up_bias, OptionalTensor(gate), gate_context, prompt_length, stacked, up,
      token_weights, scales, ranks, sparsity, &kept);
  return {found[0], found[1], found[2]};
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
  library.def("gated_output", TORCH_FN(pemt::gated_output));
#ifndef PEMT_CUDA
  library.def("choose_onednn", TORCH_FN(pemt::choose_onednn));
  library.def("few_rows", dispatch(pemt::kDevice, TORCH_FN(pemt::few_rows)));
#endif
}

PEMT_DIFFERENTIATE(PEMT_LIBRARY, library) {
  library.impl("ffn_output", TORCH_FN(pemt::ffn_output_autograd));
}
