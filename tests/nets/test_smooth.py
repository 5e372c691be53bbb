"""The fast ways to tanh."""

import pytest
import torch

from cnf.nets import smooth
from cnf.tanh import _RationalTanh, quick_tanh, rational_tanh


def points() -> torch.Tensor:
    small = torch.logspace(-30, -1, 200)
    h = torch.cat((torch.linspace(0, 12, 100_001), small, torch.tensor([1e30, torch.inf])))
    return torch.cat((h, -h))


def test_rational_tanh_is_tanh_to_float32s_precision():
    h = points()
    y, truth = rational_tanh(h), torch.tanh(h.double())
    error = (y.double() - truth).abs()
    assert (error <= 4e-7 * truth.abs()).all()
    assert y.abs().max() <= 1
    assert rational_tanh(torch.tensor(torch.nan)).isnan()


def test_compiled_value_slope_and_derivatives_are_those_of_tanh():
    compiled = torch.compile(smooth.tanh, backend="aot_eager", fullgraph=True)
    h = torch.linspace(-9, 9, 181, requires_grad=True)
    y, slope = compiled(h)
    assert not torch.equal(y, torch.tanh(h))  # the rational one
    torch.testing.assert_close(y, torch.tanh(h), rtol=4e-7, atol=0)
    truth = torch.tanh(h)
    torch.testing.assert_close(slope, 1 - truth**2, rtol=0, atol=1e-6)
    (first,) = torch.autograd.grad(y.sum() + slope.sum(), h)
    torch.testing.assert_close(first, (1 - truth**2) * (1 - 2 * truth), rtol=0, atol=2e-6)


def test_uncompiled_and_float64_take_torchs_tanh():
    h = torch.linspace(-3, 3, 61)
    assert torch.equal(smooth.tanh(h)[0], torch.tanh(h))
    compiled = torch.compile(smooth.tanh, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(h.double())[0], torch.tanh(h.double()))


def test_rational_tanh_can_be_differentiated_twice():
    h = torch.linspace(-2, 2, 41, requires_grad=True)
    y = _RationalTanh.apply(h)
    (first,) = torch.autograd.grad(y.sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), h)
    truth = torch.tanh(h.detach())
    torch.testing.assert_close(second, -2 * truth * (1 - truth**2), rtol=0, atol=1e-6)


def test_many_numbers_without_a_gradient_are_tanh_to_the_last_digits():
    h = points()
    with torch.no_grad():
        y = quick_tanh(h)
        assert quick_tanh(torch.full((5000,), torch.nan)).isnan().all()
    assert not torch.equal(y, quick_tanh(h.requires_grad_()))  # the arrays' own
    truth = torch.tanh(h.detach().double())
    assert ((y.double() - truth).abs() <= 2e-7 * truth.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quick_tanh_of_many_numbers_compiles(dtype):
    h = torch.linspace(-9, 9, 1 << 16, dtype=dtype)
    found = torch.compile(quick_tanh, backend="aot_eager", fullgraph=True)(h)
    torch.testing.assert_close(found, torch.tanh(h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [5, 5000])
def test_tanh_takes_memory_only_where_it_may(count):
    h = torch.linspace(-3, 3, count)
    kept = h.clone()
    with torch.no_grad():
        y = quick_tanh(h)
        assert torch.equal(h, kept)
        assert quick_tanh(h, reuse=True).data_ptr() == h.data_ptr()
    assert torch.equal(h, y)
    kept.requires_grad_()
    torch.testing.assert_close(quick_tanh(kept, reuse=True), y)
    assert kept[0] == -3
