from __future__ import annotations

import pytest
import torch

from cnf.bijections import Affine
from cnf.nets import ConvNet
from cnf.transforms import Chain, Checkerboard, Coupling, Inverse, Squeeze, channel_mask


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)], ids=str)
def test_squeeze_is_torchs_pixel_unshuffle(factor, batch):
    x = torch.randn(*batch, 2, 6, 12)
    z, log_det, costs = Squeeze(factor).inverse(x)
    assert z.shape == (*batch, *Squeeze(factor).latent_shape((2, 6, 12)))
    assert torch.equal(log_det, torch.zeros(batch))
    assert costs == {}
    if z.numel():
        assert torch.equal(z, torch.nn.functional.pixel_unshuffle(x, factor))
    assert torch.equal(Squeeze(factor)(z).value, x)


def test_a_checkerboard_has_two_colours():
    row, column = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    white, black = Checkerboard().inverse((row + column)[None] % 2).value
    assert (white == 0).all()
    assert (black == 1).all()
    x = torch.arange(12).reshape(1, 3, 4)
    assert Checkerboard().inverse(x).value[0].tolist() == [[0, 2], [5, 7], [8, 10]]


def test_a_coupling_inside_a_checkerboard_leaves_white_alone():
    coupling = Coupling(Affine(), ConvNet(1, 2, hidden=(4,), zero_last=False), channel_mask(2))
    transform = Chain([Inverse(Checkerboard()), coupling, Checkerboard()]).double()
    z = torch.randn(1, 4, 6).double()
    x = transform(z).value
    white = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    assert torch.equal(x[0, white], z[0, white])
    assert (x[0, ~white] != z[0, ~white]).all()
    assert transform.latent_shape((1, 4, 6)) == (1, 4, 6)
    # every black pixel sees its four white neighbours
    z.requires_grad_()
    (slope,) = torch.autograd.grad(transform(z).value[0, 1, 2], z)
    assert all(slope[0, r, c] != 0 for r, c in [(0, 2), (2, 2), (1, 1), (1, 3)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Squeeze(0), "at least 1, got 0"),
        (lambda: Squeeze().inverse(torch.zeros(1, 7, 8)), "7×8 cannot be squeezed by 2"),
        (lambda: Squeeze().forward(torch.zeros(3, 4, 4)), "4 channels into one, got 3 channels"),
        (
            lambda: Squeeze().forward(torch.zeros(4, 4)),
            r"\(channels, height, width\), got \(4, 4\)",
        ),
        (lambda: Checkerboard().inverse(torch.zeros(1, 8, 7)), "an even width, got images of 8×7"),
        (lambda: Checkerboard().forward(torch.zeros(1, 8, 8)), "as many white as black, got 1"),
        (lambda: Squeeze().trajectory(torch.zeros(4, 1, 1), torch.ones(1)), "cannot be stacked"),
    ],
)
def test_wrong_images_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
