"""A run's TensorBoard folder: scalars, pictures, texts, layout, the outcome beside the configuration.

Shapes: N examples, L sites (the encoder's first), K sources, M = 1 + K prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pemt.config import TENSORBOARD, RunConfig
from pemt.monitor.entropy import entropy_NL
from pemt.monitor.gates import STACKS, GateNames
from pemt.monitor.hparams import hparams_summaries
from pemt.monitor.layout import layout
from pemt.monitor.log_file import TENSORBOARD_FOLDER
from pemt.monitor.progress import progress_logger

DRAWING_SHARE = 0.01  # of a run's time, at most
COMPARED = ("test/average_metrics", "test/loss")


class TensorBoardWriter:
    """Writes one run's TensorBoard (rank 0 makes one), without what an earlier attempt logged from `purge_step` on."""

    def __init__(self, folder: Path, *, gates: GateNames, purge_step: int | None = None) -> None:
        self._gates = gates
        wait_for_the_next_second(folder)
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._started = time.monotonic()
        self._drawing, self._last_drawing = 0.0, 0.0

    def log_config(self, task: str, texts: Mapping[str, str]) -> None:
        """Lay out the page of custom scalars and write Markdown texts by tag."""
        self._writer.add_custom_scalars(layout(task, self._gates))
        for tag, text in texts.items():
            self._writer.add_text(tag, text)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Values under flat tags: a dict as one value would open a run for each of its keys."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def log_gates(
        self, step: int, gates_NLK: Tensor, similarity_MM: Tensor, *, part: str, title: str
    ) -> None:
        """Gate entropy as histograms, mean gates and prompt similarity as numbers and heat maps; see `Monitor`."""
        for stack, entropy_Nl in self._gates.by_stack(
            entropy_NL(gates_NLK, self._gates), dim=1
        ).items():
            self._writer.add_histogram(f"gate_entropy_{part}/{stack}", entropy_Nl, step)
        began = time.monotonic()
        if self._drawing + self._last_drawing > DRAWING_SHARE * (began - self._started):
            return  # the first, before which none has taken time, is always drawn
        from pemt.monitor import figures

        named = self._gates.by_site(gates_NLK.mean(dim=0))
        for stack in STACKS:
            of_stack = {site: named[site] for site in named if site.startswith(f"{stack}/")}
            if of_stack:
                pixels = figures.gate_map(
                    of_stack, title=f"{stack}, {title}", sources=self._gates.sources
                )
                self._writer.add_image(f"gates/{stack}_{part}", pixels, step, dataformats="HWC")
        prompts = ["target", *self._gates.sources]
        pixels = figures.similarity_map(similarity_MM.numpy(), names=prompts, title=title)
        self._writer.add_image(f"prompts/{part}", pixels, step, dataformats="HWC")
        self._last_drawing = time.monotonic() - began
        self._drawing += self._last_drawing

    def log_outcome(self, step: int, config: RunConfig, results: Mapping[str, Any]) -> None:
        """The final report's numbers as scalars, and beside the configuration in the table of runs."""
        for tag, value in test_scalars(results).items():
            self._writer.add_scalar(tag, value, step)
        file: Any = self._writer.file_writer
        for summary in hparams_summaries(config, COMPARED):
            file.add_summary(summary)

    def close(self) -> None:
        """Write what is still held back, and end the file."""
        self._writer.close()


def test_scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """The test set's numbers by tag: `test/<metric>`."""
    return {
        f"test/{name.removeprefix('test_')}": value
        for name, value in results.items()
        if name.startswith("test_")
    }


def wait_for_the_next_second(folder: Path) -> None:
    """Wait until no event file there was begun in this second.

    Files are read in the order of their names: the second, then host, process and a number without
    leading zeros. Two of one second could change places, and old values would hide new ones.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


def record_outcome(
    output_dir: Path,
    *,
    step: int,
    config: RunConfig,
    results: Mapping[str, Any],
    gates: GateNames,
    mixture: tuple[Tensor, Tensor] | None,
    trackers: Sequence[Any] = (),
) -> None:
    """Add a finished run's outcome to its TensorBoard and trackers, and close these (rank 0 calls).

    Args:
        output_dir: the run's folder.
        step: its last step.
        results: what all_results.json holds.
        gates: the names behind the gates' axes.
        mixture: of the test set, gates [N,L,K] and prompt similarity [M,M]; None without gates.
        trackers: open ones (`pemt.engine.open_trackers`).
    """
    for tracker in trackers:
        try:
            tracker.log(test_scalars(results), step=step)
            tracker.finish()
        except Exception as error:  # noqa: BLE001  each has its own; all_results.json tells the same
            progress_logger().warning(f"{tracker.name}: the outcome is missing: {error}")
    if TENSORBOARD not in config.report_to:
        return
    folder = output_dir / TENSORBOARD_FOLDER
    try:
        board = TensorBoardWriter(folder, gates=gates)
        if mixture is not None:
            title = f"{config.task_name}, test"
            board.log_gates(step, *mixture, part="test", title=title)
        board.log_outcome(step, config, results)
        board.close()
    except OSError as error:  # all_results.json, which is written next, tells the same
        progress_logger().warning(f"{folder}: the outcome is missing: {error.strerror or error}")
