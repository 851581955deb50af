"""Every output and gradient of a stage, ours against the published ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .golden import Golden, GoldenModel, build, expert_orders

TOLERANCE = 2e-5  # of each tensor's largest value


@dataclass(frozen=True)
class Difference:
    """The largest error of one tensor, relative to the published tensor's largest value."""

    name: str
    error: float

    @property
    def kind(self) -> str:
        """What one line of the report sums up: `gate.3` is a gate, `grad.…` a gradient."""
        return self.name.split(".")[0]

    @property
    def fails(self) -> bool:
        return not self.error <= TOLERANCE  # a NaN fails too


def compare(golden: Golden, stage: str) -> list[Difference]:
    """Every difference of one stage, outputs first.

    A file does not tell the order of its bottleneck experts; the first order that gives the
    published outputs is taken, and the first of all where none does.
    """
    tried = []
    for order in expert_orders(golden, stage):
        built = build(golden, stage, order)
        outputs, loss = compare_outputs(golden, stage, built)
        tried.append((built, outputs, loss))
        if not any(item.fails for item in outputs):
            break
        del tried[1:]
    built, outputs, loss = tried[-1]
    return outputs + compare_gradients(golden, stage, built, loss)


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
    if out.gates_BLK is not None:
        ours |= {
            f"gate.{i}": gates_BK[:, None] for i, gates_BK in enumerate(out.gates_BLK.unbind(dim=1))
        }
    return _differences(ours, golden.under(f"{stage}.out.")), out.loss


def compare_gradients(
    golden: Golden, stage: str, built: GoldenModel, loss: Tensor
) -> list[Difference]:
    """Differences of every gradient; a parameter that only one side trains fails."""
    loss.backward()
    names = {id(parameter): name for name, parameter in built.published.items()}
    ours = {
        f"grad.{names.get(id(parameter), name)}": parameter.grad
        for name, parameter in built.model.trainable_parameters()
    }
    published = golden.under(f"{stage}.grad.")
    return _differences(ours, {f"grad.{name}": value for name, value in published.items()})


def report(path: str | Path) -> bool:
    """Print the largest error of each kind of tensor, and every failure; True where none fails."""
    golden = Golden.read(path)
    print(f"{path}: K = {golden.config['experts']}, largest errors (at most {TOLERANCE:g}):")
    well = True
    for stage in golden.stages:
        kinds: dict[str, list[Difference]] = defaultdict(list)
        for item in compare(golden, stage):
            kinds[item.kind].append(item)
        for kind, items in kinds.items():
            worst = max(items, key=lambda item: (item.fails, item.error))
            print(f"  {stage:18} {kind:26} {worst.error:9.2e}  of {len(items)}")
            for item in items:
                if item.fails:
                    print(f"  {stage:18} FAILS {item.name}: {item.error:.2e}")
                    well = False
    return well


def _differences(ours: dict[str, Tensor | None], published: dict[str, Tensor]) -> list[Difference]:
    names = [*published, *sorted(ours.keys() - published.keys())]
    return [Difference(name, _error(ours.get(name), published.get(name))) for name in names]


def _error(ours: Tensor | None, published: Tensor | None) -> float:
    """Infinite where one side lacks the tensor."""
    if ours is None or published is None or ours.shape != published.shape:
        return float("inf")
    scale = published.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours.detach() - published).abs().max() / scale).item()
