"""The published code's side: their own script builds model and trainer, and is stopped where it would train.

Shapes: N rows, S source tokens, T target tokens.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from recipe import TARGET, published_arguments
from safetensors.torch import load_file
from side import LEARNING_RATE, Side, Variant


class Reached(Exception):
    """The script came to its training, with this trainer."""

    def __init__(self, trainer: Any) -> None:
        super().__init__("the published script has come to its training")
        self.trainer = trainer


class Theirs(Side):
    """Works in the checkout, as their script does.

    Args:
        world: the folder of the measurement.
        checkout: of the published code.
    """

    def __init__(self, world: str, checkout: str) -> None:
        super().__init__(world)
        os.chdir(Path(checkout) / "pemt")
        sys.path.insert(0, os.getcwd())

    def make(self, stage: str) -> Variant:
        trainer = _trainer_of(published_arguments(stage, self.world, self.world / "published"))
        self._load_weights(trainer.model, stage)
        return Published(trainer, self.batch, self.rows)

    def _load_weights(self, model: Any, stage: str) -> None:
        """The values of this measurement; experts and source prompts their script has read by itself."""
        values = load_file(str(self.world / "base" / "model.safetensors"))
        values.update(load_file(str(self.world / f"{stage}.safetensors")))
        missing, unexpected = model.load_state_dict(values, strict=False)
        # Under other names the same tensors stand there again.
        read = ("embed_tokens.weight", "lm_head.weight", "coder.task_emb")
        if stage == "stage2":
            read += (".lora_", "task_list.", "coder.pretrain_task_emb_list.")
        missing = [key for key in missing if not any(part in key for part in read)]
        if missing or unexpected:
            raise ValueError(f"the published model has {missing} more, and not {unexpected}")


def _trainer_of(arguments: list[str]) -> Any:
    from third_party.trainers import Seq2SeqTrainer

    def stop(trainer: Any, *_: Any, **__: Any) -> None:
        raise Reached(trainer)

    train, sys.argv = Seq2SeqTrainer.train, ["run_seq2seq.py", *arguments]
    Seq2SeqTrainer.train = stop
    try:
        runpy.run_path("run_seq2seq.py", run_name="__main__")
    except Reached as reached:
        return reached.trainer
    finally:
        Seq2SeqTrainer.train = train
    raise ValueError("the published script never came to its training")


class Published(Variant):
    """A step as transformers' Trainer takes it, with its optimizer."""

    def __init__(self, trainer: Any, batch: dict[str, Any], rows: dict[str, Any]) -> None:
        trained = [each for each in trainer.model.parameters() if each.requires_grad]
        super().__init__(trainer.model.train(), trained, batch)
        self.trainer, self.rows = trainer, rows
        trainer.args.learning_rate = LEARNING_RATE
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)

    def loss(self) -> Any:
        return self.model(**self.batch, task=TARGET).loss

    def step(self) -> Any:
        trainer = self.trainer
        trainer.training_step(self.model, {**self.batch, "task": TARGET})
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()

    def answer(self) -> Any:
        self.model.eval()
        with torch.no_grad():
            tokens_BT = self.model.generate(
                self.batch["input_ids"],
                attention_mask=self.batch["attention_mask"],
                task=TARGET,
                num_beams=1,
                **self.length(),
            )
        self.model.train()
        return tokens_BT

    def evaluate(self) -> int:
        import datasets

        ids_NS, labels_NT = self.rows["input_ids"], self.rows["labels"]
        columns = {
            "input_ids": ids_NS.tolist(),
            "attention_mask": torch.ones_like(ids_NS).tolist(),
            "labels": labels_NT.tolist(),
            "task": [TARGET] * len(ids_NS),
        }
        self.trainer.evaluate(
            eval_dataset=datasets.Dataset.from_dict(columns),
            max_length=1 + labels_NT.shape[1],
            num_beams=1,
        )
        self.model.train()
        return len(ids_NS)
