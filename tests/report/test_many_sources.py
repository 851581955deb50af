"""A run over 64 sources, some of them on some layers alone: what its report prints, and what is drawn."""

from __future__ import annotations

import re
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pemt.monitor import figures
from pemt.monitor.gates import NamedGates
from pemt.report import findings
from pemt.report.charts import line_chart
from pemt.report.page import content_of, environment
from pemt.report.record import RunRecord

# As long as LoraHub's; the last one is in the decoder alone.
SOURCES = [f"flan_t5_large-wiki_qa_is_this_true_{k:02}" for k in range(64)]
LAYERS = 24
EXAMPLE = {"input": "a", "target": "yes", "prediction": "yes", "scores": {"accuracy": 100.0}}


def gates_of(present: list[str], number: int) -> dict[str, float]:
    """Weights that fall with the source's number, a little differently at every site."""
    raw = {name: 0.9**k + 0.01 * (number % 5) for k, name in enumerate(present)}
    return {name: value / sum(raw.values()) for name, value in raw.items()}


def named_gates(sources: list[str] = SOURCES) -> NamedGates:
    sites = [
        f"{stack}/{layer}/{part}/{projection}"
        for stack, parts in (("encoder", ["self"]), ("decoder", ["self", "cross"]))
        for layer in range(LAYERS)
        for part in parts
        for projection in ("q", "v")
    ]
    everywhere = sources[:-1]
    return {
        site: gates_of(sources if site.startswith("decoder") else everywhere, number)
        for number, site in enumerate(sites)
    }


def record(sources: list[str] = SOURCES) -> RunRecord:
    means = [{f"gate_mean/{name}": 1 / len(sources) for name in sources}]
    return RunRecord(
        name="many", config={"task_name": "cb", "method": "pemt"}, state="finished",
        log=[{"step": step, **each} for each in means for step in (1, 2)],
        results={"sources": sources, "gates": named_gates(sources), "test_runtime": 1.0},
        predictions=[{**EXAMPLE, "gates": gates_of(sources, 0)}], checkpoint_bytes=None, trained=None,
    )  # fmt: skip


def rendered(name: str, run: RunRecord) -> str:
    return environment(markdown=name.endswith("md")).get_template(name).render(content_of([run]))


def test_of_many_sources_the_largest_are_columns_and_the_others_a_sum() -> None:
    run = record()
    matrices = findings.gate_matrices(run)
    assert [matrix.title for matrix in matrices] == [
        "encoder/self/q", "encoder/self/v", "decoder/self/q", "decoder/self/v", "decoder/cross/q", "decoder/cross/v",
    ]  # fmt: skip
    for matrix in matrices:
        assert matrix.columns == [*SOURCES[:11], "(53 others)"]
        assert len(matrix.rows) == LAYERS
        assert np.allclose(np.array(matrix.values, dtype=float).sum(axis=1), 1)
    by_class = findings.gates_by_class(run)
    assert by_class is not None
    assert by_class.columns == matrices[0].columns
    assert sum(value or 0 for value in by_class.values[0]) == pytest.approx(1)
    uses = findings.source_uses(run)
    assert len(uses) == 64
    assert {use.name: use.sites for use in uses}[SOURCES[-1]] == 4 * LAYERS


@pytest.mark.parametrize("count", [2, 12, 13])
def test_the_others_begin_where_a_table_ends(count: int) -> None:
    run = record(SOURCES[:count])
    columns = findings.gate_matrices(run)[-1].columns
    expected = SOURCES[:count] if count <= 12 else [*SOURCES[:11], "(2 others)"]
    assert columns == expected
    assert ("others as one sum" in rendered("report.html", run)) == (count > 12)


def test_a_column_of_sources_none_of_which_is_there_has_no_number() -> None:
    gates = {"encoder/0": gates_of(SOURCES[:11], 0), "decoder/0": gates_of(SOURCES, 0)}
    run = record()
    run.results["gates"] = gates
    encoder, decoder = findings.gate_matrices(run)
    assert encoder.values[0][-1] is None
    assert decoder.values[0][-1] == pytest.approx(sum([*gates["decoder/0"].values()][11:]))
    assert "| – |" in rendered("report.md", run)


def test_the_pages_tell_what_is_summed_up_and_every_source_once() -> None:
    for name in ("report.html", "report.md"):
        page = rendered(name, record())
        assert "the 11 of 64 sources with the largest mean gate weight" in page
        assert "(59 others)" in page, "an example's gates"
        assert "96 of 96" not in page
        assert f"0 of {4 * LAYERS}" in page
    page = rendered("report.html", record())
    assert "mean gate weight of 11 of 64 sources" in page, "the chart"
    assert len(page) < 400_000
    widest = max(line.count("<td") for line in page.splitlines())
    assert widest <= 13


def test_an_example_shows_its_largest_gates() -> None:
    gates = {"a": 0.1, "b": 0.5, "c": 0.05, "d": 0.1, "e": 0.1, "f": 0.05, "g": 0.1}
    assert findings.largest(gates) == pytest.approx(
        {"b": 0.5, "a": 0.1, "d": 0.1, "e": 0.1, "g": 0.1, "(2 others)": 0.1}
    )
    few = dict(list(gates.items())[:6])
    assert findings.largest(few) == few


def overlaps(labels: list[Any], canvas: Any, axis: int) -> int:
    """Neighbouring names that are nearer to each other than a line is high."""
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    points = [(box.x1, (box.y0 + box.y1) / 2)[axis] for box in boxes]
    height = labels[0].get_fontsize() / 72 * figures.DOTS_PER_INCH
    return sum(abs(after - before) < height for before, after in pairwise(points))


@pytest.mark.parametrize(("count", "rows"), [(2, 2), (20, LAYERS), (65, 65), (129, 2)])
def test_names_do_not_lie_on_each_other(count: int, rows: int) -> None:
    columns = [f"flan_t5_xl-{'long_' * 12}{k:03}" for k in range(count)]
    layers = [f"encoder/{layer}" for layer in range(rows)]
    figure, (axes, _) = figures._figure(rows=layers, columns=columns)
    axes.imshow(np.zeros((rows, count)), aspect="auto")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert overlaps(axes.get_yticklabels(), canvas, 1) == 0
    assert overlaps(axes.get_xticklabels(), canvas, 0) == 0
    assert len({label.get_text() for label in axes.get_xticklabels()}) == count
    assert max(figure.get_size_inches()) < 26


def label_of(gates: NamedGates, **options: Any) -> str:
    """What stands beside a picture's colours."""
    labels = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_heat_map", lambda *_, label, **__: labels.append(label))
        figures.gate_map(gates, title="t", **options)
    return str(labels[0])


def test_the_largest_of_many_weights_is_bright() -> None:
    """Of 64 none is near 1: on the scale of a few sources all were black."""
    of_few, of_many = (
        figures.gate_map({"encoder/0": gates_of(SOURCES[:count], 0)}, title="t")
        for count in (3, 64)
    )
    yellow = [
        int((each[..., 0].astype(int) - each[..., 2] > 150).sum()) for each in (of_few, of_many)
    ]
    assert yellow[1] > 1.5 * yellow[0], "the scale beside it has some too"


def test_a_legend_of_many_long_names_has_room() -> None:
    """The curves keep their height, and the names stay within the picture."""
    steps = ([1, 2], [0.1, 0.2])
    few = line_chart("few", dict.fromkeys(("a", "b"), steps)) or ""
    many = line_chart("many", dict.fromkeys(SOURCES[:11], steps)) or ""
    heights = [float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0]) for svg in (few, many)]
    assert heights[1] > heights[0] + 9 * 0.18 * 72
    starts = [float(x) for x in re.findall(r'<text[^>]*?(?: x="|translate\()([\d.-]+)', many)]
    assert len(starts) > 11
    assert min(starts) >= 0


def test_a_picture_tells_where_a_source_has_no_expert() -> None:
    everywhere = {"encoder/0": {"a": 0.5, "b": 0.5}}
    assert label_of(everywhere) == "mean gate"
    absent = {"encoder/0": {"a": 1.0}, "encoder/1": {"a": 0.5, "b": 0.5}}
    assert label_of(absent) == "mean gate (white, –: no expert)"
    assert label_of(everywhere, sources=["a", "b", "c"]) == "mean gate (white, –: no expert)"
    assert label_of(everywhere, sources=["a", "b"]) == "mean gate"


def test_means_are_over_the_layers_that_have_a_source() -> None:
    uses = {use.name: use for use in findings.source_uses(record())}
    gates = [each[SOURCES[-1]] for each in named_gates().values() if SOURCES[-1] in each]
    assert uses[SOURCES[-1]].mean_gate == pytest.approx(mean(gates))
