"""The integral of a positive network."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cnf.bijections.affine import soft_bound
from cnf.bijections.base import Function, NumericMap, Pair
from cnf.bijections.quadrature import Rule, gauss_legendre, integral
from cnf.registry import record


@record
@dataclasses.dataclass(frozen=True)
class UnconstrainedMonotone(NumericMap):
    """UMNN: the integral of a positive network (Wehenkel and Louppe 2019).

    On [−bound, bound], with t = z/bound, x = c + bound·∫₀ᵗ exp(h(u)) du, where
    h(u) = d + Σ vₖ·tanh(wₖ·u + bₖ); outside it goes on in a straight line with the slope that it
    has at the end. The log-derivative is h(t); the integral is Gauss–Legendre's, and the bounds on
    v and w keep the integrand smooth enough for it to agree with h to about 1e-9 in float64.

    Parameters: c, d, then ``units`` each of v, w and b. The last two are added to fixed constants
    that make the units differ; zero is the identity.

    Attributes:
        units: hidden units of the network.
        nodes: nodes of the quadrature.
        bound: half the length of the interval.
        strength: the largest |v|, approached smoothly; also that of d, times four.
        frequency: the largest |w|, approached smoothly.

    Example:
        >>> import torch
        >>> umnn = UnconstrainedMonotone(units=4)
        >>> x, _ = umnn.forward(torch.tensor([-9.0, 2.0]), torch.zeros(2, umnn.size))
        >>> [round(value, 4) for value in x.tolist()]
        [-9.0, 2.0]
    """

    units: int = 8
    nodes: int = 32
    bound: float = 5.0
    strength: float = 2.0
    frequency: float = 6.0
    rule: Rule = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.units < 1 or self.nodes < 1:
            raise ValueError(
                f"units and nodes must be at least 1, got {self.units} and {self.nodes}"
            )
        if not (self.bound > 0 and self.strength > 0 and self.frequency > 0):
            raise ValueError(
                "bound, strength and frequency must be positive, got "
                f"{self.bound}, {self.strength} and {self.frequency}"
            )
        object.__setattr__(self, "rule", gauss_legendre(self.nodes))

    @property
    def size(self) -> int:
        """Two constants and the network's weights."""
        return 2 + 3 * self.units

    def curve(self, parameters: Tensor) -> Function:
        """The map, with the network's weights prepared."""
        units, bound = self.units, self.bound
        shift, constant, outer, inner, offset = parameters.split([1, 1, units, units, units], -1)
        shift = shift.squeeze(-1)
        constant = soft_bound(constant.squeeze(-1), 4 * self.strength)
        outer = soft_bound(outer, self.strength)
        inner = soft_bound(inner + self.frequency / 2, self.frequency)
        grid = torch.arange(units, dtype=offset.dtype, device=offset.device)
        offset = offset + self.frequency / 2 * ((2 * grid + 1) / units - 1)

        def log_slope(t: Tensor) -> Tensor:
            return constant + (outer * torch.tanh(inner * t.unsqueeze(-1) + offset)).sum(-1)

        def mapped(z: Tensor) -> Pair:
            place = (z / bound).clamp(-1, 1)
            end = log_slope(place)
            value = shift + bound * integral(lambda u: torch.exp(log_slope(u)), place, self.rule)
            return value + torch.exp(end) * (z - bound * place), end

        return mapped
