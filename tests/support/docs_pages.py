"""What the documentation tells people to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "ds_configs" / "README.md", *ROOT.glob("docs/*.md")])
SHELL = ("", "bash", "sh")
PROGRAMS = ("pemt", "make", "pip", "python", "pytest", "tensorboard")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """The fenced blocks of a language, with their pages."""
    for path in PAGES:
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.M | re.S):
            if found == language:
                yield path, text


def commands() -> dict[str, str]:
    """Every command of the pages -> the page that has it first; in their order."""
    found: dict[str, str] = {}
    for page, line in [*_in_blocks(), *_in_sentences()]:
        words = words_of(line)
        if words:
            found.setdefault(shlex.join(words), page)
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def _in_blocks() -> Iterator[tuple[str, str]]:
    for language in SHELL:
        for path, text in blocks(language):
            for line in text.replace("\\\n", " ").replace(" && ", "\n").splitlines():
                yield name_of(path), line


def _in_sentences() -> Iterator[tuple[str, str]]:
    """Between backticks. `pemt bank show | verify` is two, and `pemt adapt` alone is a name."""
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        for line in re.findall(r"`((?:" + "|".join(PROGRAMS) + r") [^`]*)`", text):
            first, *others = " ".join(line.split()).split(" | ")
            start = first.rsplit(" ", 1)[0]
            for each in (first, *(f"{start} {other}" for other in others)):
                yield name_of(path), each
