"""What makes the examples' cache another one: what the code does, not how it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pemt.data import encoding as encoding_module, examples as examples_module
from pemt.tasks import task as task_module

CODE = (
    '"""Says."""\n\nLIMIT = 3\n\n\ndef cut(text):  # why\n    """How."""\n    return text[:LIMIT]\n'
)
SAME_CODE = 'LIMIT = 3\ndef cut(\n    text,\n):\n    """How else."""\n    # because\n    return (text[:LIMIT])\n'


def test_a_comment_a_docstring_and_layout_make_no_other_cache() -> None:
    program_of = examples_module.program_of
    assert program_of(CODE) == program_of(SAME_CODE)
    assert program_of(CODE) != program_of(CODE.replace("= 3", "= 4"))
    assert program_of(CODE) != program_of(CODE.replace("[:LIMIT]", "[LIMIT:]"))
    assert program_of('"""Only a docstring."""') == program_of("")


def test_the_cache_knows_both_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(examples_module, "program_of", lambda text: seen.append(text) or text)
    assert len(examples_module.source_hash.__wrapped__()) == 64
    for module in (examples_module, encoding_module, task_module):
        assert Path(module.__file__).read_text() in seen
