from __future__ import annotations

import pytest

IMPLEMENTATIONS = ("reference", "packed", "cpu")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that runs here, forced for the whole test."""
    monkeypatch.setenv("PEMT_OPS", request.param)
    return request.param
