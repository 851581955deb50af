"""What both Pythons must know: where things lie in the folder of a measurement, and the published script's arguments.

Standard library alone, and nothing newer than Python 3.8: the published code's Python reads this file too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STAGES = ("stage1", "stage2")
FROZEN = "frozen"
# The published scripts' six sources, in their order, and a target whose rows may lie in a csv file.
SOURCES = ("mnli", "qnli", "qqp", "sst2", "squad", "superglue-record")
TARGET = "scitail"
PROMPT_TOKENS = 20
SPLITS = ("train", "validation", "test")


def settings_of(world: Path) -> dict[str, Any]:
    """The T5's sizes and PEMT's, and the batch's."""
    settings: dict[str, Any] = json.loads((world / "settings.json").read_text())
    return settings


def published_arguments(stage: str, world: Path, output_dir: Path) -> list[str]:
    """The command line of the published script for a stage: its shell script's, on this folder's model and rows."""
    settings = settings_of(world)
    options: dict[str, Any] = {
        "do_train": True,
        "do_eval": True,
        "do_test": True,
        "no_cuda": True,
        "model_name_or_path": world / "base",
        "tokenizer_name": world / "base",
        "output_dir": output_dir,
        "overwrite_output_dir": True,
        "save_strategy": "no",
        "evaluation_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "per_device_train_batch_size": settings["batch"],
        "per_device_eval_batch_size": settings["batch"],
        "max_source_length": settings["source"],
        "max_target_length": settings["target"],
        "num_train_epochs": 1,
        "warmup_steps": 0,
        "learning_rate": 3e-4,
        "split_validation_test": True,
        "predict_with_generate": True,
        "non_linearity": "gelu_new",
        "add_lora": True,
        "add_task_embedding": True,
        "init_task_from_vocab": True,
    }
    for key in ("task_name", "eval_dataset_name", "test_dataset_name"):
        options[key] = TARGET
    for key in ("dataset_config_name", "eval_dataset_config_name", "test_dataset_config_name"):
        options[key] = "en"
    for split in SPLITS:
        options[f"{split}_files"] = world / "data" / f"{split}.csv"
    if stage == "stage1":
        options["train_lora"] = True
    else:
        folders = [world / "sources" / name for name in SOURCES]
        options.update(
            train_task_adapters=True,
            adapter_config_name="adapter",
            task_reduction_factor=settings["config"]["reduction_factor"],
            unfreeze_lm_head=False,
            unfreeze_layer_norms=True,
            add_adapter_in_feed_forward=True,
            add_adapter_in_feed_forward_out=False,
            add_adapter_in_self_attention=False,
            load_lora_path=",".join(str(each / "lora.pt") for each in folders),
            load_task_path=",".join(str(each / "task_embedding.pt") for each in folders),
        )
    words = []
    for key, value in options.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words
