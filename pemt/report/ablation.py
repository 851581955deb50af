"""Which source helped: runs that differ in one source alone, beside each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import mean

from pemt.config import flatten
from pemt.report.record import RunRecord

SCORE = "test_average_metrics"
PLACES = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir")  # two runs differ in
# What runs of one comparison may differ in: where they are, and which experts they mix.
FREE = (*PLACES, "source_tasks", "mixture.top_sources")


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """One source's part in the score, by runs with and without it.

    Args:
        task: the target; source: what is left out.
        score, without: mean scores, in percent, of the runs with it and of those without it.
        pairs: of runs that are alike otherwise, seed included.
    """

    task: str
    source: str
    score: float
    without: float
    pairs: int


def left_out(records: Sequence[RunRecord]) -> list[LeaveOneOut]:
    """What every source adds where there are finished runs with and without it, the most helpful first."""
    scored = [record for record in records if SCORE in record.results and record.sources]
    found = defaultdict(list)
    for one, other in permutations(scored, 2):
        missing = set(one.sources) - set(other.sources)
        if len(missing) == 1 and set(other.sources) < set(one.sources) and _alike(one, other):
            found[one.task, missing.pop()].append((one.results[SCORE], other.results[SCORE]))
    parts = [
        LeaveOneOut(
            task=task,
            source=source,
            score=mean(score for score, _ in pairs),
            without=mean(without for _, without in pairs),
            pairs=len(pairs),
        )
        for (task, source), pairs in found.items()
    ]
    return sorted(parts, key=lambda part: part.without - part.score)


def _alike(one: RunRecord, other: RunRecord) -> bool:
    ours, theirs = (
        {key: value for key, value in flatten(record.config).items() if key not in FREE}
        for record in (one, other)
    )
    return ours == theirs
