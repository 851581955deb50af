"""Heat maps as pictures. Imported when the first one is drawn, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imsave

from pemt.monitor.gates import NamedGates, by_layer

# TensorBoard shrinks a picture to the width of a card, about 330 dots: a small one stays legible.
INCHES_A_CELL = (0.5, 0.28)
MOST_INCHES = 6.0  # of all cells, unless their names would lie on each other
FONTS = {0.16: 7.0, 0.24: 10.0}  # points of names beside cells of at least so many inches
DOTS_PER_INCH = 100
LONGEST_NAME = 32  # characters; of a longer one the beginning and the end are shown
NO_EXPERT = "–"
BRIGHTEST = 12  # of so many sources; of more, whose weights are small, the largest weight has the brightest colour
MOST_NUMBERS = 64  # cells of a map that has numbers in it: text takes most of the drawing's time


def gate_map(gates: NamedGates, *, title: str, sources: Sequence[str] = ()) -> np.ndarray:
    """Mean gates of every layer (rows) and source (columns); white, and told so, where a source has no expert.

    Args:
        gates: by site; a layer's sites are averaged.
        title: stands above.
        sources: the columns; default: those that `gates` names.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    layers = by_layer(gates)
    sources = sources or list(dict.fromkeys(name for each in layers.values() for name in each))
    figure, axes = _figure(rows=list(layers), columns=sources)
    values_LK = np.array(
        [[weights.get(name, np.nan) for name in sources] for weights in layers.values()]
    )
    high = 1.0 if len(sources) <= BRIGHTEST else float(np.nanmax(values_LK))
    image = _heat_map(axes, values_LK, low=0.0, high=high)
    absent = f" (white, {NO_EXPERT}: no expert)" if np.isnan(values_LK).any() else ""
    figure.colorbar(image, ax=axes, label=f"mean gate{absent}")
    return _pixels(figure, title)


def save_gate_map(gates: NamedGates, path: Path, *, title: str) -> None:
    """`gate_map` as a PNG file."""
    imsave(path, gate_map(gates, title=title))


def similarity_map(similarity_MM: np.ndarray, *, names: Sequence[str], title: str) -> np.ndarray:
    """Cosines between prompts, the target's first.

    Args:
        similarity_MM: [1 + sources, 1 + sources], in [-1, 1].
        names: the target's and the sources'.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    figure, axes = _figure(rows=names, columns=names)
    image = _heat_map(axes, similarity_MM, low=-1.0, high=1.0)
    axes.axhline(
        0.5, color="black", linewidth=2
    )  # the target above, sources among themselves below
    figure.colorbar(image, ax=axes, label="cosine of mean prompts")
    return _pixels(figure, title)


def _figure(*, rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, Axes]:
    rows, columns = [shown(name) for name in rows], [shown(name) for name in columns]
    cells = [
        max(min(FONTS), min(inches, MOST_INCHES / count))
        for inches, count in zip(INCHES_A_CELL, (len(columns), len(rows)), strict=True)
    ]
    fonts = [max(size for least, size in FONTS.items() if least <= cell) for cell in cells]
    letter = 0.007  # inches of a letter's width, a point
    names = letter * fonts[0] * max(map(len, columns))  # below
    width = 1.6 + letter * fonts[1] * max(map(len, rows)) + cells[0] * len(columns)
    height = 1.0 + names + cells[1] * len(rows)
    figure = Figure(figsize=(max(width, 3.6), height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    turn = 45 if cells[0] >= max(FONTS) else 90  # slanted ones would lie on each other
    turned: Any = {"rotation": turn, "ha": "right", "rotation_mode": "anchor"}
    if turn == 90:
        turned["va"] = "center"
    axes.set_xticks(range(len(columns)), columns, fontsize=fonts[0], **turned)
    axes.set_yticks(range(len(rows)), rows, fontsize=fonts[1])
    return figure, axes


def _heat_map(axes: Axes, values: np.ndarray, *, low: float, high: float) -> AxesImage:
    colours = "viridis" if low == 0 else "RdBu_r"
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
    if values.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values.round(2) + 0.0):  # -0.0 + 0.0 is 0.0
            if np.isnan(value):
                axes.text(column, row, NO_EXPERT, ha="center", va="center", fontsize=9)
                continue
            shade = "white" if (value < 0.6 * high if low == 0 else abs(value) > 0.6) else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9
            )
    return image


def shown(name: str) -> str:
    """A name as a picture has room for it."""
    half = LONGEST_NAME // 2
    return _plain(name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}")


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _pixels(figure: Figure, title: str) -> np.ndarray:
    figure.suptitle(_plain(title), fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
