"""Which file is which split: names that data sets use are found or told; two candidates are refused."""

from __future__ import annotations

import io
import json
import sys

import datasets
import numpy as np
import pytest

from pemt.data import DataError, local_files, read_inputs, sources_of, splits
from pemt.data.examples import locate_data
from pemt.data.local_files import find_files, read_rows
from pemt.data.to_predict import TEXT
from pemt.tasks import RowError, Task, example_of, get_task
from tests.data.test_splits import RTE, examples, sources


def made(folder, *names, content=""):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def found_in(folder, task="rte"):
    files, notes = find_files(get_task(task), folder)
    names = {
        split: [str(path.relative_to(folder)) for path in paths] for split, paths in files.items()
    }
    return names, " | ".join(notes).replace(f"{folder}/", "")


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "development", "eval"])
@pytest.mark.parametrize(
    "form", ["{}.jsonl", "{}.csv.gz", "my-{}.json", "{}-v2.0.json", "{}/a.tsv"]
)
@pytest.mark.parametrize("case", [str.lower, str.upper, str.capitalize])
def test_a_validation_set_is_found_by_any_of_its_names(tmp_path, word, form, case):
    form = form.replace("{}", case(word))
    made(tmp_path, "train.jsonl", "test.jsonl", form, "README.md", "eval.py", ".train.jsonl.swp")
    names, notes = found_in(tmp_path)
    assert names == {"train": ["train.jsonl"], "validation": [form], "test": ["test.jsonl"]}
    assert "not read" not in notes


def test_a_folder_that_is_no_split_is_not_looked_into(tmp_path, monkeypatch):
    made(tmp_path, "train.jsonl", "dev.jsonl", "train_images/a.csv", "dev/readme")
    looked, entries = [], local_files.entries

    def noting(folder):
        looked.append(folder.name)
        return entries(folder)

    monkeypatch.setattr(local_files, "entries", noting)
    assert found_in(tmp_path)[0] == {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}
    assert "dev" in looked
    assert "train_images" not in looked


def test_eval_is_told_and_is_the_test_set_beside_a_validation_set(tmp_path):
    made(tmp_path, "train.csv", "eval.csv")
    assert found_in(tmp_path)[1] == "rte: eval.csv is read as validation"
    made(tmp_path, "valid.csv")
    names, notes = found_in(tmp_path)
    assert (names["validation"], names["test"]) == (["valid.csv"], ["eval.csv"])
    assert notes == "rte: eval.csv is read as test"
    made(tmp_path, "test.csv")
    assert "not read in" in found_in(tmp_path)[1]
    assert ": eval.csv;" in found_in(tmp_path)[1]


@pytest.mark.parametrize(
    ("names", "several"),
    [
        (["train.csv", "valid.csv", "dev.csv"], "dev.csv, valid.csv"),
        (["train.csv", "val.jsonl", "validation.csv"], "val.jsonl, validation.csv"),
        (["train.csv", "Train.CSV", "dev.csv"], "Train.CSV, train.csv"),
        (["train.csv", "train.csv.gz", "dev.csv"], "train.csv, train.csv.gz"),
        (["train.csv", "train/a.csv", "dev.csv"], "train.csv, train"),
        (["a_train.csv", "b_train.csv", "dev.csv"], "a_train.csv, b_train.csv"),
        (["train1.csv", "train2.csv", "dev.csv"], "train1.csv, train2.csv"),
        (["train/a.csv", "train/b.json", "dev.csv"], "a.csv, b.json"),
        (["train-00000-of-00002.parquet"], "1 of 2 shards"),
        (["train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"], "2 of 1 shards"),
        (["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"], "another count"),
    ],
)
def test_two_candidates_for_a_split_and_missing_shards_are_refused(tmp_path, names, several):
    made(tmp_path, *names)
    with pytest.raises(DataError, match=several):
        found_in(tmp_path)


@pytest.mark.parametrize(
    ("names", "read", "told"),
    [
        (["train.csv", "dev.csv", "train_unlabelled.csv"], ["train.csv", "dev.csv"], "train_unl"),
        (["train.csv", "dev.csv", "test.xlsx"], ["train.csv", "dev.csv"], "test.xlsx"),
        (["train.csv", "dev.csv", "dev_and_test.csv"], ["train.csv", "dev.csv"], "dev_and_test"),
        (["train.csv", "dev_matched.csv", "dev_mismatched.csv"], ["train.csv", "dev_matched.csv"], "dev_mism"),
        (["train.csv", "val.csv", "dev32.csv"], ["train.csv", "val.csv"], "dev32.csv"),
        (["train-clean.csv", "dev.csv"], ["train-clean.csv", "dev.csv"], "train-clean.csv is read as train"),
        (["snli_1.0_train.jsonl", "snli_1.0_train.txt", "snli_1.0_dev.jsonl"],
         ["snli_1.0_train.jsonl", "snli_1.0_dev.jsonl"], "snli_1.0_train.txt"),
        (["train.tsv", "dev.tsv", "dev_ids.tsv", "msr_paraphrase_train.txt"],
         ["train.tsv", "dev.tsv"], "dev_ids.tsv, msr_paraphrase_train.txt"),
        (["train_xl.jsonl", "train_l.jsonl", "train_xs.jsonl", "dev.jsonl"],
         ["train_xl.jsonl", "dev.jsonl"], "train_l.jsonl, train_xs.jsonl"),
        (["train_s.jsonl", "train_xs.jsonl", "dev.jsonl"], ["train_s.jsonl", "dev.jsonl"], "train_xs"),
    ],
)  # fmt: skip
def test_what_looks_like_a_split_and_is_not_read_is_told(tmp_path, names, read, told):
    made(tmp_path, *names)
    files, notes = found_in(tmp_path)
    assert [name for each in files.values() for name in each] == read
    assert told in notes


def test_words_within_words_are_no_splits(tmp_path):
    made(tmp_path, "train.csv", "dev.csv", "www_farodevigo_es.csv", "contest.csv", "strain.csv")
    assert found_in(tmp_path) == ({"train": ["train.csv"], "validation": ["dev.csv"]}, "")


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("sst2", "SST-2"), ("stsb", "STS-B"), ("cola", "CoLA"), ("rte", "RTE"), ("superglue-rte", "RTE"),
        ("superglue-wsc-fixed", "WSC"), ("superglue-boolq", "BoolQ"), ("snli", "snli_1.0"),
        ("multi_nli", "multinli_1.0"), ("winogrande", "winogrande_1.1"), ("mrpc", "data"),
        ("scitail", "SciTailV1.1/snli_format"), ("superglue-cb", "cb"), ("mnli", "data/MNLI"),
    ],
)  # fmt: skip
def test_folders_of_the_tasks_own_name_are_read_and_told(tmp_path, task, folder):
    other = "SciTailV1.1/tsv_format/x_train.tsv"
    made(tmp_path, f"{folder}/train.jsonl", f"{folder}/dev/a.jsonl", "WNLI/train.tsv", other)
    names, notes = found_in(tmp_path, task)
    assert names == {"train": [f"{folder}/train.jsonl"], "validation": [f"{folder}/dev/a.jsonl"]}
    assert f"data_dir: read {folder.split('/')[0]}" in notes


def test_two_folders_of_one_name_are_refused(tmp_path):
    made(tmp_path, "SST-2/train.tsv", "sst2/train.tsv")
    with pytest.raises(DataError, match="could both be sst2"):
        found_in(tmp_path, "sst2")


def test_shards_of_the_hub_and_what_save_to_disk_leaves(tmp_path):
    shards = [f"data/train-0000{n}-of-00002-9f8e7d.parquet" for n in range(2)]
    made(tmp_path, *shards, "data/validation-00000-of-00001-12ab.parquet", "README.md")
    names, _ = found_in(tmp_path)
    assert names["train"] == shards
    saved = tmp_path / "saved"
    parts = {name: datasets.Dataset.from_list([{"text": "a"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(saved)
    arrow = "data-00000-of-00001.arrow"
    assert found_in(saved)[0] == {"train": [f"train/{arrow}"], "test": [f"test/{arrow}"]}


def test_a_single_file_is_train_whatever_its_name(tmp_path):
    made(tmp_path, "reviews.csv", "README.md")
    assert found_in(tmp_path) == (
        {"train": ["reviews.csv"]},
        "rte: reviews.csv is the only file: it is train",
    )
    with pytest.raises(DataError, match=r"validation_split=0\.1 takes them from train"):
        splits.check_splits(RTE, {"train"})


@pytest.mark.parametrize(
    ("rows", "share", "sizes"), [(100, 0.2, (80, 10, 10)), (7, 0.5, (4, 2, 1))]
)
def test_validation_split_draws_by_seed_and_class(rows, share, sizes):
    classes = ("0", "1", "1", "1")
    train = examples(rows, classes=classes)
    parts, again, other = (
        splits.split(RTE, {"train": train}, seed, share)[0] for seed in (1, 1, 2)
    )
    assert tuple(len(parts[name]) for name in ("train", "validation", "test")) == sizes
    assert sorted(s for part in parts.values() for s in part["source"]) == sorted(train["source"])
    assert sources(parts["test"]) == sources(again["test"])
    assert rows < 50 or sources(parts["test"]) != sources(other["test"])
    for part in parts.values():
        share_of_0 = np.mean(np.array(part["target"][:]) == "0")
        assert abs(share_of_0 - np.mean(np.array(train["target"][:]) == "0")) <= 1 / len(part)
    given = {"train": train, "test": examples(5, start=1000)}
    three, _ = splits.split(RTE, given, 1, share)
    assert sources(three["test"]) == sources(given["test"])
    with pytest.raises(DataError, match="has a validation set; leave one of them out"):
        splits.check_splits(RTE, {*given, "validation"}, share)


def test_a_class_of_one_example_stays_in_train():
    train = examples(40, classes=("0",) * 39 + ("1",))
    for seed in range(10):
        parts, _ = splits.split(RTE, {"train": train}, seed, 0.5)
        assert "1" in parts["train"]["target"][:]


SCITAIL = {
    "scitail_1.0_train.tsv": "P one .\tH one .\tentails\nP two .\tH two .\tneutral\n",
    "scitail_1.0_structure_train.tsv": "P one .\tH one .\tentails\tH<>one\nP two .\tH two .\tneutral\tH<>two\n",
    "scitail_1.0_train.txt": "".join(
        json.dumps({"gold_label": label, "sentence1": f"P {n} .", "sentence2": f"H {n} ."}) + "\n"
        for n, label in (("one", "entailment"), ("two", "neutral"))
    ),
    "train.tsv": "premise\thypothesis\tlabel\nP one .\tH one .\tentails\nP two .\tH two .\tneutral\n",
}


@pytest.mark.parametrize("name", SCITAIL)
def test_scitails_official_layouts_give_the_same_examples(tmp_path, name):
    made(tmp_path, name, content=SCITAIL[name])
    task = get_task("scitail")
    rows = [row for _, row in read_rows(task, find_files(task, tmp_path)[0]["train"])]
    found = [example_of(task, row) for row in rows]
    assert [(each["source"], each["target"]) for each in found] == [
        ("premise: P one . hypothesis: H one .", "0"),
        ("premise: P two . hypothesis: H two .", "1"),
    ]


def test_a_header_is_known_by_any_name_that_the_task_has(tmp_path):
    made(tmp_path, "train.tsv", content="gold_label\tsentence1\tsentence2\nneutral\ta\tb\n")
    ((_, row),) = read_rows(get_task("scitail"), [tmp_path / "train.tsv"])
    assert (row["gold_label"], row["sentence1"]) == ("neutral", "a")


def test_notes_on_files_and_columns_reach_the_run(tmp_path):
    made(tmp_path, "train.tsv", "valid.tsv", content='text\tlabel\n"a ""b"""\tno\n')
    made(tmp_path, "train_small.tsv")
    task = Task(
        name="t", description="D.", template="{text}", labels=("no", "yes"), metrics=("accuracy",)
    )
    notes = locate_data(task, str(tmp_path)).notes
    assert [each for each in notes if "train_small.tsv" in each]
    assert [each for each in notes if "the quotes around 1 fields are syntax" in each]


# Columns that have the names of our own keys


OWN = ("input", "prediction", "label", "target", "source", "references", "group", "problem", "idx")


def own_task(template, **more):
    return Task(
        name="t", description="D.", template=template, label="output", metrics=("squad",), **more
    )


@pytest.mark.parametrize("name", OWN)
def test_a_column_of_our_own_name_is_a_column(name, tmp_path):
    task = own_task("{instruction} {" + name + "}")
    row = {"instruction": "Do.", "output": "red", **{each: f"<{each}>" for each in OWN}}
    assert example_of(task, row)["source"] == f"Do. <{name}>"
    assert list(sources_of(task, row)) == [f"Do. <{name}>"]
    assert list(sources_of(own_task("{instruction}"), row)) == ["Do."]


def test_a_whole_text_counts_only_where_the_template_has_no_field_of_the_row(monkeypatch):
    task = own_task("{instruction} {context}")
    assert list(sources_of(task, {"input": "whole", "label": "x"})) == ["whole"]
    with pytest.raises(RowError, match="field 'context' is missing; found: instruction, input"):
        list(sources_of(task, {"instruction": "Do.", "input": ""}))
    lines = '{"instruction": "Do.", "context": "C", "input": ""}\n{"input": "whole"}\n'
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(lines.encode("utf-16"))))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_inputs(task, "-") == ["Do. C", "whole"]
    assert TEXT == "input"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("squad", {"question": "Q?", "context": "C", "header": "h", "qas": "x", "paragraphs": 3}),
        ("newsqa", {"question": "Q?", "context": "C", "header": {"dataset": "x"}}),
        ("triviaqa", {"question": "Q?", "header": "h"}),
        ("superglue-multirc", {"question": "Q?", "answer": "A", "paragraph": "P", "passage": "x"}),
        ("superglue-record", {"query": "@placeholder", "passage": "P", "entities": ["P"], "qas": 1}),
        ("yelp_polarity", {"text": "Good.", "ori": "x"}),
        (
            "superglue-wsc-fixed",
            {"text": "Ann said she ran.", "span1_index": 0, "span1_text": "Ann", "span2_index": 2,
             "span2_text": "she", "target": "x"},
        ),
    ],
)  # fmt: skip
def test_rows_with_the_hubs_fields_pass_whatever_else_they_have(task, row):
    task = get_task(task)
    (text,) = sources_of(task, {**row, "input": ""})
    assert text
