"""The emulation finds nothing in the CUDA sources as they are, and each fault that is planted into them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pemt.ops.library import CSRC
from tests.ops.planted_faults import FAULTS, compiler_sees, emulation_sees, expected, main


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    return expected(tmp_path_factory.mktemp("truth"))


def test_there_is_nothing_to_find(truth: str, tmp_path: Path) -> None:
    assert emulation_sees(CSRC, tmp_path, truth) is None


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_bounds_and_the_devices_header_are_as_they_should_be(tmp_path: Path) -> None:
    assert compiler_sees(CSRC, tmp_path) is None


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_every_planted_fault_is_noticed() -> None:
    assert len(FAULTS) == 23
    assert main([]) == 0
