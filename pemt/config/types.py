"""What a field may hold, where Python makes a configuration: YAML and command line are read by types already."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from pemt.config.errors import ConfigError

T = TypeVar("T", bound=type)


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a field of another type than it is declared with, sections' fields too.

    An int is a float; a boolean is neither. A path object becomes a text, a tuple a list, in place.

    Raises:
        ConfigError: in the command line's words: `learning_rate: found `'1e-3'`, expected float`.
    """
    hints = typing.get_type_hints(type(config))
    for each in fields(config):
        value, hint = getattr(config, each.name), hints[each.name]
        plain = _as_yaml(value, hint)
        if plain is not value:
            object.__setattr__(config, each.name, plain)
        if not _is(plain, hint):
            wanted = _allowed_text(hint)
            if "list" in wanted:
                wanted += ", written like [a,b]"
            raise ConfigError(f"{prefix}{each.name}: found `{plain!r}`, expected {wanted}")
        if is_dataclass(plain):
            check_types(plain, f"{prefix}{each.name}.")


def check_finite(config: Any, prefix: str = "") -> None:
    """YAML knows `.inf` and `.nan`, which no comparison with a bound finds.

    Raises:
        ConfigError: a field is one of them.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            check_finite(value, f"{each.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{each.name}: found {value}, a finite number is needed")


def inherits_docs(kind: T) -> T:
    """A class decorator: the fields that a dataclass inherits stand in its docstring behind its own."""
    parent = next(each for each in kind.__mro__[1:] if is_dataclass(each))
    *_, theirs = (parent.__doc__ or "").partition("    Args:\n")
    kind.__doc__ = f"{(kind.__doc__ or '').rstrip()}\n{theirs}"
    return kind


def _as_yaml(value: Any, hint: Any) -> Any:
    """A path as text, and a tuple as a list, where these are wanted."""
    if isinstance(value, os.PathLike) and str in _choices(hint):
        return os.fspath(value)
    if isinstance(value, tuple) and any(typing.get_origin(each) is list for each in _choices(hint)):
        return list(value)
    return value


def _choices(hint: Any) -> Sequence[Any]:
    """What a union is made of; of any other type, itself."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _is(value: Any, hint: Any) -> bool:
    return any(_is_one(value, each) for each in _choices(hint))


def _is_one(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_is(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is(key, arguments[0]) and _is(each, arguments[1]) for key, each in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _allowed_text(hint: Any) -> str:
    """A type as the command line's errors have it."""
    if len(_choices(hint)) > 1:
        return f"[{', '.join(map(_allowed_text, _choices(hint)))}]"
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(hint)))}]"
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "")
