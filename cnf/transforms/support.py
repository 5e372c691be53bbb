"""Densities on part of space: fixed maps from all of it, to stand outermost in a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from cnf.bijections import Exp, Sigmoid
from cnf.bijections.fixed import interior
from cnf.data.errors import DataError
from cnf.registry import unknown_name
from cnf.transforms.base import Mapped, Request, Transform, compose
from cnf.transforms.elementwise import Elementwise
from cnf.transforms.normalization import Standardize


class Interval(Elementwise):
    """Every entry into (low, high): x = low + (high - low) σ(z), or low + eᶻ without an upper end.

    x is inside, however far out z is. ``log_det`` of the inverse is -inf for an x that is not.

    Args:
        event_shape: the shape of one sample.
        low: the lower end.
        high: the upper end, which may be infinite.

    Example:
        >>> import torch
        >>> Interval((2,), 0.0, 10.0)(torch.zeros(2)).value
        tensor([5., 5.])
    """

    def __init__(self, event_shape: Sequence[int], low: float = 0.0, high: float = math.inf):
        if not (math.isfinite(low) and low < high):
            raise ValueError(
                f"an interval has a finite lower end and a larger upper one, got ({low}, {high}); "
                "for data with an upper end only, model -x"
            )
        bounded = math.isfinite(high)
        super().__init__(Sigmoid() if bounded else Exp(), event_shape)
        self.low, self.high, self.axes = low, high, len(self.event_shape)
        self.width = high - low if bounded else 1.0
        self.log_scale = math.prod(self.event_shape) * math.log(self.width)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z into the interval."""
        share, log_det, _ = super().forward(z)
        x = interior(self.low + self.width * share, self.low, self.high)
        return Mapped(x, log_det + self.log_scale, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""
        share = (interior(x, self.low, self.high) - self.low) / self.width
        z, log_det, _ = super().inverse(interior(share, *self.scalar_map.codomain))
        inside = ((x > self.low) & (x < self.high)).flatten(-self.axes).all(-1)
        return Mapped(z, torch.where(inside, log_det - self.log_scale, -math.inf), {})

    @property
    def constraint(self) -> Any:
        """The support, as ``torch.distributions`` says it."""
        bounded = math.isfinite(self.high)
        inside = (
            constraints.interval(self.low, self.high)
            if bounded
            else constraints.greater_than(self.low)
        )
        return constraints.independent(inside, self.axes)


class Simplex(Transform):
    """Positive numbers that sum to one: xᵢ = eᶻⁱ / (1 + Σ eᶻ), the last one taking the rest.

    z has one entry less than x. The density is one over all entries but the last, as that of
    ``torch.distributions.Dirichlet``: log |det| = Σ log xᵢ over all of them. ``log_det`` of the
    inverse is -inf for an x with an entry that is not positive, or whose sum is not one.

    Args:
        entries: of x, at least 2.

    Example:
        >>> import torch
        >>> Simplex(4)(torch.zeros(3)).value
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    constraint = constraints.simplex

    def __init__(self, entries: int):
        super().__init__()
        if entries < 2:
            raise ValueError(f"a simplex has at least 2 entries, got {entries}")
        self.entries = entries

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to shares."""
        log_x = torch.log_softmax(torch.cat([z, torch.zeros_like(z[..., :1])], -1), -1)
        x = log_x.exp().clamp_min(torch.finfo(z.dtype).tiny)
        return Mapped(x, log_x.sum(-1), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map shares to z."""
        rounding = max(1e-6, 10 * self.entries * torch.finfo(x.dtype).eps)
        inside = (x > 0).all(-1) & ((x.sum(-1) - 1).abs() <= rounding)
        log_x = x.clamp_min(torch.finfo(x.dtype).tiny).log()
        log_det = torch.where(inside, -log_x.sum(-1), -math.inf)
        return Mapped(log_x[..., :-1] - log_x[..., -1:], log_det, {})

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """One entry less."""
        if tuple(event_shape) != (self.entries,):
            raise ValueError(
                f"this simplex has {self.entries} entries, and the event {tuple(event_shape)}"
            )
        return (self.entries - 1,)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """One entry more."""
        return (self.entries,)

    def extra_repr(self) -> str:
        """The number of entries."""
        return f"{self.entries}"


class SupportedStandardize(Standardize):
    """``Standardize`` behind a map onto a support: x = support(loc + scale · z).

    ``log_det`` of the inverse is -inf outside of the support; the z of such an x is 0, so that what
    comes after meets nothing extreme.

    Args:
        support: the map, a fixed one.
        event_shape: the shape of one x.
    """

    def __init__(self, support: Transform, event_shape: Sequence[int]):
        super().__init__(support.latent_shape(event_shape))
        self.support = support

    @property
    def constraint(self) -> Any:
        """What the support says of itself; all of real space if nothing."""
        everywhere = constraints.independent(constraints.real, len(self.event_shape))
        return getattr(self.support, "constraint", everywhere)

    @torch.no_grad()
    def fit(self, x: Tensor) -> SupportedStandardize:
        """Take mean and standard deviation of what lies behind the support.

        Raises:
            DataError: if a sample lies outside.
            ValueError: if there is no sample, or one is not finite.
        """
        super().fit(self._inner(x, "samples"))
        return self

    @torch.no_grad()
    def check(self, x: Tensor, what: str = "samples") -> None:
        """Refuse samples outside of the support.

        Raises:
            DataError: if there are any.
        """
        self._inner(x, what)

    def _inner(self, x: Tensor, what: str) -> Tensor:
        """The samples without their support, where all of them lie inside."""
        inner, log_det, _ = self.support.inverse(x)
        outside = (log_det == -math.inf).flatten()
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            first = x.reshape(len(outside), -1)[row].tolist()
            said = ", ".join(f"{value:g}" for value in first[:5]) + ", …" * (len(first) > 5)
            raise DataError(
                f"{int(outside.sum())} of {len(outside)} {what} lie outside of the flow's "
                f"support {self.constraint}, its ends included, the first in row {row} of them: "
                f"({said}); drop or move them, or build the flow with another support"
            )
        return inner

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z into the support."""
        return compose(z, (super().forward, self.support.forward), context, request)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""
        z, log_det, costs = compose(x, (self.support.inverse, super().inverse), context, request)
        outside = (log_det == -math.inf).reshape(*log_det.shape, *[1] * len(self.event_shape))
        return Mapped(torch.where(outside, 0.0, z), log_det, costs)

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape behind the support."""
        return self.support.latent_shape(event_shape)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the support."""
        return self.support.data_shape(latent_shape)


SUPPORTS = ("positive", "interval", "simplex")


def as_support(
    support: str | Sequence[float] | None, event_shape: Sequence[int]
) -> Transform | None:
    """The map onto a support that a model's argument names.

    Args:
        support: ``"positive"``, ``"interval"`` for (0, 1), the two ends ``(low, high)`` of another
            one (high may be infinite), ``"simplex"``, or None for all of space.
        event_shape: the shape of one sample.
    """
    if support is None:
        return None
    if not isinstance(support, str):
        if len(support) != 2:
            raise ValueError(f"an interval has two ends, (low, high), got {support}")
        low, high = support
        return Interval(event_shape, low, high)
    if support not in SUPPORTS:
        raise unknown_name("support", support, dict.fromkeys(SUPPORTS))
    if support == "simplex":
        if len(event_shape) != 1:
            raise ValueError(f"a simplex is one of vectors, and the event is {tuple(event_shape)}")
        return Simplex(event_shape[0])
    return Interval(event_shape, 0.0, math.inf if support == "positive" else 1.0)
