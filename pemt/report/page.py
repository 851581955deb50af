"""Runs as a page and as Markdown, by the templates beside this file.

Whatever comes from a run is text: jinja escapes it in HTML, `in_markdown` in Markdown.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pemt.config import flatten
from pemt.report import findings
from pemt.report.ablation import PLACES, left_out
from pemt.report.charts import Series, line_chart
from pemt.report.record import RunRecord, read_runs
from pemt.storage import write_text

HTML, MARKDOWN = "report.html", "report.md"
NOTHING = "(nothing)"
LONGEST_TEXT = 700  # characters of an example that are shown


def write_report(folders: Sequence[Path], output_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.md about runs.

    Args:
        folders: the runs' output folders.
        output_dir: receives both files.

    Raises:
        PemtError: a folder holds no run, or a file in it is damaged.
        OSError: the files cannot be written.
    """
    content = content_of(read_runs(folders))
    output_dir.mkdir(parents=True, exist_ok=True)
    pages = output_dir / HTML, output_dir / MARKDOWN
    write_text(pages[0], environment(markdown=False).get_template(HTML).render(content))
    write_text(pages[1], environment(markdown=True).get_template(MARKDOWN).render(content))
    return pages


def environment(*, markdown: bool) -> Environment:
    """The templates; every value that they show is escaped."""
    made = Environment(
        loader=PackageLoader("pemt.report"),
        autoescape=not markdown,
        finalize=in_markdown if markdown else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "raw": Markup,
        "score": score_text,
        "shade": shade,
        "clipped": clipped,
        "largest": findings.largest,
        "percent": lambda value: "–" if value is None else f"{value:.1f}",
        "signed": lambda value: f"{value:+.1f}",
        "share": lambda value: "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00"),
    }
    return made


def content_of(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the templates show."""
    return {
        "title": " · ".join(record.name for record in records),
        "runs": [run_content(record) for record in records],
        "charts": charts_of(records),
        "comparison": comparison(records) if len(records) > 1 else None,
        "left_out": left_out(records),
    }


def run_content(record: RunRecord) -> dict[str, Any]:
    """One run's part of the page."""
    worst, best = findings.worst_and_best(record)
    shown = [name for name, sources in findings.columns_of(record).items() if name in sources]
    means = {name: record.series(f"gate_mean/{name}") for name in shown}
    many = len(record.sources)
    of_many = f"{len(shown)} of {many} sources" if len(shown) < many else "each source"
    return {
        "name": record.name,
        "task": record.task,
        "method": record.method,
        "base": record.config.get("model_name_or_path"),
        "finished": bool(record.results),
        "state": record.state,
        "scores": scores_of(record),
        "gates": findings.gate_matrices(record),
        "gates_are_of": "the test set"
        if record.results
        else f"the training steps logged at step {record.logged_gates.get('step')}",
        "gates_chart": line_chart(f"mean gate weight of {of_many}", means, unit="gate weight"),
        "shown": of_many if len(shown) < many else None,
        "uses": findings.source_uses(record),
        "by_class": findings.gates_by_class(record),
        "confusion": findings.confusion(record),
        "worst": worst,
        "best": best,
        "examples": len(record.predictions),
        "costs": findings.costs(record),
        "config": yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True),
    }


def scores_of(record: RunRecord) -> dict[str, float]:
    """The test's metrics by name, their mean last, and the loss."""
    skipped = ("test_moe_weight_", "test_runtime", "test_samples_per_second")
    return {
        name.removeprefix("test_").replace("_", " "): float(value)
        for name, value in record.results.items()
        if name.startswith("test_") and not name.startswith(skipped)
    }


def score_text(name: str, value: float) -> str:
    """A percentage with one digit, a loss with three."""
    return f"{value:.3f}" if name == "loss" else f"{value:.1f}"


def charts_of(records: Sequence[RunRecord]) -> list[Markup]:
    """Curves of all runs in one chart each."""

    def curves(tag: str) -> dict[str, Series]:
        return {record.name: record.series(tag.format(task=record.task)) for record in records}

    drawn = [
        line_chart("training loss", curves("train/loss"), unit="loss"),
        line_chart(
            "validation, mean of the metrics", curves("eval/{task}/average_metrics"), unit="%"
        ),
        line_chart("validation loss", curves("eval/{task}/loss"), unit="loss"),
        line_chart("gradient norm", curves("train/grad_norm")),
        line_chart("entropy of the encoder's gates", curves("gate_entropy/encoder"), unit="0 to 1"),
        line_chart("entropy of the decoder's gates", curves("gate_entropy/decoder"), unit="0 to 1"),
    ]
    return [chart for chart in drawn if chart is not None]


def comparison(records: Sequence[RunRecord]) -> dict[str, list[tuple[str, list[str]]]]:
    """Rows of a table with a column a run: what they score, cost, and differ in."""
    scores = [scores_of(record) for record in records]
    costs = [findings.costs(record) for record in records]
    fields = [flatten(record.config) for record in records]
    names = dict.fromkeys(name for each in fields for name in each)
    differing = [
        name
        for name in names
        if name not in PLACES and len({str(each.get(name, "–")) for each in fields}) > 1
    ]
    return {
        "score": _rows([{name: score_text(name, each[name]) for name in each} for each in scores]),
        "cost": _rows(costs),
        "configuration, where it differs": [
            (name, [str(each.get(name, "–")) for each in fields]) for name in differing
        ],
    }


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for each in columns for name in each)
    return [(name, [each.get(name, "–") for each in columns]) for name in names]


def shade(value: float | None) -> Markup:
    """CSS of a heat map's cell: from white at 0 to a blue at 1 that dark text still stands out from."""
    if value is None:
        return Markup("")
    share = min(1.0, max(0.0, value))
    return Markup(f"background:hsl(210 80% {98 - 42 * share:.0f}%)")


def clipped(text: object) -> str:
    """A text of bearable length."""
    whole = str(text) or NOTHING
    return whole if len(whole) <= LONGEST_TEXT else whole[:LONGEST_TEXT] + " …"


def in_markdown(value: Any) -> Any:
    """A value as one line of Markdown that means nothing but itself; numbers as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", line)
