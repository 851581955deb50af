"""The real files: row counts, label distributions and traps as their notes tell, and padding."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import cache
from itertools import chain

import datasets
import numpy as np
import pytest
import yaml

from pemt.config.schema import SourceConfig
from pemt.data import DataError, TrainBatches, collate, lengths_of, load_task_data
from pemt.data.local_files import read_rows
from pemt.model.tokenizer import load_tokenizer
from pemt.tasks import RowError, example_of, get_task, load_task_file

pytestmark = pytest.mark.real

CLASS_COUNTS = {
    ("superglue-cb", "superglue/CB/train.jsonl"): {"0": 115, "1": 119, "2": 16},
    ("superglue-cb", "superglue/CB/val.jsonl"): {"0": 23, "1": 28, "2": 5},
    ("superglue-rte", "superglue/RTE/train.jsonl"): {"0": 1249, "1": 1241},
    ("superglue-rte", "superglue/RTE/val.jsonl"): {"0": 146, "1": 131},
    ("rte", "superglue/RTE/val.jsonl"): {"0": 146, "1": 131},
    ("superglue-copa", "superglue/COPA/train.32shot.jsonl"): {"0": 14, "1": 18},
    ("superglue-copa", "superglue/COPA/dev32.jsonl"): {"0": 15, "1": 17},
    ("superglue-copa", "superglue/COPA/val.jsonl"): {"0": 55, "1": 45},
    ("superglue-wic", "superglue/WiC/train.32shot.jsonl"): {"0": 15, "1": 17},
    ("superglue-wic", "superglue/WiC/dev32.jsonl"): {"0": 16, "1": 16},
    ("superglue-wic", "superglue/WiC/val.jsonl"): {"0": 319, "1": 319},
    ("superglue-multirc", "superglue/MultiRC/train.32shot.jsonl"): {"0": 86, "1": 68},
    ("superglue-multirc", "superglue/MultiRC/dev32.jsonl"): {"0": 93, "1": 74},
    ("superglue-multirc", "superglue/MultiRC/val.jsonl"): {"0": 2773, "1": 2075},
    ("superglue-boolq", "superglue/BoolQ/train.32shot.jsonl"): {"0": 14, "1": 18},
    ("superglue-boolq", "superglue/BoolQ/dev32.jsonl"): {"0": 13, "1": 19},
    ("superglue-boolq", "superglue/BoolQ/val.slice.jsonl"): {"0": 744, "1": 1256},
    ("cola", "glue/CoLA/train.tsv"): {"0": 2528, "1": 6023},
    ("cola", "glue/CoLA/dev.tsv"): {"0": 322, "1": 721},
    ("mrpc", "glue/MRPC/train.tsv"): {"0": 1194, "1": 2473},
    ("mrpc", "glue/MRPC/dev.tsv"): {"0": 129, "1": 279},
    ("wnli", "glue/WNLI/train.tsv"): {"0": 323, "1": 312},
    ("wnli", "glue/WNLI/dev.tsv"): {"0": 40, "1": 31},
    ("sst2", "glue/SST-2/train.slice.tsv"): {"0": 8915, "1": 11085},
    ("sst2", "glue/SST-2/dev.tsv"): {"0": 428, "1": 444},
    ("qnli", "glue/QNLI/train.kshot.tsv"): {"0": 16, "1": 16},
    ("qnli", "glue/QNLI/train.slice.json"): {"0": 2545, "1": 2455},
    ("qqp", "glue/QQP/train.kshot.tsv"): {"0": 16, "1": 16},
    ("qqp", "glue/QQP/dev.kshot.tsv"): {"0": 16, "1": 16},
    ("qqp", "glue/QQP/train.slice.json"): {"0": 5747, "1": 3252},
    ("mnli", "glue/MNLI/train.kshot.tsv"): {"0": 16, "1": 16, "2": 16},
    ("mnli", "glue/MNLI/train.slice.json"): {"0": 2021, "1": 1997, "2": 1982},
    ("multi_nli", "glue/MNLI/train.kshot.tsv"): {"0": 16, "1": 16, "2": 16},
    ("paws", "paws/paws_qqp_dev_and_test.tsv"): {"0": 486, "1": 191},
    # Five classes of 200: two are negative, two positive, the middle one has no polarity.
    ("yelp_polarity", "yelp/dev.json"): {"0": 400, "1": 400, None: 200},
    ("yelp_polarity", "yelp/test.json"): {"0": 400, "1": 400, None: 200},
}
ANSWERABLE = {
    # (questions, those without an answer)
    ("squad", "squad/squad_v1_fixture.json"): (5, 0),
    ("squad", "squad/squad_v2_dev_slice.json"): (626, 333),
    ("squad", "squad/squad_v2_flat_sample.json"): (14, 6),
    ("newsqa", "mrqa/newsqa_sample.jsonl"): (17, 0),
    ("superglue-record", "superglue/ReCoRD/train.32shot.jsonl"): (32, 0),
    ("superglue-record", "superglue/ReCoRD/dev32.jsonl"): (32, 0),
}


# Folders that --data_dir takes as they are, with the files that it must find there.
FOLDERS = {
    ("superglue-cb", "superglue/CB"): ("train.jsonl", "val.jsonl"),
    ("superglue-rte", "superglue/RTE"): ("train.jsonl", "val.jsonl"),
    ("superglue-copa", "superglue/COPA"): ("train.32shot.jsonl", "val.jsonl"),
    ("superglue-wic", "superglue/WiC"): ("train.32shot.jsonl", "val.jsonl"),
    ("superglue-multirc", "superglue/MultiRC"): ("train.32shot.jsonl", "val.jsonl"),
    ("superglue-boolq", "superglue/BoolQ"): ("train.32shot.jsonl", "val.slice.jsonl"),
    ("superglue-record", "superglue/ReCoRD"): ("train.32shot.jsonl", "dev32.jsonl"),
    ("cola", "glue/CoLA"): ("train.tsv", "dev.tsv"),
    ("mrpc", "glue/MRPC"): ("train.tsv", "dev.tsv"),
    ("wnli", "glue/WNLI"): ("train.tsv", "dev.tsv"),
    ("sst2", "glue/SST-2"): ("train.slice.tsv", "dev.tsv"),
    ("stsb", "glue/STS-B"): ("train.tsv", "dev.tsv"),
    ("qqp", "glue/QQP"): ("train.slice.json", "dev.kshot.tsv"),
}
# Folders in which no file says that it is there to train, or to score on: a task's YAML does.
SLICES = {"train": ["train.slice.json"], "validation": ["train.kshot.tsv"]}
NAMED = {
    ("qnli", "glue/QNLI"): SLICES,
    ("mnli", "glue/MNLI"): SLICES,
    ("paws", "paws"): {split: ["paws_qqp_dev_and_test.tsv"] for split in ("train", "test")},
    ("yelp_polarity", "yelp"): {"train": ["dev.json"], "test": ["test.json"]},
    ("squad", "squad"): {
        "train": ["squad_v1_fixture.json", "squad_v2_dev_slice.json"],
        "validation": ["squad_v2_flat_sample.json"],
    },
    ("newsqa", "mrqa"): {split: ["newsqa_sample.jsonl"] for split in ("train", "test")},
}


@cache  # several tests want the same
def examples_of(shared, name, file):
    """Every row's example, None without gold label; a malformed row fails the test."""
    task = get_task(name)
    rows = list(read_rows(task, [shared / "data" / file]))
    assert not [(place, str(row)) for place, row in rows if isinstance(row, RowError)]
    return [example_of(task, row) for _, row in rows]


@pytest.mark.parametrize(("name", "file"), CLASS_COUNTS)
def test_labels_are_distributed_as_stated(shared, name, file):
    examples = examples_of(shared, name, file)
    assert Counter(e and e["target"] for e in examples) == CLASS_COUNTS[name, file]


@pytest.mark.parametrize(("name", "file"), ANSWERABLE)
def test_questions_and_their_answers_are_as_many_as_stated(shared, name, file):
    examples = examples_of(shared, name, file)
    assert (len(examples), examples.count(None)) == ANSWERABLE[name, file]
    assert all(e["references"] and all(e["references"]) for e in examples if e)


@pytest.mark.parametrize(
    ("file", "size", "mean"), [("train.tsv", 5749, 2.701), ("dev.tsv", 1500, 2.364)]
)
def test_similarity_scores_are_as_stated(shared, file, size, mean):
    task = get_task("stsb")
    scores = [
        float(row["label"]) for _, row in read_rows(task, [shared / "data/glue/STS-B" / file])
    ]
    assert (len(scores), min(scores), max(scores)) == (size, 0.0, 5.0)
    assert np.mean(scores) == pytest.approx(mean, abs=5e-4)
    targets = {e["target"] for e in examples_of(shared, "stsb", f"glue/STS-B/{file}")}
    assert targets == {f"{n / 5:.1f}" for n in range(26)}


def test_every_folder_is_covered(shared):
    data = shared / "data"
    folders = {str(path.parent.relative_to(data)) for path in data.rglob("*.*") if path.is_file()}
    assert folders - {".", "t5_tokenizer"} == {folder for _, folder in (*FOLDERS, *NAMED)}


def test_every_file_is_covered(shared):
    listed = {file for _, file in (*CLASS_COUNTS, *ANSWERABLE)}
    listed |= {"glue/STS-B/train.tsv", "glue/STS-B/dev.tsv"}
    files = (
        path for path in (shared / "data").rglob("*.*") if path.suffix not in (".md", ".model")
    )
    assert {str(path.relative_to(shared / "data")) for path in files} == listed


def test_multirc_groups_are_the_questions(shared):
    examples = examples_of(shared, "superglue-multirc", "superglue/MultiRC/val.jsonl")
    assert len({example["group"] for example in examples}) == 953


def test_traps_of_the_files(shared):
    # Unbalanced quotes do not swallow rows, the byte order mark no column, b'...' no letters.
    first = examples_of(shared, "mrpc", "glue/MRPC/train.tsv")[0]
    assert first["source"].startswith(
        'sentence1: Amrozi accused his brother , whom he called " the'
    )
    paws = examples_of(shared, "paws", "paws/paws_qqp_dev_and_test.tsv")[0]["source"]
    assert paws.startswith("sentence1: What were the major effects")
    yelp = examples_of(shared, "yelp_polarity", "yelp/dev.json")[0]["source"]
    assert "'greeted\" us at the door" in yelp
    assert "\\n" not in yelp


@pytest.fixture(scope="module")
def tokenizer(shared):
    return load_tokenizer(str(shared / "data" / "t5_tokenizer"))


def test_the_tokenizer_of_a_bare_sentencepiece_file_is_t5s(tokenizer):
    assert tokenizer.is_fast
    assert len(tokenizer) == 32_100
    assert tokenizer("translate English").input_ids == [13959, 1566, 1]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>"]) == [
        0,
        1,
        2,
        32_099,
    ]


def test_the_tokenizer_agrees_with_sentencepiece(shared, tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared / "data" / "t5_tokenizer" / "spiece.model"
    processor = sentencepiece.SentencePieceProcessor(str(path))
    for example in examples_of(shared, "mrpc", "glue/MRPC/dev.tsv"):
        assert tokenizer(example["source"]).input_ids == [*processor.encode(example["source"]), 1]


def in_all(shared, name, folder, files):
    """Labelled examples of some files, by target."""
    every = (e for file in files for e in examples_of(shared, name, f"{folder}/{file}") if e)
    return Counter(e["target"] for e in every)


def loaded(data, tokenizer):
    """Examples of a task's three sets, by target; one that is trained on every answer counts once."""
    every = [row for part in (data.train, data.validation, data.test) for row in part]
    targets = sorted({row["target"] for row in every})
    decoded = tokenizer.batch_decode(tokenizer(targets).input_ids, skip_special_tokens=True)
    written = dict(zip(targets, decoded, strict=True))  # as `references` are
    return Counter(row["target"] for row in every if written[row["target"]] == row["references"][0])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a task over a folder; what one has made of SST-2 others read, which takes seconds each time."""

    def of(name, data_dir=None):
        values = {"model_name_or_path": "m", "output_dir": "o", "bank_dir": "b"}
        folder = str(data_dir) if data_dir else None
        return SourceConfig(**values, task_name=name, data_dir=folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield of


# Seconds each, in formats that smaller ones have too.
LARGE = ("superglue-multirc", "qqp", "qnli", "mnli", "cola", "stsb", "sst2")


def large_in_soak(folders):
    return [
        pytest.param(*each, marks=pytest.mark.soak if each[0] in LARGE else ()) for each in folders
    ]


@pytest.mark.parametrize(("name", "folder"), large_in_soak(FOLDERS))
def test_a_folder_is_read_as_it_is(shared, tokenizer, config, name, folder):
    data = load_task_data(get_task(name), config(name, shared / "data" / folder), tokenizer)
    assert loaded(data, tokenizer) == in_all(shared, name, folder, FOLDERS[name, folder])
    assert min(len(data.validation), len(data.test)) >= 16


@pytest.mark.parametrize(("name", "folder"), large_in_soak(NAMED))
def test_files_of_any_name_are_read_by_a_task_that_names_them(
    shared, tokenizer, config, tmp_path, name, folder
):
    at, files = shared / "data" / folder, NAMED[name, folder]
    with pytest.raises(DataError, match=r"(no file of|found .*; train and at).*task_file"):
        load_task_data(get_task(name), config(name, at), tokenizer)
    absolute = {split: [str(at / file) for file in given] for split, given in files.items()}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "like": name, "files": absolute}))
    data = load_task_data(load_task_file(path), config("mine"), tokenizer)
    assert loaded(data, tokenizer) == in_all(
        shared, name, folder, chain.from_iterable(files.values())
    )


@pytest.fixture(scope="module")
def lengths(shared, tokenizer, config):
    """Source lengths of a task's training set, loaded as a run loads it."""

    def load(name, folder):
        given = config(name, shared / "data" / folder)
        return lengths_of(load_task_data(get_task(name), given, tokenizer).train)

    return {"rte": load("rte", "superglue/RTE"), "sst2": load("sst2", "glue/SST-2")}


@pytest.mark.parametrize("task", ["rte", "sst2"])
@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_padding_wastes_less_than_seven_percent(lengths, task, batch_size, micro_batches):
    train = TrainBatches(
        lengths[task],
        batch_size=batch_size,
        accumulation=micro_batches,
        world_size=1,
        rank=0,
        seed=42,
    )
    for epoch in range(3):
        assert train.waste([each for step in train.epoch(epoch) for each in step]) < 0.07


@pytest.mark.parametrize("task", ["rte", "sst2"])
@pytest.mark.parametrize("batch_size", [32, 128])
def test_batches_as_a_run_makes_them_waste_less_than_seven_percent(lengths, task, batch_size):
    default = next(f.default for f in fields(SourceConfig) if f.name == "pad_to_multiple_of")
    train = TrainBatches(
        lengths[task], batch_size=batch_size, accumulation=1, world_size=1, rank=0, seed=42
    )
    real = padded = 0
    for step in train.epoch(0):
        rows = [{"input_ids": [3] * lengths[task][i], "labels": [1]} for i in step[0]]
        mask = collate(rows, pad_token_id=0, pad_to_multiple_of=default)["attention_mask"]
        real, padded = real + int(mask.sum()), padded + mask.numel()
    assert 1 - real / padded < 0.07
