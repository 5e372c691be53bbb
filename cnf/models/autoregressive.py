"""Masked autoregressive flows with affine maps, in either direction."""

from __future__ import annotations

from cnf.bijections import Affine
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import autoregressive_layers
from cnf.registry import MODELS
from cnf.transforms import Chain, Inverse


@MODELS.register(paper="Papamakarios et al., MAF, NeurIPS 2017", family="autoregressive")
@framed
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
@framed
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
