"""Runs from Python: rows in memory, metrics, callbacks, typed results, a second run after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import EarlyStoppingCallback, TrainerCallback

from pemt import (
    AdaptConfig,
    PemtError,
    Predictor,
    SourceConfig,
    evaluate_run,
    export_run,
    run_adapt,
    run_source,
)
from pemt.config import ExpertConfig
from pemt.data.in_memory import memory_data
from pemt.run.caller_inputs import with_caller_inputs
from pemt.run.early import check_early
from pemt.tasks import Task
from tests.support.tiny import losses, make_base, run_fields, write_task_files

TASK = Task(
    name="in-memory",
    description="says whether the box is red",
    template="text : {text}",
    labels=("no", "yes"),
    label_names=("pale", "bright"),
    metrics=("accuracy",),
    max_target_length=4,
)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_files(tmp_path_factory.mktemp("rows") / "data", seed=3)


@pytest.fixture(scope="module")
def rows(files: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (files / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


def config_of(base: Path, folder: Path, task: str = TASK.name, **fields: Any) -> AdaptConfig:
    values = run_fields(base, folder, folder / "run", task)
    del values["data_dir"]
    small = {"method": "adapter", "eval_strategy": "steps", "eval_steps": 5, **fields}
    return AdaptConfig(**{**values, **small})


@pytest.fixture(scope="module")
def done(
    base: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[AdaptConfig, Any]:
    """A run on lists of dicts, and what it gave."""
    config = config_of(base, tmp_path_factory.mktemp("done"))
    return config, run_adapt(config, **rows, task=TASK)


def test_rows_in_memory_train_as_files_do(
    base: Path, files: Path, tmp_path: Path, done: tuple[AdaptConfig, Any]
) -> None:
    config, results = done
    of_files = config_of(base, tmp_path, data_dir=str(files))
    again = run_adapt(of_files, task=TASK)
    assert again["test_loss"] == results["test_loss"]
    assert losses(tmp_path / "run") == losses(Path(config.output_dir))
    predictions = Path(config.output_dir, "predictions.jsonl").read_bytes()
    assert again.predictions.read_bytes() == predictions


def test_results_are_typed_and_keep_their_old_keys(done: tuple[AdaptConfig, Any]) -> None:
    config, results = done
    assert results == json.loads(Path(config.output_dir, "all_results.json").read_text())
    assert results.metrics == {"accuracy": results["test_accuracy"]}
    assert (results.loss, results.epoch) == (results["test_loss"], 1.0)
    assert results.best_checkpoint.is_dir()
    assert results.best_checkpoint.parent == Path(config.output_dir)
    assert results.moe_weights == results.gates == {}
    assert results.average_metrics == results["test_average_metrics"]
    assert len(results.predictions.read_text().splitlines()) == results["examples"] == 11


def test_the_same_data_are_the_same_run_and_others_are_not(
    rows: dict[str, Any], done: tuple[AdaptConfig, Any]
) -> None:
    config, results = done
    in_another_form = DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})
    assert run_adapt(config, in_another_form, task=TASK) == results, "finished, by any form"
    changed = [{**rows["test"][0], "label": 1 - rows["test"][0]["label"]}, *rows["test"][1:]]
    with pytest.raises(PemtError, match="already holds a run with data_fingerprint"):
        run_adapt(config, **{**rows, "test": changed}, task=TASK)
    with pytest.raises(PemtError, match="already holds a run with data_fingerprint"):
        run_adapt(config, **rows, task=replace(TASK, template="{text} text :"))
    kept = replace(config, data_fingerprint=_fingerprint(config))
    for ask in (lambda: run_adapt(kept), lambda: check_early(replace(kept, output_dir="new"))):
        with pytest.raises(PemtError, match=r"data_fingerprint: data or task .* Give them there"):
            ask()
    with pytest.raises(PemtError, match=r"without letters; score it with evaluate_run"):
        run_adapt(config, **rows, task=TASK, metrics={"letters": lambda p, r: 1.0})


def _fingerprint(config: AdaptConfig) -> str:
    (line,) = [
        line
        for line in Path(config.output_dir, "config.yaml").read_text().splitlines()
        if line.startswith("data_fingerprint: ")
    ]
    return line.split(": ")[1]


def test_what_class_ids_mean_is_part_of_the_data(rows: dict[str, Any]) -> None:
    plain = Dataset.from_list(rows["train"])
    named = plain.cast_column("label", ClassLabel(names=["no", "yes"]))
    digests = {
        str(memory_data(each, None, None).digests)
        for each in (plain, rows["train"], named, plain.select(range(39)))
    }
    assert len(digests) == 3, "a Dataset and a list of equal rows are the same"


def test_a_finished_run_answers_and_scores_without_its_task_registered(
    rows: dict[str, Any], done: tuple[AdaptConfig, Any], tmp_path: Path
) -> None:
    config, results = done
    answer = Predictor.load(config.output_dir)({"text": "the box is red"})[0]
    assert answer.label in ("pale", "bright")
    with pytest.raises(PemtError, match=r"trained on rows in memory; give data_dir"):
        evaluate_run(config.output_dir)
    scored = evaluate_run(
        config.output_dir,
        rows=rows["test"],
        metrics={"words": lambda predictions, _: len(predictions)},
        output_file=str(tmp_path / "scores.json"),
    )
    assert scored["test_accuracy"] == results["test_accuracy"]
    assert scored["test_words"] == 11
    assert export_run(config.output_dir, tmp_path / "export").is_dir()


class Spy(TrainerCallback):
    """Notes what happens, and what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.logs: list[dict[str, float]] = []
        self.scores: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert args.learning_rate == 1e-2
        assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= kwargs.keys()
        self.seen.append(f"begin {state.global_step}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(f"step {state.global_step}")
        control.should_save = state.global_step == 2
        control.should_evaluate = state.global_step == 3
        control.should_training_stop = state.global_step == 4

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self.seen.append("evaluate")
        self.scores.append(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append("end")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("never called, and told so")


def test_callbacks_see_and_steer_the_run(
    base: Path, rows: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spy = Spy()
    config = config_of(base, tmp_path, save_total_limit=9)
    text_rows = {
        split: [
            {"source": row["text"], "target": "red" if row["label"] else "blue"} for row in each
        ]
        for split, each in rows.items()
    }
    config = replace(config, task_name="told-by-columns")
    calls: list[Any] = []

    def calls_so_far(predictions: list[str], references: list[str]) -> float:
        calls.append((predictions, references))
        return len(calls)

    results = run_adapt(
        config, **text_rows, metrics={"calls_so_far": calls_so_far}, callbacks=[spy]
    )
    steps = ["step 1", "step 2", "save", "step 3", "evaluate", "save", "step 4", "evaluate", "save"]
    assert spy.seen == ["begin 0/10", *steps, "end"]
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= spy.logs[0].keys()
    assert [logs["loss"] for logs in spy.logs] == list(losses(tmp_path / "run").values())
    told = capsys.readouterr().out
    assert "Spy.on_substep_end are not called" in told
    assert "stopped by a callback after step 4 of 10" in told
    assert "column source is what is read, target what is to be answered" in told
    predictions, references = calls[-1]
    assert set(references) <= {"red", "blue"}
    assert len(predictions) == len(references) == 11
    assert results["checkpoint_metric"] == "calls_so_far"
    # its later value is the higher one, whatever the accuracy
    assert results["best_checkpoint"] == "checkpoint-4"
    assert results.metrics.keys() == {"accuracy", "calls_so_far"}
    assert results.average_metrics == results.metrics["calls_so_far"]
    assert spy.scores[0]["eval_calls_so_far"] == spy.scores[0]["eval_average_metrics"]
    # where it is cut off now, the end stays the end
    (tmp_path / "run" / "all_results.json").unlink()
    again = run_adapt(
        config, **text_rows, metrics={"calls_so_far": calls_so_far}, callbacks=[Spy()]
    )
    assert again["epoch"] == results["epoch"]
    assert again["test_loss"] == pytest.approx(results["test_loss"])


def test_early_stopping_of_transformers_fits(
    base: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(base, tmp_path, eval_steps=1)
    falling = iter(range(100, 0, -1))
    results = run_adapt(
        config,
        **rows,
        task=TASK,
        metrics={"falling": lambda predictions, references: next(falling)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    assert results["best_checkpoint"] == "checkpoint-1"
    assert results["checkpoints_validated"] == 3


class Interrupts:
    """Ctrl-C after the second step; no base class is needed."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_after_ctrl_c_the_session_lives_and_the_same_call_resumes(
    base: Path,
    rows: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: tuple[AdaptConfig, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    config = config_of(base, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="SIGINT: a checkpoint is saved"):
        run_adapt(config, **rows, task=TASK, callbacks=[Interrupts])
    assert signal.getsignal(signal.SIGINT) is before
    results = run_adapt(config, **rows, task=TASK)
    assert "resuming from step 2/10" in capsys.readouterr().out
    assert results["test_loss"] == pytest.approx(done[1]["test_loss"])


def test_a_source_task_from_memory(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    values = run_fields(base, tmp_path, tmp_path / "run", TASK.name)
    del values["data_dir"]
    config = SourceConfig(
        **values, bank_dir=str(tmp_path / "bank"), expert=ExpertConfig(rank=2), max_steps=2
    )
    spy = Spy()
    own = {"words": lambda predictions, references: float(len(predictions))}
    elsewhere = {"output_dir": str(tmp_path / "told"), "bank_dir": str(tmp_path / "another")}
    told = run_source(replace(config, **elsewhere), **rows, task=TASK, metrics=own, callbacks=[spy])
    assert spy.seen[:3] == ["begin 0/2", "step 1", "step 2"]
    assert told.metrics.keys() == {"accuracy", "words"}
    source = run_source(config, **rows, task=TASK)
    assert source.entry == tmp_path / "bank" / TASK.name
    assert Path(source) == source.entry
    assert source.metrics.keys() == {"accuracy"}
    assert run_source(config, **rows, task=TASK) == source
    target = replace(config_of(base, tmp_path), output_dir=str(tmp_path / "target"))
    target = replace(target, method="pemt", bank_dir=str(tmp_path / "bank"), max_steps=2)
    results = run_adapt(target, **rows, task=TASK)
    assert results.moe_weights == {TASK.name: pytest.approx(1.0)}
    assert results.gates["decoder/1"] == {TASK.name: pytest.approx(1.0)}


ROW = {"text": "the box", "label": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "rows.csv"}, "train: found str; give a datasets.Dataset"),
        ({"train": [ROW], "validation": iter([ROW])}, "validation: found list_iterator; give"),
        ({"train": [ROW, "text"]}, r"train\[1\]: found str 'text'; a row is a dict"),
        ({"train": []}, "train: no row in it"),
        ({"validation": [ROW]}, "train: missing; found validation alone"),
        ({"train": {"train": [ROW], "dev": [ROW]}}, "found a mapping with dev; allowed are"),
        ({"train": {"train": [ROW]}, "test": [ROW]}, "test: given beside a mapping of splits"),
        ({"train": [ROW]}, "found train; train and at least one of"),
        (
            {"train": [ROW], "test": [{"txt": 1}]},
            r"test\[0\]: field 'label' is missing; found: txt",
        ),
        ({"train": [ROW], "test": [ROW], "data_dir": "x"}, "data_dir: found x, but the data are"),
        (
            {"train": [ROW], "test": [ROW], "task": replace(TASK, name="other")},
            "task_name: found 'in-memory', but the task given is 'other'",
        ),
        (
            {"train": [ROW], "test": [ROW], "task": None},
            "is no known task.*in Python give task=Task.*or rows with the columns source and target",
        ),
        ({"metrics": {"accuracy": len}}, "metrics: found the name 'accuracy'"),
        ({"metrics": {"rouge": 3}}, "metrics: rouge: found 3, a function of"),
        ({"callbacks": [object()]}, "has none of the methods on_train_begin"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, rows: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    data = given if given.keys() & {*SPLITS} else {**rows, **given}
    fields = {"data_dir": data.pop("data_dir")} if "data_dir" in data else {}
    config = config_of(base, tmp_path, **fields)
    with pytest.raises(PemtError, match=message):
        run_adapt(config, **{"task": TASK, **data})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda p, r: float("nan"), "odd gave nan, a finite number is needed"),
        (lambda p, r: 1 / 0, "odd failed on 11 predictions: ZeroDivisionError: division by zero"),
        (lambda p, r: "many", "odd failed on 11 predictions: ValueError"),
    ],
)
def test_a_metric_that_fails_says_which(
    rows: dict[str, Any], done: tuple[AdaptConfig, Any], tmp_path: Path, metric: Any, message: str
) -> None:
    with pytest.raises(PemtError, match=message):
        evaluate_run(done[0].output_dir, rows=rows["test"], metrics={"odd": metric})


def test_errors_name_fields_here_and_flags_on_the_command_line(
    base: Path, rows: dict[str, Any], done: tuple[AdaptConfig, Any]
) -> None:
    config = replace(done[0], seed=7)
    with pytest.raises(
        PemtError, match=r"give resume_from_checkpoint=True to .*overwrite_output_dir=True"
    ):
        run_adapt(config, **rows, task=TASK)


def test_equal_tasks_are_one_task(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    """Whatever objects they are made of: pickles tell a tuple that stands twice from two equal ones."""
    labels = ("no", "yes")
    tasks = [replace(TASK, labels=labels, label_names=names) for names in (labels, (*labels,))]
    assert tasks[0] == tasks[1]
    found = [with_caller_inputs(config_of(base, tmp_path), task=task)[0] for task in tasks]
    assert found[0] == found[1]
    other = with_caller_inputs(
        config_of(base, tmp_path), task=replace(TASK, description="another")
    )[0]
    assert other.data_fingerprint != found[0].data_fingerprint
