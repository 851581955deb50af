"""A finished run loaded again: the best weights, whatever has happened around its folder since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pemt.checkpoint.checkpoint import WEIGHTS
from pemt.config import AdaptConfig, PemtError, SourceConfig
from pemt.run.finished import finished_config, load_finished
from pemt.run.train import run_adapt
from pemt.storage import open_tensors, read_manifest
from pemt.storage.manifest import with_checksum
from tests.support.damages import flip_a_bit
from tests.support.tiny import adapt_config, make_base
from tests.support.trained import train_sources

SOURCE, TARGET = "tiny-finished-a", "tiny-finished-target"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a source run with its bank entry, and an adapt run over it."""
    folder = train_sources(tmp_path_factory.mktemp("finished"), [SOURCE], TARGET)
    (folder / f"run-{SOURCE}").rename(folder / "source")
    paths = (folder / "base", folder / TARGET, folder / "adapt", folder / "bank")
    run_adapt(adapt_config(*paths, TARGET))
    return folder


@pytest.mark.parametrize(
    ("stage", "kind", "names"), [("source", SourceConfig, []), ("adapt", AdaptConfig, [SOURCE])]
)
def test_a_run_comes_back_with_its_best_weights(
    world: Path, stage: str, kind: type, names: list[str]
) -> None:
    finished = load_finished(world / stage)
    assert isinstance(finished.config, kind)
    assert (finished.stage, finished.source_names) == (stage, names)
    results = json.loads((world / stage / "all_results.json").read_text())
    assert finished.checkpoint.name == results["best_checkpoint"]
    saved = open_tensors(finished.checkpoint, WEIGHTS, read_manifest(finished.checkpoint))
    trained = dict(finished.model.trainable_parameters())
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained.items())
    assert not finished.model.training


def test_the_best_checkpoint_is_taken_and_not_the_newest(world: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world / "adapt", tmp_path / "run"))
    first = load_finished(run).checkpoint
    later = Path(shutil.copytree(first, run / "checkpoint-999"))
    assert load_finished(run).checkpoint == first
    manifest = read_manifest(later)
    manifest["progress"] |= {"step": 999, "best_step": None, "best_metric": None}
    (later / "manifest.json").write_text(with_checksum(manifest))
    assert load_finished(run).checkpoint == later, "nothing was validated: the newest"


def test_a_bank_that_has_grown_changes_nothing(world: Path, tmp_path: Path) -> None:
    bank = Path(shutil.copytree(world / "bank", tmp_path / "bank"))
    other = bank / "an-other"
    shutil.copytree(bank / SOURCE, other)
    (other / "manifest.json").write_text(
        with_checksum({**read_manifest(other), "task": other.name})
    )
    config = finished_config(world / "adapt", ["--bank_dir", str(bank)])
    assert load_finished(world / "adapt", config).source_names == [SOURCE]


def test_another_task_does_not_inherit_the_data(world: Path) -> None:
    config = finished_config(world / "adapt", ["--task_name", SOURCE])
    assert (config.task_name, config.data_dir) == (SOURCE, None)
    data = str(world / SOURCE)
    config = finished_config(world / "adapt", ["--task_name", SOURCE, "--data_dir", data])
    assert config.data_dir == data
    # The two descriptions differ in length: the prompt is still the run's own.
    finished = load_finished(world / "adapt", config)
    assert finished.task.name == SOURCE
    assert finished_config(world / "adapt").data_dir == str(world / TARGET)


def test_folders_that_hold_no_finished_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(PemtError, match=r"holds no run \(config.yaml is missing\)"):
        load_finished(tmp_path)
    shutil.copy(world / "adapt" / "config.yaml", tmp_path)
    with pytest.raises(PemtError, match="without a checkpoint"):
        load_finished(tmp_path)


def test_a_base_of_another_shape_is_refused(world: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", d_model=24)
    config = finished_config(world / "source", ["--model_name_or_path", str(other)])
    with pytest.raises(
        PemtError, match=r"checkpoint-\d+: was trained on other weights than those of .*other"
    ):
        load_finished(world / "source", config)


def test_a_damaged_checkpoint_is_named(world: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world / "adapt", tmp_path / "run"))
    flip_a_bit(next(run.glob(f"checkpoint-*/{WEIGHTS}")))
    with pytest.raises(PemtError, match=WEIGHTS):
        load_finished(run)
