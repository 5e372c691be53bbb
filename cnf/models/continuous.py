"""Continuous flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from cnf.distributions import Normal, as_shape
from cnf.divergence import Divergence
from cnf.flow import Flow
from cnf.models.framed import framed
from cnf.models.pixels import flow_of
from cnf.nets import ConditionedMLP, ConvField, PotentialField, ResidualField, TimeMLP
from cnf.nets.conditioning import ADAPTERS
from cnf.ode import Solver
from cnf.registry import MODELS, unknown_name
from cnf.transforms import (
    ActNorm,
    BatchNorm,
    Chain,
    Continuous,
    Multiscale,
    Squeeze,
    Transform,
)

Shape = tuple[int, ...]

NORMALIZATIONS: dict[str, type[ActNorm] | type[BatchNorm] | None] = {
    "none": None,
    "actnorm": ActNorm,
    "batchnorm": BatchNorm,
}


@MODELS.register(
    paper="Grathwohl et al., FFJORD, ICLR 2019", objective="likelihood", family="continuous"
)
@framed
def ffjord(
    features: int | Sequence[int],
    *,
    hidden: tuple[int, ...] = (64, 64, 64),
    context_features: int = 0,
    context_by: str = "concat",
    blocks: int = 1,
    normalization: str = "none",
    field: str = "mlp",
    conditioning: str = "concatsquash",
    activation: str = "tanh",
    strides: tuple[int, ...] | None = None,
    squeeze: bool = False,
    levels: int = 1,
    dequantize: str = "none",
    bins: int = 256,
    margin: float | None = 0.05,
    divergence: Divergence | None = None,
    solver: Solver | None = None,
    end_time: float = 1.0,
    trainable_end_time: bool = False,
) -> Flow:
    """FFJORD: a free-form continuous flow, dx/dt = v(t, x, context).

    ``flow.log_prob`` integrates the exact trace. An objective may ask for an estimate:
    ``MaximumLikelihood(flow, divergence=Hutchinson())``.

    Args:
        features: D, the size of one x; for images ``(channels, height, width)``, whose velocity is
            convolutional.
        hidden: sizes of the velocity's hidden layers; channels, for images.
        context_features: size of the context, 0 for an unconditional density.
        context_by: how it enters the velocity: ``"concat"`` to every layer's input, ``"film"``
            to scale the layers, too, or for vectors ``"hyper"`` and ``"lowrank"``, see
            ``cnf.nets.ConditionedMLP``.
        blocks: how many continuous flows one after the other, each with a field of its own.
        normalization: ``"actnorm"`` or ``"batchnorm"`` on the data's side of each block (the
            paper's code has moving batch normalisation), or ``"none"``.
        field: of vectors: ``"mlp"``, or for wide tables ``"residual"``, with blocks of the width
            that ``hidden`` lists, see ``cnf.nets.ResidualField``.
        conditioning: how time enters the layers, see ``cnf.nets.TimeMLP``, ``cnf.nets.ConvField``.
        activation: a smooth one: tanh, softplus, silu, sine, gelu, or swish, which is learned.
        strides: of an image's layers, see ``cnf.nets.ConvField``.
        squeeze: let them work on blocks of 2×2 pixels.
        levels: of an image: every level but the last has blocks before and after a squeeze, and
            then half of the channels leaves.
        dequantize: ``"none"`` for continuous x; ``"uniform"`` or ``"variational"`` for integers.
        bins: the integers are 0, …, bins - 1.
        margin: integers are scaled to [margin, 1 - margin] and a logit taken; None for no logit.
        divergence: the trace, exact by default.
        solver: method, tolerances and gradient mode; by default dopri5 at 1e-6, which keeps 99 % of
            log-densities within 1e-4 nats of the exact solution, with the adjoint.
        end_time: T, how long the velocity's clock runs.
        trainable_end_time: learn T, one for each block.

    Paper: Grathwohl et al., "FFJORD: Free-form continuous dynamics for scalable reversible
    generative models", ICLR 2019. Defaults: its 2-D experiments' net and its concatsquash layers.
    Its images have ``conditioning="concat", activation="softplus", levels=2, blocks=2``.

    Example:
        >>> import torch
        >>> flow = ffjord(2, hidden=(16, 16))
        >>> flow.log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
        >>> ffjord((1, 4, 4), hidden=(4,), levels=2).sample((3,)).shape
        torch.Size([3, 1, 4, 4])
    """
    shape = as_shape(features)
    if len(shape) not in (1, 3):
        raise ValueError(f"features is D or (channels, height, width), got {features}")

    if len(shape) == 1 and (levels != 1 or strides is not None or squeeze):
        raise ValueError(
            "levels, strides and squeeze are for images, features=(channels, height, width)"
        )
    if len(shape) == 3 and field != "mlp":
        raise ValueError(
            "field is for vectors: the velocity of an image is convolutional; leave it away"
        )
    if blocks < 1:
        raise ValueError(f"blocks must be a positive integer, got {blocks}")

    def velocity(shape: Shape) -> nn.Module:
        if len(shape) == 1:
            return _vector_field(
                field, shape[0], hidden, conditioning, activation, context_features, context_by
            )
        return ConvField(
            shape[0],
            hidden,
            strides=strides,
            squeeze=squeeze,
            conditioning=conditioning,
            activation=activation,
            context_features=context_features,
            context_by=context_by,
        )

    def steps(shape: Shape, level: str = "") -> list[Transform]:
        parts: list[Transform] = []
        for i in range(blocks):
            name = f"{level}block {i}"
            parts.append(
                Continuous(
                    velocity(shape),
                    divergence,
                    solver,
                    end_time=end_time,
                    trainable_end_time=trainable_end_time,
                    name=name,
                )
            )
            parts += _normalization(normalization, shape)
        return parts

    core = steps(shape) if levels == 1 else [_multiscale(steps, shape, levels)]
    if dequantize != "none":
        return flow_of(
            core,
            shape,
            context_features=context_features,
            dequantize=dequantize,
            bins=bins,
            margin=margin,
            hidden=hidden,
        )
    transform = core[0] if len(core) == 1 else Chain(core)
    return Flow(
        transform,
        Normal(transform.latent_shape(shape)),
        event_shape=shape,
        context_features=context_features,
    )


@MODELS.register(paper="Finlay et al., RNODE, ICML 2020", objective="rnode", family="continuous")
@framed
def rnode(
    features: int | Sequence[int],
    *,
    hidden: tuple[int, ...] = (64, 64, 64),
    context_features: int = 0,
    context_by: str = "concat",
    blocks: int = 1,
    normalization: str = "none",
    conditioning: str = "concatsquash",
    activation: str = "tanh",
    levels: int = 1,
    dequantize: str = "none",
    bins: int = 256,
    margin: float | None = 0.05,
    divergence: Divergence | None = None,
    solver: Solver | None = None,
) -> Flow:
    """RNODE: FFJORD whose training asks for short paths and a small Jacobian.

    The model is ``ffjord``'s; ``cnf.fit`` trains it with the objective ``"rnode"``: likelihood with
    0.01 of the kinetic energy and 0.01 of the Jacobian's squared norm, so that few solver steps do.

    Args:
        features: D, the size of one x; for images ``(channels, height, width)``.
        hidden: sizes of the velocity's hidden layers.
        context_features: size of the context, 0 for an unconditional density.
        context_by: how the context enters, as in ``ffjord``.
        blocks: how many continuous flows one after the other.
        normalization: between them, as in ``ffjord``.
        conditioning: how time enters the layers.
        activation: a smooth one: tanh, softplus, silu, sine, gelu, or swish, which is learned.
        levels: of an image, as in ``ffjord``.
        dequantize: ``"none"`` for continuous x; ``"uniform"`` or ``"variational"`` for integers.
        bins: the integers are 0, …, bins - 1.
        margin: of their logit, None for no logit.
        divergence: the trace, exact by default.
        solver: method, tolerances and gradient mode; the paper trains on a fixed grid,
            ``Solver("rk4", step_size=0.25, gradient="backprop")``.

    Paper: Finlay et al., "How to train your neural ODE: the world of Jacobian and kinetic
    regularization", ICML 2020. Defaults: FFJORD's net, the paper's weights.

    Example:
        >>> import torch
        >>> rnode(2, hidden=(16, 16)).log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """
    return ffjord(
        features,
        hidden=hidden,
        context_features=context_features,
        context_by=context_by,
        blocks=blocks,
        normalization=normalization,
        conditioning=conditioning,
        activation=activation,
        levels=levels,
        dequantize=dequantize,
        bins=bins,
        margin=margin,
        divergence=divergence,
        solver=solver,
    )


@MODELS.register(paper="Onken et al., OT-Flow, AAAI 2021", objective="otflow", family="continuous")
@framed
def otflow(
    features: int,
    *,
    width: int = 32,
    layers: int = 2,
    rank: int = 10,
    context_features: int = 0,
    solver: Solver | None = None,
) -> Flow:
    """OT-Flow: a continuous flow down a potential, dx/dt = -∇Φ(x, t), with straight paths.

    The trace is in closed form; ``cnf.fit`` trains with the objective ``"otflow"``: likelihood,
    transport cost and the residual of the Hamilton-Jacobi-Bellman equation.

    Args:
        features: D, the size of one x.
        width: m, the size of the potential's layers.
        layers: how many it has, at least 2.
        rank: of its quadratic part.
        context_features: size of the context, 0 for an unconditional density.
        solver: method, tolerances and gradient mode; the paper has
            ``Solver("rk4", step_size=1 / 8, gradient="backprop")``.

    Paper: Onken et al., "OT-Flow: Fast and accurate continuous normalizing flows via optimal
    transport", AAAI 2021. Defaults: its two-dimensional experiments' net.

    Example:
        >>> import torch
        >>> otflow(2).log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """
    if len(as_shape(features)) != 1:
        raise ValueError(
            f"the potential is one of vectors, features=D, got {features}; flatten images, or use "
            "ffjord or rnode"
        )
    potential = PotentialField(
        features, width, layers, rank=rank, context_features=context_features
    )
    return Flow(
        Continuous(potential, solver=solver, name="block 0"),
        Normal(features),
        context_features=context_features,
    )


def _vector_field(
    kind: str,
    features: int,
    hidden: tuple[int, ...],
    conditioning: str,
    activation: str,
    context_features: int,
    context_by: str,
) -> nn.Module:
    """The velocity of a vector."""
    if kind not in ("mlp", "residual"):
        raise unknown_name("field", kind, {"mlp": TimeMLP, "residual": ResidualField})
    if kind == "residual":
        if (conditioning, context_by) != ("concatsquash", "concat"):
            raise ValueError(
                "a residual field takes time and context in its own way: leave conditioning= and "
                "context_by= away"
            )
        if len(set(hidden)) != 1:
            raise ValueError(f"the blocks of a residual field have one width, got hidden={hidden}")
        return ResidualField(
            features,
            hidden[0],
            len(hidden),
            activation=activation,
            context_features=context_features,
        )
    if context_by not in ("concat", *ADAPTERS):
        raise unknown_name("way of conditioning", context_by, {"concat": None, **ADAPTERS})
    if context_by == "concat" or not context_features:
        return TimeMLP(
            features,
            hidden,
            conditioning=conditioning,
            activation=activation,
            context_features=context_features,
        )
    return ConditionedMLP(
        features,
        context_features,
        hidden,
        by=context_by,
        conditioning=conditioning,
        activation=activation,
    )


def _normalization(kind: str, shape: Shape) -> list[Transform]:
    """What stands on the data's side of a block."""
    if kind not in NORMALIZATIONS:
        raise unknown_name("normalization", kind, NORMALIZATIONS)
    build = NORMALIZATIONS[kind]
    return [] if build is None else [build(shape)]


def _multiscale(
    steps: Callable[[Shape, str], list[Transform]], shape: Shape, levels: int
) -> Transform:
    """Steps on every level; after each but the last a squeeze, and half of the channels leaves."""
    parts: list[Transform] = []
    event_shape = shape
    for level in range(levels):
        part = steps(shape, f"level {level}, ")
        if level + 1 < levels:
            shape = Squeeze().latent_shape(shape)
            part = [*steps(shape, f"level {level}, squeezed, "), Squeeze(), *part]
            shape = (shape[0] // 2, *shape[1:])
        parts.append(Chain(part))
    return Multiscale(parts, event_shape)
