"""A base model, a bank and a task at a published T5's full size: random, and the base never whole in memory.

    python -m tests.launch.full_size t5-3b FOLDER

A program of its own, since what it has freed the C library keeps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5ForConditionalGeneration

from pemt.bank.entries import write_entry
from pemt.bench.model import t5_config
from pemt.model import base_shape
from pemt.plan import Job
from pemt.plan.shapes import KNOWN
from tests.launch.launched_plan import sources_of
from tests.support.tiny import WORDS, make_tokenizer

INDEX = "model.safetensors.index.json"
SOURCES = tuple(f"source-{letter}" for letter in "abcdef")


def job_of(name: str) -> Job:
    """One example of 64 tokens behind a prompt of 20, and an answer of 4, on each rank."""
    return Job(shape=KNOWN[name], batch=1, source=64, target=4)


def make_world(folder: Path, job: Job) -> None:
    """`base/`, `bank/`, `data/` and `task.yaml` of a job."""
    write_base(folder / "base", job)
    shape = base_shape(t5_config(job.shape))
    entry = {"name": str(folder / "base"), **shape}
    for source in sources_of(job, shape, names=SOURCES):  # fp32, as `pemt source` leaves them
        write_entry(folder / "bank", source, base=entry, description=None, metrics={})
    write_task(folder, job)


def write_base(folder: Path, job: Job) -> None:
    """A bf16 base model with a tokenizer: a file for every block, and one for what stands outside of them."""
    make_tokenizer(folder)
    config = t5_config(job.shape)
    config.save_pretrained(folder)
    # As the published files say it; transformers 5 ties all, and unties what it finds apart.
    content = json.loads((folder / "config.json").read_text())
    content["tie_word_embeddings"] = job.shape.tied
    (folder / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        base = T5ForConditionalGeneration(config)
    index = {}
    for number, tensors in enumerate(_parts(base, tied=job.shape.tied)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _parts(base: T5ForConditionalGeneration, *, tied: bool) -> Iterator[dict[str, Tensor]]:
    """The weights as transformers draws them at the start, a block at a time."""
    for name, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        for number, block in enumerate(stack.block):
            torch.manual_seed(2 * number + (name == "decoder"))
            block.to_empty(device="cpu").apply(base._init_weights)
            yield {
                f"{name}.block.{number}.{key}": value.to(torch.bfloat16)
                for key, value in block.state_dict().items()
            }
            block.to_empty(device="meta")
    torch.manual_seed(0)
    vocabulary, d_model = base.shared.weight.shape
    rest = {
        "shared.weight": torch.randn(vocabulary, d_model, dtype=torch.bfloat16),
        "encoder.final_layer_norm.weight": torch.ones(d_model, dtype=torch.bfloat16),
        "decoder.final_layer_norm.weight": torch.ones(d_model, dtype=torch.bfloat16),
    }
    if not tied:  # where the head is tied, T5 scales what goes into it by as much
        head = torch.randn(vocabulary, d_model) * d_model**-0.5
        rest["lm_head.weight"] = head.to(torch.bfloat16)
    yield rest


def write_task(folder: Path, job: Job) -> None:
    """A task of two answers whose rows have just the job's lengths; its description is the prompt's length."""
    task = {
        "name": "full-size",
        "description": _words(job.prompt_tokens, 0),
        "template": "text : {text}",
        "labels": [_words(job.target - 1, 0), _words(job.target - 1, 1)],
        "metrics": ["accuracy"],
        "max_target_length": job.target,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"text": _words(job.source - 3, row), "label": row % 2} for row in range(16)]
        lines = [json.dumps(row) for row in rows]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _words(count: int, start: int) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


if __name__ == "__main__":
    make_world(Path(sys.argv[2]), job_of(sys.argv[1]))
