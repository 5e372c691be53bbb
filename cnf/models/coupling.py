"""Coupling flows of vectors."""

from __future__ import annotations

from cnf.bijections import Additive
from cnf.distributions import Logistic, Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import coupling_layers, interleaved
from cnf.registry import MODELS
from cnf.transforms import Chain, Diagonal


@MODELS.register(paper="Dinh et al., NICE, 2014", family="coupling")
@framed
def nice(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    base: str = "normal",
) -> Flow:
    """NICE: additive couplings, which preserve volume, and one scale per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of couplings.
        hidden: sizes of the hidden layers of each coupling's network.
        activation: of the networks.
        base: ``"normal"``, or ``"logistic"`` as in most of the paper.

    Paper: Dinh et al., "NICE: Non-linear independent components estimation", 2014; it uses four
    couplings.

    Example:
        >>> import torch
        >>> nice(3).log_prob(torch.zeros(3))
        tensor(-2.7568, grad_fn=<AddBackward0>)
    """
    if base not in ("normal", "logistic"):
        raise ValueError(f"base is 'normal' or 'logistic', got {base!r}")
    couplings = coupling_layers(Additive(), features, layers, hidden, context_features, activation)
    transform = Chain([*couplings, Diagonal(features), *interleaved(features)])
    start = Logistic(features) if base == "logistic" else Normal(features)
    return Flow(transform, start, context_features=context_features)
