"""PEMT's two models on one frozen base: source training and target adaptation.

Shapes: B batch, S source tokens, P prompt tokens, T target tokens, V vocabulary, D d_model,
L sites with a gate, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.model.context import PassContext
from pemt.model.experts import (
    ExpertSource,
    ModelError,
    SourceProjection,
    Trainable,
    check_bottleneck,
    check_prompt,
    inner_width,
)
from pemt.model.gated import GatedLinear
from pemt.model.inject import (
    Base,
    checked_base,
    keep_for_recompute,
    layer_norms,
    linear_sites,
    pass_encoder_prompt,
)
from pemt.model.mixture import mix_at
from pemt.model.prompts import TaskPrompt
from pemt.model.shape import base_digest, base_shape, keep_digest
from pemt.model.sites import target_sites
from pemt.model.trained_t5 import IGNORED_LABEL, PemtOutput, TrainedT5, mean_cross_entropy


class PemtT5(TrainedT5):
    """A frozen T5, or base model of another family, with PEMT's modules in it. Make one with `source` or `target`.

    The base model is changed in place. `requires_grad` is set here, once.
    """

    def __init__(
        self,
        base: Base,
        prompt: TaskPrompt,
        context: PassContext,
        *,
        expert: ExpertConfig | None = None,
        mixture: MixtureConfig | None = None,
        source_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.base = base
        self.source_names = list(source_names)
        self.gate_sites = {
            each.spec.tag: each.module.source_names
            for each in linear_sites(base)
            if isinstance(each.module, GatedLinear)
        }
        self.prompt = prompt
        self.context = context
        self.expert = expert
        self.mixture = mixture
        if mixture is not None:
            self.sparsity_loss_weight = mixture.sparsity_loss_weight
        self.base_sha256 = base_digest(base)  # now, while no ZeRO-3 has partitioned the weights
        self.freeze_untrained()

    @classmethod
    def source(cls, base: PreTrainedModel, *, expert: ExpertConfig, prompt_PD: Tensor) -> PemtT5:
        """Stage 1: trained are one expert on every layer that `expert.target_modules` names, and a task prompt.

        Raises:
            ModelError: the base is no T5, or the prompt or the expert does not fit it.
            ConfigError: `expert.target_modules` names no linear layer of the base.
        """
        base = checked_base(base)
        prompt = _task_prompt(base, prompt_PD)
        shape = base_shape(base.config)
        if expert.kind == "bottleneck":
            check_bottleneck(shape)
        chosen = target_sites(expert.target_modules, shape)
        for site in linear_sites(base):
            if site.spec in chosen:
                site.replace(SourceProjection(site.weight, expert))
                if expert.kind == "bottleneck":
                    site.pass_ffn_input()
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
        """Stage 2: trained are gates, target adapters, the prompt and (by `mixture`) layer norms.

        A layer's gate weighs the sources that have an expert on it; where none has, there is no gate.
        Without sources there are no gates: the baseline of adapter, prompt and layer norms alone.

        Raises:
            ModelError: the base is no T5, or prompt, adapter or a source does not fit it, or a
                source was trained on another base, or sources are of different kinds.
        """
        base = checked_base(base)
        _check_kinds(sources)
        for source in sources:
            source.check(base_shape(base.config))
        check_weights(base, sources)
        keep_digest(base)
        prompt = _task_prompt(
            base,
            prompt_PD,
            sources=[source.prompt_PD for source in sources],
            dropout=mixture.prompt_dropout,
        )
        context = PassContext(prompt_length=len(prompt_PD))
        for site in linear_sites(base):
            there = [source for source in sources if source.is_on(site.name)]
            mix_at(site, there, mixture, adapter, context)
        if sources:
            pass_encoder_prompt(base, context)
        names = [source.name for source in sources]
        return cls(base, prompt, context, mixture=mixture, source_names=names)

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        keep_for_recompute(self.base, self.context)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> PemtOutput:
        """As `TrainedT5.forward`; T5's own `decoder_input_ids` [B,T] may take the labels' place, or stand before them.

        Without labels there is no loss.
        """
        inputs = self.encoder_inputs(input_ids, attention_mask)
        if decoder_input_ids is None:
            assert labels is not None, "neither labels nor decoder_input_ids"
            decoder_input_ids = self.base.prepare_decoder_input_ids_from_labels(labels)
        no_mask = torch.ones_like(decoder_input_ids, dtype=torch.bool)
        counted_BT = no_mask if labels is None else labels != IGNORED_LABEL
        over_padding = self.mixture is None or self.mixture.sparsity_over_padding
        with self.context.recording(
            encoder_mask_BS=None if over_padding else inputs["attention_mask"],
            decoder_mask_BS=None if over_padding else counted_BT,
        ) as records:
            out = self.base(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False)
        loss = ce_loss = None if labels is None else mean_cross_entropy(out.logits, labels)
        # none without an expert on an FFN's output
        losses = [each.sparsity_loss for each in records if each.sparsity_loss is not None]
        sparsity_loss = torch.stack(losses).mean() if losses else None
        if ce_loss is not None and sparsity_loss is not None:
            loss = ce_loss + self.sparsity_loss_weight * sparsity_loss
        return PemtOutput(
            loss=loss,
            ce_loss=ce_loss,
            sparsity_loss=sparsity_loss,
            logits=out.logits,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            gates_BLK=self._all_gates([record.gates_BK for record in records]),
        )

    @torch.no_grad()
    def generate_with_gates(
        self, input_ids: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        with self.context.generating() as records:
            tokens_BT, _ = super().generate_with_gates(
                input_ids, attention_mask, **generation_kwargs
            )
        # In the decoder every sample stands there once per beam.
        batch = len(input_ids)
        gates = [each.gates_BK for each in records]
        return tokens_BT, self._all_gates([each[:: len(each) // batch] for each in gates])

    @torch.no_grad()
    def label_log_likelihoods(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        # As `generate`: the decoder's gates are computed for the first label, and serve all.
        with self.context.generating() as records:
            likely_BC, _ = super().label_log_likelihoods(input_ids, attention_mask, labels)
        return likely_BC, self._all_gates([each.gates_BK for each in records])

    def export_expert(
        self, name: str, *, state: Mapping[str, Tensor] | None = None
    ) -> ExpertSource:
        """Stage 1's result, on the CPU.

        Args:
            name: the source task.
            state: trained tensors by parameter name, for when the parameters themselves are
                partitioned (ZeRO-3) or not the ones wanted; default: the parameters as they are.
        """
        assert self.expert is not None, "only a model made by `source` has an expert to export"
        names = {id(parameter): key for key, parameter in self.named_parameters()}

        def taken(parameter: nn.Parameter) -> Tensor:
            tensor = parameter if state is None else state[names[id(parameter)]]
            return tensor.detach().to("cpu", copy=True)

        return ExpertSource(
            name=name,
            kind=self.expert.kind,
            rank=inner_width(self.expert, base_shape(self.base.config)["d_ff"]),
            alpha=self.expert.alpha,
            weights={key: taken(parameter) for key, parameter in self._expert_parameters()},
            prompt_PD=taken(self.prompt.prompt),
            base_sha256=self.base_sha256,
        )

    def _expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for site in linear_sites(self.base):
            if isinstance(site.module, SourceProjection):
                for key, parameter in site.module.expert.named_parameters():
                    yield f"{site.name}.{key}", parameter

    @torch.no_grad()
    def load_expert(self, source: ExpertSource) -> None:
        """Go on from an expert and prompt that `export_expert` of such a model gave."""
        for key, parameter in self._expert_parameters():
            parameter.copy_(source.weights[key])
        self.prompt.prompt.copy_(source.prompt_PD)

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules():
            if isinstance(module, Trainable):
                yield from module.trainable_parameters()
        if self.mixture is not None and self.mixture.train_layer_norms:
            for norm in layer_norms(self.base).values():
                yield from norm.parameters()

    def prompt_similarity(self) -> Tensor | None:
        return self.prompt.similarity_MM

    def encoder_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The prompt before the input: embeddings [B,P+S,D] and attention mask [B,P+S]."""
        prompt_PD = self.prompt()
        embeds_BSD = self.base.get_input_embeddings()(input_ids)
        prompt_BPD = prompt_PD.to(embeds_BSD.dtype).expand(len(input_ids), -1, -1)
        ones_BP = attention_mask.new_ones(prompt_BPD.shape[:2])
        return {
            "inputs_embeds": torch.cat([prompt_BPD, embeds_BSD], dim=1),
            "attention_mask": torch.cat([ones_BP, attention_mask], dim=1),
        }

    def _all_gates(self, gates: Sequence[Tensor]) -> Tensor | None:
        """Every site's gates [B,K of the site] as one tensor [B,L,K]: 0 for sources not on a site; None without any."""
        if not gates:
            return None
        sites = self.gate_sites.values()
        whole = [self._of_all(each, names) for each, names in zip(gates, sites, strict=True)]
        return torch.stack(whole, dim=1)

    def _of_all(self, gates_BK: Tensor, names: list[str]) -> Tensor:
        if names == self.source_names:
            return gates_BK
        columns = dict(zip(names, gates_BK.unbind(dim=1), strict=True))
        absent_B = gates_BK.new_zeros(len(gates_BK))
        return torch.stack([columns.get(name, absent_B) for name in self.source_names], dim=1)


def _task_prompt(
    base: Base, prompt_PD: Tensor, *, sources: Sequence[Tensor] = (), dropout: float = 0.0
) -> TaskPrompt:
    check_prompt(prompt_PD, base_shape(base.config)["d_model"], owner="the task's own prompt")
    like: Any = base.get_input_embeddings().weight
    return TaskPrompt(prompt_PD.to(like), sources=sources, dropout=dropout)


def check_weights(base: Base, sources: Sequence[ExpertSource]) -> None:
    """Raise `ModelError` where a source knows that it was trained on a base model of other weights."""
    digest = base_digest(base)
    for source in sources:
        if source.base_sha256 not in (None, digest):
            raise ModelError(
                f"source `{source.name}`: trained on a base model with other weights than "
                f"{base.config.name_or_path or 'this one'}, though of the same shape; "
                "choose that one as model_name_or_path, or train the source on this one"
            )


def _check_kinds(sources: Sequence[ExpertSource]) -> None:
    kinds = {source.kind: source.name for source in sources}
    if len(kinds) > 1:
        found = ", ".join(f"`{name}` is {kind}" for kind, name in sorted(kinds.items()))
        raise ModelError(f"source_tasks: {found}; choose experts of one kind")
