"""The task table: SuperGLUE. Targets are the class ids of the hub's copy."""

from __future__ import annotations

from pemt.tasks.classification import class_task
from pemt.tasks.published import (
    prepare_multirc,
    prepare_record,
    prepare_wsc,
    question_multirc,
    unpack_multirc,
    unpack_record,
    unpack_wsc,
)
from pemt.tasks.task import HubSource, Task

SUPERGLUE = "aps/super_glue"

SUPERGLUE_TASKS = (
    class_task(
        name="superglue-boolq",
        description="Answer a yes-or-no question about a passage.",
        template="question: {question} passage: {passage}",
        hub=HubSource(path=SUPERGLUE, config="boolq"),
    ),
    class_task(
        name="superglue-rte",
        description="Decide whether a premise entails a hypothesis.",
        template="premise: {premise} hypothesis: {hypothesis}",
        label_names=("entailment", "not_entailment"),
        hub=HubSource(path=SUPERGLUE, config="rte"),
    ),
    class_task(
        name="superglue-cb",
        description="Decide whether a speaker is committed to the truth of an embedded clause.",
        template="premise: {premise} hypothesis: {hypothesis}",
        labels=("0", "1", "2"),
        label_names=("entailment", "contradiction", "neutral"),
        metrics=("macro_f1", "accuracy"),
        hub=HubSource(path=SUPERGLUE, config="cb"),
    ),
    class_task(
        name="superglue-copa",
        description="Choose the more plausible cause or effect of a premise.",
        # The published template leaves the question out, without which half the rows are a guess.
        template="premise: {premise} question: {question} choice1: {choice1} choice2: {choice2}",
        hub=HubSource(path=SUPERGLUE, config="copa"),
    ),
    class_task(
        name="superglue-multirc",
        description="Decide whether an answer to a question about a paragraph is correct.",
        template="question: {question} answer: {answer} paragraph: {paragraph}",
        group=("question_id",),
        metrics=("multirc",),
        hub=HubSource(path=SUPERGLUE, config="multirc"),
        unpack=unpack_multirc,
        prepare=prepare_multirc,
        prepare_label=question_multirc,
    ),
    class_task(
        name="superglue-wic",
        description="Decide whether a word has the same meaning in two sentences.",
        template="sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        hub=HubSource(path=SUPERGLUE, config="wic"),
    ),
    class_task(
        name="superglue-wsc-fixed",
        description="Decide whether a marked pronoun refers to a marked noun.",
        template="text: {text}",
        hub=HubSource(path=SUPERGLUE, config="wsc.fixed"),
        unpack=unpack_wsc,
        prepare=prepare_wsc,
    ),
    Task(
        name="superglue-record",
        description="Fill the gap in a query with an entity from a news passage.",
        template="query: {query} entities: {entities} passage: {passage}",
        label="answers",
        train_on_every_answer=True,
        max_target_length=32,
        metrics=("squad",),
        hub=HubSource(path=SUPERGLUE, config="record"),
        unpack=unpack_record,
        prepare=prepare_record,
    ),
)
