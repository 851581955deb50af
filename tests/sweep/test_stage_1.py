"""Sweeps that train their experts themselves, and the numbers of others beside ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from pemt.sweep.plan import SweepError, read_sweep
from pemt.sweep.run import run_sweep
from tests.sweep.test_sweep import content_of, world, write_sweep

__all__ = ["world"]  # the fixture


def content_with(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Stage 1 on `lids`, stage 2 on `colours` by two methods."""
    content = content_of(world, output_dir=str(out / "runs"), seeds=[3], methods=["pemt", "bitfit"])
    content["fields"] = {**content["fields"], "bank_dir": str(out / "bank")}
    own = {"bf16": False, "max_steps": 2, "max_source_length": 24, "report_to": []}
    content["source_fields"] = {**own, "expert": {"rank": 2}}
    content["sources"] = {"lids": content["tasks"].pop("lids")}
    return {**content, **changes}


def test_stage_1_comes_first_and_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = content_with(world, tmp_path)
    content["tasks"] = {"boxes": {**content["tasks"]["colours"], "task_name": "colours"}}
    content["published"] = {"source": "a paper", "numbers": {"pemt": {"boxes": 50.5}, "bitfit": {}}}
    path = write_sweep(tmp_path / "sweep.yaml", content)
    sweep = read_sweep(path)
    assert [run.config.source_tasks for run in sweep.runs] == [["lids"], ["lids"]]
    assert sweep.runs[0].folder == tmp_path / "runs" / "boxes" / "pemt" / "seed-3"
    run_sweep(read_sweep(path))
    told = capsys.readouterr().out
    assert told.index("source 1 of 1: lids") < told.index("run 1 of 2: boxes, pemt, seed 3")
    assert (tmp_path / "runs" / "stage1" / "lids" / "all_results.json").is_file()
    (entry,) = (tmp_path / "bank").glob("lids/*.json")
    made = entry.stat().st_mtime_ns

    rows = list(csv.DictReader((tmp_path / "runs" / "sweep.csv").open()))
    assert [row["published"] for row in rows] == ["50.5", ""]
    ours = [float(row["mean"]) for row in rows]
    table = (tmp_path / "runs" / "sweep.md").read_text()
    assert f"| boxes | pemt | {ours[0]:.1f} | 50.50 | {ours[0] - 50.5:+.2f} |" in table
    assert f"| boxes | bitfit | {ours[1]:.1f} | – | – |" in table
    assert "Published: a paper." in table

    # another sweep on the same bank, with another configuration of stage 1: what is there stays, and that is told
    content = content_with(world, tmp_path, output_dir=str(tmp_path / "other"), methods=["bitfit"])
    run_sweep(read_sweep(write_sweep(path, content)))
    told = capsys.readouterr().out
    assert f"in the bank {tmp_path / 'bank'}, kept: lids" in told
    assert "source 1" not in told
    assert entry.stat().st_mtime_ns == made


def test_a_source_that_fails_ends_the_sweep(world: Path, tmp_path: Path) -> None:
    content = content_with(world, tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for split in ("train", "validation", "test"):
        (broken / f"{split}.jsonl").write_text('{"text": 1}\n')
    content["sources"]["lids"]["data_dir"] = str(broken)
    with pytest.raises(Exception, match=r"train.jsonl"):
        run_sweep(read_sweep(write_sweep(tmp_path / "sweep.yaml", content)))
    assert "train.jsonl" in (tmp_path / "runs" / "stage1" / "lids" / "error.txt").read_text()
    assert not (tmp_path / "runs" / "colours").exists()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no sources": ({"sources": None}, "source_fields: there are no `sources`"),
    "unknown key": (
        {"source_fields": {"expert": {"rnk": 2}}},
        "source_fields: unknown key `expert.rnk`; did you mean `expert.rank`",
    ),
    "the sweep's own": (
        {"sources": {"lids": {"output_dir": "here"}}},
        "sources.lids.output_dir: the sweep sets it",
    ),
    "a wrong value": (
        {"source_fields": {"max_steps": "two"}},
        "source_fields.max_steps: found `two`",
    ),
    "no such task": ({"sources": ["liddds"]}, "sources.liddds: task_name: found 'liddds'"),
    "one name twice": (
        {"sources": {"a": {"task_name": "mnli"}, "mnli": {}}},
        "sources.mnli: task_name: found mnli twice",
    ),
    "published, no numbers": ({"published": {"source": "a paper"}}, "published: found {'source'"),
    "published, no percent": (
        {"published": {"source": "a paper", "numbers": {"pemt": {"colours": "92"}}}},
        "published: found",
    ),
    "published, no such method": (
        {"published": {"source": "a paper", "numbers": {"pmt": {}}}},
        "published.numbers: unknown `pmt`; did you mean `pemt`",
    ),
    "published, no such task": (
        {"published": {"source": "a paper", "numbers": {"pemt": {"colour": 1}}}},
        "published.numbers: unknown `colour`; did you mean `colours`",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_with_their_place(world: Path, tmp_path: Path, name: str) -> None:
    changes, message = FAULTS[name]
    path = write_sweep(tmp_path / "sweep.yaml", content_with(world, tmp_path, **changes))
    with pytest.raises(SweepError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
