"""The demo's base model: a T5 tokenizer and a tiny T5, made from the world's corpus and cached."""

from __future__ import annotations

import collections
import hashlib
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5Tokenizer

from pemt.demo import pretraining as pretraining_module, world as world_module
from pemt.demo.pretraining import Pretraining
from pemt.demo.world import World
from pemt.engine import Engine
from pemt.model import bars_on_terminals_alone

SENTINELS = 32
STATE = "pretraining.pt"  # beside an unfinished model
SHAPE: dict[str, Any] = {
    "d_model": 192,
    "d_ff": 768,
    "d_kv": 48,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}


def cached_base(
    world: World, texts: list[str], cache_dir: Path, *, seed: int, engine: Engine
) -> Path:
    """The folder of the pre-trained base model; made on the first call (all ranks call).

    What is unfinished lies beside it under a hidden name, and the next call goes on from there.

    Args:
        world: its corpus is what the model is pre-trained on.
        texts: the tasks' texts, so that the tokenizer knows their words.
        cache_dir: one folder per (code, seed) is kept in it, on every machine.
        seed: of the world, the corpus and the weights.
        engine: the ranks that pre-train.

    Raises:
        Interrupted: a rank was told to stop; what was trained is saved.
    """
    digest = hashlib.sha256(str(seed).encode())
    digest.update("\n".join(texts).encode())
    for module in (__file__, world_module.__file__, pretraining_module.__file__):
        digest.update(Path(module).read_bytes())
    folder = cache_dir / f"tiny-t5-{digest.hexdigest()[:12]}"
    if all(engine.all_gather_object(folder.exists())):
        return folder
    unfinished = folder.with_name(f".{folder.name}")
    with engine.local_first("making the tokenizer"):
        if not unfinished.exists():
            new = unfinished.with_name(f"{unfinished.name}.new")
            train_tokenizer([*islice(world.corpus(seed), 6000), *texts]).save_pretrained(new)
            new.rename(unfinished)
        tokenizer = T5Tokenizer.from_pretrained(unfinished)
    config = T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **SHAPE)
    model = Pretraining(config, world, tokenizer, engine, seed=seed).run(unfinished / STATE)
    with engine.local_first("saving the pre-trained model"):
        if not folder.exists():
            with bars_on_terminals_alone():
                model.save_pretrained(unfinished)
            unfinished.rename(folder)
            (folder / STATE).unlink(missing_ok=True)
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
