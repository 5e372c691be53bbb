"""RealNVP, Glow and Flow++: coupling flows of vectors and of images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cnf.bijections import Affine, Inverted, LogisticMixture, ScalarMap
from cnf.distributions import as_shape
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import coupling_layers, interleaved
from cnf.models.pixels import (
    MakeNet,
    Shape,
    channel_coupling,
    channel_steps,
    checkerboard_steps,
    flow_of,
)
from cnf.nets import MLP, ConvNet, GatedAttention, ResNet
from cnf.registry import MODELS
from cnf.transforms import (
    ActNorm,
    Chain,
    Elementwise,
    LULinear,
    Multiscale,
    Squeeze,
    Transform,
)


@MODELS.register(paper="Dinh et al., RealNVP, ICLR 2017", family="coupling")
@framed
def realnvp(
    features: int | Sequence[int],
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bound: float | None = None,
    levels: int = 2,
    dequantize: str = "none",
    bins: int = 256,
    margin: float | None = 0.05,
) -> Flow:
    """RealNVP: affine couplings, x_B = z_B ⊙ exp(s(x_A)) + b(x_A).

    For images: on every level half of the couplings split the pixels like a checkerboard and, after
    a squeeze, half of them the channels, of which half then leaves; the last level has the
    checkerboard and one coupling more. ActNorm stands where the paper has batch normalisation.
    In two dimensions it starts as the identity.

    Args:
        features: D, the size of one x; for images ``(channels, height, width)``.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of couplings; for images on each level, where the paper has 6.
        hidden: sizes of the hidden layers of each coupling's network; for images, channels of the
            blocks of its residual network (the paper: four or eight of 64 or 32).
        activation: of the networks.
        bound: the log-scale is bounded smoothly to (-bound, bound); None takes 3, for images 1.
        levels: of an image; the paper goes down to 4×4 pixels.
        dequantize: ``"none"`` for continuous x; ``"uniform"`` or ``"variational"`` for integers.
        bins: the integers are 0, …, bins - 1.
        margin: integers are scaled to [margin, 1 - margin] and a logit taken; None for no logit.

    Paper: Dinh et al., "Density estimation using Real NVP", ICLR 2017.

    Example:
        >>> import torch
        >>> realnvp(3, context_features=2).sample((5,), torch.zeros(4, 2)).shape
        torch.Size([5, 4, 3])
        >>> realnvp((1, 8, 8), hidden=(8,), dequantize="uniform").sample((5,)).shape
        torch.Size([5, 1, 8, 8])
    """
    shape = as_shape(features)
    affine = _affine(shape, bound)
    core: list[Transform]
    if len(shape) == 1:
        # from zero, networks learned 0.05 to 0.2 nats less of tables, but more of a checkerboard
        core = coupling_layers(
            affine,
            shape[0],
            layers,
            hidden,
            context_features,
            activation,
            zero_last=shape[0] == 2,
        )
        core += interleaved(shape[0])
    else:
        core = [
            _realnvp_levels(affine, shape, layers, hidden, context_features, activation, levels)
        ]
    return flow_of(
        core,
        shape,
        context_features=context_features,
        dequantize=dequantize,
        bins=bins,
        margin=margin,
        hidden=hidden,
    )


def _realnvp_levels(
    scalar_map: ScalarMap,
    event_shape: Shape,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
    levels: int,
) -> Transform:
    def net(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
        return ResNet(
            inputs,
            outputs,
            hidden=hidden,
            activation=activation,
            context_features=context_features,
        )

    parts, shape, half = [], event_shape, (layers + 1) // 2
    for level in range(levels):
        if level + 1 == levels:
            parts.append(Chain(checkerboard_steps(scalar_map, shape, half + 1, net, mix=False)))
            continue
        first = checkerboard_steps(scalar_map, shape, half, net, mix=False)
        shape = Squeeze().latent_shape(shape)
        second = channel_steps(scalar_map, shape, layers - half, net, mix=False)
        parts.append(Chain([*second, Squeeze(), *first]))
        shape = (shape[0] // 2, *shape[1:])
    return Multiscale(parts, event_shape)


@MODELS.register(paper="Kingma & Dhariwal, Glow, NeurIPS 2018", family="coupling")
@framed
def glow(
    features: int | Sequence[int],
    *,
    context_features: int = 0,
    levels: int = 2,
    depth: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bound: float | None = None,
    dequantize: str = "none",
    bins: int = 256,
    margin: float | None = 0.05,
) -> Flow:
    """Glow: steps of ActNorm, 1×1 convolution and affine coupling, on several levels.

    What leaves after a level goes through a learned normal prior given what stays; the base stays
    a standard normal, so that ``flow.sample((16,), temperature=0.7)`` is the paper's.

    Args:
        features: ``(channels, height, width)``; D for a vector, which has one level.
        context_features: size of the context, 0 for an unconditional density.
        levels: L; each halves height and width. The paper has 3 on CIFAR-10.
        depth: K, steps on each level. The paper has 32.
        hidden: channels of the hidden layers of each network. The paper has (512, 512).
        activation: of the networks.
        bound: the log-scale is bounded smoothly to (-bound, bound); None takes 3, for images 1.
        dequantize: ``"none"`` for continuous x; ``"uniform"`` (the paper's) or ``"variational"``
            for integers.
        bins: the integers are 0, …, bins - 1.
        margin: integers are scaled to [margin, 1 - margin] and a logit taken, which helps where
            many lie at an end; None (the paper's) only centres them.

    Paper: Kingma & Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018.

    Example:
        >>> import torch
        >>> flow = glow((1, 8, 8), depth=2, hidden=(8, 8), dequantize="uniform", bins=17)
        >>> flow.sample((5,), temperature=0.7).shape
        torch.Size([5, 1, 8, 8])
        >>> flow.encode(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 64])
    """
    shape = as_shape(features)
    affine = _affine(shape, bound)
    if len(shape) == 1:
        couplings = coupling_layers(affine, shape[0], depth, hidden, context_features, activation)
        core = [*_mixed(couplings, shape[0]), *interleaved(shape[0])]
    else:
        core = [_glow_levels(affine, shape, levels, depth, hidden, context_features, activation)]
    return flow_of(
        core,
        shape,
        context_features=context_features,
        dequantize=dequantize,
        bins=bins,
        margin=margin,
        hidden=hidden,
    )


def _glow_levels(
    scalar_map: ScalarMap,
    event_shape: Shape,
    levels: int,
    depth: int,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
) -> Transform:
    def net(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
        return ConvNet(
            inputs,
            outputs,
            hidden=hidden,
            activation=activation,
            context_features=context_features,
        )

    parts, shape = [], event_shape
    for level in range(levels):
        shape = Squeeze().latent_shape(shape)
        steps = channel_steps(scalar_map, shape, depth, net, mix=True)
        prior = channel_coupling(scalar_map, shape, net)
        if level + 1 == levels:
            prior = _top_prior(scalar_map, shape, hidden, context_features, activation)
        parts.append(Chain([prior, *steps, Squeeze()]))
        shape = (shape[0] // 2, *shape[1:])
    return Multiscale(parts, event_shape)


def _top_prior(
    scalar_map: ScalarMap,
    shape: Shape,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
) -> Transform:
    """Mean and scale of each channel that passes all levels; given a context, of each entry."""
    if not context_features:
        return ActNorm(shape)
    outputs = shape[0] * shape[1] * shape[2] * scalar_map.size
    net = MLP(context_features, outputs, hidden=hidden, activation=activation)
    return Elementwise(scalar_map, shape, net)


@MODELS.register(paper="Ho et al., Flow++, ICML 2019", family="coupling")
@framed
def flowpp(
    features: int | Sequence[int],
    *,
    context_features: int = 0,
    layers: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "elu",
    components: int = 8,
    heads: int = 4,
    bound: float = 3.0,
    dequantize: str = "none",
    bins: int = 256,
    margin: float | None = 0.05,
) -> Flow:
    """Flow++: couplings by the CDF of a logistic mixture, a logit and an affine map.

    z_B = logit(Σ π_k σ((x_B - μ_k) / s_k)) exp(a) + b, all parameters from x_A; this direction is
    closed, sampling solves it numerically. For images: ``layers`` couplings on a checkerboard, a
    squeeze, half as many by channels, and ``layers - 1`` on a checkerboard, all conditioned by
    gated attention, each normalised and mixed by a 1×1 convolution.

    Args:
        features: D, the size of one x; for images ``(channels, height, width)``.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of couplings, for images as above: the paper's 4, 2 and 3 come of 4.
        hidden: sizes of the hidden layers of each coupling's network; for images, channels of the
            blocks of its attention network (the paper: ten of 96).
        activation: of the networks.
        components: K, logistic distributions in a mixture. The paper has 32.
        heads: of the attention, which divide its channels (images only).
        bound: log-scales are bounded smoothly to (-bound, bound).
        dequantize: ``"none"`` for continuous x; ``"uniform"`` or ``"variational"`` (the paper's)
            for integers.
        bins: the integers are 0, …, bins - 1.
        margin: integers are scaled to [margin, 1 - margin] and a logit taken; None for no logit.

    Paper: Ho et al., "Flow++: Improving flow-based generative models with variational
    dequantization and architecture design", ICML 2019.

    Example:
        >>> import torch
        >>> flowpp(3).log_prob(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5])
        >>> flow = flowpp((1, 8, 8), layers=2, hidden=(8,), dequantize="variational")
        >>> flow.log_prob(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5])
    """
    shape, mixture = as_shape(features), Inverted(LogisticMixture(components, bound))
    if len(shape) == 1:
        couplings = coupling_layers(mixture, shape[0], layers, hidden, context_features, activation)
        core = [*_mixed(couplings, shape[0]), *interleaved(shape[0])]
    else:

        def net(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
            return GatedAttention(
                inputs,
                outputs,
                size,
                hidden=hidden,
                heads=heads,
                activation=activation,
                context_features=context_features,
            )

        core = _flowpp_core(mixture, shape, layers, net)
    return flow_of(
        core,
        shape,
        context_features=context_features,
        dequantize=dequantize,
        bins=bins,
        margin=margin,
        hidden=hidden,
    )


def _flowpp_core(
    scalar_map: ScalarMap, event_shape: Shape, layers: int, net: MakeNet
) -> list[Transform]:
    shape = Squeeze().latent_shape(event_shape)
    return [
        *checkerboard_steps(scalar_map, shape, layers - 1, net, mix=True),
        *channel_steps(scalar_map, shape, layers // 2, net, mix=True),
        Squeeze(),
        *checkerboard_steps(scalar_map, event_shape, layers, net, mix=True),
    ]


def _affine(shape: Shape, bound: float | None) -> Affine:
    """A map of bounded scale: many pixels, each stretched by exp(3), overflow in a few layers."""
    if bound is None:
        bound = 3.0 if len(shape) == 1 else 1.0
    return Affine(bound=bound)


def _mixed(couplings: Sequence[Transform], features: int) -> list[Transform]:
    """The couplings of a vector, each mixed and normalised."""
    return [
        part
        for coupling in couplings
        for part in (coupling, LULinear(features), ActNorm((features,)))
    ]
