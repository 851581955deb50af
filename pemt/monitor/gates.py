"""Gates by name: which FFN of which stack, which source; and how decided they are.

Shapes: N examples, L FFNs (the encoder's first), K sources, M = 1 + K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STACKS = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class GateNames:
    """What the axes of a gates tensor stand for.

    Args:
        sources: the K sources' names.
        encoder_layers: how many of the L FFNs, the first ones, are the encoder's.
    """

    sources: Sequence[str]
    encoder_layers: int

    def scalars(self, gates_LK: Tensor) -> dict[str, float]:
        """`gate/<encoder|decoder>/<layer>/<source>`, and `gate_mean/<source>` over all FFNs."""
        each = {
            f"gate/{stack}/{layer}/{source}": weight
            for stack, stack_LK in self.by_stack(gates_LK).items()
            for layer, gates_K in enumerate(stack_LK.tolist())
            for source, weight in zip(self.sources, gates_K, strict=True)
        }
        means = zip(self.sources, gates_LK.mean(dim=0).tolist(), strict=True)
        return each | {f"gate_mean/{source}": weight for source, weight in means}

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
        """Encoder and decoder apart; `dim` is where the FFNs lie."""
        sizes = [self.encoder_layers, gates_LK.shape[dim] - self.encoder_layers]
        return dict(zip(STACKS, gates_LK.split(sizes, dim=dim), strict=True))


def entropy_NL(gates_NLK: Tensor) -> Tensor:
    """Entropy of every example's gates at every FFN [N,L], over its maximum log K.

    0: one source has it all; 1: all weigh the same. With a single source there is nothing to
    decide: 0.
    """
    if gates_NLK.shape[-1] == 1:
        return gates_NLK.new_zeros(gates_NLK.shape[:-1])
    return torch.special.entr(gates_NLK).sum(dim=-1) / math.log(gates_NLK.shape[-1])
