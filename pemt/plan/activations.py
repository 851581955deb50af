"""What the forward pass keeps for the backward pass, and the largest thing made besides: by formula.

Each line below is a tensor that autograd saves in transformers 5.23's T5 or T5Gemma and in PEMT's modules. A
frozen matrix product saves nothing: its backward pass needs the weight alone.
"""

from __future__ import annotations

from typing import Literal

from pemt.model import Site
from pemt.plan.job import Job
from pemt.plan.shapes import Widths

Hardware = Literal["cpu", "gpu"]


def saved(job: Job, hardware: Hardware) -> float:
    """Bytes kept at the end of the forward pass."""
    shape, kept = job.shape, _Kept(job, hardware)
    source, target = job.batch * job.encoder_tokens, job.batch * job.target
    blocks = [kept.block(stack, layer) for stack, layer in shape.blocks]
    encoder, decoder = (shape.of(stack).d_model for stack in ("encoder", "decoder"))
    # of each stack's output, and of the encoder's input: the decoder's embeddings need no gradient
    ends = kept.dropout(2 * source, encoder) + kept.dropout(target, decoder)
    ends += kept.norm(source, encoder) + kept.norm(target, decoder)
    ends -= kept.without_gradient(target)
    if kept.full:  # the head's input
        ends += job.bytes_per_value * decoder * target
    cross = [site for site in shape.sites if site.in_decoder and site.reads_encoder]
    if any(kept.keeps_input(site) for site in cross):  # one for the keys and values of all layers
        ends += job.bytes_per_value * shape.d_model * source
    if any(site.in_decoder and job.mixed_at(site) for site in shape.sites):
        ends += 4 * shape.d_model * job.batch  # what all the decoder's gates read
    ends += kept.biases() + kept.loss(target)
    if not job.gradient_checkpointing:
        return sum(blocks) + ends
    # Every block's input, and one block at a time in full.
    inputs = shape.num_layers * source * encoder + shape.num_decoder_layers * target * decoder
    return job.bytes_per_value * inputs + max(blocks) + ends


def transient(job: Job) -> float:
    """The larger of what the loss and an encoder's FFN make on the way back."""
    shape, value = job.shape, job.bytes_per_value
    source, target = job.batch * job.encoder_tokens, job.batch * job.target
    # the logits, the gradient of their log-softmax, and of them
    at_loss = target * shape.of("decoder").vocab_size * ((value if value < 4 else 0) + 4 + value)
    # gradients of an FFN's inner width
    at_ffn = source * shape.d_ff * value * (3 if shape.gated else 2)
    return max(at_loss, at_ffn)


class _Kept:
    """Bytes that the parts of a model save."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        self.job, self.shape, self.hardware = job, job.shape, hardware
        self.value = job.bytes_per_value
        self.full = job.method == "full"
        # T5Gemma's attention, which caps its scores, is written out in transformers
        self.eager = job.shape.family.position_bias is None

    def block(self, stack: str, layer: int) -> float:
        job, in_decoder = self.job, stack == "decoder"
        length = job.target if in_decoder else job.encoder_tokens
        tokens = job.batch * length
        sizes = self.shape.of(stack)
        norms = sum(len(part.norms) for part in self.shape.family.parts[stack].values())
        total = self.ffn(tokens, sizes) + norms * self.norm(tokens, sizes.d_model)
        for seen in [length] + ([job.encoder_tokens] if in_decoder else []):
            total += self.attention(tokens, seen, sizes)
        sites = self.shape.blocks[stack, layer]
        return total + sum(self.experts(site) for site in sites) + self.inputs(sites)

    def keeps_input(self, site: Site) -> bool:
        """Whether something that is trained there wants the layer's input; the mixture does not."""
        return self.full or (self.job.method == "source" and bool(self.job.ranks_at(site)))

    def inputs(self, sites: list[Site]) -> float:
        """The inputs that trained weights want, each once; cross-attention's k and v have the same in all blocks."""
        values: dict[tuple[str, bool], float] = {}
        for site in sites:
            if not self.keeps_input(site) or (site.in_decoder and site.reads_encoder):
                continue
            if site.is_ffn_output and not (self.shape.gated or self.shape.dropout):
                continue  # relu's output, which is kept anyway
            inputs, _ = site.widths(self.shape.base_shape)
            # q, k and v share theirs, wi_0 and wi_1 too
            values[site.part, site.ends_part] = self.tokens(site) * inputs
        return self.value * sum(values.values())

    def tokens(self, site: Site) -> int:
        """That go through a layer."""
        return self.job.batch * self.job.tokens_at(site)

    def experts(self, site: Site) -> float:
        """Latents, gates, and at an FFN's output what the sparsity loss keeps."""
        job, value, tokens = self.job, self.value, self.tokens(site)
        if job.method == "source":
            return tokens * value * sum(job.ranks_at(site))
        ranks = job.mixed_at(site)
        if not ranks:
            return 0.0
        total = tokens * value * sum(ranks) + 4.0 * job.batch * len(ranks)
        inputs, outputs = site.widths(self.shape.base_shape)
        if job.learned_gates and not site.in_decoder:
            total += 4 * inputs * job.batch
        if site.is_ffn_output:
            # z; the latents once more, against z; cosines and norms in fp32
            total += tokens * value * (outputs + sum(ranks))
            total += tokens * 4 * (2 * len(ranks) + 1)
        return total

    def norm(self, tokens: int, width: int) -> float:
        """An RMS norm: what a frozen one keeps, and the normed input."""
        value = 4 if self.eager else self.value
        trained = self.full or self.job.trains_norms
        return self.frozen_norm(tokens, width) + (tokens * value * width if trained else 0)

    def frozen_norm(self, tokens: int, width: int) -> float:
        """Its input (in half precision an fp32 copy too) and the factor."""
        if self.eager:  # Gemma's, in fp32 throughout
            return tokens * (4 + 4 * width)
        copy = 4 * width if self.value < 4 else 0
        return tokens * (copy + 4 + self.value * width)

    def attention(self, tokens: int, seen: int, sizes: Widths) -> float:
        """Queries, keys, values, what SDPA keeps, and the dropout behind it."""
        shape = self.shape
        heads = sizes.inner * (tokens + 2 * self.job.batch * seen)
        scores = sizes.heads * tokens * seen
        if self.eager:
            # the capped scores, their softmax in fp32, and in half precision a copy of it
            half = self.value if self.value < 4 else 0
            total = float(self.value * heads + scores * (self.value + 4 + half))
        elif self.hardware == "cpu" and (shape.dropout or self.full):
            # PyTorch's plain formula, in fp32: softmax, its dropout mask, their product
            total = 4.0 * heads + (3 if shape.dropout else 1) * 4 * scores
        else:
            # a fused kernel: also its output, and a log-sum per row
            total = self.value * (heads + sizes.inner * tokens) + 4 * sizes.heads * tokens
        return total + self.dropout(tokens, sizes.d_model)

    def ffn(self, tokens: int, sizes: Widths) -> float:
        shape, job, value = self.shape, self.job, self.value
        # relu keeps its output; gelu_new in Python four tensors, and the product of both halves two
        activation = 6 if shape.gated else 1
        if self.eager:  # PyTorch's own gelu keeps its input
            activation = 3
        total = float(tokens * sizes.d_ff * value * activation)
        total += self.dropout(tokens, sizes.d_ff)
        if job.has_adapters:
            inner = sizes.d_model // job.adapter_reduction
            total += tokens * value * (sizes.d_model + 2 * inner)
        return total + self.dropout(tokens, sizes.d_model)

    def dropout(self, tokens: int, width: int) -> float:
        """A mask: one byte a value on a GPU, a whole value on a CPU."""
        if not self.shape.dropout:
            return 0.0
        return tokens * width * (1 if self.hardware == "gpu" else self.value)

    def without_gradient(self, tokens: int) -> float:
        """What the decoder's first self-attention does not save: nothing before it is trained."""
        if self.full:
            return 0.0
        sizes = self.shape.of("decoder")
        first = [site for site in self.shape.blocks["decoder", 0] if site.part == "self"]
        spared = self.frozen_norm(tokens, sizes.d_model)
        if self.job.trains_norms or any(self.job.ranks_at(site) for site in first):
            return spared
        return spared + self.attention(tokens, self.job.target, sizes)

    def biases(self) -> float:
        """The masks, with the position biases of a family that has them, one for every kind of attention."""
        job, heads = self.job, 1 if self.eager else self.shape.num_heads
        scores = job.encoder_tokens**2 + job.target**2 + job.target * job.encoder_tokens
        return job.batch * heads * scores * self.value

    def loss(self, tokens: int) -> float:
        """The log-softmax in fp32, and the capped logits."""
        vocabulary = self.shape.of("decoder").vocab_size
        return (4.0 + (self.value if self.eager else 0)) * tokens * vocabulary
