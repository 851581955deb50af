from __future__ import annotations

import pytest

from pemt.ops import select
from tests.ops.emulated import cuda_on_host

IMPLEMENTATIONS = ("reference", "packed", "cpu", "cuda on the host")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that runs here, forced for the whole test."""
    if request.param == "cuda on the host":
        monkeypatch.setitem(select.ANY_DEVICE, request.param, cuda_on_host())
    monkeypatch.setenv("PEMT_OPS", request.param)
    return request.param
