"""Planar, radial and Sylvester flows: many small bumps, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import context_net
from cnf.registry import MODELS
from cnf.transforms import Chain, Inverse, Planar, Radial, Sylvester, Transform


def _flow_of_bumps(
    make: Callable[[nn.Module | None], Transform],
    features: int,
    outputs: int,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    formula: str,
) -> Flow:
    """A chain of bumps whose closed form stands in one direction or in the other."""
    if formula not in ("inverse", "forward"):
        raise ValueError(f"formula is 'inverse' (x → z) or 'forward' (z → x), got {formula!r}")
    parts = [make(context_net(context_features, outputs, hidden, "tanh")) for _ in range(layers)]
    if formula == "inverse":
        parts = [Inverse(part) for part in parts]
    return Flow(Chain(parts), Normal(features), context_features=context_features)


@MODELS.register(paper="Rezende & Mohamed, Planar flows, ICML 2015", family="planar")
@framed
def planar(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 32,
    hidden: tuple[int, ...] = (64,),
    formula: str = "inverse",
) -> Flow:
    """Planar flow: y = x + û tanh(wᵀx + b), layer after layer.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: how many maps.
        hidden: sizes of the hidden layers of the networks from context to û, w and b.
        formula: the direction that is the closed formula: ``"inverse"`` (x → z), to learn densities
            from data, or ``"forward"`` (z → x), the paper's, for variational inference. The other
            direction is solved numerically.

    Paper: Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015; its
    2-D densities take 2, 8 and 32 layers.

    Example:
        >>> import torch
        >>> planar(2, layers=4).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    return _flow_of_bumps(
        lambda conditioner: Planar(features, conditioner=conditioner),
        features,
        Planar.outputs(features),
        layers,
        hidden,
        context_features,
        formula,
    )


@MODELS.register(paper="Rezende & Mohamed, Radial flows, ICML 2015", family="planar")
@framed
def radial(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 32,
    hidden: tuple[int, ...] = (64,),
    formula: str = "inverse",
) -> Flow:
    """Radial flow: y = x + β (x - c) / (α + |x - c|), layer after layer; closed both ways.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: how many maps.
        hidden: sizes of the hidden layers of the networks from context to c, α and β.
        formula: the direction that has the formula's shape: ``"inverse"`` (x → z) or ``"forward"``
            (z → x), the paper's.

    Paper: Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Example:
        >>> import torch
        >>> radial(2, layers=4).sample((5,)).shape
        torch.Size([5, 2])
    """
    return _flow_of_bumps(
        lambda conditioner: Radial(features, conditioner=conditioner),
        features,
        Radial.outputs(features),
        layers,
        hidden,
        context_features,
        formula,
    )


@MODELS.register(paper="van den Berg et al., Sylvester flows, UAI 2018", family="planar")
@framed
def sylvester(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64,),
    directions: int | None = None,
    formula: str = "inverse",
) -> Flow:
    """Sylvester flow: y = x + Q R tanh(R̃ Qᵀx + b), several planar flows at once.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: how many maps.
        hidden: sizes of the hidden layers of the networks from context to Q, R, R̃ and b.
        directions: how many orthonormal directions Q has; None for D.
        formula: the direction that is the closed formula, as in ``planar``.

    Paper: van den Berg et al., "Sylvester normalizing flows for variational inference", UAI 2018;
    Q as in its Householder flows.

    Example:
        >>> import torch
        >>> sylvester(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return _flow_of_bumps(
        lambda conditioner: Sylvester(features, directions, conditioner=conditioner),
        features,
        Sylvester.outputs(features, directions),
        layers,
        hidden,
        context_features,
        formula,
    )
