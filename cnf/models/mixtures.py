"""Mixtures of flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cnf.bijections import FixedAffine
from cnf.distributions import Mixture, Transformed
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import context_net
from cnf.registry import MODELS
from cnf.transforms import Chain, Diagonal, Elementwise, Transform


@MODELS.register(paper="", family="mixture")
@framed
def mixture(
    features: int,
    *,
    context_features: int = 0,
    components: tuple[str | tuple[str, Mapping[str, Any]], ...] = ("realnvp",) * 4,
    hidden: tuple[int, ...] = (64,),
    spread: float = 1.0,
) -> Flow:
    """A mixture of flows: p(x) = Σ_k w_k p_k(x), for data in separate pieces.

    The mixture is the flow's base and its transform is the identity, so z is the standardised x.
    A sample's component is discrete: ``rsample`` carries gradients to the component that drew, none
    to the weights.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density; the weights then
            depend on it too.
        components: names of registered models, each alone or with its arguments, as in
            ``("nsf", {"bins": 4})``.
        hidden: sizes of the hidden layers of the network from context to the weights.
        spread: components of vectors start this far apart, each moved and scaled by an affine map
            of its own, because components that start alike part slowly. 0 for no such maps.

    Example:
        >>> import torch
        >>> flow = mixture(2, components=("nice", ("realnvp", {"layers": 2})))
        >>> flow.log_prob(torch.zeros(5, 2)).shape, flow.sample((3,)).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """
    flows: list[Flow] = []
    for component in components:
        name, arguments = (component, {}) if isinstance(component, str) else component
        flows.append(MODELS[name].build(features, context_features=context_features, **arguments))
    if len({(flow.event_shape, flow.scales_data) for flow in flows}) != 1:
        raise ValueError(
            "the components of a mixture are over the same space: one event shape, and either all "
            f"standardise their data or none does; got {components}"
        )
    if not all(flow.transform.exact for flow in flows):
        raise ValueError(
            "a mixture needs components with an exact density: of bounds and estimates it would "
            f"be neither; got {components}"
        )
    event_shape, scales_data = flows[0].event_shape, flows[0].scales_data
    apart = spread if scales_data and len(event_shape) == 1 else 0.0
    base = Mixture(
        [Transformed(_moved(flow, apart), flow.base, event_shape) for flow in flows],
        conditioner=context_net(context_features, len(flows), hidden, "relu"),
    )
    return Flow(
        Elementwise(FixedAffine(), event_shape),
        base,
        context_features=context_features,
        standardize=scales_data,
    )


def _moved(flow: Flow, spread: float) -> Transform:
    """The flow's transform, and an affine map that starts at a random shift."""
    if not spread:
        return flow.transform
    (features,) = flow.event_shape
    return Chain([flow.transform, Diagonal(features, shift=spread * torch.randn(features))])
