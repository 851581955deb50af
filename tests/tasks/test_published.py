"""Published formats: nested records to rows, spans, five stars, bytes literals."""

from __future__ import annotations

import pytest

from pemt.tasks import (
    RowError,
    example_of,
    get_task,
    has_label,
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
    records = [{"ori": 'so \\""good\\""\\n\\nyes', "label": n} for n in range(5)]
    rows = [row for record in records for row in unpack_yelp_full(record)]
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
