"""The model card of a bank on the hub: what its experts are, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from pemt.bank import Manifest
from pemt.config import how_to_install
from pemt.model import projections_of
from pemt.publish.card import is_hub_id
from pemt.tasks import without_redundant_mean

COLUMNS = (
    "task",
    "layers",
    "kind",
    "rank",
    "base model",
    "from",
    "licence",
    "test scores, percent",
)
UNKNOWN = "not known"
_INTRODUCTION = """\
Experts for [PEMT](https://arxiv.org/abs/2402.15082): one folder each, with the expert and its task prompt in
`expert.safetensors`, and what is known of it, checksums included, in `manifest.json`. Frozen, they are mixed per input
by gates that are trained on a target task.
"""
_USE = """\
First {install}: on PyPI `pemt` is another program. Then

```
pemt bank pull {repo_id} --bank_dir bank
pemt bank show bank --task_name superglue-cb
pemt adapt --config adapt_hub --task_name superglue-cb --output_dir runs/cb --bank_dir bank
```

The second line ranks the experts for a task by their prompts."""


def bank_card(
    entries: Mapping[str, Manifest],
    repo_id: str,
    *,
    base_model: str,
    licence: str | None,
) -> str:
    """The README.md, with the hub's front matter; `licence` is that of entries which their publisher has trained."""
    rows = [_row(manifest, base_model, licence) for manifest in entries.values()]
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    lines = (f"| {' | '.join(_cell(each) for each in row)} |" for row in table)
    licences = {row[COLUMNS.index("licence")] for row in rows}
    front: dict[str, Any] = {
        "library_name": "pemt",
        "license": licences.pop() if len(licences) == 1 and UNKNOWN not in licences else None,
        "base_model": base_model if is_hub_id(base_model) else None,
        "tags": ["pemt", "t5", "lora", "expert-bank", "text2text-generation"],
    }
    parts = [
        f"---\n{ModelCardData(**front).to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}: {len(rows)} experts for {_cell(base_model)}",
        _INTRODUCTION.strip(),
        "\n".join(lines),
        f"## Use\n\n{_USE.format(install=how_to_install(), repo_id=repo_id)}",
        "## Licence\n\nThe licence in a row is that of the adapter the expert was made of, as its own card tells it, "
        "or for an expert without such an adapter its publisher's word. The base model's licence also binds what was "
        f"trained on it. Where it is {UNKNOWN}, look it up before you pass the expert on.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(manifest: Manifest, base_model: str, licence: str | None) -> tuple[str, ...]:
    scores = (
        f"{name} {value:.1f}" for name, value in without_redundant_mean(manifest.metrics).items()
    )
    own = licence if manifest.origin is None else None
    return (
        manifest.task,
        projections_of(manifest.sites),
        manifest.kind,
        str(manifest.rank),
        base_model,
        manifest.origin or "trained or given by the publisher",
        manifest.licence or own or UNKNOWN,
        ", ".join(scores) or "none",
    )


def _cell(text: str) -> str:
    """Text of others in a table: on one line, no column of its own, no markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{each}" if each in "\\|`*<>[]" else each for each in plain)
