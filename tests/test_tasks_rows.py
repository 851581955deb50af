"""Rows that cannot become examples say why; labels in all their spellings; nested records."""

from __future__ import annotations

import pytest

from pemt.metrics import METRICS
from pemt.tasks import (
    RowError,
    Task,
    TaskError,
    example_of,
    get_task,
    has_label,
    score,
    source_of,
)
from pemt.tasks.published import (
    prepare_wsc,
    unpack_multirc,
    unpack_paws,
    unpack_questions,
    unpack_record,
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
        ({"labels": ("a", "a")}, "a label stands twice"),
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


@pytest.mark.parametrize(
    ("index", "text", "marked"),
    [
        (0, "mark", "* Mark's * dog told # Pete # a lie."),
        (1, "Mark", "* Mark's * dog told # Pete # a lie."),
        (2, "a lie", "Mark's dog told # Pete # * a lie. *"),
        # As in the published files, the later words may stand apart.
        (1, "dog, lie", "Mark's * dog told * # Pete # a lie."),
    ],
)
def test_a_wsc_span_stands_where_its_words_are(index, text, marked):
    row = {"text": "Mark's dog told Pete a lie.", "span2_index": 3, "span2_text": "Pete"}
    assert prepare_wsc({**row, "span1_index": index, "span1_text": text})["text"] == marked


def test_a_wsc_span_that_is_nowhere_near_is_refused():
    row = {"text": "Ann told Pete a lie.", "span2_index": 2, "span2_text": "Pete"}
    with pytest.raises(RowError, match="span1_text is 'Mark', but word 1 of the text is 'told'"):
        prepare_wsc({**row, "span1_index": 1, "span1_text": "Mark"})
    with pytest.raises(RowError, match=r"span1_text has no word: '\.'"):
        prepare_wsc({**row, "span1_index": 1, "span1_text": "."})
    far = {**row, "text": "a b c d e f Mark", "span2_text": "c", "span1_text": "Mark"}
    assert prepare_wsc({**far, "span1_index": 3})["text"] == "a b # c # d e f * Mark *"
    with pytest.raises(RowError, match="but word 2"):
        prepare_wsc({**far, "span1_index": 2})


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
    rows = list(unpack_questions(article))
    assert [row["answers"] for row in rows] == [["A"], []]
    assert list(unpack_questions({"header": {"dataset": "NewsQA"}})) == []
    (row,) = unpack_questions(
        {"context": "C", "qas": [{"qid": "1", "question": "Q?", "answers": ["A", "B"]}]}
    )
    assert example_of(get_task("newsqa"), row)["references"] == ["A", "B"]


@pytest.mark.parametrize("name", ["squad", "newsqa", "triviaqa", "drop", "hotpotqa"])
def test_every_task_of_questions_reads_squads_form_and_mrqas(name):
    task = get_task(name)
    question = {"id": "1", "qid": "1", "question": "Q?"}
    article = {"context": "C", "qas": [{**question, "answers": [{"text": "A"}, {"text": "B"}]}]}
    context = {"context": "C", "qas": [{**question, "answers": ["A", "B"]}]}
    for record in ({"paragraphs": [article]}, context):
        (row,) = task.unpack(record)
        example = example_of(task, {**row, "passage": row["context"]})
        assert example["references"] == ["A", "B"]
        assert example["source"].startswith("question: Q?")


def test_a_malformed_question_leaves_the_others_of_its_record():
    questions = [{"id": f"q{i}", "question": "Q?", "answers": [{"text": "A"}]} for i in range(5)]
    del questions[2]["question"]
    questions[3] = 7
    rows = list(unpack_questions({"paragraphs": [3, {"context": "C", "qas": questions}]}))
    assert [row["id"] for row in rows if isinstance(row, dict)] == ["q0", "q1", "q4"]
    assert [str(row).partition("; ")[0] for row in rows if isinstance(row, RowError)] == [
        "paragraphs, number 1: it must be an object, found 3",
        "paragraphs, number 2: qas, id 'q2': field 'question' is missing",
        "paragraphs, number 2: qas, number 4: it must be an object, found 7",
    ]
    asked = [{"qid": i, "question": "Q?", "answers": ["A"]} for i in range(3)]
    asked[1]["question"] = None
    rows = list(unpack_questions({"context": "C", "qas": asked}))
    assert [row["key"] for row in rows if isinstance(row, dict)] == [0, 2]
    assert str(rows[1]).startswith("qas, qid 1: field 'question' is missing")


def test_a_malformed_answer_or_query_leaves_the_others_of_its_passage():
    answers = [{"text": "a", "idx": 0, "label": 1}, {"idx": 1, "label": 1}]
    asked = [{"question": "Q?", "idx": 4, "answers": answers}, {"idx": 5}]
    rows = list(unpack_multirc({"idx": 2, "passage": {"text": "T", "questions": asked}}))
    assert [str(row).partition(";")[0] for row in rows[1:]] == [
        "questions, idx 4: answers, idx 1: field 'text' is missing",
        "questions, idx 5: field 'question' is missing",
    ]
    queries = [{"query": q, "idx": 1, "answers": [{"text": "A"}]} for q in (None, "@placeholder")]
    rows = list(unpack_record({"passage": {"text": "T", "entities": []}, "qas": queries}))
    assert str(rows[0]).startswith("qas, idx 1: field 'query' is missing")
    assert rows[1]["answers"] == ["A"]


def test_nested_records_without_labels_have_their_sources():
    questions = [{"question": "Q?", "idx": 4, "answers": [{"text": "a", "idx": 0}]}]
    records = {
        "superglue-multirc": {"idx": 2, "passage": {"text": "T", "questions": questions}},
        "squad": {"paragraphs": [{"context": "C", "qas": [{"id": "1", "question": "Q?"}]}]},
        "newsqa": {"context": "C", "qas": [{"qid": "1", "question": "Q?"}]},
        "superglue-record": {
            "passage": {"text": "T", "entities": []},
            "qas": [{"query": "@placeholder Q?"}],
        },
    }
    for name, record in records.items():
        task = get_task(name)
        (row,) = task.unpack(record)
        assert "Q?" in source_of(task, row)
        assert not has_label(task, row)


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


def test_flat_rows_pass_through_every_unpacking():
    row = {"text": "t", "label": 0}
    for unpack in (
        unpack_questions,
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
        (unpack_multirc, {"passage": {"text": "t", "questions": 3}, "idx": 0}),
        (unpack_questions, {"paragraphs": {"context": "c"}}),
        (unpack_questions, {"context": "c", "qas": "q"}),
        (unpack_wsc, {"target": []}),
    ]:
        with pytest.raises(RowError):
            list(unpack(record))
