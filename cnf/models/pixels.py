"""What flows of images are put together from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from cnf.bijections import Affine, FixedAffine, ScalarMap, Sigmoid
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.nets import MLP, ConvNet
from cnf.transforms import (
    ActNorm,
    Chain,
    Checkerboard,
    Convolution1x1,
    Coupling,
    Dequantize,
    Elementwise,
    Inverse,
    Transform,
    channel_mask,
)

Shape = tuple[int, ...]
#: From inputs, outputs and (height, width) to a conditioner.
MakeNet = Callable[[int, int, tuple[int, int]], nn.Module]

DEQUANTIZATIONS = ("none", "uniform", "variational")
NOISE_COUPLINGS = 4  # of the variational noise, as in Flow++


def channel_coupling(
    scalar_map: ScalarMap, shape: Shape, net: MakeNet, flip: bool = False
) -> Transform:
    """A coupling that transforms the later half of the channels, with ``flip`` the earlier."""
    channels, height, width = shape
    mask = channel_mask(channels, flip)
    kept, changed = int((~mask).sum()), int(mask.sum())
    return Coupling(scalar_map, net(kept, changed * scalar_map.size, (height, width)), mask)


def channel_steps(
    scalar_map: ScalarMap, shape: Shape, count: int, net: MakeNet, *, mix: bool
) -> Iterator[Transform]:
    """Couplings of alternating halves, each normalised, with ``mix`` after a 1×1 convolution."""
    for step in range(count):
        yield channel_coupling(scalar_map, shape, net, flip=step % 2 == 1)
        if mix:
            yield Convolution1x1.random(shape[0])
        yield ActNorm(shape)


def checkerboard_steps(
    scalar_map: ScalarMap, shape: Shape, count: int, net: MakeNet, *, mix: bool
) -> list[Transform]:
    """The same where the halves are the colours of a checkerboard."""
    inner = Checkerboard().latent_shape(shape)
    steps = channel_steps(scalar_map, inner, count, net, mix=mix)
    return [Inverse(Checkerboard()), *steps, Checkerboard()]


def flow_of(
    core: Sequence[Transform],
    event_shape: Shape,
    *,
    context_features: int,
    dequantize: str,
    bins: int,
    margin: float | None,
    hidden: tuple[int, ...],
) -> Flow:
    """The flow of these transforms, with what dequantised data needs at its end.

    Args:
        core: the transforms, in the order in which ``forward`` applies them.
        event_shape: of the data.
        context_features: size of the context.
        dequantize: ``"none"``, ``"uniform"`` or ``"variational"``.
        bins: how many values an entry of the data has.
        margin: of the logit; None leaves the logit out and centres the data instead.
        hidden: channels of the networks of the variational noise.
    """
    if dequantize not in DEQUANTIZATIONS:
        raise ValueError(
            f"dequantize must be one of {', '.join(DEQUANTIZATIONS)}, got {dequantize!r}"
        )
    ends: list[Transform] = []
    if dequantize != "none":
        noise = None
        if dequantize == "variational":
            noise = _noise(event_shape, context_features, hidden)
        if margin is None:
            centred = FixedAffine(shift=bins / 2, scale=bins)
            ends = [Elementwise(centred, event_shape)]
        else:
            maps = (Sigmoid(margin=margin), FixedAffine(scale=bins))
            ends = [Elementwise(scalar_map, event_shape) for scalar_map in maps]
        ends.append(Dequantize(event_shape, bins, noise))
    transform = Chain([*core, *ends])
    return Flow(
        transform,
        Normal(transform.latent_shape(event_shape)),
        event_shape=event_shape,
        context_features=context_features,
        standardize=dequantize == "none",
    )


def _noise(event_shape: Shape, context_features: int, hidden: tuple[int, ...]) -> Transform:
    """Affine couplings of the noise, of one half after the other, given x and the other half."""
    affine, size = Affine(bound=3.0), event_shape[0]
    couplings: list[Transform] = []
    for step in range(NOISE_COUPLINGS):
        if len(event_shape) == 1:
            place = torch.arange(2 * size)
            mask = (place >= size) & ((place % 2 == step % 2) | (size == 1))
        else:
            # the channels are those of x and of the noise in white, then both in black
            mask = (torch.arange(4 * size) // size == 1 + 2 * (step % 2))[:, None, None]
        kept, outputs = int((~mask).sum()), int(mask.sum()) * affine.size
        net = (MLP if len(event_shape) == 1 else ConvNet)(
            kept, outputs, hidden=hidden, context_features=context_features
        )
        couplings.append(Coupling(affine, net, mask))
    if len(event_shape) == 1:
        return Chain(couplings)
    return Chain([Inverse(Checkerboard()), *couplings, Checkerboard()])
