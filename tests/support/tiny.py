"""A tiny base model, tokenizer and task on disk, for tests that train for real."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from pemt.config.schema import AdaptConfig, SourceConfig
from pemt.tasks import Task, register_task

COLOURS = ("red", "blue", "green", "white")
WORDS = (
    "the",
    "box",
    "is",
    "and",
    "a",
    "lid",
    "that",
    "was",
    "yes",
    "no",
    "says",
    "whether",
    "text",
    ":",
    *COLOURS,
    *"012345",  # labels of the published tasks
)


def make_tokenizer(folder: Path) -> None:
    """A word tokenizer, saved as Hugging Face saves one."""
    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_gemma_base(folder: Path, **decoder: Any) -> Path:
    """A random T5Gemma with a tokenizer that begins texts and does not end them, as Gemma's; sizes of its decoder."""
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="left",
    ).save_pretrained(folder)  # fmt: skip
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 33, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 4,
        "sliding_window": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = T5GemmaConfig(encoder=sizes, decoder={**sizes, **decoder}, vocab_size=32)
    base = T5GemmaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:  # from its own start it has hardly anything to say
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    base.save_pretrained(folder)
    return folder


def make_base(folder: Path, *, d_model: int = 16, **sizes: Any) -> Path:
    """A random T5 with a word tokenizer, saved as Hugging Face saves one."""
    make_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"d_ff": 33, "d_kv": 4, "num_heads": 2, "num_layers": 2, **sizes}
    config = T5Config(
        vocab_size=32, d_model=d_model, dropout_rate=0.0, decoder_start_token_id=0, **shape
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_task(name: str) -> Task:
    """A yes/no task about colours, registered by its name."""
    return register_task(
        Task(
            name=name,
            description="says whether the box is red"
            if name.endswith("a")
            else "the lid and the box",
            template="text : {text}",
            labels=("no", "yes"),
            metrics=("accuracy",),
            max_target_length=4,
        )
    )


def write_task_files(folder: Path, *, seed: int, rows: int = 40) -> Path:
    """jsonl files of a tiny task, with rows of different lengths."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = []
        for _ in range(rows if split == "train" else 11):
            colour = draw.choice(COLOURS)
            lid = ["and the lid is", draw.choice(COLOURS)]
            text = " ".join(["the box is", colour, *lid * draw.randint(0, 3)])
            lines.append(json.dumps({"text": text, "label": int(colour in COLOURS[:2])}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_fields(base: Path, data_dir: Path, output_dir: Path, task: str) -> dict[str, Any]:
    """What every tiny run sets: deterministic, fp32, every step logged.

    Without TensorBoard, whose second writer waits until the next second: as long as such a run takes.
    """
    return {
        "model_name_or_path": str(base),
        "data_dir": str(data_dir),
        "output_dir": str(output_dir),
        "task_name": task,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_source_length": 24,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": [],
    }


def source_config(
    base: Path, data_dir: Path, output_dir: Path, bank_dir: Path, task: str, **fields: Any
) -> SourceConfig:
    return SourceConfig(
        **{**run_fields(base, data_dir, output_dir, task), "bank_dir": str(bank_dir), **fields}
    )


def adapt_config(
    base: Path, data_dir: Path, output_dir: Path, bank_dir: Path, task: str, **fields: Any
) -> AdaptConfig:
    return AdaptConfig(
        **{**run_fields(base, data_dir, output_dir, task), "bank_dir": str(bank_dir), **fields}
    )


def losses(output_dir: Path, tag: str = "train/loss") -> dict[int, float]:
    """step -> value of a tag, from log.jsonl."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[tag] for line in lines if tag in line}
