"""How training went: held-out nats against time, and the training loss beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnf.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


def limits(curves: Sequence[Points], truth: float | None) -> tuple[float, float] | None:
    """The range of nats worth showing: the worst curve's best 85 %, without its first fall.

    >>> limits([[(0.0, 100.0), (1.0, 3.0), (2.0, 2.0)]], truth=1.0)
    (0.9, 3.1)
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    ordered = [sorted(nats for _, nats in curve) for curve in curves]
    low = min([nats[0] for nats in ordered] + ([] if truth is None else [truth]))
    high = max(nats[int(0.85 * (len(nats) - 1))] for nats in ordered)
    room = 0.05 * max(high - low, 1e-3)
    return low - room, high + room


def draw(
    axes: Axes, curves: Sequence[tuple[str, Points]], truth: float | None, *, mark: int = 12
) -> None:
    """Draw held-out curves over seconds, and the truth as a line when it is known."""
    for i, (label, points) in enumerate(curves):
        axes.plot(
            [seconds for seconds, _ in points],
            [nats for _, nats in points],
            color=canvas.COLOURS[i % len(canvas.COLOURS)],
            linestyle=canvas.DASHES[i % len(canvas.DASHES)],
            marker="o" if len(points) <= mark else None,
            markersize=3,
            linewidth=1.8,
            label=label,
        )
    if truth is not None:
        axes.axhline(truth, color="black", linewidth=1.2, label="truth (entropy)")
    window = limits([points for _, points in curves], truth)
    if window is not None:
        axes.set_ylim(*window)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("held-out nll (nats)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, edgecolor="none", ncols=min(6, len(curves) + 2))


def history(
    held_out: Points, *, loss: Points = (), truth: float | None = None, title: str = ""
) -> Figure:
    """The picture of one training run.

    Args:
        held_out: (seconds, nats) on held-out points.
        loss: (seconds, nats) on training batches; drawn pale behind.
        truth: the lowest that any model can reach: the entropy of the target, in nats.
        title: what to write above it.
    """
    figure = canvas.new(8.0, 4.5)
    axes = figure.subplots()
    if loss:
        axes.plot(
            [seconds for seconds, _ in loss],
            [nats for _, nats in loss],
            color="0.75",
            linewidth=0.8,
            label="training loss",
        )
    draw(axes, [("held out", held_out)], truth)
    axes.set_title(title)
    return figure
