"""PEMT on a stock T5, mT5 or UMT5: experts, gates, prompts, and how they are put in."""

from pemt.model.experts import ExpertSource, ModelError
from pemt.model.inject import checked_base
from pemt.model.pemt_t5 import PemtOutput, PemtT5
from pemt.model.prompts import description_prompt
from pemt.model.shape import base_digest, base_shape

__all__ = [
    "ExpertSource",
    "ModelError",
    "PemtOutput",
    "PemtT5",
    "base_digest",
    "base_shape",
    "checked_base",
    "description_prompt",
]
