"""Which base model an expert belongs to: its sizes, and a digest of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pemt.model.families import FAMILIES, STACKS
from pemt.model.lazy import value_of

_PIECE = 1024  # elements
_DIGEST = "pemt_digest"


def base_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that a bank entry and the base model it is put into must share."""
    family = FAMILIES[config.model_type]
    sizes = {key: attrgetter(where)(config) for key, where in family.sizes.items()}
    return {"model_type": family.model_type, **sizes}


def decoder_start(config: PreTrainedConfig) -> int | None:
    """The token id that the decoder of a base model starts from; None where its configuration has none."""
    found: Any = config
    for name in FAMILIES[config.model_type].decoder_start.split("."):
        found = getattr(found, name, None)
    return None if found is None else int(found)


def base_digest(base: PreTrainedModel) -> str:
    """Hex sha256 of samples of every weight matrix: embeddings, attention, FFNs, the head.

    Two base models of one shape, fine-tuned from the same one perhaps, differ in them; a copy under
    another name does not, nor one that was loaded in bfloat16 instead of float32. Three pieces of each
    matrix are read, so that a model of any size takes about a second from a disk; a change of single
    numbers elsewhere is not seen. Layer norms are left out: stage 2 trains them.
    """
    if (known := vars(base).get(_DIGEST)) is not None:
        return str(known)
    digest = hashlib.sha256()
    for weight in _matrices(base):
        digest.update(_sample(value_of(weight)))
    return digest.hexdigest()


def keep_digest(base: PreTrainedModel) -> None:
    """Keep `base_digest`: from now on something else may stand in the place of what is frozen."""
    vars(base)[_DIGEST] = base_digest(base)


def _matrices(base: PreTrainedModel) -> Iterator[Tensor]:
    """The weight matrices in a fixed order, whatever has been put into the base by now."""
    family = FAMILIES[base.config.model_type]
    for name in dict.fromkeys((family.embeddings[0], family.head, family.embeddings[1])):
        embedding: Any = base.get_submodule(name)
        yield embedding.weight
    for stack in STACKS:
        blocks: Any = base.get_submodule(f"{family.stacks[stack]}.{family.blocks}")
        for block in blocks:
            for part in family.parts[stack].values():
                module = block.get_submodule(part.module)
                for child in (*part.linears.values(), family.position_bias):
                    if child and (found := getattr(module, child, None)) is not None:
                        yield found.weight


def _sample(weight: Tensor) -> bytes:
    """Beginning, middle and end of a matrix as bfloat16; of one that lies in a file nothing else is read."""
    flat = weight.reshape(-1)
    size = min(_PIECE, len(flat))
    starts = (0, (len(flat) - size) // 2, len(flat) - size)
    pieces = torch.cat([flat[start : start + size] for start in starts])
    return pieces.to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes()
