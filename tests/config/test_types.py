"""Configurations that Python makes: wrong types in the command line's words, and docs of every field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pemt.config import (
    AdaptConfig,
    ConfigError,
    ExpertConfig,
    PemtError,
    SourceConfig,
    parse_config,
)
from pemt.config.errors import flags_in_messages

NEEDED: dict[str, Any] = {
    "model_name_or_path": "base",
    "output_dir": "run",
    "task_name": "rte",
    "bank_dir": "bank",
}
WRONG = {
    "learning_rate": "fast",
    "seed": "x",
    "per_device_train_batch_size": 1.5,
    "bf16": "maybe",
    "eval_strategy": "epochs",
    "source_tasks": 3,
    "few_shot": "all",
    "streaming": 3,
}


def typed(name: str, value: Any) -> str:
    arguments = [f"--{key}={each}" for key, each in {**NEEDED, name: value}.items()]
    with pytest.raises(ConfigError) as told:
        parse_config(AdaptConfig, arguments, prog="pemt adapt")
    return str(told.value)


@pytest.mark.parametrize("name", WRONG)
def test_the_line_is_the_command_lines(name: str) -> None:
    value = WRONG[name]
    with pytest.raises(ConfigError) as told:
        AdaptConfig(**{**NEEDED, name: value})
    # in Python a text has quotes: `'1e-3'` is none of a number
    assert str(told.value) == typed(name, value).replace(f"`{value}`", f"`{value!r}`")


def test_a_number_in_quotes_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate: found `'1e-3'`, expected float$"):
        AdaptConfig(**NEEDED, learning_rate="1e-3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^expert\.rank: found `'8'`, expected int$"):
        SourceConfig(**NEEDED, expert=ExpertConfig(rank="8"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^seed: found `True`, expected int$"):
        AdaptConfig(**NEEDED, seed=True)
    with pytest.raises(
        ConfigError, match=r"^expert: found `\{'rank': 8\}`, expected ExpertConfig$"
    ):
        SourceConfig(**NEEDED, expert={"rank": 8})  # type: ignore[arg-type]


def test_what_python_writes_otherwise_is_read_all_the_same() -> None:
    config = AdaptConfig(
        **{**NEEDED, "output_dir": Path("run")},  # type: ignore[arg-type]
        source_tasks=("a", "b"),  # type: ignore[arg-type]
        learning_rate=1,
    )
    assert config.output_dir == "run"
    assert config.source_tasks == ["a", "b"]


@pytest.mark.parametrize("kind", [AdaptConfig, SourceConfig])
def test_the_docs_show_every_field(kind: Any) -> None:
    assert kind.__doc__ is not None
    for each in dataclasses.fields(kind):
        assert f"\n        {each.name}: " in kind.__doc__ or f" {each.name}, " in kind.__doc__, (
            each.name
        )


def test_a_message_speaks_to_its_reader() -> None:
    text = "give --overwrite_output_dir true, --validation_split 0.1 or --data_dir; `pemt bank --peft X`"
    python = (
        "give overwrite_output_dir=True, validation_split=0.1 or data_dir; `pemt bank --peft X`"
    )
    assert str(PemtError(text)) == python
    with flags_in_messages():
        assert str(PemtError(text)) == text
    assert str(PemtError(text)) == python
