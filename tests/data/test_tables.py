"""Tables as pandas, Excel, R and hand write them; a malformed row never yields half a row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset

from pemt.data import DataError
from pemt.data.formats import note_on, read_records
from pemt.data.local_files import columns_of
from pemt.data.tables import Columns, layout_of
from pemt.tasks import RowError, get_task

ROWS = [
    {"text": 'He said "box 0" to me', "label": "no"},
    {"text": "plain", "label": "yes"},
    {"text": "first line\nsecond line", "label": "no"},
    {"text": 'a\ttab, and "quotes"', "label": "yes"},
    {"text": '"wholly quoted"', "label": "no"},
    {"text": "semi;colon | bar é", "label": "yes"},
]
SIMPLE = [ROWS[0], ROWS[1]]


def rows_of(path, columns=None):
    return [record for _, record in read_records(path, columns)]


def good_rows(path):
    return [record for record in rows_of(path) if isinstance(record, dict)]


@pytest.mark.parametrize("rows", [ROWS, SIMPLE, ROWS[:4], ROWS[1:3]])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("a.tsv", "\t"),
        ("a.csv", ","),
        ("a.csv", ";"),
        ("a.csv", "\t"),
        ("a.tsv", ","),
        ("A.TXT", "\t"),
    ],
)
def test_what_pandas_writes_is_read(tmp_path, rows, quoting, line_end, name, separator):
    path = tmp_path / name
    table = pd.DataFrame(rows)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        table.to_csv(
            path,
            sep=separator,
            quoting=quoting,
            lineterminator=line_end,
            encoding=encoding,
            index=False,
        )
        assert rows_of(path) == rows


def test_a_bare_carriage_return_within_a_field_is_kept(tmp_path):
    rows = [{"text": "first \r second", "label": "no"}, {"text": "plain", "label": "yes"}]
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        text = 'text,label\n"first \r second",no\nplain,yes\n'
        (tmp_path / name).write_bytes(text.replace(",", separator).encode())
        assert rows_of(tmp_path / name) == rows
    (tmp_path / "b.tsv").write_bytes(b"text\tlabel\nfirst \r second\tno\nplain\tyes\n")
    assert rows_of(tmp_path / "b.tsv") == rows


def test_an_index_column_is_left_out_and_one_that_has_a_name_is_a_column(tmp_path):
    pd.DataFrame(SIMPLE).to_csv(tmp_path / "a.csv")
    assert rows_of(tmp_path / "a.csv") == SIMPLE
    pd.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    assert [row["Unnamed: 0"] for row in rows_of(tmp_path / "b.tsv")] == ["0", "1"]
    assert [row["text"] for row in rows_of(tmp_path / "b.tsv")] == [row["text"] for row in SIMPLE]


def test_excels_tab_separated_text_is_read(tmp_path):
    # Excel saves "Unicode text" as UTF-16 and puts fields with commas in quotes.
    text = 'text\tlabel\r\n"well, yes"\tno\r\nplain\tyes\r\n"three, two, one"\tno\r\n'
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("utf-16"))
    assert [row["text"] for row in rows_of(path)] == ["well, yes", "plain", "three, two, one"]
    assert "the quotes around 2 fields are syntax" in note_on(path, Columns())
    assert "`quoting` of a --task_file" in note_on(path, Columns())
    path.write_text(text + "a, b\tno\n")  # Excel would have quoted it
    assert rows_of(path)[0]["text"] == '"well, yes"'
    assert "quotes are text" in note_on(path, Columns())


def test_what_excel_writes_in_europe_and_on_the_macintosh_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfsep=;\r\ntext;label\r\n"a;b, c";0\r\nd, e;1\r\n;\r\n')
    assert rows_of(path) == [{"text": "a;b, c", "label": "0"}, {"text": "d, e", "label": "1"}]
    assert note_on(path, Columns()).endswith("columns are separated by ';'")
    path.write_text("sep=;\n")
    assert rows_of(path) == []
    path.write_bytes(b"text,label\ra,0\rb,1\r")
    assert rows_of(path) == [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}]
    path.write_text('text, label\n"a, b", 0\n', encoding="utf-8")
    assert rows_of(path) == [{"text": "a, b", "label": "0"}]


@pytest.mark.parametrize(
    "body",
    [
        '"open quote\t0\nit\'s "so"\t1\n',
        '"open quote\t0\nplain\t1\nclosed elsewhere"\t0\n',  # would swallow three rows
        '"No" he said "no"\t0\nplain\t1\n',
        '"Well." "Yes."\t0\nplain\t1\n',
        '"a sentence in quotes"\t0\nplain\t1\n',  # no writer quotes it
        '5" pipe\t0\n6" pipe\t1\n',
    ],
)
def test_quotes_that_no_writer_of_tables_leaves_are_text(tmp_path, body):
    path = tmp_path / "a.tsv"
    path.write_text(f"text\tlabel\n{body}")
    expected = [line.split("\t") for line in body.splitlines()]
    assert [list(row.values()) for row in rows_of(path)] == expected


def test_a_task_may_say_what_quotes_are(tmp_path):
    path = tmp_path / "a.tsv"
    pd.DataFrame(SIMPLE).to_csv(path, sep="\t", index=False)
    assert rows_of(path, Columns(quoting="none"))[0]["text"] == '"He said ""box 0"" to me"'
    path.write_text('text\tlabel\n"so"\tno\n')
    assert rows_of(path, Columns(quoting="minimal"))[0]["text"] == "so"
    assert rows_of(path)[0]["text"] == '"so"'


def test_glues_own_files_keep_their_quotes(shared):
    for path in sorted((shared / "data").rglob("*.tsv")):
        task = {"QQP": "qqp", "CoLA": "cola"}.get(path.parent.name, "rte")
        columns = columns_of(get_task(task))
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        found = [list(row.values()) for row in rows_of(path, columns)]
        assert found == [line.split("\t") for line in lines][-len(found) :]
        assert len(lines) - len(found) == (0 if task == "cola" else 1)
        if '"' in path.read_text() and task != "qqp" and path.parent.name != "SST-2":
            is_told = "quotes are text" in note_on(path, columns)
            assert is_told or not layout_of(path, "\t", columns).is_quoted


HALVES = {
    "in front": ("text\tlabel\nfirst\nsecond\tno\nwhole\tyes\nlast\tno\n", ["whole", "last"]),
    "behind": ("label\ttext\nno\tfirst\nsecond\nyes\twhole\nno\tlast\n", ["last"]),
    "over a blank line": (
        "text\tlabel\nfirst\n\nsecond\tno\nwhole\tyes\nlast\tno\n",
        ["whole", "last"],
    ),
    "three lines": ("text\tlabel\na\nb\nc\tno\nlast\tno\n", ["last"]),
}


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("case", HALVES)
def test_a_field_over_lines_without_quotes_leaves_no_half(tmp_path, name, case):
    text, whole = HALVES[case]
    path = tmp_path / name
    path.write_text(text.replace("\t", "," if name == "a.csv" else "\t"))
    assert [row["text"] for row in good_rows(path)] == whole
    bad = [str(row) for row in rows_of(path) if isinstance(row, RowError)]
    assert any("found 1 fields, the header has 2" in each for each in bad)


def test_a_broken_quoted_field_leaves_no_half(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a "b" c\nsecond line",no\nwhole,yes\n')
    assert [row["text"] for row in good_rows(path)] == ["whole"]
    path.write_text('text,label\nwhole,yes\n"never closed,no\nx,yes\ny,no\n')
    assert [row["text"] for row in good_rows(path)] == ["whole"]
    (error,) = [str(row) for row in rows_of(path) if isinstance(row, RowError)]
    assert error.endswith("(3 lines)")


def test_pandas_tsv_with_a_short_row_keeps_its_quotes(tmp_path):
    path = tmp_path / "a.tsv"
    pd.DataFrame(ROWS).to_csv(path, sep="\t", index=False)
    path.write_text(path.read_text() + "x\ty\nshort\n", encoding="utf-8")
    assert good_rows(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label,text\na,0,b\n", "a.csv:1: the header has column 'text' 2 times"),
        ("a.tsv", b"text\tlabel\tlabel \na\t0\t1\n", "column 'label' 2 times"),
        ("a.csv", "t\u00e9xt,label\na,0\n".encode("latin-1"), "the header is no UTF-8"),
        ("a.csv", "text,label\na,0\n".encode("utf-16-le"), "bytes of 0 in the first line"),
        ("a.csv", b"\xff\xfe\x00\xd8", "broken utf-16"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


def test_columns_that_stand_twice_in_other_formats(tmp_path):
    table = pa.table([[1], [2]], names=["a", "a"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'a' stands twice"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"a": 1, "a": 2}\n{"a": 3}\n')
    error, row = rows_of(tmp_path / "a.jsonl")
    assert (str(error), row) == ("key 'a' stands twice in one object", {"a": 3})


def test_trailing_columns_without_a_name_are_empty_or_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,,\na,0,,\n,,,\nHe said, hi,0,\n")
    row, error = rows_of(path)
    assert row == {"text": "a", "label": "0"}
    assert str(error) == "found '0' in a column without a name"


def test_json_as_it_is_written(tmp_path):
    frame = pd.DataFrame(SIMPLE)
    frame.to_json(tmp_path / "a.json")
    frame.to_json(tmp_path / "b.jsonl", orient="records")
    frame.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "d.json", orient="table", index=False)
    (tmp_path / "e.json").write_text(json.dumps({name: list(frame[name]) for name in frame}))
    (tmp_path / "f.ndjson").write_bytes("\n".join(map(json.dumps, SIMPLE)).encode("utf-16"))
    (tmp_path / "g.txt").write_text("\n".join(map(json.dumps, SIMPLE)))
    (tmp_path / "h.txt").write_text(json.dumps(SIMPLE, indent=1))
    for path in sorted(tmp_path.iterdir()):
        assert rows_of(path) == SIMPLE, path.name
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    assert rows_of(tmp_path / "one.json") == ROWS[:1]


def test_what_datasets_saves_to_disk_is_read(tmp_path):
    Dataset.from_list(SIMPLE).save_to_disk(tmp_path / "train")
    (path,) = (tmp_path / "train").glob("*.arrow")
    assert rows_of(path) == SIMPLE
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), pa.Table.from_pylist(SIMPLE).schema) as file:
        file.write_table(pa.Table.from_pylist(SIMPLE))
    assert rows_of(tmp_path / "b.arrow") == SIMPLE


def test_a_field_longer_than_csvs_own_limit(tmp_path):
    long = io.StringIO()
    csv.writer(long).writerows([["text", "label"], ["x" * 200_000, "0"]])
    Path(tmp_path / "a.csv").write_text(long.getvalue())
    assert len(rows_of(tmp_path / "a.csv")[0]["text"]) == 200_000
