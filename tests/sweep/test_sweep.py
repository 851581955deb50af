"""Sweeps: every fault told before the first run, real runs, a kill in the middle, figures by hand."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from pemt.__main__ import complain
from pemt.commands import COMMANDS
from pemt.config import AdaptConfig, PemtError
from pemt.run.train import run_adapt
from pemt.sweep.plan import Run, Sweep, SweepError, read_sweep
from pemt.sweep.report import Cell, cells_of, write_report
from pemt.sweep.run import run_sweep
from tests.support.ranks import Forked
from tests.support.tiny import adapt_config, make_base, write_task_files

ROOT = Path(__file__).parents[2]
TASKS = ("colours", "lids")
SCORE = "test_average_metrics"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two tasks of one's own, with their files."""
    folder = tmp_path_factory.mktemp("sweep")
    make_base(folder / "base")
    for seed, task in enumerate(TASKS):
        write_task_files(folder / task, seed=seed)
        description = {
            "name": task,
            "description": "says whether the box is red",
            "template": "text : {text}",
            "labels": ["no", "yes"],
            "metrics": ["accuracy"],
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(description))
    return folder


def content_of(world: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(world / "out"),
        "fields": {
            "model_name_or_path": str(world / "base"),
            "bf16": False,
            "max_steps": 3,
            "max_source_length": 24,
            "max_eval_samples": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "mixture": {"train_layer_norms": False},
            "report_to": [],  # TensorBoard's second writer waits until the next second
        },
        "methods": {"adapter": {}, "small": {"method": "lora", "peft_config": {"r": 2}}},
        "tasks": {
            task: {"task_file": str(world / f"{task}.yaml"), "data_dir": str(world / task)}
            for task in TASKS
        },
        "seeds": [3, 4],
        **changes,
    }


def write_sweep(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_help_names_the_page_that_shows_such_a_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS["sweep"](["--help"])
    (page,) = re.findall(r"\S+\.md", capsys.readouterr().out)
    assert "\nseeds: [" in (ROOT / page).read_text()


def test_every_fault_is_told_before_the_first_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = content_of(world, output_dir=str(tmp_path / "out"))
    content["fields"]["learning_rat"] = 1.0
    content["methods"]["full"] = {"seed": 1}
    path = write_sweep(tmp_path / "sweep.yaml", content)
    with pytest.raises(SweepError) as unknown:
        run_sweep(read_sweep(path))
    assert str(unknown.value).splitlines() == [
        f"{path}: fields: unknown key `learning_rat`; did you mean `learning_rate`?",
        f"{path}: methods.full.seed: the sweep sets it for each run; leave it out",
    ]
    del content["fields"]["learning_rat"]
    content["fields"]["logging_steps"] = 0
    content["methods"] |= {
        "full": {"learning_rate": "fast"},
        "pemt": {"bank_dir": str(tmp_path / "nowhere")},
        "other": {"method": "lora", "peft_config": {"rnk": 4}},
        "lorra": {},
    }
    content["tasks"]["lids"]["task_file"] = str(tmp_path / "none.yaml")
    with pytest.raises(SweepError) as wrong:
        run_sweep(read_sweep(write_sweep(path, content)))
    told = str(wrong.value)
    assert f"{path}: methods.full.learning_rate: found `fast`, expected float" in told
    assert f"{path}: fields.logging_steps: found 0, at least 1 is needed" in told
    assert "methods.lorra: method: found `lorra`" in told
    content["fields"]["logging_steps"] = 1
    with pytest.raises(SweepError) as later:
        run_sweep(read_sweep(write_sweep(path, content)))
    told = str(later.value)
    assert "nowhere" in told
    assert "methods.other.peft_config.rnk: LoraConfig has no such field" in told
    assert "none.yaml" in told
    assert len(told.splitlines()) == len(set(told.splitlines())) <= 7
    assert not (tmp_path / "out").exists()
    complain(later.value)
    assert capsys.readouterr().err.startswith(f"pemt: error: {path}: ")


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"method": ["full"]}, "unknown key `method`; did you mean `methods`"),
    "no tasks": ({"tasks": []}, "tasks: missing"),
    "seeds": ({"seeds": 3}, "seeds: found 3, expected a list of integers"),
    "methods": ({"methods": "full"}, "methods: found full, expected a list of names"),
    "a folder's name": ({"methods": ["../full"]}, "found the name `../full`"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_line_about_a_malformed_sweep(world: Path, tmp_path: Path, name: str) -> None:
    changes, message = SHAPES[name]
    path = write_sweep(tmp_path / "sweep.yaml", content_of(world, **changes))
    with pytest.raises(PemtError) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_fields_of_a_method_win_over_a_tasks_over_the_shared_over_the_recipe(
    world: Path, tmp_path: Path
) -> None:
    content = content_of(world, recipe="adapt_few_shot", methods={"adapter": {"few_shot": 3}})
    content["tasks"]["lids"] |= {"few_shot": 2, "learning_rate": 0.5}
    content["methods"] |= {"full": None, "lora": {"recipe": "adapt_lora"}}
    sweep = read_sweep(write_sweep(tmp_path / "sweep.yaml", content))
    by = {(run.task, run.method): run.config for run in sweep.runs}
    assert by["colours", "full"].few_shot == 16
    assert by["lids", "full"].few_shot == 2
    assert by["lids", "adapter"].few_shot == 3
    assert by["colours", "full"].learning_rate == 0.01
    assert by["lids", "lora"].learning_rate == 0.5
    assert by["lids", "lora"].peft_config == {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q", "v"],
    }
    assert not by["lids", "full"].mixture.train_layer_norms
    assert [str(run) for run in sweep.runs][:2] == [
        "colours, adapter, seed 3",
        "colours, full, seed 3",
    ]
    assert sweep.runs[-1].folder == world / "out" / "lids" / "lora" / "seed-4"


def start(path: Path, out: Path) -> Forked:
    return Forked(["-m", "pemt", "sweep", "--config", str(path)], out, dict(os.environ))


@pytest.mark.slow
@pytest.mark.xdist_group("launch")  # where ranks are forked
def test_a_sweep_that_was_killed_goes_on_where_it_stopped(world: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "sweep.yaml", content_of(world))
    killed = start(path, tmp_path / "killed.out")
    sweep = read_sweep(path)
    deadline = time.monotonic() + 120
    while sum(run.finished for run in sweep.runs) < 2:
        assert killed.poll() is None, (tmp_path / "killed.out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {
        str(run): (run.folder / "all_results.json").read_bytes()
        for run in sweep.runs
        if run.finished
    }
    assert 2 <= len(before) < 8
    # a run that failed is tried again after the others, and its record goes
    failed = next(run for run in sweep.runs if not run.finished)
    failed.folder.mkdir(parents=True, exist_ok=True)
    (failed.folder / "error.txt").write_text("the disk was full\n")

    again = start(path, tmp_path / "again.out")
    status, output = again.wait(timeout=200), (tmp_path / "again.out").read_text()
    assert status == 0, output
    assert f"8 runs, {len(before)} of them finished before" in output
    order = re.findall(r"\] run \d of \d: (.+)", output)
    assert len(order) == 8 - len(before)
    assert order[-1] == str(failed)
    assert not (failed.folder / "error.txt").exists()
    for run in sweep.runs:
        if str(run) in before:
            assert (run.folder / "all_results.json").read_bytes() == before[str(run)]
    assert not before.keys() & set(order)

    table = (world / "out" / "sweep.md").read_text()
    assert table.splitlines()[0] == "| method | trained | colours | lids | mean |"
    assert table.splitlines()[3].startswith("| small | 576 |"), "r 2 x 12 matrices of 16 and 8"
    assert table.rstrip() in output
    assert (world / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((world / "out" / "sweep.csv").open()))
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in TASKS for method in ("adapter", "small")
    ]
    for row in rows:
        found = {
            run.seed: json.loads((run.folder / "all_results.json").read_text())[SCORE]
            for run in sweep.runs
            if (run.task, run.method) == (row["task"], row["method"])
        }
        assert row["scores"] == " ".join(f"{seed}={score}" for seed, score in found.items())
        assert float(row["mean"]) == pytest.approx((found[3] + found[4]) / 2)
        assert float(row["std"]) == pytest.approx(abs(found[3] - found[4]) / 2**0.5)

    # a finished run of another configuration is neither taken for this one nor written over
    content = content_of(world)
    content["tasks"]["lids"]["learning_rate"] = 0.02
    with pytest.raises(SweepError, match=r"tasks.lids.learning_rate: found 0.02, .*has 0.01"):
        read_sweep(write_sweep(path, content))


def test_a_failed_run_is_recorded_and_the_others_run(world: Path, tmp_path: Path) -> None:
    broken = write_task_files(tmp_path / "broken", seed=0)
    (broken / "train.jsonl").write_text('{"text": 1}\n')
    content = content_of(world, output_dir=str(tmp_path / "out"), seeds=[3], methods=["bitfit"])
    content["tasks"]["colours"]["data_dir"] = str(broken)
    path = write_sweep(tmp_path / "sweep.yaml", content)
    with pytest.raises(
        SweepError, match=r"1 of 2 runs failed \(colours, bitfit, seed 3: see .*error.txt"
    ):
        run_sweep(read_sweep(path))
    told = (tmp_path / "out" / "colours" / "bitfit" / "seed-3" / "error.txt").read_text()
    assert "train.jsonl" in told
    (row,) = [
        line
        for line in (tmp_path / "out" / "sweep.md").read_text().splitlines()
        if "bitfit" in line
    ]
    assert row.count("–") == 2, "the task that failed, and the mean over tasks"


def failing(monkeypatch: pytest.MonkeyPatch, task: str) -> list[str]:
    """Runs on a task fail as where memory is short, and the others train; the list gets each run's task."""
    tried: list[str] = []

    def adapt(config: AdaptConfig) -> dict[str, Any]:
        tried.append(config.task_name)
        if config.task_name == task:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_adapt(config)

    monkeypatch.setattr("pemt.sweep.run.run_adapt", adapt)
    return tried


def test_an_error_that_is_no_users_ends_no_sweep(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    content = content_of(world, output_dir=str(out), seeds=[3], methods=["bitfit"])
    tried = failing(monkeypatch, "colours")
    with pytest.raises(SweepError, match=r"1 of 2 runs failed"):
        run_sweep(read_sweep(write_sweep(tmp_path / "sweep.yaml", content)))
    assert tried == ["colours", "lids"]
    told = (out / "colours" / "bitfit" / "seed-3" / "error.txt").read_text()
    assert told.startswith("OutOfMemoryError: CUDA out of memory\nTraceback")
    assert (out / "lids" / "bitfit" / "seed-3" / "all_results.json").is_file()
    (row,) = [line for line in (out / "sweep.md").read_text().splitlines() if "bitfit" in line]
    assert row.count("–") == 2


def test_on_several_ranks_an_error_ends_the_sweep_with_its_table(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    content = content_of(world, output_dir=str(out), seeds=[3], methods=["bitfit"])
    path = write_sweep(tmp_path / "sweep.yaml", content)
    tried = failing(monkeypatch, "colours")
    rank_0 = SimpleNamespace(on_rank0=lambda look, _: look(), is_main=True, world_size=2)
    monkeypatch.setattr("pemt.sweep.run.Job", lambda _: rank_0)
    with pytest.raises(torch.OutOfMemoryError):
        run_sweep(read_sweep(path))
    assert tried == ["colours"]
    assert (out / "colours" / "bitfit" / "seed-3" / "error.txt").is_file()
    assert "| bitfit |" in (out / "sweep.md").read_text()


def test_means_and_deviations_by_hand(tmp_path: Path) -> None:
    paths = (tmp_path, tmp_path)
    runs = [
        Run(
            method=method,
            task=task,
            seed=seed,
            config=adapt_config(*paths, tmp_path / f"{task}-{method}-{seed}", tmp_path, task),
        )
        for task in ("rte", "cola")
        for method in ("pemt", "full")
        for seed in (0, 1, 2)
    ]
    scores = {
        ("rte", "pemt"): (80.0, 82.0, 87.0),
        ("rte", "full"): (70.0,),
        ("cola", "pemt"): (-4.0, 6.0),
    }
    for run in runs:
        found = scores.get((run.task, run.method), ())
        if run.seed < len(found):
            run.folder.mkdir()
            results = {SCORE: found[run.seed], "best_checkpoint": "checkpoint-1"}
            (run.folder / "all_results.json").write_text(json.dumps(results))
    sweep = Sweep(
        output_dir=tmp_path,
        methods=["pemt", "full"],
        tasks=["rte", "cola"],
        seeds=[0, 1, 2],
        runs=runs,
    )
    first: Cell = cells_of(sweep)[0]
    assert first.mean == 83.0
    assert first.std == pytest.approx(13**0.5), "9 + 1 + 16 over 2"
    lines = write_report(sweep).splitlines()
    assert lines[2] == "| pemt |  | 83.0 ± 3.6 | 1.0 ± 7.1 (2 of 3) | 42.0 |"
    assert lines[3] == "| full |  | 70.0 (1 of 3) | – | – |"
