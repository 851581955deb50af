"""The task table: GLUE. Targets are the class ids of the hub's copy; paper.py has the published code's."""

from __future__ import annotations

from pemt.tasks.classification import NLI, class_task
from pemt.tasks.task import HubSource, Task

GLUE = "nyu-mll/glue"

GLUE_TASKS = (
    class_task(
        name="cola",
        description="Decide whether an English sentence is grammatically acceptable or not.",
        template="sentence: {sentence}",
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        hub=HubSource(path=GLUE, config="cola"),
        tsv_columns=("source", "label", "star", "sentence"),
    ),
    class_task(
        name="sst2",
        description="Decide whether a sentence from a film review is positive or negative.",
        template="sentence: {sentence}",
        label_names=("negative", "positive"),
        hub=HubSource(path=GLUE, config="sst2"),
    ),
    class_task(
        name="mrpc",
        description="Decide whether two sentences from the news say the same thing.",
        template="sentence1: {sentence1} sentence2: {sentence2}",
        label_names=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        # The hub has MRPC's test labels; the published splits do not use them.
        hub=HubSource(path=GLUE, config="mrpc"),
        aliases=(("sentence1", "#1 String"), ("sentence2", "#2 String"), ("label", "Quality")),
    ),
    class_task(
        name="qqp",
        description="Decide whether two questions from a forum ask the same thing.",
        template="question1: {question1} question2: {question2}",
        label_names=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        hub=HubSource(path=GLUE, config="qqp"),
        aliases=(("label", "is_duplicate"), ("question1", "text_a"), ("question2", "text_b")),
        # Its file was written with quotes, which GLUE's readers, and so the hub's copy, take as text.
        quoting="none",
    ),
    Task(
        name="stsb",
        description="Rate from 0 to 5 how similar two sentences are in meaning.",
        template="sentence1: {sentence1} sentence2: {sentence2}",
        score_step=0.2,
        metrics=("pearson_spearman",),
        hub=HubSource(path=GLUE, config="stsb"),
        aliases=(("label", "score"),),
    ),
    class_task(
        name="mnli",
        description="Decide whether a premise entails, contradicts or leaves open a hypothesis.",
        **NLI | {"aliases": (*NLI["aliases"], ("premise", "text_a"), ("hypothesis", "text_b"))},
        hub=HubSource(path=GLUE, config="mnli", validation="validation_matched"),
    ),
    class_task(
        name="qnli",
        description="Decide whether a sentence contains the answer to a question.",
        template="question: {question} sentence: {sentence}",
        label_names=("entailment", "not_entailment"),
        hub=HubSource(path=GLUE, config="qnli"),
        aliases=(("question", "text_a"), ("sentence", "text_b")),
    ),
    class_task(
        name="rte",
        description="Decide whether the first sentence entails the second.",
        template="sentence1: {sentence1} sentence2: {sentence2}",
        label_names=("entailment", "not_entailment"),
        hub=HubSource(path=GLUE, config="rte"),
        aliases=(("sentence1", "premise"), ("sentence2", "hypothesis")),
    ),
    class_task(
        name="wnli",
        description="Decide whether a sentence with a pronoun filled in follows from the original.",
        template="sentence1: {sentence1} sentence2: {sentence2}",
        label_names=("not_entailment", "entailment"),
        hub=HubSource(path=GLUE, config="wnli"),
    ),
)
