"""Runs with and without a source, beside each other on the report's page."""

from __future__ import annotations

from typing import Any

from pemt.report.ablation import LeaveOneOut, left_out
from pemt.report.page import content_of, environment
from pemt.report.record import RunRecord


def run(sources: list[str], score: float | None, **config: Any) -> RunRecord:
    name = "-".join([*sources, *map(str, config.values())])
    fields = {"task_name": "cb", "method": "pemt", "seed": 0, "output_dir": name, **config}
    gates = {"encoder/0": dict.fromkeys(sources, 1 / len(sources))}
    results = {"sources": sources, "gates": gates, "test_runtime": 1.0} | (
        {} if score is None else {"test_average_metrics": score}
    )
    return RunRecord(
        name=name, config={**fields, "source_tasks": sources}, state="finished",
        log=[], results=results, predictions=[], checkpoint_bytes=None, trained=None,
    )  # fmt: skip


RUNS = [
    run(["mnli", "qnli"], 90.0),
    run(["mnli", "qnli"], 80.0, seed=1),
    run(["mnli"], 89.0),
    run(["qnli"], 70.0),
    run(["qnli"], 64.0, seed=1),
    run(["mnli"], 5.0, learning_rate=1.0),  # another run altogether
    run(["qnli", "rte", "sst2"], 5.0),  # more than one source apart
    run(["mnli", "rte"], 5.0),  # one for another
    run(["qnli"], 99.0, task_name="rte"),
    run(["mnli", "qnli", "cola"], None),  # not finished
]
FOUND = [
    LeaveOneOut(task="cb", source="mnli", score=85.0, without=67.0, pairs=2),
    LeaveOneOut(task="cb", source="qnli", score=90.0, without=89.0, pairs=1),
    LeaveOneOut(task="cb", source="rte", score=5.0, without=89.0, pairs=1),
]


def test_what_each_source_adds_by_runs_that_are_alike_otherwise() -> None:
    assert left_out(RUNS) == FOUND
    assert left_out(RUNS[:1]) == left_out([]) == []


def test_the_pages_show_it() -> None:
    content = content_of(RUNS[:4])
    markdown = environment(markdown=True).get_template("report.md").render(content)
    assert "| cb | mnli | 90.0 | 70.0 | +20.0 | 1 |" in markdown.splitlines()
    page = environment(markdown=False).get_template("report.html").render(content)
    assert "<td>+20.0</td>" in page
    alone = environment(markdown=False).get_template("report.html").render(content_of(RUNS[:1]))
    assert "With and without a source" not in alone
