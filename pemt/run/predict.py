"""`pemt predict`: what a finished run answers, and how its gates weigh the experts for each input.

From Python:

    predictor = Predictor.load("runs/cb")
    predictor(["premise: It rains. hypothesis: It is wet."])[0].prediction

Shapes: N inputs, B batch, L all FFNs (encoder first), K experts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from tqdm import tqdm

from pemt.config import PemtError, RunConfig
from pemt.data import (
    encode_sources,
    label_ids,
    note_on_inputs,
    read_inputs,
    sources_of,
    unknown,
)
from pemt.engine import Engine
from pemt.monitor import NamedGates, log_on_stderr, progress_logger, quiet_libraries
from pemt.run.evaluate import generate_batch, map_over_ranks, score_labels
from pemt.run.finished import (
    LoadedRun,
    finished_config,
    load_finished,
    load_on_all,
    prepare_finished,
    task_of_run,
)
from pemt.storage import replacing
from pemt.tasks import Task, longest_target

# So many batches a rank are put in order of length together, and written before the next are begun.
BATCHES = 32
DIGITS = 4  # of a gate weight or a probability, in a file


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run answers to one input.

    Args:
        input: the source text, as the task's template makes it.
        prediction: the decoded answer.
        label: what the task calls the class that was answered (its target text where it has no names); None where
            this is no class.
        probabilities: label -> how likely it is among the task's labels, by teacher-forced log-likelihood; None
            where the answer is generated.
        gates: site (`encoder/0` …, `decoder/0/self/q` …) -> source task -> weight, of those there; a row sums to 1.
            Empty without experts.
    """

    input: str
    prediction: str
    label: str | None = None
    probabilities: dict[str, float] | None = None
    gates: dict[str, dict[str, float]]

    def line(self) -> str:
        """One line of jsonl."""
        values = {name: _rounded(each) for name, each in vars(self).items() if each is not None}
        return json.dumps(values, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value


class Predictor:
    """Answers inputs with a finished run's model, on all ranks of this job.

    Args:
        finished: the run; its model is handed to the engine.
        engine: default: one of the run's configuration.
    """

    def __init__(self, finished: LoadedRun, engine: Engine | None = None) -> None:
        self.finished = finished
        self.engine = engine or Engine(finished.config)
        self._warned = False
        prepare_finished(finished, self.engine)

    @classmethod
    def load(cls, run_dir: str | Path, overrides: Sequence[str] = ()) -> Predictor:
        """A run by its folder; `overrides` and errors as for `finished_config` and `load_finished`."""
        return cls(load_finished(run_dir, finished_config(run_dir, overrides)))

    def __call__(
        self,
        inputs: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        *,
        batch_size: int | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        constrain_labels: bool | None = None,
    ) -> list[Prediction]:
        """A prediction for every input, in their order (all ranks call, with the same inputs).

        Args:
            inputs: source texts, or rows with the fields of the task's template; one alone is a list of one.
            batch_size: inputs of a rank's batch; default: per_device_eval_batch_size.
            num_beams, max_new_tokens: of a generated answer; default: as the run was scored.
            constrain_labels: answer with the most likely label, and tell how likely each is; false generates. Default:
                true where the task has labels and neither num_beams nor max_new_tokens is given.

        Raises:
            RowError: a row lacks a field.
            PemtError: constrain_labels is true of a task without labels, or beside num_beams or max_new_tokens.
        """
        generating = num_beams is not None or max_new_tokens is not None
        constrain = _constrains(self.finished.task, constrain_labels, generating=generating)
        config, task = self.finished.config, self.finished.task
        longest = longest_target(task, max_new_tokens or config.max_target_length)
        texts = _texts(task, inputs)
        if not texts:
            return []
        ids, tokenizer = self._encoded(texts), self.finished.tokenizer
        if constrain:
            measure = partial(score_labels, self.engine, labels=label_ids(task, tokenizer))
        else:
            beams = num_beams or config.num_beams
            measure = partial(generate_batch, self.engine, longest=longest, num_beams=beams)
        rows, lengths = [{"input_ids": each} for each in ids], [len(each) for each in ids]
        columns = map_over_ranks(
            self.engine, rows, lengths, tokenizer, measure, batch_size=batch_size
        )
        named: list[NamedGates] = [{} for _ in texts]
        if "gates" in columns:
            named = [self.finished.gate_names.by_site(each) for each in columns["gates"]]
        return [
            Prediction(input=text, **answer, gates=weights)
            for text, answer, weights in zip(
                texts, self._answers(columns, constrain), named, strict=True
            )
        ]

    def _answers(self, columns: dict[str, Tensor], constrain: bool) -> list[dict[str, Any]]:
        """From log-likelihoods [N,C] of labels, or generated ids [N,T]: prediction, label, probabilities."""
        task = self.finished.task
        if not constrain:
            texts = self.finished.tokenizer.batch_decode(
                columns["tokens"], skip_special_tokens=True
            )
            name_of = task.name_of_label
            return [{"prediction": text, "label": name_of.get(text.strip())} for text in texts]
        names = list(task.name_of_label.values())
        return [
            {
                "prediction": task.labels[likely_C.argmax()],
                "label": names[likely_C.argmax()],
                "probabilities": dict(zip(names, likely_C.softmax(dim=0).tolist(), strict=True)),
            }
            for likely_C in columns["log_likelihoods"]
        ]

    def warn_of_cuts(self, texts: Sequence[str]) -> None:
        """Log how many of the inputs are cut, or not known to the vocabulary; calls log it no more."""
        self._encoded(texts)
        self._warned = True

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids; the first call with inputs that are cut or not known logs how many."""
        tokenizer, longest = self.finished.tokenizer, self.finished.config.max_source_length
        ids, cut = encode_sources(list(texts), tokenizer, max_length=longest)
        strange = unknown(ids, tokenizer)
        for flags, problem in (
            (cut, f"are longer than max_source_length, {longest} tokens, and are cut"),
            (strange, "contain pieces unknown to this vocabulary"),
        ):
            if any(flags) and not self._warned and self.engine.is_main:
                first = f"; the first: {texts[flags.index(True)]!r:.60}" if flags is strange else ""
                progress_logger().warning(f"{sum(flags)} of {len(flags)} inputs {problem}{first}")
        self._warned = self._warned or any(cut) or any(strange)
        return ids


def _texts(
    task: Task, inputs: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
) -> list[str]:
    return [
        text
        for each in ([inputs] if isinstance(inputs, str | Mapping) else inputs)
        for text in ([each] if isinstance(each, str) else sources_of(task, each))
    ]


def _constrains(task: Task, asked: bool | None, *, generating: bool) -> bool:
    if asked and not task.labels:
        raise PemtError(
            f"constrain_labels: task {task.name} has no labels; leave it out, and answers are generated"
        )
    if asked and generating:
        raise PemtError(
            "constrain_labels: num_beams and max_new_tokens are for generated answers; leave them out, or give "
            "--constrain_labels false"
        )
    return bool(task.labels) and not generating if asked is None else asked


@log_on_stderr()
def predict_file(
    run_dir: str | Path,
    *,
    input_file: str = "-",
    output_file: str | None = None,
    constrain_labels: bool | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Answer the rows of a file, in their order (all ranks call; rank 0 reads and writes).

    Args:
        run_dir: a finished run.
        input_file: jsonl with the task's fields or `{"input": text}`; `-` is stdin. Read whole and
            checked before anything is predicted.
        output_file: jsonl, written atomically; default: stdout, as it comes.
        constrain_labels: as of `Predictor`.
        overrides: as for `finished_config`.

    Raises:
        PemtError: the run, the input or the output cannot be used.
    """
    config = finished_config(run_dir, overrides)
    engine = Engine(config)
    quiet_libraries(engine.is_main)
    # Rank 0 alone reads: all share one stdin.
    texts = engine.on_rank0(
        lambda: _read(run_dir, config, input_file, output_file), "reading the input"
    )
    predictor = Predictor(load_on_all(run_dir, config, engine), engine)
    engine.on_rank0(lambda: predictor.warn_of_cuts(texts), "measuring the input")
    size = BATCHES * config.per_device_eval_batch_size * engine.world_size
    on_terminal = output_file is None and sys.stdout.isatty()  # a bar would be glued to the answers
    hidden = True if on_terminal or not engine.is_main else None  # None: shown on a terminal alone
    with (
        _opened(output_file if engine.is_main else None) as file,
        tqdm(total=len(texts), desc="predicting", unit="input", disable=hidden) as bar,
    ):
        for start in range(0, len(texts), size):
            predictions = predictor(texts[start : start + size], constrain_labels=constrain_labels)
            engine.on_rank0(partial(_write, file, predictions), "writing predictions")
            bar.update(len(predictions))
    engine.release()


def _write(file: IO[str], predictions: list[Prediction]) -> None:
    file.writelines(f"{each.line()}\n" for each in predictions)
    file.flush()


def _read(
    run_dir: str | Path, config: RunConfig, input_file: str, output_file: str | None
) -> list[str]:
    """The inputs; raises PemtError as well where the output could not be written."""
    folder = Path(output_file or ".").parent
    if not folder.is_dir():
        raise PemtError(f"output_file: there is no folder {folder}; make it first")
    task = task_of_run(run_dir, config)
    texts = read_inputs(task, input_file)
    if note := note_on_inputs(task, input_file):
        progress_logger().info(note)
    return texts


@contextmanager
def _opened(name: str | None) -> Iterator[IO[str]]:
    """stdout, or a file that gets its name when it is complete.

    Raises:
        PemtError: it cannot be written.
    """
    if name is None:
        yield sys.stdout
        return
    path = Path(name)
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise PemtError(f"output_file: {path} cannot be written: {error.strerror}") from None
