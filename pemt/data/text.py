"""Files of text, in whichever Unicode and with whichever line ends they were saved."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pemt.data.errors import DataError


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked where its name ends in .gz, UTF-16 as UTF-8."""
    is_packed = path.suffix.lower() == ".gz"
    return as_utf8(gzip.open(path, "rb") if is_packed else path.open("rb"), str(path))


def as_utf8(file: Any, name: str) -> io.BufferedReader:
    """A file of UTF-16 or UTF-32, as its byte order mark tells, as one of UTF-8; any other as it is.

    Raises DataError where it is not what its mark says.
    """
    reader = io.BufferedReader(file)
    start = reader.peek(4)[:4]
    if not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return reader
    encoding = "utf-32" if start == codecs.BOM_UTF32_LE else "utf-16"
    with reader:
        try:
            utf8 = io.BytesIO(reader.read().decode(encoding).encode("utf-8"))
            return io.BufferedReader(utf8)
        except UnicodeError as error:
            raise DataError(f"{name}: broken {encoding}: {error}; save it as UTF-8") from None


def text_lines(path: Path) -> Iterator[str]:
    """A table's lines with their ends; bad UTF-8 comes through as lone surrogates.

    They end in \\n, or in \\r where there is no \\n (Excel's format for the Macintosh).
    """
    with open_bytes(path) as file:
        start = file.peek(8192)
        newline = "\r" if b"\r" in start and b"\n" not in start else "\n"
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
        yield from text
