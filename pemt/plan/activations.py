"""What the forward pass keeps for the backward pass, and the largest thing made besides: by formula.

N tokens of a stack, D d_model, F d_ff, H heads, K experts, T the sum of their ranks, V vocabulary,
A the target adapter's inner width; v bytes of a value.

Each line below is a tensor that autograd saves in transformers 5.23's T5 and in PEMT's modules. A
frozen matrix product saves nothing: its backward pass needs the weight alone.
"""

from __future__ import annotations

from typing import Literal

from pemt.plan.job import Job

Hardware = Literal["cpu", "gpu"]


def saved(job: Job, hardware: Hardware) -> float:
    """Bytes kept at the end of the forward pass."""
    shape, kept = job.shape, _Kept(job, hardware)
    source, target = job.batch * job.encoder_tokens, job.batch * job.target
    encoder = kept.block(source, job.encoder_tokens, in_decoder=False)
    decoder = kept.block(target, job.target, in_decoder=True)
    # of each stack's output, and of the encoder's input: the decoder's embeddings need no gradient
    ends = kept.dropout(2 * source + target, shape.d_model) + kept.norm(source) + kept.norm(target)
    ends -= kept.without_gradient(target)
    if kept.full:  # inputs of the head, and of all cross-attentions' keys and values
        ends += job.bytes_per_value * shape.d_model * (source + target)
    if not job.gradient_checkpointing:
        return (
            shape.num_layers * encoder
            + shape.num_decoder_layers * decoder
            + ends
            + kept.biases()
            + kept.loss(target)
        )
    # Every block's input, and one block at a time in full.
    inputs = shape.num_layers * source + shape.num_decoder_layers * target
    return (
        job.bytes_per_value * shape.d_model * inputs
        + max(encoder, decoder)
        + ends
        + kept.biases()
        + kept.loss(target)
    )


def transient(job: Job, hardware: Hardware) -> float:
    """The larger of what the loss and an encoder's FFN make on the way back."""
    shape, value = job.shape, job.bytes_per_value
    source, target = job.batch * job.encoder_tokens, job.batch * job.target
    # the logits, the gradient of their log-softmax, and of them
    at_loss = target * shape.vocab_size * ((value if value < 4 else 0) + 4 + value)
    # gradients of an FFN's inner width
    at_ffn = source * shape.d_ff * value * (3 if shape.gated else 2)
    return max(at_loss, at_ffn)


class _Kept:
    """Bytes that the parts of a model save."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        self.job, self.shape, self.hardware = job, job.shape, hardware
        self.value = job.bytes_per_value
        self.full = job.method == "full"

    def block(self, tokens: int, length: int, *, in_decoder: bool) -> float:
        attentions = [length] + ([self.job.encoder_tokens] if in_decoder else [])
        total = self.ffn(tokens, in_decoder=in_decoder)
        for seen in attentions:
            total += self.norm(tokens) + self.attention(tokens, seen)
        return total

    def norm(self, tokens: int) -> float:
        """T5's RMS norm: its input (in half precision an fp32 copy too), the factor, the normed input."""
        width = self.shape.d_model
        job = self.job
        trains = self.full or (job.method in ("pemt", "adapter") and job.train_layer_norms)
        copy = 4 * width if self.value < 4 else 0
        return tokens * (copy + 4 + self.value * width * (2 if trains else 1))

    def attention(self, tokens: int, seen: int) -> float:
        """Queries, keys, values, what SDPA keeps, and the dropout behind it."""
        shape, batch = self.shape, self.job.batch
        keys = batch * seen
        heads = shape.inner * (tokens + 2 * keys)
        scores = shape.num_heads * tokens * seen
        if self.hardware == "cpu" and (shape.dropout or self.full):
            # PyTorch's plain formula, in fp32: softmax, its dropout mask, their product
            total = 4.0 * heads + (3 if shape.dropout else 1) * 4 * scores
        else:
            # a fused kernel: also its output, and a log-sum per row
            total = self.value * (heads + shape.inner * tokens) + 4 * shape.num_heads * tokens
        if self.full:  # inputs of q (k, v) and o
            total += self.value * (shape.d_model * tokens + shape.inner * tokens)
        return total + self.dropout(tokens, shape.d_model)

    def ffn(self, tokens: int, *, in_decoder: bool) -> float:
        shape, job, value = self.shape, self.job, self.value
        total = self.norm(tokens)
        # relu keeps its output; gelu_new in Python four tensors, and the product of both halves two
        total += tokens * shape.d_ff * value * (6 if shape.gated else 1)
        total += self.dropout(tokens, shape.d_ff)
        if job.method in ("full", "source") and (shape.gated or shape.dropout):
            total += (
                tokens * shape.d_ff * value
            )  # the input of wo, or of the expert; else relu's output
        if self.full:
            total += tokens * shape.d_model * value
        if job.method == "source":
            total += tokens * job.ranks[0] * value
        if job.method in ("pemt", "adapter"):
            inner = shape.d_model // job.adapter_reduction
            total += tokens * value * (shape.d_model + 2 * inner)
        if job.experts:
            # z; the latents, once for the mixture and once against z; cosines and norms in fp32
            total += tokens * value * (shape.d_model + 2 * job.all_ranks)
            total += tokens * 4 * (2 * job.experts + 1)
            context = shape.d_model if in_decoder else shape.d_ff
            total += 4 * context * (job.batch + job.experts)
        return total + self.dropout(tokens, shape.d_model)

    def dropout(self, tokens: int, width: int) -> float:
        """A mask: one byte a value on a GPU, a whole value on a CPU."""
        if not self.shape.dropout:
            return 0.0
        return tokens * width * (1 if self.hardware == "gpu" else self.value)

    def without_gradient(self, tokens: int) -> float:
        """What the decoder's first self-attention does not save: nothing before it is trained."""
        if self.full:
            return 0.0
        width, trains = self.shape.d_model, self.job.train_layer_norms
        if self.job.method == "source" or not trains:
            return self.norm(tokens) + self.attention(tokens, self.job.target)
        return tokens * ((4 * width if self.value < 4 else 0) + 4 + self.value * width)

    def biases(self) -> float:
        """The position biases with the masks, one for every kind of attention, alive throughout."""
        job, heads = self.job, self.shape.num_heads
        scores = job.encoder_tokens**2 + job.target**2 + job.target * job.encoder_tokens
        return job.batch * heads * scores * self.value

    def loss(self, tokens: int) -> float:
        """The log-softmax, in fp32."""
        return 4.0 * tokens * self.shape.vocab_size
