"""The task table: inference, sentiment, paraphrase and choices beyond GLUE and SuperGLUE."""

from __future__ import annotations

from typing import Any

from pemt.tasks.published import (
    label_scitail,
    prepare_commonsense_qa,
    unpack_commonsense_qa,
    unpack_paws,
    unpack_yelp_full,
)
from pemt.tasks.task import HubSource, Task

NLI: dict[str, Any] = {
    "template": "premise: {premise} hypothesis: {hypothesis}",
    "labels": ("0", "1", "2"),
    "label_names": ("entailment", "neutral", "contradiction"),
    "no_label": ("-1", "-"),
    "aliases": (("premise", "sentence1"), ("hypothesis", "sentence2"), ("label", "gold_label")),
}


def class_task(
    *,
    labels: tuple[str, ...] = ("0", "1"),
    metrics: tuple[str, ...] = ("accuracy",),
    **fields: Any,
) -> Task:
    """A task of two classes that is scored by accuracy, where its row says nothing else."""
    return Task(labels=labels, metrics=metrics, **fields)


CLASSIFICATION_TASKS = (
    class_task(
        name="multi_nli",
        description="Decide how a hypothesis relates to a premise from one of many genres.",
        **NLI,
        hub=HubSource(path="nyu-mll/multi_nli", validation="validation_matched"),
    ),
    class_task(
        name="snli",
        description="Decide how a hypothesis relates to the caption of a photograph.",
        **NLI,
        hub=HubSource(path="stanfordnlp/snli", test="test"),
    ),
    class_task(
        name="scitail",
        description="Decide whether a science sentence entails an answer to an exam question.",
        template="premise: {sentence1} hypothesis: {sentence2}",
        label="gold_label",
        label_names=("entailment", "neutral"),
        hub=HubSource(path="allenai/scitail", config="snli_format", test="test"),
        aliases=(("sentence1", "premise"), ("sentence2", "hypothesis"), ("gold_label", "label")),
        # The tsv_format, and with a fourth column the dgem_format.
        tsv_columns=("premise", "hypothesis", "label", "hypothesis_graph_structure"),
        prepare_label=label_scitail,
    ),
    class_task(
        name="paws",
        description="Decide whether two sentences of nearly the same words are paraphrases.",
        template="sentence1: {sentence1} sentence2: {sentence2}",
        hub=HubSource(path="google-research-datasets/paws", config="labeled_final", test="test"),
        unpack=unpack_paws,
    ),
    class_task(
        name="yelp_polarity",
        description="Decide whether a review of a local business is positive or negative.",
        template="sentence: {text}",
        no_label=("-1",),
        hub=HubSource(path="fancyzhx/yelp_polarity", validation=None, test="test"),
        unpack=unpack_yelp_full,
    ),
    class_task(
        name="amazon_polarity",
        description="Decide whether a review of a product is positive or negative.",
        template="sentence: {content}",
        hub=HubSource(path="fancyzhx/amazon_polarity", validation=None, test="test"),
    ),
    class_task(
        name="piqa",
        description="Choose the better of two ways to reach an everyday physical goal.",
        template="question: {goal} choice1: {sol1} choice2: {sol2}",
        hub=HubSource(path="baber/piqa"),
    ),
    class_task(
        name="social_i_qa",
        description="Choose the most fitting of three answers about a social situation.",
        template=(
            "question: {question} context: {context} "
            "answer1: {answerA} answer2: {answerB} answer3: {answerC}"
        ),
        labels=("1", "2", "3"),
        hub=HubSource(path="lighteval/siqa"),
    ),
    class_task(
        name="commonsense_qa",
        description="Choose the most sensible of five answers to a question about the world.",
        template="question: {question} A: {A} B: {B} C: {C} D: {D} E: {E}",
        label="answerKey",
        labels=("A", "B", "C", "D", "E"),
        hub=HubSource(path="tau/commonsense_qa"),
        unpack=unpack_commonsense_qa,
        prepare=prepare_commonsense_qa,
    ),
    class_task(
        name="winogrande",
        description="Choose which of two options fills the blank in a sentence.",
        template="sentence: {sentence} option1: {option1} option2: {option2}",
        label="answer",
        labels=("1", "2"),
        hub=HubSource(path="allenai/winogrande", config="winogrande_xl"),
    ),
)
