"""The two stages: what each builds before training, and what it leaves behind.

The loop itself, the same for both, is in `loop.py`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.bank import entry_folder, write_entry
from pemt.checkpoint import (
    PREDICTIONS,
    RESULTS,
    Config,
    check_lock,
    check_run_folder,
    finished_results,
    resolve_config,
)
from pemt.config import AdaptConfig, RunConfig, SourceConfig
from pemt.data import load_task_data
from pemt.engine import Engine
from pemt.model import PemtT5, base_shape, fetch_base, load_base, precision_warning
from pemt.monitor import quiet_libraries, record_outcome
from pemt.run.build import Built, build_model, build_ops
from pemt.run.early import check_base_place, check_method
from pemt.run.evaluate import Evaluation, evaluate
from pemt.run.loop import Fitted, Setup, fit, mixture_seen
from pemt.run.results import results_block, results_of, write_predictions, write_results
from pemt.run.session import Session
from pemt.tasks import get_task

_LOOKING, _BUILDING = "looking at the run's folder", "building the model"


def run_source(config: SourceConfig) -> Path:
    """Stage 1: train one source task's expert and prompt, and put them into the bank (all ranks call).

    Returns:
        The bank entry's folder.

    Raises:
        PemtError: anything the user can mend; raised before anything is written.
    """
    # refuses a name now, not after training
    entry = entry_folder(config.bank_dir, config.task_name)
    config, engine = begin(config)
    if engine.on_rank0(lambda: finished_results(config) is not None and entry.exists(), _LOOKING):
        _say_finished(config)
        return entry
    setup = set_up(config, engine)
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
    config, engine = begin(config)
    results = engine.on_rank0(lambda: finished_results(config), _LOOKING)
    if results is not None:
        _say_finished(config)
        return results
    check_method(config)
    setup = set_up(config, engine)
    with engine.together(_BUILDING):
        built = build_model(
            config,
            base=setup.base,
            tokenizer=setup.tokenizer,
            description=config.description or setup.task.description,
        )
    if len(built.source_names) == 1 and engine.is_main:
        print(
            f"pemt: {built.source_names[0]} is the only expert: its gate is 1 everywhere, with nothing to choose from",
            file=sys.stderr,
            flush=True,
        )
    with Session(config, engine) as session:
        fitted, tested = _fit_and_test(config, setup, built, session)
        results = _report(config, setup, built, fitted, tested)
    engine.release()
    return results


def begin(config: Config) -> tuple[Config, Engine]:
    """The configuration that rank 0 finds the run to go on with, and the engine for it (all ranks call).

    The others look too, since there is no engine without a configuration; but a network disk may show
    them an older folder than rank 0 sees.
    """
    own = resolve_config(config)
    engine = Engine(own)
    decided: Config = engine.broadcast_object(engine.config)
    return decided, engine if decided == engine.config else Engine(decided)


def set_up(config: RunConfig, engine: Engine) -> Setup:
    """Check and load everything a run reads; nothing is written (all ranks call)."""
    quiet_libraries(engine.is_main)
    engine.on_rank0(lambda: check_run_folder(config), _LOOKING)
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
    return Setup(engine=engine, task=task, tokenizer=tokenizer, base=base, data=data)


def _say_finished(config: RunConfig) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{config.output_dir}: this run is finished; give --overwrite_output_dir true to train it again",
            flush=True,
        )


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
