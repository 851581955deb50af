"""The demo's world, tokenizer, pre-training and report; the demo itself runs in `make demo`."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config

from pemt.demo import pretraining, run as demo_run, tiny_t5
from pemt.demo.report import HEAT_MAP, REPORT, Row, write_report
from pemt.demo.tasks import (
    KIND_OF,
    RELATED,
    SIZES,
    SOURCES,
    TARGETS,
    letter,
    register_tasks,
    write_task_files,
)
from pemt.demo.world import FACTS, World
from pemt.engine import Engine
from pemt.engine.signals import Interrupted
from pemt.tasks import get_task

SEED = 3


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(SEED)


@pytest.fixture(scope="module")
def files(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_task_files(world, folder, SEED)
    return folder


def rows(files: Path, task: str, split: str) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in (files / task / f"{split}.jsonl").read_text().splitlines()]


def test_a_world_follows_from_its_seed(world: World) -> None:
    assert World.make(SEED) == world
    assert World.make(SEED + 1) != world
    for fact, values in world.facts.items():
        assert sum(values.values()) * 2 == len(values), (
            f"{fact} does not hold for half of the names"
        )


def test_the_corpus_tells_true_facts(world: World) -> None:
    corpus = world.corpus(SEED)
    told = 0
    for _ in range(500):
        words = next(corpus).split()
        for fact, kind in KIND_OF.items():
            subjects = [word for word in words if word in world.facts[fact]]
            said = [value for value in (0, 1) if set(FACTS[kind][fact][value]) & set(words)]
            if subjects and said:
                told += 1
                assert said == [world.facts[fact][subjects[0]]]
    assert told > 400


@pytest.mark.parametrize("task", [*SOURCES, *TARGETS])
def test_splits_are_disjoint_and_labels_balanced(files: Path, task: str) -> None:
    texts = Counter()
    for split, size in zip(
        ("train", "validation", "test"),
        SIZES["source" if task in SOURCES else "target"],
        strict=True,
    ):
        found = rows(files, task, split)
        assert len(found) == size
        texts.update(str(row["text"]) for row in found)
        assert 0.35 < np.mean([row["label"] for row in found]) < 0.65
    assert max(texts.values()) == 1


def test_no_target_text_looks_like_a_source(files: Path) -> None:
    sources = {str(row["text"]) for task in SOURCES for row in rows(files, task, "train")}
    for target in TARGETS:
        assert not sources & {str(row["text"]) for row in rows(files, target, "test")}


@pytest.mark.parametrize("target", TARGETS)
def test_the_related_fact_decides_a_target(world: World, target: str) -> None:
    draw = random.Random(0)
    fact = RELATED[target]
    for _ in range(50):
        text, label = letter(world, target, draw)
        deciding = [name for name in text.split() if name in world.facts[fact]]
        votes = Counter(world.facts[fact][name] for name in deciding)
        assert votes[label] >= 2


def test_corruption_hides_a_fifth_and_loses_nothing() -> None:
    draw = np.random.default_rng(0)
    vocabulary = 100
    for length in range(4, 30):
        ids = list(range(2, 2 + length))
        row = pretraining.corrupted(ids, draw, vocabulary)
        pieces, rest = row["labels"], []
        for token in row["input_ids"][:-1]:
            if token < vocabulary - tiny_t5.SENTINELS:
                rest.append(token)
                continue
            while pieces and pieces[0] < vocabulary - tiny_t5.SENTINELS and pieces[0] != 1:
                rest.append(pieces.pop(0))
            if len(pieces) > 1:
                assert pieces.pop(0) == token - 1, "sentinels count down"
        assert rest == ids
        assert pieces == [1]


def test_every_word_of_the_tasks_is_one_token(world: World, files: Path) -> None:
    texts = [
        str(row["text"]) for task in (*SOURCES, *TARGETS) for row in rows(files, task, "train")
    ]
    corpus = world.corpus(SEED)
    tokenizer = tiny_t5.train_tokenizer([*(next(corpus) for _ in range(3000)), *texts])
    for text in texts[::100]:
        assert len(tokenizer(text).input_ids) == len(text.split()) + 1
    ids = tokenizer(f"{texts[0]} <extra_id_0> .").input_ids
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1 == max(ids)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(demo_run.Demo(tmp_path / "out", tmp_path / "cache", SEED).source(SOURCES[0]))


def test_pretraining_learns_and_is_cached(
    world: World,
    tmp_path: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretraining, "STEPS", 50)
    monkeypatch.setattr(pretraining, "BATCH", 16)
    corpus = world.corpus(0)
    texts = [next(corpus) for _ in range(100)]
    folder = tiny_t5.cached_base(world, texts, tmp_path, seed=SEED, engine=engine)
    losses = re.findall(r"step (\d+)/50, loss ([\d.]+)", capsys.readouterr().out)
    assert [int(step) for step, _ in losses] == [10, 20, 30, 40, 50]
    assert float(losses[-1][1]) < 4.5, "no better than guessing among all words"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_t5.cached_base(world, texts, tmp_path, seed=SEED, engine=engine) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.glob("*tiny-t5*")] == [folder.name]
    assert not (folder / tiny_t5.STATE).exists()


def test_a_killed_pretraining_goes_on_to_the_same_model(
    world: World, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "STEPS", 6)
    monkeypatch.setattr(pretraining, "STEPS_A_SAVE", 2)
    taken: list[int] = []
    real = pretraining.Pretraining._take_step

    def step(self: Any, rows: Any, step: int, *, stop: bool) -> tuple[float, bool]:
        taken.append(step)
        return real(self, rows, step, stop=stop)

    def made(name: str) -> dict[str, Tensor]:
        base = tiny_t5.cached_base(world, ["a b"], tmp_path / name, seed=SEED, engine=engine)
        return load_file(base / "model.safetensors")

    monkeypatch.setattr(pretraining.Pretraining, "_take_step", step)
    whole = made("whole")

    def killed(self: Any, rows: Any, number: int, *, stop: bool) -> tuple[float, bool]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, rows, number, stop=stop)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Pretraining, "_take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            made("cut")
    taken.clear()
    cut = made("cut")
    assert taken == [3, 4, 5, 6]
    assert cut.keys() == whole.keys()
    assert all(cut[name].equal(whole[name]) for name in whole)


def test_told_to_stop_pretraining_saves_and_leaves(
    world: World, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "STEPS", 6)
    real = pretraining.clip_grad_norm_

    def told(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(pretraining, "clip_grad_norm_", told)
    with pytest.raises(Interrupted):
        tiny_t5.cached_base(world, ["a b"], tmp_path, seed=SEED, engine=engine)
    (state,) = tmp_path.glob(f".tiny-t5-*/{tiny_t5.STATE}")
    # told in the first step, heard of in the second
    assert torch.load(state, weights_only=True)["step"] == 2


def test_shares_of_a_batch_give_the_gradient_of_the_whole(
    world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two ranks one after the other: what each would add to the sum."""
    corpus = world.corpus(0)
    tokenizer = tiny_t5.train_tokenizer([next(corpus) for _ in range(500)])
    shape = {**tiny_t5.SHAPE, "num_layers": 1, "vocab_size": len(tokenizer), "dropout_rate": 0.0}

    sent: list[Tensor] = []

    def send(gradients_G: Tensor) -> Tensor:
        sent.append(gradients_G.clone())
        return gradients_G

    def summed(ranks: int) -> Tensor:
        total = torch.zeros(())
        for rank in range(ranks):
            one = SimpleNamespace(rank=rank, world_size=ranks, device=engine.device, sum=send)
            made = pretraining.Pretraining(T5Config(**shape), world, tokenizer, one, seed=0)
            made._take_step(next(made._batches(0)), 1, stop=False)
            total = total + sent.pop()
        return total

    whole = summed(1)
    assert whole[:-2].abs().max() > 0
    torch.testing.assert_close(summed(3), whole, rtol=1e-4, atol=1e-6)


def test_tasks_are_known(files: Path) -> None:
    register_tasks()
    assert get_task("diet").labels == ("grass", "meat")
    assert get_task("stable").labels == get_task("diet").labels


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(zip(SOURCES, [0.7, 0.1, 0.1, 0.1], strict=True))
    gates = {f"{stack}/{layer}": weights for stack in ("encoder", "decoder") for layer in range(3)}
    found = [
        Row(
            method=method,
            target=target,
            seed=seed,
            accuracy=accuracy + seed,
            gate_weights=weights if method == "pemt" else {},
            gates=gates if method == "pemt" else {},
        )
        for target in TARGETS
        for seed in (0, 2)
        for method, accuracy in (("pemt", 90.0), ("adapter", 80.0), ("uniform", 85.0))
    ]
    write_report(found, {"diet": 99.5, "size": 48.5}, tmp_path)
    content = json.loads((tmp_path / REPORT).read_text())
    assert content["mean_gain"] == 10.0
    assert content["summary"][0]["pemt"] == 91.0
    assert content["summary"][0]["uniform"] == 86.0
    assert content["sources"] == {"diet": 99.5, "size": 48.5}
    assert len(content["rows"]) == 12
    assert (tmp_path / HEAT_MAP).read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "stable" in output
    assert "0.70*" in output
    assert "diet 99.5, size 48.5" in output
