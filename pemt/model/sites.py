"""The linear layers of a T5 that an expert can be on, by name; no torch is needed for that.

A site is named `<stack>.<layer>.<part>.<projection>`: `encoder.3.self.q`, `decoder.0.cross.k`, `encoder.3.ffn.wi_0`.
An FFN's output projection, where published experts are, is `<stack>.<layer>`, as its tensors and gates have been named
all along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pemt.config import ConfigError

STACKS = ("encoder", "decoder")
OUTPUT = "wo"  # of an FFN: mixed there are experts, target adapter and sparsity loss
_ATTENTION = ("q", "k", "v", "o")
_MODULES = {"self": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}
_SUBLAYERS = {
    "encoder": {"self": 0, "ffn": 1},
    "decoder": {"self": 0, "cross": 1, "ffn": 2},
}


@dataclass(frozen=True)
class Site:
    """One linear layer.

    Args:
        stack: `encoder` or `decoder`.
        layer: its block, from 0.
        part: `self` or `cross` attention, or `ffn`.
        projection: `q`, `k`, `v`, `o`, `wi`, `wi_0`, `wi_1` or `wo`.
    """

    stack: str
    layer: int
    part: str
    projection: str

    @classmethod
    def named(cls, name: str) -> Site:
        """The site of this name."""
        stack, layer, *rest = name.split(".")
        part, projection = rest or ("ffn", OUTPUT)
        return cls(stack, int(layer), part, projection)

    @property
    def name(self) -> str:
        """As the experts' tensors begin."""
        block = f"{self.stack}.{self.layer}"
        return block if self.is_ffn_output else f"{block}.{self.part}.{self.projection}"

    @property
    def module(self) -> str:
        """The module's name in transformers, and so in PEFT."""
        sublayer = _SUBLAYERS[self.stack][self.part]
        part = _MODULES[self.part]
        return f"{self.stack}.block.{self.layer}.layer.{sublayer}.{part}.{self.projection}"

    @property
    def in_decoder(self) -> bool:
        """Whether it is one of the decoder's."""
        return self.stack == "decoder"

    @property
    def is_ffn_output(self) -> bool:
        """Whether it is an FFN's output projection."""
        return self.projection == OUTPUT

    @property
    def reads_encoder(self) -> bool:
        """Whether its input has the encoder's tokens: cross-attention's keys and values do too."""
        return not self.in_decoder or (self.part == "cross" and self.projection in ("k", "v"))

    def widths(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Input and output width in a base model of this `base_shape`."""
        inner = {"ffn": shape["d_ff"]}.get(self.part, shape["num_heads"] * shape["d_kv"])
        ends = (inner, shape["d_model"])
        return ends if self.projection in ("o", OUTPUT) else ends[::-1]


def sites_of(shape: Mapping[str, Any]) -> list[Site]:
    """Every site of a base model of this `base_shape`, in the order in which a pass comes to them."""
    gated = str(shape["feed_forward_proj"]).startswith("gated")
    ffn = (*(("wi_0", "wi_1") if gated else ("wi",)), OUTPUT)
    layers = {"encoder": shape["num_layers"], "decoder": shape["num_decoder_layers"]}
    return [
        Site(stack, layer, part, projection)
        for stack in STACKS
        for layer in range(layers[stack])
        for part in _SUBLAYERS[stack]
        for projection in (ffn if part == "ffn" else _ATTENTION)
    ]


def target_sites(target_modules: Sequence[str] | str, shape: Mapping[str, Any]) -> list[Site]:
    """The sites that PEFT's `target_modules` means.

    Args:
        target_modules: ends of modules' names, each of which must be there; or one regular expression over whole names;
            or `all-linear`.
        shape: `base_shape` of the base model.

    Raises:
        ConfigError: a name or the expression matches none, or it is no regular expression.
    """
    sites = sites_of(shape)
    if isinstance(target_modules, str):
        return _matching(target_modules, sites)
    found: set[Site] = set()
    for target in target_modules:
        of_target = [site for site in sites if f".{site.module}".endswith(f".{target}")]
        if not of_target:
            raise _no_site(target, sites)
        found.update(of_target)
    if not found:
        raise _no_site("[]", sites)
    return [site for site in sites if site in found]


def projections_of(names: Sequence[str]) -> str:
    """What sites are, for people: `q, v`."""
    return ", ".join(dict.fromkeys(Site.named(name).projection for name in names))


def _matching(expression: str, sites: list[Site]) -> list[Site]:
    if expression == "all-linear":
        return sites
    try:
        found = [site for site in sites if re.fullmatch(expression, site.module)]
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"expert.target_modules: found `{expression}`, which is no regular expression: {error}; "
            f"write names as a list, [{expression}]"
        ) from None
    if not found:
        raise _no_site(expression, sites)
    return found


def _no_site(target: str, sites: list[Site]) -> ConfigError:
    names = ", ".join(dict.fromkeys(site.projection for site in sites))
    return ConfigError(
        f"expert.target_modules: `{target}` is on no linear layer of this base model; allowed are a list of "
        f"{names}, a regular expression over whole names such as `{sites[0].module}`, and all-linear"
    )
