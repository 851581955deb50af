"""The task table: open answers about a passage, or without one."""

from __future__ import annotations

from pemt.tasks.published import answers_drop, answers_squad, answers_trivia_qa, unpack_questions
from pemt.tasks.task import HubSource, Task


def mrqa_task(name: str, description: str, path: str) -> Task:
    """A data set of the MRQA 2019 shared task: question, context and a list of answers."""
    return Task(
        name=name,
        description=description,
        template="question: {question} context: {context}",
        label="answers",
        max_target_length=32,
        metrics=("squad",),
        hub=HubSource(path=path),
        unpack=unpack_questions,
    )


ANSWER_TASKS = (
    Task(
        name="squad",
        description="Answer a question about a paragraph of an encyclopaedia with a span of it.",
        template="question: {question} context: {context}",
        label="answers",
        max_target_length=32,
        metrics=("squad",),
        hub=HubSource(path="rajpurkar/squad"),
        unpack=unpack_questions,
        prepare_label=answers_squad,
    ),
    mrqa_task(
        "newsqa", "Answer a question about a news article with a span of it.", "lucadiliello/newsqa"
    ),
    mrqa_task(
        "searchqa",
        "Answer a quiz clue from the snippets that a search engine returned for it.",
        "lucadiliello/searchqa",
    ),
    mrqa_task(
        "nq",
        "Answer a question that people asked a search engine from an encyclopaedia's page.",
        "lucadiliello/naturalquestionsshortqa",
    ),
    mrqa_task(
        "hotpotqa",
        "Answer a question that takes facts from two paragraphs together.",
        "lucadiliello/hotpotqa",
    ),
    Task(
        name="triviaqa",
        description="Answer a trivia question from general knowledge.",
        template="question: {question}",
        label="answers",
        max_target_length=32,
        metrics=("squad",),
        hub=HubSource(path="mandarjoshi/trivia_qa", config="rc.nocontext"),
        unpack=unpack_questions,
        prepare_label=answers_trivia_qa,
    ),
    Task(
        name="drop",
        description="Answer a question about a passage by counting, comparing or adding up.",
        template="question: {question} context: {passage}",
        label="answers",
        max_target_length=32,
        metrics=("squad",),
        hub=HubSource(path="ucinlp/drop"),
        aliases=(("passage", "context"),),
        unpack=unpack_questions,
        prepare_label=answers_drop,
    ),
)
