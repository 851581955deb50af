"""Whether a file's quotes are syntax or text.

Some writers of tab-separated files quote (pandas, Excel), others never do (GLUE). Read by the wrong
rule a field keeps its quotes, or a row is two halves. So both readings are held against the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Passages longer than csv's default limit of 128 KiB exist.
MAX_FIELD = 16 * 1024 * 1024


@dataclass
class Evidence:
    """What a file's quotes look like under both readings.

    A tie in malformed rows is broken by what only a writer that quotes leaves: a quoted header,
    quotes doubled, commas in quotes and nowhere else (Excel). A field over several lines breaks rows
    of the other reading; where it does not, the quotes at its ends belong to two rows.
    """

    header: str  # says how many columns there are
    delimiter: str
    malformed_as_text: int = 0
    malformed_as_syntax: int = 0
    # in quotes: of them, over several lines, with doubled quotes or a CR, with commas
    fields: int = 0
    spanning: int = 0
    doubled: int = 0
    commas: int = 0
    bare_commas: bool = False

    def __post_init__(self) -> None:
        self._mark = re.escape(self.delimiter)
        self._field = re.compile(rf'(?:"([^"]*(?:""[^"]*)*)"|[^"{self._mark}]*)(?={self._mark}|\Z)')
        self._width = self.header.count(self.delimiter) + 1
        self._open: list[str] = []  # lines of a row whose quotes are not yet closed
        self._size = 0

    def add(self, line: str) -> None:
        """Takes a line into account, and with its last line a row."""
        is_whole = line.count(self.delimiter) + 1 == self._width
        self.malformed_as_text += bool(line) and not is_whole
        is_open = line.count('"') % 2 == 1
        if not self._open and not is_open:
            if '"' in line:
                self._row(line)
            elif line:
                self.bare_commas |= "," in line
                self.malformed_as_syntax += not is_whole
            return
        self._open.append(line)
        self._size += len(line)
        if (is_open and len(self._open) > 1) or self._size > MAX_FIELD:
            self.end()

    def end(self) -> None:
        """The open row has no more lines."""
        if self._open:
            self._row("\n".join(self._open))
        self._open, self._size = [], 0

    def _row(self, row: str) -> None:
        at, width = 0, 0
        while at <= len(row) and (match := self._field.match(row, at)):
            width, at = width + 1, match.end() + 1
            if match[1] is None:
                self.bare_commas |= "," in match[0]
            else:
                self.fields += 1
                self.spanning += "\n" in match[1]
                self.doubled += '""' in match[1] or "\r" in match[1]
                self.commas += "," in match[1]
        self.malformed_as_syntax += at <= len(row) or width != self._width

    @property
    def is_quoted(self) -> bool:
        """Whether quotes are syntax."""
        if self.malformed_as_syntax != self.malformed_as_text or not self.fields:
            return self.malformed_as_syntax < self.malformed_as_text
        if all(name.startswith('"') for name in self.header.split(self.delimiter)):
            return True
        if self.spanning and self._width > 1:
            return False
        return bool(self.spanning or self.doubled or (self.commas and not self.bare_commas))

    @property
    def summary(self) -> str:
        """The decision in words; empty where there was none to make."""
        if self.is_quoted:
            made = (
                f"the quotes around {self.fields} fields are syntax, as pandas and Excel write them"
            )
        elif self.fields or self.malformed_as_syntax > self.malformed_as_text:
            would = f"as syntax they would leave {self.malformed_as_syntax} malformed rows"
            made = f"quotes are text, as in GLUE's files ({would})"
        else:
            return ""
        return f"{made}; `quoting` of a --task_file says otherwise"
