"""Residual flows."""

from __future__ import annotations

import math

from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.nets.lipschitz import LipschitzMLP
from cnf.registry import MODELS
from cnf.transforms import ActNorm, Chain, Residual, Transform
from cnf.transforms.residual import LogDet


@MODELS.register(paper="Chen et al., Residual flows, NeurIPS 2019", family="residual")
@framed
def residual_flow(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "lipswish",
    lipschitz: float = 0.97,
    norm: float = 2.0,
    log_det: LogDet | None = None,
) -> Flow:
    """Residual flow: z = x + g(x) with networks g that contract, and ActNorm between them.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of residual blocks.
        hidden: sizes of the hidden layers of each g.
        activation: of the networks, with slopes of at most one.
        lipschitz: the bound on each g's Lipschitz constant, below one.
        norm: the vector norm that it holds in: 1, 2 or infinity.
        log_det: how log det(I + ∂g/∂x) is computed; None for the exact one, which suits tens of
            dimensions. ``UnbiasedLogDet()`` is the paper's, ``TruncatedLogDet()`` i-ResNet's;
            their densities are estimates and not the same twice.

    Paper: Chen et al., "Residual flows for invertible generative modeling", NeurIPS 2019, with its
    LipSwish and bound on the spectral norm.

    Example:
        >>> import torch
        >>> residual_flow(2, layers=2).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    if norm not in (1, 2, math.inf):
        raise ValueError(f"norm is 1, 2 or infinity, got {norm}")
    parts: list[Transform] = []
    for _ in range(layers):
        net = LipschitzMLP(
            features,
            hidden=hidden,
            context_features=context_features,
            activation=activation,
            lipschitz=lipschitz,
            norm=norm,
        )
        parts += [Residual(net, log_det=log_det), ActNorm((features,))]
    return Flow(Chain(parts), Normal(features), context_features=context_features)
