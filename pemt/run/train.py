"""The two stages, in the order of a run.

`early.py` has checked what needs no library. Then `resolve_run` decides: fresh, resumed (perhaps with another
accumulation) or finished. The engine fixes the precision, and with it the configuration. `set_up` reads base and data
and builds the model, `fit` (loop.py) trains it, the best checkpoint is tested, and the results are written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pemt.bank import entry_folder, write_entry
from pemt.checkpoint import (
    PREDICTIONS,
    RESULTS,
    Finished,
    Fresh,
    Resume,
    check_lock,
    resolve_run,
)
from pemt.config import AdaptConfig, SourceConfig, spell_fields
from pemt.data import Rows, load_task_data
from pemt.engine import Engine, Interrupted, Job, is_interactive
from pemt.model import PemtT5, base_shape, fetch_base, load_pretrained, precision_warning
from pemt.monitor import progress_logger, quiet_libraries, record_outcome
from pemt.run.build import build_model, build_ops
from pemt.run.caller_inputs import CallerInputs, check_same_on_all, with_caller_inputs
from pemt.run.early import check_base_place, check_method, check_trackers
from pemt.run.evaluate import Evaluation, evaluate_set, gates_and_similarity
from pemt.run.loop import FitResult, fit
from pemt.run.outcome import RunResults, SourceResults
from pemt.run.prepare import Setup
from pemt.run.results import final_results, results_block, write_predictions, write_results
from pemt.run.session import Session
from pemt.run.staging import staged
from pemt.tasks import Metric, Task, check_metrics, get_task


def run_source(
    config: SourceConfig,
    train: Rows | Mapping[str, Rows] | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    *,
    task: Task | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
) -> SourceResults:
    """Stage 1: train one source task's expert and prompt, and put them into the bank (all ranks call).

    Args: as of `run_adapt`.

    Returns:
        The results, and the bank entry's folder as `.entry`.

    Raises:
        PemtError: anything the user can mend; raised before anything is written.
    """
    entry = entry_folder(config.bank_dir, config.task_name)  # refuses a name before training
    given = with_caller_inputs(config, train, validation, test, task, metrics, callbacks)
    results = _run(*given, entry)
    return SourceResults(results, results.output_dir, entry)


def run_adapt(
    config: AdaptConfig,
    train: Rows | Mapping[str, Rows] | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    *,
    task: Task | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
) -> RunResults:
    """Stage 2: adapt to a target task, over a bank of frozen experts or by a baseline (all ranks call).

    Args:
        config: the run. A second call with the same one resumes, or gives the results of the run that is finished.
        train, validation, test: rows in memory, each a `datasets.Dataset` or a list of dicts, in place of `data_dir`;
            as `train` alone also a DatasetDict. They have the fields of the task's template and its label; or the
            columns `source` and `target`, where `task_name` names no task. Splits are made of them as of files.
        task: a task of one's own, under the name that `task_name` says; it need not be registered.
        metrics: name -> function of (predictions, references) to a number, the higher the better. They stand beside
            the task's own in validation and test, and their mean chooses the best checkpoint.
        callbacks: objects in transformers' `TrainerCallback` protocol (docs/python.md says what fits).

    Returns:
        The results; as a mapping, what `all_results.json` holds.

    Raises:
        PemtError: anything the user can mend; raised before anything is written.
        Interrupted: the run was told to stop; a checkpoint is saved. In an interactive Python: KeyboardInterrupt.
    """
    given = with_caller_inputs(config, train, validation, test, task, metrics, callbacks)
    return _run(*given)


def _run(
    config: SourceConfig | AdaptConfig, caller: CallerInputs, entry: Path | None = None
) -> RunResults:
    """What the run gives, or has given where it is finished; `entry` is the folder of stage 1's expert."""
    job = Job(config)
    resolve = partial(resolve_run, config, world_size=job.world_size, product=entry)
    start = job.on_rank0(resolve, "checking the run's folder")
    if isinstance(start, Finished):
        if job.is_main:
            told = f"{config.output_dir}: this run is finished; give --overwrite_output_dir true to train it again"
            print(spell_fields(told), flush=True)
        caller.check_results(config, start.results)
        return RunResults(start.results, start.config.output_dir)
    if isinstance(start, Resume) and job.is_main:
        for note in start.notes:
            progress_logger().info(note)
    engine = Engine(start.config)
    # from here on the configuration is final, with the precision that the devices have
    config = replace(start.config, bf16=engine.config.bf16)
    if isinstance(config, AdaptConfig):
        check_method(config)
    with usable_after_interrupt(engine):
        setup = set_up(config, engine, start, caller)
        with Session(engine) as session:
            session.raise_if_stopped()  # it may have been told to stop before it began
            fitted = fit(setup, session)
            engine.optimizer_state.overwrite_weights(fitted.weights)
            tested = evaluate_set(setup, setup.data.test, "testing", session)
            if isinstance(config, SourceConfig):
                write = partial(_write_entry, config, setup, fitted, tested)
                engine.on_rank0(write, f"writing {entry}")
            # Whoever finds the results takes the run for finished: the entry is there by then.
            results = _write_results(setup, fitted, tested)
    engine.release()
    return RunResults(results, config.output_dir)


@contextmanager
def usable_after_interrupt(engine: Engine) -> Iterator[None]:
    """In an interactive Python a run that is told to stop ends as Ctrl-C does there, and its memory is freed.

    Raises:
        KeyboardInterrupt: in place of `Interrupted`, which would leave the interpreter.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if not is_interactive():
            raise
        engine.release()
        if isinstance(error, KeyboardInterrupt):  # the second one: nobody waits for the step
            raise
        raise KeyboardInterrupt(
            f"{error.reason}: a checkpoint is saved; the same call resumes from it"
        ) from None


def set_up(
    config: SourceConfig | AdaptConfig,
    engine: Engine,
    start: Fresh[Any] | Resume[Any],
    caller: CallerInputs,
) -> Setup:
    """Check and load everything a run reads, and build its model; nothing is written (all ranks call)."""
    check_same_on_all(caller, engine)
    quiet_libraries(engine.is_main)
    engine.on_rank0(
        lambda: check_lock(Path(config.output_dir)),
        f"watching for another run in {config.output_dir}",
    )
    engine.on_rank0(lambda: check_base_place(config), f"looking for {config.model_name_or_path}")
    engine.on_rank0(lambda: check_trackers(config), "looking for the trackers")
    task = caller.task or get_task(config.task_name, config.task_file)
    check_metrics(task, caller.metrics)
    build_ops(config, engine)
    read = staged(config, engine)
    with engine.local_first(f"fetching {config.model_name_or_path}"):
        fetch_base(read)
    name = read.model_name_or_path
    with engine.together(f"reading {name}"):
        base, tokenizer = load_pretrained(name, read.tokenizer_name, lazy=True)
    if (warning := precision_warning(config, base)) and engine.is_main:
        print(f"pemt: {warning}", file=sys.stderr, flush=True)
    with engine.local_first(f"preparing the examples of {task.name}"):
        data = load_task_data(task, read, tokenizer, caller.data)
    if data.is_measured:
        task = replace(task, max_target_length=data.max_target_length)
    engine.seed(config.seed, per_rank=False)
    with engine.together("building the model"):
        description = config.description or task.description
        built = build_model(config, base=base, tokenizer=tokenizer, description=description)
    for note in built.notes(config) if engine.is_main else ():
        progress_logger().info(note)
    return Setup(
        config=config,
        engine=engine,
        start=start,
        task=task,
        tokenizer=tokenizer,
        base=base,
        data=data,
        caller=caller,
        built=built,
    )


def _write_entry(config: SourceConfig, setup: Setup, fitted: FitResult, tested: Evaluation) -> None:
    model = setup.built.model
    assert isinstance(model, PemtT5)
    entry = write_entry(
        config.bank_dir,
        model.export_expert(setup.task.name, state=fitted.weights),
        base={"name": config.model_name_or_path, **base_shape(setup.base.config)},
        description=config.description or setup.task.description,
        metrics=tested.metrics,
    )
    progress_logger().info(f"{setup.task.name} is in the bank: {entry}")


def _write_results(setup: Setup, fitted: FitResult, tested: Evaluation) -> dict[str, Any]:
    """What `all_results.json` holds; rank 0 writes it, and what goes with it."""
    config, engine = setup.config, setup.engine
    results = final_results(setup, fitted, tested)
    mixture = gates_and_similarity(engine, tested)

    def write() -> None:
        folder = Path(config.output_dir)
        write_predictions(folder / PREDICTIONS, setup, tested)
        record_outcome(
            folder,
            step=fitted.state.step,
            config=config,
            results=results,
            gates=setup.built.gate_names,
            mixture=mixture,
            trackers=engine.trackers,
        )
        write_results(folder / RESULTS, results)
        files = {
            "results": folder / RESULTS,
            "predictions": folder / PREDICTIONS,
            "checkpoint": folder / results["best_checkpoint"],
        }
        print(results_block(results, files), flush=True)

    engine.on_rank0(write, "writing results and pictures")
    return results
