"""Block autoregressive transforms: structure, positivity, and the two directions."""

from __future__ import annotations

import pytest
import torch

from cnf.transforms import BlockAutoregressive

F64 = torch.float64


def block(features: int = 4, **options: int) -> BlockAutoregressive:
    generator = torch.Generator().manual_seed(0)
    return BlockAutoregressive(features, units=5, generator=generator, **options).double()


def test_jacobian_is_triangular_and_positive():
    transform = block()
    x = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform.inverse(x).value, x)
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.diagonal() > 0).all()
    assert (jacobian.tril(-1).abs().sum(1)[1:] > 0).all()
    expected = jacobian.diagonal().log().sum()
    torch.testing.assert_close(transform.inverse(x).log_det, expected)


def test_everything_is_reached():
    transform = block()
    far = torch.tensor([[-1e4, 1e4, -1e4, 1e4]], dtype=F64)
    x, log_det, _ = transform(far)
    torch.testing.assert_close(transform.inverse(x).value, far)
    assert log_det.isfinite().all()


def test_log_det_survives_saturated_units():
    transform = BlockAutoregressive(2, units=3)
    with torch.no_grad():
        for layer in transform.layers:
            layer.log_length += 4
    _, log_det, _ = transform.inverse(torch.full((2,), 1e3))
    assert log_det.isfinite()
    log_det.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in transform.parameters())


def test_gradients_pass_through_the_solved_direction():
    transform = block(3, context_features=2)
    z = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=F64)
    context = torch.ones(2, dtype=F64, requires_grad=True)
    x = transform(z, context).value
    back = torch.autograd.functional.jacobian(lambda x: transform.inverse(x, context).value, x)
    there = torch.autograd.functional.jacobian(lambda z: transform(z, context).value, z)
    torch.testing.assert_close(there @ back, torch.eye(3, dtype=F64))
    x.sum().backward()
    assert context.grad.abs().sum() > 0


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"expected \(\*batch, 4\), got \(3,\)"):
        block()(torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match="built with a context"):
        block(context_features=2).inverse(torch.zeros(4, dtype=F64))
    with pytest.raises(ValueError, match="at least 1"):
        BlockAutoregressive(2, units=0)
