"""What a field may hold, where Python makes a configuration: YAML and command line are read by types already."""

from __future__ import annotations

import math
import os
import types
import typing
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union

from pemt.config.errors import ConfigError

T = TypeVar("T", bound=type)


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a field of another type than it is declared with, sections' fields too.

    An int is a float; a boolean is neither. A path object becomes a text, a tuple a list, in place.

    Raises:
        ConfigError: `learning_rate: found `'1e-3'`, expected float`; or a number is YAML's
            `.inf` or `.nan`, which no comparison with a bound finds.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, os.PathLike | tuple):
            value = os.fspath(value) if isinstance(value, os.PathLike) else list(value)
            object.__setattr__(config, name, value)
        if not _is(value, hint):
            raise ConfigError(f"{prefix}{name}: found `{value!r}`, expected {expected(hint)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{name}: found {value}, a finite number is needed")
        if is_dataclass(value):
            check_types(value, f"{prefix}{name}.")


def inherits_docs(kind: T) -> T:
    """A class decorator: the fields that a dataclass inherits stand in its docstring behind its own."""
    parent = next(each for each in kind.__mro__[1:] if is_dataclass(each))
    *_, theirs = (parent.__doc__ or "").partition("    Args:\n")
    kind.__doc__ = f"{(kind.__doc__ or '').rstrip()}\n{theirs}"
    return kind


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _is(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return any(_is(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(key, arguments[0]) for key in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def expected(hint: Any) -> str:
    """What a field of this type may hold, for errors."""
    text = _type_text(hint)
    return f"{text}, written like [a,b]" if "list" in text else text


def _type_text(hint: Any) -> str:
    if _is_union(hint):
        return f"[{', '.join(map(_type_text, typing.get_args(hint)))}]"
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, typing.get_args(hint)))}]"
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "")
