"""Densities on a grid, and their picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Bounds = tuple[tuple[float, float], ...]


def grid(bounds: Bounds, size: int = 200) -> Tensor:
    """The centres of equal cells that tile a box.

    Args:
        bounds: (low, high) of each of one or two features.
        size: cells along each axis.

    Returns:
        Points, ``(size, features)`` for one feature and ``(size, size, features)`` for two, the
        first feature running along the last batch axis, as a picture is stored.

    Example:
        >>> grid(((0.0, 1.0), (0.0, 1.0)), 2)[0]
        tensor([[0.2500, 0.2500],
                [0.7500, 0.2500]])
    """
    if len(bounds) not in (1, 2):
        raise ValueError(f"a grid has one or two features, got bounds for {len(bounds)}")
    cells = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    axes = [low + (high - low) * cells for low, high in bounds]
    columns = torch.meshgrid(*axes, indexing="xy") if len(axes) == 2 else axes
    return torch.stack(list(columns), -1).to(torch.get_default_dtype())


def evaluate(
    log_prob: Callable[[Tensor], Tensor],
    bounds: Bounds,
    *,
    size: int = 200,
    chunk: int = 20_000,
    like: Tensor | None = None,
) -> Tensor:
    """exp(log_prob) on the grid, a chunk at a time.

    Args:
        log_prob: takes points ``(n, features)`` and returns nats ``(n,)``.
        bounds: (low, high) of each feature.
        size: cells along each axis.
        chunk: points evaluated at once.
        like: a tensor with the device and dtype to evaluate in; None means torch's defaults.

    Returns:
        The density, ``(size,)`` or ``(size, size)``, on the CPU.

    Example:
        >>> import torch
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> values = evaluate(lambda x: normal.log_prob(x[:, 0]), ((-5.0, 5.0),), size=100)
        >>> round(float(values.sum() * 0.1), 4)
        1.0
    """
    points = grid(bounds, size)
    shape = points.shape[:-1]
    if like is not None:
        points = points.to(like)
    with torch.no_grad():
        parts = [log_prob(part).exp().cpu() for part in points.flatten(0, -2).split(chunk)]
    return torch.cat(parts).reshape(shape)


def draw(
    axes: Axes, values: Tensor, bounds: Bounds, top: float, columns: Sequence[str] = ()
) -> AxesImage:
    """Paint a two-dimensional density, from zero to ``top``; returns the image for a colour bar."""
    image = axes.imshow(
        values.numpy(),
        extent=(*bounds[0], *bounds[1]),
        origin="lower",
        cmap=canvas.COLOUR_MAP,
        vmin=0.0,
        vmax=top,
        # the few cells of a histogram are shown as what they are
        interpolation="bilinear" if len(values) > 100 else "nearest",
        aspect="auto",
    )
    canvas.frame(axes, (bounds[0], bounds[1]), columns)
    return image


def ceiling(values: Tensor, share: float = 0.999) -> float:
    """Where a colour scale ends: a high quantile, so that one sharp ridge does not dim the rest."""
    finite = values[values.isfinite()].flatten()
    # torch.quantile refuses more than 2^24 values, numpy's does not
    top = float(finite.sort().values[math.ceil(share * (len(finite) - 1))]) if len(finite) else 1.0
    return top if top > 0 else 1.0


def density(
    log_prob: Callable[[Tensor], Tensor],
    bounds: Bounds,
    *,
    title: str = "",
    columns: Sequence[str] = (),
    size: int = 300,
    like: Tensor | None = None,
) -> Figure:
    """The picture of a two-dimensional density.

    Args:
        log_prob: takes points ``(n, 2)`` and returns nats ``(n,)``: a flow's, or a target's.
        bounds: (low, high) of both features.
        title: what to write above it.
        columns: what the features are called, where they have units of their own.
        size: cells along each axis.
        like: a tensor with the device and dtype to evaluate in.
    """
    values = evaluate(log_prob, bounds, size=size, like=like)
    figure = canvas.new(6.0, 5.2)
    axes = figure.subplots()
    image = draw(axes, values, bounds, ceiling(values), columns)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="density", extend="max", shrink=0.9)
    return figure
