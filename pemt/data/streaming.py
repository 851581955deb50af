"""Training data larger than memory: read while it is trained on, bucketed within a buffer, resumable.

Every rank reads the whole stream and takes its share of each buffer, so all have equally many batches
whatever the number of ranks, and no rank has to know of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from pemt.data.batching import TrainBatches
from pemt.data.encoding import Encoder
from pemt.data.errors import DataError
from pemt.data.examples import UNLABELLED, DataLocation
from pemt.data.vocabulary import FLAGS

Row = dict[str, Any]
# More buffers than an epoch has: keeps the numbers of two epochs' buffers apart.
EPOCH = 2**32


class TrainStream:
    """A training set that is read anew in every epoch, in the order of its files.

    Args:
        location: where the rows are, as for a set that is loaded whole.
        encoder: adds token ids and `length` to examples, and counts what was cut or cannot be written.
        skip_bad_rows: leave malformed rows out instead of stopping at the first.
    """

    def __init__(self, location: DataLocation, encoder: Encoder, *, skip_bad_rows: bool) -> None:
        self.stats = encoder.stats("train")
        self.task = location.task
        self.dataset = location.stream()
        self.bad_rows: list[str] = []  # those left out, each with its place
        self._encode = encoder.of_batches(every_answer=self.task.train_on_every_answer)
        self._skip_bad_rows = skip_bad_rows
        self._held_out = 0
        self._held_groups: frozenset[str] = frozenset()

    def well_formed(self) -> Iterator[Row]:
        """Labelled, well-formed examples from where the data set stands.

        Raises:
            DataError: the first malformed row, unless they are to be left out.
        """
        for row in self.dataset:
            problem = row.pop("problem")
            row.pop("is_class_id")
            if not problem:
                yield row
            elif problem.endswith(f": {UNLABELLED}"):
                continue
            elif self._skip_bad_rows:
                self.bad_rows.append(problem)
            else:
                raise DataError(
                    f"{problem}; mend the file, or leave such rows out with --skip_bad_rows"
                )

    def hold_out(self, rows: Sequence[Row]) -> None:
        """Leave the stream's first rows, and whatever belongs to their groups, to validation."""
        self._held_out = len(rows)
        self._held_groups = frozenset(row["group"] for row in rows if row["group"])

    def to_train_on(self, *, at_start: bool) -> Iterator[Row]:
        """The examples behind those held out, from where the data set stands.

        Raises:
            DataError: as `well_formed`.
        """
        rows = islice(self.well_formed(), self._held_out if at_start else 0, None)
        return (row for row in rows if row["group"] not in self._held_groups)

    def encoded(self, rows: list[Row]) -> list[Row]:
        """Rows with token ids; one for each accepted answer where a task trains on all."""
        columns = self._encode({name: [row[name] for row in rows] for name in rows[0]})
        self.stats.add(columns)
        for name in (*FLAGS, "target_length"):
            del columns[name]
        every = zip(*columns.values(), strict=True)
        return [dict(zip(columns, values, strict=True)) for values in every]


class StreamBatches:
    """Training batches of one rank from a stream: `TrainBatches` of one buffer after the other.

    A buffer's batches depend on (seed, epoch, number of the buffer) and its examples alone.

    Args:
        stream: the training set.
        buffer_size: examples that are put in order of length together, rounded down to whole steps.
        position: where to resume, as `position` gave it; default: at the start.
        division: batch_size, accumulation, world_size, rank and seed, as for `TrainBatches`.
    """

    steps_per_epoch = None  # nobody knows how long an epoch is

    def __init__(
        self,
        stream: TrainStream,
        *,
        buffer_size: int,
        position: dict[str, Any] | None = None,
        **division: int,
    ) -> None:
        self._stream, self._division = stream, division
        of_a_step = division["batch_size"] * division["accumulation"] * division["world_size"]
        self._buffer_size = max(1, buffer_size // of_a_step) * of_a_step
        self._has_told = False
        # `done`: steps of this buffer; `state`: the data set's where the buffer begins, None at an epoch's start.
        self._at = position or {"epoch": 0, "buffer": 0, "done": 0, "state": None}

    def position(self) -> dict[str, Any]:
        """What is needed to resume after the step that was given last, as JSON."""
        return dict(self._at)

    def epochs_at(self, step: int) -> float:
        """Whole passes done."""
        return float(self._at["epoch"])

    def notes(self, *, at_end: bool = True) -> list[str]:
        """What was left out or cut, in a line each: at the end all of it, before that once, when it is first seen."""
        found = self._stream.stats.notes()
        if not at_end:
            is_new = bool(found) and not self._has_told
            self._has_told = self._has_told or is_new
            return [f"{line} (so far; counted again at the end)" for line in found if is_new]
        if bad := list(dict.fromkeys(self._stream.bad_rows)):
            left_out = f"left out {len(bad)} malformed rows, first {bad[0]}"
            found.insert(0, f"{self._stream.task.name}, train: {left_out}")
        return found

    def steps(self, start: int, end: int) -> Iterator[list[list[Row]]]:
        """This rank's micro-batches of rows, a list per step, from the position on."""
        every_epoch = chain.from_iterable(iter(self._epoch, None))
        return islice(every_epoch, end - start)

    def _epoch(self) -> Iterator[list[list[Row]]]:
        """What is left of the epoch, and on to the next one."""
        stream, at = self._stream, self._at
        stream.dataset.set_epoch(at["epoch"])
        if at["state"] is not None:
            stream.dataset.load_state_dict(at["state"])
        examples = stream.to_train_on(at_start=at["state"] is None)
        while rows := list(islice(examples, self._buffer_size)):
            yield from self._buffer(rows)
            at.update(buffer=at["buffer"] + 1, done=0, state=stream.dataset.state_dict())
        if at["buffer"] == 0:
            raise DataError(f"task {stream.task.name}: the stream has nothing to train on")
        at.update(epoch=at["epoch"] + 1, buffer=0, done=0, state=None)

    def _buffer(self, rows: list[Row]) -> Iterator[list[list[Row]]]:
        at, encoded = self._at, self._stream.encoded(rows)
        batches = TrainBatches([row["length"] for row in encoded], **self._division)
        for micro_batches in batches.epoch(at["epoch"] * EPOCH + at["buffer"], at["done"]):
            at["done"] += 1
            yield [[encoded[i] for i in indices] for indices in micro_batches]
