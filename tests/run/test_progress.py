"""Bars on a real terminal, of a job of two ranks too; plain lines and no bars in files."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
from pathlib import Path

import pytest
import yaml

from pemt.monitor import EvaluationBar, bars as bars_module
from tests.conftest import Launch, kill_session
from tests.support.ranks import Forked
from tests.support.tiny import make_base, write_task_files

TASK = {
    "name": "seen",
    "description": "the lid and the box",
    "template": "text : {text}",
    "labels": ["no", "yes"],
    "metrics": ["accuracy"],
    "max_target_length": 4,
}


def on_a_terminal(command: list[str], *, columns: int) -> str:
    """What a terminal gets from a command, carriage returns and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    process = Forked(command, Path(os.ttyname(theirs)), {**os.environ, "PATH": path})
    shown = b""
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
        assert process.wait(timeout=60) == 0, shown.decode()[-9000:]
    finally:
        kill_session(process)
        os.close(ours)
        os.close(theirs)
    return shown.decode()


EVALUATION = """
import time
from pemt.monitor import EvaluationBar, progress_logger
from pemt.monitor.bars import ProgressBar
training = ProgressBar(total_steps=2, initial_step=0, description="adapt seen")
training.advance(1, loss=1.0, samples_per_second=2.0)
with EvaluationBar(total=10, description="validating seen", shown=True) as bar:
    for _ in range(4):
        time.sleep(0.3)
        bar.advance(3)
progress_logger().info("step 1: validated")
training.close()
"""


@pytest.mark.xdist_group("launch")  # where ranks are forked
def test_a_bar_while_it_evaluates() -> None:
    shown = on_a_terminal(["-c", EVALUATION], columns=100)
    bars = re.findall(r"validating seen: +\d+%\|[^\r\n]*", shown)
    rate = r"\[\d+:\d+<\d+:\d+, +[\d.]+(example/s|s/example)\]"
    assert [bar for bar in bars if re.search(rf" [69]/10 {rate}", bar)], shown
    assert max(map(len, bars)) <= 100 + len("\x1b[A")
    message = re.search(r"([^\r\n]*)step 1: validated", shown)
    assert message is not None
    assert "%|" not in message[1], "a message tore the bar"
    last = shown.rindex(bars[-1]) + len(bars[-1])
    assert re.search(r"\r {90,}\r", shown[last:]), "the bar was not taken away"


def test_lines_while_it_evaluates_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(seconds: float, *, shown: bool = True) -> list[str]:
        monkeypatch.setattr(bars_module, "SECONDS_A_LINE", seconds)
        with EvaluationBar(total=10, description="testing seen", shown=shown) as bar:
            for _ in range(4):  # the last batch is short
                bar.advance(3)
        return capsys.readouterr().out.splitlines()

    told = lines(0.0)
    assert re.fullmatch(
        r"\[.+ rank 0\] testing seen: 3/10 examples, [\d.]+ examples/s, \d+:\d+ left", told[0]
    )
    assert [re.search(r"\d+/10", line)[0] for line in told] == ["3/10", "6/10", "9/10", "10/10"]
    assert lines(0.0, shown=False) == lines(60.0) == []


@pytest.mark.xdist_group("launch")
def test_no_bar_over_the_weights_in_a_file(tmp_path: Path, launch: Launch) -> None:
    base = make_base(tmp_path / "base")
    program = (
        f"from pemt.model.base import load_pretrained as load; load({str(base)!r}, {str(base)!r})"
    )
    told = launch("-c", program, zero=None).output
    assert "%|" not in told, told
    assert "Loading weights" in on_a_terminal(["-c", program], columns=100)


@pytest.mark.launch
@pytest.mark.slow
def test_two_ranks_show_one_bar(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    shown = on_a_terminal(
        [
            *("--config_file", "launchers/accelerate/cpu.yaml"),
            *("--deepspeed_config_file", "ds_configs/zero2.json", "-m", "pemt", "adapt"),
            *("--method", "adapter", "--task_name", "seen", "--bf16", "false"),
            *("--task_file", str(tmp_path / "task.yaml")),
            *("--model_name_or_path", str(make_base(tmp_path / "base"))),
            *("--data_dir", str(write_task_files(tmp_path / "data", seed=0, rows=240))),
            *("--output_dir", str(tmp_path / "run"), "--learning_rate", "0.001"),
            *("--num_train_epochs", "1", "--per_device_train_batch_size", "4"),
            *("--logging_steps", "5", "--max_source_length", "24"),
        ],
        columns=120,
    )
    bars = re.findall(r"adapt seen: +\d+%[^\r\n]*", shown)
    assert bars, shown[-3000:]
    # rate, time left, loss; and never wider than the terminal
    assert re.search(
        r"30/30 \[\d+:\d+<\d+:\d+, +[\d.]+(step/s|s/step), loss \d+\.\d+, [\d.]+ samples/s\]",
        bars[-1],
    )
    assert max(map(len, bars)) <= 120
    # Two ranks that both drew would show every place twice.
    places = [place for bar in bars if 0 < (place := int(re.search(r"(\d+)/30", bar)[1])) < 30]
    assert len(places) == len(set(places)) >= 1, bars  # tqdm draws ten times a second at most
    assert "step 5/30, loss" not in shown, "a plain line beside the bar"
    message = re.search(r"([^\r\n]*)step 30: validation of seen: accuracy", shown)
    assert message is not None
    assert "%|" not in message[1], "a message tore the bar"
