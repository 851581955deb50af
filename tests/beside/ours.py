"""Our side: model, engine and evaluation as a run has them.

Shapes: N rows, S source tokens, T target tokens, B batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recipe import SOURCES, TARGET
from safetensors.torch import load_file
from side import LEARNING_RATE, Side, Variant

from pemt.config import AdaptConfig
from pemt.engine import Engine
from pemt.model.tokenizer import load_tokenizer
from pemt.ops import select
from pemt.run.evaluate import evaluate
from pemt.tasks import get_task
from tests.parity.golden import Golden, build


class Ours(Side):
    """Reads the same files, by their published names."""

    def make(self, stage: str) -> Variant:
        select.prepare("cpu")
        values = load_file(self.world / "base" / "model.safetensors")
        for alias in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            values.setdefault(f"{alias}.weight", values["shared.weight"])
        values |= load_file(self.world / f"{stage}.safetensors")
        if stage == "stage2":
            values |= source_values(self.world)
        named = {f"{stage}.param.{key}": value for key, value in values.items()}
        model = build(Golden(self.settings["config"], named), stage).model.train()
        return Trained(model, self.world, self.settings, self.batch, self.rows)


def source_values(world: Path) -> dict[str, Any]:
    """The experts and prompts of all sources, numbered as the published model numbers them."""
    values: dict[str, Any] = {}
    for k, name in enumerate(SOURCES):
        folder = world / "sources" / name
        expert = torch.load(folder / "lora.pt", weights_only=True)
        values |= {f"{key}.{k}": value for key, value in expert.items()}
        prompt = torch.load(folder / "task_embedding.pt", weights_only=True)
        values[f"task_list.{k}"] = prompt["task_shared"]
    return values


class Trained(Variant):
    """A step as `pemt adapt` takes it, in one process without a launcher."""

    def __init__(
        self,
        model: Any,
        world: Path,
        settings: dict[str, Any],
        batch: dict[str, Any],
        rows: dict[str, Any],
    ) -> None:
        super().__init__(model, [each for _, each in model.trainable_parameters()], batch)
        self.config = AdaptConfig(
            model_name_or_path=str(world / "base"),
            output_dir=str(world / "ours"),
            task_name=TARGET,
            bank_dir=str(world / "bank"),
            bf16=False,
            per_device_train_batch_size=settings["batch"],
            per_device_eval_batch_size=settings["batch"],
            max_target_length=settings["target"],
        )
        self.engine = Engine(self.config)
        self.engine.prepare(model, torch.optim.AdamW(self.trained, lr=LEARNING_RATE))
        self.tokenizer = load_tokenizer(str(world / "base"))
        ids_NS, labels_NT = rows["input_ids"], rows["labels"]
        self.dataset = Dataset.from_dict(
            {
                "input_ids": ids_NS.tolist(),
                "labels": labels_NT.tolist(),
                "length": [ids_NS.shape[1]] * len(ids_NS),
                "references": [["0"]] * len(ids_NS),
                "group": [""] * len(ids_NS),
            }
        )

    def loss(self) -> Any:
        return self.engine.model(**self.batch).loss

    def step(self) -> Any:
        self.engine.backward(self.loss(), last=True)
        self.engine.step()

    def answer(self) -> Any:
        self.model.eval()
        tokens = self.batch["labels"].shape[1]
        tokens_BT = self.model.generate(
            self.batch["input_ids"],
            self.batch["attention_mask"],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            num_beams=1,
            do_sample=False,
        )
        self.model.train()
        return tokens_BT

    def evaluate(self) -> int:
        done = evaluate(
            self.engine,
            self.dataset,
            task=get_task(TARGET),
            tokenizer=self.tokenizer,
        )
        return len(done.predictions)
