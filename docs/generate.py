"""`make docs`: writes configuration.md from the dataclasses and tasks.md from the task table.

`tests/project/test_docs.py` fails while a page is not what this would write.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import docstring_parser

from pemt.config.schema import (
    AdaptConfig,
    AdapterConfig,
    ExpertConfig,
    MixtureConfig,
    RunConfig,
    SourceConfig,
)
from pemt.tasks import Task, get_task, task_names

HERE = Path(__file__).resolve().parent
WRITTEN = "<!-- written by `make docs` -->"


def pages() -> dict[Path, str]:
    """Every generated page."""
    return {HERE / "configuration.md": configuration(), HERE / "tasks.md": tasks()}


def configuration() -> str:
    """All fields of a run: name, type, default, meaning."""
    parts = [
        "# Configuration",
        WRITTEN,
        "Fields stand in YAML behind `--config FILE`, or on the command line as `--field value`; nested ones are "
        "`--mixture.prompt_dropout 0.2`. What is typed wins over every file, wherever it stands; among files the "
        "later one wins. Unknown fields are errors. `--print_config` shows the outcome, and of each value whether it "
        "comes from the command line, which file, or is the default; nothing runs. Recipes (`--config source`, "
        "`adapt`, …) are such files.",
    ]
    sections: dict[str, tuple[type[Any], type[Any] | None]] = {
        "Both stages": (RunConfig, None),
        "Stage 1, `pemt source`": (SourceConfig, RunConfig),
        "`expert`": (ExpertConfig, None),
        "Stage 2, `pemt adapt`": (AdaptConfig, RunConfig),
        "`adapter`": (AdapterConfig, None),
        "`mixture`": (MixtureConfig, None),
    }
    for title, (kind, parent) in sections.items():
        known = {each.name for each in dataclasses.fields(parent)} if parent else set()
        told = {each.arg_name: each.description for each in _docstring(kind).params}
        rows = [
            f"| `{each.name}` | {_cell(str(each.type))} | {_default(each)} | {_cell(told[each.name])} |"
            for each in dataclasses.fields(kind)
            if each.name not in known
        ]
        parts += [
            f"## {title}",
            _docstring(kind).short_description or "",
            "\n".join(["| field | type | default | what |", "|---|---|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def tasks() -> str:
    """All tasks: name, metrics, answers, template, source."""
    rows = [_task_row(get_task(name)) for name in task_names()]
    return (
        "\n\n".join(
            [
                "# Tasks",
                WRITTEN,
                "`--task_name` takes one of these; `--task_file` one of your own ([extending.md](extending.md)). "
                "Without `--data_dir` the rows come from the hub.",
                "\n".join(
                    [
                        "| task | metrics | answers | input | on the hub |",
                        "|---|---|---|---|---|",
                        *rows,
                    ]
                ),
            ]
        )
        + "\n"
    )


def _task_row(task: Task) -> str:
    answers = {"classification": ", ".join(f"`{label}`" for label in task.labels),
               "regression": f"a number, rounded to {task.score_step}", "answer": "a text"}  # fmt: skip
    hub = task.hub
    place = "" if hub is None else f"{hub.path}{f' ({hub.config})' if hub.config else ''}"
    metrics = ", ".join(task.metrics)
    return (
        f"| `{task.name}` | {metrics} | {_cell(answers[task.kind])} | {_cell(f'`{task.template}`')} "
        f"| {place} |"
    )


def _docstring(kind: type[Any]) -> docstring_parser.Docstring:
    return docstring_parser.parse(kind.__doc__ or "")


def _default(each: dataclasses.Field[Any]) -> str:
    if isinstance(each.default_factory, type) and dataclasses.is_dataclass(each.default_factory):
        return "below"
    if each.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(each.default_factory())}`"
    if each.default is dataclasses.MISSING:
        return "required"
    shown = json.dumps(each.default) if isinstance(each.default, bool | None) else each.default
    return f"`{shown}`"


def _cell(text: str | None) -> str:
    """One line, with the column's own sign escaped."""
    assert text, "a field without a description"
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
