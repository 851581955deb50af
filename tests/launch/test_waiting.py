"""One rank works for longer than any timeout, or dies at it, while the other waits."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.launch.slow_places import PLACES, SOURCE, TARGET
from tests.support.tiny import make_base, write_task_files

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    for seed, task in enumerate((SOURCE, TARGET)):
        write_task_files(tmp_path / task, seed=seed)
    return tmp_path


def program(launch: Launch, folder: Path, *what: str, check: bool = True) -> tuple[int, str]:
    done = launch(
        *("-m", "tests.launch.slow_places", str(folder), *what),
        zero=2,
        timeout=600,
        check=check,
    )
    return done.returncode, done.output


# Each place is a wait of its own, for one rank or the other.
DOING = {
    "op": "compiling the fused op",
    "pre-training": "saving the state of pre-training",
    "fetching": "fetching {folder}/base",
    "examples": "preparing the examples of tiny-a",
    "digest": "reading the digest of the base model's weights",
    "reading": "reading the model's weights",
    "scoring": "scoring 11 answers",
    "pictures": "drawing gates and prompts",
    "writing": "writing results and pictures",
    "report": "writing the demo's report",
}
FEW = ["op", "examples", "digest", "writing"]


@pytest.mark.parametrize("places", [FEW, pytest.param([*DOING], marks=pytest.mark.soak)], ids=len)
def test_work_longer_than_the_timeout_is_waited_for_wherever_one_rank_does_it(
    launch: Launch, folder: Path, places: list[str]
) -> None:
    assert DOING.keys() == PLACES.keys()
    _, output = program(launch, folder, "slow", *places)
    assert set(re.findall(r"^at (\S+)$", output, flags=re.MULTILINE)) == set(places)
    assert "finished\n" in output
    told = re.findall(r"pemt: rank (\d) waits for rank (\d): (.*), \d+ s so far", output)
    for place in places:
        assert DOING[place].format(folder=folder) in {what for _, _, what in told}
    assert {(waiting, late) for waiting, late, _ in told} == {("0", "1"), ("1", "0")}


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("examples", " while preparing the examples of tiny-a"),  # before the run's own watchdog
        # The others find out by a collective that breaks; the store where rank 0 told what it did is gone.
        ("pre-training", ""),
        pytest.param("scoring", "", marks=pytest.mark.soak),
    ],
)
def test_who_dies_at_it_is_named(launch: Launch, folder: Path, place: str, doing: str) -> None:
    status, output = program(launch, folder, "dies", place, check=False)
    ended = time.time()
    assert status != 0
    (died,) = re.findall(r"^died at ([\d.]+)$", output, flags=re.MULTILINE)
    named = re.findall(r"^pemt: error: (rank .*)$", output, flags=re.MULTILINE)
    assert len(named) == 1, output
    assert re.match(r"rank 0 \(host \S+, process \d+(, after step \d+)?\) has died", named[0])
    assert doing in named[0]
    assert ended - float(died) < 60, "a collective would have waited for half an hour"
