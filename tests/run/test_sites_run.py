"""Both stages with experts on different layers, in one process: what bank, run, report and export say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pemt.bank.entries import read_entry
from pemt.commands import COMMANDS
from pemt.config import ConfigError, ExpertConfig, MixtureConfig, PemtError
from pemt.publish import PemtModel, export_run
from pemt.report.findings import gate_matrices, source_uses
from pemt.report.page import write_report
from pemt.report.record import read_runs
from pemt.run.finished import load_finished
from pemt.run.train import run_adapt, run_source
from tests.support.tiny import adapt_config, losses, source_config
from tests.support.trained import train_sources

SOURCES = {"tiny-sites-a": ["wo"], "tiny-sites-b": ["q", "v"]}
TARGET = "tiny-sites-target"
SHARED = {"eval_strategy": "no", "max_eval_samples": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one on the FFNs' outputs and one on attention, and a run over both."""
    folder = train_sources(tmp_path_factory.mktemp("sites"), SOURCES, TARGET, **SHARED)
    adapt(folder, "adapt", save_steps=2, save_total_limit=9)
    return folder


def adapt(folder: Path, name: str, **fields: object) -> dict:
    paths = (folder / "base", folder / TARGET, folder / name, folder / "bank")
    return run_adapt(adapt_config(*paths, TARGET, **{**SHARED, **fields}))


def test_the_bank_holds_each_where_it_was_trained(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = read_entry(world / "bank" / "tiny-sites-b")
    layers = {key.rpartition(".")[0] for key in source.weights}
    assert {"encoder.0.self.q", "decoder.1.cross.v"} <= layers
    assert len(layers) == 2 * (2 + 2 * 2)
    assert losses(world / "run-tiny-sites-b")[1] > losses(world / "run-tiny-sites-b")[10]
    COMMANDS["bank"](["list", str(world / "bank")])
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "tiny-sites-a  lora on wo", "tiny-sites-b  lora on q",
    ]  # fmt: skip
    COMMANDS["bank"](["show", str(world / "bank"), "tiny-sites-b"])
    assert "q, v (12 layers)" in capsys.readouterr().out
    COMMANDS["bank"](["verify", str(world / "bank")])


def test_results_name_every_gate_by_its_site(world: Path) -> None:
    results = json.loads((world / "adapt" / "all_results.json").read_text())
    assert results["sources"] == list(SOURCES)
    assert results["gates"]["encoder/1"] == {"tiny-sites-a": 1.0}
    assert results["gates"]["decoder/0/cross/v"] == {"tiny-sites-b": 1.0}
    assert [results[f"test_moe_weight_{k}"] for k in (0, 1)] == [1.0, 1.0]
    last = [json.loads(line) for line in (world / "adapt" / "log.jsonl").read_text().splitlines()][
        -1
    ]
    assert last["gate/encoder/0/self/q/tiny-sites-b"] == pytest.approx(1.0)
    assert "gate/encoder/0/self/q/tiny-sites-a" not in last
    (line, *_) = (world / "adapt" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["gates"] == dict.fromkeys(SOURCES, 1.0)


def test_what_is_unexpected_is_told(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pemt.run.build.MOST_TAGS", 15)
        adapt(world, "told", max_steps=1)
    told = capfd.readouterr().out
    assert (
        "16 gate weights (2 experts on 16 layers): log.jsonl and TensorBoard get the mean" in told
    )
    assert "different layers (of 16 with an expert: tiny-sites-a 4, tiny-sites-b 12)" in told
    assert "sparsity loss" not in told
    adapt(world, "told-2", max_steps=1, source_tasks=["tiny-sites-b"])
    told = capfd.readouterr().out
    assert "gate weights" not in told
    assert "no expert is on an FFN's wo, where the task sparsity loss is taken" in told
    assert not losses(world / "told-2", "train/sparsity_loss")


def test_a_report_shows_where_a_source_is_absent(world: Path, tmp_path: Path) -> None:
    (record,) = read_runs([world / "adapt"])
    matrices = {matrix.title: matrix for matrix in gate_matrices(record)}
    assert list(matrices) == [
        "encoder/self/q", "encoder/self/v", "encoder",
        "decoder/self/q", "decoder/self/v", "decoder/cross/q", "decoder/cross/v", "decoder",
    ]  # fmt: skip
    assert matrices["encoder/self/q"].values == [[None, 1.0], [None, 1.0]]
    assert [(use.sites, use.leads_sites) for use in source_uses(record)] == [(4, 4), (12, 12)]
    write_report([world / "adapt"], tmp_path)
    assert (
        "| encoder/self/q | tiny-sites-a | tiny-sites-b |" in (tmp_path / "report.md").read_text()
    )
    assert "12 of 12" in (tmp_path / "report.html").read_text()


def test_it_resumes_loads_and_is_exported(world: Path, tmp_path: Path) -> None:
    whole = losses(world / "adapt")
    checkpoint = str(world / "adapt" / "checkpoint-2")
    adapt(world, "resumed", save_steps=2, save_total_limit=9, resume_from_checkpoint=checkpoint)
    resumed = losses(world / "resumed")
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-5)
    assert min(resumed) == 3
    finished = load_finished(world / "adapt")
    folder = export_run(world / "adapt", tmp_path / "export")
    published = PemtModel.from_pretrained(folder, device="cpu").model
    ours, theirs = dict(finished.model.named_parameters()), dict(published.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_nearest_by_prompt_alone_are_mixed_and_told(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nearest = MixtureConfig(top_sources=1)
    results = adapt(world, "nearest", mixture=nearest, max_steps=1, source_tasks=["tiny-sites-*"])
    (kept,) = results["sources"]
    (other,) = SOURCES.keys() - {kept}
    told = capsys.readouterr().out
    assert f"mixture.top_sources 1: mixed are {kept}; left out" in told
    assert told.count(other) == 1
    assert load_finished(world / "nearest").source_names == [kept]


def test_uniform_gates_train_export_and_are_another_run(world: Path, tmp_path: Path) -> None:
    uniform = MixtureConfig(gate="uniform")
    adapt(world, "uniform", mixture=uniform)
    finished = load_finished(world / "uniform")
    assert not [name for name, _ in finished.model.trainable_parameters() if "gate" in name]
    folder = export_run(world / "uniform", tmp_path / "export")
    assert PemtModel.from_pretrained(folder, device="cpu").settings.mixture == uniform
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["mixture"][
        "gate"
    ]  # as written before there was one: its gates are missed, not made up
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(PemtError, match=r"gate.weight` does not fit"):
        PemtModel.from_pretrained(folder, device="cpu")
    with pytest.raises(PemtError, match=r"mixture.gate uniform, not learned"):
        adapt(world, "uniform")


def test_a_run_of_before_there_were_sites_is_of_published_ones(world: Path) -> None:
    """A section's field that config.yaml does not have is its default."""
    path = world / "run-tiny-sites-a" / "config.yaml"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if "target_modules" not in line and line.strip() != "- wo"]
    assert len(kept) < len(lines)
    path.write_text("\n".join(kept) + "\n")
    task = "tiny-sites-a"
    paths = (world / "base", world / task, world / f"run-{task}", world / "bank")
    config = source_config(*paths, task, expert=ExpertConfig(rank=2), **SHARED)
    run_source(config)  # finished: the same run
    with pytest.raises(PemtError, match=r"expert.target_modules \['wo'\], not \['q'\]"):
        run_source(replace(config, expert=ExpertConfig(rank=2, target_modules=["q"])))


def test_modules_that_the_base_lacks_are_refused_before_anything_is_written(world: Path) -> None:
    task = "tiny-sites-a"
    paths = (world / "base", world / task, world / "refused", world / "bank")
    with pytest.raises(ConfigError, match=r"expert.target_modules: `wi_0` is on no linear layer"):
        run_source(source_config(*paths, task, expert=ExpertConfig(target_modules=["wi_0"])))
    assert not (world / "refused").exists()
