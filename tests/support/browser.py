"""A headless Chromium for the tests that look at pages, and where it is not to be had, why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright Browser on the machine's own Chromium; CHROMIUM names another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium on PATH, or its path in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not run as root, as CI does; the pages are ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
