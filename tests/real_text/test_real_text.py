"""The real-text experiment: what it pre-trains on, and all its parts once in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pemt.checkpoint import RESULTS
from pemt.demo.evidence_report import OUTCOMES
from pemt.tasks import get_task
from tests.real_text import __main__ as command, pretraining, rows, texts

pytestmark = [pytest.mark.real, pytest.mark.soak]


@pytest.fixture
def data(shared: Path) -> Path:
    return shared / "data"


def test_no_test_text_is_pre_trained_on(data: Path) -> None:
    learned = set(texts.plain_texts(data))
    for each in (*texts.SOURCES, *texts.TARGETS):
        if each.test is not None:
            held_out = texts.examples_of(get_task(each.name), data / each.test)
            shared = {source for source, _ in held_out} & learned
            # CoLA has 16 sentences in both of its files
            assert len(shared) == (16 if each.name == "cola" else 0), (each.name, shared)
    assert len(learned) > 60_000


def test_words_and_classes_belong_together(data: Path) -> None:
    for each in (*texts.SOURCES, *texts.TARGETS):
        known = [answer for _, answer in texts.examples_of(get_task(each.name), data / each.train)]
        ours = each.examples(data / each.train)
        words = dict(zip(get_task(each.name).labels, each.labels, strict=True))
        assert [answer for _, answer in ours] == [words[answer] for answer in known]
        assert all(source.endswith(" <extra_id_0>") for source, _ in ours)
        # the files' first rows: 0, 1, not_entailment
        first = {"sst2": "terrible", "mrpc": "yes", "superglue-rte": "no"}
        assert ours[0][1] == first.get(each.name, ours[0][1])


def test_the_cut_tokenizer_is_t5s_own(data: Path) -> None:
    sentences = ["It was a great film.", "The same question, asked in another way?"] * 3
    whole = pretraining.load_tokenizer(str(data / "t5_tokenizer"))
    cut = pretraining.cut_tokenizer(data / "t5_tokenizer", sentences)
    for sentence in sentences:
        assert cut.tokenize(sentence) == whole.tokenize(sentence)
    assert cut("<extra_id_0>").input_ids == [len(cut) - 1, 1]
    assert len(cut) < 300


def test_every_part_once_in_small(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "STEPS", 3)
    monkeypatch.setattr(pretraining, "SUPERVISED", {"superglue-cb": "superglue/CB/train.jsonl"})
    monkeypatch.setattr(pretraining, "SHAPE", {**pretraining.SHAPE, "d_model": 32, "d_ff": 64})
    few = texts.plain_texts(data)[:500]
    monkeypatch.setattr(pretraining, "plain_texts", lambda _: few)
    short: dict[str, Any] = {"max_steps": 2, "max_eval_samples": 8}
    for fields in (rows.SOURCE, rows.ADAPT):
        for key, value in short.items():
            monkeypatch.setitem(fields, key, value)
    monkeypatch.setitem(rows.SOURCE, "expert.rank", 4)
    for module in (rows, command):
        monkeypatch.setattr(module, "TARGETS", texts.TARGETS[:2])
    monkeypatch.setattr(rows, "SEEDS", (0, 1))
    monkeypatch.setattr(rows, "LEARNING_RATES", (1e-3, 1e-2))
    arguments = [str(data), "--output_dir", str(tmp_path), "--rows", "pemt", "adapter"]
    assert command.main(arguments) == 0
    outcomes = json.loads((tmp_path / OUTCOMES).read_text())
    assert len(outcomes) == 2 * 2 * 2  # rows, targets, seeds
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(RESULTS)}
    assert len(written) == 4 + 2 * 2 * 3  # sources; rows, targets, two trials and a second seed
    assert command.main(arguments) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob(RESULTS)} == written
