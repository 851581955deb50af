"""Rows that cannot become examples say why; labels in all their spellings; nested records."""

from __future__ import annotations

import pytest

from pemt.metrics import METRICS
from pemt.tasks import RowError, Task, TaskError, example_of, get_task, score
from pemt.tasks.shapes import (
    prepare_wsc,
    unpack_mrqa,
    unpack_multirc,
    unpack_paws,
    unpack_record,
    unpack_squad,
    unpack_wsc,
    unpack_yelp_full,
)

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


@pytest.mark.parametrize("label", [True, "true", "True", 1, "1", "yes", " yes "])
def test_spellings_of_the_second_of_two_labels(label):
    assert example_of(own(), {"text": "t", "label": label})["target"] == "yes"


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
        ({"text": 3, "label": 1}, "field 'text' must be text, found int: 3"),
        ({"text": "t", "label": "maybe"}, "unknown label 'maybe'; allowed: no, yes"),
        ({"text": "t", "label": 2}, "unknown label 2; allowed: no, yes"),
        ({"text": "t", "label": -1}, "unknown label -1"),
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


@pytest.mark.parametrize("score", ["high", None, [], "nan", float("inf")])
def test_a_score_that_is_no_finite_number_is_refused(score):
    with pytest.raises(RowError):
        example_of(get_task("stsb"), {"sentence1": "a", "sentence2": "b", "label": score})


def test_an_answer_of_another_type_is_refused():
    row = {"question": "q", "context": "c"}
    for answers in (3, ["a", 3], {"texts": []}):
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
        ({"labels": ("a", "a")}, "a label stands twice"),
        ({"score_step": 0.2}, "labels or score_step"),
        ({"template": "no field"}, "no {field}"),
        ({"template": "{text"}, "template: "),
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


def test_wsc_marks_spans_of_several_words_whatever_their_order():
    row = {
        "text": "When it rains the old dog sleeps.",
        "span1_index": 3,
        "span1_text": "the old dog",
        "span2_index": 1,
        "span2_text": "it",
    }
    assert prepare_wsc(row)["text"] == "When # it # rains * the old dog * sleeps."
    with pytest.raises(RowError, match="span1_index 9 lies outside the text of 7 words"):
        prepare_wsc({**row, "span1_index": 9})


def test_wsc_records_have_their_spans_in_target():
    spans = {"span1_index": 0, "span1_text": "Mark", "span2_index": 6, "span2_text": "he"}
    record = {
        "idx": 0,
        "label": True,
        "target": spans,
        "text": "Mark told Pete a lie, which he regretted.",
    }
    (row,) = unpack_wsc(record)
    assert example_of(get_task("superglue-wsc-fixed"), row)["target"] == "1"


def test_multirc_records_give_a_row_per_answer():
    answers = [{"text": "Rain", "idx": 0, "label": 1}, {"text": "Sun", "idx": 1, "label": 0}]
    questions = [{"question": "What?", "idx": 4, "answers": answers}]
    rows = list(
        unpack_multirc({"idx": 2, "passage": {"text": "It rains.", "questions": questions}})
    )
    assert [row["idx"] for row in rows] == [
        {"paragraph": 2, "question": 4, "answer": i} for i in (0, 1)
    ]
    assert [example_of(get_task("superglue-multirc"), row)["group"] for row in rows] == ["2-4"] * 2


def test_record_entities_end_at_their_inclusive_end():
    passage = {
        "text": "Ann met Bob.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    }
    queries = [
        {"query": "@placeholder left", "idx": 1, "answers": [{"start": 0, "end": 2, "text": "Ann"}]}
    ]
    (row,) = unpack_record({"passage": passage, "qas": queries, "idx": 0})
    assert (row["entities"], row["answers"]) == (["Ann", "Bob"], ["Ann"])
    passage["entities"].append({"start": 8, "end": 12})
    with pytest.raises(RowError, match=r"8\.\.12 lies outside the passage of 12"):
        list(unpack_record({"passage": passage, "qas": queries, "idx": 0}))


def test_squad_and_mrqa_records_give_a_row_per_question():
    question = {"id": "1", "question": "Q?", "answers": [{"text": "A", "answer_start": 0}]}
    impossible = {"id": "2", "question": "R?", "answers": [], "is_impossible": True}
    article = {"title": "T", "paragraphs": [{"context": "C", "qas": [question, impossible]}]}
    rows = list(unpack_squad(article))
    assert [row["answers"] for row in rows] == [["A"], []]
    assert list(unpack_mrqa({"header": {"dataset": "NewsQA"}})) == []
    (row,) = unpack_mrqa(
        {"context": "C", "qas": [{"qid": "1", "question": "Q?", "answers": ["A", "B"]}]}
    )
    assert example_of(get_task("newsqa"), row)["references"] == ["A", "B"]


def test_flat_rows_pass_through_every_unpacking():
    row = {"text": "t", "label": 0}
    for unpack in (
        unpack_squad,
        unpack_mrqa,
        unpack_multirc,
        unpack_record,
        unpack_wsc,
        unpack_paws,
        unpack_yelp_full,
    ):
        assert list(unpack(row)) == [row]


def test_paws_bytes_literals_are_decoded():
    record = {"sentence1": "b'caf\\xc3\\xa9'", "sentence2": 'b"it\'s"', "label": "1"}
    (row,) = unpack_paws(record)
    assert (row["sentence1"], row["sentence2"]) == ("café", "it's")
    with pytest.raises(RowError, match="no bytes literal"):
        list(unpack_paws({**record, "sentence1": "b'open"}))


def test_five_stars_become_polarity_and_the_middle_has_none():
    rows = [
        next(unpack_yelp_full({"ori": 'so \\""good\\""\\n\\nyes', "label": n})) for n in range(5)
    ]
    assert [row["label"] for row in rows] == [0, 0, -1, 1, 1]
    assert rows[0]["text"] == 'so "good"\n\nyes'
    assert example_of(get_task("yelp_polarity"), rows[2]) is None


def test_a_nested_record_of_the_wrong_shape_is_refused():
    for unpack, record in [
        (unpack_multirc, {"passage": "text", "idx": 0}),
        (unpack_multirc, {"passage": {"text": "t", "questions": [3]}, "idx": 0}),
        (unpack_squad, {"paragraphs": {"context": "c"}}),
        (unpack_mrqa, {"context": "c", "qas": "q"}),
        (unpack_wsc, {"target": []}),
    ]:
        with pytest.raises(RowError):
            list(unpack(record))
