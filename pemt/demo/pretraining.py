"""The demo's pre-training: span corruption by all ranks, which resumes where it was interrupted.

Shapes: G all gradients in a row.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import Adafactor, T5Config, T5ForConditionalGeneration, T5Tokenizer

from pemt.data import collate
from pemt.demo.world import World
from pemt.engine import Engine, Interrupted, StopSignals
from pemt.monitor import ProgressBar, progress_logger
from pemt.storage import replacing

STEPS, WARM_UP, BATCH = 300, 40, 64
LEARNING_RATE = 3e-2
MASKED_SHARE, SPAN_LENGTH = 0.2, 1.5
STEPS_A_LINE, STEPS_A_SAVE = 10, 25
# What torch.load raises for a file that is cut, overwritten in places, or another one (3,000 of them were tried).
DAMAGED = EOFError, LookupError, OSError, RuntimeError, UnpicklingError, ValueError, struct.error

Row = dict[str, list[int]]


class Pretraining:
    """Trains in fp32 with T5's own optimizer; every rank makes one, and calls `run`.

    A rank takes its share of each batch, and gradients are weighed by tokens, so that any number of ranks comes to
    the same model within rounding. In bf16 a CPU that only emulates it would take ten times as long.

    Args:
        config: the model's.
        world: its corpus is what is learned.
        seed: of the weights, the corpus and what is hidden of it.
    """

    def __init__(
        self, config: T5Config, world: World, tokenizer: T5Tokenizer, engine: Engine, *, seed: int
    ) -> None:
        self._world, self._tokenizer, self._engine, self._seed = world, tokenizer, engine, seed
        torch.manual_seed(seed)
        self.model = T5ForConditionalGeneration(config)
        nn.Module.to(self.model, engine.device)
        # Adam's steps of one size are far too small for T5's embeddings, which start at size 1.
        self._optimizer = Adafactor(
            self.model.parameters(), lr=LEARNING_RATE, scale_parameter=True, relative_step=False
        )

    def run(self, state: Path) -> T5ForConditionalGeneration:
        """Train to the end (all ranks call).

        Args:
            state: the file of each machine that keeps what an interrupted pre-training resumes from.

        Raises:
            Interrupted: a rank was told to stop; what was trained is saved.
        """
        engine = self._engine
        first = self._restored(state)
        if first and engine.is_main:
            progress_logger().info(f"pre-training resumes after step {first} of {STEPS}: {state}")
        bar, began = None, time.monotonic()
        if engine.is_main:
            bar = ProgressBar(total_steps=STEPS, initial_step=first, description="pre-training")
        with StopSignals() as signals:
            for step, rows in enumerate(self._batches(first), start=first + 1):
                try:
                    loss, stop = self._take_step(rows, step, stop=signals.reason() is not None)
                except RuntimeError:
                    engine.waiting.report_dead_ranks()
                    raise
                if bar and (step % STEPS_A_LINE == 0 or step == STEPS):
                    rate = (step - first) * BATCH / (time.monotonic() - began)
                    bar.advance(step, loss=loss, samples_per_second=rate)
                if stop or step % STEPS_A_SAVE == 0:
                    self._save(state, step)
                if stop:
                    if engine.is_main:
                        progress_logger().info(
                            f"stopped in pre-training after step {step}; its state is saved, and the same command "
                            "resumes from it"
                        )
                    raise Interrupted(signals.reason() or "another rank was told to")
        if bar:
            bar.close()
        return self.model

    def _take_step(self, rows: list[Row], step: int, *, stop: bool) -> tuple[float, bool]:
        """One optimizer step: its loss per token, and whether any rank was told to stop."""
        engine = self._engine
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(
                step / WARM_UP, (STEPS - step + 1) / (STEPS - WARM_UP)
            )
        own = rows[engine.rank :: engine.world_size]
        batch = collate(own, pad_token_id=0, device=engine.device)
        share = _tokens(own) / _tokens(rows)
        loss = self.model(**batch).loss * share
        loss.backward()
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        flags = torch.tensor([float(stop)], device=engine.device)
        summed_G = engine.sum(
            torch.cat([parameters_to_vector(gradients), loss.detach()[None], flags])
        )
        vector_to_parameters(summed_G[:-2], gradients)
        clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(summed_G[-2]), bool(summed_G[-1])

    def _batches(self, first: int) -> Iterator[list[Row]]:
        texts = self._world.corpus(self._seed + 1)
        next(islice(texts, first * BATCH, first * BATCH), None)  # what is learned already
        for step in range(first, STEPS):
            draw = np.random.default_rng([self._seed, step])
            ids = self._tokenizer(list(islice(texts, BATCH)), add_special_tokens=False).input_ids
            yield [corrupted(each, draw, len(self._tokenizer)) for each in ids]

    def _restored(self, state: Path) -> int:
        """How many steps are done; 0 where the machines have not saved the same, or a file is damaged."""
        saved = None
        with self._engine.together("reading the state of pre-training"):
            if state.exists():
                try:
                    saved = torch.load(state, weights_only=True, map_location=self._engine.device)
                except DAMAGED as error:
                    progress_logger().warning(
                        f"{state}: cannot be read ({error}); pre-training begins again"
                    )
        steps = self._engine.all_gather_object(saved["step"] if saved else 0)
        if saved is None or set(steps) != {saved["step"]}:
            return 0
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def _save(self, state: Path, step: int) -> None:
        saved = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with self._engine.local_first("saving the state of pre-training"):
            if self._engine.is_local_main:
                write_state(saved, state)


def write_state(saved: dict[str, Any], state: Path) -> None:
    """Write the state of pre-training, whole or not at all."""
    with replacing(state) as new:
        torch.save(saved, new)


def _tokens(rows: list[Row]) -> int:
    return sum(len(row["labels"]) for row in rows)


def corrupted(ids: list[int], draw: np.random.Generator, vocabulary: int) -> Row:
    """T5's span corruption, but for the sentinel before the first answer, which is left out.

    So the decoder's first position learns to look for an answer, as the tasks will ask of it.
    """
    masked = max(1, round(len(ids) * MASKED_SHARE))
    spans = max(1, min(round(masked / SPAN_LENGTH), masked, len(ids) - masked))
    hidden = _parts(masked, spans, draw)
    kept = _parts(len(ids) - masked + 1, spans, draw)
    kept[0] -= 1  # the text may begin with a gap
    source: list[int] = []
    target: list[int] = []
    position = 0
    for span, (keep, hide) in enumerate(zip(kept, hidden, strict=True)):
        sentinel = vocabulary - 1 - span
        source += [*ids[position : position + keep], sentinel]
        position += keep
        target += [sentinel] if span else []
        target += ids[position : position + hide]
        position += hide
    return {"input_ids": [*source, *ids[position:], 1], "labels": [*target, 1]}


def _parts(total: int, count: int, draw: np.random.Generator) -> list[int]:
    """Positive numbers that add up to `total`."""
    cuts = np.sort(draw.choice(np.arange(1, total), count - 1, replace=False))
    return [int(each) for each in np.diff([0, *cuts, total])]
