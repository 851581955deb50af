"""What a label of a row means, whatever made it, in every order of the task's labels."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from pemt.data.formats import read_records
from pemt.tasks import RowError, Task, TaskError, example_of, load_task_file, source_of

PAIRS = (
    ("true", "false"),
    ("True", "False"),
    ("yes", "no"),
    ("Yes", "No"),
    ("on", "off"),
    ("Y", "N"),
    ("t", "f"),
    ("1", "0"),
)
TRUE = (True, "True", "TRUE", "true", np.True_, np.array(True), pa.scalar(True), torch.tensor(True))
FALSE = (False, "False", "FALSE", "false", np.False_, pa.scalar(False))


def own(*labels: str, names: tuple[str, ...] = (), **changes) -> Task:
    return Task(
        name="own",
        description="D.",
        template="text: {text}",
        labels=labels,
        label_names=names,
        metrics=("accuracy",),
        **changes,
    )


def target(task: Task, label: object) -> str:
    example = example_of(task, {"text": "t", "label": label})
    assert example is not None
    return example["target"]


@pytest.mark.parametrize("pair", PAIRS)
def test_true_and_false_are_the_labels_that_say_so_in_every_order(pair):
    for order in itertools.permutations((*pair, "unknown")):
        for labels in (order, tuple(each for each in order if each != "unknown")):
            for label in TRUE:
                assert target(own(*labels), label) == pair[0], (labels, label)
            for label in FALSE:
                assert target(own(*labels), label) == pair[1], (labels, label)
    named = own("A", "B", names=pair)
    assert (target(named, True), target(named, "False")) == ("A", "B")
    named = own("A", "B", names=pair[::-1])
    assert (target(named, True), target(named, "False")) == ("B", "A")


def test_a_boolean_that_no_label_says_is_refused():
    for labels in (("ham", "spam"), ("yes", "maybe"), ("1", "2"), ("a", "b", "c")):
        for label in (True, "False", np.True_):
            with pytest.raises(RowError, match=r"unknown label .*; `label_names` may say which"):
                example_of(own(*labels), {"text": "t", "label": label})
    with pytest.raises(RowError, match="may mean 'True' or 'true'"):
        target(own("True", "true"), True)
    assert target(own("True", "true"), "true") == "true"
    with pytest.raises(RowError, match="True may mean 'yes' or 'on'"):
        target(own("yes", "no", "on", "off"), True)


@pytest.mark.parametrize(
    "label", [1, 1.0, "1", "1.0", " 1 ", np.int8(1), np.float32(1), pa.scalar(1), Decimal("1.0")]
)
def test_a_number_is_the_label_of_that_name_before_it_is_a_class_id(label):
    assert target(own("1", "0"), label) == "1"
    assert target(own("0", "1"), label) == "1"
    assert target(own("2", "1.0"), label) == "1.0"
    assert target(own("a", "b", names=("1", "0")), label) == "a"
    assert target(own("a", "b"), label) == "b"
    assert target(own("false", "true"), label) == "true"
    for labels in (("true", "false"), ("yes", "no"), ("Y", "N", "?")):
        with pytest.raises(RowError, match=r"may mean '.*' or '.*'; .*`label_names`"):
            target(own(*labels), label)
    assert target(own("true", "false", names=("0", "1")), label) == "false"
    with pytest.raises(RowError, match="unknown label"):
        target(own("a", "2"), label)


@pytest.mark.parametrize(
    "label", [2, -1, -1.0, "-1", 0.5, float("nan"), float("inf"), "", "b ad", None, [1], "0x1"]
)
def test_what_is_no_label_is_refused(label):
    for labels in (("a", "b"), ("0", "1"), ("1", "0"), ("no", "yes")):
        with pytest.raises(RowError):
            target(own(*labels), label)


def test_labels_that_mean_none_are_left_out_when_they_are_named():
    task = own("a", "b", no_label=("-1", "null", "nan", ""))
    for label in (-1, -1.0, "-1", np.int64(-1), None, float("nan"), " "):
        assert example_of(task, {"text": "t", "label": label}) is None
    with pytest.raises(RowError, match=r'no_label: \["-1"\]'):
        target(own("a", "b"), -1)
    with pytest.raises(RowError, match=r"field 'label' is missing \(it is null\)"):
        target(own("a", "b"), None)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ((True, False), (), "labels: found True, a bool; give texts, in quotes"),
        ((0, 1), (), "labels: found 0, a int"),
        (("a", "b"), ("x", None), "label_names: found None"),
        (("a", "b"), ("x", "x"), "label_names: a label stands twice"),
        (("0", "1"), ("1", "2"), "label_names: '1' is what files call '0', and a label of another"),
    ],
)
def test_labels_that_would_mean_two_things_are_refused(labels, names, message):
    with pytest.raises(TaskError, match=message):
        own(*labels, names=names)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[yes, no]", "put yes, no, true and false in quotes"),
        ("[True, other]", "in quotes"),
        ("[null, x]", "null, dates"),
        ("[1.0, 2.0]", "numbers with a point"),
        ("[2024-01-01, x]", "dates"),
        ("[010, 1]", "in quotes where YAML reads 010 as 8"),
        ("[1_0, 2]", "1_0 as 10"),
        ("[1:30, 2]", "1:30 as 90"),
    ],
)
def test_a_label_that_yaml_reads_as_something_else_is_refused(tmp_path, written, found):
    path = tmp_path / "task.yaml"
    head = 'name: n\ndescription: d\ntemplate: "{t}"\nmetrics: [accuracy]\n'
    path.write_text(f"{head}labels: {written}\n")
    with pytest.raises(TaskError, match=f"labels: .*{found}"):
        load_task_file(path)
    path.write_text(f'{head}labels: ["010", 1, "yes"]\n')
    assert load_task_file(path).labels == ("010", "1", "yes")


def test_files_of_every_kind_give_the_same_labels(tmp_path):
    values = [True, False, True]
    texts = ["a", "b", "c"]
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": t, "label": v}) + "\n" for t, v in zip(texts, values, strict=True)
        )
    )
    for name, sign in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [f"{t}{sign}{v}" for t, v in zip(texts, values, strict=True)]
        (tmp_path / name).write_text("\n".join([f"text{sign}label", *lines]) + "\n")
    for name, column in (
        ("bool.parquet", pa.array(values)),
        ("text.parquet", pa.array(["True", "False", "true"])),
        ("bytes.parquet", pa.array([b"true", b"false", b"true"])),
        ("dictionary.parquet", pa.array(["true", "false", "true"]).dictionary_encode()),
    ):
        parquet.write_table(pa.table({"text": texts, "label": column}), tmp_path / name)
    for file in sorted(tmp_path.iterdir()):
        for labels in (("true", "false"), ("false", "true")):
            rows = [row for _, row in read_records(file)]
            found = [example_of(own(*labels), row)["target"] for row in rows]
            assert found == ["true", "false", "true"], (file.name, labels)


def test_a_row_from_numpy_or_arrow_is_as_good_as_one_of_json():
    task = Task(name="o", description="D.", template="{n} of {of}", metrics=("squad",))
    row = {"n": np.int64(3), "of": pa.scalar(1.5), "label": np.array(["a", "b"])}
    example = example_of(task, row)
    assert (example["source"], example["references"]) == ("3 of 1.5", ["a", "b"])
    assert source_of(task, {"n": b"x", "of": np.float32(0.5)}) == "x of 0.5"
    score = Task(
        name="s", description="D.", template="{n}", score_step=0.5, metrics=("pearson_spearman",)
    )
    assert example_of(score, {"n": "a", "label": np.float64(2.4)})["target"] == "2.5"
    for label in (True, "True", "1_0", "nan", None):
        with pytest.raises(RowError):
            example_of(score, {"n": "a", "label": label})
