"""LoRA adapters as the real PEFT writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

LORAHUB: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q", "v"]}


def make_adapter(
    base: Path, folder: Path, *, pickled: bool = False, seed: int = 4, **settings: Any
) -> Path:
    """An adapter of this base model, with random factors; `pickled` as older releases wrote it."""
    config = peft.LoraConfig(
        **{"target_modules": ["wo"], "task_type": "SEQ_2_SEQ_LM", "lora_dropout": 0.1, **settings}
    )
    model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base).eval(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, safe_serialization=not pickled)
    return folder
