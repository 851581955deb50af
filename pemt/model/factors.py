"""The LoRA experts of one site side by side, as `pemt.ops` takes them.

Shapes: F input width, D output width, R rank of one expert, N ranks of all, B batch, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pemt.model.experts import ExpertSource, ModelError
from pemt.ops.checks import MAX_EXPERTS
from pemt.ops.orthonormal import Split, split


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Experts split anew, each one's up projection into orthonormal columns; the sources keep theirs.

    Args:
        ranks, scales: of each, as in `pemt.ops.ffn_output`.
        down: makes the down projections [N,F]; up: makes the up projections [D,N].
    """

    ranks: list[int]
    scales: list[float]
    down: Callable[[], Tensor]
    up: Callable[[], Tensor]


def side_by_side(site: str, sources: Sequence[ExpertSource]) -> Factors:
    """The factors of these LoRA sources, all of which are on the site.

    Raises:
        ModelError: they are more than `pemt.ops` mixes.
    """
    if len(sources) > MAX_EXPERTS:
        raise ModelError(
            f"source_tasks: found {len(sources)} experts on {site}, allowed are at most {MAX_EXPERTS} on a layer; "
            "name fewer, or set mixture.top_sources"
        )
    downs, ups = (
        [source.weights[f"{site}.{factor}"] for source in sources] for factor in ("down", "up")
    )
    splits = [split(up_DR) for up_DR in ups]
    # a few numbers to keep
    mixes = [replace(each, basis=each.basis.new_empty(0)) for each in splits]
    return Factors(
        ranks=[len(each.mix) for each in splits],
        scales=[
            source.alpha / source.rank * each.size
            for source, each in zip(sources, splits, strict=True)
        ],
        down=partial(_downs, mixes, downs),
        up=partial(_bases, ups),
    )


def rank_factors(
    gates_BK: Tensor, scales: Sequence[float], ranks: Sequence[int], *, like: Tensor
) -> Tensor:
    """g_k s_k of every sample, once per rank [B,1,N], in this dtype: what generating a token at a time needs."""
    experts = zip(gates_BK.split(1, dim=1), scales, ranks, strict=True)
    factors_BN = torch.cat(
        [(gate_B1 * scale).expand(-1, rank) for gate_B1, scale, rank in experts], dim=1
    )
    return factors_BN[:, None].to(like.dtype)


def _downs(splits: Sequence[Split], downs_RF: Sequence[Tensor]) -> Tensor:
    """[N,F]: the down projections that go with `_bases`."""
    return torch.cat([each.down(down) for each, down in zip(splits, downs_RF, strict=True)])


def _bases(ups_DR: Sequence[Tensor]) -> Tensor:
    """[D,N]: the up projections, each expert's columns orthonormal."""
    return torch.cat([split(up).basis for up in ups_DR], dim=1)
