"""What a run says while it trains: to TensorBoard and other trackers, to log.jsonl, to a terminal or a file.

Shapes: N examples, L sites (the encoder's first), K sources, M = 1 + K prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from pemt.config import PemtError, RunConfig
from pemt.monitor.bars import ProgressBar
from pemt.monitor.board import TensorBoardWriter
from pemt.monitor.entropy import mixture_scalars
from pemt.monitor.gates import GateNames
from pemt.monitor.hparams import plain_fields
from pemt.monitor.log_file import LOG_FILE, TENSORBOARD_FOLDER, LogFile
from pemt.monitor.progress import progress_logger
from pemt.monitor.provenance import config_text, environment_text

NO_GATES = GateNames(sources=(), sites={})


@dataclass(eq=False, kw_only=True)
class Monitor:
    """Scalars, pictures and progress of one run; use it in a `with` block.

    Every rank may call every method; on ranks other than the main one nothing is written. A disk that
    is full while the run is under way does not end it: what is lost is reported, once.

    Args:
        output_dir: the run's folder; `tensorboard/` and `log.jsonl` are made in it.
        total_steps: optimizer steps of the whole run.
        initial_step: steps already taken by the run that this one resumes. What was logged after
            that step is dropped, since it will be logged again.
        is_main: whether this rank is the one that writes.
        description: a few words before the bar and before each line.
        gates: the names behind the gates' axes, where the run has gates.
        tensorboard: whether to write `tensorboard/`.
        trackers: others, opened (accelerate's `GeneralTracker`s). They are closed here where the block is left by an
            error; else whoever has opened them does, behind the run's outcome. One that fails ends no training.
    """

    output_dir: Path = field(kw_only=False)
    total_steps: int
    initial_step: int = 0
    is_main: bool
    description: str
    gates: GateNames = NO_GATES
    tensorboard: bool = True
    trackers: Sequence[Any] = ()

    def __post_init__(self) -> None:
        self._refused: set[str] = set()
        self._working_trackers = list(self.trackers)

    def __enter__(self) -> Monitor:
        if self.is_main:
            try:
                self._open()
            except OSError as error:
                raise PemtError(
                    f"output_dir: logs in {self.output_dir} cannot be written: {error.strerror or error}"
                ) from None
        return self

    def _open(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._log = LogFile(self.output_dir / LOG_FILE, initial_step=self.initial_step)
        self._board: TensorBoardWriter | None = None
        if self.tensorboard:
            self._board = TensorBoardWriter(
                self.output_dir / TENSORBOARD_FOLDER,
                gates=self.gates,
                purge_step=self.initial_step + 1,
            )
        self._bar = ProgressBar(
            total_steps=self.total_steps,
            initial_step=self.initial_step,
            description=self.description,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_main:
            self._bar.close()
            self._to_board(lambda board: board.close())
            with self._disk_may_be_full(LOG_FILE):
                self._log.close()
            if kind is not None:
                self._to_trackers(lambda tracker: tracker.finish())

    def _to_board(self, record: Callable[[TensorBoardWriter], None]) -> None:
        """Have TensorBoard record something, where there is one: `report_to` may not name it."""
        if self._board:
            with self._disk_may_be_full(TENSORBOARD_FOLDER):
                record(self._board)

    def _to_trackers(self, record: Callable[[Any], None]) -> None:
        """Have each tracker record something; one that fails, whatever it says, is reported once, then left alone."""
        for tracker in list(self._working_trackers):
            try:
                record(tracker)
            except Exception as error:  # noqa: BLE001  each has its own
                self._working_trackers.remove(tracker)
                what = " ".join(str(error).split()) or type(error).__name__
                self.message(
                    f"{tracker.name}: {what}; training continues, this tracker gets nothing more"
                )

    @contextmanager
    def _disk_may_be_full(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self._refused:
                self._refused.add(name)
                later = (
                    "what is missing follows" if name == LOG_FILE else "this run's curves end here"
                )
                self.message(f"{name}: {error.strerror or error}; training continues, {later}")

    def log_config(self, config: RunConfig, facts: Mapping[str, str]) -> None:
        """Write what the run is: configuration, environment and git state, and lay out TensorBoard.

        Args:
            config: the run's.
            facts: what else to record, such as ranks and device.
        """
        if self.is_main:
            environment = environment_text(facts, folder=Path.cwd())
            texts = {"config": config_text(config), "environment": environment}
            self._to_board(lambda board: board.log_config(config.task_name, texts))
            fields = plain_fields(config) | dict(facts)
            self._to_trackers(lambda tracker: tracker.store_init_configuration(fields))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record values under flat tags such as `train/loss`, in log.jsonl, TensorBoard and all trackers."""
        if self.is_main:
            self._to_trackers(lambda tracker: tracker.log(dict(scalars), step=step))
            self._to_board(lambda board: board.log_scalars(step, scalars))
            with self._disk_may_be_full(LOG_FILE):
                self._log.write(step, scalars)

    def log_mixture(self, step: int, gates_NLK: Tensor, similarity_MM: Tensor) -> None:
        """Record what a validation saw of gates and prompts, as scalars, histograms and heat maps.

        Args:
            gates_NLK: every example's gates.
            similarity_MM: cosines between the mean prompts of the target, first, and the sources.
        """
        if self.is_main:
            self.log(step, mixture_scalars(self.gates, gates_NLK, similarity_MM))
            title = f"{self.description}, step {step}"
            seen = {"part": "validation", "title": title}
            self._to_board(lambda board: board.log_gates(step, gates_NLK, similarity_MM, **seen))

    def advance(self, step: int, *, loss: float, samples_per_second: float) -> None:
        """Move the bar to `step`; where stdout is no terminal, log a plain line instead."""
        if self.is_main:
            with suppress(OSError):  # stdout may be a file on the same disk
                self._bar.advance(step, loss=loss, samples_per_second=samples_per_second)

    def message(self, text: str) -> None:
        """Log a line without tearing the bar."""
        if self.is_main:
            with suppress(OSError):
                progress_logger().info(text)
