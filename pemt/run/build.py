"""The model of a run: configuration, base and bank to a TrainedT5, for training and for what comes after."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pemt.bank import read_bank
from pemt.config import PEFT_METHODS, AdaptConfig, PemtError, RunConfig, SourceConfig
from pemt.engine import Engine
from pemt.model import (
    BitFitT5,
    FullT5,
    PeftT5,
    PemtT5,
    TrainedT5,
    base_shape,
    description_prompt,
    peft_settings,
    starts_from_text,
    top_sources,
)
from pemt.monitor import MOST_TAGS, GateNames
from pemt.ops import OpsError, select


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A run's model, untrained.

    Args:
        model: not yet prepared; the base model is in it.
        stage: `source` or `adapt`.
        source_names: the experts that its gates weigh, in the gates' order; none in stage 1.
        left_out: the experts that `mixture.top_sources` leaves out.
    """

    model: TrainedT5
    stage: str
    source_names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def gate_names(self) -> GateNames:
        """What the axes of the model's gates stand for."""
        return GateNames(sources=self.source_names, sites=self.model.gate_sites)

    def notes(self, config: RunConfig) -> list[str]:
        """In one line each, what a person would not expect of the experts of this run."""
        names, sites = self.source_names, self.model.gate_sites
        if not names:
            return []
        found = []
        if len(names) == 1:
            found.append(
                f"{names[0]} is the only expert: its gate is 1 everywhere, with nothing to choose from"
            )
        if self.left_out:
            found.append(
                f"mixture.top_sources {len(names)}: mixed are {', '.join(names)}; left out, with prompts less like the "
                f"target's: {', '.join(self.left_out)}"
            )
        if len({tuple(present) for present in sites.values()}) > 1:
            counts = {name: sum(name in present for present in sites.values()) for name in names}
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            found.append(
                f"the experts are on different layers (of {len(sites)} with an expert: {listed}); each gate weighs "
                "those that are on its layer"
            )
        if (weights := self.gate_names.weights) > MOST_TAGS:
            found.append(
                f"{weights} gate weights ({len(names)} experts on {len(sites)} layers): log.jsonl and TensorBoard get "
                "the mean of each block's, all_results.json every one of the test's; mixture.top_sources mixes fewer"
            )
        if not any(site.count("/") == 1 for site in sites):
            found.append(
                "no expert is on an FFN's wo, where the task sparsity loss is taken: there is none, and "
                "mixture.sparsity_loss_weight has no effect"
            )
        if config.torch_compile and config.gradient_checkpointing:
            found.append(
                "torch_compile: has no effect on blocks that mix experts with gradient_checkpointing; leave one of "
                "them out"
            )
        return found


def build_model(
    config: RunConfig,
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    description: str,
) -> BuiltModel:
    """The model that a configuration describes.

    Args:
        config: a SourceConfig or an AdaptConfig.
        base: changed in place.
        description: the sentence whose tokens' embeddings start the prompt.

    Raises:
        BankError, StorageError: the bank cannot be used.
        ModelError: base, experts and prompt do not go together.
    """
    if isinstance(config, SourceConfig):
        prompt_PD = description_prompt(tokenizer, base, description)
        source = PemtT5.source(base, expert=config.expert, prompt_PD=prompt_PD)
        return BuiltModel(model=source, stage="source")
    assert isinstance(config, AdaptConfig)
    if config.method == "full":
        return BuiltModel(model=FullT5(base), stage="adapt")
    if config.method == "bitfit":
        return BuiltModel(model=BitFitT5(base), stage="adapt")
    if config.method in PEFT_METHODS:
        model = _peft_model(config, base, tokenizer, description)
        return BuiltModel(model=model, stage="adapt")
    return _target_model(config, base, tokenizer, description)


def build_ops(config: RunConfig, engine: Engine) -> None:
    """Compile the fused op where a run uses it and nobody has yet, while the machine's other ranks wait (all ranks
    call).

    Raises:
        PemtError: PEMT_OPS names an implementation that cannot be had here.
    """
    # On a CPU every method answers through it.
    if engine.device.type != "cpu" and getattr(config, "method", None) != "pemt":
        return
    with engine.local_first("compiling the fused op"):
        try:
            select.prepare(engine.device.type)
        except OpsError as error:
            raise PemtError(str(error)) from None


def _target_model(
    config: AdaptConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
) -> BuiltModel:
    """PEMT, or its target adapter without experts."""
    sources = []
    if config.method == "pemt":
        assert config.bank_dir is not None
        sources = read_bank(
            config.bank_dir,
            base_name=config.model_name_or_path,
            base_shape=base_shape(base.config),
            tasks=config.source_tasks,
        )
    prompt_PD = description_prompt(tokenizer, base, description)
    mixed, left_out = top_sources(prompt_PD, sources, config.mixture.top_sources)
    model = PemtT5.target(
        base, sources=mixed, mixture=config.mixture, adapter=config.adapter, prompt_PD=prompt_PD
    )
    names = [source.name for source in mixed]
    return BuiltModel(model=model, stage="adapt", source_names=names, left_out=left_out)


def _peft_model(
    config: AdaptConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
) -> PeftT5:
    settings = peft_settings(config.method, config.peft_config)
    if not starts_from_text(settings, config.peft_config):
        return PeftT5(base, settings)
    return PeftT5(base, settings, prompt_PD=description_prompt(tokenizer, base, description))
