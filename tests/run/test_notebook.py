"""A notebook's own kernel: bars as widgets, the stop button, runs one after another in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.tiny import make_base, write_task_files

client = pytest.importorskip("jupyter_client", reason="ipykernel is not installed")

# What a signal, a bar and a second run do in one process: test_in_python.py, test_progress.py.
pytestmark = pytest.mark.soak
WIDGET = "application/vnd.jupyter.widget-view+json"
SETUP = """
import json, time
from dataclasses import replace
from pathlib import Path
from pemt import AdaptConfig, run_adapt
from pemt.tasks import Task

task = Task(name="lids", description="the lid and the box", template="text : {text}", labels=("no", "yes"),
            metrics=("accuracy",), max_target_length=4)
rows = {split: [json.loads(line) for line in open(f"data/{split}.jsonl")] for split in ("train", "validation", "test")}
config = AdaptConfig(model_name_or_path="base", task_name="lids", output_dir="run", method="adapter", bf16=False,
                     per_device_train_batch_size=4, per_device_eval_batch_size=4, max_source_length=24,
                     max_steps=6, logging_steps=1, eval_strategy="no")

class Waits:
    "After the second step, until whoever looks on has pressed the stop button."
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            print("press it now")
            while not Path("pressed").exists():
                time.sleep(0.01)
"""


@dataclass
class Shown:
    """What stands below a cell when it has ended."""

    text: str = ""
    displays: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def widgets(self) -> int:
        return sum(WIDGET in display for display in self.displays)


@dataclass
class Notebook:
    """A kernel, and the folder that it works in."""

    kernel: Any
    folder: Path

    def cell(self, code: str, on_text: Callable[[str], None] = lambda _: None) -> Shown:
        """Run a cell; `on_text` is called with each piece of what it prints."""
        shown = Shown()

        def hear(message: Any) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.text += content["text"]
                on_text(content["text"])
            elif message["msg_type"] == "display_data":
                shown.displays.append(content["data"])

        asked = self.kernel.client_of_test
        reply = asked.execute_interactive(code, output_hook=hear, timeout=300)["content"]
        shown.error = None if reply["status"] == "ok" else reply["ename"]
        if shown.error not in (None, "KeyboardInterrupt"):
            pytest.fail("\n".join(reply["traceback"]))
        return shown

    def stopped(self, code: str, *, twice: bool = False) -> Shown:
        """Run a cell, and press the stop button where it asks for that; its step ends where this is not done twice."""
        pressed = self.folder / "pressed"
        pressed.unlink(missing_ok=True)

        def press(text: str) -> None:
            if "press it now" in text:
                self.kernel.interrupt_kernel()
                if not twice:
                    pressed.touch()
            if twice and "a second one stops at once" in text:
                self.kernel.interrupt_kernel()

        return self.cell(code, press)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("notebook")
    make_base(folder / "base")
    write_task_files(folder / "data", seed=3)
    kernel = client.KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT)})
    asked = kernel.client_of_test = kernel.client()
    try:
        asked.start_channels()
        asked.wait_for_ready(timeout=300)
        found = Notebook(kernel, folder)
        told = found.cell(f"import sys; print(sys.executable)\n{SETUP}")
        assert told.text.strip() == sys.executable
        yield found
    finally:
        asked.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_bars_are_a_notebooks(notebook: Notebook) -> None:
    shown = notebook.cell('run_adapt(replace(config, output_dir="bars"), **rows, task=task).loss')
    assert shown.widgets >= 1, shown
    assert "%|" not in shown.text, "and none of characters beside it"
    assert "step 6/6, loss" not in shown.text, "nor a line a step, as in a file"


def test_the_stop_button_leaves_a_session_that_resumes(notebook: Notebook) -> None:
    code = "run_adapt(config, **rows, task=task, callbacks=[Waits])"
    shown = notebook.stopped(code)
    assert shown.error == "KeyboardInterrupt"
    assert "stopped after step 2" in shown.text
    assert notebook.cell("print(len(rows['train']), config.max_steps)").text == "40 6\n"
    shown = notebook.cell("results = run_adapt(config, **rows, task=task); print(results.loss)")
    assert "resuming from step 2/6" in shown.text
    # without a stop in between it is the same run; and a third one of this process
    again = 'print(run_adapt(replace(config, output_dir="again"), **rows, task=task).loss == results.loss)'
    assert notebook.cell(again).text.endswith("True\n")


def test_a_second_press_does_not_wait_for_the_step(notebook: Notebook) -> None:
    run = 'run_adapt(replace(config, output_dir="twice"), **rows, task=task, callbacks=[{}])'
    shown = notebook.stopped(run.format("Waits"), twice=True)
    assert shown.error == "KeyboardInterrupt"
    assert "stopped after step" not in shown.text
    assert notebook.cell(run.format("")).error is None, "the folder is free again"
