"""Autoregressive flows of learned monotone functions: neural, polynomial, block-neural."""

from __future__ import annotations

from cnf.bijections import (
    Bernstein,
    Inverted,
    NeuralAutoregressive,
    ScalarMap,
    SumOfSquares,
    UnconstrainedMonotone,
)
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.parts import autoregressive_layers
from cnf.registry import MODELS
from cnf.transforms import BlockAutoregressive, Chain, Permutation, Transform


def _density_flow(
    scalar_map: ScalarMap,
    features: int,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    activation: str,
    residual: bool,
) -> Flow:
    """Autoregressive layers of a map whose closed form stands where densities are computed."""
    parts = autoregressive_layers(
        Inverted(scalar_map), features, layers, hidden, context_features, activation, residual
    )
    return Flow(Chain(parts), Normal(features), context_features=context_features)


@MODELS.register(paper="Huang et al., NAF, ICML 2018", family="autoregressive")
@framed
def naf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 5,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    units: int = 16,
    depth: int = 1,
    bound: float = 5.0,
) -> Flow:
    """Neural autoregressive flow: z_i = σ⁻¹(Σ w_k σ(a_k x_i + b_k)), weights from x_<i.

    Densities in one pass of closed forms; samples by a safeguarded Newton search per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network.
        activation: of the networks.
        residual: build the masked networks of residual blocks.
        units: sigmoids in each layer of the function.
        depth: layers of the function: deep sigmoidal flow.
        bound: the largest change of a unit's log-slope, approached smoothly.

    Paper: Huang et al., "Neural autoregressive flows", ICML 2018; its DSF has one layer of 8 or 16
    units, in 5 or 10 autoregressive layers.

    Example:
        >>> import torch
        >>> naf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    scalar_map = NeuralAutoregressive(units=units, layers=depth, bound=bound)
    return _density_flow(
        scalar_map, features, layers, hidden, context_features, activation, residual
    )


@MODELS.register(paper="Wehenkel & Louppe, UMNN, NeurIPS 2019", family="autoregressive")
@framed
def unaf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 5,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    units: int = 8,
    nodes: int = 32,
    bound: float = 5.0,
) -> Flow:
    """Unconstrained monotone networks, autoregressive: z_i = c + ∫₀^(x_i) exp h(t; x_<i) dt.

    Densities in one pass; samples by a safeguarded Newton search per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network, which gives h's weights.
        activation: of the masked networks.
        residual: build the masked networks of residual blocks.
        units: hidden units of the integrand h.
        nodes: nodes of the quadrature.
        bound: the integrand is learned on [-bound, bound] and constant outside.

    Paper: Wehenkel and Louppe, "Unconstrained monotonic neural networks", NeurIPS 2019; it uses
    five layers and one integrand for all features, here each layer's masked network makes its own.

    Example:
        >>> import torch
        >>> unaf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    scalar_map = UnconstrainedMonotone(units=units, nodes=nodes, bound=bound)
    return _density_flow(
        scalar_map, features, layers, hidden, context_features, activation, residual
    )


@MODELS.register(paper="Ramasinghe et al., Bernstein flows, 2021", family="polynomial")
@framed
def bpf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 5,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    degree: int = 16,
    bound: float = 5.0,
) -> Flow:
    """Bernstein polynomial flow: z_i a Bernstein polynomial of x_i, increments from x_<i.

    Densities in one pass of closed forms; samples by a safeguarded Newton search per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network.
        activation: of the networks.
        residual: build the masked networks of residual blocks.
        degree: of the polynomials.
        bound: polynomials act on [-bound, bound] and go on in straight lines.

    Paper: Ramasinghe et al., "Robust normalizing flows using Bernstein-type polynomials", 2021.

    Example:
        >>> import torch
        >>> bpf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    scalar_map = Bernstein(degree=degree, bound=bound)
    return _density_flow(
        scalar_map, features, layers, hidden, context_features, activation, residual
    )


@MODELS.register(paper="Jaini et al., SOS flows, ICML 2019", family="polynomial")
@framed
def sospf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "relu",
    residual: bool = False,
    polynomials: int = 5,
    degree: int = 4,
    bound: float = 5.0,
) -> Flow:
    """Sum-of-squares polynomial flow: z_i = c + ∫₀^(x_i) Σ_k p_k(t; x_<i)² dt.

    Densities in one pass of closed forms; samples by a safeguarded Newton search per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of layers; the order of the features turns round between them.
        hidden: sizes of the hidden layers of each masked network.
        activation: of the networks.
        residual: build the masked networks of residual blocks.
        polynomials: how many squares are summed.
        degree: of each polynomial before it is squared.
        bound: polynomials act on [-bound, bound] and go on in straight lines.

    Paper: Jaini et al., "Sum-of-squares polynomial flow", ICML 2019; its tables use eight layers,
    five polynomials and degree four.

    Example:
        >>> import torch
        >>> sospf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    scalar_map = SumOfSquares(polynomials=polynomials, degree=degree, bound=bound)
    return _density_flow(
        scalar_map, features, layers, hidden, context_features, activation, residual
    )


@MODELS.register(paper="De Cao et al., B-NAF, UAI 2019", family="autoregressive")
@framed
def bnaf(
    features: int,
    *,
    context_features: int = 0,
    layers: int = 3,
    units: int = 10,
    hidden: int = 2,
) -> Flow:
    """Block neural autoregressive flow: one masked network of blocks is the map x → z itself.

    Densities in one pass; samples by a safeguarded Newton search per feature.

    Args:
        features: D, the size of one x.
        context_features: size of the context, 0 for an unconditional density.
        layers: number of such maps, with the features turned round between them.
        units: hidden units for each feature.
        hidden: how many hidden layers each has.

    Paper: De Cao et al., "Block neural autoregressive flow", UAI 2019; its tables use five maps of
    two hidden layers with 10 or 40 units for each feature.

    Example:
        >>> import torch
        >>> bnaf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    parts: list[Transform] = []
    for layer in range(layers):
        if layer:
            parts.append(Permutation.reverse(features))
        block = BlockAutoregressive(features, units, hidden, context_features=context_features)
        parts.append(block)
    return Flow(Chain(parts), Normal(features), context_features=context_features)
