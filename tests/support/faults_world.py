"""One small world for all faults, and the run that nothing happens to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.jobs import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tests.support.jobs import World  # torch, which pytest-xdist's own process does without

    return World.make(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def undisturbed(world: World) -> Path:
    """A run of two ranks to its end."""
    world.start("undisturbed").finish()
    return world.folder / "undisturbed"
