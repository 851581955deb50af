"""Published formats: records of nested files to rows, and rows to what a template needs.

`unpack_*` turns one record of a published file into rows with the hub's fields and lets rows that
already have them pass; a malformed question comes out as a RowError in its place, and the others
of its record stay. Labels are passed on where they are. `prepare_*` turns a row with the hub's
fields into one whose template fields are text; `answers_*` and `question_*` into one whose answers
are a list, or that names its group.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pemt.tasks.task import Row, field_of, text_of
from pemt.tasks.values import RowError

NEAR = 3  # words between a WSC span and its index that are put right


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


def each(
    row: Row, name: str, make: Callable[[Row], Iterable[Row | RowError]]
) -> Iterator[Row | RowError]:
    """What `make` gives for every object of the list in a field.

    In place of a malformed one comes a RowError that says which it is.
    """
    for number, entry in enumerate(part_of(row, name, list), start=1):
        try:
            if not isinstance(entry, dict):
                raise RowError(f"it must be an object, found {entry!r:.60}")
            made = list(make(entry))
        except RowError as error:
            made = [error]
        for one in made:
            is_bad = isinstance(one, RowError)
            yield RowError(f"{which(name, number, entry)}: {one}") if is_bad else one


def which(name: str, number: int, entry: Any) -> str:
    """An entry of a list by its id, or by its number where it has none."""
    keys = [key for key in ("id", "qid", "idx") if isinstance(entry, dict) and key in entry]
    return f"{name}, {keys[0]} {entry[keys[0]]!r:.60}" if keys else f"{name}, number {number}"


def optional(row: Row, name: str) -> Row:
    """A field as it is, or nothing: files to predict have no labels."""
    return {name: row[name]} if name in row else {}


# Questions about a text: SQuAD's json, the MRQA 2019 jsonl


def unpack_questions(record: Row) -> Iterable[Row | RowError]:
    """An article of SQuAD's json, or a context of the MRQA jsonl, to one row per question.

    MRQA's header line has no rows; triviaqa's rows have no context.
    """
    if "question" in record and "context" in record:
        return [record]
    if "paragraphs" in record:
        return each(record, "paragraphs", squad_rows)
    if "qas" in record:
        return mrqa_rows(record)
    return [] if "header" in record and "question" not in record else [record]


def squad_rows(paragraph: Row) -> Iterator[Row | RowError]:
    """A row per question of a paragraph; a question that has no answer gets []."""
    context = text_of(paragraph, "context")

    def row_of(question: Row) -> Iterator[Row]:
        row = {"id": field_of(question, "id"), "question": text_of(question, "question")}
        if "answers" in question:
            # SQuAD 2.0 gives impossible questions "plausible" answers elsewhere, never here.
            row["answers"] = [text_of(answer, "text") for answer in objects_of(question, "answers")]
        yield {**row, "context": context}

    return each(paragraph, "qas", row_of)


def mrqa_rows(record: Row) -> Iterator[Row | RowError]:
    """A row per question of a context."""
    context = text_of(record, "context")

    def row_of(question: Row) -> Iterator[Row]:
        row = {"key": field_of(question, "qid"), "question": text_of(question, "question")}
        yield {**row, "context": context, **optional(question, "answers")}

    return each(record, "qas", row_of)


def answers_squad(row: Row) -> Row:
    """The hub keeps answers as {"text": [...], "answer_start": [...]}."""
    answers = field_of(row, "answers")
    return {**row, "answers": field_of(answers, "text")} if isinstance(answers, dict) else row


def answers_trivia_qa(row: Row) -> Row:
    """The answer's own name first, then its aliases; MRQA's rows have a list already."""
    if "answers" in row:
        return row
    answer = part_of(row, "answer", dict)
    return {**row, "answers": [text_of(answer, "value"), *part_of(answer, "aliases", list)]}


def answers_drop(row: Row) -> Row:
    """Every annotator's answer is accepted; MRQA's rows have a list already."""
    if "answers" in row:
        return row
    return {**row, "answers": part_of(part_of(row, "answers_spans", dict), "spans", list)}


# SuperGLUE


def unpack_multirc(record: Row) -> Iterable[Row | RowError]:
    """A passage with its questions and their answers to one row per answer."""
    if "passage" not in record or "paragraph" in record:
        return [record]
    passage = part_of(record, "passage", dict)
    text, number = text_of(passage, "text"), field_of(record, "idx")

    def rows_of(question: Row) -> Iterator[Row | RowError]:
        asked = text_of(question, "question")
        idx = {"paragraph": number, "question": field_of(question, "idx")}

        def row_of(answer: Row) -> Iterator[Row]:
            yield {
                "paragraph": text,
                "question": asked,
                "answer": text_of(answer, "text"),
                **optional(answer, "label"),
                "idx": {**idx, "answer": field_of(answer, "idx")},
            }

        return each(question, "answers", row_of)

    return each(passage, "questions", rows_of)


def prepare_multirc(row: Row) -> Row:
    """Plain text for the passage."""
    paragraph = re.sub(r"<(?:br|b|/b)\s*/?>", " ", text_of(row, "paragraph"))
    return {**row, "paragraph": " ".join(paragraph.split())}


def question_multirc(row: Row) -> Row:
    """The question's number to group by."""
    idx = part_of(row, "idx", dict)
    group = f"{field_of(idx, 'paragraph')}-{field_of(idx, 'question')}"
    return {**row, "question_id": group}


def unpack_record(record: Row) -> Iterable[Row | RowError]:
    """A passage with its queries to one row per query; a span's `end` is inclusive."""
    if "qas" not in record or "query" in record:
        return [record]
    passage = part_of(record, "passage", dict)
    text = text_of(passage, "text")
    entities = []
    for span in objects_of(passage, "entities"):
        start, end = part_of(span, "start", int), part_of(span, "end", int)
        if not 0 <= start <= end < len(text):
            raise RowError(f"entity span {start}..{end} lies outside the passage of {len(text)}")
        entities.append(text[start : end + 1])

    def row_of(query: Row) -> Iterator[Row]:
        row: dict[str, Any] = {"passage": text, "query": text_of(query, "query")}
        if "answers" in query:
            row["answers"] = [text_of(answer, "text") for answer in objects_of(query, "answers")]
        idx = {"passage": record.get("idx"), "query": query.get("idx")}
        yield {**row, "entities": list(dict.fromkeys(entities)), "idx": idx}

    return each(record, "qas", row_of)


def prepare_record(row: Row) -> Row:
    """The highlights at a passage's end become sentences, the entities one comma-separated text."""
    passage = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", text_of(row, "passage"))
    entities = part_of(row, "entities", list)
    return {
        **row,
        "passage": passage.replace("\n@highlight\n", ". "),
        "entities": ", ".join(str(entity) for entity in entities),
    }


def unpack_wsc(record: Row) -> Iterable[Row]:
    """The spans of a published WSC record lie one level down, in `target`."""
    if "target" not in record or "span1_text" in record:
        return [record]
    rest = {name: value for name, value in record.items() if name != "target"}
    return [{**part_of(record, "target", dict), **rest}]


def prepare_wsc(row: Row) -> Row:
    """Marks the two spans in the text: the noun as `* Mark *`, the pronoun as `# he #`."""
    words = text_of(row, "text").split()
    spans = [(place_of(row, n, words), n, mark) for n, mark in ((1, "*"), (2, "#"))]
    # From the right, so that the first insertion does not move the other span.
    for start, n, mark in sorted(spans, reverse=True):
        end = start + max(1, len(text_of(row, f"span{n}_text").split()))
        words[start:end] = [mark, *words[start:end], mark]
    return {**row, "text": " ".join(words)}


def place_of(row: Row, n: int, words: list[str]) -> int:
    """The first word of a span: its index, or the nearest place that has the span's words.

    The published files have a few spans whose later words stand apart ("Kamenev and Zinoviev"), so
    at the index itself the first word decides.

    Raises RowError where neither is there.
    """
    index, text = part_of(row, f"span{n}_index", int), text_of(row, f"span{n}_text")
    span, size = spoken(text), max(1, len(text.split()))
    if not span:
        raise RowError(f"span{n}_text has no word: {text!r:.60}")
    if not 0 <= index <= index + size <= len(words):
        raise RowError(f"span{n}_index {index} lies outside the text of {len(words)} words")
    there = spoken(words[index])
    if there and (there[0].startswith(span[0]) or span[0].startswith(there[0])):
        return index
    near = range(max(0, index - NEAR), min(len(words) - size, index + NEAR) + 1)
    for start in sorted(near, key=lambda start: abs(start - index)):
        if holds(spoken(" ".join(words[start : start + size])), span):
            return start
    raise RowError(
        f"span{n}_text is {text!r:.60}, but word {index} of the text is {words[index]!r:.60}"
    )


def spoken(text: str) -> list[str]:
    """Words without punctuation and case."""
    return re.findall(r"\w+", text.casefold())


def holds(words: list[str], span: list[str]) -> bool:
    """Whether the words of a span stand in these, one after the other."""
    return any(words[i : i + len(span)] == span for i in range(len(words)))


# The others


def prepare_commonsense_qa(row: Row) -> Row:
    """The five choices as fields A to E."""
    choices = part_of(row, "choices", dict)
    texts = dict(zip(part_of(choices, "label", list), part_of(choices, "text", list), strict=False))
    return {**row, **texts}


def label_scitail(row: Row) -> Row:
    """The tsv_format and the dgem_format say "entails"."""
    return {**row, "gold_label": "entailment"} if row.get("gold_label") == "entails" else row


def unpack_commonsense_qa(record: Row) -> Iterable[Row]:
    """The published jsonl nests stem and choices in `question`."""
    if not isinstance(record.get("question"), dict):
        return [record]
    question = record["question"]
    choices = objects_of(question, "choices")
    row = {
        "question": text_of(question, "stem"),
        "choices": {name: [field_of(c, name) for c in choices] for name in ("label", "text")},
        "answerKey": record.get("answerKey"),
    }
    return [row]


def unpack_paws(record: Row) -> Iterable[Row]:
    """PAWS-QQP writes its sentences as Python bytes literals: b'...'."""
    row = dict(record)
    for name in ("sentence1", "sentence2"):
        text = row.get(name)
        if isinstance(text, str) and text[:2] in ("b'", 'b"'):
            try:
                row[name] = ast.literal_eval(text).decode("utf-8")
            except (SyntaxError, ValueError):
                raise RowError(f"field {name!r} is no bytes literal: {text:.60}") from None
    return [row]


def unpack_yelp_full(record: Row) -> Iterable[Row]:
    """Five-star reviews (field `ori`, 0 to 4) to polarity; the middle class has no polarity."""
    if "ori" not in record or "text" in record:
        return [record]
    stars = field_of(record, "label")
    if str(stars) not in ("0", "1", "2", "3", "4"):
        raise RowError(f"field 'label': unknown label {stars!r}; allowed: 0, 1, 2, 3, 4")
    polarity = {"0": 0, "1": 0, "2": -1, "3": 1, "4": 1}[str(stars)]
    text = text_of(record, "ori").replace('\\""', '"').replace("\\n", "\n")
    return [{"text": text, "label": polarity}]
