"""`python -m tests.parity FILE.safetensors ...`: our numbers against those of the published code.

Exits 1 where an error exceeds 2e-5 of the tensor's largest value, or the sets of trained parameters differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.golden import Golden, GoldenModel, build

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Difference:
    """The largest error of one tensor, relative to the published tensor's largest value."""

    name: str
    error: float

    @property
    def fails(self) -> bool:
        return not self.error <= TOLERANCE  # a NaN fails too


def difference(name: str, ours: Tensor | None, published: Tensor) -> Difference:
    if ours is None or ours.shape != published.shape:
        return Difference(f"{name} (missing or of another shape)", float("inf"))
    scale = published.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return Difference(name, ((ours.detach() - published).abs().max() / scale).item())


def compare_outputs(
    golden: Golden, stage: str, built: GoldenModel
) -> tuple[list[Difference], Tensor]:
    """Differences of every output, and our loss."""
    out = built.model(**golden.inputs)
    ours = {
        "loss": out.loss,
        "ce_loss": out.ce_loss,
        "logits": out.logits,
        "encoder_last_hidden_state": out.encoder_last_hidden_state,
    }
    if out.gates_LBK is not None:
        ours |= {f"gate.{layer}": gate_BK[:, None] for layer, gate_BK in enumerate(out.gates_LBK)}
    published = golden.under(f"{stage}.out.")
    extra = [
        Difference(f"{name} (not published)", float("inf"))
        for name in ours.keys() - published.keys()
    ]
    return extra + [
        difference(name, ours.get(name), published[name]) for name in published
    ], out.loss


def compare_gradients(
    golden: Golden, stage: str, built: GoldenModel, loss: Tensor
) -> list[Difference]:
    """Differences of every gradient; the two sets of trained parameters must be the same."""
    loss.backward()
    names = {id(parameter): name for name, parameter in built.published.items()}
    ours = {
        names.get(id(parameter), f"ours: {name}"): parameter.grad
        for name, parameter in built.model.trainable_parameters()
    }
    published = golden.under(f"{stage}.grad.")
    extra = [
        Difference(f"{name} (trained by us alone)", float("inf"))
        for name in ours.keys() - published.keys()
    ]
    return extra + [
        difference(f"grad {name}", ours.get(name), published[name]) for name in published
    ]


def compare(golden: Golden, stage: str) -> list[Difference]:
    """Every difference of one stage, outputs first."""
    torch.manual_seed(0)
    built = build(golden, stage)
    outputs, loss = compare_outputs(golden, stage, built)
    return outputs + compare_gradients(golden, stage, built, loss)


def report(path: Path | str) -> bool:
    """Print one line per stage and tensor kind, and every failure; True where all is well."""
    golden = Golden.read(path)
    print(
        f"{path}: experts {golden.config['experts']}, tolerance {TOLERANCE:g} of each tensor's largest value"
    )
    well = bool(golden.stages)
    if not golden.stages:
        print("  no stage found")
    for stage in golden.stages:
        differences = compare(golden, stage)
        kinds: dict[str, list[Difference]] = {}
        for item in differences:
            kinds.setdefault(item.name.split(".")[0].split(" ")[0], []).append(item)
        for kind, items in kinds.items():
            print(
                f"  {stage:18} {kind:26} {max(item.error for item in items):9.2e}  ({len(items)} tensors)"
            )
        for item in differences:
            if item.fails:
                print(f"  {stage:18} FAILS {item.name}: {item.error:.2e}")
        well = well and not any(item.fails for item in differences)
    return well


def main(paths: Sequence[str]) -> int:
    if not paths:
        print("usage: python -m tests.parity FILE.safetensors ...", file=sys.stderr)
        return 2
    results = [report(path) for path in paths]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
