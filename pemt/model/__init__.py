"""PEMT on a stock T5, mT5 or UMT5: experts, gates, prompts, and how they are put in."""

from pemt.model.experts import ExpertSource, ModelError
from pemt.model.pemt_t5 import PemtOutput, PemtT5
from pemt.model.prompts import description_prompt
from pemt.model.shape import base_shape

__all__ = ["ExpertSource", "ModelError", "PemtOutput", "PemtT5", "base_shape", "description_prompt"]
