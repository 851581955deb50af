"""The demo's base model: a T5 tokenizer and a tiny T5, made from the world's corpus and cached.

Shapes: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Adafactor, T5Config, T5ForConditionalGeneration, T5Tokenizer

from pemt.data import collate
from pemt.demo import world as world_module
from pemt.demo.world import World

STEPS, WARM_UP, BATCH = 300, 40, 64
LEARNING_RATE = 3e-2
MASKED_SHARE, SPAN_LENGTH = 0.2, 1.5
SENTINELS = 32
SHAPE: dict[str, Any] = {
    "d_model": 192,
    "d_ff": 768,
    "d_kv": 48,
    "num_heads": 4,
    "num_layers": 3,
    "decoder_start_token_id": 0,
}


def cached_base(
    world: World, texts: Iterable[str], cache_dir: Path, *, seed: int, say: Callable[[str], None]
) -> Path:
    """The folder of the pre-trained base model; made on the first call.

    Args:
        world: its corpus is what the model is pre-trained on.
        texts: the tasks' texts, so that the tokenizer knows their words.
        cache_dir: one folder per (code, seed) is kept in it.
        seed: of the world, the corpus and the weights.
        say: called with a line of progress now and then.
    """
    digest = hashlib.sha256(str(seed).encode())
    texts = list(texts)
    digest.update("\n".join(texts).encode())
    for source in (Path(world_module.__file__), Path(__file__)):
        digest.update(source.read_bytes())
    folder = cache_dir / f"tiny-t5-{digest.hexdigest()[:12]}"
    if not folder.exists():
        tokenizer = train_tokenizer([*islice(world.corpus(seed), 6000), *texts])
        model = pretrain(world, tokenizer, seed=seed, say=say)
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def train_tokenizer(texts: list[str]) -> T5Tokenizer:
    """A unigram tokenizer with T5's special tokens, in which every frequent word is one piece.

    The unigram trainer alone splits most names of so small a language; whole words are added with
    their log frequency as score.
    """
    words = collections.Counter(word for text in texts for word in text.split())
    tokenizer = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces: dict[str, float] = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    total = sum(words.values())
    pieces |= {f"▁{word}": math.log(count / total) for word, count in words.items() if count > 3}
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=[*pieces.items(), *sentinels], extra_ids=SENTINELS)


def pretrain(
    world: World, tokenizer: T5Tokenizer, *, seed: int, say: Callable[[str], None]
) -> T5ForConditionalGeneration:
    """Span corruption on the world's corpus, in bf16 autocast, with T5's own optimizer."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **SHAPE)
    model = T5ForConditionalGeneration(config)
    # Adam's steps of one size are far too small for T5's embeddings, which start at size 1.
    optimizer = Adafactor(
        model.parameters(), lr=LEARNING_RATE, scale_parameter=True, relative_step=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
    )
    losses = []
    for step, rows in enumerate(islice(_batches(world, tokenizer, seed), STEPS)):
        batch = collate(rows, pad_token_id=0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            say(f"pre-training: step {step + 1}/{STEPS}, loss {np.mean(losses[-50:]):.3f}")
    return model


def _batches(
    world: World, tokenizer: T5Tokenizer, seed: int
) -> Iterator[list[dict[str, list[int]]]]:
    texts = world.corpus(seed + 1)
    draw = np.random.default_rng(seed)
    while True:
        encoded = tokenizer(list(islice(texts, BATCH)), add_special_tokens=False).input_ids
        yield [corrupted(ids, draw, len(tokenizer)) for ids in encoded]


def corrupted(ids: list[int], draw: np.random.Generator, vocabulary: int) -> dict[str, list[int]]:
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
