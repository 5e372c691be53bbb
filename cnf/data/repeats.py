"""Columns whose values repeat, and the noise that gives them a density."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from cnf.data.source import Numbers

# a continuous column repeats a number only by chance; these are far beyond it
_REPEATED = 0.05
_STANDING_OUT = 0.005


@dataclasses.dataclass(frozen=True)
class Repeats:
    """A column whose values repeat.

    Attributes:
        index: its place among the columns of the table.
        name: its name.
        step: its resolution, the smallest gap between two of its values.
        what: what is seen, for a message.
        lump: whether a single value stands out from an otherwise continuous column.
    """

    index: int
    name: str
    step: float
    what: str
    lump: bool = False


def find_repeats(
    values: Numbers, named: Sequence[tuple[int, str]], eps: float = 2.0**-52
) -> list[Repeats]:
    """The columns of whole numbers or of values that repeat more often than by chance.

    Args:
        values: ``(rows, columns)``, all finite.
        named: index and name of every column to look at.
        eps: the relative precision of the numbers; smaller gaps are taken for rounding errors.
    """
    found = (_look(values[:, index], index, name, eps) for index, name in named)
    return [repeats for repeats in found if repeats is not None]


def spread(
    values: Numbers, repeats: Sequence[Repeats], generator: torch.Generator | None = None
) -> Numbers:
    """Add uniform noise on (−step/2, step/2) to the columns that repeat.

    A probability P(k) becomes the density's integral over the cell around k, so the mean
    log-density of the column plus log(step) is a lower bound on the mean of log P.

    >>> import numpy as np
    >>> ages = np.array([[20.0], [21.0], [21.0]])
    >>> noisy = spread(ages, find_repeats(ages, [(0, "age")]), torch.Generator().manual_seed(0))
    >>> bool((noisy.round() == ages).all())
    True
    """
    values = values.copy()
    device = generator.device if generator is not None else torch.device("cpu")
    for found in repeats:
        noise = torch.rand(len(values), dtype=torch.float64, generator=generator, device=device)
        values[:, found.index] += found.step * (noise.cpu().numpy() - 0.5)
    return values


def _look(column: Numbers, index: int, name: str, eps: float) -> Repeats | None:
    distinct, counts = np.unique(column, return_counts=True)
    rows = len(column)
    if len(distinct) < 2:
        return None
    # floats as large as 1/eps have no fraction to show
    whole = bool((column == np.round(column)).all() and (np.abs(distinct) < 1 / eps).mean() > 0.5)
    rounding = 0.0 if whole else 8 * eps * float(np.abs(distinct[[0, -1]]).max())
    gaps = np.diff(distinct)
    step = float(gaps[gaps > rounding].min(initial=distinct[-1] - distinct[0]))
    step = float(f"{step:.12g}")  # 0.1, not 0.09999999999999987
    if whole:
        return Repeats(index, name, step, "whole numbers")
    repeated = 1 - len(distinct) / rows
    most = int(counts.argmax())
    share = counts[most] / rows
    stands_out = counts[most] >= 3 and share >= _STANDING_OUT
    # without its commonest value, does the column still repeat?
    rest = 1 - (len(distinct) - 1) / max(1, rows - counts[most])
    if stands_out and rest <= _REPEATED:
        what = f"{distinct[most]:g} in {share:.1%} of the rows"
        return Repeats(index, name, step, what, lump=True)
    if stands_out or repeated > _REPEATED:
        return Repeats(index, name, step, f"{len(distinct)} different values in {rows} rows")
    return None
