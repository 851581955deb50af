"""YAML as people write it: plain values alone, no key twice, no few lines that unfold into millions."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

# Aliases may refer to aliases: nine lines can stand for a billion values. Ours have a few hundred.
MOST_VALUES = 100_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a person meant one of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key `{key}`", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        yaml.YAMLError: malformed, a key given twice, a tag that would make an object, or too much of it.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
        size = _unfolded(value, {}, ())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # what PyYAML lets through from a date of month 13, or a mapping as a key
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    if size > MOST_VALUES:
        raise yaml.YAMLError(f"unfolds into more than {MOST_VALUES:,} values")
    return value


def _unfolded(value: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values it stands for, counted without unfolding it."""
    if isinstance(value, str | bytes):
        return 1 + len(value) // 100
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) in above:
        raise ValueError("it contains itself")
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        inner = (*above, id(value))
        known[id(value)] = 1 + sum(_unfolded(part, known, inner) for part in parts)
    return known[id(value)]
