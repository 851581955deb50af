"""JSON from others, held against a dataclass: every value of the right kind and in its range."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

# Wide enough for every model, and nothing made of such numbers overflows, or becomes zero and divides.
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Positive = Annotated[float, Field(gt=1e-30, lt=1e30)]

Kind = TypeVar("Kind")


def checked(kind: type[Kind], found: dict[str, Any]) -> Kind:
    """An instance of a dataclass from a JSON object; keys that it does not know are passed over.

    Raises:
        ValueError: the first value that is missing, of another type (nothing is converted), or out of
            range: `key: missing` or `key: found this, it should be that`.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the object"
        if first["type"] == "missing":
            raise ValueError(f"{key}: missing") from None
        shown = json.dumps(first["input"])[:80]
        raise ValueError(
            f"{key}: found {shown}, it {first['msg'].removeprefix('Input ')}"
        ) from None
