"""One scalar map applied to every entry of an event."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.bijections import ScalarMap
from cnf.transforms.base import Mapped, Request, Transform


class Elementwise(Transform):
    """A scalar map on every entry: x_i = f(z_i; θ_i), log_det = Σ_i log |∂x_i/∂z_i| in nats.

    θ is either the transform's own parameter, zero at first (so that the map starts as the
    identity or as near to it as the family has), or what a conditioner makes of the context.

    Args:
        scalar_map: the map, for instance one of ``cnf.bijections``.
        event_shape: the shape of one sample, ``(features,)`` or ``(channels, height, width)``.
        conditioner: a module from context ``(*batch, context_features)`` to
            ``(*batch, entries * scalar_map.size)``; None gives the map its own parameters.

    Example:
        >>> import torch
        >>> from cnf.bijections import Affine
        >>> from cnf.transforms import Elementwise
        >>> mapped = Elementwise(Affine(), (2,))(torch.tensor([1.0, 3.0]))
        >>> mapped.value.tolist(), mapped.log_det.item()
        ([1.0, 3.0], 0.0)
    """

    values: Tensor | None

    def __init__(
        self,
        scalar_map: ScalarMap,
        event_shape: Sequence[int],
        conditioner: nn.Module | None = None,
    ):
        super().__init__()
        self.scalar_map = scalar_map
        self.event_shape = tuple(event_shape)
        if not self.event_shape:
            raise ValueError("event_shape needs at least one axis; use (1,) for single numbers")
        self.conditioner = conditioner
        if conditioner is not None:
            self.register_parameter("values", None)
        elif scalar_map.size:
            self.values = nn.Parameter(torch.zeros(*self.event_shape, scalar_map.size))
        else:
            # a parameter without entries would only confuse optimisers
            self.register_buffer("values", torch.zeros(*self.event_shape, 0), persistent=False)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x, entry by entry."""
        return self._sum(*self.scalar_map.forward(z, self._theta(z, context)))

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z, entry by entry."""
        return self._sum(*self.scalar_map.inverse(x, self._theta(x, context)))

    def _theta(self, value: Tensor, context: Tensor | None) -> Tensor:
        """The scalar map's parameters for every entry, ``(*batch, *event, size)``."""
        axes = len(self.event_shape)
        if tuple(value.shape[-axes:]) != self.event_shape:
            raise ValueError(
                f"expected (*batch, {', '.join(map(str, self.event_shape))}), "
                f"got {tuple(value.shape)}"
            )
        shape = (*value.shape, self.scalar_map.size)
        if self.values is not None:
            return self.values.expand(shape)
        if context is None:
            raise ValueError("this transform takes its parameters from a context: pass context=")
        parameters = self.conditioner(context)  # type: ignore[misc]
        expected = math.prod(self.event_shape) * self.scalar_map.size
        if parameters.shape[-1] != expected:
            raise ValueError(
                f"the conditioner must return {expected} numbers per sample (entries times the "
                f"scalar map's size), it returned {parameters.shape[-1]}"
            )
        return parameters.reshape(shape)

    def _sum(self, value: Tensor, log_derivative: Tensor) -> Mapped:
        """Sum the entries' log-derivatives over the event."""
        return Mapped(value, log_derivative.sum(tuple(range(-len(self.event_shape), 0))), {})

    def extra_repr(self) -> str:
        """The map and the event's shape."""
        return f"{self.scalar_map}, event_shape={self.event_shape}"
