"""The folder of a run: whether it may be used, its configuration, its results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import Dataset

from pemt.checkpoint.names import UNUSABLE, checkpoint_folders
from pemt.checkpoint.progress import Progress
from pemt.config import NON_IDENTITY_FIELDS, PemtError, RunConfig, load_yaml
from pemt.monitor import LOG_FILE, TENSORBOARD_FOLDER
from pemt.storage import write_text
from pemt.tasks import Task, example_scores, told_once

if TYPE_CHECKING:  # it would bring the engine along
    from pemt.data import TaskData
    from pemt.run import Evaluation

CONFIG, RESULTS, PREDICTIONS = "config.yaml", "all_results.json", "predictions.jsonl"


class RunFolderError(PemtError):
    """An output folder that already holds a run, or is no folder."""


def check_run_folder(config: RunConfig) -> None:
    """Refuse to write over a run, and to go on with another one than it holds; nothing is touched here.

    Raises:
        RunFolderError: `output_dir` holds a run of another configuration, or this one and going on was
            refused by `resume_from_checkpoint: false`; and overwriting was not asked for.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir: {folder} is a file; give a folder")
    if (
        isinstance(config.resume_from_checkpoint, str)
        and not Path(config.resume_from_checkpoint).is_dir()
    ):
        raise RunFolderError(
            f"resume_from_checkpoint: no folder {config.resume_from_checkpoint}; give a checkpoint-<step> "
            "folder, or `true` for the newest one in output_dir"
        )
    elsewhere = (
        isinstance(config.resume_from_checkpoint, str)
        and Path(config.resume_from_checkpoint).resolve().parent != folder.resolve()
    )
    if elsewhere and holds_run(folder):
        raise RunFolderError(
            f"output_dir: {folder} already holds a run, and {config.resume_from_checkpoint} is a checkpoint "
            "of another; give a new output_dir"
        )
    if not holds_run(folder) or config.overwrite_output_dir or config.resume_from_checkpoint:
        return
    differences = _differences(config, folder)
    if differences or config.resume_from_checkpoint is False:
        raise RunFolderError(
            f"output_dir: {folder} already holds a run{differences}; give --resume_from_checkpoint true to go on "
            "with it all the same, --overwrite_output_dir true to delete it, or another folder"
        )


def resume_target(config: RunConfig) -> bool | str:
    """What to resume: a checkpoint's folder, True for the newest one there may be, False for none."""
    if config.resume_from_checkpoint is None:
        return not config.overwrite_output_dir
    return config.resume_from_checkpoint


def _differences(config: RunConfig, folder: Path) -> str:
    """In which fields the run in this folder is another one, for the error; empty if in none."""
    if not (folder / CONFIG).exists():
        return ""  # the checkpoints tell themselves whose they are
    theirs = begun_config(folder)
    if theirs is None:
        return f", whose {CONFIG} cannot be read"
    ours = _flat(yaml.safe_load(_config_text(config)))
    # A field that was not there when the run began had the default.
    defaults = {each.name: each.default for each in fields(config)}
    theirs = {**{name: defaults.get(name, value) for name, value in ours.items()}, **_flat(theirs)}
    if None in (ours["bf16"], theirs["bf16"]):  # left to the device, which is asked later
        ours["bf16"] = theirs["bf16"]
    found = [
        f"{name} {theirs[name]}, not {value}"
        for name, value in ours.items()
        if name not in NON_IDENTITY_FIELDS and theirs[name] != value
    ]
    return f" with {'; '.join(found)}" if found else ""


def begun_config(folder: Path) -> dict[str, Any] | None:
    """What a run's config.yaml holds, unchecked; None where it cannot be read."""
    try:
        values = load_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def finished_results(config: RunConfig) -> dict[str, Any] | None:
    """What the run that this very configuration describes has left; None if it is not finished.

    Raises:
        RunFolderError: as `check_run_folder`.
    """
    check_run_folder(config)
    path = Path(config.output_dir) / RESULTS
    if config.resume_from_checkpoint or config.overwrite_output_dir or not path.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the checkpoint is still there, and the test is made again
    return results


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / CONFIG).exists() or bool(checkpoint_folders(folder))


def start_run_folder(config: RunConfig) -> None:
    """Make the folder and write the configuration into it (rank 0 calls).

    Raises:
        RunFolderError: it cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        if config.overwrite_output_dir:
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
        write_text(folder / CONFIG, _config_text(config))
    except OSError as error:
        raise RunFolderError(f"output_dir: {folder} cannot be written: {error.strerror}") from None


def _config_text(config: RunConfig) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie in its folder."""
    for path in (
        *(folder / name for name in (CONFIG, LOG_FILE, PREDICTIONS)),
        *folder.glob("*_results.json"),
        *folder.glob("not-finite-*.jsonl"),
    ):
        path.unlink(missing_ok=True)
    unusable = folder.glob(f"{UNUSABLE}checkpoint-*")
    for path in (folder / TENSORBOARD_FOLDER, *checkpoint_folders(folder), *unusable):
        if path.exists():
            shutil.rmtree(path)


def results_of(
    tested: Evaluation,
    *,
    progress: Progress,
    epoch: float,
    source_names: Sequence[str],
    data: TaskData,
) -> dict[str, Any]:
    """The final report under its published names, with the sources that `moe_weight_k` speaks of.

    It also tells what was scored (`split`, `examples`, `split_origin`) and how the checkpoint was chosen.
    """
    first, *others = (name for name in tested.metrics if name != "average_metrics")
    return {
        "epoch": epoch,
        **scores_of(tested, source_names, split="test"),
        "split": "test",
        "examples": len(tested.predictions),
        "split_origin": data.origins["test"],
        "best_checkpoint": f"checkpoint-{progress.step if progress.best_step is None else progress.best_step}",
        "best_validation_average_metrics": progress.best_metric,
        "best_validation_loss": progress.best_loss,
        "checkpoint_metric": "average_metrics" if others else first,
        "checkpoints_validated": progress.validations,
        "validation_examples": len(data.validation),
        "validation_origin": data.origins["validation"],
    }


def scores_of(scored: Evaluation, source_names: Sequence[str], *, split: str) -> dict[str, Any]:
    """An evaluation under the published names, which begin with the split's."""
    scores = {
        **scored.metrics,
        "loss": scored.loss,
        **{f"moe_weight_{k}": weight for k, weight in enumerate(scored.moe_weights())},
        "runtime": scored.runtime,
        "samples_per_second": scored.samples_per_second,
    }
    return {
        **{f"{split}_{name}": value for name, value in scores.items()},
        "sources": list(source_names),
        # per FFN, the encoder's first, the mean gate of each source
        "gates": [] if scored.gates_LK is None else scored.gates_LK.tolist(),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a report as JSON (rank 0 calls).

    Raises:
        RunFolderError: it cannot be written.
    """
    _write(path, json.dumps(results, indent=2) + "\n")


def write_predictions(
    path: Path, scored: Evaluation, dataset: Dataset, task: Task, source_names: Sequence[str]
) -> None:
    """Write what was predicted, a line of JSON for every example, in the data set's order (rank 0 calls).

    A line has `input`, `target`, `references`, `prediction`, `scores` (what the example scores alone, 0 to 100; empty
    for a regression), `gates` (source -> weight, averaged over all FFNs; empty without experts), and `group` where
    examples are scored together.

    Raises:
        RunFolderError: it cannot be written.
    """
    gates_NLK = scored.gates_NLK
    gates = [[]] * len(dataset) if gates_NLK is None else gates_NLK.mean(dim=1).tolist()
    lines = []
    for row, prediction, gates_K in zip(dataset, scored.predictions, gates, strict=True):
        references = list(row["references"])
        line = {
            "input": row["source"],
            "target": row["target"],
            "references": references,
            "prediction": prediction,
            "scores": example_scores(task, prediction, references),
            "gates": {
                name: round(weight, 4) for name, weight in zip(source_names, gates_K, strict=True)
            },
            **({"group": row["group"]} if row["group"] else {}),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    _write(path, "".join(lines))


def scored_text(results: dict[str, Any]) -> str:
    """What was scored: `test: 28 examples, half of ...`."""
    return f"{results['split']}: {results['examples']} examples, {results['split_origin']}"


def chosen_text(results: dict[str, Any]) -> str:
    """Which checkpoint a run's report is about, and how it was chosen."""
    best, validated = results["best_checkpoint"], results["checkpoints_validated"]
    if results["best_validation_average_metrics"] is None:
        return f"{best}: the last one, since none was validated"
    return (
        f"{best}: the best of {'all' if validated is None else validated} validated, by {results['checkpoint_metric']} "
        f"on validation ({results['validation_examples']} examples, {results['validation_origin']}); a tie goes to "
        "the lower loss"
    )


def results_block(results: dict[str, Any], files: Mapping[str, Path]) -> str:
    """The final report as the published code prints it: names and aligned values, and whose weight a weight is.

    Below it what was scored, how the checkpoint was chosen, and where the files lie.

    Args:
        results: what `results_of`, or `pemt evaluate`, gives.
        files: paths by what lies there.
    """
    split = results["split"]
    sources = {f"{split}_moe_weight_{k}": name for k, name in enumerate(results["sources"])}
    prefix = f"{split}_"
    scores = {
        name.removeprefix(prefix): results[name] for name in results if name.startswith(prefix)
    }
    rows = {f"{prefix}{name}": value for name, value in told_once(scores).items()}
    rows = {"epoch": results["epoch"], **rows} if "epoch" in results else rows
    texts = {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in rows.items()
    }
    name_width, value_width = max(map(len, texts)), max(map(len, texts.values()))
    lines = [
        f"  {name:<{name_width}} = {text:>{value_width}}{f'  {sources[name]}' if name in sources else ''}"
        for name, text in texts.items()
    ]
    told = [scored_text(results)]
    if "best_checkpoint" in results:
        told.append(chosen_text(results))
    places = [f"{what}: {path}" for what, path in files.items()]
    return "\n".join([f"***** {split} metrics *****", *lines, *told, *places])


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None
