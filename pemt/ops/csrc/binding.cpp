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

struct ExpertMixture : torch::autograd::Function<ExpertMixture> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
      const Tensor& down, const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales,
      at::IntArrayRef ranks) {
    const Below below;
    const auto [y, latent] = expert_mixture(x, weight, down, up, gates, scales, ranks);
    context->save_for_backward({latent, weight, down, up, gates});
    context->saved_data["scales"] = scales.vec();
    context->saved_data["ranks"] = ranks.vec();
    context->set_materialize_grads(false);
    return {y, latent};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    check_first_derivative();
    const auto saved = context->get_saved_variables();  // may recompute a checkpointed block
    const Below below;
    const Tensor &latent = saved[0], &weight = saved[1];
    // undefined where only the latent was used
    const Tensor dy = gradients[0].defined()
                          ? gradients[0]
                          : latent.new_zeros({latent.size(0), latent.size(1), weight.size(0)});
    const bool need_dx = context->needs_input_grad(0);
    const auto [dx, dgates] = expert_mixture_backward(dy, optional(gradients[1]), latent, weight,
        saved[2], saved[3], saved[4], context->saved_data["scales"].toDoubleVector(),
        context->saved_data["ranks"].toIntVector(), need_dx);
    return {need_dx ? dx : Tensor(), {}, {}, {}, dgates, {}, {}};
  }
};

// What the loss's backward pass needs; no outputs of the function, as none has a gradient.
struct Kept {
  Tensor projection, stats, distance;
};

struct TaskSparsity : torch::autograd::Function<TaskSparsity> {
  static Tensor forward(AutogradContext* context, const Tensor& z, const Tensor& latent,
      const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks,
      const OptionalTensor& token_weights, Kept* kept) {
    const Below below;
    Tensor loss;
    std::tie(loss, kept->projection, kept->stats, kept->distance) =
        task_sparsity(z, latent, up, gates, scales, ranks, token_weights);
    context->save_for_backward({z, latent, up, gates, token_weights.value_or(Tensor()),
        kept->projection, kept->stats, kept->distance});
    context->saved_data["scales"] = scales.vec();
    context->saved_data["ranks"] = ranks.vec();
    context->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(8);
    check_first_derivative();
    const auto saved = context->get_saved_variables();  // may recompute a checkpointed block
    const Below below;
    const auto [dz, dlatent, dgates] = task_sparsity_backward(gradients[0], saved[0], saved[1],
        saved[2], saved[3], context->saved_data["scales"].toDoubleVector(),
        context->saved_data["ranks"].toIntVector(), optional(saved[4]), saved[5], saved[6],
        saved[7]);
    return {dz, dlatent, {}, dgates, {}, {}, {}, {}};
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
    const bool is_ours = given.use_count() == 1 && given.storage().use_count() == 1 &&
                         given.is_non_overlapping_and_dense();
    const Tensor dx = is_ours ? given : given.clone();
    const int64_t prompt_length = context->saved_data["prompt_length"].toInt();
    const Tensor each = (gradients[1] / prompt_length).to(dx.scalar_type()).unsqueeze(1);
    dx.narrow(1, 0, prompt_length).add_(each);
    return {dx, {}};
  }
};

std::tuple<Tensor, Tensor> expert_mixture_autograd(const Tensor& x, const Tensor& weight,
    const Tensor& down, const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales,
    at::IntArrayRef ranks) {
  const auto found = ExpertMixture::apply(x, weight, down, up, gates, scales, ranks);
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> task_sparsity_autograd(const Tensor& z,
    const Tensor& latent, const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales,
    at::IntArrayRef ranks, const OptionalTensor& token_weights) {
  Kept kept;
  const Tensor loss =
      TaskSparsity::apply(z, latent, up, gates, scales, ranks, token_weights, &kept);
  return {loss, kept.projection, kept.stats, kept.distance};
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
  library.def("expert_mixture", dispatch(pemt::kDevice, TORCH_FN(pemt::expert_mixture)));
  library.def(
      "expert_mixture_backward", dispatch(pemt::kDevice, TORCH_FN(pemt::expert_mixture_backward)));
  library.def("task_sparsity", dispatch(pemt::kDevice, TORCH_FN(pemt::task_sparsity)));
  library.def(
      "task_sparsity_backward", dispatch(pemt::kDevice, TORCH_FN(pemt::task_sparsity_backward)));
  library.def("prompt_mean(Tensor(a) x, int prompt_length) -> (Tensor(a), Tensor)",
      dispatch(pemt::kDevice, TORCH_FN(pemt::prompt_mean)));
#ifndef PEMT_CUDA
  library.def("choose_onednn", TORCH_FN(pemt::choose_onednn));
  library.def("few_rows", dispatch(pemt::kDevice, TORCH_FN(pemt::few_rows)));
#endif
}

PEMT_DIFFERENTIATE(PEMT_LIBRARY, library) {
  library.impl("expert_mixture", TORCH_FN(pemt::expert_mixture_autograd));
  library.impl("prompt_mean", TORCH_FN(pemt::prompt_mean_autograd));
  library.impl("task_sparsity", TORCH_FN(pemt::task_sparsity_autograd));
}
