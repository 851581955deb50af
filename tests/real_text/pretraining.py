"""A small T5 of real text: span corruption, and in every batch some supervised examples, as T5 v1.0 had them."""

from __future__ import annotations

import collections
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Adafactor, T5Config, T5ForConditionalGeneration, T5Tokenizer

from pemt.data import collate
from pemt.demo.pretraining import Row, corrupted
from pemt.model.tokenizer import load_tokenizer
from pemt.tasks import get_task
from tests.real_text.texts import SUPERVISED, examples_of, plain_texts

PIECES, SENTINELS = 8000, 100
SHAPE: dict[str, Any] = {
    "d_model": 256,
    "d_ff": 768,
    "d_kv": 64,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
}
STEPS, WARM_UP, LEARNING_RATE = 2400, 100, 2e-2
LENGTH, SPANS = 96, 24  # tokens of a text, texts of a batch
SUPERVISED_LENGTH, SUPERVISED_ROWS, SUPERVISED_WEIGHT = 64, 16, 0.3
STEPS_A_LINE = 50


def pretrain(data: Path, folder: Path, *, seed: int = 0) -> None:
    """Train in fp32 with T5's own optimizer, in one process; `folder` receives model and tokenizer.

    Args:
        data: the files that `texts` names.
        seed: of the weights, the texts' order and what is hidden of them.
    """
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    texts = plain_texts(data)
    tokenizer = cut_tokenizer(data / "t5_tokenizer", texts)
    draw.shuffle(texts)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    tokens = np.array(list(itertools.chain.from_iterable(ids)))
    supervised = supervised_rows(data, tokenizer)
    config = T5Config(
        vocab_size=len(tokenizer), dropout_rate=0.0, decoder_start_token_id=0, **SHAPE
    )
    model = T5ForConditionalGeneration(config)
    print(
        f"{len(texts):,} texts, {len(tokens):,} tokens, {len(tokenizer):,} pieces, {len(supervised):,} supervised "
        f"examples, {model.num_parameters():,} parameters",
        flush=True,
    )
    train(model, tokens, supervised, draw)
    unfinished = folder.with_name(f".{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def cut_tokenizer(whole: Path, texts: list[str]) -> T5Tokenizer:
    """T5's own tokenizer with the pieces alone that these texts use most, and all of a single character."""
    tokenizer = load_tokenizer(str(whole))
    used = collections.Counter(itertools.chain.from_iterable(tokenizer(texts).input_ids))
    most = {piece for piece, _ in used.most_common(PIECES)}
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    kept = [
        (piece, score)
        for number, (piece, score) in enumerate(vocabulary)
        if not piece.startswith("<") and (number in most or len(piece) == 1)
    ]
    special = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=[*special, *kept, *sentinels], extra_ids=SENTINELS)


def supervised_rows(data: Path, tokenizer: T5Tokenizer) -> list[Row]:
    """The examples of all supervised tasks, those of larger tasks more often."""
    rows: list[Row] = []
    for name, file in SUPERVISED.items():
        sources, targets = zip(*examples_of(get_task(name), data / file), strict=True)
        encoded = tokenizer([*sources], max_length=SUPERVISED_LENGTH, truncation=True)
        answers = tokenizer([*targets], max_length=16, truncation=True)
        rows += [
            {"input_ids": source, "labels": target}
            for source, target in zip(encoded.input_ids, answers.input_ids, strict=True)
        ]
    return rows


def train(
    model: T5ForConditionalGeneration,
    tokens: np.ndarray[Any, Any],
    supervised: list[Row],
    draw: np.random.Generator,
) -> None:
    """All steps, with a line every so many."""
    optimizer = Adafactor(
        model.parameters(), lr=LEARNING_RATE, scale_parameter=True, relative_step=False
    )
    began, losses = time.monotonic(), []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            share = min(step / WARM_UP, (STEPS - step + 1) / (STEPS - WARM_UP))
            group["lr"] = LEARNING_RATE * share
        starts = draw.integers(0, len(tokens) - LENGTH, SPANS)
        texts = [tokens[start : start + LENGTH].tolist() for start in starts]
        spans = [corrupted(text, draw, model.config.vocab_size) for text in texts]
        chosen = [supervised[i] for i in draw.integers(0, len(supervised), SUPERVISED_ROWS)]
        found = [_backward(model, spans, 1.0), _backward(model, chosen, SUPERVISED_WEIGHT)]
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found)
        if step % STEPS_A_LINE == 0 or step == STEPS:
            of_spans, of_tasks = np.mean(losses[-STEPS_A_LINE:], axis=0)
            took = time.monotonic() - began
            print(
                f"step {step}: spans {of_spans:.3f}, supervised {of_tasks:.3f}, {took:.0f} s",
                flush=True,
            )


def _backward(model: T5ForConditionalGeneration, rows: list[Row], weight: float) -> float:
    """The loss per token, whose gradient is added with this weight."""
    loss = model(**collate(rows, pad_token_id=0, device=torch.device("cpu"))).loss
    (loss * weight).backward()
    return loss.item()
