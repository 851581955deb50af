"""The demo's world, tokenizer, pre-training and report; the demo itself runs in `make demo`."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pemt.demo import tiny_t5
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
        row = tiny_t5.corrupted(ids, draw, vocabulary)
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


def test_pretraining_learns_and_is_cached(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_t5, "STEPS", 50)
    lines: list[str] = []
    corpus = world.corpus(0)
    texts = [next(corpus) for _ in range(100)]
    folder = tiny_t5.cached_base(world, texts, tmp_path, seed=SEED, say=lines.append)
    assert float(lines[-1].split("loss ")[1]) < 4.5, "no better than guessing among all words"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_t5.cached_base(world, texts, tmp_path, seed=SEED, say=lines.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_tasks_are_known(files: Path) -> None:
    register_tasks()
    assert get_task("diet").labels == ("grass", "meat")
    assert get_task("stable").labels == get_task("diet").labels


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = [[0.7, 0.1, 0.1, 0.1]] * 6
    found = [
        Row(
            method=method,
            target=target,
            seed=seed,
            accuracy=accuracy + seed,
            gate_weights=dict(zip(SOURCES, gates[0], strict=True)) if method == "pemt" else {},
            gates_LK=gates if method == "pemt" else [],
        )
        for target in TARGETS
        for seed in (0, 2)
        for method, accuracy in (("pemt", 90.0), ("adapter", 80.0))
    ]
    write_report(found, tmp_path)
    content = json.loads((tmp_path / REPORT).read_text())
    assert content["mean_gain"] == 10.0
    assert content["summary"][0]["pemt"] == 91.0
    assert len(content["rows"]) == 8
    assert (tmp_path / HEAT_MAP).read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "stable" in output
    assert "0.70*" in output
