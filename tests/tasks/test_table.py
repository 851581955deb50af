"""The task table: every row, by a record as the hub has it and the example it must become."""

from __future__ import annotations

import pytest

from pemt.tasks import Task, TaskError, example_of, get_task, register_task, task_names
from pemt.tasks.metrics import METRICS

MRQA = {"context": "Lyon lies in France.", "question": "Where is Lyon?", "key": "k"}
MRQA_OUT = ("question: Where is Lyon? context: Lyon lies in France.", "France")
PAIR = {"sentence1": "It rains.", "sentence2": "It is wet."}
PAIR_OUT = "sentence1: It rains. sentence2: It is wet."
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}
NLI_OUT = "premise: It rains. hypothesis: It is wet."

HUB_ROWS = {
    "squad": (
        {
            **MRQA,
            "id": "1",
            "title": "t",
            "answers": {"text": ["France", "in France"], "answer_start": [13, 10]},
        },
        *MRQA_OUT,
    ),
    **{
        name: ({**MRQA, "answers": ["France", "in France"]}, *MRQA_OUT)
        for name in ("newsqa", "searchqa", "nq", "hotpotqa")
    },
    "triviaqa": (
        {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen", "aliases": ["Austen"]}},
        "question: Who wrote Emma?",
        "Jane Austen",
    ),
    "drop": (
        {
            "passage": "Two goals.",
            "question": "How many?",
            "answers_spans": {"spans": ["2", "two"], "types": ["number", "span"]},
        },
        "question: How many? context: Two goals.",
        "2",
    ),
    "cola": ({"sentence": "I ran.", "label": 1, "idx": 0}, "sentence: I ran.", "1"),
    "sst2": ({"sentence": "dull ", "label": 0, "idx": 0}, "sentence: dull ", "0"),
    "mrpc": ({**PAIR, "label": 1}, PAIR_OUT, "1"),
    "stsb": ({**PAIR, "label": 3.7}, PAIR_OUT, "3.6"),
    "rte": ({**PAIR, "label": 0}, PAIR_OUT, "0"),
    "wnli": ({**PAIR, "label": 1}, PAIR_OUT, "1"),
    "paws": ({**PAIR, "label": 0, "id": 1}, PAIR_OUT, "0"),
    "scitail": ({**PAIR, "gold_label": "neutral"}, NLI_OUT, "1"),
    "qqp": (
        {"question1": "How?", "question2": "Why?", "label": 0},
        "question1: How? question2: Why?",
        "0",
    ),
    "qnli": (
        {"question": "Who?", "sentence": "He did.", "label": 0},
        "question: Who? sentence: He did.",
        "0",
    ),
    **{
        name: ({**NLI, "label": 2}, NLI_OUT, "2")
        for name in ("mnli", "multi_nli", "snli", "superglue-cb")
    },
    "superglue-rte": ({**NLI, "label": 1}, NLI_OUT, "1"),
    "superglue-boolq": (
        {"question": "is it wet", "passage": "It rains.", "label": 1},
        "question: is it wet passage: It rains.",
        "1",
    ),
    "superglue-copa": (
        {
            "premise": "It rained.",
            "choice1": "I got wet.",
            "choice2": "I sang.",
            "question": "effect",
            "label": 0,
        },
        "premise: It rained. question: effect choice1: I got wet. choice2: I sang.",
        "0",
    ),
    "superglue-multirc": (
        {
            "paragraph": "<b>Sent 1: </b>It rains.<br>",
            "question": "What?",
            "answer": "Rain",
            "label": 1,
            "idx": {"paragraph": 3, "question": 5, "answer": 7},
        },
        "question: What? answer: Rain paragraph: Sent 1: It rains.",
        "1",
    ),
    "superglue-wic": (
        {**PAIR, "word": "wet", "label": 0, "start1": 0, "start2": 0, "end1": 1, "end2": 1},
        PAIR_OUT + " word: wet",
        "0",
    ),
    "superglue-wsc-fixed": (
        {
            "text": "Mark told Pete a lie, which he regretted.",
            "span1_index": 0,
            "span1_text": "Mark",
            "span2_index": 6,
            "span2_text": "he",
            "label": 1,
        },
        "text: * Mark * told Pete a lie, which # he # regretted.",
        "1",
    ),
    "superglue-record": (
        {
            "passage": "It rains in Lyon.\n@highlight\nAnn is wet\n@highlight\nBob is dry",
            "query": "@placeholder sings",
            "entities": ["Ann", "Bob"],
            "answers": ["Ann", "Bob"],
        },
        "query: @placeholder sings entities: Ann, Bob passage: "
        "It rains in Lyon. Ann is wet. Bob is dry",
        "Ann",
    ),
    "yelp_polarity": ({"text": "Good.", "label": 1}, "sentence: Good.", "1"),
    "amazon_polarity": ({"title": "Hm", "content": "Bad.", "label": 0}, "sentence: Bad.", "0"),
    "piqa": (
        {"goal": "Boil an egg", "sol1": "In hot water", "sol2": "In the fridge", "label": 0},
        "question: Boil an egg choice1: In hot water choice2: In the fridge",
        "0",
    ),
    "social_i_qa": (
        {
            "context": "Ann fell.",
            "question": "Why?",
            "answerA": "ice",
            "answerB": "joy",
            "answerC": "luck",
            "label": "3",
        },
        "question: Why? context: Ann fell. answer1: ice answer2: joy answer3: luck",
        "3",
    ),
    "commonsense_qa": (
        {
            "question": "Where do fish live?",
            "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "car", "hat", "cup"]},
            "answerKey": "A",
        },
        "question: Where do fish live? A: sea B: sky C: car D: hat E: cup",
        "A",
    ),
    "winogrande": (
        {
            "sentence": "Ann beat Eve as _ was strong.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "1",
        },
        "sentence: Ann beat Eve as _ was strong. option1: Ann option2: Eve",
        "1",
    ),
}


NAMES = list(HUB_ROWS)


def test_the_table_has_every_published_task():
    assert set(NAMES) <= set(task_names())
    assert len(NAMES) == 34


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_hub_becomes_the_expected_example(name):
    row, source, target = HUB_ROWS[name]
    example = example_of(get_task(name), row)
    assert (example["source"], example["target"]) == (source, target)
    assert example["references"][0] == target


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_what_it_needs(name):
    task = get_task(name)
    assert task.description.endswith(".")
    assert task.description.count(".") == 1
    assert task.hub is not None
    assert task.hub.path.count("/") == 1
    assert set(task.metrics) <= set(METRICS)


def test_descriptions_differ():
    assert len({get_task(name).description for name in NAMES}) == len(NAMES)


def test_answers_keep_every_reference_and_questions_their_group():
    squad = example_of(get_task("squad"), HUB_ROWS["squad"][0])
    assert squad["references"] == ["France", "in France"]
    assert (
        example_of(get_task("superglue-multirc"), HUB_ROWS["superglue-multirc"][0])["group"]
        == "3-5"
    )


def test_rows_without_gold_label_give_no_example():
    for name in ("mnli", "multi_nli", "snli"):
        assert example_of(get_task(name), {**NLI, "label": -1}) is None
        assert example_of(get_task(name), {**NLI, "label": "-"}) is None
    empty = {**MRQA, "answers": {"text": [], "answer_start": []}}
    assert example_of(get_task("squad"), empty) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sst", "sst2"), ("boolq", "superglue-boolq"), ("RTE", "rte"), ("wsc", "superglue-wsc-fixed")],
)
def test_an_unknown_task_names_the_nearest_ones(name, nearest):
    with pytest.raises(TaskError, match=f"{name!r}.*nearest: .*{nearest}"):
        get_task(name)


def test_a_task_of_ones_own_can_be_registered_once():
    task = Task(
        name="own-row",
        description="D.",
        template="{x}",
        labels=("no", "yes"),
        metrics=("accuracy",),
    )
    assert register_task(task) is get_task("own-row")
    register_task(task)
    with pytest.raises(TaskError, match="own-row: another task has that name"):
        register_task(
            Task(
                name="own-row", description="E.", template="{x}", labels=("a", "b"), metrics=("f1",)
            )
        )
