"""The model card of a published run: what it is, what it scored, how it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pemt.config import PEFT_METHODS, AdaptConfig, how_to_install
from pemt.monitor import NamedGates, gates_in, mean_by_source
from pemt.run import checkpoint_line, split_line
from pemt.storage import HubError, licence_in, local_folder
from pemt.tasks import Task, without_redundant_mean

GATES = "gates.png"
_PAPER = "[PEMT](https://arxiv.org/abs/2402.15082)"
_WHAT = {
    "pemt": f"{_PAPER}: frozen experts of other tasks, weighed per input by gates, with a target adapter "
    "and prompt",
    "adapter": f"the target adapter, prompt and layer norms of {_PAPER}, without experts",
    "bitfit": "BitFit: trained biases, put into every linear layer and layer norm",
    "full": "full fine-tuning",
}
_OWN = """\
from pemt import PemtModel
model = PemtModel.from_pretrained({here!r})
print(model.generate([{text!r}]))"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, GenerationConfig
base = AutoModelForSeq2SeqLM.from_pretrained({base!r})
base.generation_config = GenerationConfig.from_pretrained({here!r})  # as it was scored
model = PeftModel.from_pretrained(base, {here!r})"""
_FULL = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained({here!r})
tokenizer = AutoTokenizer.from_pretrained({here!r})"""
_HERE = "path/to/this/folder"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card is made of.

    Args:
        base_model: hub id or folder.
        model_type: its family, as its config.json has it.
        licence: the base model's, as the hub spells it; None where it is not known.
        results: `all_results.json`; empty where the run was not scored.
        config, task: of the run.
        dtype: of the tensors.
        bytes: size of the files.
    """

    base_model: str
    model_type: str
    licence: str | None
    results: dict[str, Any]
    config: AdaptConfig
    task: Task
    dtype: str
    bytes: int

    @property
    def gates(self) -> NamedGates:
        """Mean gates over the test set; empty without experts."""
        return gates_in(self.results)

    @property
    def metrics(self) -> dict[str, float]:
        """Test metrics in percent."""
        names = (*self.task.metrics, "average_metrics")
        found = (name for name in names if f"test_{name}" in self.results)
        return without_redundant_mean({name: self.results[f"test_{name}"] for name in found})

    @property
    def has_origin(self) -> bool:
        """Whether the results say what was scored; those of older runs do not."""
        return "split_origin" in self.results


def model_card(card: Card) -> str:
    """The README.md, with the hub's front matter."""
    name = card.base_model.rstrip("/").rsplit("/", maxsplit=1)[-1]
    what = _WHAT.get(card.config.method, f"`{card.config.method}` of the peft library")
    parts = [
        f"---\n{_front_matter(card, name).to_yaml()}\n---",
        f"# {name}, adapted to {card.task.name}",
        f"`{card.base_model}` adapted to the task `{card.task.name}`: {card.task.description}\n"
        f"Method: {what}.",
        _use(card),
        _scores(card),
        *([_experts(card)] if card.gates else []),
        _training(card),
        _licence(card),
    ]
    return "\n\n".join(parts) + "\n"


def base_licence(base_model: str) -> str | None:
    """The licence that a base model's own card names; None where there is no card, or no word of it."""
    try:
        return licence_in(local_folder(base_model, files=("README.md",)))
    except HubError:
        return None


def _front_matter(card: Card, name: str) -> ModelCardData:
    hub = card.task.hub
    method = card.config.method
    own = "transformers" if method == "full" else "pemt"
    results = [
        EvalResult(
            task_type="text2text-generation",
            dataset_type=hub.path if hub else card.task.name,
            dataset_name=card.task.name,
            dataset_config=hub.config if hub else None,
            **_scored(card),
            metric_type=metric,
            metric_value=round(value, 2),
        )
        for metric, value in card.metrics.items()
        if metric != "average_metrics"
    ]
    return ModelCardData(
        library_name="peft" if method in PEFT_METHODS else own,
        license=card.licence,
        base_model=card.base_model if is_hub_id(card.base_model) else None,
        datasets=[hub.path] if hub else None,
        metrics=list(card.task.metrics),
        tags=["pemt", card.model_type, "text2text-generation", method],
        model_name=f"{name}-{card.task.name}" if results else None,
        eval_results=results or None,
    )


def _scored(card: Card) -> dict[str, Any]:
    """What was scored, as fields of an `EvalResult`: the official split, and what was taken of it."""
    if not card.has_origin:
        return {}
    official = re.search(r"official (\w+) set", card.results["split_origin"])
    taken = {name: card.results[name] for name in ("split", "examples", "split_origin")}
    return {"dataset_split": official[1] if official else None, "dataset_args": taken}


def _use(card: Card) -> str:
    method = card.config.method
    lines = _FULL if method == "full" else _PEFT if method in PEFT_METHODS else _OWN
    code = lines.format(here=_HERE, base=card.base_model, text=card.task.template)
    own = (
        f"First {how_to_install()}: on PyPI `pemt` is another program. The path is this folder, or its id on "
        "the hub.\n\n"
    )
    asked = f"An input is `{card.task.template}` with the fields filled in"
    if card.task.labels:
        named = card.task.name_of_label.items()
        shown = (
            f"`{label}` ({name})" if card.task.label_names else f"`{label}`"
            for label, name in named
        )
        asked += f"; the answers are {', '.join(shown)}"
    return f"## Use\n\n{own if lines is _OWN else ''}```python\n{code}\n```\n\n{asked}."


def _scores(card: Card) -> str:
    if not card.metrics:
        return "## Scores\n\nThe run was not scored."
    rows = [f"| {name} | {value:.2f} |" for name, value in card.metrics.items()]
    intro = (
        f"{split_line(card.results)}; in percent."
        if card.has_origin
        else "On the test split, in percent."
    )
    return "\n".join(["## Scores", "", intro, "", "| metric | score |",
                      "|---|---|", *rows])  # fmt: skip


def _experts(card: Card) -> str:
    means = mean_by_source(card.gates)
    rows = [f"| {name} | {mean:.3f} |" for name, mean in means.items()]
    return "\n".join(
        ["## Experts", "",
         "The mean gate weight of each source task, over all test inputs and the layers that it has an expert on.",
         "", "| source | mean gate |", "|---|---|", *rows, "",
         f"![Mean gate of every source and layer]({GATES})"]
    )  # fmt: skip


def _training(card: Card) -> str:
    config = card.config
    few = f", {config.few_shot} examples per class" if config.few_shot else ""
    steps = (
        f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs} epochs"
    )
    chosen = (
        checkpoint_line(card.results) if card.has_origin else "The best checkpoint on validation"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"## Training\n\nUp to {steps}{few}; AdamW, learning rate {config.learning_rate:g}, "
        f"{config.per_device_train_batch_size} × {config.gradient_accumulation_steps} examples a rank and step, "
        f"inputs of up to {config.max_source_length} tokens, seed {config.seed}. "
        f"{chosen[0].upper()}{chosen[1:]}. Written with {versions}; {card.bytes / 2**20:.1f} MiB in {card.dtype}."
    )


def _licence(card: Card) -> str:
    intro = (
        f"It is `{card.licence}`."
        if card.licence
        else "It is not known here: look it up before you pass this on."
    )
    return f"## Licence\n\nThe base model's licence also binds what was trained on it. {intro}"


def is_hub_id(name: str) -> bool:
    """Whether it names a repository of the hub and no folder of this machine."""
    if Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
