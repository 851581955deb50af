"""Gates by name: `{"encoder/0": {source: weight}}`.

Shapes: L sites (a gate each: the FFNs, the encoder's first), K sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report needs no torch
    from torch import Tensor

STACKS = ("encoder", "decoder")

# Site -> source -> weight.
NamedGates = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class GateNames:
    """What the axes of a gates tensor stand for.

    Args:
        sources: the K sources' names.
        sites: the L places with a gate, as `TrainedT5.gate_sites` names them: `encoder/0` …, `decoder/0` ….
    """

    sources: Sequence[str]
    sites: Sequence[str]

    def named(self, gates_LK: Tensor) -> NamedGates:
        """Each gate under its site and source."""
        rows = zip(self.sites, gates_LK.tolist(), strict=True)
        return {site: dict(zip(self.sources, gates_K, strict=True)) for site, gates_K in rows}

    def scalars(self, gates_LK: Tensor) -> dict[str, float]:
        """`gate/<site>/<source>`, and `gate_mean/<source>` over all sites."""
        named = self.named(gates_LK)
        each = {
            f"gate/{site}/{source}": weight
            for site, weights in named.items()
            for source, weight in weights.items()
        }
        means = mean_by_source(named)
        return each | {f"gate_mean/{source}": weight for source, weight in means.items()}

    def by_stack(self, gates_LK: Tensor, *, dim: int = 0) -> dict[str, Tensor]:
        """Encoder and decoder apart; `dim` is where the sites lie."""
        stacks = [site.partition("/")[0] for site in self.sites]
        sizes = [stacks.count(stack) for stack in STACKS]
        return dict(zip(STACKS, gates_LK.split(sizes, dim=dim), strict=True))


def mean_by_source(gates: NamedGates) -> dict[str, float]:
    """Every source's weight, averaged over the sites that have it."""
    weights: dict[str, list[float]] = {}
    for of_site in gates.values():
        for source, weight in of_site.items():
            weights.setdefault(source, []).append(weight)
    return {source: mean(each) for source, each in weights.items()}


def of_stack(gates: NamedGates, stack: str) -> NamedGates:
    """The gates of one stack alone."""
    return {site: weights for site, weights in gates.items() if site.startswith(f"{stack}/")}


def gates_in(results: Mapping[str, Any]) -> NamedGates:
    """The gates in what all_results.json holds; runs of before 2026-11-28 list them without names.

    Those lists have the encoder's FFNs first, and nothing that tells where they end: half is assumed.
    """
    gates = results.get("gates") or {}
    if isinstance(gates, dict):
        return gates
    half = len(gates) // 2
    sites = [f"{stack}/{layer}" for stack in STACKS for layer in range(half)]
    sites += [f"decoder/{layer}" for layer in range(half, len(gates) - half)]
    rows = zip(sites, gates, strict=True)
    return {site: dict(zip(results["sources"], row, strict=True)) for site, row in rows}
