"""Local files: every format, their traps, and the file and line of whatever cannot be read."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pemt.data import DataError
from pemt.data.formats import read_records
from pemt.data.local_files import find_files, read_rows
from pemt.data.tables import Columns
from pemt.tasks import RowError, get_task

ROWS = [{"text": 'a, "b"', "label": "0"}, {"text": "c\td é", "label": "1"}]


COLUMNS = Columns(names=("text", "label"), known=frozenset(["text", "label"]))


def rows_of(path, columns=None):
    return [record for _, record in read_records(path, columns)]


def errors_of(path):
    return {place: str(r) for place, r in read_records(path) if isinstance(r, RowError)}


def test_every_format_gives_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    texts = {
        "a.jsonl": lines + "\n\n",
        "b.jsonl": "\ufeff" + lines.replace("\n", "\r\n"),
        "c.json": json.dumps(ROWS, indent=1),
        "d.json": json.dumps({"0": ROWS[0], "1": ROWS[1]}),
        "e.json": json.dumps({"version": "1.1", "data": ROWS}),
        "f.json": lines,
        "g.csv": 'text,label\n"a, ""b""",0\n"c\td é",1\n',
        "h.csv": '\ufefftext,label\r\n"a, ""b""",0\r\n"c\td é",1\r\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("utf-8"))
        assert rows_of(tmp_path / name) == ROWS, name
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8")))
    assert rows_of(tmp_path / "i.jsonl.gz") == ROWS
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "j.parquet")
    assert rows_of(tmp_path / "j.parquet") == ROWS


def test_tsv_is_read_without_quoting_and_with_or_without_a_header(tmp_path):
    body = '"open quote\t0\nit\'s "so"\t1\n'
    expected = [{"text": '"open quote', "label": "0"}, {"text": 'it\'s "so"', "label": "1"}]
    (tmp_path / "a.tsv").write_text("\ufefftext\tlabel\n" + body, encoding="utf-8")
    (tmp_path / "b.tsv").write_text(body, encoding="utf-8")
    assert rows_of(tmp_path / "a.tsv") == expected
    assert rows_of(tmp_path / "a.tsv", COLUMNS) == expected
    assert rows_of(tmp_path / "b.tsv", COLUMNS) == expected


def test_a_csv_field_may_span_lines_and_the_place_is_its_first(tmp_path):
    (tmp_path / "a.csv").write_text(
        'text,label\n"two\nlines",0\nwhole,1\nshort\n', encoding="utf-8"
    )
    places = [place.rpartition(":")[2] for place, _ in read_records(tmp_path / "a.csv")]
    assert rows_of(tmp_path / "a.csv")[0] == {"text": "two\nlines", "label": "0"}
    assert places == ["2", "4", "5"]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n{"x": 2}\n', 2, "broken JSON: Expecting value at column"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', 2, "no JSON object: [1]"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', 2, "bad UTF-8: invalid start byte at byte 7"),
        ("a.json", b'[{"x": 1},\n{"x": }]', 2, "broken JSON: Expecting value"),
        ("a.json", b'[{"x": 1},\n{"x": "\xff"}]', 2, "bad UTF-8: invalid start byte"),
        (
            "a.jsonl",
            b'{"x": 1}\n{"x": ' + b"1" * 5000 + b"}\n",
            2,
            "JSON that is not read: Exceeds",
        ),
        ("a.jsonl", b'{"x": 1}\n' + b"[" * 100_000 + b"\n", 2, "not read: nested too deep"),
        ("a.tsv", b"x\ty\n1\n", 2, "found 1 fields, the header has 2"),
        ("a.tsv", b"x\ty\n1\t\xff\n", 2, "bad UTF-8"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", 3, "found 3 fields, the header has 2"),
        ("a.csv", b'x,y\n1,"a"b\n', 2, "broken CSV"),
        ("a.csv", b"x,y\n1,\xff\n", 2, "bad UTF-8"),
    ],
)
def test_what_cannot_be_read_has_its_file_and_line(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    found = errors_of(path)
    assert list(found) == [f"{path}:{line}"]
    assert message in found[f"{path}:{line}"]


@pytest.mark.parametrize("form", ['[{"x": 1},\n%s, {"x": 2}]', '{"n": 0, "data": [{"x": 1},\n%s]}'])
@pytest.mark.parametrize("value", ['{"x": ' + "1" * 5000 + "}", "[" * 100_000 + "]" * 100_000, "3"])
def test_an_entry_of_json_has_its_line_and_its_number(tmp_path, form, value):
    path = tmp_path / "a.json"
    path.write_text(form % value)
    records = dict(read_records(path))
    assert records[f"{path}:1: entry 1"] == {"x": 1}
    assert isinstance(records[f"{path}:2: entry 2"], RowError)


def test_the_lines_of_json_are_those_of_its_entries(tmp_path):
    path = tmp_path / "a.json"
    for text in (json.dumps(ROWS, indent=1), json.dumps({"a": ROWS[0], "b": ROWS[1]}, indent=1)):
        path.write_text(text)
        lines = [place.split(":")[-2] for place, _ in read_records(path)]
        assert [text.splitlines()[int(line) - 1].strip()[-1] for line in lines] == ["{", "{"]
        assert rows_of(path) == ROWS
    path.write_text("7")
    assert errors_of(path) == {f"{path}:1: entry 1": "no JSON object: 7"}


def test_good_rows_behind_a_bad_one_are_still_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'x,y\n1,"a"b\n3,4\n\xff,1\n5,6\n')
    assert [r for r in rows_of(path) if isinstance(r, dict)] == [
        {"x": "3", "y": "4"},
        {"x": "5", "y": "6"},
    ]


def test_files_that_are_no_data_files(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match="the extension is 'xlsx'; allowed: jsonl, json, csv"):
        rows_of(tmp_path / "a.xlsx")
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(DataError, match="no readable parquet file"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_text("x")
    with pytest.raises(DataError, match="cannot be read: Not a gzipped file"):
        rows_of(tmp_path / "a.jsonl.gz")
    whole = gzip.compress(b'{"x": 1}\n' * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:20] + b"\xff" * 9 + whole[29:])
    with pytest.raises(DataError, match="cannot be read: Error -3 while decompressing"):
        rows_of(tmp_path / "b.jsonl.gz")
    with pytest.raises(DataError, match=r"cannot be read: .*No such file"):
        rows_of(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.tsv", "dev.tsv", "test.tsv"], ["train.tsv", "dev.tsv", "test.tsv"]),
        (["train.jsonl", "val.jsonl", "dev32.jsonl"], ["train.jsonl", "val.jsonl"]),
        (
            ["train.slice.tsv", "train.kshot.tsv", "dev.kshot.tsv"],
            ["train.slice.tsv", "dev.kshot.tsv"],
        ),
        (["train.32shot.jsonl", "dev32.jsonl"], ["train.32shot.jsonl", "dev32.jsonl"]),
        (["train-v1.1.json", "dev-v1.1.json"], ["train-v1.1.json", "dev-v1.1.json"]),
        (["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"], ["train.tsv", "dev_matched.tsv"]),
        (
            ["snli_1.0_train.jsonl", "snli_1.0_dev.jsonl"],
            ["snli_1.0_train.jsonl", "snli_1.0_dev.jsonl"],
        ),
        (["train.jsonl.gz", "validation.parquet"], ["train.jsonl.gz", "validation.parquet"]),
        (
            ["train_rand_split.jsonl", "dev_rand_split.jsonl"],
            ["train_rand_split.jsonl", "dev_rand_split.jsonl"],
        ),
    ],
)
def test_splits_are_found_by_their_published_names(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    found, _ = find_files(get_task("rte"), tmp_path)
    assert [path.name for paths in found.values() for path in paths] == expected


def test_shards_of_a_split_belong_together(tmp_path):
    names = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for name in names:
        (tmp_path / name).touch()
    found, _ = find_files(get_task("rte"), tmp_path)
    assert [path.name for path in found["train"]] == names


def test_a_folder_without_the_files_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no file of rte; looked for train, .*found: notes.txt"):
        find_files(get_task("rte"), tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        find_files(get_task("rte"), tmp_path / "none")
    for name in ("train.tsv", "train.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"several files for train: train.csv, train.tsv; keep one"):
        find_files(get_task("rte"), tmp_path)


def test_published_columns_get_the_names_of_the_hub(tmp_path):
    (tmp_path / "train.tsv").write_text("Quality\t#1 String\t#2 String\n1\ta\tb\n")
    ((place, row),) = read_rows(get_task("mrpc"), [tmp_path / "train.tsv"])
    assert (row["sentence1"], row["sentence2"], row["label"]) == ("a", "b", "1")
    assert place == f"{tmp_path}/train.tsv:2"


def test_a_malformed_nested_record_is_reported_at_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"idx": 0, "passage": {"text": "t", "questions": []}}\n{"passage": 3}\n')
    ((place, error),) = read_rows(get_task("superglue-multirc"), [path])
    assert place == f"{path}:2"
    assert "field 'passage' must be a dict" in str(error)


def test_a_malformed_question_is_reported_by_line_and_id_and_leaves_the_others(tmp_path):
    questions = [{"id": f"q{i}", "question": "Q?", "answers": [{"text": "A"}]} for i in range(10)]
    del questions[2]["question"]
    article = {"title": "T", "paragraphs": [{"context": "C", "qas": questions}]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "1.1", "data": [article, article]}, indent=1))
    rows = list(read_rows(get_task("squad"), [path]))
    assert len(rows) == 20
    bad = [(place, str(row)) for place, row in rows if isinstance(row, RowError)]
    lines = [number for number, line in enumerate(path.open(), 1) if line == "  {\n"]
    assert [place for place, _ in bad] == [
        f"{path}:{line}: entry {number}" for number, line in enumerate(lines, 1)
    ]
    assert "paragraphs, number 1: qas, id 'q2': field 'question' is missing" in bad[0][1]
