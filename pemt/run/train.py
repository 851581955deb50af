"""The two stages: what each builds before training, and what it leaves behind.

The loop itself, the same for both, is in `loop.py`.
"""

from __future__ import annotations

import sys
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
from pemt.config import AdaptConfig, RunConfig, SourceConfig
from pemt.data import load_task_data
from pemt.engine import Engine, Job
from pemt.model import PemtT5, base_shape, fetch_base, load_base, precision_warning
from pemt.monitor import progress_logger, quiet_libraries, record_outcome
from pemt.run.build import Built, build_model, build_ops
from pemt.run.early import check_base_place, check_method
from pemt.run.evaluate import Evaluation, evaluate
from pemt.run.loop import Fitted, fit, mixture_seen
from pemt.run.prepare import Setup
from pemt.run.results import results_block, results_of, write_predictions, write_results
from pemt.run.session import Session
from pemt.tasks import get_task

_BUILDING = "building the model"


def run_source(config: SourceConfig) -> Path:
    """Stage 1: train one source task's expert and prompt, and put them into the bank (all ranks call).

    Returns:
        The bank entry's folder.

    Raises:
        PemtError: anything the user can mend; raised before anything is written.
    """
    # refuses a name now, not after training
    entry = entry_folder(config.bank_dir, config.task_name)
    start = begin(config, product=entry)
    if isinstance(start, Finished):
        return entry
    config, engine = _with_engine(start)
    setup = set_up(config, engine, start)
    task, base = setup.task, setup.base
    shape = base_shape(base.config)
    description = config.description or task.description
    with engine.together(_BUILDING):
        built = build_model(config, base=base, tokenizer=setup.tokenizer, description=description)
    with Session(config, engine) as session:
        fitted, tested = _fit_and_test(config, setup, built, session)
        model = built.model
        assert isinstance(model, PemtT5)
        engine.on_rank0(
            lambda: write_entry(
                config.bank_dir,
                model.export_expert(task.name, state=fitted.weights),
                base={"name": config.model_name_or_path, **shape},
                description=description,
                metrics=tested.metrics,
                dtype="float32",
            ),
            f"writing {entry}",
        )
        if engine.is_main:
            print(f"{task.name} is in the bank: {entry}", flush=True)
        # Whoever finds the results takes the run for finished: the entry is there by then.
        _report(config, setup, built, fitted, tested)
    engine.release()
    return entry


def run_adapt(config: AdaptConfig) -> dict[str, Any]:
    """Stage 2: adapt to a target task, over a bank of frozen experts or by a baseline (all ranks call).

    Returns:
        What `all_results.json` holds.

    Raises:
        PemtError: anything the user can mend; raised before anything is written.
    """
    start = begin(config)
    if isinstance(start, Finished):
        return start.results
    config, engine = _with_engine(start)
    check_method(config)
    setup = set_up(config, engine, start)
    with engine.together(_BUILDING):
        built = build_model(
            config,
            base=setup.base,
            tokenizer=setup.tokenizer,
            description=config.description or setup.task.description,
        )
    for note in built.notes() if engine.is_main else ():
        print(f"pemt: {note}", file=sys.stderr, flush=True)
    with Session(config, engine) as session:
        fitted, tested = _fit_and_test(config, setup, built, session)
        results = _report(config, setup, built, fitted, tested)
    engine.release()
    return results


def begin(
    config: Config, product: Path | None = None
) -> Fresh[Config] | Resume[Config] | Finished[Config]:
    """What `resolve_run` decides on rank 0, for all ranks; and the terminal is told (all ranks call)."""
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
            f"{config.output_dir}: this run is finished; give --overwrite_output_dir true to train it again",
            flush=True,
        )
    return start


def _with_engine(start: Fresh[Config] | Resume[Config]) -> tuple[Config, Engine]:
    """The run's engine, and its configuration with the precision that the devices have."""
    engine = Engine(start.config)
    return replace(start.config, bf16=engine.config.bf16), engine


def set_up(config: RunConfig, engine: Engine, start: Fresh[Any] | Resume[Any]) -> Setup:
    """Check and load everything a run reads; nothing is written (all ranks call)."""
    quiet_libraries(engine.is_main)
    engine.on_rank0(
        lambda: check_lock(Path(config.output_dir)),
        f"watching for another run in {config.output_dir}",
    )
    engine.on_rank0(lambda: check_base_place(config), f"looking for {config.model_name_or_path}")
    task = get_task(config.task_name, config.task_file)
    build_ops(config, engine)
    with engine.local_first(f"fetching {config.model_name_or_path}"):
        fetch_base(config)
    with engine.together(f"reading {config.model_name_or_path}"):
        base, tokenizer = load_base(config, lazy=True)
    if (warning := precision_warning(config, base)) and engine.is_main:
        print(f"pemt: {warning}", file=sys.stderr, flush=True)
    with engine.local_first(f"preparing the examples of {task.name}"):
        data = load_task_data(task, config, tokenizer)
    if data.is_measured:
        task = replace(task, max_target_length=data.max_target_length)
    engine.seed(config.seed, per_rank=False)
    return Setup(engine=engine, start=start, task=task, tokenizer=tokenizer, base=base, data=data)


def _fit_and_test(
    config: RunConfig, setup: Setup, built: Built, session: Session
) -> tuple[Fitted, Evaluation]:
    """Train, and score the best weights on the test set (all ranks call)."""
    engine = setup.engine
    session.check()  # it may have been told to stop before it began
    fitted = fit(config, setup, built, session)
    engine.trained.overwrite_weights(fitted.weights)
    tested = evaluate(
        engine,
        setup.data.test,
        task=setup.task,
        tokenizer=setup.tokenizer,
        config=config,
        description="testing",
        on_batch_end=session.check,
    )
    return fitted, tested


def _report(
    config: RunConfig, setup: Setup, built: Built, fitted: Fitted, tested: Evaluation
) -> dict[str, Any]:
    """What `all_results.json` holds; rank 0 writes it, and what goes with it."""
    engine = setup.engine
    results = results_of(
        tested,
        progress=fitted.progress,
        epoch=fitted.epoch,
        gates=built.gate_names,
        data=setup.data,
    )
    mixture = mixture_seen(engine, tested)

    def write() -> None:
        folder = Path(config.output_dir)
        write_predictions(
            folder / PREDICTIONS, tested, setup.data.test, setup.task, built.gate_names
        )
        record_outcome(
            folder,
            step=fitted.progress.step,
            config=config,
            results=results,
            gates=built.gate_names,
            mixture=mixture,
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
