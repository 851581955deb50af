"""The task table: open answers about a passage, or without one."""

from __future__ import annotations

from typing import Any

from pemt.tasks.published import answers_drop, answers_squad, answers_trivia_qa, unpack_questions
from pemt.tasks.task import HubSource, Task


def question_task(
    *, template: str = "question: {question} context: {context}", **fields: Any
) -> Task:
    """A question with a list of answers, in SQuAD's form or that of the MRQA 2019 shared task as well."""
    return Task(
        template=template,
        label="answers",
        max_target_length=32,
        metrics=("squad",),
        unpack=unpack_questions,
        **fields,
    )


ANSWER_TASKS = (
    question_task(
        name="squad",
        description="Answer a question about a paragraph of an encyclopaedia with a span of it.",
        hub=HubSource(path="rajpurkar/squad"),
        prepare_label=answers_squad,
    ),
    question_task(
        name="newsqa",
        description="Answer a question about a news article with a span of it.",
        hub=HubSource(path="lucadiliello/newsqa"),
    ),
    question_task(
        name="searchqa",
        description="Answer a quiz clue from the snippets that a search engine returned for it.",
        hub=HubSource(path="lucadiliello/searchqa"),
    ),
    question_task(
        name="nq",
        description="Answer a question that people asked a search engine from an encyclopaedia's page.",
        hub=HubSource(path="lucadiliello/naturalquestionsshortqa"),
    ),
    question_task(
        name="hotpotqa",
        description="Answer a question that takes facts from two paragraphs together.",
        hub=HubSource(path="lucadiliello/hotpotqa"),
    ),
    question_task(
        name="triviaqa",
        description="Answer a trivia question from general knowledge.",
        hub=HubSource(path="mandarjoshi/trivia_qa", config="rc.nocontext"),
        template="question: {question}",
        prepare_label=answers_trivia_qa,
    ),
    question_task(
        name="drop",
        description="Answer a question about a passage by counting, comparing or adding up.",
        hub=HubSource(path="ucinlp/drop"),
        template="question: {question} context: {passage}",
        aliases=(("passage", "context"),),
        prepare_label=answers_drop,
    ),
)
