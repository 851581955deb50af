"""Reads what the published PEMT code saves of a source task: `lora.pt` or `adapter.pt`, and
`task_embedding.pt`. They are pickles: only plain tensors are taken from them, no code is run.

Shapes: P prompt tokens, D d_model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from pemt.bank.manifests import BankError
from pemt.bank.pickles import load_pickle, tensors_of
from pemt.model import ExpertSource

FILES: dict[Literal["lora", "bottleneck"], str] = {"lora": "lora.pt", "bottleneck": "adapter.pt"}
PROMPT_FILE = "task_embedding.pt"
_FFN = r"(?P<stack>encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.[12]\.DenseReluDense\."
_KEYS = {
    "lora": re.compile(_FFN + r"wo\.lora_(?P<factor>[AB])$"),
    "bottleneck": re.compile(
        _FFN
        + r"adapter_controller\.adapters\.(?P<task>[^.]+)\."
        + r"(?P<factor>down|up)_sampler\.(?P<part>weight|bias)$"
    ),
}
_LORA = {"A": "down", "B": "up"}


def read_official(
    folder: Path, *, name: str, kind: str | None = None, alpha: float = 64.0
) -> ExpertSource:
    """One source task as the published code left it; for the arguments see `import_official`.

    Raises:
        BankError: a file is missing, would run code, or holds something else.
    """
    chosen = _choose(folder, kind)
    path = folder / FILES[chosen]
    weights = _expert(path, chosen)
    down = weights.get("encoder.0.down", weights.get("encoder.0.down.weight"))
    if down is None or down.dim() != 2:
        raise BankError(f"{path}: has no expert for the first encoder layer's FFN")
    return ExpertSource(
        name=name,
        kind=chosen,
        rank=down.shape[0],
        alpha=alpha,
        weights=weights,
        prompt_PD=_prompt(folder / PROMPT_FILE),
    )


def _choose(folder: Path, kind: str | None) -> Literal["lora", "bottleneck"]:
    there = [key for key, file in FILES.items() if (folder / file).is_file()]
    if kind is not None:
        there = [key for key in there if key == kind]
    if len(there) == 1:
        return there[0]
    if there:
        names = " and ".join(FILES.values())
        raise BankError(f"{folder}: holds both {names}; choose with kind lora or bottleneck")
    wanted = f" of kind {kind}" if kind is not None else ""
    raise BankError(f"{folder}: holds no expert{wanted}; needed is {' or '.join(FILES.values())}")


def _expert(path: Path, kind: Literal["lora", "bottleneck"]) -> dict[str, Tensor]:
    saved = load_pickle(path)
    if not isinstance(saved, Mapping):
        raise BankError(f"{path}: found a {type(saved).__name__}, needed is a dict of tensors")
    weights: dict[str, Tensor] = {}
    tasks = set()
    for key, value in saved.items():
        match = _KEYS[kind].search(str(key))
        if match is None or not isinstance(value, Tensor):
            raise BankError(f"{path}: `{key}` is no part of a {kind} expert on an FFN's output")
        site = f"{match['stack']}.{match['layer']}"
        if kind == "lora":
            ours = f"{site}.{_LORA[match['factor']]}"
        else:
            ours = f"{site}.{match['factor']}.{match['part']}"
            tasks.add(match["task"])
        weights[ours] = value.detach().float()
    if len(tasks) > 1:
        raise BankError(
            f"{path}: holds experts of {len(tasks)} tasks; needed is one: {sorted(tasks)}"
        )
    return weights


def _prompt(path: Path) -> Tensor:
    """The prompt [P,D]: the file's tensor, or the only one in its dict."""
    saved = load_pickle(path)
    tensors = tensors_of(saved)
    if len(tensors) != 1 or tensors[0].dim() != 2:
        found = [list(tensor.shape) for tensor in tensors]
        raise BankError(f"{path}: found tensors {found}, needed is one prompt [tokens, d_model]")
    return tensors[0].detach().float()
