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
MOST_INCHES = 8.0
DOTS_PER_INCH = 100
MOST_NUMBERS = 64  # cells of a map that has numbers in it: text takes most of the drawing's time


def gate_map(gates: NamedGates, *, title: str) -> np.ndarray:
    """Mean gates of every layer (rows) and source (columns), which is left white where it has no expert.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    layers = by_layer(gates)
    sources = list(dict.fromkeys(name for weights in layers.values() for name in weights))
    figure, axes = _figure(rows=list(layers), columns=sources)
    values_LK = np.array(
        [[weights.get(name, np.nan) for name in sources] for weights in layers.values()]
    )
    image = _heat_map(axes, values_LK, low=0.0)
    figure.colorbar(image, ax=axes, label="mean gate")
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
    image = _heat_map(axes, similarity_MM, low=-1.0)
    axes.axhline(
        0.5, color="black", linewidth=2
    )  # the target above, sources among themselves below
    figure.colorbar(image, ax=axes, label="cosine of mean prompts")
    return _pixels(figure, title)


def _figure(*, rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, Axes]:
    names = 0.07 * max(map(len, columns))  # slanted below
    width = 1.6 + 0.07 * max(map(len, rows)) + INCHES_A_CELL[0] * len(columns)
    height = 1.0 + names + INCHES_A_CELL[1] * len(rows)
    size = (min(MOST_INCHES, max(width, 3.6)), min(MOST_INCHES, height))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    slanted: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns], **slanted)
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    return figure, axes


def _heat_map(axes: Axes, values: np.ndarray, *, low: float) -> AxesImage:
    colours = "viridis" if low == 0 else "RdBu_r"
    image = axes.imshow(values, vmin=low, vmax=1, cmap=colours, aspect="auto")
    if values.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values.round(2) + 0.0):  # -0.0 + 0.0 is 0.0
            if np.isnan(value):
                continue
            shade = "white" if (value < 0.6 if low == 0 else abs(value) > 0.6) else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9
            )
    return image


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _pixels(figure: Figure, title: str) -> np.ndarray:
    figure.suptitle(_plain(title), fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
