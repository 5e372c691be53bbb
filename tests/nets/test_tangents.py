"""The written-out pass against the plain one, and against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch

from cnf.nets.smooth import SMOOTH
from cnf.nets.tangents import fused, plain

SIZES = {"many": (6, 7, 6), "two layers": (3, 7, 3), "four layers": (3, 8, 6, 5, 3)}


def network(sizes, rows, per_row, activation):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x = normal(rows, sizes[0])
    pairs = list(itertools.pairwise(sizes))
    weights = [normal(outputs, inputs) for inputs, outputs in pairs]
    shifts = [normal(*((rows, size) if per_row else (size,))) for _, size in pairs]
    return x, weights, shifts


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
def test_values_and_gradients_are_those_of_the_plain_pass(activation, sizes, probes, per_row):
    x, weights, shifts = network(sizes, 5, per_row, activation)
    tangents = None if probes is None else torch.randn(probes, 5, sizes[0], dtype=torch.float64)
    inputs = [x, *weights, *shifts]
    found, expected = (f(activation, x, tangents, weights, shifts) for f in (fused, plain))
    cotangents = [torch.randn_like(part) for part in expected]
    for a, b in zip(
        [*found, *torch.autograd.grad(found, inputs, cotangents)],
        [*expected, *torch.autograd.grad(expected, inputs, cotangents)],
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_trace_is_that_of_autograd():
    x, weights, shifts = network((3, 8, 6, 3), 4, False, "silu")
    _, trace = plain("silu", x, None, weights, shifts)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: plain("silu", x, None, weights, shifts)[0].sum(0), x
    )
    assert torch.allclose(trace[0], torch.einsum("iri->r", jacobian))


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_second_derivatives_pass(activation):
    x, weights, shifts = network((2, 4, 3, 2), 2, False, activation)
    inputs = [x, *weights, *shifts]

    def call(x, *layers):
        return fused(activation, x, None, layers[:3], layers[3:])

    assert torch.autograd.gradgradcheck(call, inputs)


def test_no_rows():
    x, weights, shifts = network((2, 4, 2), 0, False, "tanh")
    value, trace = fused("tanh", x, None, weights, shifts)
    assert value.shape == (0, 2)
    assert trace.shape == (1, 0)
