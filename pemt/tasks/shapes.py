"""Rows that are no plain fields: out of published files, and into a template's fields.

`unpack_*` turns one record of a published file into rows with the hub's fields and lets rows that
already have them pass. `prepare_*` turns a row with the hub's fields into one whose template fields
are text; `answers_*` and `question_*` into one whose answers are a list, or that names its group.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pemt.tasks.task import Row, RowError, field_of, text_of


def part_of(row: Row, name: str, kind: type) -> Any:
    """A field of a given container type, or RowError."""
    value = field_of(row, name)
    if not isinstance(value, kind):
        raise RowError(f"field {name!r} must be a {kind.__name__}, found {value!r:.60}")
    return value


def objects_of(row: Row, name: str) -> list[Mapping[str, Any]]:
    """A field that must be a list of objects."""
    values = part_of(row, name, list)
    if not all(isinstance(value, dict) for value in values):
        raise RowError(f"field {name!r} must be a list of objects, found {values!r:.60}")
    return values


# SQuAD and MRQA


def unpack_squad(record: Row) -> Iterator[Row]:
    """An article of SQuAD's json to one row per question; a question that has no answer gets []."""
    if "paragraphs" not in record:
        yield record
        return
    for paragraph in objects_of(record, "paragraphs"):
        for question in objects_of(paragraph, "qas"):
            answers = [text_of(answer, "text") for answer in objects_of(question, "answers")]
            # SQuAD 2.0 gives impossible questions "plausible" answers elsewhere, never here.
            yield {
                "id": field_of(question, "id"),
                "question": text_of(question, "question"),
                "context": text_of(paragraph, "context"),
                "answers": answers,
            }


def unpack_mrqa(record: Row) -> Iterator[Row]:
    """A context of the MRQA 2019 jsonl to one row per question; the header line has no rows."""
    if "header" in record:
        return
    if "qas" not in record:
        yield record
        return
    for question in objects_of(record, "qas"):
        yield {
            "key": field_of(question, "qid"),
            "question": text_of(question, "question"),
            "context": text_of(record, "context"),
            "answers": part_of(question, "answers", list),
        }


def answers_squad(row: Row) -> Row:
    """The hub keeps answers as {"text": [...], "answer_start": [...]}."""
    answers = field_of(row, "answers")
    return {**row, "answers": field_of(answers, "text")} if isinstance(answers, dict) else row


def answers_trivia_qa(row: Row) -> Row:
    """The answer's own name first, then its aliases."""
    answer = part_of(row, "answer", dict)
    return {**row, "answers": [text_of(answer, "value"), *part_of(answer, "aliases", list)]}


def answers_drop(row: Row) -> Row:
    """Every annotator's answer is accepted."""
    return {**row, "answers": part_of(part_of(row, "answers_spans", dict), "spans", list)}


# SuperGLUE


def unpack_multirc(record: Row) -> Iterator[Row]:
    """A passage with its questions and their answers to one row per answer."""
    if "passage" not in record:
        yield record
        return
    passage = part_of(record, "passage", dict)
    for question in objects_of(passage, "questions"):
        for answer in objects_of(question, "answers"):
            yield {
                "paragraph": text_of(passage, "text"),
                "question": text_of(question, "question"),
                "answer": text_of(answer, "text"),
                "label": field_of(answer, "label"),
                "idx": {
                    "paragraph": field_of(record, "idx"),
                    "question": field_of(question, "idx"),
                    "answer": field_of(answer, "idx"),
                },
            }


def prepare_multirc(row: Row) -> Row:
    """Plain text for the passage."""
    paragraph = re.sub(r"<(?:br|b|/b)\s*/?>", " ", text_of(row, "paragraph"))
    return {**row, "paragraph": " ".join(paragraph.split())}


def question_multirc(row: Row) -> Row:
    """The question's number to group by."""
    idx = part_of(row, "idx", dict)
    group = f"{field_of(idx, 'paragraph')}-{field_of(idx, 'question')}"
    return {**row, "question_id": group}


def unpack_record(record: Row) -> Iterator[Row]:
    """A passage with its queries to one row per query; a span's `end` is inclusive."""
    if "qas" not in record:
        yield record
        return
    passage = part_of(record, "passage", dict)
    text = text_of(passage, "text")
    entities = []
    for span in objects_of(passage, "entities"):
        start, end = part_of(span, "start", int), part_of(span, "end", int)
        if not 0 <= start <= end < len(text):
            raise RowError(f"entity span {start}..{end} lies outside the passage of {len(text)}")
        entities.append(text[start : end + 1])
    for query in objects_of(record, "qas"):
        yield {
            "passage": text,
            "query": text_of(query, "query"),
            "entities": list(dict.fromkeys(entities)),
            "answers": [text_of(answer, "text") for answer in objects_of(query, "answers")],
            "idx": {"passage": record.get("idx"), "query": query.get("idx")},
        }


def prepare_record(row: Row) -> Row:
    """The highlights at a passage's end become sentences, the entities one comma-separated text."""
    passage = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", text_of(row, "passage"))
    entities = part_of(row, "entities", list)
    return {
        **row,
        "passage": passage.replace("\n@highlight\n", ". "),
        "entities": ", ".join(str(entity) for entity in entities),
    }


def unpack_wsc(record: Row) -> Iterator[Row]:
    """The spans of a published WSC record lie one level down, in `target`."""
    if "target" not in record:
        yield record
        return
    yield {**part_of(record, "target", dict), **{k: v for k, v in record.items() if k != "target"}}


def prepare_wsc(row: Row) -> Row:
    """Marks the two spans in the text: the noun as `* Mark *`, the pronoun as `# he #`."""
    words = text_of(row, "text").split()
    spans = [(part_of(row, f"span{n}_index", int), n, mark) for n, mark in ((1, "*"), (2, "#"))]
    # From the right, so that the first insertion does not move the other span.
    for start, n, mark in sorted(spans, reverse=True):
        length = max(1, len(text_of(row, f"span{n}_text").split()))
        if not 0 <= start <= start + length <= len(words):
            raise RowError(f"span{n}_index {start} lies outside the text of {len(words)} words")
        words[start : start + length] = [mark, *words[start : start + length], mark]
    return {**row, "text": " ".join(words)}


# The others


def prepare_commonsense_qa(row: Row) -> Row:
    """The five choices as fields A to E."""
    choices = part_of(row, "choices", dict)
    texts = dict(zip(part_of(choices, "label", list), part_of(choices, "text", list), strict=False))
    return {**row, **texts}


def unpack_commonsense_qa(record: Row) -> Iterator[Row]:
    """The published jsonl nests stem and choices in `question`."""
    if not isinstance(record.get("question"), dict):
        yield record
        return
    question = part_of(record, "question", dict)
    choices = objects_of(question, "choices")
    yield {
        "question": text_of(question, "stem"),
        "choices": {name: [field_of(c, name) for c in choices] for name in ("label", "text")},
        "answerKey": record.get("answerKey"),
    }


def unpack_paws(record: Row) -> Iterator[Row]:
    """PAWS-QQP writes its sentences as Python bytes literals: b'...'."""
    row = dict(record)
    for name in ("sentence1", "sentence2"):
        text = row.get(name)
        if isinstance(text, str) and text[:2] in ("b'", 'b"'):
            try:
                row[name] = ast.literal_eval(text).decode("utf-8")
            except (SyntaxError, ValueError):
                raise RowError(f"field {name!r} is no bytes literal: {text:.60}") from None
    yield row


def unpack_yelp_full(record: Row) -> Iterator[Row]:
    """Five-star reviews (field `ori`, 0 to 4) to polarity; the middle class has no polarity."""
    if "ori" not in record:
        yield record
        return
    stars = field_of(record, "label")
    if str(stars) not in ("0", "1", "2", "3", "4"):
        raise RowError(f"field 'label': unknown label {stars!r}; allowed: 0, 1, 2, 3, 4")
    polarity = {"0": 0, "1": 0, "2": -1, "3": 1, "4": 1}[str(stars)]
    text = text_of(record, "ori").replace('\\""', '"').replace("\\n", "\n")
    yield {"text": text, "label": polarity}
