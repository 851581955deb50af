"""The two stages: what each builds before training, and what it leaves behind.

The loop itself, the same for both, is in `loop.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.bank import entry_folder, write_entry
from pemt.checkpoint import (
    PREDICTIONS,
    RESULTS,
    Config,
    Finished,
    Fresh,
    Resume,
    check_lock,
    resolve_run,
)
from pemt.config import AdaptConfig, RunConfig, SourceConfig, spell_fields
from pemt.data import Rows, load_task_data
from pemt.engine import Engine, Interrupted, Job, is_interactive
from pemt.model import PemtT5, base_shape, fetch_base, load_base, precision_warning
from pemt.monitor import progress_logger, quiet_libraries, record_outcome
from pemt.run.build import BuiltModel, build_model, build_ops
from pemt.run.caller_inputs import CallerInputs, check_same_on_all, with_caller_inputs
from pemt.run.early import check_base_place, check_method, check_trackers
from pemt.run.evaluate import Evaluation, evaluate
from pemt.run.loop import FitResult, fit, gates_and_similarity
from pemt.run.outcome import RunResults, SourceResults
from pemt.run.prepare import Setup
from pemt.run.results import final_results, results_block, write_predictions, write_results
from pemt.run.session import Session
from pemt.run.staging import staged
from pemt.tasks import Metric, Task, check_metrics


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
    # refuses a name now, not after training
    entry = entry_folder(config.bank_dir, config.task_name)
    config, caller = with_caller_inputs(
        config, train=train, validation=validation, test=test, task=task, metrics=metrics,
        callbacks=callbacks,
    )  # fmt: skip
    start = resolve_on_all(config, product=entry)
    if isinstance(start, Finished):
        caller.check_results(config, start.results)
        return SourceResults(start.results, config.output_dir, entry)
    config, engine = _make_engine(start)
    with usable_after_interrupt(engine):
        setup = set_up(config, engine, start, caller)
        built = _build(config, setup)
        with Session(config, engine) as session:
            fitted, tested = _fit_and_test(config, setup, built, session)
            engine.on_rank0(
                lambda: _write_entry(config, setup, built, fitted, tested), f"writing {entry}"
            )
            # Whoever finds the results takes the run for finished: the entry is there by then.
            results = _write_results(config, setup, built, fitted, tested)
    engine.release()
    return SourceResults(results, config.output_dir, entry)


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
    config, caller = with_caller_inputs(
        config, train=train, validation=validation, test=test, task=task, metrics=metrics,
        callbacks=callbacks,
    )  # fmt: skip
    start = resolve_on_all(config)
    if isinstance(start, Finished):
        caller.check_results(config, start.results)
        return RunResults(start.results, config.output_dir)
    config, engine = _make_engine(start)  # from here on the configuration is final
    check_method(config)
    with usable_after_interrupt(engine):
        setup = set_up(config, engine, start, caller)
        built = _build(config, setup)
        with Session(config, engine) as session:
            fitted, tested = _fit_and_test(config, setup, built, session)
            results = _write_results(config, setup, built, fitted, tested)
    engine.release()
    return RunResults(results, config.output_dir)


def resolve_on_all(
    config: Config, product: Path | None = None
) -> Fresh[Config] | Resume[Config] | Finished[Config]:
    """What `resolve_run` decides on rank 0, for all ranks, logged (all ranks call)."""
    job = Job(config)
    start = job.on_rank0(
        lambda: resolve_run(config, world_size=job.world_size, product=product),
        "checking the run's folder",
    )
    if job.is_main and isinstance(start, Resume):
        for note in start.notes:
            progress_logger().info(note)
    if job.is_main and isinstance(start, Finished):
        print(
            spell_fields(
                f"{config.output_dir}: this run is finished; give --overwrite_output_dir true to train it again"
            ),
            flush=True,
        )
    return start


def _make_engine(start: Fresh[Config] | Resume[Config]) -> tuple[Config, Engine]:
    """The run's engine, and its configuration with the precision that the devices have."""
    engine = Engine(start.config)
    return replace(start.config, bf16=engine.config.bf16), engine


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
    config: RunConfig, engine: Engine, start: Fresh[Any] | Resume[Any], caller: CallerInputs
) -> Setup:
    """Check and load everything a run reads; nothing is written (all ranks call)."""
    check_same_on_all(caller, engine)
    quiet_libraries(engine.is_main)
    engine.on_rank0(
        lambda: check_lock(Path(config.output_dir)),
        f"watching for another run in {config.output_dir}",
    )
    engine.on_rank0(lambda: check_base_place(config), f"looking for {config.model_name_or_path}")
    engine.on_rank0(lambda: check_trackers(config), "looking for the trackers")
    task = caller.task_of(config)
    check_metrics(task, caller.metrics)
    build_ops(config, engine)
    read = staged(config, engine)
    with engine.local_first(f"fetching {config.model_name_or_path}"):
        fetch_base(read)
    with engine.together(f"reading {read.model_name_or_path}"):
        base, tokenizer = load_base(read, lazy=True)
    if (warning := precision_warning(config, base)) and engine.is_main:
        print(f"pemt: {warning}", file=sys.stderr, flush=True)
    with engine.local_first(f"preparing the examples of {task.name}"):
        data = load_task_data(task, read, tokenizer, caller.data)
    if data.is_measured:
        task = replace(task, max_target_length=data.max_target_length)
    engine.seed(config.seed, per_rank=False)
    return Setup(
        engine=engine,
        start=start,
        task=task,
        tokenizer=tokenizer,
        base=base,
        data=data,
        caller=caller,
    )


def _build(config: SourceConfig | AdaptConfig, setup: Setup) -> BuiltModel:
    """The model, with its notes logged (all ranks call)."""
    with setup.engine.together("building the model"):
        built = build_model(
            config,
            base=setup.base,
            tokenizer=setup.tokenizer,
            description=config.description or setup.task.description,
        )
    notes = built.notes()
    if built.source_names and config.torch_compile and config.gradient_checkpointing:
        notes.append(
            "torch_compile: has no effect on blocks that mix experts with gradient_checkpointing; leave one of them out"
        )
    for note in notes if setup.engine.is_main else ():
        progress_logger().info(note)
    return built


def _fit_and_test(
    config: RunConfig, setup: Setup, built: BuiltModel, session: Session
) -> tuple[FitResult, Evaluation]:
    """Train, and score the best weights on the test set (all ranks call)."""
    engine = setup.engine
    session.raise_if_stopped()  # it may have been told to stop before it began
    fitted = fit(config, setup, built, session)
    engine.optimizer_state.overwrite_weights(fitted.weights)
    tested = evaluate(
        engine,
        setup.data.test,
        task=setup.task,
        tokenizer=setup.tokenizer,
        config=config,
        metrics=setup.caller.metrics,
        description="testing",
        on_batch_end=session.raise_if_stopped,
    )
    return fitted, tested


def _write_entry(
    config: SourceConfig, setup: Setup, built: BuiltModel, fitted: FitResult, tested: Evaluation
) -> None:
    model = built.model
    assert isinstance(model, PemtT5)
    entry = write_entry(
        config.bank_dir,
        model.export_expert(setup.task.name, state=fitted.weights),
        base={"name": config.model_name_or_path, **base_shape(setup.base.config)},
        description=config.description or setup.task.description,
        metrics=tested.metrics,
        dtype="float32",
    )
    progress_logger().info(f"{setup.task.name} is in the bank: {entry}")


def _write_results(
    config: RunConfig, setup: Setup, built: BuiltModel, fitted: FitResult, tested: Evaluation
) -> dict[str, Any]:
    """What `all_results.json` holds; rank 0 writes it, and what goes with it."""
    engine = setup.engine
    results = final_results(
        tested,
        state=fitted.state,
        epoch=fitted.epoch,
        gates=built.gate_names,
        data=setup.data,
        custom_metrics=list(setup.caller.metrics),
    )
    mixture = gates_and_similarity(engine, tested)

    def write() -> None:
        folder = Path(config.output_dir)
        write_predictions(
            folder / PREDICTIONS, tested, setup.data.test, setup.task, built.gate_names
        )
        record_outcome(
            folder,
            step=fitted.state.step,
            config=config,
            results=results,
            gates=built.gate_names,
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
