"""Continuous flows."""

from __future__ import annotations

from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.nets.fields import TimeMLP
from cnf.ode import Solver
from cnf.registry import MODELS
from cnf.transforms import Chain, Continuous


@MODELS.register(
    paper="Grathwohl et al., FFJORD, ICLR 2019", objective="likelihood", family="continuous"
)
def ffjord(
    features: int,
    *,
    hidden: tuple[int, ...] = (64, 64, 64),
    context_features: int = 0,
    blocks: int = 1,
    conditioning: str = "concatsquash",
    activation: str = "tanh",
    solver: Solver | None = None,
    end_time: float = 1.0,
    trainable_end_time: bool = False,
) -> Flow:
    """FFJORD: a free-form continuous flow, dx/dt = v(t, x, context).

    ``flow.log_prob`` integrates the exact trace. An objective may ask for an estimate:
    ``MaximumLikelihood(flow, divergence=Hutchinson())``.

    Args:
        features: D, the size of one x.
        hidden: sizes of the velocity's hidden layers.
        context_features: size of the context, 0 for an unconditional density.
        blocks: how many continuous flows one after the other, each with a field of its own.
        conditioning: how time enters the layers, see ``cnf.nets.TimeMLP``.
        activation: a smooth one: tanh, softplus, silu, sine or gelu.
        solver: method, tolerances and gradient mode; by default dopri5 at 1e-6, which keeps 99 % of
            log-densities within 1e-4 nats of the exact solution, with the adjoint.
        end_time: T, how long the velocity's clock runs.
        trainable_end_time: learn T, one for each block.

    Paper: Grathwohl et al., "FFJORD: Free-form continuous dynamics for scalable reversible
    generative models", ICLR 2019. Defaults: its 2-D experiments' net and its concatsquash layers.

    Example:
        >>> import torch
        >>> flow = ffjord(2, hidden=(16, 16))
        >>> flow.log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """
    parts = [
        Continuous(
            TimeMLP(
                features,
                hidden,
                conditioning=conditioning,
                activation=activation,
                context_features=context_features,
            ),
            solver=solver,
            end_time=end_time,
            trainable_end_time=trainable_end_time,
            name=f"block {i}",
        )
        for i in range(blocks)
    ]
    transform = parts[0] if blocks == 1 else Chain(parts)
    return Flow(transform, Normal(features), context_features=context_features)
