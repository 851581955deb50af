"""JSON files whose top level is an object; what they lack is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pemt.config.errors import PemtError


def read_json_object(
    path: Path, refused: type[PemtError] = PemtError, *, missing: str | None = None
) -> dict[str, Any]:
    """What a JSON file holds.

    Args:
        path: the file.
        refused: the kind of the errors.
        missing: what to say where there is no such file.

    Raises:
        PemtError: of the kind `refused`: unreadable, malformed, a key given twice, or no object at the top level.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refused(f"{path}: duplicate key `{key}`; keep one")
            found[key] = value
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise refused(f"{path}, line {error.lineno}: malformed JSON: {error.msg}") from None
    except PemtError:
        raise
    except FileNotFoundError:
        raise refused(missing or f"{path}: cannot be read: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, or too many digits
        raise refused(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise refused(
            f"{path}: found {type(content).__name__} at the top level, expected an object"
        )
    return content
