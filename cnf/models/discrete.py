"""Coupling and autoregressive flows: scalar maps × structures × networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from cnf.bijections import Additive, Affine, RationalQuadratic, ScalarMap
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.nets import MADE, MLP
from cnf.registry import MODELS
from cnf.transforms import (
    Autoregressive,
    Chain,
    Coupling,
    Diagonal,
    Elementwise,
    Inverse,
    LULinear,
    Transform,
    half_mask,
    random_mask,
)


def coupling_masks(features: int, layers: int) -> Iterator[Tensor]:
    """Masks in complementary pairs, so that every two layers transform every feature.

    The first pair is the two halves; later ones split at random, because halves alone would never
    let features of the same half meet.
    """
    mask = half_mask(features)
    for layer in range(layers):
        if layer % 2 == 0 and layer > 0 and features > 2:
            mask = random_mask(features)
        yield mask if layer % 2 == 0 else ~mask


def coupling_layers(
    scalar_map: ScalarMap,
    features: int,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
) -> list[Transform]:
    """Couplings of one scalar map; with one feature, the map conditioned on the context alone."""
    size = scalar_map.size
    if features == 1:
        return [
            Elementwise(scalar_map, (1,), _context_net(context_features, size, hidden, activation))
            for _ in range(layers)
        ]
    return [
        Coupling(
            scalar_map,
            MLP(
                int((~mask).sum()),
                int(mask.sum()) * size,
                hidden=hidden,
                context_features=context_features,
                activation=activation,
            ),
            mask,
        )
        for mask in coupling_masks(features, layers)
    ]


def _context_net(
    context_features: int, outputs: int, hidden: tuple[int, ...], activation: str
) -> MLP | None:
    if not context_features:
        return None
    return MLP(context_features, outputs, hidden=hidden, activation=activation)


def autoregressive_layers(
    scalar_map: ScalarMap,
    features: int,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
    residual: bool,
) -> list[Autoregressive]:
    """Masked autoregressive layers whose order turns round from one to the next."""
    return [
        Autoregressive(
            scalar_map,
            MADE(
                features,
                scalar_map.size,
                hidden=hidden,
                context_features=context_features,
                order="reverse" if layer % 2 else "natural",
                activation=activation,
                residual=residual,
            ),
        )
        for layer in range(layers)
    ]


def mixed(
    layers: list[Transform] | list[Autoregressive], make: Callable[[], Transform]
) -> Iterator[Transform]:
    """The layers with a linear map before each."""
    for layer in layers:
        yield make()
        yield layer


@MODELS.register(paper="Dinh et al., NICE, 2014", family="coupling")
def nice(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
) -> Flow:
    """NICE: additive couplings, which preserve volume, and one scale per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of couplings.
        hidden: sizes of the hidden layers of each coupling's network.
        activation: of the networks.

    Paper: Dinh et al., "NICE: Non-linear independent components estimation", 2014; it uses four
    couplings and a logistic base, here a normal one.

    Example:
        >>> import torch
        >>> nice(3).log_prob(torch.zeros(3))
        tensor(-2.7568, grad_fn=<AddBackward0>)
    """
    couplings = coupling_layers(Additive(), features, layers, hidden, context_features, activation)
    transform = Chain([*couplings, Diagonal(features)])
    return Flow(transform, Normal(features), context_features=context_features)


@MODELS.register(paper="Dinh et al., RealNVP, ICLR 2017", family="coupling")
def realnvp(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bound: float = 3.0,
) -> Flow:
    """RealNVP: affine couplings, x_B = z_B ⊙ exp(s(x_A)) + b(x_A).

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of couplings.
        hidden: sizes of the hidden layers of each coupling's network.
        activation: of the networks.
        bound: the log-scale is bounded smoothly to (-bound, bound).

    Paper: Dinh et al., "Density estimation using Real NVP", ICLR 2017.

    Example:
        >>> import torch
        >>> realnvp(3, context_features=2).sample((5,), torch.zeros(4, 2)).shape
        torch.Size([5, 4, 3])
    """
    couplings = coupling_layers(
        Affine(bound=bound), features, layers, hidden, context_features, activation
    )
    return Flow(Chain(couplings), Normal(features), context_features=context_features)


@MODELS.register(paper="Papamakarios et al., MAF, NeurIPS 2017", family="autoregressive")
def maf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bound: float | None = 5.0,
    residual: bool = False,
) -> Flow:
    """MAF: masked autoregressive affine layers; density in one pass, samples feature by feature.

    z_i = (x_i - b_i(x_<i)) exp(-s_i(x_<i))

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network.
        activation: of the networks.
        bound: the log-scale is bounded smoothly to (-bound, bound); None leaves it free.
        residual: build the masked networks of residual blocks.

    Paper: Papamakarios et al., "Masked autoregressive flow for density estimation", NeurIPS 2017;
    it uses five or ten layers with batch normalisation between.

    Example:
        >>> import torch
        >>> maf(3).sample((5,)).shape
        torch.Size([5, 3])
    """
    parts = autoregressive_layers(
        Affine(bound=bound), features, layers, hidden, context_features, activation, residual
    )
    return Flow(Chain(parts), Normal(features), context_features=context_features)


@MODELS.register(paper="Kingma et al., IAF, NeurIPS 2016", family="autoregressive")
def iaf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bound: float | None = 5.0,
    residual: bool = False,
) -> Flow:
    """IAF: MAF the other way round; samples in one pass, densities feature by feature.

    x_i = (z_i - b_i(z_<i)) exp(-s_i(z_<i))

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network.
        activation: of the networks.
        bound: the log-scale is bounded smoothly to (-bound, bound); None leaves it free.
        residual: build the masked networks of residual blocks.

    Paper: Kingma et al., "Improved variational inference with inverse autoregressive flow",
    NeurIPS 2016.

    Example:
        >>> import torch
        >>> iaf(3).sample((5,)).shape
        torch.Size([5, 3])
    """
    parts = autoregressive_layers(
        Affine(bound=bound), features, layers, hidden, context_features, activation, residual
    )
    transform = Chain([Inverse(part) for part in parts])
    return Flow(transform, Normal(features), context_features=context_features)


@MODELS.register(paper="Durkan et al., Neural spline flows, NeurIPS 2019", family="spline")
def nsf(
    features: int,
    *,
    context_features: int = 0,
    autoregressive: bool = False,
    layers: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bins: int = 8,
    bound: float = 5.0,
) -> Flow:
    """Neural spline flow: rational-quadratic splines, coupled or autoregressive, with LU layers.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        autoregressive: RQ-NSF (AR) instead of RQ-NSF (C).
        layers: number of spline layers.
        hidden: sizes of the hidden layers of each network.
        activation: of the networks.
        bins: number of bins of a spline.
        bound: splines act on [-bound, bound] and are the identity outside.

    Paper: Durkan et al., "Neural spline flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> nsf(3, autoregressive=True).log_prob(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5])
    """
    spline = RationalQuadratic(bins=bins, bound=bound)
    parts: list[Transform] | list[Autoregressive]
    if autoregressive:
        parts = autoregressive_layers(
            spline, features, layers, hidden, context_features, activation, False
        )
    else:
        parts = coupling_layers(spline, features, layers, hidden, context_features, activation)
    transform = Chain(mixed(parts, lambda: LULinear(features)))
    return Flow(transform, Normal(features), context_features=context_features)
