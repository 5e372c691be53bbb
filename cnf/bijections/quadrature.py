"""Integration with Gauss–Legendre nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rule = tuple[tuple[float, ...], tuple[float, ...]]
"""Nodes and weights on [0, 1]."""


def gauss_legendre(nodes: int) -> Rule:
    """Nodes and weights on [0, 1]; exact for polynomials of degree 2·nodes − 1.

    >>> gauss_legendre(1)
    ((0.5,), (1.0,))
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(((points + 1) / 2).tolist()), tuple((weights / 2).tolist())


def integral(function: Callable[[Tensor], Tensor], end: Tensor, rule: Rule) -> Tensor:
    """∫ function over [0, end], elementwise.

    Args:
        function: takes points ``(nodes, *shape)`` to values of that shape.
        end: the upper limits, ``(*shape)``.
        rule: of ``gauss_legendre``, made once, where no compiler traces it.

    Returns:
        The integrals, ``(*shape)``.

    Example:
        >>> integral(lambda u: 3 * u**2, torch.tensor([1.0, 2.0]), gauss_legendre(2))
        tensor([1., 8.])
    """
    points, weights = rule
    shape = (len(points), *(1,) * end.ndim)
    values = function(end * torch.tensor(points, dtype=end.dtype, device=end.device).view(shape))
    weight = torch.tensor(weights, dtype=end.dtype, device=end.device).view(shape)
    return end * (values * weight).sum(0)
