"""Linear maps, in the orientation that BLAS is fast in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from cnf.compiling import by_columns

# Columns below which a product can take several times as long as its transpose; MKL's did from 2
# to 8 columns (`python -m benchmarks products`), one column being a matter of its own.
FEW = 10
# Rows from which that is more than what choosing the other orientation costs.
MANY = 256


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, columns: bool = True
) -> Tensor:
    """The linear map x Wᵀ + b, whose gradients are products as fast as itself.

    Args:
        x: ``(*batch, inputs)``.
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``.
        columns: compile it by columns where that pays; not where large products of rows follow.

    Returns:
        ``(*batch, outputs)``.

    Example:
        >>> import torch
        >>> linear(torch.ones(5, 2), torch.ones(3, 2)).shape
        torch.Size([5, 3])
    """
    if columns and by_columns(x) and x.dim() == 2:
        value = weight @ x.t()
        # minus, because compilers make a sum part of the product, which writes the bias out first
        return value.t() if bias is None else (value - (-bias).unsqueeze(-1)).t()
    inputs = weight.shape[1]
    few = 1 < inputs < FEW and weight.stride(0) > 1 and torch.is_grad_enabled()
    if few and (torch.compiler.is_compiling() or x.numel() >= MANY * inputs):
        # torch derives the gradients' orientations from how the weight lies in memory
        weight = weight.t().contiguous().t()
    return apply_linear(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``linear``.

    >>> Linear(2, 3)(torch.ones(5, 2)).shape
    torch.Size([5, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)
