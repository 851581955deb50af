"""The folder of a measurement: random weights of a published size, as both codes read them, a batch, and rows.

    base/       a T5 and a tokenizer, as transformers saves them
    sources/    each source's expert and prompt, as the published code saves them
    stage1.safetensors, stage2.safetensors     what the stage trains, by its published names
    bank/       the same experts, as `pemt bank import-official` reads them
    data/       a few rows of the target task, csv
    batch.safetensors, rows.safetensors        token ids of a training batch, and of rows to evaluate
    settings.json                              all sizes

Shapes: B batch, N rows, S source tokens, T target tokens.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from pemt.bank import import_official
from pemt.model import base_shape
from pemt.plan import Shape
from tests.beside.recipe import PROMPT_TOKENS, SOURCES, SPLITS, STAGES, TARGET
from tests.parity.plain import random_base, random_values

LABELS = ("entailment", "neutral")  # of the target, in csv files
RANK, REDUCTION = 64, 16
DATA_ROWS = {"train": 64, "validation": 16, "test": 16}


def write_world(
    folder: Path,
    shape: Shape,
    *,
    batch: int = 8,
    source: int = 128,
    target: int = 16,
    rows: int = 16,
) -> None:
    """Fill an empty folder; equal arguments give equal files.

    Args:
        batch: examples of a step; source, target: tokens of each, without the prompt's.
        rows: to evaluate.
    """
    generator = torch.Generator().manual_seed(0)
    config = _config(shape)
    settings = {"config": config, "batch": batch, "source": source, "target": target}
    (folder / "settings.json").write_text(json.dumps(settings))
    base = random_base(config, generator)
    for name, parameter in base.named_parameters():
        if name.endswith("Attention.q.weight"):
            # As T5 starts: its attention is not divided by sqrt(d_kv), and one that sees a single token is chaotic.
            parameter.data *= shape.d_kv**-0.5
    base.save_pretrained(folder / "base")
    # Each transformers makes the settings of generation from config.json by itself.
    (folder / "base" / "generation_config.json").unlink()
    _write_tokenizer(folder / "base", shape.vocab_size)
    _write_values(folder, config, generator)
    for name in SOURCES:
        import_official(
            folder / "sources" / name,
            bank_dir=folder / "bank",
            task=name,
            base={"name": str(folder / "base"), **base_shape(base.config)},
        )
    _write_data(folder / "data")
    for name, count in (("batch", batch), ("rows", rows)):
        tokens = _tokens(count, source, target, shape.vocab_size, generator)
        save_file(tokens, folder / f"{name}.safetensors")


SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")


def _config(shape: Shape) -> dict[str, Any]:
    """As a file of published numbers describes its model (tests/parity/golden.py)."""
    return {
        **{name: getattr(shape, name) for name in SIZES},
        "dropout_rate": shape.dropout,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "experts": len(SOURCES),
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "reduction_factor": REDUCTION,
        "non_linearity": "gelu_new",
        "tsl_weight": 0.1,
    }


def _write_values(folder: Path, config: dict[str, Any], generator: torch.Generator) -> None:
    prompts = [PROMPT_TOKENS] * (1 + len(SOURCES))
    for stage in STAGES:
        experts = len(SOURCES) if stage == "stage2" else 1
        values = random_values(stage, {**config, "experts": experts}, 4, generator, prompts=prompts)
        own = {}
        for key, value in values.items():
            if key.endswith("w_gate"):  # gates that are neither equal nor all for one expert
                value.data *= 3 * len(value) ** -0.5
            own[key.replace("superglue-cb", TARGET)] = value.detach().contiguous()
        if stage == "stage2":
            own = _write_sources(folder / "sources", own)
        save_file(own, folder / f"{stage}.safetensors")


def _write_sources(folder: Path, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each source's files; what is left is the stage's own."""
    for k, name in enumerate(SOURCES):
        (folder / name).mkdir(parents=True)
        expert = {key: value for key, value in values.items() if key.endswith(f"lora_A.{k}")}
        expert |= {key: value for key, value in values.items() if key.endswith(f"lora_B.{k}")}
        saved = {key.removesuffix(f".{k}"): value for key, value in expert.items()}
        torch.save(saved, folder / name / "lora.pt")
        torch.save({"task_shared": values[f"task_list.{k}"]}, folder / name / "task_embedding.pt")
    return {
        key: value
        for key, value in values.items()
        if ".lora_" not in key and not key.startswith("task_list.")
    }


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word tokenizer with T5's number of words, which transformers 4.30 reads as well."""
    words = ["<pad>", "</s>", "<unk>", *LABELS, "0", "1"]
    words += [f"w{number}" for number in range(vocabulary - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # So shortened, the published description of the target has the 20 tokens of a prompt.
    tokenizer.normalizer = normalizers.Replace("a premise and a ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def _write_data(folder: Path) -> None:
    folder.mkdir()
    for split in SPLITS:
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "sentence2", "gold_label", "label"])
            for row in range(DATA_ROWS[split]):
                sentences = [
                    " ".join(f"w{(7 * row + k) % 1000}" for k in range(n)) for n in (60, 50)
                ]
                writer.writerow([*sentences, LABELS[row % 2], LABELS[row % 2]])


def _tokens(
    count: int, source: int, target: int, vocabulary: int, generator: torch.Generator
) -> dict[str, Tensor]:
    def draw(width: int) -> Tensor:
        return torch.randint(2, vocabulary, (count, width), generator=generator)

    ids_NS = draw(source)
    return {"input_ids": ids_NS, "attention_mask": torch.ones_like(ids_NS), "labels": draw(target)}
