"""`pemt adapt --help`: every field once, in its group, the published recipe's first, within 80 columns."""

from __future__ import annotations

import re

import pytest

from pemt.commands import COMMANDS
from pemt.config import field_keys
from pemt.config.help import GROUPS, REST, grouped
from pemt.config.parse import is_section, read_recipe
from pemt.config.schema import AdaptConfig, RunConfig, SourceConfig

STAGES = {"adapt": AdaptConfig, "source": SourceConfig}


def shown(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        COMMANDS[name](["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", STAGES)
def test_every_field_is_shown_once_in_its_group(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(name, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    parts = dict(re.findall(r"^([a-z ,]+):\n(.*?)(?=^\S|\Z)", text, re.M | re.S))
    assert list(parts)[1:] == [*GROUPS, REST, "example"]  # behind --config itself
    keys = field_keys(STAGES[name])
    fields = [key for key in keys if not is_section(key, keys)]
    flags = re.findall(r"^  --([\w.]+) ", text, re.M)
    assert sorted(flags) == sorted([*fields, "config"])
    for title in (*GROUPS, REST):
        in_group = re.findall(r"^  --([\w.]+) ", parts[title], re.M)
        required = [key for key in in_group if about(text, key).endswith("required)")]
        recipe = [key for key in in_group if "(recipe: " in about(text, key)]
        first = list(dict.fromkeys([*required, *recipe]))
        assert in_group[: len(first)] == first, title


def about(text: str, key: str) -> str:
    """What is said of a field."""
    (found,) = re.findall(rf"^  --{re.escape(key)} .*?(?=^  --|^\S|\Z)", text, re.M | re.S)
    return " ".join(found.split())


@pytest.mark.parametrize("name", STAGES)
def test_the_recipes_values_stand_beside_the_defaults(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(name, capsys, monkeypatch)
    recipe = read_recipe(name)
    for key, value in recipe.items():
        if not isinstance(value, dict):
            assert f"(recipe: {value}, " in about(text, key), key
    assert text.count("(recipe: ") >= len(recipe)


def test_no_field_of_both_stages_is_left_over() -> None:
    """A new field of RunConfig belongs into a group."""
    shared = set(field_keys(RunConfig))
    assert [field.key for field in grouped(AdaptConfig)[REST] if field.key in shared] == []
    assert {key for keys in GROUPS.values() for key in keys} == shared
