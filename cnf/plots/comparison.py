"""Models beside the truth: densities on one colour scale, samples, and how training went."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cnf.plots import canvas
from cnf.plots import density as densities
from cnf.plots import history as histories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIRS = 3
"""How many pairs of columns a picture of a wide table shows."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One column of the picture: the data, or a model.

    Attributes:
        title: what stands above it.
        samples: draws, ``(n, features)``.
        density: the density on ``plots.grid(bounds)``, or None where there is no picture of it.
        note: a short second line, such as the gap.
    """

    title: str
    samples: Tensor
    density: Tensor | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Held-out nats of one model over its training time, as (seconds, nats)."""

    label: str
    points: Sequence[tuple[float, float]]


def comparison(
    panels: Sequence[Panel],
    curves: Sequence[Curve] = (),
    *,
    bounds: densities.Bounds,
    columns: Sequence[str] = (),
    truth: float | None = None,
    title: str = "",
) -> Figure:
    """The picture of a comparison.

    Two features with densities: a row of densities on one colour scale, a row of samples. One
    feature: a row of histograms under the density. More: pairs of columns, data beside models.
    Below, held-out nats against training time.

    Args:
        panels: the data first, then the models.
        curves: the models' held-out nats; none draws no such row.
        bounds: (low, high) of every feature.
        columns: names of the features; without them two features share one unit and one scale.
        truth: the entropy of the target in nats, drawn as a line.
        title: what to write above it all.
    """
    if not panels:
        raise ValueError("a comparison needs at least one panel")
    features = len(bounds)
    names = tuple(columns) or tuple(f"x{i}" for i in range(features))
    shaded = features == 2 and any(panel.density is not None for panel in panels)
    if features == 1:
        rows = 1
    elif shaded:
        rows = 2
    else:
        rows = min(PAIRS, len(_pairs(features)))
    # few models and many pairs of columns: a row for each model instead of a column
    turned = len(panels) < rows
    down, across = (len(panels), rows) if turned else (rows, len(panels))
    width = max(8.0, min(12.0, 4.2 * across), 2.2 * across)
    heights = [min(width / across, 4.0)] * down + ([3.4] if curves else [])
    figure = canvas.new(width, sum(heights) + 0.6)
    figure.suptitle(title, fontsize=13)
    # the last, narrow column is for the colour bar
    widths = [1.0] * across + ([0.05] if shaded else [])
    layout = figure.add_gridspec(
        len(heights), len(widths), height_ratios=heights, width_ratios=widths
    )
    axes = [
        [figure.add_subplot(layout[(j, i) if turned else (i, j)]) for j in range(len(panels))]
        for i in range(rows)
    ]
    for column, panel in zip(axes[0], panels, strict=True):
        column.set_title(panel.title + ("\n" + panel.note if panel.note else ""), fontsize=11)
    if features == 1:
        _histograms(axes[0], panels, bounds, names)
    elif shaded:
        _densities(axes, panels, bounds, columns)
        image = next(image for ax in axes[0] for image in ax.images)
        figure.colorbar(image, cax=figure.add_subplot(layout[0, -1]), extend="max")
    else:
        _projections(axes, panels, bounds, names, turned=turned)
    if curves:
        below = figure.add_subplot(layout[down, :across])
        histories.draw(below, [(curve.label, curve.points) for curve in curves], truth)
    return figure


def _pairs(features: int) -> list[tuple[int, int]]:
    """Pairs of columns, neighbours first, so that the first few show every early column."""
    return sorted(itertools.combinations(range(features), 2), key=lambda p: (p[1] - p[0], p))


def _densities(
    axes: Sequence[Sequence[Axes]],
    panels: Sequence[Panel],
    bounds: densities.Bounds,
    columns: Sequence[str],
) -> None:
    """Densities above, samples below; the first panel's density sets the colour scale."""
    known = [panel.density for panel in panels if panel.density is not None]
    top = densities.ceiling(known[0])
    for upper, lower, panel in zip(axes[0], axes[1], panels, strict=True):
        if panel.density is None:
            upper.set_axis_off()
        else:
            densities.draw(upper, panel.density, bounds, top, columns)
        canvas.frame(lower, (bounds[0], bounds[1]), columns)
        x = panel.samples.numpy()
        lower.scatter(x[:, 0], x[:, 1], s=1.0, color=canvas.COLOURS[0], alpha=0.4, linewidths=0)
        if panel is panels[0]:
            upper.set_ylabel("\n".join(["density", upper.get_ylabel()]).strip(), fontsize=10)
            lower.set_ylabel("\n".join(["samples", lower.get_ylabel()]).strip(), fontsize=10)
        else:
            upper.set_ylabel("")
            lower.set_ylabel("")


def _histograms(
    axes: Sequence[Axes],
    panels: Sequence[Panel],
    bounds: densities.Bounds,
    names: Sequence[str],
) -> None:
    """One feature: the data's histogram behind every model's density and samples."""
    edges = np.linspace(*bounds[0], 61).tolist()
    for ax, panel in zip(axes, panels, strict=True):
        ax.hist(panels[0].samples[:, 0].numpy(), edges, density=True, color="0.85", label="data")
        if panel is not panels[0]:
            ax.hist(
                panel.samples[:, 0].numpy(),
                edges,
                density=True,
                histtype="step",
                color=canvas.COLOURS[0],
                label="samples",
            )
        if panel.density is not None:
            points = densities.grid(bounds, len(panel.density))[:, 0]
            ax.plot(points, panel.density, color=canvas.COLOURS[1], label="density")
        ax.set_xlim(*bounds[0])
        ax.set_xlabel(names[0])
    highest = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(0.0, highest)
    axes[-1].legend(frameon=False, fontsize=8)


def _projections(
    axes: Sequence[Sequence[Axes]],
    panels: Sequence[Panel],
    bounds: densities.Bounds,
    names: Sequence[str],
    *,
    turned: bool,
) -> None:
    """Pairs of columns: samples of each panel over the data, drawn pale behind."""
    data = panels[0].samples.numpy()
    for row, (i, j) in zip(axes, _pairs(len(bounds)), strict=False):
        for ax, panel in zip(row, panels, strict=True):
            x = panel.samples.numpy()
            pale = "0.5" if panel is panels[0] else "0.8"
            ax.scatter(data[:, i], data[:, j], s=1.5, color=pale, linewidths=0)
            if panel is not panels[0]:
                ax.scatter(
                    x[:, i], x[:, j], s=1.5, color=canvas.COLOURS[0], alpha=0.4, linewidths=0
                )
            canvas.frame(ax, (bounds[i], bounds[j]), (names[i], names[j]))
            if ax is not row[0] and not turned:
                ax.set_ylabel("")
                ax.set_yticklabels([])
