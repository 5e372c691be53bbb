"""The same numbers as nflows and zuko, where they are installed."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.bijections import Affine, RationalQuadratic


def knots(widths: torch.Tensor, bound: float) -> torch.Tensor:
    """The edges of nflows' bins."""
    shares = 1e-3 + (1 - 1e-3 * widths.shape[-1]) * torch.softmax(widths, -1)
    edges = torch.cumsum(shares, -1)
    return torch.nn.functional.pad(2 * bound * edges - bound, (1, 0), value=-bound)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("tails", ["linear", "interval"])
def test_nflows_spline(direction, tails):
    splines = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    bins, bound, n = 8, 3.0, 4000
    spline = RationalQuadratic(bins, bound, tails, form="nflows")
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(n, spline.size, generator=generator, dtype=torch.float64)
    widths, heights, slopes = parameters.split([bins, bins, spline.size - 2 * bins], -1)
    value = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    # every kind of edge: inner knots, and the ends of the interval
    edges = knots(widths if direction == "forward" else heights, bound)
    value[:900] = edges[:100].flatten()
    backward = direction == "inverse"
    if tails == "linear":
        expected = splines.unconstrained_rational_quadratic_spline(
            value, widths, heights, slopes, inverse=backward, tail_bound=bound
        )
    else:
        value = value.clamp(-bound, bound)
        expected = splines.rational_quadratic_spline(
            value,
            widths,
            heights,
            slopes,
            inverse=backward,
            left=-bound,
            right=bound,
            bottom=-bound,
            top=bound,
        )
    mapped = getattr(spline, direction)(value, parameters)
    for ours, theirs in zip(mapped, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_zuko_spline(direction):
    transforms = pytest.importorskip("zuko.transforms")
    bins = 8
    spline = RationalQuadratic(bins, form="zuko")
    generator = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(4000, spline.size, generator=generator, dtype=torch.float64)
    value = 3 * torch.randn(4000, generator=generator, dtype=torch.float64)
    theirs = transforms.MonotonicRQSTransform(*parameters.split([bins, bins, bins - 1], -1))
    theirs = theirs if direction == "forward" else theirs.inv
    mapped, log_derivative = getattr(spline, direction)(value, parameters)
    torch.testing.assert_close(mapped, theirs(value), rtol=0, atol=1e-8)
    expected = theirs.log_abs_det_jacobian(value, theirs(value))
    torch.testing.assert_close(log_derivative, expected, rtol=0, atol=1e-8)


def test_zuko_affine():
    transforms = pytest.importorskip("zuko.transforms")
    generator = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(100, 2, generator=generator, dtype=torch.float64)
    value = torch.randn(100, generator=generator, dtype=torch.float64)
    theirs = transforms.MonotonicAffineTransform(parameters[:, 0], parameters[:, 1])
    ours, log_derivative = Affine(bound=math.log(1e3), scale="softclip").forward(value, parameters)
    torch.testing.assert_close(ours, theirs(value))
    torch.testing.assert_close(log_derivative, theirs.log_abs_det_jacobian(value, ours))


def test_nflows_affine():
    coupling = pytest.importorskip("nflows.transforms.coupling")
    generator = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(100, 4, generator=generator, dtype=torch.float64)
    value = torch.randn(100, 4, generator=generator, dtype=torch.float64)

    class Constant(torch.nn.Module):
        def forward(self, value, context=None):
            return parameters  # all shifts, then all raw scales

    theirs = coupling.AffineCouplingTransform(torch.tensor([0, 0, 1, 1]), lambda *_: Constant())
    expected, log_det = theirs(value)
    raw = torch.stack([parameters[:, :2], parameters[:, 2:]], -1)
    ours, log_derivative = Affine(scale="sigmoid").forward(value[:, 2:], raw)
    torch.testing.assert_close(ours, expected[:, 2:])
    torch.testing.assert_close(log_derivative.sum(-1), log_det)
