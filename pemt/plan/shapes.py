"""The sizes of a base model: a table of the published ones, config.json for the others.

Source of the table: the config.json of each model on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pemt.model import Family, Site, family_of, sites_of, stack_size


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base model of any family, under the names of `base_shape`: those of T5's config.json.

    Args:
        gated: the FFN has two input projections, and gelu_new; else one, and relu.
        tied: the head shares the embedding's weight.
        bias_everywhere: every self-attention has a relative bias, as in UMT5, not the first alone.
        buckets: of the relative attention bias.
        dropout: while training.
        others: what else its `base_shape` has, as that of a family whose decoder has sizes of its own.
    """

    model_type: str = "t5"

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
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """What its parts are called."""
        return family_of(self.base_shape)

    def of(self, stack: str) -> Widths:
        """One stack's sizes."""
        size = partial(stack_size, self.base_shape, stack)
        return Widths(
            vocab_size=size("vocab_size"),
            d_model=size("d_model"),
            d_ff=size("d_ff"),
            layers=self.num_decoder_layers if stack == "decoder" else self.num_layers,
            heads=size("num_heads"),
            inner=size("num_heads") * size("d_kv"),
        )

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
        own = {key: value for key, value in asdict(self).items() if key != "others"}
        return {**own, "feed_forward_proj": activation, **self.others}


@dataclass(frozen=True, kw_only=True)
class Widths:
    """One stack's sizes.

    Args:
        inner: width of an attention's queries together.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    inner: int


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
    from pemt.model import base_shape, is_gated, load_config

    config = load_config(name)
    shape = base_shape(config)
    named = {each.name for each in fields(Shape)} & shape.keys()
    return Shape(
        **{key: shape[key] for key in named},
        gated=is_gated(shape),
        tied=_is_tied(Path(name), config, family_of(shape)),
        bias_everywhere=config.model_type == "umt5",
        buckets=getattr(config, "relative_attention_num_buckets", 0),
        dropout=config.dropout_rate,
        others={key: shape[key] for key in shape.keys() - named},
    )


def _is_tied(folder: Path, config: Any, family: Family) -> bool:
    """Whether head and embedding are one weight, which a T5's config.json does not tell since transformers 5.

    It ties them all, and unties those whose files hold two different ones.
    """
    head = f"{family.head}.weight"
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            return head not in file.keys()  # noqa: SIM118, it is no mapping
    if (folder / "model.safetensors.index.json").is_file():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return head not in index["weight_map"]
    if family.tied_by_config:
        return bool(config.tie_word_embeddings)
    return bool(getattr(config, "scale_decoder_outputs", False))
