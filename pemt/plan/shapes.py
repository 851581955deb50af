"""The sizes of a T5: a table of the published ones, config.json for the others.

Source of the table: the config.json of each model on the hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pemt.model import Site, sites_of


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A T5, mT5 or UMT5, under the names of its config.json.

    Args:
        gated: the FFN has two input projections, and gelu_new; else one, and relu.
        tied: the head shares the embedding's weight.
        bias_everywhere: every self-attention has a relative bias, as in UMT5, not the first alone.
        buckets: of the relative attention bias.
        dropout: while training.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    gated: bool
    tied: bool
    bias_everywhere: bool = False
    buckets: int = 32
    dropout: float = 0.1

    @property
    def inner(self) -> int:
        """Width of an attention's heads together."""
        return self.num_heads * self.d_kv

    @cached_property
    def sites(self) -> list[Site]:
        """Every linear layer that an expert can be on, in the order of a pass."""
        return sites_of(self.base_shape)

    @cached_property
    def blocks(self) -> dict[tuple[str, int], list[Site]]:
        """The sites of each stack's layers."""
        blocks: dict[tuple[str, int], list[Site]] = {}
        for site in self.sites:
            blocks.setdefault((site.stack, site.layer), []).append(site)
        return blocks

    @cached_property
    def base_shape(self) -> dict[str, Any]:
        """What tells where experts can be: see `pemt.model.base_shape`."""
        activation = "gated-gelu" if self.gated else "relu"
        return {**asdict(self), "feed_forward_proj": activation}


# d_model, d_kv, d_ff, layers of each stack, heads
_T5 = {
    "t5-small": (512, 64, 2048, 6, 8),
    "t5-base": (768, 64, 3072, 12, 12),
    "t5-large": (1024, 64, 4096, 24, 16),
    "t5-3b": (1024, 128, 16384, 24, 32),
    "t5-11b": (1024, 128, 65536, 24, 128),
}
_V1_1 = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}


def _shape(sizes: tuple[int, ...], vocab_size: int, *, first_version: bool) -> Shape:
    d_model, d_kv, d_ff, layers, heads = sizes
    return Shape(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        gated=not first_version,
        tied=first_version,
    )


KNOWN: dict[str, Shape] = {
    **{name: _shape(sizes, 32_128, first_version=True) for name, sizes in _T5.items()},
    **{
        f"{family}-{size}": _shape(sizes, vocab_size, first_version=False)
        for family, vocab_size in (("t5-v1_1", 32_128), ("flan-t5", 32_128), ("mt5", 250_112))
        for size, sizes in _V1_1.items()
    },
}


def read_shape(name: str) -> Shape:
    """The sizes of a base model: of a folder or hub id by its config.json, of a published one by the table.

    Raises:
        BaseModelError: it is neither known nor readable, or no T5.
    """
    known = KNOWN.get(name.rstrip("/").rsplit("/", maxsplit=1)[-1])
    if known is not None and not Path(name).is_dir():
        return known
    from pemt.model import load_config

    config = load_config(name)
    return Shape(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        gated=config.is_gated_act,
        tied=_is_tied(Path(name), config),
        bias_everywhere=config.model_type == "umt5",
        buckets=config.relative_attention_num_buckets,
        dropout=config.dropout_rate,
    )


def _is_tied(folder: Path, config: Any) -> bool:
    """Whether head and embedding are one weight, which config.json does not tell since transformers 5.

    It ties them all, and unties those whose files hold two different ones.
    """
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            return "lm_head.weight" not in file.keys()  # noqa: SIM118, it is no mapping
    if (folder / "model.safetensors.index.json").is_file():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return "lm_head.weight" not in index["weight_map"]
    return bool(getattr(config, "scale_decoder_outputs", False))
