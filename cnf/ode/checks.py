"""What is asked of the state and the times of an initial value problem."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from cnf.ode.guard import State
from cnf.ode.solver import MULTISTEP, Solver


def check_state(state: State) -> list[torch.Size]:
    """The shapes of its parts."""
    if isinstance(state, Tensor) or not state:
        raise TypeError("the state must be a tuple of tensors; wrap a single one as (x,)")
    dtypes, devices = {part.dtype for part in state}, {part.device for part in state}
    if len(dtypes) > 1 or len(devices) > 1 or not state[0].is_floating_point():
        raise TypeError(
            "the parts of the state must have one floating-point dtype and one device, got "
            f"{[str(dtype) for dtype in dtypes]} on {[str(device) for device in devices]}"
        )
    return [part.shape for part in state]


def check_times(times: Tensor, solver: Solver) -> list[float]:
    """The times as numbers."""
    if not isinstance(times, Tensor):
        raise TypeError(f"times must be a tensor, got {times!r}; make one by torch.tensor(times)")
    if times.dim() != 1 or not len(times) or not times.is_floating_point():
        raise ValueError(
            "times must be a one-dimensional floating-point tensor, got shape "
            f"{tuple(times.shape)} and dtype {times.dtype}"
        )
    if times.requires_grad:
        raise ValueError(
            "times cannot require grad; to learn the end time, scale the velocity's clock: "
            "T v(T t, x) on [0, 1]"
        )
    points = times.tolist()
    gaps = [end - start for start, end in pairwise(points)]
    still = all(gap == 0 for gap in gaps)
    steady = all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)
    if not all(map(math.isfinite, points)) or not (still or steady):
        raise ValueError(f"times must be finite and increase or decrease throughout, got {points}")
    if solver.method in MULTISTEP and gaps and max(gaps) - min(gaps) > 1e-4 * abs(sum(gaps)):
        raise ValueError(
            f"{solver.method!r} remembers earlier steps and needs evenly spaced times, got {points}"
        )
    return points
