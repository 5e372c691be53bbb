"""The same flow in JAX with diffrax: compiled whole, one solve for the batch, float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.reference import NAMES, weight_names
from cnf.nets import TimeMLP

Parameters = dict[str, Any]
ADJOINTS = ("checkpoint", "backsolve")
UNROLLED = 4
"""Up to this many dimensions, one product after the other is faster than all under ``vmap``."""


def parameters_of(field: TimeMLP) -> Parameters:
    """A field's numbers as JAX holds them, under the same names."""
    named = dict(field.layers.named_parameters())
    return {
        name: jnp.asarray(named[name].detach().cpu().numpy())
        for name in NAMES + weight_names(field)
    }


def flatten(gradient: Parameters) -> torch.Tensor:
    """A gradient as one vector, in the order of ``reference.gradient``."""
    names = NAMES + sorted(set(gradient) - set(NAMES))
    parts = [np.asarray(gradient[name]).ravel() for name in names]
    return torch.from_numpy(np.concatenate(parts))


def velocity(parameters: Parameters, t: Any, x: Any) -> Any:
    """Layers (W x + b) ⊙ σ(g t + c) + h t with tanh between them."""
    gate = jax.nn.sigmoid(parameters["gate_slope"] * t + parameters["gate_bias"])
    shift = parameters["bias"] * gate + parameters["shift_slope"] * t
    weights = [parameters[f"weights.{i}"] for i in range(len(parameters) - len(NAMES))]
    start = 0
    for i, weight in enumerate(weights):
        own = slice(start, start := start + len(weight))
        x = (x @ weight.T) * gate[own] + shift[own]
        x = jnp.tanh(x) if i < len(weights) - 1 else x
    return x


def push(parameters: Parameters, t: Any, x: Any, tangent: Any) -> tuple[Any, Any]:
    """The velocity and u·J u for each sample."""
    value, product = jax.jvp(lambda x: velocity(parameters, t, x), (x,), (tangent,))
    return value, (product * tangent).sum(-1)


def exact(parameters: Parameters, t: Any, x: Any) -> tuple[Any, Any]:
    """The velocity and tr J by forward mode, in whichever form XLA makes faster code of."""
    identity = np.eye(x.shape[-1], dtype=x.dtype)
    if len(identity) <= UNROLLED:
        pairs = [push(parameters, t, x, jnp.broadcast_to(row, x.shape)) for row in identity]
        return pairs[0][0], sum(part for _, part in pairs)

    def one(x: Any) -> tuple[Any, Any]:
        along = jax.vmap(lambda row: push(parameters, t, x, row), out_axes=(None, 0))
        value, diagonal = along(identity)
        return value, diagonal.sum()

    return jax.vmap(one)(x)


class Diffrax:
    """A flow from t = 0 (base) to t = 1 (data) under ``diffeqsolve``.

    Args:
        tolerance: rtol and atol.
        adjoint: ``"checkpoint"`` (recursive checkpointing, diffrax's default) or ``"backsolve"``,
            whose error norm leaves the parameters out.
    """

    def __init__(self, tolerance: float = 1e-5, adjoint: str = "checkpoint"):
        self.tolerance = tolerance
        if adjoint == "checkpoint":
            self.adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()
        else:
            norm = diffrax.adjoint_rms_seminorm
            control = diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=norm)
            self.adjoint = diffrax.BacksolveAdjoint(
                solver=diffrax.Dopri5(), stepsize_controller=control
            )
        self.value_and_grad: Callable[..., Any] = jax.jit(
            jax.value_and_grad(self._loss, has_aux=True)
        )
        # the tolerance is an argument of these, so that another one is not compiled anew; the
        # evaluations of the velocity come along
        self.log_prob: Callable[..., tuple[Any, Any]] = jax.jit(
            lambda parameters, x, tolerance: self._log_prob(parameters, x, None, tolerance)
        )
        self.decode: Callable[..., tuple[Any, Any]] = jax.jit(self._decode)

    def step(self, parameters: Parameters, x: Any, probe: Any = None) -> tuple[Any, Any, int]:
        """The loss in nats, its gradient, and the evaluations of the forward solve."""
        (loss, nfe), gradient = jax.block_until_ready(self.value_and_grad(parameters, x, probe))
        return loss, gradient, int(nfe)

    def _loss(self, parameters: Parameters, x: Any, probe: Any) -> tuple[Any, Any]:
        log_prob, nfe = self._log_prob(parameters, x, probe, self.tolerance)
        return -log_prob.mean(), nfe

    def _log_prob(
        self, parameters: Parameters, x: Any, probe: Any, tolerance: Any
    ) -> tuple[Any, Any]:
        # the adjoint refuses what rhs closes over
        def rhs(t: Any, state: tuple[Any, Any], given: tuple[Parameters, Any]) -> tuple[Any, Any]:
            parameters, probe = given
            if probe is None:
                return exact(parameters, t, state[0])
            return push(parameters, t, state[0], probe)

        state = (x, jnp.zeros(len(x)))
        (z, change), nfe = self._solve(rhs, state, (parameters, probe), (1.0, 0.0), tolerance)
        normal = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
        return normal + change, nfe

    def _decode(self, parameters: Parameters, z: Any, tolerance: Any) -> tuple[Any, Any]:
        def rhs(t: Any, state: tuple[Any], parameters: Parameters) -> tuple[Any]:
            return (velocity(parameters, t, state[0]),)

        (x,), nfe = self._solve(rhs, (z,), parameters, (0.0, 1.0), tolerance)
        return x, nfe

    def _solve(
        self,
        rhs: Callable[..., Any],
        state: Any,
        given: Any,
        span: tuple[float, float],
        tolerance: Any,
    ) -> tuple[Any, Any]:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(rhs),
            diffrax.Dopri5(),
            *span,
            None,
            state,
            args=given,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=self.adjoint,
        )
        # the last stage is the next step's first
        return tuple(part[-1] for part in found.ys), 6 * found.stats["num_steps"] + 2
