"""Line charts as SVG, to be put into a page as they are."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Told apart by people with any kind of colour vision (Okabe and Ito 2008, "Color Universal Design").
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#666666")
MOST_LETTERS = 26  # of a name, where two stand beside each other
MOST_POINTS = 300  # of a curve; more are not seen and make the page large

Series = tuple[Sequence[int], Sequence[float]]


def line_chart(title: str, curves: Mapping[str, Series], *, unit: str = "") -> Markup | None:
    """Curves over steps by their names, as an `<svg>` element; None where there is nothing to draw."""
    curves = {name: thinned(series) for name, series in curves.items() if len(series[0])}
    if not curves:
        return None
    columns = 2 if max(map(len, curves)) <= MOST_LETTERS else 1
    lines = -(-len(curves) // columns) if len(curves) > 1 else 0
    figure = Figure(figsize=(4.6, 2.4 + 0.18 * lines), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for number, (name, (steps, values)) in enumerate(curves.items()):
        marker = "o" if len(steps) < 30 else None
        colour, dashes = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
        (line,) = axes.plot(steps, values, dashes, color=colour, marker=marker, markersize=3)
        line.set_label(plain(name).lstrip("_") or " ")
    axes.set_title(plain(title), fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel(unit)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return svg_of(figure, salt=title)


def thinned(series: Series) -> Series:
    """Every n-th point, and the last."""
    steps, values = series
    stride = -(-len(steps) // MOST_POINTS)
    picked = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [steps[i] for i in picked], [values[i] for i in picked]


def plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def svg_of(figure: Figure, *, salt: str) -> Markup:
    """The figure as one element, the same for the same figure; texts stay texts, as large as the page's."""
    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its size follows from the page; the view box keeps the proportions.
    head, rest = svg.split(">", 1)
    return Markup(re.sub(r' (width|height)="[^"]*"', "", head) + ' role="img">' + rest)
