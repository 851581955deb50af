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

// A linear layer and the experts, the target adapter if there is one, the loss if it is wanted.
// `stacked` [D+T,F] is the layer's own weight over the down projections.
// {z [B,S,D], loss; and for the backward pass: mixed [B,S,D+T], y beside the latent (without an
//  adapter the latent alone), the adapter's hidden and active [B,S,H], projection [B,S,T],
//  stats [B,S,2K+1], mean distances [K]}; what there is none of is empty
using Output = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Output ffn_output(const Tensor& x, const Tensor& stacked, const Tensor& up, const Tensor& gates,
    const OptionalTensor& adapter_down, const OptionalTensor& adapter_down_bias,
    const OptionalTensor& adapter_up, const OptionalTensor& adapter_up_bias,
    at::ArrayRef<double> scales, at::IntArrayRef ranks, const OptionalTensor& token_weights,
    bool sparsity);

// {dx [B,S,F], dgates [B,K], and of the adapter: ddown, its bias's, dup, its bias's}; what is not
// needed is empty
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients ffn_output_backward(const OptionalTensor& dz, const OptionalTensor& dloss,
    const Tensor& z, const Tensor& mixed, const Tensor& hidden, const Tensor& active,
    const Tensor& projection, const Tensor& stats, const Tensor& distance, const Tensor& stacked,
    const Tensor& up, const Tensor& gates, const OptionalTensor& adapter_down,
    const OptionalTensor& adapter_up, at::ArrayRef<double> scales, at::IntArrayRef ranks,
    const OptionalTensor& token_weights, bool need_dx);

// {what the gate reads [B,C], reals; gates [B,K] = softmax of it times gate [C,K]}; it is given as
// context [B,C], or else the mean of x [B,S,C] over its first prompt_length tokens
std::tuple<Tensor, Tensor> gates_of(
    const Tensor& x, const Tensor& gate, const OptionalTensor& context, int64_t prompt_length);

// {gradient of what the gate reads, dgate}
std::tuple<Tensor, Tensor> gates_backward(
    const Tensor& dgates, const Tensor& gates, const Tensor& read, const Tensor& gate);

// Adds to dx [B,S,C] the gradient of x's mean over its first prompt_length tokens.
void add_mean_gradient(const Tensor& dx, const Tensor& dmean, int64_t prompt_length);

#ifndef PEMT_CUDA
// Whether oneDNN multiplies, or the BLAS of at::mm: product is {rows, I, O, transposed, threads} as
// products.py has them. What nobody has told of is at::mm's.
void choose_onednn(at::IntArrayRef product, bool onednn);

// x w^T [...,O] of float x [...,I] and w [O,I]: a product for few rows
Tensor few_rows(const Tensor& x, const Tensor& weight);
#endif

}  // namespace pemt
