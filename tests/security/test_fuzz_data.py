"""Hundreds of mutated data files: every row is an example, or told in one clear line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from hypothesis import strategies as st

from pemt.config import PemtError
from pemt.data.examples import example_row
from pemt.data.local_files import read_rows
from pemt.tasks import get_task
from tests.security.fuzzing import mutated_text, mutated_values, read_or_refused

QUESTION = {
    "id": "q1",
    "qid": 7,
    "question": "Where?",
    "answers": [{"text": "Rome", "answer_start": 0}],
}
ANSWERS = [{"text": "Rain", "idx": 0, "label": 1}, {"text": "Sun", "idx": 1, "label": 0}]
SPANS = {"span1_index": 0, "span1_text": "Ann", "span2_index": 2, "span2_text": "she"}
RECORDS: dict[str, Any] = {
    "squad": {"paragraphs": [{"context": "C", "qas": [QUESTION, QUESTION]}]},
    "newsqa": {"context": "C", "qas": [{**QUESTION, "answers": ["Rome"]}]},
    "triviaqa": {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Anna"]}},
    "drop": {"passage": "P", "question": "Who?", "answers_spans": {"spans": ["Ann"]}},
    "superglue-multirc": {
        "idx": 2,
        "passage": {"text": "T", "questions": [{"question": "Q", "idx": 4, "answers": ANSWERS}]},
    },
    "superglue-record": {
        "idx": 0,
        "passage": {"text": "Ann ran.", "entities": [{"start": 0, "end": 2}]},
        "qas": [{"query": "@placeholder", "idx": 1, "answers": [{"text": "Ann"}]}],
    },
    "superglue-wsc-fixed": {"idx": 0, "label": True, "target": SPANS, "text": "Ann said she ran."},
    "commonsense_qa": {
        "question": {"stem": "S", "choices": [{"label": c, "text": c} for c in "ABCDE"]},
        "answerKey": "A",
    },
    "yelp_polarity": {"ori": "Good.", "label": 3},
    "paws": {"sentence1": "b'a'", "sentence2": "b", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 3.7},
    "superglue-cb": {"premise": "a", "hypothesis": "b", "label": "neutral"},
}


def read_all(name: str, path: Path) -> None:
    """Every row as a run would take it; the first malformed one is told at the end, as a run tells it."""
    task, problems = get_task(name), []
    for place, row in read_rows(task, [path]):
        example = example_row(task, place, row)
        "".join([example["source"], example["target"], *example["references"]]).encode("utf-8")
        problems += [example["problem"]] if example["problem"] else []
    if problems:
        raise PemtError(problems[0])


def test_nested_records(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"

    def read(name: str, changed: dict[str, Any]) -> None:
        path.write_text(f"{json.dumps(changed)}\n{json.dumps(RECORDS[name])}\n")
        read_all(name, path)

    read_or_refused(one_of_each(RECORDS, mutated_values), lambda given: read(*given))


def test_bytes_of_data_files(tmp_path: Path) -> None:
    row = RECORDS["superglue-cb"]
    line = json.dumps(row)
    originals = {
        "a.jsonl": f"{line}\n{line}\n",
        "b.json": json.dumps([row, row], indent=1),
        "c.json": json.dumps({"version": "1", "data": [row, row]}),
        "d.tsv": "premise\thypothesis\tlabel\na\tb\t0\nc\td\t1\n",
        "e.csv": 'premise,hypothesis,label\n"a ""x""",b,0\n"c\nc",d,1\n',
    }
    read_or_refused(
        one_of_each(originals, lambda text: mutated_text([text])),
        lambda given: read_written(tmp_path / given[0], given[1]),
    )


def test_bytes_of_packed_files(tmp_path: Path) -> None:
    """gzip and parquet check less than they seem to: what they give is looked at like any other row."""
    row = {"premise": "a" * 50, "hypothesis": "b", "label": "0"}
    parquet.write_table(pa.Table.from_pylist([row] * 20), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode() * 20))
    originals = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read_or_refused(
        one_of_each(originals, broken_bytes),
        lambda given: read_written(tmp_path / given[0], given[1]),
    )


def one_of_each(
    originals: dict[str, Any], mutated: Callable[[Any], st.SearchStrategy[Any]]
) -> st.SearchStrategy[tuple[str, Any]]:
    """A name, and what belongs to it, mutated."""
    each = {name: st.tuples(st.just(name), mutated(originals[name])) for name in sorted(originals)}
    return st.sampled_from(list(each)).flatmap(each.__getitem__)


@st.composite
def broken_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 9)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


def read_written(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read_all("superglue-cb", path)
