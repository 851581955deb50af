"""The linear layers of a base model that an expert can be on, by name; no torch is needed for that.

A site is named `<stack>.<layer>.<part>.<projection>`: `encoder.3.self.q`, `decoder.0.cross.k`, `encoder.3.ffn.wi_0`.
Projections have T5's names in every family; what transformers calls them stands in `families`. An FFN's output
projection, where published experts are, is `<stack>.<layer>`, as its tensors and gates have been named all along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pemt.config import ConfigError
from pemt.model.families import FAMILIES, STACKS, family_of, is_gated, stack_size

OUTPUT = "wo"  # of an FFN: mixed there are experts, target adapter and sparsity loss


@dataclass(frozen=True)
class Site:
    """One linear layer.

    Args:
        stack: `encoder` or `decoder`.
        layer: its block, from 0.
        part: `self` or `cross` attention, or `ffn`.
        projection: `q`, `k`, `v`, `o`, `wi`, `wi_0`, `wi_1` or `wo`.
        module: its name in transformers, and so in PEFT.
    """

    stack: str
    layer: int
    part: str
    projection: str
    module: str

    @classmethod
    def from_name(cls, name: str, shape: Mapping[str, Any]) -> Site:
        """The site of this name in a base model of this `base_shape`."""
        stack, layer, *rest = name.split(".")
        part, projection = rest or ("ffn", OUTPUT)
        return cls.at(stack, int(layer), part, projection, shape)

    @classmethod
    def at(
        cls, stack: str, layer: int, part: str, projection: str, shape: Mapping[str, Any]
    ) -> Site:
        """The site there in a base model of this `base_shape`."""
        family = family_of(shape)
        of_block = family.parts[stack][part]
        module = f"{family.block(stack, layer)}.{of_block.module}.{of_block.linears[projection]}"
        return cls(stack, layer, part, projection, module)

    @property
    def name(self) -> str:
        """As the experts' tensors begin."""
        block = f"{self.stack}.{self.layer}"
        return block if self.is_ffn_output else f"{block}.{self.part}.{self.projection}"

    @property
    def tag(self) -> str:
        """As its gates are called in results, logs and pictures: `encoder/3`, `decoder/0/cross/k`."""
        return self.name.replace(".", "/")

    @property
    def in_decoder(self) -> bool:
        """Whether it is one of the decoder's."""
        return self.stack == "decoder"

    @property
    def is_ffn_output(self) -> bool:
        """Whether it is an FFN's output projection."""
        return self.projection == OUTPUT

    @property
    def ends_part(self) -> bool:
        """Whether it is the last of its attention or FFN."""
        return self.projection in ("o", OUTPUT)

    @property
    def reads_encoder(self) -> bool:
        """Whether its input has the encoder's tokens: cross-attention's keys and values do too."""
        return not self.in_decoder or (self.part == "cross" and self.projection in ("k", "v"))

    def widths(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        """Input and output width in a base model of this `base_shape`."""
        of_stack = partial(stack_size, shape, self.stack)
        if self.part == "ffn":
            outer, inner = of_stack("d_model"), of_stack("d_ff")
        else:
            is_key = self.projection in ("k", "v")
            outer = stack_size(shape, "encoder" if self.reads_encoder else self.stack, "d_model")
            inner = of_stack("num_key_value_heads" if is_key else "num_heads") * of_stack("d_kv")
        return (inner, outer) if self.ends_part else (outer, inner)


def sites_of(shape: Mapping[str, Any]) -> list[Site]:
    """Every site of a base model of this `base_shape`, in the order in which a pass comes to them."""
    family = family_of(shape)
    absent = {"wi"} if is_gated(shape) else {"wi_0", "wi_1"}
    layers = {"encoder": shape["num_layers"], "decoder": shape["num_decoder_layers"]}
    return [
        Site.at(stack, layer, part, projection, shape)
        for stack in STACKS
        for layer in range(layers[stack])
        for part, of_block in family.parts[stack].items()
        for projection in of_block.linears
        if projection not in absent
    ]


def target_sites(target_modules: Sequence[str] | str, shape: Mapping[str, Any]) -> list[Site]:
    """The sites that PEFT's `target_modules` means.

    Args:
        target_modules: ends of modules' names, or T5's names of projections, each of which must be there; or one
            regular expression over whole names; or `all-linear`.
        shape: `base_shape` of the base model.

    Raises:
        ConfigError: a name or the expression matches none, or it is no regular expression.
    """
    sites = sites_of(shape)
    if isinstance(target_modules, str):
        return _matching(target_modules, sites)
    found: set[Site] = set()
    for target in target_modules:
        of_target = [
            site
            for site in sites
            if f".{site.module}".endswith(f".{target}") or site.projection == target
        ]
        if not of_target:
            raise _no_site(target, sites)
        found.update(of_target)
    if not found:
        raise _no_site("[]", sites)
    return [site for site in sites if site in found]


def is_linear(module: str) -> bool:
    """Whether a name is that of a linear layer in a block of some family, however many blocks there are."""
    return any(
        re.fullmatch(
            rf"{re.escape(family.stacks[stack])}\.{family.blocks}\.\d+\.{re.escape(part.module)}\."
            rf"({'|'.join(part.linears.values())})",
            module,
        )
        for family in FAMILIES.values()
        for stack, parts in family.parts.items()
        for part in parts.values()
    )


def projections_of(names: Sequence[str]) -> str:
    """What sites are, for people: `q, v`."""
    ends = (name.rpartition(".")[2] for name in names)
    return ", ".join(dict.fromkeys(OUTPUT if end.isdigit() else end for end in ends))


def absent_sites(names: Sequence[str], shape: Mapping[str, Any]) -> list[str]:
    """Sites of the same kinds as these that are not among them, as with PEFT's `layers_to_transform`."""
    found = [Site.from_name(name, shape) for name in names]
    kinds = {(site.part, site.projection) for site in found}
    return [
        site.name
        for site in sites_of(shape)
        if (site.part, site.projection) in kinds and site not in found
    ]


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
    ends = [site.module.rpartition(".")[2] for site in sites]
    names = ", ".join(dict.fromkeys([*ends, *(site.projection for site in sites)]))
    return ConfigError(
        f"expert.target_modules: `{target}` is on no linear layer of this base model; allowed are a list of "
        f"{names}, a regular expression over whole names such as `{sites[0].module}`, and all-linear"
    )
