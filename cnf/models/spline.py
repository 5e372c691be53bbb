"""Spline flows, of numbers and of angles."""

from __future__ import annotations

import math

from cnf.bijections import RationalQuadratic
from cnf.distributions import Normal, Uniform
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import autoregressive_layers, coupling_layers, interleaved, mixed
from cnf.registry import MODELS
from cnf.transforms import Autoregressive, Chain, LULinear, Permutation, Transform


@MODELS.register(paper="Durkan et al., Neural spline flows, NeurIPS 2019", family="spline")
@framed
def nsf(
    features: int,
    *,
    context_features: int = 0,
    autoregressive: bool = False,
    layers: int = 4,
    hidden: tuple[int, ...] | None = None,
    activation: str = "relu",
    residual: bool | None = None,
    bins: int = 8,
    bound: float = 5.0,
) -> Flow:
    """Neural spline flow: rational-quadratic splines, coupled or autoregressive, with LU layers.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        autoregressive: RQ-NSF (AR) instead of RQ-NSF (C).
        layers: number of spline layers.
        hidden: sizes of each network's residual blocks, all alike, or without ``residual`` of its
            hidden layers; None means one block of 64, or two layers of 64.
        activation: of the networks.
        residual: build the networks of residual blocks, of which the paper has two; None does so
            beyond two dimensions, where they fit tables better. In the plane they fit worse.
        bins: number of bins of a spline.
        bound: splines act on [-bound, bound] and are the identity outside.

    Paper: Durkan et al., "Neural spline flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> nsf(3, autoregressive=True).log_prob(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5])
    """
    spline = RationalQuadratic(bins=bins, bound=bound)
    if residual is None:
        residual = features > 2
    if hidden is None:
        hidden = (64,) if residual else (64, 64)
    parts: list[Transform] | list[Autoregressive]
    ends: list[Permutation] = []
    if autoregressive:
        parts = autoregressive_layers(
            spline, features, layers, hidden, context_features, activation, residual
        )
    else:
        parts = coupling_layers(
            spline, features, layers, hidden, context_features, activation, residual=residual
        )
        ends = interleaved(features)
    transform = Chain([*mixed(parts, lambda: LULinear(features)), *ends])
    return Flow(transform, Normal(features), context_features=context_features)


@MODELS.register(paper="Rezende et al., Flows on tori and spheres, ICML 2020", family="spline")
@framed
def ncsf(
    features: int,
    *,
    context_features: int = 0,
    autoregressive: bool = False,
    layers: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    bins: int = 8,
    bound: float = math.pi,
) -> Flow:
    """Neural circular spline flow: a density of angles in [-π, π], smooth across ±π.

    Circular splines, coupled or autoregressive, whose networks see cosines and sines, from a
    uniform base. Data is not standardised; outside [-bound, bound] the log-density is -inf.

    Args:
        features: D, how many angles one x has.
        context_features: size of the context, 0 for an unconditional density.
        autoregressive: autoregressive layers instead of couplings.
        layers: number of spline layers.
        hidden: sizes of the hidden layers of each network.
        activation: of the networks.
        bins: number of bins of a spline.
        bound: half the period: π for radians, 180 for degrees.

    Paper: Rezende et al., "Normalizing flows on tori and spheres", ICML 2020.

    Example:
        >>> import torch
        >>> flow = ncsf(2)
        >>> flow.log_prob(torch.tensor([0.0, 4.0])).item(), flow.sample((3,)).shape
        (-inf, torch.Size([3, 2]))
    """
    spline = RationalQuadratic(bins=bins, bound=bound, tails="circular")
    parts: list[Transform] | list[Autoregressive]
    ends: list[Permutation] = []
    if autoregressive:
        parts = autoregressive_layers(
            spline, features, layers, hidden, context_features, activation, False, 2 * bound
        )
    else:
        parts = coupling_layers(
            spline, features, layers, hidden, context_features, activation, 2 * bound
        )
        ends = interleaved(features)
    base = Uniform(features, scale=bound)
    return Flow(
        Chain([*parts, *ends]),
        base,
        context_features=context_features,
        standardize=False,
    )
