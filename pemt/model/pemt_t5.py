"""PEMT's two models on one frozen base: source training (stage 1) and target adaptation (stage 2).

Shapes: B batch, S source tokens, P prompt tokens, T target tokens, V vocabulary, D d_model, L all FFNs, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.model import inject
from pemt.model.context import PassContext, Record
from pemt.model.experts import (
    ExpertSource,
    ModelError,
    SourceProjection,
    check_prompt,
    expert_shapes,
    inner_width,
    new_expert,
)
from pemt.model.gate import Gate
from pemt.model.mixture import MIXTURES, AdapterProjection, TargetAdapter
from pemt.model.prompts import TaskPrompt
from pemt.model.shape import base_shape
from pemt.model.trainable import Trainable

IGNORED_LABEL = -100


@dataclass
class PemtOutput(ModelOutput):
    """What a training step or a measurement reads.

    Args:
        loss: `ce_loss` + weight · `sparsity_loss`, fp32.
        ce_loss: mean cross-entropy over the labels that are not -100, fp32; 0 where all are.
        sparsity_loss: mean task sparsity loss over all FFNs, fp32; None without experts to mix.
        logits: [B,T,V].
        encoder_last_hidden_state: [B,P+S,D].
        gates_LBK: every FFN's gates, encoder first, fp32, detached; None without experts to mix.
    """

    loss: Tensor | None = None
    ce_loss: Tensor | None = None
    sparsity_loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    gates_LBK: Tensor | None = None


class PemtT5(nn.Module):
    """A frozen T5, mT5 or UMT5 with PEMT's modules put into it. Make one with `source` or `target`.

    The base model is changed in place. Which parameters are trained is settled here, once.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        prompt: TaskPrompt,
        context: PassContext,
        *,
        expert: ExpertConfig | None = None,
        mixture: MixtureConfig | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.prompt = prompt
        self.context = context
        self.expert = expert
        self.mixture = mixture
        trained = {id(parameter) for parameter in self._declared_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    @classmethod
    def source(cls, base: PreTrainedModel, *, expert: ExpertConfig, prompt_PD: Tensor) -> PemtT5:
        """Stage 1: one trained expert on every FFN's output projection, and a trained task prompt.

        Raises:
            ModelError: the base is no T5, or the prompt or the expert does not fit it.
        """
        prompt = _new_prompt(base, prompt_PD)
        d_ff, d_model = base.config.d_ff, base.config.d_model
        for site in inject.ffn_sites(base):
            inject.replace_projection(
                site,
                lambda weight: SourceProjection(weight, new_expert(expert, d_ff, d_model, weight)),
            )
            if expert.kind == "bottleneck":
                inject.pass_ffn_input(site)
        return cls(base, prompt, PassContext(prompt_length=len(prompt_PD)), expert=expert)

    @classmethod
    def target(
        cls,
        base: PreTrainedModel,
        *,
        sources: Sequence[ExpertSource],
        mixture: MixtureConfig,
        adapter: AdapterConfig,
        prompt_PD: Tensor,
    ) -> PemtT5:
        """Stage 2: frozen experts and source prompts; trained gates, target adapters, prompt and layer norms.

        Without sources: the target adapter, prompt and layer norms alone.

        Raises:
            ModelError: the base is no T5, sources of both kinds, or one that does not fit the base.
        """
        prompt = _new_prompt(base, prompt_PD, sources=sources, dropout=mixture.prompt_dropout)
        kind = _common_kind(sources)
        for source in sources:
            source.check(base_shape(base.config))
        context = PassContext(prompt_length=len(prompt_PD))
        for site in inject.ffn_sites(base):
            inject.replace_projection(
                site,
                lambda weight, site=site: _target_projection(
                    weight, site, sources, adapter, context
                ),
            )
            if kind == "bottleneck":
                inject.pass_ffn_input(site)
        if sources:
            inject.pass_encoder_prompt(base, context)
        return cls(base, prompt, context, mixture=mixture)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PemtOutput:
        """One pass with teacher forcing.

        Args:
            input_ids, attention_mask: [B,S], padded on the right.
            labels: [B,T], -100 where there is nothing to predict.
        """
        embeds_BSD, mask_BS = self._put_prompt(input_ids, attention_mask)
        counted_BT = labels != IGNORED_LABEL
        over_padding = self.mixture is None or self.mixture.sparsity_over_padding
        masks = {} if over_padding else {"encoder_mask_BS": mask_BS, "decoder_mask_BS": counted_BT}
        with self.context.recording(**masks) as records:
            out = self.base(
                inputs_embeds=embeds_BSD,
                attention_mask=mask_BS,
                decoder_input_ids=self.base.prepare_decoder_input_ids_from_labels(labels),
                use_cache=False,
            )
        summed = F.cross_entropy(
            out.logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        ce_loss = summed / counted_BT.sum().clamp(min=1)
        return PemtOutput(
            ce_loss=ce_loss,
            logits=out.logits,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            **self._with_sparsity(ce_loss, records),
        )

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> Tensor:
        """Token ids [B·returned,T] from the base model's own `generate`, behind the prompt."""
        embeds_BSD, mask_BS = self._put_prompt(input_ids, attention_mask)
        return self.base.generate(
            inputs_embeds=embeds_BSD, attention_mask=mask_BS, **generation_kwargs
        )

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything trained, in the order and under the names of `named_parameters`."""
        trained = {id(parameter) for parameter in self._declared_parameters()}
        return (
            (name, parameter)
            for name, parameter in self.named_parameters()
            if id(parameter) in trained
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass. Reentrant checkpointing would lose the sparsity loss."""
        self.base.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def export_expert(
        self, name: str, *, state: Mapping[str, Tensor] | None = None
    ) -> ExpertSource:
        """Stage 1's result as a bank entry's content, on the CPU.

        Args:
            name: the source task.
            state: trained tensors by parameter name, gathered, where the parameters themselves are partitioned
                (ZeRO-3) or stand at another step; default: the parameters as they are.
        """
        assert self.expert is not None, "only a stage 1 model has an expert to export"
        if state is None:
            state = {key: parameter.detach() for key, parameter in self.trainable_parameters()}
        names = {id(parameter): key for key, parameter in self.named_parameters()}

        def taken(parameter: nn.Parameter) -> Tensor:
            return state[names[id(parameter)]].detach().cpu().clone()

        weights = {
            f"{site.name}.{key}": taken(parameter)
            for site in inject.ffn_sites(self.base)
            for key, parameter in site.dense.wo.expert.named_parameters()
        }
        return ExpertSource(
            name=name,
            kind=self.expert.kind,
            rank=inner_width(self.expert, self.base.config.d_ff),
            alpha=self.expert.alpha,
            weights={
                key: weights[key]
                for key in expert_shapes(self.expert.kind, 1, base_shape(self.base.config))
            },
            prompt_PD=taken(self.prompt.prompt),
        )

    def _declared_parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules():
            if isinstance(module, Trainable):
                yield from module.trainable_parameters()
        if self.mixture is not None and self.mixture.train_layer_norms:
            for norm in inject.layer_norms(self.base):
                yield from norm.parameters()

    def _put_prompt(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt before the input: embeddings [B,P+S,D] and attention mask [B,P+S]."""
        batch = input_ids.shape[0]
        prompt_PD = self.prompt()
        embeds_BSD = self.base.get_input_embeddings()(input_ids)
        prompt_BPD = prompt_PD.to(embeds_BSD.dtype).expand(batch, -1, -1)
        ones_BP = attention_mask.new_ones(batch, len(prompt_PD))
        return torch.cat([prompt_BPD, embeds_BSD], dim=1), torch.cat(
            [ones_BP, attention_mask], dim=1
        )

    def _with_sparsity(self, ce_loss: Tensor, records: list[Record]) -> dict[str, Tensor]:
        if self.mixture is None or not records:
            return {"loss": ce_loss}
        sparsity_loss = torch.stack([record.sparsity_loss for record in records]).mean()
        return {
            "loss": ce_loss + self.mixture.sparsity_loss_weight * sparsity_loss,
            "sparsity_loss": sparsity_loss,
            "gates_LBK": torch.stack([record.gates_BK for record in records]),
        }


def _new_prompt(
    base: PreTrainedModel,
    prompt_PD: Tensor,
    *,
    sources: Sequence[ExpertSource] = (),
    dropout: float = 0.0,
) -> TaskPrompt:
    inject.check_base(base)
    check_prompt(prompt_PD, base.config.d_model, owner="the task's own prompt")
    like = prompt_PD.to(base.get_input_embeddings().weight)
    return TaskPrompt(like, sources=[source.prompt_PD for source in sources], dropout=dropout)


def _common_kind(sources: Sequence[ExpertSource]) -> str | None:
    kinds = {source.kind: source.name for source in sources}
    if len(kinds) > 1:
        found = ", ".join(f"`{name}` is {kind}" for kind, name in sorted(kinds.items()))
        raise ModelError(f"source_tasks: {found}; experts of one mixture must be of one kind")
    return next(iter(kinds), None)


def _target_projection(
    weight: nn.Parameter,
    site: inject.FfnSite,
    sources: Sequence[ExpertSource],
    adapter: AdapterConfig,
    context: PassContext,
) -> AdapterProjection:
    d_model, d_ff = weight.shape
    target_adapter = TargetAdapter(d_model, reduction_factor=adapter.reduction_factor, like=weight)
    if not sources:
        return AdapterProjection(weight, target_adapter)
    in_decoder = site.stack == "decoder"
    gate = Gate(
        d_model if in_decoder else d_ff, len(sources), dtype=weight.dtype, device=weight.device
    )
    return MIXTURES[sources[0].kind](
        sources,
        site,
        weight,
        adapter=target_adapter,
        gate=gate,
        context=context,
        in_decoder=in_decoder,
    )
