from __future__ import annotations

import math

import pytest
import torch

from cnf.bijections import Affine
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.nets import ConvNet
from cnf.transforms import (
    ActNorm,
    BatchNorm,
    Chain,
    Coupling,
    Dequantize,
    Diagonal,
    Inverse,
    Multiscale,
    Request,
    Squeeze,
    channel_mask,
)


def squeezes(levels: int = 2, shape: tuple[int, ...] = (1, 4, 4)) -> Multiscale:
    return Multiscale([Squeeze() for _ in range(levels)], shape)


def test_half_of_the_channels_leaves_after_every_level_but_the_last():
    multiscale = squeezes(3, (3, 8, 8))
    assert multiscale.leave == [(6, 4, 4), (12, 2, 2)]
    assert multiscale.stay == [(6, 4, 4), (12, 2, 2), (48, 1, 1)]
    x = torch.randn(2, 5, 3, 8, 8)
    z, log_det, _ = multiscale.inverse(x)
    assert z.shape == (2, 5, 192)
    assert torch.equal(z.sort(-1).values, x.flatten(-3).sort(-1).values)
    assert torch.equal(log_det, torch.zeros(2, 5))
    squeezed = Squeeze().inverse(x).value
    assert torch.equal(z[..., :96], squeezed[..., 6:, :, :].flatten(-3))
    assert torch.equal(multiscale(z).value, x)


def test_one_level_only_flattens():
    x = torch.randn(1, 3, 3)
    multiscale = Multiscale([ActNorm((1, 3, 3))], (1, 3, 3))
    assert torch.equal(multiscale.inverse(x).value, x.flatten())


def test_odd_channels_leave_the_larger_part():
    multiscale = Multiscale([ActNorm((3, 2, 2)), ActNorm((1, 2, 2))], (3, 2, 2))
    assert (multiscale.stay, multiscale.leave) == ([(1, 2, 2), (1, 2, 2)], [(2, 2, 2)])
    z = torch.randn(12)
    assert torch.equal(multiscale.inverse(multiscale(z).value).value, z)


def test_log_determinants_add_over_what_each_level_sees():
    shapes = [(4, 2, 2), (8, 1, 1)]
    multiscale = Multiscale([Chain([ActNorm(shape), Squeeze()]) for shape in shapes], (1, 4, 4))
    with torch.no_grad():
        for level, scale in zip(multiscale.levels, (2.0, 3.0), strict=True):
            level[0].log_scale.fill_(math.log(scale))
    expected = 16 * math.log(2) + 8 * math.log(3)
    x, log_det, _ = multiscale(torch.zeros(5, 16))
    torch.testing.assert_close(log_det, torch.full((5,), expected))
    torch.testing.assert_close(multiscale.inverse(x).log_det, torch.full((5,), -expected))


def test_a_coupling_before_the_split_is_a_conditional_normal_prior():
    # p(stay) is standard normal, p(leave | stay) = N(b(stay), exp(s(stay))²)
    prior = Coupling(Affine(), ConvNet(2, 4, hidden=(4,), zero_last=False), channel_mask(4))
    multiscale = Multiscale([prior, ActNorm((2, 2, 2))], (4, 2, 2))
    flow = Flow(multiscale, Normal(16), event_shape=(4, 2, 2)).double()
    x = torch.randn(7, 4, 2, 2).double()
    stay, leave = x.chunk(2, -3)
    parameters = prior.conditioner(stay).unflatten(-3, (2, 2))
    shift, log_scale = parameters[..., 0, :, :], parameters[..., 1, :, :]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(stay).sum((-3, -2, -1))
    given = torch.distributions.Normal(shift, log_scale.exp())
    expected = expected + given.log_prob(leave).sum((-3, -2, -1))
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_initialize_reaches_every_level():
    shapes = [(4, 2, 2), (8, 1, 1)]
    multiscale = Multiscale([Chain([ActNorm(shape), Squeeze()]) for shape in shapes], (1, 4, 4))
    x = 5 + 3 * torch.randn(500, 1, 4, 4)
    multiscale.initialize(x)
    z = multiscale.inverse(x).value
    assert z.mean().abs() < 1e-3
    torch.testing.assert_close(z.std(), torch.tensor(1.0), atol=1e-2, rtol=0)


def test_initialize_draws_noise_from_the_request():
    chain = Chain([ActNorm((2,)), Dequantize((2,), bins=4)])
    x = torch.randint(0, 4, (50, 2)).float()
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        chain.initialize(x, request=Request(generator=torch.Generator().manual_seed(1)))
        found.append(chain[0].loc.clone())
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), state)


def test_is_what_its_levels_are():
    assert squeezes().bijective
    assert squeezes().exact
    trained = Multiscale([BatchNorm((1, 4, 4)).train()], (1, 4, 4))
    assert not trained.bijective
    assert not trained.exact
    assert Inverse(squeezes()).data_shape((1, 4, 4)) == (16,)
    assert Inverse(squeezes()).latent_shape((16,)) == (1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Multiscale([], (1, 4, 4)), "at least one level"),
        (lambda: squeezes(3), "1×1 cannot be squeezed"),
        (lambda: Multiscale([ActNorm((1, 4, 4))] * 2, (1, 4, 4)), "one channel cannot be divided"),
        (lambda: squeezes(shape=(4, 4)), r"an image has shape \(channels, height, width\)"),
        (lambda: squeezes().forward(torch.zeros(15)), r"expected \(\*batch, 16\), got \(15,\)"),
        (lambda: squeezes().inverse(torch.zeros(1, 4, 8)), r"expected \(\*batch, 1, 4, 4\)"),
        (lambda: squeezes().latent_shape((1, 8, 8)), r"built for \(1, 4, 4\), got \(1, 8, 8\)"),
        (lambda: squeezes().trajectory(torch.zeros(16), torch.ones(1)), "cannot be stacked"),
        (
            lambda: Chain([Diagonal(16), squeezes()]).trajectory(torch.zeros(16), torch.ones(1)),
            "cannot be stacked",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
