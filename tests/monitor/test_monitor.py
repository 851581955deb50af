"""What the monitor writes: TensorBoard, log.jsonl, lines and bar; resumed; on other ranks."""

from __future__ import annotations

import io
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from pemt.monitor import Monitor


def monitor(folder: Path, **changes: Any) -> Monitor:
    settings = {"total_steps": 10, "is_main": True, "description": "adapt cb", **changes}
    return Monitor(folder, **settings)


def read_log(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_both_logs_hold_the_same_flat_tags(tmp_path: Path) -> None:
    gates = {f"gate/encoder/{layer}/mnli": 0.25 * layer for layer in range(2)}
    with monitor(tmp_path) as watch:
        watch.log(1, {"train/loss": 2.5, **gates})
        watch.log(2, {"train/loss": 1.5})
    first, second = read_log(tmp_path)
    moment = {"step": 1, "time": first["time"], "elapsed": first["elapsed"]}
    assert first == {**moment, "train/loss": 2.5, **gates}
    assert second["step"] == 2
    assert second["time"] >= first["time"] > 1e9
    assert read_tensorboard(tmp_path) == {
        "train/loss": {1: 2.5, 2: 1.5},
        **{tag: {1: value} for tag, value in gates.items()},
    }
    # a dict value would open one folder per tag; flat tags keep one event file
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_a_resumed_run_overwrites_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with monitor(tmp_path) as watch:
        for step in range(1, 6):
            watch.log(step, {"train/loss": float(step)})
    with monitor(tmp_path, initial_step=3) as watch:
        for step in (4, 5):
            watch.log(step, {"train/loss": 10.0 * step})
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0}
    assert [(entry["step"], entry["train/loss"]) for entry in read_log(tmp_path)] == [
        *expected.items()
    ]
    assert read_tensorboard(tmp_path)["train/loss"] == expected


def test_event_files_are_read_in_the_order_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names end in a number: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for attempt in range(2):
        with monitor(tmp_path) as watch:
            watch.log(1, {"train/loss": float(attempt)})
    assert read_tensorboard(tmp_path)["train/loss"] == {1: 1.0}


def test_a_half_written_line_is_dropped_on_resume(tmp_path: Path) -> None:
    with monitor(tmp_path) as watch:
        watch.log(1, {"train/loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "tra')
    with monitor(tmp_path, initial_step=2) as watch:
        watch.log(3, {"train/loss": 3.0})
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 3]


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with monitor(tmp_path) as watch:
        watch.log(1, {"train/loss": 1.0})
        assert [entry["step"] for entry in read_log(tmp_path)] == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float) -> None:
    with monitor(tmp_path) as watch:
        watch.log(1, {"train/loss": value, "train/grad_norm": 1.0})
    (entry,) = read_log(tmp_path)
    assert entry["train/loss"] is None
    assert entry["train/grad_norm"] == 1.0


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(tmp_path / "run", is_main=False) as watch:
        watch.log(1, {"train/loss": 1.0})
        watch.advance(1, loss=1.0, samples_per_second=1.0)
        watch.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_plain_lines_where_stdout_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with monitor(tmp_path) as watch:
        watch.advance(5, loss=0.123456, samples_per_second=78.9)
        watch.message("validated")
        watch.advance(10, loss=0.1, samples_per_second=80.0)
    out, err = capsys.readouterr()
    lines = [re.fullmatch(r"\[(.+) rank 0\] (.*)", line) for line in out.splitlines()]
    half, said, full = (line[2] for line in lines if line)
    for line in lines:
        assert line, out
        datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S")
    assert half.startswith("adapt cb: step 5/10, loss 0.1235, 78.9 samples/s, ")
    assert said == "validated"
    assert full == "adapt cb: step 10/10, loss 0.1000, 80.0 samples/s, 00:00 left"
    assert err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_bar_with_loss_and_rate_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with monitor(tmp_path, initial_step=2) as watch:
        watch.advance(10, loss=0.5, samples_per_second=12.0)
    last = terminal.getvalue().split("\r")[-1]
    assert "adapt cb: 100%" in last
    assert "10/10" in last
    assert "loss 0.5000, 12.0 samples/s" in last
    assert "step 10/10, loss" not in terminal.getvalue()


def test_an_error_in_the_run_leaves_whole_logs(tmp_path: Path) -> None:
    def run() -> None:
        with monitor(tmp_path) as watch:
            watch.log(1, {"train/loss": 1.0})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert read_tensorboard(tmp_path) == {"train/loss": {1: 1.0}}
