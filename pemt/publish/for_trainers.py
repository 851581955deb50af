"""PEMT's two models for other people's training loops: `target_model` and `source_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pemt.bank import BankError, read_bank, read_entry, site_names, write_entry
from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig, PemtError
from pemt.model import (
    ExpertSource,
    PemtT5,
    Site,
    base_shape,
    description_prompt,
    load_pretrained,
    top_sources,
)
from pemt.publish.adapter_format import (
    FORMAT,
    Settings,
    read_model,
    read_settings,
    source_settings,
    write_adapter,
)
from pemt.publish.trainer_module import PemtModule
from pemt.tasks import Task, get_task, longest_target


class TargetModel(PemtModule):
    """Stage 2. Make one with `target_model`."""

    def __init__(
        self, pemt: PemtT5, *, experts: Sequence[ExpertSource], adapter: AdapterConfig, **given: Any
    ) -> None:
        super().__init__(pemt, **given)
        self._experts, self._adapter = experts, adapter

    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """What `pemt export` writes: for `from_pretrained`, and for `PemtModel.from_pretrained` to ask."""
        folder, task, mixture = Path(save_directory), self.task, self.pemt.mixture
        assert mixture is not None
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            format=FORMAT,
            method="pemt" if self._experts else "adapter",
            base_model_name_or_path=self.base_name,
            base_sha256=self.pemt.base_sha256,
            tokenizer_name=_other_name(self.tokenizer, self.base_name),
            task_name=task.name if task else "",
            template=task.template if task else "{source}",
            labels=list(task.labels) if task else [],
            label_names=list(task.label_names) if task else [],
            max_source_length=_LONGEST_SOURCE,
            max_new_tokens=longest_target(task, None) if task else _LONGEST_ANSWER,
            num_beams=1,
            reduction_factor=self._adapter.reduction_factor,
            train_layer_norms=mixture.train_layer_norms,
            mixture=mixture,
            sources=source_settings(self._experts),
            dtype="float32",
        )
        write_adapter(folder, settings, trained=self._state(state_dict), experts=self._experts)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, base: str | Path | PreTrainedModel | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> TargetModel:  # fmt: skip
        """Go on from what `save_pretrained`, or `pemt export` of a run, wrote.

        Args:
            folder: of either.
            base, tokenizer: as of `target_model`; default: as the folder says.

        Raises:
            PemtError: the folder holds no such thing, or another base model's.
            BaseModelError, TokenizerError: base model or tokenizer cannot be loaded.
        """
        folder = Path(folder).expanduser()
        settings = read_settings(folder)
        given = settings.base_model_name_or_path if base is None else base
        name, model, reader = _loaded(given, tokenizer or settings.tokenizer_name)
        pemt, experts = read_model(folder, settings, model)
        if not isinstance(pemt, PemtT5):
            raise PemtError(f"{folder}: is a {settings.method}; its trainer is `pemt adapt`")
        task = None
        if settings.task_name:
            task = Task(
                name=settings.task_name,
                description=settings.task_name,
                template=settings.template,
                labels=tuple(settings.labels),
                label_names=tuple(settings.label_names),
                metrics=("accuracy",),
                max_target_length=settings.max_new_tokens,
            )
        return cls(
            pemt,
            experts=experts,
            adapter=AdapterConfig(reduction_factor=settings.reduction_factor),
            base_name=name,
            tokenizer=reader,
            description=settings.task_name,
            task=task,
        )


class SourceModel(PemtModule):
    """Stage 1. Make one with `source_model`."""

    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """An entry of a bank: `save_pretrained("bank/mnli")` puts `mnli` into `bank`, where stage 2 finds it."""
        folder = Path(save_directory)
        state = None if state_dict is None else self._state(state_dict)
        write_entry(
            folder.parent,
            self.pemt.export_expert(folder.name, state=state),
            base={"name": self.base_name, **base_shape(self.config)},
            description=self.description,
            metrics={},
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, base: str | Path | PreTrainedModel | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> SourceModel:  # fmt: skip
        """Go on from a bank's entry.

        Args:
            folder: the entry's, which `save_pretrained` or `pemt source` wrote.
            base, tokenizer: as of `source_model`; default: the entry's base model.

        Raises:
            BankError, StorageError: it is no entry, is damaged, was made for another base model, or its ranks differ.
            BaseModelError, TokenizerError: base model or tokenizer cannot be loaded.
        """
        manifest, source = read_entry(folder)
        name, model, reader = _loaded(base or str(manifest.base["name"]), tokenizer)
        shape = base_shape(model.config)
        source.check(shape)
        expert = _expert_of(source, folder, shape)
        pemt = PemtT5.source(model, expert=expert, prompt_PD=source.prompt_PD)
        if source.base_sha256 not in (None, pemt.base_sha256):
            raise BankError(f"{folder}: was trained on other weights than those of {name}")
        pemt.load_expert(source)
        description = manifest.description or ""
        return cls(pemt, base_name=name, tokenizer=reader, description=description, task=None)


def _expert_of(source: ExpertSource, folder: str | Path, shape: Mapping[str, Any]) -> ExpertConfig:
    """What the expert of an entry was made with."""
    if source.kind == "bottleneck":
        return ExpertConfig(
            kind="bottleneck", reduction_factor=max(1, shape["d_ff"] // source.rank)
        )
    sites = site_names(source.weights)
    ranks = {len(source.weights[f"{site}.down"]) for site in sites}
    if ranks != {source.rank}:
        raise BankError(
            f"{folder}: has the ranks {', '.join(map(str, sorted(ranks)))} on its layers; "
            "only an expert of one rank can be trained further"
        )
    modules = [Site.from_name(site, shape).module for site in sites]
    return ExpertConfig(rank=source.rank, alpha=source.alpha, target_modules=modules)


# In tokens, for whoever asks what was saved without a task.
_LONGEST_SOURCE, _LONGEST_ANSWER = 512, 256


def target_model(
    base: str | Path | PreTrainedModel,
    bank: str | Path | Sequence[ExpertSource] | None,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    task: str | Task | None = None,
    description: str | None = None,
    source_tasks: Sequence[str] | None = None,
    mixture: MixtureConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> TargetModel:
    """Stage 2's model over a bank of frozen experts, for `transformers.Seq2SeqTrainer` or a loop of one's own.

    New parameters are random: seed them (`transformers.set_seed`) beforehand.

    Args:
        base: hub id or folder of a T5, mT5, UMT5 or T5Gemma; or a model, which is changed in place.
        bank: the bank's folder, or experts; None for target adapter, prompt and layer norms without experts.
        tokenizer: default: the base model's. Beside a model it must be given.
        task: a name in the task table, or a task: its description starts the prompt, and what is saved has its labels.
        description: one sentence whose tokens' embeddings start the prompt; default: the task's.
        source_tasks: which of the bank's entries, in this order, by name or pattern; default: all, by name.
        mixture, adapter: as in `AdaptConfig`.

    Raises:
        PemtError: base, tokenizer, bank or task cannot be had, or do not go together.
    """
    mixture, adapter = mixture or MixtureConfig(), adapter or AdapterConfig()
    name, model, reader = _loaded(base, tokenizer)
    chosen, sentence = _described(task, description)
    experts: Sequence[ExpertSource] = []
    if isinstance(bank, str | Path):
        experts = read_bank(
            bank, base_name=name, base_shape=base_shape(model.config), tasks=source_tasks
        )
    elif bank is not None:
        experts = list(bank)
    prompt_PD = description_prompt(reader, model, sentence)
    experts, _ = top_sources(prompt_PD, experts, mixture.top_sources)
    pemt = PemtT5.target(
        model, sources=experts, mixture=mixture, adapter=adapter, prompt_PD=prompt_PD
    )
    return TargetModel(
        pemt, experts=experts, adapter=adapter, base_name=name, tokenizer=reader,
        description=sentence, task=chosen,
    )  # fmt: skip


def source_model(
    base: str | Path | PreTrainedModel,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    task: str | Task | None = None,
    description: str | None = None,
    expert: ExpertConfig | None = None,
) -> SourceModel:
    """Stage 1's model: an expert on some layers, and a task prompt; `save_pretrained("BANK/TASK")` puts it into a bank.

    Args:
        base, tokenizer, task, description: as of `target_model`.
        expert: its kind, place and size; default: as published, on every FFN.

    Raises:
        PemtError: base, tokenizer or task cannot be had.
    """
    name, model, reader = _loaded(base, tokenizer)
    chosen, sentence = _described(task, description)
    pemt = PemtT5.source(
        model,
        expert=expert or ExpertConfig(),
        prompt_PD=description_prompt(reader, model, sentence),
    )
    return SourceModel(pemt, base_name=name, tokenizer=reader, description=sentence, task=chosen)


def _loaded(
    base: str | Path | PreTrainedModel, tokenizer: str | PreTrainedTokenizerBase | None
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model's name, itself and its tokenizer."""
    if isinstance(base, PreTrainedModel):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise PemtError("tokenizer: give the base model's own beside a model that is loaded")
        return str(base.config.name_or_path), base, tokenizer
    name = str(Path(base).expanduser()) if isinstance(base, Path) or Path(base).is_dir() else base
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return name, load_pretrained(name, name)[0], tokenizer
    model, reader = load_pretrained(name, tokenizer or name)
    return name, model, reader


def _described(task: str | Task | None, description: str | None) -> tuple[Task | None, str]:
    chosen = get_task(task) if isinstance(task, str) else task
    sentence = description or (chosen.description if chosen else None)
    if sentence is None:
        raise PemtError(
            "description: missing; give one sentence about the task (it starts the prompt), or the task"
        )
    return chosen, sentence


def _other_name(tokenizer: PreTrainedTokenizerBase, base_name: str) -> str | None:
    name = str(tokenizer.name_or_path)
    return None if name in ("", base_name) else name
