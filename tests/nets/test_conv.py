from __future__ import annotations

import pytest
import torch

from cnf.nets import ConvNet, GatedAttention, ResNet

NETS = {
    "glow": lambda **more: ConvNet(3, 4, hidden=(8, 6), **more),
    "residual": lambda **more: ResNet(3, 4, hidden=(8, 8), **more),
    "attention": lambda **more: GatedAttention(3, 4, (4, 5), hidden=(8, 8), heads=2, **more),
}


@pytest.fixture(params=list(NETS), ids=str)
def make(request):
    return NETS[request.param]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images_may_have_any_batch_axes(make, batch, dtype):
    net = make(context_features=2, zero_last=False).to(dtype)
    x, context = torch.randn(*batch, 3, 4, 5, dtype=dtype), torch.randn(*batch, 2, dtype=dtype)
    y = net(x, context)
    assert y.shape == (*batch, 4, 4, 5)
    assert y.dtype == dtype
    if batch == (2, 3):
        torch.testing.assert_close(y[1, 2], net(x[1, 2], context[1, 2]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y[1], net(x[1], context[1, 0]), atol=9, rtol=9)


def test_a_context_may_have_fewer_batch_axes(make):
    net = make(context_features=2, zero_last=False).double()
    x, context = torch.randn(2, 3, 3, 4, 5).double(), torch.randn(2).double()
    torch.testing.assert_close(net(x, context), net(x, context.expand(2, 3, 2)))


def test_starts_at_zero_unless_told_otherwise(make):
    x = torch.randn(5, 3, 4, 5)
    assert torch.equal(make()(x), torch.zeros(5, 4, 4, 5))
    assert make(zero_last=False)(x).abs().sum() > 0


def test_everything_it_is_given_matters(make):
    net = make(context_features=2, zero_last=False).double()
    x = torch.randn(3, 4, 5).double().requires_grad_()
    context = torch.randn(2).double().requires_grad_()
    net(x, context).square().sum().backward()
    assert (x.grad != 0).all()
    assert (context.grad != 0).all()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_missing_context_and_another_image_are_named(make):
    net = make(context_features=2)
    with pytest.raises(ValueError, match=r"needs a context of shape \(\*batch, 2\), got none"):
        net(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"expected \(\*batch, 3, height, width\), got \(4, 5\)"):
        net(torch.zeros(4, 5))


def test_attention_reaches_every_pixel():
    net = GatedAttention(1, 1, (9, 9), hidden=(4,), heads=1, zero_last=False).double()
    x = torch.randn(1, 9, 9).double().requires_grad_()
    # the two 3×3 convolutions alone would see three pixels in each direction
    (corner,) = torch.autograd.grad(net(x)[0, 0, 0], x)
    assert corner[0, 8, 8] != 0


def test_attention_is_softmax_attention():
    net = GatedAttention(1, 1, (2, 2), hidden=(4,), heads=2)
    block = net.body[0].double()
    hidden = torch.randn(1, 2, 2, 4).double()
    pixels = (hidden + block.positions).reshape(4, 4)
    queries, keys, values = block.queries(pixels).chunk(3, -1)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        scores = queries[:, head] @ keys[:, head].T / 2**0.5
        heads.append(scores.softmax(-1) @ values[:, head])
    expected = torch.cat(heads, -1).reshape(1, 2, 2, 4)
    torch.testing.assert_close(block._attend(hidden), expected)


def test_residual_blocks_start_as_the_identity():
    net = ResNet(1, 1, hidden=(4, 4), activation="identity", zero_last=False).double()
    x = torch.randn(2, 1, 3, 3).double()
    torch.testing.assert_close(net(x), net.last(net.first(x)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvNet(1, 1, hidden=()), "positive numbers of channels"),
        (lambda: ResNet(1, 1, hidden=(4, 8)), "one width for all"),
        (lambda: GatedAttention(1, 1, (4, 4), hidden=(6,), heads=4), "divided among heads=4"),
    ],
)
def test_wrong_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
