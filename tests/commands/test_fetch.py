"""`pemt fetch`: base, tokenizer and data from a hub into a folder, which is all that an offline machine needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from pemt.bank import Adapter, add_peft
from pemt.bank.entries import write_entry
from pemt.commands import COMMANDS
from pemt.config import AdaptConfig, PemtError
from pemt.model import base_shape
from pemt.run.fetch import fetch_all
from tests.conftest import python
from tests.data.test_hub import write_shard
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.hub import Hub, hub, hub_for_this_process
from tests.support.hub_datasets import DatasetHub
from tests.support.tiny import make_base
from tests.support.tiny_t5 import tiny_base, tiny_source

TASK = """
name: own
description: says whether the box is red
template: "text : {sentence1} lid : {sentence2}"
labels: ["no", "yes"]
metrics: [accuracy]
hub: {path: OWNER/glue, validation: validation}
"""


class Both(DatasetHub):
    """Models and data sets."""

    def do_GET(self) -> None:
        (DatasetHub if "/datasets/" in self.path else Hub).do_GET(self)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fetch") / "root"
    base = make_base(root / "OWNER" / "tiny")
    make_adapter(base, root / "OWNER" / "lora", pickled=True, **LORAHUB)
    glue = root / "OWNER" / "glue"
    glue.mkdir()
    files = [f"  - split: {split}\n    path: {split}-*" for split in ("train", "validation")]
    header = ["---", "configs:", "- config_name: default", "  data_files:", *files, "---"]
    (glue / "README.md").write_text("\n".join([*header, "# A data set"]))
    for split, size in (("train", 20), ("validation", 8)):
        write_shard(glue, split, 0, 1, size, 0)
    (root.parent / "task.yaml").write_text(TASK)
    return root


RUN = [
    "--task_name",
    "own",
    "--task_file",
    "task.yaml",
    "--bank_dir",
    "bank",
    "--model_name_or_path",
    "OWNER/tiny",
    "--peft",
    "OWNER/lora",
]


@pytest.mark.soak  # from a hub in this process: test_docs_commands.py
def test_what_was_fetched_serves_a_machine_without_a_network(root: Path) -> None:
    folder = root.parent
    with hub(root, Both) as environment:
        here = {**environment, "HF_DATASETS_OFFLINE": "0", "HF_HUB_CACHE": str(folder / "not-this")}
        done = python("-m", "pemt", "fetch", *RUN, "--to", "offline", cwd=folder, **here)
    assert done.returncode == 0, done.stderr
    added, base, tokenizer, data, experts, offline = done.stdout.splitlines()
    assert added == "added:     OWNER/lora: bank"
    assert experts == f"experts:   lora: {folder}/bank, where a run reads them"
    snapshot = folder / "offline" / "hub" / "models--OWNER--tiny" / "snapshots"
    assert base.startswith(f"base:      OWNER/tiny: {snapshot}")
    assert tokenizer.startswith(f"tokenizer: OWNER/tiny: {snapshot}")
    assert data == f"data:      own (20 train, 4 validation, 4 test): {folder}/offline/datasets"
    assert offline == (
        f"offline: export HF_HOME={folder}/offline HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1"
    )
    assert (folder / "offline" / "pemt-fetched.txt").read_text() == done.stdout
    assert not (folder / "not-this").exists()
    # to another machine's disk; nobody answers there
    (folder / "offline").rename(folder / "scratch")
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    away["HF_HOME"] = str(folder / "scratch")
    again = python("-m", "pemt", "fetch", *RUN, cwd=folder, **away)
    assert again.returncode == 0, again.stderr
    told = done.stdout.replace(f"{folder}/offline", f"{folder}/scratch")
    assert again.stdout == told.replace(f"{added}\n", ""), "it is there"


def test_folders_are_read_where_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the experts are looked at."""
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        rows = '{"sentence": "the box", "label": 1}\n{"sentence": "a lid", "label": 0}\n' * 4
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows)
    command = [
        "--task_name",
        "cola",
        "--data_dir",
        "data",
        "--model_name_or_path",
        "base",
        "--bank_dir",
        "bank",
    ]
    with pytest.raises(PemtError, match="bank is no folder"):
        COMMANDS["fetch"](command)
    COMMANDS["fetch"](["source", *command])
    base, _, data, _ = capsys.readouterr().out.splitlines()
    assert base == f"base:      base: {tmp_path}/base, a folder: it is read there and not copied"
    assert data.startswith("data:      cola (8 train, 4 validation, 4 test): ")
    assert data.endswith(", made from data")
    shutil.copytree(
        add_peft([Adapter(str(make_adapter(Path("base"), tmp_path / "red")))], bank_dir="pushed")[
            0
        ].folder,
        tmp_path / "root" / "OWNER" / "bank" / "red",
    )
    with hub_for_this_process(tmp_path / "root"):
        for told in ("added red", "there already: red"):
            COMMANDS["fetch"]([*command, "--bank", "OWNER/bank"])
            pulled, *_, experts, _ = capsys.readouterr().out.splitlines()
            assert pulled == f"pulled:    OWNER/bank: {told}"
            assert experts == f"experts:   red: {tmp_path}/bank, where a run reads them"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            COMMANDS["fetch"]([*command, "--bank", "OWNER/bank"])
        assert "pulled" not in capsys.readouterr().out
    model = tiny_base()
    shape = base_shape(model.config)
    write_entry(
        "bank", tiny_source(name="mnli"), base={"name": "x", **shape}, description=None, metrics={}
    )
    with pytest.raises(PemtError, match="made for a base model with"):
        COMMANDS["fetch"](command)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--task_name cola --config adopt", "--config adopt"),
        ("--task_name cola --method adapter --model_name_or_path ./nowhere", "no folder ./nowhere"),
        ("--task_name cola --method adapter --model_name_or_path x --to /dev/null/x", "--to: "),
        (
            "source --task_name cola --bank_dir b --model_name_or_path x --peft y",
            "--peft, --bank: ",
        ),
        ("--task_name cola --method adapter --model_name_or_path x --bank y/z", "--peft, --bank: "),
    ],
)
def test_what_cannot_be_fetched_is_one_line(arguments: str, told: str) -> None:
    with pytest.raises(PemtError, match=told) as error:
        COMMANDS["fetch"](arguments.split())
    assert "\n" not in str(error.value)


def test_a_stream_from_the_hub_cannot_be_fetched() -> None:
    config = AdaptConfig(
        model_name_or_path="x",
        output_dir="x",
        task_name="rte",
        method="adapter",
        streaming=True,
        max_steps=3,
        eval_strategy="no",
    )
    with pytest.raises(PemtError, match="streaming: the run reads rte from the hub"):
        next(fetch_all(config))
