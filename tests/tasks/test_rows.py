"""Rows that cannot become examples say why; labels in all their spellings."""

from __future__ import annotations

import pytest

from pemt.tasks import (
    RowError,
    Task,
    TaskError,
    example_of,
    get_task,
    has_label,
    score,
)
from pemt.tasks.metrics import METRICS

NLI = {"premise": "It rains.", "hypothesis": "It is wet."}


def own(**changes):
    values = {
        "name": "own",
        "description": "D.",
        "template": "text: {text}",
        "labels": ("no", "yes"),
        "metrics": ("accuracy",),
    }
    return Task(**{**values, **changes})


@pytest.mark.parametrize(
    ("task", "label", "target"),
    [
        ("superglue-cb", "contradiction", "1"),
        ("superglue-cb", 2, "2"),
        ("superglue-cb", "0", "0"),
        ("superglue-rte", "entailment", "0"),
        ("superglue-rte", "not_entailment", "1"),
    ],
)
def test_published_names_and_class_ids_mean_the_same_labels(task, label, target):
    assert example_of(get_task(task), {**NLI, "label": label})["target"] == target


@pytest.mark.parametrize("label", [True, "true", "True", 1, "1", "yes", " yes ", 1.0, "1.0"])
def test_spellings_of_the_second_of_two_labels(label):
    assert example_of(own(), {"text": "t", "label": label})["target"] == "yes"


def test_numbers_are_as_good_as_the_text_that_csv_has_for_them():
    task = own(template="age: {age} of {weight}")
    assert example_of(task, {"age": 3, "weight": 1.5, "label": 0.0}) == example_of(
        task, {"age": "3", "weight": "1.5", "label": "0"}
    )
    answer = own(labels=(), metrics=("squad",))
    assert example_of(answer, {"text": "6 * 7", "label": 42})["references"] == ["42"]
    assert example_of(own(labels=("1.0", "2.0")), {"text": "t", "label": 2.0})["target"] == "2.0"
    assert example_of(own(no_label=("-1",)), {"text": "t", "label": -1.0}) is None


def test_half_a_character_is_refused():
    for row in ({"text": "a\ud800", "label": 1}, {"text": "\udfff", "label": 1}):
        with pytest.raises(RowError, match=r"no UTF-8: '\\ud[8f][0f][0f]' is half of a character"):
            example_of(own(), row)
    answer = own(labels=(), metrics=("squad",))
    with pytest.raises(RowError, match="no UTF-8"):
        example_of(answer, {"text": "t", "label": ["a", "\ud800"]})


def test_numerals_as_labels_are_never_read_as_class_ids():
    row = {"sentence": "s", "option1": "a", "option2": "b"}
    assert example_of(get_task("winogrande"), {**row, "answer": 1})["target"] == "1"
    with pytest.raises(RowError, match="unknown label 0; allowed: 1, 2"):
        example_of(get_task("winogrande"), {**row, "answer": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "field 'text' is missing; found: label"),
        ({"text": "t"}, "field 'label' is missing; found: text"),
        ({"text": None, "label": 1}, "field 'text' is missing"),
        ({"text": [3], "label": 1}, r"field 'text' must be text, found list: \[3\]"),
        ({"text": True, "label": 1}, "field 'text' must be text, found bool: True"),
        ({"text": float("nan"), "label": 1}, "field 'text' must be text, found float: nan"),
        ({"text": "t", "label": "maybe"}, "unknown label 'maybe'; allowed: no, yes"),
        ({"text": "t", "label": 2}, "unknown label 2; allowed: no, yes"),
        ({"text": "t", "label": -1}, "unknown label -1"),
        ({"text": "t", "label": 1.5}, "unknown label 1.5"),
        ({"text": "t", "label": "1" * 5000}, "unknown label '1"),
        ({"text": "t", "label": {"a": 1}}, "unknown label {'a': 1}"),
        ({"te\nxt\ud800": 1}, r"found: te xt\\ud800"),
        ({}, "found: nothing"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, message):
    with pytest.raises(RowError, match=message):
        example_of(own(), row)


@pytest.mark.parametrize(
    ("score", "target"), [(0, "0.0"), ("2.5", "2.4"), (3.899, "3.8"), (5, "5.0")]
)
def test_scores_are_rounded_to_fifths(score, target):
    row = {"sentence1": "a", "sentence2": "b", "label": score}
    assert example_of(get_task("stsb"), row)["target"] == target


@pytest.mark.parametrize("score", ["high", None, [], "nan", float("inf"), 10**400, "1e308"])
def test_a_score_that_is_no_finite_number_is_refused(score):
    with pytest.raises(RowError):
        example_of(get_task("stsb"), {"sentence1": "a", "sentence2": "b", "label": score})


def test_an_answer_of_another_type_is_refused():
    row = {"question": "q", "context": "c"}
    for answers in (True, ["a", {}], [None], {"texts": []}, float("inf")):
        with pytest.raises(RowError):
            example_of(get_task("newsqa"), {**row, "answers": answers})


def test_an_answer_object_of_the_hub_needs_its_texts():
    row = {"question": "q", "context": "c", "answers": {"answer_start": [0]}}
    with pytest.raises(RowError, match="field 'text' is missing"):
        example_of(get_task("squad"), row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("acuracy",)}, "metrics: found acuracy; allowed: accuracy, f1"),
        ({"metrics": ()}, "metrics: found none"),
        ({"label_names": ("a",)}, "label_names has 1 entries, labels has 2"),
        ({"labels": ("a", "a")}, "duplicate label"),
        ({"score_step": 0.2}, "labels or score_step"),
        ({"template": "no field"}, "no {field}"),
        ({"template": "{text"}, "template: "),
        ({"template": "{0}"}, r"template: found a field that is no plain {name} in .*; allowed"),
        ({"template": "{}"}, "no plain {name}"),
        ({"template": "{text} {text.upper}"}, "no plain {name}"),
        ({"template": "{text[0]}"}, "no plain {name}"),
        ({"template": "{text!r}"}, "no plain {name}"),
        ({"template": "{text:>9999999999}"}, "no plain {name}"),
    ],
)
def test_a_wrong_task_is_refused_when_it_is_made(changes, message):
    with pytest.raises(TaskError, match=message):
        own(**changes)


OPEN = {"labels": ()}
THREE = {"labels": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("metric", "changes", "needed", "found"),
    [
        ("f1", OPEN, "a classification with 2 labels", "open answers"),
        ("f1", THREE, "a classification with 2 labels", "a classification with 3 labels"),
        ("macro_f1", OPEN, "a classification", "open answers"),
        ("matthews", {**OPEN, "score_step": 1.0}, "a classification", "a regression"),
        ("pearson_spearman", OPEN, "a regression", "open answers"),
        ("pearson_spearman", {}, "a regression", "a classification with 2 labels"),
        ("squad", {}, "open answers", "a classification with 2 labels"),
        ("multirc", {}, "with 2 labels and a group", "a classification with 2 labels;"),
        (
            "multirc",
            {**THREE, "group": ("q",)},
            "with 2 labels and",
            "a classification with 3 labels and a group",
        ),
    ],
)
def test_a_metric_that_cannot_score_the_task_is_refused_when_it_is_made(
    metric, changes, needed, found
):
    with pytest.raises(TaskError, match=f"{metric} scores .*{needed}.*, found {found}") as told:
        own(**changes, metrics=("accuracy", metric))
    offered = str(told.value).split("allowed here: ")[1].split(", ")
    assert "accuracy" in offered
    assert metric not in offered
    own(**changes, metrics=offered)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_a_metric_scores_the_tasks_it_is_allowed_on(metric):
    shapes = [OPEN, {}, THREE, {**OPEN, "score_step": 0.5}, {"group": ("q",)}]
    allowed = 0
    for changes in shapes:
        try:
            task = own(**changes, metrics=(metric,))
        except TaskError:
            continue
        row = example_of(task, {"text": "t", "q": 1, "label": 1 if task.kind != "answer" else "a"})
        assert score(task, [row["target"]] * 2, [row, row])
        allowed += 1
    assert allowed


def test_rows_with_and_without_labels_are_told_apart():
    rte, mnli, squad = (get_task(name) for name in ("rte", "mnli", "squad"))
    pair = {"sentence1": "a", "sentence2": "b"}
    for label in (None, -1, "-1", -1.0):
        assert not has_label(rte, {**pair, "label": label})
        assert not has_label(mnli, {**NLI, "label": label})
    assert not has_label(rte, pair)
    assert has_label(rte, {**pair, "label": 0})
    assert has_label(rte, {**pair, "label": "entailment"})
    assert not has_label(squad, {"answers": {"text": [], "answer_start": []}})
    assert has_label(squad, {"answers": {"text": ["A"], "answer_start": [0]}})
