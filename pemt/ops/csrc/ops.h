// The ops on tensors, without gradients: defined in ops.cpp, shown to PyTorch by binding.cpp.
// Compiled once per implementation; PEMT_CUDA is defined where the tensors live on a GPU.
//
// B batch, S tokens, F d_ff, D d_model, K experts, T the sum of the ranks.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace pemt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// {y [B,S,D], latent [B,S,T]}
std::tuple<Tensor, Tensor> expert_mixture(const Tensor& x, const Tensor& weight, const Tensor& down,
    const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks);

// {dx [B,S,F], or nothing in it where it is not needed; dgates [B,K]}
std::tuple<Tensor, Tensor> expert_mixture_backward(const Tensor& dy, const OptionalTensor& dlatent,
    const Tensor& latent, const Tensor& weight, const Tensor& down, const Tensor& up,
    const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks, bool need_dx);

// {loss, and for the backward pass: projection [B,S,T], stats [B,S,2K+1], mean distances [K]}
std::tuple<Tensor, Tensor, Tensor, Tensor> task_sparsity(const Tensor& z, const Tensor& latent,
    const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights);

// {dz [B,S,D], dlatent [B,S,T], dgates [B,K]}
std::tuple<Tensor, Tensor, Tensor> task_sparsity_backward(const Tensor& grad, const Tensor& z,
    const Tensor& latent, const Tensor& up, const Tensor& gates, at::ArrayRef<double> scales,
    at::IntArrayRef ranks, const OptionalTensor& token_weights, const Tensor& projection,
    const Tensor& stats, const Tensor& distance);

// {x itself; [B,X] reals: the mean of x [B,S,X] over its first tokens}
std::tuple<Tensor, Tensor> prompt_mean(const Tensor& x, int64_t prompt_length);

#ifndef PEMT_CUDA
// Whether oneDNN multiplies, or the BLAS of at::mm: product is {rows, I, O, transposed, threads} as
// products.py has them. What nobody has told of is at::mm's.
void choose_onednn(at::IntArrayRef product, bool onednn);

// x w^T [...,O] of float x [...,I] and w [O,I]: a product for few rows
Tensor few_rows(const Tensor& x, const Tensor& weight);
#endif

}  // namespace pemt
