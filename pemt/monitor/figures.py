"""Heat maps as pictures. Imported when the first one is drawn, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import imsave
from matplotlib.textpath import text_to_path

from pemt.monitor.gates import NamedGates, by_layer

# TensorBoard shrinks a picture to the width of a card, about 330 dots: a small one stays legible.
INCHES_A_CELL = (0.5, 0.28)
MOST_INCHES = 8.0
LABEL_SIZE = 9  # points
DOTS_PER_INCH = 100
MOST_NUMBERS = 64  # cells of a map that has numbers in it: text takes most of the drawing's time


def gate_map(gates: NamedGates, *, title: str) -> np.ndarray:
    """Mean gates of every layer (rows) and source (columns), which is left white where it has no expert.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    layers = by_layer(gates)
    sources = list(dict.fromkeys(name for weights in layers.values() for name in weights))
    values_LK = np.array(
        [[weights.get(name, np.nan) for name in sources] for weights in layers.values()]
    )
    figure, axes = _figure(rows=list(layers), columns=sources)
    _heat_map(figure, axes, values_LK, low=0.0, label="mean gate")
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
    _heat_map(figure, axes, similarity_MM, low=-1.0, label="cosine of mean prompts")
    # The target above, sources among themselves below.
    axes[0].axhline(0.5, color="black", linewidth=2)
    return _pixels(figure, title)


def _figure(*, rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, tuple[Axes, Axes]]:
    """The axes of the map and of its colour bar, in margins that fit the names.

    They are found here, since a layout of matplotlib draws everything several times to find them.
    """
    slanted = 0.75 * max(map(_width, columns)) + 0.15  # the names below, down and to the left
    left = 0.15 + max(*map(_width, rows), slanted - INCHES_A_CELL[0] / 2)
    right, bottom, top = 1.0, slanted + 0.1, 0.4
    width = min(MOST_INCHES, max(left + right + INCHES_A_CELL[0] * len(columns), 3.6))
    height = min(MOST_INCHES, bottom + top + INCHES_A_CELL[1] * max(len(rows), 4))
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    below, tall = bottom / height, (height - bottom - top) / height
    axes = figure.add_axes((left / width, below, (width - left - right) / width, tall))
    bar = figure.add_axes(((width - right + 0.15) / width, below, 0.15 / width, tall))
    slant: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns], **slant)
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    axes.tick_params(labelsize=LABEL_SIZE)
    return figure, (axes, bar)


def _width(name: str) -> float:
    """Inches that it takes, with what fitting its letters to dots adds."""
    font = FontProperties(size=LABEL_SIZE)
    points, _, _ = text_to_path.get_text_width_height_descent(name, font, ismath=False)
    return 1.08 * float(points) / 72


def _heat_map(
    figure: Figure, axes: tuple[Axes, Axes], values: np.ndarray, *, low: float, label: str
) -> None:
    colours = "viridis" if low == 0 else "RdBu_r"
    image = axes[0].imshow(values, vmin=low, vmax=1, cmap=colours, aspect="auto")
    bar = figure.colorbar(image, cax=axes[1], ticks=[low, (low + 1) / 2, 1])
    bar.set_label(label, size=LABEL_SIZE)
    if values.size > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values.round(2) + 0.0):  # -0.0 + 0.0 is 0.0
        if not np.isnan(value):
            shade = "white" if (value < 0.6 if low == 0 else abs(value) > 0.6) else "black"
            centred: Any = {"ha": "center", "va": "center", "fontsize": 9}
            axes[0].text(column, row, f"{value:.2f}", color=shade, **centred)


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _pixels(figure: Figure, title: str) -> np.ndarray:
    figure.suptitle(_plain(title), fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
