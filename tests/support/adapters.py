"""LoRA adapters as the real PEFT writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of this base model, with random factors."""
    config = peft.LoraConfig(
        **{"target_modules": ["wo"], "task_type": "SEQ_2_SEQ_LM", "lora_dropout": 0.1, **settings}
    )
    model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base).eval(), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
