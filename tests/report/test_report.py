"""`pemt report`: what the page tells, of real runs; what it refuses; and in a real browser without network."""

from __future__ import annotations

import colorsys
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pemt.checkpoint.status import write_status
from pemt.commands import COMMANDS
from pemt.config import PemtError
from pemt.report import findings
from pemt.report.charts import MOST_POINTS, line_chart, thinned
from pemt.report.page import environment, in_markdown, shade, write_report
from pemt.report.record import RunRecord, read_runs, short_names
from pemt.run.train import run_adapt
from tests.support.browser import chromium
from tests.support.tiny import adapt_config
from tests.support.trained import train_sources

SOURCES, TARGET = ("tiny-report-a", "tiny-report-b"), "tiny-report-target"
SCRIPT = "<script>document.title='ran'</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, PEMT and the adapter alone; one test example holds a script."""
    folder = train_sources(tmp_path_factory.mktemp("report"), SOURCES, TARGET)
    test = folder / TARGET / "test.jsonl"
    line = json.dumps({"text": f"the box is red {SCRIPT} | $x$ **b**", "label": 1})
    test.write_text("\n".join([*test.read_text().splitlines()[:3], line]) + "\n")
    for method in ("pemt", "adapter"):
        paths = (folder / "base", folder / TARGET, folder / method, folder / "bank")
        run_adapt(adapt_config(*paths, TARGET, method=method))
    return folder


class Page(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["report"]([str(runs / "pemt")])
    assert capsys.readouterr().out.splitlines() == [
        str(runs / "pemt" / "report.html"),
        str(runs / "pemt" / "report.md"),
    ]
    text = (runs / "pemt" / "report.html").read_text()
    page = Page(text)
    results = json.loads((runs / "pemt" / "all_results.json").read_text())
    assert f"{results['test_accuracy']:.1f}" in page.text
    assert list(results["gates"]) == ["encoder/0", "encoder/1", "decoder/0", "decoder/1"]
    for weights in results["gates"].values():
        for gate in weights.values():
            assert f"{gate:.2f}" in page.text
    for heading in (
        "Gates",
        "Which source helped where",
        "Confusion",
        "Worst and best",
        "Cost",
        "Configuration",
    ):
        assert heading in page.text, heading
    for fact in ("peak memory", "tokens per second", "time to train", "checkpoint"):
        assert fact in page.text, fact
    assert f"task_name: {TARGET}" in page.text
    assert "Side by side" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) >= 4


def test_the_page_needs_nothing_but_itself(runs: Path, tmp_path: Path) -> None:
    write_report([runs / "pemt", runs / "adapter"], tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "url(http" not in text
    assert "@import" not in text


def test_what_a_run_says_is_text(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "pemt", tmp_path / "<b>run</b>"))
    write_report([run], tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert SCRIPT not in text
    assert SCRIPT in Page(text).text
    assert "<b>run</b>" not in text
    markdown = (tmp_path / "report.md").read_text()
    assert "<script>" not in markdown
    assert "&lt;script&gt;" in markdown
    assert "\\| \\$x\\$ \\*\\*b\\*\\*" in markdown


def test_several_runs_side_by_side(runs: Path, tmp_path: Path) -> None:
    folders = [runs / "pemt", runs / "adapter", runs / f"run-{SOURCES[0]}"]
    write_report(folders, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "Side by side" in page.text
    assert "stage 1" in page.text
    markdown = (tmp_path / "report.md").read_text()
    rows = {line.split(" |")[0]: line for line in markdown.splitlines() if line.startswith("| ")}
    assert rows["| method"] == "| method | pemt | adapter | – |"
    assert "| seed" not in rows, "what does not differ is not told"
    assert "| trained parameters" in rows


def test_markdown_tables_are_whole(runs: Path, tmp_path: Path) -> None:
    write_report([runs / "pemt", runs / "adapter"], tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            cells = [len(re.findall(r"(?<!\\)\|", each)) for each in (before, line)]
            assert cells[0] == cells[1], (before, line)
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert lines[number - 1].startswith("|")
            assert not lines[number - 2].startswith("|")


def record(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "name": "run",
        "config": {"task_name": "cb"},
        "state": "",
        "log": [],
        "results": {},
        "predictions": [],
        "checkpoint_bytes": None,
        "trained": None,
    }
    return RunRecord(**{**fields, **changes})


def example(target: str, prediction: str, **fields: Any) -> dict[str, Any]:
    score = 100.0 * (target == prediction)
    return {
        "input": f"{target} or not",
        "target": target,
        "prediction": prediction,
        "scores": {"accuracy": score},
        "gates": {},
        **fields,
    }


def test_confusion_counts_what_is_no_class() -> None:
    lines = [example("a", "a"), example("a", "b"), example("b", "a"), example("b", "what")]
    classes, predicted, counts = findings.confusion(record(predictions=lines)) or ([], [], [])
    assert (classes, predicted) == (["a", "b"], ["a", "b", findings.OTHER])
    assert counts == [[1, 1, 0], [1, 0, 1]]
    spans = [{**line, "scores": {"f1": 50.0, "exact_match": 0.0}} for line in lines]
    assert findings.confusion(record(predictions=spans)) is None
    assert findings.confusion(record()) is None


def test_sources_and_where_they_helped() -> None:
    lines = [
        example("a", "a", gates={"x": 0.9, "y": 0.1}),
        example("a", "b", gates={"x": 0.8, "y": 0.2}),
        example("b", "b", gates={"x": 0.3, "y": 0.7}),
    ]
    results = {
        "sources": ["y", "x"],
        "gates": [[0.3, 0.7], [0.4, 0.6], [0.7, 0.3]],
        "test_runtime": 1.0,
    }
    log = [{"step": 1, "gate/encoder/0/x": 0.5, "prompt_similarity/x": 0.25}]
    run = record(predictions=lines, results=results, log=log)
    first, second = findings.source_uses(run)
    assert (first.name, first.mean_gate, first.leads_sites) == ("x", pytest.approx(1.6 / 3), 2)
    assert (first.leads, first.score, first.similarity) == (2, 50.0, 0.25)
    assert (second.name, second.leads, second.score, second.similarity) == ("y", 1, 100.0, None)
    by_class = findings.gates_by_class(run)
    assert by_class is not None
    assert by_class.rows == ["a", "b"]
    assert by_class.values[0] == pytest.approx([0.15, 0.85])
    encoder, decoder = findings.gate_matrices(run)
    assert (len(encoder.values), len(decoder.values)) == (1, 2), "an old run names no sites"


def test_examples_are_of_every_kind() -> None:
    lines = [
        *[example("a", "b")] * 9,
        example("b", "a"),
        *[example("a", "a")] * 9,
        example("b", "b"),
    ]
    worst, best = findings.worst_and_best(record(predictions=lines))
    assert {(line["target"], line["prediction"]) for line in worst} == {("a", "b"), ("b", "a")}
    assert {line["target"] for line in best} == {"a", "b"}
    assert len(worst) == len(best) == findings.EXAMPLES
    numbers = [
        example("3.0", "2.8", scores={}),
        example("1.0", "5.0", scores={}),
        example("2.0", "2.0", scores={}),
    ]
    worst, best = findings.worst_and_best(record(predictions=numbers))
    assert [line["target"] for line in worst] == ["1.0", "3.0"]
    assert [line["target"] for line in best] == ["2.0"]
    assert findings.worst_and_best(record(predictions=[example("1.0", "one", scores={})])) == (
        [],
        [],
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert findings.duration(seconds) == text


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    steps, values = thinned((list(range(10_001)), [float(i) for i in range(10_001)]))
    assert len(steps) <= MOST_POINTS + 2
    assert (steps[0], steps[-1], values[-1]) == (0, 10_000, 10_000.0)
    assert line_chart("nothing", {"run": ([], [])}) is None


def test_a_chart_is_one_escaped_element() -> None:
    svg = line_chart("loss <b>", {"<script>$x$ & y": ([1, 2], [1.0, 2.0]), "_z": ([1], [2.0])})
    assert svg is not None
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "<script" not in svg
    assert "&lt;script&gt;$x$ &amp; y" in svg
    assert svg == line_chart(
        "loss <b>", {"<script>$x$ & y": ([1, 2], [1.0, 2.0]), "_z": ([1], [2.0])}
    )


def test_what_was_not_finite_is_left_out_of_a_curve() -> None:
    log = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}, {"step": 3}]
    assert record(log=log).series("train/loss") == ([1], [2.0])


def test_names_are_as_long_as_they_must_be() -> None:
    assert short_names([Path("/runs/cb/seed-0"), Path("/runs/cb/seed-1")]) == ["seed-0", "seed-1"]
    assert short_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("/a/x"), Path("/a/x")]) == ["x", "x"]


def test_markdown_means_nothing_but_itself() -> None:
    assert in_markdown("a\n| b `c` <i>") == "a \\| b \\`c\\` &lt;i&gt;"
    assert in_markdown(3) == 3
    assert environment(markdown=False).from_string("{{ x }}").render(x="<i>") == "&lt;i&gt;"


def luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance of a colour in [0, 1] (WCAG 2.2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 0.6, 1.0, 2.0])
def test_text_stands_out_from_every_shade(value: float) -> None:
    found = re.fullmatch(r"background:hsl\((\d+) (\d+)% (\d+)%\)", shade(value))
    assert found is not None
    hue, saturation, lightness = (int(part) for part in found.groups())
    ground = luminance(*colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100))
    text = luminance(0x1B / 255, 0x1F / 255, 0x24 / 255)
    assert (ground + 0.05) / (text + 0.05) >= 4.5, "WCAG 2.2 asks for 4.5 to 1"


def test_a_run_that_is_not_finished_is_told_as_far_as_it_goes(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "pemt", tmp_path / "run"))
    for name in ("all_results.json", "predictions.jsonl"):
        (run / name).unlink()
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "tra')
    write_status(run, "interrupted", step=10)
    write_report([run], tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Not finished yet (interrupted)" in text
    assert "training loss" in text
    (unfinished,) = read_runs([run])
    (last,) = [line for line in unfinished.log if "gate_mean/tiny-report-a" in line][-1:]
    assert f"mean over the training steps logged at step {last['step']}: how much" in text
    assert unfinished.sources == list(SOURCES)
    for stack, matrix in zip(
        ("encoder", "decoder"), findings.gate_matrices(unfinished), strict=True
    ):
        for layer, gates_K in enumerate(matrix.values):
            assert gates_K == [last[f"gate/{stack}/{layer}/{source}"] for source in SOURCES]
            assert all(f"{gate:.2f}" in text for gate in gates_K)
    for use in findings.source_uses(unfinished):
        assert use.mean_gate == pytest.approx(last[f"gate_mean/{use.name}"], abs=1e-6)


def test_what_cannot_be_reported_on_is_one_line(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(PemtError, match=r"holds no run \(config.yaml is missing\)"):
        read_runs([tmp_path])
    run = Path(shutil.copytree(runs / "pemt", tmp_path / "run"))
    (run / "predictions.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(PemtError, match=r"predictions.jsonl, line 1: .*target"):
        read_runs([run])
    (run / "all_results.json").write_text("[]")
    with pytest.raises(PemtError, match=r"all_results.json: found list"):
        read_runs([run])
    (run / "config.yaml").write_text(yaml.safe_dump("!!python/object:os.system {}"))
    with pytest.raises(PemtError, match=r"config.yaml: found str"):
        read_runs([run])
    (tmp_path / "file").write_text("")
    with pytest.raises(PemtError, match="cannot be written"):
        COMMANDS["report"]([str(runs / "pemt"), "--output_dir", str(tmp_path / "file")])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, pytest.param(390, marks=pytest.mark.soak)])
def test_in_a_browser_without_network(runs: Path, tmp_path: Path, width: int) -> None:
    """Screenshots lie in pytest's temporary folder."""
    with chromium() as browser:
        write_report([runs / "pemt", runs / "adapter"], tmp_path)
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
        page = context.new_page()
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((tmp_path / "report.html").as_uri())
        page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        assert page.title() == "pemt: pemt · adapter", "the script in an example ran"
        assert (len(asked), complaints) == (1, [])
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "the page scrolls sideways"
        )
        assert page.get_by_text(SCRIPT, exact=False).count() > 0
        for chart in page.locator("svg").all():
            box = chart.bounding_box()
            assert box["width"] > 250
            assert box["height"] > 120
        # dark on light, and large enough to read
        style = "getComputedStyle(document.body)"
        assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(f"parseFloat({style}.fontSize)") >= 16
