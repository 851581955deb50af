"""What there is to see in a run: where sources act, what is confused, best and worst, what it cost.

Shapes: C classes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from statistics import mean, median
from typing import Any

from pemt.monitor import mean_by_source
from pemt.report.record import RunRecord

MOST_CLASSES = 20
MOST_SOURCES = 12  # columns of a table of gates
MOST_WEIGHTS = 6  # of an example's gates
EXAMPLES = 5
OTHER = "(another answer)"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A table of numbers in [0, 1] with names on both sides; None where there is nothing."""

    title: str
    rows: list[str]
    columns: list[str]
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """What one source did for a run.

    Args:
        mean_gate: over all test examples and the sites that have it; of a run without results, over its last
            logged steps.
        sites: how many have it; leads_sites: in how many of them its mean gate is the largest.
        similarity: cosine of the target's mean prompt with its own, at the last validation.
        leads: in how many test examples its mean gate is the largest.
        score: what these score, in percent; None where no single example has a score.
    """

    name: str
    mean_gate: float
    sites: int
    leads_sites: int
    similarity: float | None
    leads: int
    score: float | None


def gate_matrices(record: RunRecord) -> list[Matrix]:
    """Mean gates, a matrix a stack and kind of site: layers × `columns_of`."""
    columns = columns_of(record)
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for site, weights in record.gates.items():
        stack, layer, *kind = site.split("/")
        kinds.setdefault("/".join((stack, *kind)), {})[layer] = weights
    return [
        Matrix(
            title=title,
            rows=list(layers),
            columns=list(columns),
            values=[
                [_summed(each, names) for names in columns.values()] for each in layers.values()
            ],
        )
        for title, layers in kinds.items()
    ]


def columns_of(record: RunRecord) -> dict[str, list[str]]:
    """A column for each source; of more than MOST_SOURCES one for each with a large mean gate, and one for the rest."""
    names = record.sources
    if len(names) <= MOST_SOURCES:
        return {name: [name] for name in names}
    means = mean_by_source(record.gates)
    ranked = sorted(names, key=lambda name: -means[name])
    kept, rest = set(ranked[: MOST_SOURCES - 1]), ranked[MOST_SOURCES - 1 :]
    return {name: [name] for name in names if name in kept} | {others(len(rest)): rest}


def others(count: int) -> str:
    """What stands for the sources that are not shown."""
    return f"({count} others)"


def largest(weights: Mapping[str, float]) -> dict[str, float]:
    """An example's gates; of more than MOST_WEIGHTS the largest, and the sum of the rest."""
    if len(weights) <= MOST_WEIGHTS:
        return dict(weights)
    ranked = sorted(weights, key=lambda name: -weights[name])
    kept, rest = ranked[: MOST_WEIGHTS - 1], ranked[MOST_WEIGHTS - 1 :]
    return {name: weights[name] for name in kept} | {
        others(len(rest)): sum(weights[name] for name in rest)
    }


def _summed(weights: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The weight of these sources together; None where none of them is there."""
    found = [weights[name] for name in names if name in weights]
    return sum(found) if found else None


def source_uses(record: RunRecord) -> list[SourceUse]:
    """Which source helped where, the most used first."""
    gates = record.gates
    means = mean_by_source(gates)
    led = defaultdict(list)
    for line in record.predictions:
        if line.get("gates"):
            led[max(line["gates"], key=line["gates"].get)].append(line)
    found = []
    for name in record.sources:
        scores = [score for line in led[name] if (score := score_of(line)) is not None]
        cosines = record.series(f"prompt_similarity/{name}")[1]
        found.append(
            SourceUse(
                name=name,
                mean_gate=means[name],
                sites=sum(name in each for each in gates.values()),
                leads_sites=sum(each.get(name) == max(each.values()) for each in gates.values()),
                similarity=cosines[-1] if cosines else None,
                leads=len(led[name]),
                score=mean(scores) if scores else None,
            )
        )
    return sorted(found, key=lambda use: -use.mean_gate)


def gates_by_class(record: RunRecord) -> Matrix | None:
    """The mean gates, by `columns_of`, over the test examples of each class; None without classes or gates."""
    classes = classes_of(record)
    with_gates = [line for line in record.predictions if line.get("gates")]
    if not classes or not with_gates:
        return None
    columns = columns_of(record)
    values = [
        [
            mean(
                _summed(line["gates"], sources) or 0.0
                for line in with_gates
                if line["target"] == name
            )
            for sources in columns.values()
        ]
        for name in classes
    ]
    return Matrix(title="class", rows=classes, columns=list(columns), values=values)


def classes_of(record: RunRecord) -> list[str]:
    """The targets, where they are few and each example is right or wrong; else none."""
    targets = Counter(str(line["target"]) for line in record.predictions)
    decided = all("accuracy" in (line.get("scores") or {}) for line in record.predictions)
    return sorted(targets) if decided and 0 < len(targets) <= MOST_CLASSES else []


def confusion(record: RunRecord) -> tuple[list[str], list[str], list[list[int]]] | None:
    """Counts of gold class (rows) and predicted class (columns); None where there are no classes."""
    classes = classes_of(record)
    if not classes:
        return None
    pairs = Counter(
        (
            line["target"],
            prediction if (prediction := str(line["prediction"]).strip()) in classes else OTHER,
        )
        for line in record.predictions
    )
    columns = classes + ([OTHER] if any(predicted == OTHER for _, predicted in pairs) else [])
    return classes, columns, [[pairs[gold, predicted] for predicted in columns] for gold in classes]


def score_of(line: dict[str, Any]) -> float | None:
    """What an example scores alone, 0 to 100; of a regression how near it comes, 0 at best."""
    scores = line.get("scores") or {}
    if scores:
        return mean(float(value) for value in scores.values())
    try:
        return -abs(float(line["prediction"]) - float(line["target"]))
    except ValueError:
        return None


def worst_and_best(record: RunRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A few examples of each, of as many kinds as there are: of one confusion, of one class."""
    scored = [(score, line) for line in record.predictions if (score := score_of(line)) is not None]
    if not scored:
        return [], []
    perfect = 100 if any(line.get("scores") for _, line in scored) else 0
    highest, lowest = max(score for score, _ in scored), min(score for score, _ in scored)
    # Where all are equally wrong, none is the best.
    bar = highest if highest > lowest or highest == perfect else perfect
    wrong = [line for score, line in sorted(scored, key=lambda pair: pair[0]) if score < bar]
    right = [line for score, line in scored if score >= bar]
    return (
        _of_every_kind(wrong, lambda line: (line["target"], line["prediction"])),
        _of_every_kind(right, lambda line: line["target"]),
    )


def _of_every_kind(
    lines: Iterable[dict[str, Any]], kind: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """Some lines, in turn from every kind, in the order in which the kinds appear."""
    kinds: dict[object, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        kinds[kind(line)].append(line)
    in_turn = chain.from_iterable(zip_longest(*kinds.values()))
    return [line for line in in_turn if line is not None][:EXAMPLES]


def costs(record: RunRecord) -> dict[str, str]:
    """Time, throughput, memory and size, as words; what is not known is left out."""
    steps = [line["step"] for line in record.log]
    seconds = max((float(line.get("elapsed", 0)) for line in record.log), default=0.0)
    found: dict[str, str | None] = {
        "time to train": duration(seconds) if seconds else None,
        "time to test": duration(record.results["test_runtime"]) if record.results else None,
        "steps": f"{max(steps):,}" if steps else None,
        "tokens per second": _over_steps(record, "train/tokens_per_second", median, "{:,.0f}"),
        "samples per second": _over_steps(record, "train/samples_per_second", median, "{:,.1f}"),
        "padding": _over_steps(record, "train/padding_waste", median, "{:.1%}"),
        "peak memory": _over_steps(record, "memory/peak_rss_gb", max, "{:.2f} GB"),
        "peak GPU memory": _over_steps(record, "memory/peak_cuda_gb", max, "{:.2f} GB"),
        "trained parameters": None if record.trained is None else f"{record.trained:,}",
        "checkpoint": None
        if record.checkpoint_bytes is None
        else f"{record.checkpoint_bytes / 1e6:,.1f} MB",
    }
    return {name: value for name, value in found.items() if value is not None}


def _over_steps(
    record: RunRecord, tag: str, one_of: Callable[[list[float]], float], form: str
) -> str | None:
    values = record.series(tag)[1]
    return form.format(one_of(values)) if values else None


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
