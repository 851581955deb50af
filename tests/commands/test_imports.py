"""A command that trains nothing imports no library that takes seconds: modules are asserted, not times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import yaml

from pemt.bank.entries import write_entry
from pemt.config.schema import AdaptConfig
from pemt.model import base_shape
from pemt.run.early import check_early
from tests.conftest import ROOT
from tests.support.tiny_t5 import tiny_base, tiny_source

# Each takes half a second of CPU and more, most of them many.
HEAVY = {
    *("torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "evaluate"),
    *("matplotlib", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard"),
    *("huggingface_hub", "tokenizers", "pydantic"),
}
# Has imported what stands before any command, and forks for every line that it reads: so each command is the first
# that its process runs. That leaves the names of all imported packages in one file and what it said in another.
PEMT = """
import json, os, sys, traceback
import pemt.__main__

def run(asked):
    leave = os._exit
    def noted(code):
        sys.stdout.flush(), sys.stderr.flush()
        with open("imported", "w") as names:
            names.write("\\n".join({name.partition(".")[0] for name in list(sys.modules)}))
        leave(code)
    os._exit = noted
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ.update(asked["environment"])
    sys.argv = ["pemt", *asked["arguments"]]
    try:
        exec(asked["before"])
        pemt.__main__.main()
        status = 0
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Ends `pemt` at its first line, and leaves what PEMT would.
FIRST_LINE = """
import builtins, sys
def first(line, **_):
    sys.stdout.write(line)
    sys.exit()
builtins.print = first
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, a base model's folder that holds nothing but a configuration, one task's files, a run."""
    world = tmp_path_factory.mktemp("world")
    base = tiny_base()
    write_entry(
        world / "bank",
        tiny_source(name="mnli"),
        base={"name": "tiny", **base_shape(base.config)},
        description="A sentence.",
        metrics={},
    )
    base.config.save_pretrained(world / "base")
    for folder in ("data", "empty", "run"):
        (world / folder).mkdir()
    for split in ("train", "dev"):
        (world / "data" / f"{split}.jsonl").write_text('{"sentence": "yes", "label": 1}\n')
    config = {"task_name": "cola", "method": "pemt", "learning_rate": 0.125}
    (world / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    (world / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (world / "twice.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {}, "bf16": {}}')
    (world / "sweep.yaml").write_text("output_dir: swept\nmethods: [pemt]\nsedes: [1]\n")
    return world


class Run(Protocol):
    """`pemt ARGUMENTS` in a process of its own: what it imported, what it said, how it ended."""

    def __call__(
        self, *arguments: str, before: str = "", **environment: str
    ) -> tuple[set[str], str, int]: ...


@pytest.fixture(scope="module")
def run(world: Path) -> Iterator[Run]:
    process = subprocess.Popen(
        [sys.executable, "-c", PEMT],
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def pemt(*arguments: str, before: str = "", **environment: str) -> tuple[set[str], str, int]:
        (world / "imported").unlink(missing_ok=True)
        asked = {"arguments": arguments, "before": before, "environment": environment}
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        said = (world / "said").read_text()
        assert (world / "imported").exists(), said
        return set((world / "imported").read_text().splitlines()), said, status

    with process:
        yield pemt
        process.communicate()


ANSWERS = {
    "--help": "adapt",
    "--version": "pemt",
    "tasks": "superglue-cb",
    "tasks mnli": "entailment",
    "bank list bank": "mnli",
    "bank show bank mnli": "parameters in the expert",
    "plan --model_name_or_path google/flan-t5-xl --task_name rte --ds_config {zero2}": "flan-t5-xl",
    "plan --model_name_or_path t5-base --bank_dir bank --ds_config {zero2}": "t5-base",
    "completion bash": "_shtab_pemt",
    "completion zsh": "_shtab_pemt",
    "plan batch adapt --method adapter --config adapt --task_name rte --output_dir new": "8 4 1",
    "adapt --help": "--bank_dir",
    "fetch --help": "--to",
    "adapt --config adapt --print_config": "per_device_train_batch_size",
    "bench op --help": "--shape",
    "bank --help": "verify",
    "evaluate --help": "--split",
}


@pytest.mark.parametrize("command", ANSWERS)
def test_an_answer_needs_no_heavy_library(run: Run, command: str) -> None:
    arguments = command.format(zero2=ROOT / "ds_configs" / "zero2.json").split()
    imported, said, status = run(*arguments)
    assert (status, ANSWERS[command] in said) == (0, True), said
    assert imported & HEAVY == set()


def test_the_demo_says_what_it_imports_before_it_does(run: Run) -> None:
    imported, said, status = run("demo", before=FIRST_LINE)
    assert (status, said) == (0, "--- reading PyTorch, transformers and DeepSpeed")
    assert imported & HEAVY == set()


RUN = "--model_name_or_path base --task_name cola --data_dir data --output_dir new --bank_dir bank"
ERRORS = {
    "adapt --learning_rat 1": "`learning_rate`",
    f"adapt {RUN} --learning_rate fast": "expected float",
    f"adapt {RUN} --num_train_epochs 0": "num_train_epochs",
    f"adapt {RUN} --config adopt": "--config adopt",
    f"adapt {RUN} --task_name superglue-bc": "superglue-cb",
    f"adapt {RUN} --task_file nowhere.yaml": "nowhere.yaml",
    f"adapt {RUN} --bank_dir nowhere": "nowhere is no folder",
    f"adapt {RUN} --source_tasks [mnlo]": "nearest: mnli",
    f"adapt {RUN} --data_dir nowhere": "nowhere is no folder",
    f"adapt {RUN} --data_dir empty": "has no file of cola",
    f"adapt {RUN} --model_name_or_path ./nowhere": "there is no folder ./nowhere",
    f"adapt {RUN} --model_name_or_path empty": "empty has no config.json",
    f"adapt {RUN} --output_dir run": "already holds a run",
    f"adapt {RUN} --resume_from_checkpoint nowhere": "no folder nowhere",
    f"source {RUN} --task_name ../x": "no name for a folder",
    f"source {RUN} --task_name superglue-bc": "superglue-cb",
    f"source {RUN} --output_dir run": "already holds a run",
    f"adapt {RUN} --report_to [tensorbord]": "allowed are tensorboard",
    f"adapt {RUN} --report_to [clearml]": "`pip install clearml`",
    "fetch --task_name cola --data_dir data --model_name_or_path base": "bank_dir: missing",
    f"fetch {RUN} --bank_dir nowhere": "nowhere is no folder",
    f"fetch source {RUN} --data_dir empty": "has no file of cola",
    f"plan batch source {RUN} --ranks_per_node 2 --per_device_train_batch_size 64": "= 128 examples",
    "evaluate nowhere": "holds no run",
    "evaluate run": "without a checkpoint",
    "predict nowhere": "holds no run",
    "export nowhere to": "holds no run",
    "sweep --config nowhere.yaml": "nowhere.yaml",
    "sweep --config sweep.yaml": "`seeds`",
    "bank list nowhere": "nowhere is no folder",
    "bank show bank mnlo": "cannot be read",
    "tasks mnlo": "mnli",
    "plan --model_name_or_path t5-base --batch 3": "--batch",
    "adopt": "`adapt`",
}


@pytest.mark.parametrize("command", ERRORS)
def test_an_error_needs_no_heavy_library(world: Path, run: Run, command: str) -> None:
    imported, said, status = run(*command.split())
    assert (status, ERRORS[command] in said) == (2, True), said
    assert said.startswith("pemt: error: ")
    lines = 3 if command == "sweep --config sweep.yaml" else 1  # of a sweep every fault is told
    assert said.count("\n") == lines, said
    assert imported & HEAVY == set()
    assert not (world / "new").exists()


def test_deepspeeds_json_is_read_before_deepspeed(run: Run) -> None:
    imported, said, status = run(
        *f"adapt {RUN}".split(),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE="twice.json",
    )
    assert (status, "duplicate key `bf16`" in said) == (2, True), said
    assert imported & HEAVY == set()


HUB_RUN = "adapt --model_name_or_path me/tiny --task_name cola --data_dir data --output_dir new --bank_dir bank"


def test_a_hub_id_offline_is_refused_unasked(run: Run) -> None:
    imported, said, status = run(*HUB_RUN.split(), HF_HUB_OFFLINE="1")
    assert (status, "HF_HUB_OFFLINE forbids" in said) == (2, True), said
    assert "loading" not in said
    assert imported & HEAVY == {"huggingface_hub"}


def test_a_hub_out_of_reach_is_told_once(run: Run) -> None:
    """Nobody listens on port 9; transformers would try for half a minute."""
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    imported, said, status = run(*HUB_RUN.split(), **away)
    assert status == 2
    assert said.splitlines()[0] == "pemt: loading me/tiny from the hub ..."
    assert "model_name_or_path: me/tiny" in said
    assert "out of reach" in said
    assert imported & HEAVY == {"huggingface_hub"}


def test_a_report_needs_matplotlib_and_no_torch(world: Path, run: Run) -> None:
    imported, said, status = run("report", "run", "--output_dir", "page")
    assert status == 0, said
    assert "svg" in (world / "page" / "report.html").read_text()
    assert imported & HEAVY == {"matplotlib", "numpy"}
    imported, said, status = run("report", "nowhere")
    assert (status, "holds no run" in said) == (2, True), said
    assert imported & HEAVY <= {"matplotlib", "numpy"}


def test_one_rank_looks(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may see a folder that rank 0 has begun to fill."""
    config = AdaptConfig(
        model_name_or_path="base", task_name="no-such-task", output_dir="new", bank_dir="bank"
    )
    monkeypatch.setenv("RANK", "1")
    check_early(config)
