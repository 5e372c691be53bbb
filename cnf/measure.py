"""What distributions differ by: Monte-Carlo estimates with standard errors, and units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.data import Target
from cnf.distributions import as_shape
from cnf.flow import Flow

CHUNK = 10_000  # points that are drawn and scored at once


class Estimate(NamedTuple):
    """A mean over independent draws.

    Attributes:
        value: the mean, in nats.
        stderr: its standard error, from the spread of the draws.
    """

    value: float
    stderr: float


class Scored(Protocol):
    """Whatever gives log-densities in nats."""

    def log_prob(self, x: Any) -> Tensor:
        """Log-density of points ``(n, *event)``, ``(n,)``."""


def entropy(
    p: Any, n: int = 10_000, *, context: Any = None, generator: torch.Generator | None = None
) -> Estimate:
    """Differential entropy −E_p[log p(x)], in nats.

    Args:
        p: a flow, a target, or a ``torch.distributions`` object with samples of one event each.
        n: how many samples to take.
        context: where a conditional flow is looked at, ``(context_features,)``.
        generator: where the samples come from; ``torch.distributions`` knows none but the global.

    Example:
        >>> import cnf
        >>> generator = torch.Generator().manual_seed(0)
        >>> value, stderr = entropy(cnf.data.toy("checkerboard"), 1000, generator=generator)
        >>> round(value, 4), round(stderr, 4)
        (3.4657, 0.0)
    """
    _check(n)
    parts = [-log_p for _, log_p in (_draw(p, m, context, None, generator) for m in _portions(n))]
    return _estimate(torch.cat(parts))


def kl(
    p: Any,
    q: Scored,
    n: int = 10_000,
    *,
    context: Any = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Kullback–Leibler divergence KL(p ‖ q) = E_p[log p(x) − log q(x)], in nats.

    Both densities are taken at the same points, so that their scatter cancels; an estimate may
    still come out below zero, by some standard errors at most. It is infinite if a sample falls
    where q has no mass.

    Args:
        p: what is sampled: a flow, a target, or a ``torch.distributions`` object.
        q: anything with ``log_prob``; a flow's dtype and device decide what it is given.
        n: how many samples to take.
        context: where conditional flows are looked at, ``(context_features,)``.
        generator: where the samples come from.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> p, q = (Independent(Normal(torch.full((2,), m), 1.0), 1) for m in (0.0, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> value, stderr = kl(p, q, 10_000)
        >>> abs(value - 1.0) < 4 * stderr
        True
    """
    _check(n)
    parts = []
    for m in _portions(n):
        x, log_p = _draw(p, m, context, q if isinstance(q, Flow) else None, generator)
        parts.append(log_p - _score(q, x, context).to(log_p.device))
    return _estimate(torch.cat(parts))


@torch.no_grad()
def _draw(
    p: Any, n: int, context: Any, like: Flow | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Samples of p, for ``like`` to be scored, and their log-density under p in float64."""
    if isinstance(p, Target):
        dtype = torch.float64 if like is None else like.dtype
        x = p.sample(n, generator, dtype, None if like is None else like.device)
    elif isinstance(p, Flow):
        x = p.sample((n,), _at(p, context), generator=generator)
    elif isinstance(p, torch.distributions.Distribution):
        if generator is not None:
            raise ValueError(
                f"{type(p).__name__} draws from torch's global generator only; seed that instead "
                "of passing generator="
            )
        x = p.sample((n,))
    else:
        raise TypeError(
            f"cannot sample a {type(p).__name__}: expected a Flow, a Target or a "
            "torch.distributions object"
        )
    return x, _score(p, x, context)


@torch.no_grad()
def _score(q: Scored, x: Tensor, context: Any) -> Tensor:
    """Log q(x) in float64, checked to be one number per sample."""
    if isinstance(q, Flow):
        log_prob = q.log_prob(x.to(q.device, q.dtype), _at(q, context))
    else:
        log_prob = q.log_prob(x)
    if log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"{type(q).__name__} gives log-densities of shape {tuple(log_prob.shape)} for "
            f"{len(x)} samples; wrap its batch axes in torch.distributions.Independent"
        )
    return log_prob.double()


def _at(flow: Flow, context: Any) -> Any:
    """The context for the flows that take one: p may be conditional and q not, or the reverse."""
    return context if flow.context_features else None


def _portions(n: int) -> list[int]:
    return [min(CHUNK, n - start) for start in range(0, n, CHUNK)]


def _estimate(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _check(n: int) -> None:
    if n < 2:
        raise ValueError(f"an error needs at least two samples, got n={n}")


def bits_per_dimension(log_prob: Tensor, event_shape: int | Sequence[int]) -> Tensor:
    """−log₂ p(x) per entry of x, what densities of images are compared by.

    For integers this is how many bits a lossless code would spend on each; the log-probability (or
    the bound on it) of a flow with ``dequantize`` counts so. For a density of images scaled by
    1/256 add 8 bits.

    Args:
        log_prob: in nats, ``(*batch,)``.
        event_shape: the shape of one x.

    Returns:
        ``(*batch,)``.

    Example:
        >>> pixels = (1, 8, 8)
        >>> round(bits_per_dimension(torch.tensor(-64 * math.log(256)), pixels).item(), 6)
        8.0
    """
    return -log_prob / (math.prod(as_shape(event_shape)) * math.log(2))
