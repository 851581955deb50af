"""The model of a run: configuration, base and bank to a PemtT5, for training and for what comes after."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pemt.bank import read_bank
from pemt.config import AdaptConfig, RunConfig, SourceConfig
from pemt.model import PemtT5, base_shape, description_prompt


@dataclass(frozen=True, kw_only=True)
class Built:
    """A run's model, untrained.

    Args:
        model: not yet prepared; the base model is in it.
        stage: `source` or `adapt`.
        source_names: the experts that its gates weigh, in the gates' order; none in stage 1.
    """

    model: PemtT5
    stage: str
    source_names: list[str]


def build_model(
    config: RunConfig,
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    description: str,
) -> Built:
    """The model that a configuration describes.

    Args:
        config: a SourceConfig or an AdaptConfig.
        base: changed in place.
        description: the sentence whose tokens' embeddings start the prompt.

    Raises:
        BankError, StorageError: the bank cannot be used.
        ModelError: base, experts and prompt do not go together.
    """
    prompt_PD = description_prompt(tokenizer, base, description)
    if isinstance(config, SourceConfig):
        model = PemtT5.source(base, expert=config.expert, prompt_PD=prompt_PD)
        return Built(model=model, stage="source", source_names=[])
    assert isinstance(config, AdaptConfig)
    sources = []
    if config.method == "pemt":
        assert config.bank_dir is not None
        sources = read_bank(
            config.bank_dir,
            base_name=config.model_name_or_path,
            base_shape=base_shape(base.config),
            tasks=config.source_tasks,
        )
    model = PemtT5.target(
        base,
        sources=sources,
        mixture=config.mixture,
        adapter=config.adapter,
        prompt_PD=prompt_PD,
    )
    return Built(model=model, stage="adapt", source_names=[source.name for source in sources])
