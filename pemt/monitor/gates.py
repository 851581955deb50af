"""Gates by name: `{"encoder/0": {source: weight}}`, or `encoder/0/self/q` where experts are on other layers than FFNs.

Shapes: L sites (a gate each, the encoder's first), K sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report needs no torch
    from torch import Tensor

STACKS = ("encoder", "decoder")
MOST_TAGS = 1000  # weights of single sites that a line of the log holds

# Site -> source -> weight.
NamedGates = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class GateNames:
    """What the axes of a gates tensor stand for.

    Args:
        sources: the K sources' names.
        sites: the L places with a gate, and the sources that each weighs: see `TrainedT5.gate_sites`. A gates tensor is
            0 for the others.
    """

    sources: Sequence[str]
    sites: Mapping[str, Sequence[str]]

    def is_in(self, source: str, stack: str) -> bool:
        """Whether a source has an expert in the encoder or the decoder."""
        sites = self.sites.items()
        return any(source in present for site, present in sites if site.startswith(f"{stack}/"))

    def by_site(self, gates_LK: Tensor) -> NamedGates:
        """Each gate under its site and source; a source that has no expert at a site is not there."""
        found = {}
        for (site, present), gates_K in zip(self.sites.items(), gates_LK.tolist(), strict=True):
            weights = zip(self.sources, gates_K, strict=True)
            found[site] = {source: weight for source, weight in weights if source in present}
        return found

    def over_sites(self, gates_NLK: Tensor) -> Tensor:
        """Each source's weight [..., K], averaged over the sites that have it."""
        counts = [sum(name in present for present in self.sites.values()) for name in self.sources]
        return gates_NLK.sum(dim=-2) / gates_NLK.new_tensor(counts)

    @property
    def weights(self) -> int:
        """How many there are: of every site, one for each source on it."""
        return sum(map(len, self.sites.values()))

    def scalars(self, gates_LK: Tensor) -> dict[str, float]:
        """`gate/<site>/<source>`, of more than MOST_TAGS each layer's mean; and `gate_mean/<source>` over all sites."""
        found = self.by_site(gates_LK)
        logged = by_layer(found) if self.weights > MOST_TAGS else found
        each = {
            f"gate/{site}/{source}": weight
            for site, weights in logged.items()
            for source, weight in weights.items()
        }
        means = mean_by_source(found)
        return each | {f"gate_mean/{source}": weight for source, weight in means.items()}

    def by_stack(self, gates_LK: Tensor, *, dim: int = 0) -> dict[str, Tensor]:
        """Encoder and decoder apart, where they have gates; `dim` is where the sites lie."""
        stacks = [site.partition("/")[0] for site in self.sites]
        sizes = [stacks.count(stack) for stack in STACKS]
        parts = zip(STACKS, gates_LK.split(sizes, dim=dim), strict=True)
        return {stack: part for stack, part in parts if part.shape[dim]}


def mean_by_source(gates: NamedGates) -> dict[str, float]:
    """Every source's weight, averaged over the sites that have it."""
    weights: dict[str, list[float]] = {}
    for of_site in gates.values():
        for source, weight in of_site.items():
            weights.setdefault(source, []).append(weight)
    return {source: mean(each) for source, each in weights.items()}


def by_layer(gates: NamedGates) -> NamedGates:
    """The gates of each layer's sites as one, `{"encoder/0": …}`, each source's averaged over those that have it."""
    layers: dict[str, NamedGates] = {}
    for site, weights in gates.items():
        layers.setdefault("/".join(site.split("/")[:2]), {})[site] = weights
    return {layer: mean_by_source(of_layer) for layer, of_layer in layers.items()}


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
