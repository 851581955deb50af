"""A real Chromium on a running `tensorboard` over real runs: every page shows what it is to show.

Screenshots lie in pytest's temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pemt.config.schema import ExpertConfig
from pemt.run.train import run_adapt, run_source
from tests.conftest import free_port
from tests.support.browser import chromium
from tests.support.tiny import adapt_config, make_base, source_config, tiny_task, write_task_files

SOURCES, TARGET = ("tiny-page-a", "tiny-page-b"), "tiny-page-target"
BOARD: dict[str, Any] = {"report_to": ["tensorboard"]}
SECONDS = 60_000  # milliseconds, as playwright counts; a busy machine needs some of them

# What the tags and layouts hold is seen in test_board.py.
pytestmark = [pytest.mark.slow, pytest.mark.soak]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def runs(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, and an adapt run over them; made only where there is a browser."""
    folder = tmp_path_factory.mktemp("page")
    base, bank = make_base(folder / "base"), folder / "bank"
    for seed, task in enumerate((*SOURCES, TARGET)):
        tiny_task(task)
        write_task_files(folder / task, seed=seed)
    for task in SOURCES:
        expert, run = ExpertConfig(rank=2), folder / "runs" / task
        run_source(source_config(base, folder / task, run, bank, task, expert=expert, **BOARD))
    run = folder / "runs" / "adapt"
    with pytest.MonkeyPatch.context() as patch:
        # so short a run would have time for the first picture only
        patch.setattr("pemt.monitor.board.DRAWING_SHARE", 1e9)
        fields = {**BOARD, "num_train_epochs": 3}
        run_adapt(adapt_config(base, folder / TARGET, run, bank, TARGET, **fields))
    return folder / "runs"


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """Where a TensorBoard of these runs answers."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    with (runs.parent / "tensorboard.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for_runs(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for_runs(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert server.poll() is None, "tensorboard has ended"
        try:
            with urllib.request.urlopen(f"{address}/data/runs") as answer:
                if b"adapt" in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    pytest.fail("tensorboard shows no runs after a minute")


@pytest.fixture
def open_tab(browser: Any, address: str, tmp_path: Path) -> Iterator[Any]:
    """`open_tab("images", ready="img")`: the page once something is there, its picture taken at the end."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    opened: list[str] = []

    def opens(tab: str, *, ready: str) -> Any:
        page.goto(f"{address}/#{tab}")
        page.locator(ready).first.wait_for(timeout=SECONDS)
        opened.append(tab)
        return page

    yield opens
    page.screenshot(path=tmp_path / f"{opened[0]}.png")
    page.close()
    assert errors == []
    assert (tmp_path / f"{opened[0]}.png").stat().st_size > 10_000


def test_scalars(open_tab: Any) -> None:
    page = open_tab("scalars&tagFilter=train%2Floss", ready="tf-scalar-card")
    page.locator("tf-scalar-card", has_text="train/loss").first.wait_for(timeout=SECONDS)
    page.locator("tf-scalar-card svg path").first.wait_for(state="attached", timeout=SECONDS)
    assert page.get_by_text("adapt/tensorboard").count() > 0


def test_custom_scalars_are_grouped_by_question(open_tab: Any) -> None:
    page = open_tab("custom_scalars", ready="tf-custom-scalar-multi-line-chart-card svg path")
    for question in (
        "1 is it learning",
        "2 which sources",
        "3 where each source acts",
        "4 what it costs",
    ):
        assert page.get_by_text(question).count() > 0, question
    for chart in (f"validation of {TARGET}", "mean gate of each source"):
        assert page.get_by_text(chart, exact=True).count() > 0, chart
    # curves of charts that have a length
    curves = page.locator("tf-custom-scalar-multi-line-chart-card svg path[d*=L]")
    curves.nth(3).wait_for(state="attached", timeout=SECONDS)


def test_images_are_pictures_of_some_size(open_tab: Any) -> None:
    page = open_tab("images", ready="tf-image-loader img")
    for tag in (
        "gates/encoder_validation",
        "gates/decoder_validation",
        "gates/encoder_test",
        "prompts/test",
    ):
        page.locator("tf-image-loader", has_text=tag).locator("img").first.wait_for(timeout=SECONDS)
    page.wait_for_timeout(1000)
    for picture in page.locator("tf-image-loader img").all():
        assert picture.evaluate("each => each.naturalWidth") > 200
        assert picture.bounding_box()["width"] > 200, "shown too small to read"
    for tag in ("gates/encoder_validation", "gates/decoder_validation"):
        over_time = page.locator("tf-image-loader", has_text=tag).locator("paper-slider")
        assert over_time.evaluate("each => each.max") == 2, (
            "a picture for each of three validations"
        )


def test_histograms_of_the_entropy(open_tab: Any) -> None:
    page = open_tab("histograms", ready="tf-histogram-loader svg")
    assert (
        page.locator("tf-histogram-loader", has_text="gate_entropy_validation/encoder").count() == 1
    )


def test_texts_tell_configuration_and_environment(open_tab: Any) -> None:
    page = open_tab("text", ready="tf-text-loader")
    page.locator("pre", has_text=f"task_name: {TARGET}").first.wait_for(timeout=SECONDS)
    page.locator("tf-text-loader", has_text="environment").first.wait_for(timeout=SECONDS)


def test_hparams_compare_runs(open_tab: Any, runs: Path) -> None:
    page = open_tab("hparams", ready="text=learning_rate")
    for word in ("method", "task_name", TARGET, SOURCES[0], "pemt"):
        page.get_by_text(word, exact=True).first.wait_for(timeout=SECONDS)
    # TensorBoard shows five settings, 160 pixels each, whatever we say: the score is the column after them
    page.set_viewport_size({"width": 1600, "height": 1000})
    table = page.locator("tf-hparams-table-view")
    for text in ("test/average_metrics", "learning_rate", "method"):
        found = table.get_by_text(text).first
        found.wait_for(timeout=SECONDS)
        box = found.bounding_box()
        assert box["x"] >= 0, text
        assert box["x"] + box["width"] <= 1600, f"{text} is cut off at the edge"
