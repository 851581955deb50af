"""`report_to`: what trackers get of a run. A generic one always; wandb and mlflow, offline, where they can be had."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker

from pemt.config import AdaptConfig, ConfigError
from pemt.engine import Interrupted
from pemt.run.train import run_adapt
from tests.support.jobs import World
from tests.support.stopped import Stops

OPENED: list[Kept] = []


class Kept(GeneralTracker):
    """A tracker as accelerate wants one, which keeps what it is given."""

    name = "trackio"
    requires_logging_directory = False
    refuses = ""  # at `start`, or at a step

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__(_blank=True)
        self.project, self.settings = project, settings
        self.logged: dict[int, dict[str, float]] = {}
        self.configuration: dict[str, Any] = {}
        self.finished = 0

    def start(self) -> None:
        if self.refuses == "start":
            raise RuntimeError("no account\nis set up")
        OPENED.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration |= values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if self.refuses == "log" and step == 2:
            raise ConnectionError("nobody answers")
        assert step is not None
        self.logged.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the tracker of a package that is installed."""
    for name in ("trackio", "wandb"):
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Kept)
    monkeypatch.setattr(Kept, "refuses", "")
    OPENED.clear()


def config_of(world: World, run: Path, report_to: str, **fields: object) -> AdaptConfig:
    few: dict[str, object] = {"max_steps": 3, "eval_strategy": "no", "report_to": report_to}
    return world.config(run, **{**few, **fields})


def logged(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


def test_a_tracker_gets_what_log_jsonl_has_and_the_outcome(
    world: World, tmp_path: Path, kept: None
) -> None:
    run = tmp_path / "seed-0"
    results = run_adapt(config_of(world, run, "[trackio]"))
    (tracker,) = OPENED
    assert (tracker.project, tracker.settings) == ("pemt", {"name": "seed-0"})
    assert tracker.finished == 1
    assert tracker.configuration["learning_rate"] == 0.01
    assert tracker.configuration["mixture.prompt_dropout"] == 0.1
    assert tracker.configuration["report_to"] == '["trackio"]'
    for step, line in logged(run).items():
        assert (
            line.items()
            >= {
                tag: value
                for tag, value in tracker.logged[step].items()
                if tag.startswith("train/")
            }.items()
        )
    assert tracker.logged[3]["test/loss"] == results["test_loss"]
    assert not (run / "tensorboard").exists()  # it is not named


def runs_of(run: Path) -> dict[str, str | None]:
    return json.loads((run / "trackers.json").read_text())


def test_a_resumed_run_is_another_one_where_it_cannot_be_opened_again(
    world: World, tmp_path: Path, kept: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "seed-0"
    config = config_of(world, run, "[trackio]")
    with pytest.raises(Interrupted):
        run_adapt(config, callbacks=[Stops])
    assert "another run there" not in capsys.readouterr().err
    run_adapt(config)
    assert [each.settings for each in OPENED] == [{"name": "seed-0"}] * 2
    assert [step for each in OPENED for step in each.logged] == [1, 2, 3]
    assert capsys.readouterr().err.count("trackio: what follows is another run there") == 1


def test_one_that_fails_ends_no_training(
    world: World, tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Kept, "refuses", "log")
    run = tmp_path / "run"
    run_adapt(config_of(world, run, "[trackio,tensorboard]"))
    out = capsys.readouterr().out
    assert out.count("trackio: nobody answers; training continues") == 1
    (tracker,) = OPENED
    assert sorted(tracker.logged) == [1, 3]  # of the last one the outcome alone
    assert "train/loss" not in tracker.logged[3]
    assert sorted(logged(run)) == [1, 2, 3]
    assert any((run / "tensorboard").iterdir())


def test_one_that_does_not_open_is_told_before_training(
    world: World, tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kept, "refuses", "start")
    config = config_of(world, tmp_path / "run", "[trackio]")
    with pytest.raises(
        ConfigError, match=r"report_to: trackio does not open: no account is set up;.*settings$"
    ):
        run_adapt(config)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    (tmp_path / "run" / "trackers.json").write_text('{"wandb": "gone"}')
    config = config_of(world, tmp_path / "run", "[wandb]")
    with pytest.raises(ConfigError, match=r"or begin another run there: delete trackers.json in"):
        run_adapt(config)


def test_a_run_that_ends_with_an_error_ends_the_trackers_run(
    world: World, tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("the data are gone")

    monkeypatch.setattr("pemt.run.loop._take_step", refuse)
    with pytest.raises(ConfigError, match="the data are gone"):
        run_adapt(config_of(world, tmp_path / "run", "[trackio]"))
    assert OPENED[0].finished == 1


@pytest.mark.parametrize(
    ("report_to", "told"),
    [
        ("[tensorbord]", "report_to: found `tensorbord`, allowed are tensorboard, wandb"),
        ("[aim]", "report_to: found `aim`, which is not installed here; `pip install aim`"),
    ],
)
def test_a_wrong_tracker_is_one_line(
    world: World, tmp_path: Path, report_to: str, told: str
) -> None:
    if "aim" in report_to and importlib.util.find_spec("aim"):
        pytest.skip("aim is installed")
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")) as error:
        run_adapt(config_of(world, tmp_path / "run", report_to))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_wandb_offline(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE", "CONFIG", "DATA"):  # else in the home of whoever runs this
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    run = tmp_path / "run"
    config = config_of(world, run, "[wandb]")
    with pytest.raises(Interrupted):
        run_adapt(config, callbacks=[Stops])
    run_adapt(config)
    # what is sent to one run of one id, however often it was resumed
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{runs_of(run)['wandb']}"] * 2
    for file, words in zip(files, ((b"learning_rate",), (b"test/average_metrics",)), strict=True):
        for word in (b"train/loss", *words):
            assert word in file.read_bytes(), word
    first = runs_of(run)
    run_adapt(config_of(world, run, "[wandb]", overwrite_output_dir="true"))
    assert runs_of(run) != first, "it is another run"


def test_mlflow_in_a_local_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    place = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    mlflow.set_tracking_uri(place)
    with pytest.raises(Interrupted):
        run_adapt(config_of(world, tmp_path / "run", "[mlflow]"), callbacks=[Stops])
    # its parameters have other values now, which mlflow refuses to change
    fields = {"resume_from_checkpoint": "true"}
    results = run_adapt(config_of(world, tmp_path / "run", "[mlflow]", **fields))
    (found,) = mlflow.search_runs(experiment_names=["pemt"], output_format="list")
    assert found.info.run_name == "run"
    assert found.data.params["learning_rate"] == "0.01"
    assert found.data.metrics["test/loss"] == pytest.approx(results["test_loss"])
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert {each.step: each.value for each in history} == pytest.approx(
        {step: line["train/loss"] for step, line in logged(tmp_path / "run").items()}
    )
