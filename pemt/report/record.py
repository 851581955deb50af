"""What a run has left in its folder: configuration, log, results, predictions, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemt.checkpoint import CONFIG, PREDICTIONS, RESULTS, STATUS, checkpoint_folders, trained_count
from pemt.config import PemtError, read_json_object, read_yaml_mapping
from pemt.monitor import LOG_FILE, NamedGates, gates_in, read_log


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder has it; a run that is not finished has no results and no predictions.

    Args:
        name: the folder's, long enough to tell it from the others.
        config: the configuration's fields.
        state: what status.json says became of it; empty without one.
        log: the lines of log.jsonl.
        results: what all_results.json holds; empty without one.
        predictions: the lines of predictions.jsonl, an example of the test set each.
        checkpoint_bytes: size of the best checkpoint; None where there is none.
        trained: number of trained parameters; None where there is no checkpoint.
    """

    name: str
    config: dict[str, Any]
    state: str
    log: list[dict[str, Any]]
    results: dict[str, Any]
    predictions: list[dict[str, Any]]
    checkpoint_bytes: int | None
    trained: int | None

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.config.get("task_name"))

    @property
    def method(self) -> str:
        """Stage 1 has no choice of method."""
        return str(self.config.get("method", "source"))

    @property
    def sources(self) -> list[str]:
        """Names of the experts, in the gates' order; of a run without results as its log names them."""
        if self.results:
            return [str(name) for name in self.results.get("sources", [])]
        names = (tag.rpartition("/")[2] for tag in self.logged_gates if tag.startswith("gate/"))
        return list(dict.fromkeys(names))

    @property
    def gates(self) -> NamedGates:
        """Mean gates of the test set or, without one, of the last training steps that were logged."""
        if self.results:
            return gates_in(self.results)
        gates: NamedGates = {}
        for tag, value in self.logged_gates.items():
            if tag.startswith("gate/"):
                site, _, source = tag.removeprefix("gate/").rpartition("/")
                gates.setdefault(site, {})[source] = float(value)
        return gates

    @property
    def logged_gates(self) -> dict[str, Any]:
        """The last line of the log with finite gates; empty without one."""
        for line in reversed(self.log):
            gates = [value for tag, value in line.items() if tag.startswith("gate/")]
            if gates and None not in gates:
                return line
        return {}

    def series(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of a tag, where it is logged and finite."""
        found = [(line["step"], line[tag]) for line in self.log if line.get(tag) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders.

    Raises:
        PemtError: a folder holds no run, or a file in it is damaged.
    """
    return [_read(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _read(folder: Path, name: str) -> RunRecord:
    if not (folder / CONFIG).is_file():
        raise PemtError(
            f"{folder}: holds no run ({CONFIG} is missing); give the output_dir of `pemt adapt` or `pemt source`"
        )
    config = read_yaml_mapping(folder / CONFIG)
    results = _json_object(folder / RESULTS)
    checkpoint = _checkpoint(folder, results)
    return RunRecord(
        name=name,
        config=config,
        state=str(_json_object(folder / STATUS).get("state", "")),
        log=read_log(folder / LOG_FILE) if (folder / LOG_FILE).is_file() else [],
        results=results,
        predictions=_predictions(folder / PREDICTIONS),
        checkpoint_bytes=None if checkpoint is None else folder_bytes(checkpoint),
        trained=None if checkpoint is None else trained_count(checkpoint),
    )


def folder_bytes(folder: Path) -> int:
    """What its files take."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _checkpoint(folder: Path, results: dict[str, Any]) -> Path | None:
    """The one that was tested, or the newest."""
    folders = checkpoint_folders(folder)
    named = [each for each in folders if each.name == results.get("best_checkpoint")]
    chosen = named or folders[-1:]
    return chosen[0] if chosen else None


def _json_object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _predictions(path: Path) -> list[dict[str, Any]]:
    """Every line an object with at least an input, a target and a prediction; none where there is no such file."""
    if not path.is_file():
        return []
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                line["input"], line["target"], line["prediction"]
            except (ValueError, TypeError, KeyError) as error:
                raise PemtError(
                    f"{path}, line {number}: no prediction ({type(error).__name__}: {error}); "
                    "`pemt evaluate` does not write this file: train the run again, or remove it"
                ) from None
            lines.append(line)
    return lines
