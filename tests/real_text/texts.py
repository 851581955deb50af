"""The real files as pemt reads them: texts and supervised tasks to pre-train on, sources, few-shot targets."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from pemt.data.local_files import read_rows
from pemt.tasks import RowError, Task, example_of, get_task, register_task

LONGEST = 60  # words of a review that are kept; the gap behind them is never cut
VALIDATION = 100  # training examples of a target that choose its learning rate and its best step
PAIR = "{sentence1} {sentence2} The same ? <extra_id_0>"
ENTAILS = "{premise} {hypothesis} Is it true ? <extra_id_0>"


@dataclass(frozen=True, kw_only=True)
class RealTask:
    """A task of the table that ends in a gap, as span corruption does, and answers with a word.

    Args:
        name: in pemt's table.
        template, labels: in place of the table's.
        train, test: files below the data folder; without a test file a tenth of the training file is it.
    """

    name: str
    template: str
    labels: tuple[str, ...]
    train: str
    test: str | None = None

    @property
    def task(self) -> Task:
        """As `write_task` registers it."""
        known = get_task(self.name)
        return Task(
            name=f"real-{self.name}",
            description=known.description,
            template="{source}",
            labels=self.labels,
            metrics=("accuracy",),
        )

    def examples(self, path: Path) -> list[tuple[str, str]]:
        """A file's labelled examples, source and target text."""
        known = replace(get_task(self.name), template=self.template, labels=self.labels)
        return examples_of(known, path, LONGEST)


SOURCES = (
    RealTask(
        name="sst2",
        template="{sentence} It was <extra_id_0>",
        labels=("terrible", "great"),
        train="glue/SST-2/train.slice.tsv",
        test="glue/SST-2/dev.tsv",
    ),
    RealTask(
        name="qqp",
        template=PAIR.replace("sentence", "question"),
        labels=("no", "yes"),
        train="glue/QQP/train.slice.json",
    ),
    RealTask(
        name="mnli",
        template=ENTAILS,
        labels=("yes", "perhaps", "no"),
        train="glue/MNLI/train.slice.json",
    ),
    RealTask(
        name="qnli",
        template="{question} {sentence} Is it said ? <extra_id_0>",
        labels=("yes", "no"),
        train="glue/QNLI/train.slice.json",
    ),
)
# Of the first three, in order, a source is related; of the last none.
TARGETS = (
    RealTask(
        name="yelp_polarity",
        template="{text} It was <extra_id_0>",
        labels=("terrible", "great"),
        train="yelp/dev.json",
        test="yelp/test.json",
    ),
    RealTask(
        name="mrpc",
        template=PAIR,
        labels=("no", "yes"),
        train="glue/MRPC/train.tsv",
        test="glue/MRPC/dev.tsv",
    ),
    RealTask(
        name="superglue-rte",
        template=ENTAILS,
        labels=("yes", "no"),
        train="superglue/RTE/train.jsonl",
        test="superglue/RTE/val.jsonl",
    ),
    RealTask(
        name="cola",
        template="{sentence} Is it English ? <extra_id_0>",
        labels=("no", "yes"),
        train="glue/CoLA/train.tsv",
        test="glue/CoLA/dev.tsv",
    ),
)
# Neither source nor target, in the table's own form: the supervised part of the pre-training.
SUPERVISED = {
    "stsb": "glue/STS-B/train.tsv",
    "paws": "paws/paws_qqp_dev_and_test.tsv",
    "wnli": "glue/WNLI/train.tsv",
    "superglue-cb": "superglue/CB/train.jsonl",
    "superglue-boolq": "superglue/BoolQ/val.slice.jsonl",
    "superglue-wic": "superglue/WiC/val.jsonl",
    "superglue-copa": "superglue/COPA/val.jsonl",
    "squad": "squad/squad_v2_dev_slice.json",
    "superglue-record": "superglue/ReCoRD/train.32shot.jsonl",
}


def examples_of(task: Task, path: Path, longest: int | None = None) -> list[tuple[str, str]]:
    """A file's labelled examples, source and target text; of a review its first words alone."""
    examples = []
    for place, row in read_rows(task, [path]):
        if isinstance(row, RowError):
            raise ValueError(f"{place}: {row}")
        if longest and "text" in row:
            row["text"] = " ".join(str(row["text"]).split()[:longest])
        if found := example_of(task, row):
            examples.append((found["source"], found["target"]))
    return examples


def plain_texts(data: Path) -> list[str]:
    """What span corruption reads: training files alone, each text once."""
    every = [(each.name, each.train) for each in (*SOURCES, *TARGETS)]
    texts: dict[str, None] = {}
    for name, file in (*every, *SUPERVISED.items()):
        texts |= dict.fromkeys(source for source, _ in examples_of(get_task(name), data / file))
    return list(texts)


def write_task(real: RealTask, data: Path, folder: Path, *, seed: int) -> None:
    """Register a task and write its three sets as JSON lines."""
    register_task(real.task)
    rows = real.examples(data / real.train)
    random.Random(seed).shuffle(rows)
    tenth = len(rows) // 10
    test = real.examples(data / real.test) if real.test else rows[:tenth]
    rows = rows if real.test else rows[tenth:]
    sets = {"test": test, "validation": rows[:VALIDATION], "train": rows[VALIDATION:]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in sets.items():
        lines = (json.dumps({"source": source, "label": label}) for source, label in part)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
