"""Gates by name, `{"encoder/0": {source: weight}}`, and how decided they are.

Shapes: N examples, L sites (a gate each: the FFNs, the encoder's first), K sources, M = 1 + K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report reads gates without torch
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
        return _named(self.sites, self.sources, gates_LK.tolist())

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

    def decisions(self, gates_NLK: Tensor, similarity_MM: Tensor) -> dict[str, float]:
        """`gate_entropy/<encoder|decoder>`, a mean over examples and layers, and `prompt_similarity/<source>`.

        Args:
            similarity_MM: cosines between the mean prompts of the target, first, and the K sources.
        """
        entropy = self.by_stack(entropy_NL(gates_NLK), dim=1)
        found = {f"gate_entropy/{stack}": float(each.mean()) for stack, each in entropy.items()}
        cosines = zip(self.sources, similarity_MM[0, 1:].tolist(), strict=True)
        return found | {f"prompt_similarity/{source}": cosine for source, cosine in cosines}

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
    return _named(sites, results["sources"], gates)


def _named(
    sites: Sequence[str], sources: Sequence[str], gates_LK: Sequence[Sequence[float]]
) -> NamedGates:
    rows = zip(sites, gates_LK, strict=True)
    return {site: dict(zip(sources, gates_K, strict=True)) for site, gates_K in rows}


def entropy_NL(gates_NLK: Tensor) -> Tensor:
    """Entropy of every example's gates at every FFN [N,L], over its maximum log K.

    0: one source has it all; 1: all weigh the same. With a single source there is nothing to
    decide: 0.
    """
    if gates_NLK.shape[-1] == 1:
        return gates_NLK.new_zeros(gates_NLK.shape[:-1])
    return -gates_NLK.xlogy(gates_NLK).sum(dim=-1) / math.log(gates_NLK.shape[-1])
