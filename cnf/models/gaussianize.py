"""Gaussianization flows: marginals made normal, axes turned, again and again."""

from __future__ import annotations

from cnf.bijections import Inverted, LogisticMixture
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import context_net
from cnf.registry import MODELS
from cnf.transforms import Chain, Elementwise, HouseholderLinear, Transform


@MODELS.register(paper="Meng et al., Gaussianization flows, AISTATS 2020", family="gaussianization")
@framed
def gaussianization(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 6,
    hidden: tuple[int, ...] = (64,),
    components: int = 16,
    bound: float = 5.0,
) -> Flow:
    """Gaussianization flow: a mixture's distribution function on every axis, then a rotation.

    z_i = exp(a) σ⁻¹(Σ_k π_k σ((x_i - μ_k) / s_k)) + b: the marginal's distribution function, whose
    logit stands for the normal quantile. Densities in closed form, no network; samples by a
    safeguarded Newton search for all features at once.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: how many pairs of marginals and rotation.
        hidden: sizes of the hidden layers of the networks from context to the mixtures.
        components: logistic distributions in each marginal.
        bound: the largest change of a component's log-scale, approached smoothly.

    Paper: Meng et al., "Gaussianization flows", AISTATS 2020, with its trainable rotations made of
    Householder reflections.

    Example:
        >>> import torch
        >>> gaussianization(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    marginal = Inverted(LogisticMixture(components=components, bound=bound))
    parts: list[Transform] = []
    for _ in range(layers):
        net = context_net(context_features, features * marginal.size, hidden, "relu")
        parts.append(Elementwise(marginal, (features,), net))
        parts.append(HouseholderLinear(features, bias=False))
    return Flow(Chain(parts), Normal(features), context_features=context_features)
