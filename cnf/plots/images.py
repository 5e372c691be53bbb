"""Images beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.plots import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def images(
    panels: Mapping[str, Tensor],
    *,
    high: float = 255.0,
    columns: int = 8,
    title: str = "",
    across: int | None = None,
) -> Figure:
    """A panel of images for every entry, under its name.

    Args:
        panels: images ``(N, channels, height, width)`` with one or three channels.
        high: the value that is drawn white (or in full colour); 0 is black.
        columns: images in a row of a panel.
        title: of the whole figure.
        across: panels beside each other; None puts all in one row.
    """
    rows = max(math.ceil(len(values) / columns) for values in panels.values())
    across = min(across or len(panels), len(panels))
    down = math.ceil(len(panels) / across)
    figure = canvas.new(3.0 * across, (3.0 * rows / columns + 0.35) * down + 0.35)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    for one, (name, values) in zip(axes, panels.items(), strict=False):
        one.imshow(_tiles(values / high, columns).numpy(), cmap="gray", vmin=0, vmax=1)
        one.set_title(name, fontsize=10)
        one.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure


def _tiles(values: Tensor, columns: int) -> Tensor:
    """Images in rows with a grey line between, ``(height, width)`` or with colours last."""
    if values.dim() != 4 or values.shape[1] not in (1, 3):
        raise ValueError(
            f"expected images (N, channels, height, width) with 1 or 3 channels, got "
            f"{tuple(values.shape)}"
        )
    values = torch.nn.functional.pad(values.detach().cpu().clamp(0, 1), (0, 1, 0, 1), value=0.5)
    missing = -len(values) % columns
    empty = torch.full_like(values[:1], 0.5).expand(missing, *values.shape[1:])
    grid = torch.cat([values, empty]).unflatten(0, (-1, columns))
    # rows and their pixels, columns and their pixels, colours
    picture = grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return picture.squeeze(-1)
