"""A task described in YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from pemt.tasks import HubSource, TaskError, get_task, load_task_file, task_names
from pemt.tasks.task_file import task_text

GOOD = """
name: tickets
description: Decide which team a support ticket belongs to.
template: "subject: {subject} text: {body}"
label: team
labels: [billing, network]
metrics: [accuracy, macro_f1]
files: {train: train.csv, validation: dev.csv}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "task.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_task_file_becomes_a_task(written, tmp_path):
    task = load_task_file(written(GOOD))
    assert (task.name, task.kind, task.fields) == ("tickets", "classification", ("subject", "body"))
    assert task.files == (
        ("train", str(tmp_path / "train.csv")),
        ("validation", str(tmp_path / "dev.csv")),
    )
    assert get_task("tickets", str(tmp_path / "task.yaml")) == task


def test_a_task_file_may_name_a_hub_data_set_and_a_score(written):
    text = GOOD.replace("labels: [billing, network]", "score_step: 0.5").replace(
        "files: {train: train.csv, validation: dev.csv}",
        "hub: {path: a/b, test: test}\naliases: {body: text}",
    )
    text = text.replace("[accuracy, macro_f1]", "[pearson_spearman]")
    task = load_task_file(written(text))
    assert task.hub == HubSource(path="a/b", test="test")
    assert (task.kind, task.score_step, task.aliases) == ("regression", 0.5, (("body", "text"),))


def test_a_split_may_have_several_files(written, tmp_path):
    task = load_task_file(written(GOOD.replace("train: train.csv", "train: [a.csv, b.csv]")))
    names = [(split, Path(path).name) for split, path in task.files]
    assert names == [("train", "a.csv"), ("train", "b.csv"), ("validation", "dev.csv")]


def test_a_hub_data_set_may_lack_a_split(written):
    text = GOOD.replace(
        "files: {train: train.csv, validation: dev.csv}",
        "hub: {path: a/b, validation: null, test: test, config: null}",
    )
    assert load_task_file(written(text)).hub == HubSource(path="a/b", validation=None, test="test")


def test_a_task_may_be_like_a_known_one(written, tmp_path):
    text = "name: mine\nlike: squad\nmax_target_length: 9\nfiles: {train: a.json, test: b.json}\n"
    task, squad = load_task_file(written(text)), get_task("squad")
    assert task.files == (("train", f"{tmp_path}/a.json"), ("test", f"{tmp_path}/b.json"))
    changed = {"name": "mine", "max_target_length": 9, "files": task.files}
    assert task == replace(squad, **changed)
    with pytest.raises(TaskError, match="found 'squat', which is no known task; nearest: squad"):
        load_task_file(written(text.replace("squad", "squat")))
    with pytest.raises(TaskError, match="missing key name"):
        load_task_file(written("like: squad"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label: team", "lable: team", "unknown key `lable`; did you mean `label`"),
        ("name: tickets\n", "", "missing key name"),
        ("template: ", "template: 3 #", "template: found 3, it must be text"),
        ("[billing, network]", "[yes, no]", "labels: found .*put yes, no"),
        ("[billing, network]", "[]", "labels: found .*a list of texts"),
        ("[accuracy, macro_f1]", "[acc]", "metrics: found acc; allowed"),
        (
            "{train: train.csv, validation: dev.csv}",
            "{dev: x.csv}",
            "files: .*train, validation, test",
        ),
        ("{train: train.csv, validation: dev.csv}", "{test: x.csv}", "files: .*that has train"),
        (
            "label: team",
            "max_target_length: 0",
            "max_target_length: found 0, it must be a positive",
        ),
        ("label: team", "score_step: no", "score_step: found False, it must be a positive number"),
        ("label: team", "hub: {test: t}", "hub: .*that has path"),
        ("label: team", "hub: {path: null}", "hub: .*mapping of texts"),
        ("label: team", "hub: {path: a, train: null}", "hub: .*mapping of texts"),
        ("label: team", "hub: {path: a, dev: null}", "hub: .*with the keys path, config"),
        ("label: team", "hub: [a]", "hub: .*that has path"),
        ("{train: train.csv, validation: dev.csv}", "{train: []}", "files: .*texts or lists"),
        ("{train: train.csv, validation: dev.csv}", "{train: [1]}", "files: .*texts or lists"),
        ("label: team", "score_step: .inf", "score_step: found inf, it must be a positive number"),
        ("label: team", "label: [team", r"task.yaml:\d+: malformed YAML"),
    ],
)
def test_a_wrong_task_file_names_file_key_and_what_is_allowed(written, old, new, message):
    assert old in GOOD
    path = written(GOOD.replace(old, new))
    with pytest.raises(TaskError, match=message) as caught:
        load_task_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_wrong_task_files(written, tmp_path):
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        load_task_file(tmp_path / "none.yaml")
    with pytest.raises(TaskError, match="found list, it must be a mapping"):
        load_task_file(written("- a"))
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    with pytest.raises(TaskError, match="bad UTF-8 at byte 6"):
        load_task_file(tmp_path / "bytes.yaml")
    with pytest.raises(TaskError, match=r"found 'rte', but .* describes 'tickets'"):
        get_task("rte", str(written(GOOD)))


PLAIN = [name for name in task_names() if task_text(get_task(name)) is not None]


@pytest.mark.parametrize("name", PLAIN)
def test_a_task_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(str(task_text(get_task(name))), encoding="utf-8")
    read, task = load_task_file(path), get_task(name)
    assert replace(read, aliases=()) == replace(task, aliases=())
    assert sorted(read.aliases) == sorted(task.aliases)
    for field, _ in task.aliases:  # whichever of a field's comes first counts
        of_one = [[own for own in each.aliases if own[0] == field] for each in (read, task)]
        assert of_one[0] == of_one[1]


def test_a_task_with_functions_is_not_written() -> None:
    assert len(PLAIN) > 10
    assert task_text(dataclasses.replace(get_task(PLAIN[0]), prepare=dict)) is None
    files = (("train", "a.jsonl"), ("train", "b.jsonl"), ("test", "c.jsonl"))
    text = task_text(dataclasses.replace(get_task(PLAIN[0]), files=files))
    assert str(Path.cwd() / "b.jsonl") in str(text)
