"""Which value of a field wins: what was typed, then the later file, then the default."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from pemt.config.parse import make_config, parse_config, read_yaml_mapping, value_sources
from pemt.config.schema import AdaptConfig, ConfigError

NEEDED = ["--output_dir", "out", "--task_name", "rte", "--bank_dir", "bank"]


def parsed(*arguments: str) -> AdaptConfig:
    return parse_config(AdaptConfig, [*NEEDED, *arguments], prog="pemt adapt")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 0.5\nseed: 7\nmixture: {prompt_dropout: 0.5}\n")
    return str(path)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_what_was_typed_wins_wherever_it_stands(file: str, order: tuple[int, ...]) -> None:
    parts = [
        ["--config", "adapt"],
        [f"--config={file}"],
        ["--model_name_or_path", "mine"],
        ["--mixture.prompt_dropout=0.25"],
    ]
    config = parsed(*(word for number in order for word in parts[number]))
    assert config.model_name_or_path == "mine"
    assert config.mixture.prompt_dropout == 0.25
    assert config.adapter.reduction_factor == 16
    file_is_later = order.index(1) > order.index(0)
    assert config.seed == (7 if file_is_later else 4096), "of two files the later one wins"


def test_of_one_field_typed_twice_the_later_wins(file: str) -> None:
    assert parsed("--seed", "1", "--config", "adapt", "--seed=2", "--config", file).seed == 2


def test_print_config_tells_where_values_come_from(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without what is required, and as YAML that gives the same again."""
    arguments = ["--bf16=false", "--config", "adapt", "--config", file, "--description", "a: b # c"]
    with pytest.raises(SystemExit) as left:
        parse_config(AdaptConfig, [*arguments, "--print_config"], prog="pemt adapt")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    told = {line.split(":")[0].strip(): line.split("  # ")[-1] for line in printed.splitlines()}
    assert told["bf16"] == told["description"] == "command line"
    assert told["seed"] == told["prompt_dropout"] == file
    assert told["model_name_or_path"].endswith("recipes/adapt.yaml")
    assert told["num_beams"] == "default"
    values = yaml.safe_load(printed)
    assert values["learning_rate"] == 0.5
    assert values["description"] == "a: b # c"
    assert values["mixture"]["prompt_dropout"] == 0.5


def test_sources_of_sections_and_lists(file: str) -> None:
    sources = value_sources(AdaptConfig, ["--source_tasks+=a", "--config", file, *NEEDED])
    assert sources["source_tasks"] == "command line"
    assert sources["mixture.prompt_dropout"] == file
    assert sources["mixture.train_layer_norms"] == "default"


def test_a_config_without_its_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--config: no file behind it; .*adapt"):
        parsed("--config")


def test_each_file_is_read_once(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return read_yaml_mapping(path)

    monkeypatch.setattr("pemt.config.parse.read_yaml_mapping", counted)
    assert parsed("--config", "adapt", "--config", file).seed == 7
    assert [path.stem for path in read] == ["adapt", "run"]


@pytest.mark.parametrize("section", ["3", "[1]", "null"])
def test_a_section_that_holds_no_fields_is_refused(tmp_path: Path, section: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"mixture: {section}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: mixture: found .*, expected `key: value`"):
        parsed("--config", str(path))


def test_values_are_taken_as_they_are_and_win_over_a_recipe() -> None:
    values = {"output_dir": "out", "task_name": "rte", "bank_dir": "bank"}
    given = {**values, "description": "--seed 3", "mixture.prompt_dropout": 0.5}
    config = make_config(AdaptConfig, given, recipe="adapt_few_shot", prog="pemt sweep")
    assert config.description == "--seed 3"
    assert config.mixture.prompt_dropout == 0.5
    assert config.few_shot == 16
    with pytest.raises(ConfigError, match=r"^learning_rate: found `fast`, expected float"):
        make_config(AdaptConfig, {**given, "learning_rate": "fast"}, prog="pemt sweep")
    for section in (None, 3, [1]):
        with pytest.raises(ConfigError, match=r"^mixture: found .*, expected `key: value` lines"):
            make_config(AdaptConfig, {**given, "mixture": section}, prog="pemt sweep")
