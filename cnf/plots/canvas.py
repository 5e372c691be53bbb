"""Figures without global state: matplotlib's object interface and its Agg renderer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnf.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
"""A second mark of identity beside the colour, for prints in grey."""

COLOUR_MAP = "viridis"


def require() -> type[Figure]:
    """Make sure that pictures can be drawn, before long work that ends in one.

    Returns:
        matplotlib's class of figures.

    Raises:
        ImportError: if matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "cnf[plot]"') from error
    return Figure


def new(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, drawn at 150 pixels to the inch."""
    figure = require()(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.1, hspace=0.02)
    return figure


def write(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: what any function of this room returned.
        path: the file; its folder is created.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def frame(
    axes: Axes,
    bounds: tuple[tuple[float, float], tuple[float, float]],
    columns: Sequence[str] = (),
) -> None:
    """A square picture of the plane with fixed limits.

    Args:
        axes: where to draw.
        bounds: (low, high) of both features.
        columns: what the features are called. Without names both have one unit, hence one scale,
            and no ticks are needed.
    """
    axes.set_xlim(*bounds[0])
    axes.set_ylim(*bounds[1])
    if not columns:
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_box_aspect(1)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)
    axes.set_xlabel(columns[0], fontsize=9)
    axes.set_ylabel(columns[1], fontsize=9)
