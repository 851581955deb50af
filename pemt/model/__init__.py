"""PEMT on a stock T5, mT5 or UMT5: experts, gates, prompts, how they are put in; and the baselines."""

from pemt.model.baselines import BitFitT5, FullT5
from pemt.model.experts import ExpertSource, ModelError
from pemt.model.generation import clean_generation_config, set_aside, use_clean_generation
from pemt.model.inject import checked_base
from pemt.model.peft_model import PREFIXES, PeftT5, peft_settings, starts_from_text
from pemt.model.pemt_t5 import PemtT5
from pemt.model.prompts import description_prompt
from pemt.model.shape import base_digest, base_shape
from pemt.model.trained_t5 import PemtOutput, TrainedT5

__all__ = [
    "PREFIXES",
    "BitFitT5",
    "ExpertSource",
    "FullT5",
    "ModelError",
    "PeftT5",
    "PemtOutput",
    "PemtT5",
    "TrainedT5",
    "base_digest",
    "base_shape",
    "checked_base",
    "clean_generation_config",
    "description_prompt",
    "peft_settings",
    "set_aside",
    "starts_from_text",
    "use_clean_generation",
]
