"""Integration with Gauss–Legendre nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


@functools.cache
def gauss_legendre(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [0, 1]; exact for polynomials of degree 2·nodes − 1.

    >>> gauss_legendre(1)
    ((0.5,), (1.0,))
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(((points + 1) / 2).tolist()), tuple((weights / 2).tolist())


def integral(function: Callable[[Tensor], Tensor], end: Tensor, nodes: int) -> Tensor:
    """∫ function over [0, end], elementwise.

    Args:
        function: takes points ``(nodes, *shape)`` to values of that shape.
        end: the upper limits, ``(*shape)``.
        nodes: how many nodes to use.

    Returns:
        The integrals, ``(*shape)``.

    Example:
        >>> integral(lambda u: 3 * u**2, torch.tensor([1.0, 2.0]), 2)
        tensor([1., 8.])
    """
    points, weights = gauss_legendre(nodes)
    shape = (nodes, *(1,) * end.ndim)
    values = function(end * torch.tensor(points, dtype=end.dtype, device=end.device).view(shape))
    weight = torch.tensor(weights, dtype=end.dtype, device=end.device).view(shape)
    return end * (values * weight).sum(0)
