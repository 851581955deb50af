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
MOST_INCHES = 6.0  # of all cells, unless their names would lie on each other
LABEL_SIZE = 9  # points
LABEL_SIZES = {0.16: 7, 0.24: LABEL_SIZE}  # of names beside cells of at least so many inches
LONGEST_NAME = 32  # characters; of a longer one the beginning and the end are shown
NO_EXPERT = "–"
BRIGHTEST = 12  # of so many sources; of more, whose weights are small, the largest weight has the brightest colour
DOTS_PER_INCH = 100
MOST_NUMBERS = 64  # cells of a map that has numbers in it: text takes most of the drawing's time


def gate_map(gates: NamedGates, *, title: str, sources: Sequence[str] = ()) -> np.ndarray:
    """Mean gates of every layer (rows) and source (columns); white, and marked so, where a source has no expert.

    Args:
        gates: by site; a layer's sites are averaged.
        title: stands above.
        sources: the columns; default: those that `gates` names.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    layers = by_layer(gates)
    sources = sources or list(dict.fromkeys(name for each in layers.values() for name in each))
    values_LK = np.array(
        [[weights.get(name, np.nan) for name in sources] for weights in layers.values()]
    )
    figure, axes = _figure(rows=list(layers), columns=sources)
    absent = f" (white, {NO_EXPERT}: no expert)" if np.isnan(values_LK).any() else ""
    high = 1.0 if len(sources) <= BRIGHTEST else float(np.nanmax(values_LK))
    _heat_map(figure, axes, values_LK, low=0.0, high=high, label=f"mean gate{absent}")
    return _pixels(figure, title)


def save_gate_map(gates: NamedGates, path: Path, *, title: str) -> None:
    """`gate_map` as a PNG file."""
    imsave(path, gate_map(gates, title=title))


def similarity_map(similarity_MM: np.ndarray, *, names: Sequence[str], title: str) -> np.ndarray:
    """Cosines between prompts, the target's first, as a picture such as `gate_map` gives."""
    figure, axes = _figure(rows=names, columns=names)
    _heat_map(figure, axes, similarity_MM, low=-1.0, high=1.0, label="cosine of mean prompts")
    # The target above, sources among themselves below.
    axes[0].axhline(0.5, color="black", linewidth=2)
    return _pixels(figure, title)


def _figure(*, rows: Sequence[str], columns: Sequence[str]) -> tuple[Figure, tuple[Axes, Axes]]:
    """The axes of the map and of its colour bar, in margins that fit the names.

    They are found here, since a layout of matplotlib draws everything several times to find them.
    """
    rows, columns = [shown(name) for name in rows], [shown(name) for name in columns]
    across, along = (
        max(min(LABEL_SIZES), min(inches, MOST_INCHES / count))
        for inches, count in zip(INCHES_A_CELL, (len(columns), len(rows)), strict=True)
    )
    sizes = [
        max(size for least, size in LABEL_SIZES.items() if least <= each)
        for each in (across, along)
    ]
    slanted = across >= max(LABEL_SIZES)  # narrow ones would lie on each other: those stand upright
    names = max(_width(name, sizes[0]) for name in columns)
    names = (0.75 if slanted else 1.0) * names + 0.15  # below, if slanted down and to the left
    beside = max(_width(name, sizes[1]) for name in rows)
    left = 0.15 + max(beside, names - across / 2 if slanted else 0.0)
    right, bottom, top = 1.0, names + 0.1, 0.4
    width = max(left + right + across * len(columns), 3.6)
    height = bottom + top + along * max(len(rows), 4)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    below, tall = bottom / height, (height - bottom - top) / height
    axes = figure.add_axes((left / width, below, (width - left - right) / width, tall))
    bar = figure.add_axes(((width - right + 0.15) / width, below, 0.15 / width, tall))
    turned: Any = (
        {"rotation": 45, "va": "baseline"} if slanted else {"rotation": 90, "va": "center"}
    )
    turned |= {"ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, fontsize=sizes[0], **turned)
    axes.set_yticks(range(len(rows)), rows, fontsize=sizes[1])
    bar.tick_params(labelsize=LABEL_SIZE)
    return figure, (axes, bar)


def shown(name: str) -> str:
    """A name as a picture has room for it."""
    half = LONGEST_NAME // 2
    return _plain(name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}")


def _width(name: str, size: float) -> float:
    """Inches that it takes, with what fitting its letters to dots adds."""
    font = FontProperties(size=size)
    points, _, _ = text_to_path.get_text_width_height_descent(name, font, ismath=False)
    return 1.08 * float(points) / 72


def _heat_map(
    figure: Figure,
    axes: tuple[Axes, Axes],
    values: np.ndarray,
    *,
    low: float,
    high: float,
    label: str,
) -> None:
    colours = "viridis" if low == 0 else "RdBu_r"
    image = axes[0].imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
    ticks = [low, (low + high) / 2, high]
    bar = figure.colorbar(image, cax=axes[1], ticks=ticks, format="%.2f")
    bar.set_label(label, size=LABEL_SIZE)
    if values.size > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values.round(2) + 0.0):  # -0.0 + 0.0 is 0.0
        bright = value < 0.6 * high if low == 0 else abs(value) > 0.6
        shade = "white" if bright else "black"
        text = NO_EXPERT if np.isnan(value) else f"{value:.2f}"
        centred: Any = {"ha": "center", "va": "center", "fontsize": 9}
        axes[0].text(column, row, text, color=shade, **centred)


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _pixels(figure: Figure, title: str) -> np.ndarray:
    figure.suptitle(_plain(title), fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
