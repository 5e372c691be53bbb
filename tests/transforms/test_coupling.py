from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from cnf.bijections import Additive, Affine, RationalQuadratic
from cnf.nets import MLP
from cnf.transforms import Coupling, Elementwise, alternating_mask, half_mask, random_mask

BATCHES = [(), (5,), (2, 3), (0,)]
MAPS = [Additive(), Affine(bound=3.0), RationalQuadratic(bins=4)]
MASKS = {
    "half": half_mask(5),
    "half-flipped": half_mask(5, flip=True),
    "alternating": alternating_mask(5),
    "one transformed": torch.arange(5) == 2,
    "one untouched": torch.arange(5) != 2,
}


class Constant(nn.Module):
    """A conditioner that always answers the same."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", torch.tensor(values))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.values.expand(*x.shape[:-1], -1)


def build(scalar_map, mask, context_features=0, identity_map=None):
    net = MLP(
        int((~mask).sum()),
        int(mask.sum()) * scalar_map.size,
        hidden=(8,),
        context_features=context_features,
        activation="tanh",
        zero_last=False,
    )
    return Coupling(scalar_map, net, mask, identity_map).double()


def check_both_ways(coupling, features=5, context_features=0):
    for batch in BATCHES:
        z = torch.randn(*batch, features).double()
        context = torch.randn(*batch, context_features).double() if context_features else None
        x, log_det, costs = coupling(z, context)
        back = coupling.inverse(x, context)
        assert x.shape == z.shape
        assert log_det.shape == back.log_det.shape == batch
        assert costs == back.costs == {}
        torch.testing.assert_close(back.value, z, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(back.log_det, -log_det, atol=1e-9, rtol=1e-9)
        if batch == ():
            for function, point, expected in [
                (coupling.forward, z, log_det),
                (coupling.inverse, x, back.log_det),
            ]:
                matrix = jacobian(lambda v, f=function, c=context: f(v, c).value, point)
                torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, expected)


@pytest.mark.parametrize("scalar_map", MAPS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("context_features", [0, 2])
def test_both_directions_and_their_jacobians(scalar_map, mask, context_features):
    coupling = build(scalar_map, mask, context_features)
    check_both_ways(coupling, context_features=context_features)


def test_the_textbook_example():
    coupling = Coupling(Affine(), Constant([2.0, 0.5]), half_mask(2))
    x, log_det, _ = coupling(torch.tensor([1.0, 3.0]))
    assert [round(number, 3) for number in x.tolist()] == [1.0, 6.946]
    assert log_det.item() == 0.5


def test_the_mask_says_what_is_transformed():
    mask = torch.tensor([True, False, False, True])
    coupling = build(Additive(), mask)
    z = torch.randn(4).double()
    moved = coupling(z).value != z
    assert torch.equal(moved, mask)


def test_starts_as_the_identity_and_learns():
    mask = half_mask(4)
    coupling = Coupling(Affine(), MLP(2, 4), mask)
    z = torch.randn(3, 4)
    x, log_det, _ = coupling(z)
    assert torch.equal(x, z)
    assert (log_det == 0).all()
    (coupling.inverse(z).value.square().sum() - log_det.sum()).backward()
    assert coupling.conditioner.layers[-1].weight.grad.abs().sum() > 0


def test_the_identity_map_transforms_the_other_part():
    spline = RationalQuadratic(bins=4)
    other = Elementwise(spline, (2,))
    nn.init.normal_(other.values)
    coupling = build(Affine(bound=3.0), half_mask(5), identity_map=other)
    check_both_ways(coupling)
    z = torch.randn(7, 5).double()
    torch.testing.assert_close(coupling(z).value[:, :2], other(z[:, :2]).value)


def test_the_identity_map_may_take_the_context():
    other = Elementwise(Affine(), (2,), MLP(3, 4, zero_last=False))
    coupling = build(Affine(), half_mask(5), context_features=3, identity_map=other)
    check_both_ways(coupling, context_features=3)


def test_a_conditioner_may_give_parameters_feature_by_feature():
    class Unflat(MLP):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(x, context).unflatten(-1, (3, 2))

    net = Unflat(2, 6, zero_last=False)
    flat = MLP(2, 6)
    flat.load_state_dict(net.state_dict())
    z = torch.randn(7, 5)
    one, two = (Coupling(Affine(), conditioner, half_mask(5)) for conditioner in (net, flat))
    assert torch.equal(one(z).value, two(z).value)


def test_gradients_reach_inputs_context_and_parameters():
    coupling = build(RationalQuadratic(bins=4), alternating_mask(3), context_features=2)
    z = torch.randn(4, 3).double().requires_grad_()
    context = torch.randn(4, 2).double().requires_grad_()
    for function in (coupling.forward, coupling.inverse):
        assert torch.autograd.gradcheck(lambda v, c, f=function: f(v, c)[:2], (z, context))
    mapped = coupling(z, context)
    grads = torch.autograd.grad(mapped.value.sum() + mapped.log_det.sum(), coupling.parameters())
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_masks():
    assert half_mask(5).tolist() == [False, False, True, True, True]
    assert half_mask(5, flip=True).tolist() == [True, True, False, False, False]
    assert alternating_mask(3).tolist() == [False, True, False]
    assert alternating_mask(3, flip=True).tolist() == [True, False, True]
    masks = [random_mask(9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert {int(mask.sum()) for mask in masks} == {5}


def test_a_random_mask_travels_with_the_state():
    generator = torch.Generator().manual_seed(0)
    one, two = (build(Affine(), random_mask(9, generator)) for _ in range(2))
    z = torch.randn(9).double()
    assert not torch.equal(one(z).value, two(z).value)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(z).value, two(z).value)


@pytest.mark.parametrize("mask", [[True], [False], [True, True], [False, False]])
def test_a_mask_without_two_parts_is_refused(mask):
    with pytest.raises(ValueError, match="use Elementwise with a conditioner"):
        Coupling(Affine(), MLP(1, 2), torch.tensor(mask))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="a coupling mask is boolean"):
        Coupling(Affine(), MLP(1, 2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"must return shape \(7, 6\), got \(7, 4\)"):
        Coupling(Affine(), MLP(2, 4), half_mask(5))(torch.randn(7, 5))
    with pytest.raises(ValueError, match="built for 5 features"):
        Coupling(Affine(), MLP(2, 6), half_mask(5))(torch.randn(7, 4))


def test_its_repr_says_what_it_is():
    text = repr(Coupling(Additive(), MLP(2, 3), half_mask(5)))
    assert "Additive(), features=5, transformed=3" in text
