"""A network and the products of its Jacobian with tangents, in one pass forward and one back.

The fast path of fields made of affine layers. The value and its k tangents are the 1 + k blocks of
one matrix per layer, so that each layer is one product; the reverse pass is written out, so that it
is the same again, with no graph of small operations to build and walk. ``plain`` is the same map in
ordinary operations: the reference, and the path that derivatives of the derivatives take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.nets.products import linear
from cnf.nets.smooth import SMOOTH
from cnf.onednn import product

FEW = 4  # tangents that are summed one by one


def plain(
    activation: str,
    x: Tensor,
    tangents: Tensor | None,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """A network of affine layers at x, and Σ uᵀ J u over its tangents, or tr J.

    Args:
        activation: what stands between two layers, one of ``SMOOTH``.
        x: ``(rows, inputs)``.
        tangents: u, ``(k, rows, inputs)``; None means all unit vectors, whose sum is the trace.
        weights: of each layer, ``(outputs, inputs)``; at least two.
        shifts: of each layer, ``(outputs,)`` or ``(rows, outputs)``.

    Returns:
        The value ``(rows, inputs)`` and uᵀ J u, ``(k, rows)``; or tr J, ``(1, rows)``.
    """
    linearize = SMOOTH[activation].linearize
    carry = weights[0].T.unsqueeze(1) if tangents is None else linear(tangents, weights[0])
    h = linear(x, weights[0]) + shifts[0]
    for weight, shift in zip(weights[1:], shifts[1:], strict=True):
        y, slope = linearize(h)
        carry = carry * slope
        if weight is not weights[-1]:
            carry = linear(carry, weight)
        h = linear(y, weight) + shift
    close = weights[-1].unsqueeze(1) if tangents is None else tangents @ weights[-1]
    products = (carry * close).sum(-1)
    return h, products.sum(0, keepdim=True) if tangents is None else products


def fused(
    activation: str,
    x: Tensor,
    tangents: Tensor | None,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As ``plain``, fast; the tangents get no gradient."""
    return _Fused.apply(activation, len(weights), x, tangents, *weights, *shifts)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: str, count: int, x: Tensor, tangents: Tensor | None, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, shifts = layers[:count], layers[count:]
        first, *inner, last = weights
        linearize = SMOOTH[activation].linearize
        if tangents is None:
            carry, close = first.t().contiguous().unsqueeze(1), last.unsqueeze(1)
        else:
            carry, close = linear(tangents, first), torch.matmul(tangents, last)
        before: list[Tensor] = []  # of each activation: its arguments, and the carried tangents
        after: list[Tensor] = []
        slopes: list[Tensor] = []
        h = product(x, first.t(), shifts[0])
        for i in range(count - 1):
            stacked = h.new_empty(1 + close.shape[0], *h.shape)
            y, slope = linearize(h)
            stacked[0] = y
            torch.mul(carry, slope, out=stacked[1:])
            before += [h, carry]
            after.append(stacked)
            slopes.append(slope)
            if i < len(inner):
                block = product(stacked.flatten(0, 1), inner[i].t()).view(*stacked.shape[:2], -1)
                h, carry = block[0].add_(shifts[i + 1]), block[1:]
        value = product(stacked[0], last.t(), shifts[-1])
        products = _inner(stacked[1:], last) if tangents is None else (stacked[1:] * close).sum(-1)
        ctx.activation, ctx.count = activation, count
        ctx.save_for_backward(x, tangents, close, *layers, *before, *after, *slopes)
        return value, products

    @staticmethod
    def backward(ctx: Any, value: Tensor, products: Tensor) -> tuple[Any, ...]:
        n = ctx.count
        x, tangents, close, *rest = ctx.saved_tensors
        weights, shifts = rest[:n], rest[n : 2 * n]
        if torch.is_grad_enabled():
            grads = _again(ctx, value, products, x, tangents, [*weights, *shifts])
            return None, None, grads[0], None, *grads[1:]
        before, after, slopes = (
            rest[2 * n : 4 * n - 2],
            rest[4 * n - 2 : 5 * n - 3],
            rest[5 * n - 3 :],
        )
        weight_grads: list[Tensor] = []
        shift_grads: list[Tensor] = []
        last, stacked = weights[-1], after[-1]
        of_last = product(value.t(), stacked[0])
        if tangents is None:
            of_last += torch.matmul(products, stacked[1:]).squeeze(1)
        else:
            weighted = stacked[1:] * products.unsqueeze(-1)
            of_last += product(tangents.flatten(0, 1).t(), weighted.flatten(0, 1))
        weight_grads.append(of_last)
        shift_grads.append(_like(value, shifts[-1]))
        grad = torch.empty_like(stacked)
        grad[0] = product(value, last)
        torch.mul(close, products.unsqueeze(-1), out=grad[1:])
        pull_ = SMOOTH[ctx.activation].pull_
        for i in range(n - 2, -1, -1):
            h, carry, slope, weight = before[2 * i], before[2 * i + 1], slopes[i], weights[i]
            pull_(grad[0], _sum_of_products(grad[1:], carry), h, after[i][0], slope)
            grad[1:].mul_(slope)
            shift_grads.append(_like(grad[0], shifts[i]))
            if i:
                flat = grad.flatten(0, 1)
                weight_grads.append(product(flat.t(), after[i - 1].flatten(0, 1)))
                grad = product(flat, weight).view(*grad.shape[:2], -1)
        # the transposes of products with as few columns as x has, which are slow
        of_first = product(x.t(), grad[0]).t()
        if tangents is None:
            of_first += grad[1:].sum(1).t()
        else:
            of_first += product(tangents.flatten(0, 1).t(), grad[1:].flatten(0, 1)).t()
        weight_grads.append(of_first)
        layers = (*reversed(weight_grads), *reversed(shift_grads))
        return None, None, product(weights[0].t(), grad[0].t()).t(), None, *layers


def _again(
    ctx: Any,
    value: Tensor,
    products: Tensor,
    x: Tensor,
    tangents: Tensor | None,
    layers: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated once more."""
    inputs = [tensor.view_as(tensor) for tensor in (x, *layers)]
    found = plain(
        ctx.activation, inputs[0], tangents, inputs[1 : 1 + ctx.count], inputs[1 + ctx.count :]
    )
    used = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(found, used, (value, products), create_graph=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Σₖ aₖ ⊙ bₖ; for a few, without writing the products first."""
    if len(a) > FEW:
        return (a * b).sum(0)
    total = a[0] * b[0]
    for left, right in zip(a[1:], b[1:], strict=True):
        total.addcmul_(left, right)
    return total


def _inner(a: Tensor, rows: Tensor) -> Tensor:
    """Σₖ aₖ · rowₖ, ``(1, rows)``."""
    if len(a) > FEW:
        return (a * rows.unsqueeze(1)).sum((0, 2)).unsqueeze(0)
    total = torch.mv(a[0], rows[0])
    for matrix, row in zip(a[1:], rows[1:], strict=True):
        total.addmv_(matrix, row)
    return total.unsqueeze(0)


def _like(grad: Tensor, shift: Tensor) -> Tensor:
    return grad.sum(0) if shift.dim() == 1 else grad.clone()
