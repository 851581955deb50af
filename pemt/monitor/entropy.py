"""How decided gates are, and how alike prompts.

Shapes: N examples, L sites, K sources, M = 1 + K prompts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pemt.monitor.gates import GateNames


def mixture_scalars(names: GateNames, gates_NLK: Tensor, similarity_MM: Tensor) -> dict[str, float]:
    """`gate_entropy/<encoder|decoder>`, a mean over examples and sites, and `prompt_similarity/<source>`."""
    entropy = names.by_stack(entropy_NL(gates_NLK, names), dim=1)
    found = {f"gate_entropy/{stack}": float(each.mean()) for stack, each in entropy.items()}
    cosines = zip(names.sources, similarity_MM[0, 1:].tolist(), strict=True)
    return found | {f"prompt_similarity/{source}": cosine for source, cosine in cosines}


def entropy_NL(gates_NLK: Tensor, names: GateNames) -> Tensor:
    """Entropy of every example's gates at every site [N,L], over its maximum, the logarithm of the site's sources.

    0: one source has it all; 1: all weigh the same. With a single source there is nothing to
    decide: 0.
    """
    most_L = [math.log(len(present)) or math.inf for present in names.sites.values()]
    return torch.special.entr(gates_NLK).sum(dim=-1) / gates_NLK.new_tensor(most_L)
