"""Where the documentation's commands run: files by the names that its pages use, small enough for a test."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pemt.bank import Adapter, add_peft
from pemt.commands import COMMANDS
from pemt.tasks import Task, get_task, load_task_file
from tests.bank.test_official import PROMPT_PD, published
from tests.conftest import ROOT
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.docs_pages import blocks
from tests.support.tiny import COLOURS, make_base
from tests.support.tiny_t5 import tiny_base

# What makes a run small, behind what the page says.
SMALL = (
    "--model_name_or_path base --bf16 false --max_steps 1 --max_source_length 24 --warmup_steps 0"
)
# A reader's own things, on the pages -> here.
STAND_INS = {
    "RUN": "runs/cb",
    "FOLDER": "official",
    "FOLDER_OR_HUB_ID": "adapters/qnli",
    "google-t5/t5-base": "official-base",
    "google/flan-t5-large": "base",
    "ENTRY": "flan_t5_large-coqa",
    "paper-superglue-cb": "superglue-cb",  # whose labels this world's vocabulary can write
}
# The adapters that docs/experts.md adds, as the real PEFT writes them: half of them pickles, as on the hub.
LORAHUB_IDS = [
    f"lorahub/flan_t5_large-{name}"
    for name in ("super_glue_wic", "wiki_qa_Jeopardy_style", "quarel_logic_test", "coqa")
]


def make_world() -> None:
    """In the working directory: base model, data, what the pages' runs leave there, an export, adapters."""
    make_base(Path("base"))
    for place in ("ds_configs", "launchers"):
        Path(place).symlink_to(ROOT / place)
    for name in ("mnli", "qnli", "superglue-cb"):
        write_rows(Path("data") / name, get_task(name))
    first_rows = Path("data/superglue-cb/test.jsonl").read_text().splitlines(keepends=True)[:3]
    Path("new.jsonl").write_text("".join(first_rows))
    (_, text) = next(found for found in blocks("yaml") if "template:" in found[1])
    Path("task.yaml").write_text(text)
    write_rows(Path(), load_task_file("task.yaml"))
    write_sweep(next(found[1] for found in blocks("yaml") if "methods:" in found[1]))
    for task in ("mnli", "qnli"):
        stage("source", f"--task_name {task} --output_dir runs/{task} --bank_dir bank".split())
    Path("runs/paper-bank").symlink_to("../bank")
    adapt = "--task_name superglue-cb --bank_dir bank --output_dir runs/cb"
    stage("adapt", adapt.split())
    stage("adapt", f"{adapt}-adapter --method adapter".split())
    shutil.copytree("runs/cb", "runs/cb-pemt")
    COMMANDS["export"](["runs/cb", "cb-export"])
    shutil.copytree("cb-export", "cb-export-pushed")
    COMMANDS["bank"](["export", "bank", "--peft", "adapters"])
    for number, name in enumerate(LORAHUB_IDS):
        folder = Path("adapters-of-the-hub", name)
        make_adapter(Path("base"), folder, pickled=number % 2 == 1, seed=number, **LORAHUB)
    folders = [Adapter(f"adapters-of-the-hub/{name}") for name in LORAHUB_IDS]
    add_peft(folders, bank_dir="hub-bank", model_name_or_path="base")
    shutil.copytree("hub-bank", "hub-bank-pushed")
    Path("official").mkdir()
    torch.save(published("lora"), "official/lora.pt")
    torch.save(nn.Parameter(PROMPT_PD), "official/task_embedding.pt")
    tiny_base().config.save_pretrained("official-base")


def make_repositories() -> Path:
    """What a hub has, in the working directory: an export, a bank, LoraHub's adapters."""
    root = Path("hub").absolute() / "repositories"
    shutil.copytree("adapters-of-the-hub", root)
    shutil.copytree("cb-export-pushed", root / "OWNER" / "NAME")
    shutil.copytree("hub-bank-pushed", root / "OWNER" / "BANK")
    return root


def stage(name: str, arguments: list[str]) -> None:
    """`pemt source` or `pemt adapt` as the page says, on this world's base and data, one step long."""
    task = arguments[arguments.index("--task_name") + 1]
    data = [] if "--task_file" in arguments else ["--data_dir", f"data/{task}"]
    rank = ["--expert.rank", "2"] if name == "source" else []
    # TensorBoard's second writer waits until the next second: as long as such a run takes.
    quiet = [] if "--report_to" in arguments else ["--report_to", "[]"]
    COMMANDS[name]([*arguments, *SMALL.split(), *quiet, *data, *rank])


def write_rows(folder: Path, task: Task) -> None:
    """jsonl files with the fields of the task's template, every class equally often."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = [name for _, name, _, _ in string.Formatter().parse(task.template) if name]
    draw = random.Random(0)
    assert task.labels is not None
    for split, rows in (("train", 60), ("validation", 9), ("test", 9)):
        lines: list[dict[str, Any]] = [
            {field: f"the box is {draw.choice(COLOURS)}" for field in fields}
            | {"label": row % len(task.labels)}
            for row in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(text: str) -> None:
    """The page's sweep as `whole.yaml`, and as `sweep.yaml` one run of it."""
    Path("whole.yaml").write_text(text)
    write_one_run("sweep.yaml", text)


def write_one_run(path: str, text: str) -> None:
    """One run of a sweep, on this world's base and data."""
    content = yaml.safe_load(text)
    flags = SMALL.split()
    small = {
        key[2:]: yaml.safe_load(value) for key, value in zip(flags[::2], flags[1::2], strict=True)
    }
    content["fields"].update({"report_to": [], **small})
    content["methods"] = {"adapter": content["methods"]["adapter"]}
    content["tasks"] = {"superglue-cb": {"data_dir": "data/superglue-cb"}}
    content["seeds"] = content["seeds"][:1]
    if "sources" in content:
        content["sources"] = {"mnli": {"data_dir": "data/mnli"}}
        content["published"]["numbers"] = {"adapter": {"superglue-cb": 50}}
    Path(path).write_text(yaml.safe_dump(content))
