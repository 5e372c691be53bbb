"""Dequantisation: integers as densities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cnf.data.errors import DataError
from cnf.transforms.base import Mapped, Request, Transform


class Dequantize(Transform):
    """z = x + u for integers x and noise u in [0, 1); x = ⌊z⌋, limited to 0, …, bins − 1.

    ``log_det`` is −log q(u | x) in nats, so that the flow's log-density is a one-sample estimate of
    E_q[log p(x + u) − log q(u | x)], a lower bound on the log-probability of x. It is repeatable
    for a ``Request`` whose generator is seeded alike; without a generator the noise is torch's.
    It is −inf for an x that is not integers from 0 to bins − 1.

    - Uniform: q = 1, u is drawn uniformly. Theis et al. 2016, https://arxiv.org/abs/1511.01844.
    - Variational: u = sigmoid(ε′) with ε′ the image of a normal ε under a trained map given x,
      which makes the bound tighter. Ho et al. 2019, https://arxiv.org/abs/1902.00275.

    Args:
        event_shape: the shape of one x, ``(features,)`` or ``(channels, height, width)``.
        bins: how many values an entry of x may have.
        noise: the map of the variational form: a transform of x (scaled to [−1, 1]) with ε behind
            it on the first axis of the event, ``(2 · channels, height, width)``, that leaves x
            alone, such as couplings whose masks are False there. None for uniform noise.

    Example:
        >>> import torch
        >>> dequantize = Dequantize((2,), bins=4)
        >>> dequantize(torch.tensor([3.7, 0.2])).value
        tensor([3., 0.])
        >>> z = dequantize.inverse(torch.tensor([3.0, 0.0])).value
        >>> dequantize(z).value
        tensor([3., 0.])
    """

    bijective = False
    exact = False

    def __init__(self, event_shape: Sequence[int], bins: int = 256, noise: Transform | None = None):
        super().__init__()
        self.event_shape = tuple(event_shape)
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        self.bins = bins
        if noise is not None:
            joint = (2 * self.event_shape[0], *self.event_shape[1:])
            if noise.latent_shape(joint) != joint:
                raise ValueError(
                    f"noise must map x and ε together, {joint}, to that shape, got "
                    f"{noise.latent_shape(joint)}"
                )
        self.noise = noise

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Round down; ``log_det`` is log q(z − x | x)."""
        x = z.detach().floor().clamp(0, self.bins - 1)
        zeros = self._zeros(x)
        if self.noise is None:
            return Mapped(x, zeros, {})
        if request is not None and not request.log_det:
            return Mapped(x, zeros + math.nan, {})
        information = torch.finfo(z.dtype)
        u = (z - x).clamp(information.tiny, 1 - information.eps)
        logit = torch.log(u) - torch.log1p(-u)
        joint, log_det, _ = self.noise.inverse(self._joint(x, logit), context, request)
        slope = logsigmoid(logit) + logsigmoid(-logit)
        epsilon = joint.chunk(2, -len(self.event_shape))[1]
        return Mapped(x, self._sum(_log_normal(epsilon) - slope) + log_det, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Add noise; ``log_det`` is −log q(noise | x)."""
        generator = None if request is None else request.generator
        log_det = self._zeros(x)
        if self.noise is None:
            u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        else:
            epsilon = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            joint, log_det, _ = self.noise.forward(self._joint(x, epsilon), context, request)
            logit = joint.chunk(2, -len(self.event_shape))[1]
            slope = logsigmoid(logit) + logsigmoid(-logit)
            u, log_det = torch.sigmoid(logit), log_det + self._sum(slope - _log_normal(epsilon))
        log_det = torch.where(self._valid(x), log_det, -math.inf)
        # rounding must not carry x + u into the next bin
        return Mapped(torch.minimum(x + u, torch.nextafter(x + 1, x)), log_det, {})

    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Check that the data are what this transform is for."""
        self.check(x)

    def check(self, x: Tensor, what: str = "samples") -> None:
        """Refuse samples that are not integers from 0 to bins − 1.

        Raises:
            DataError: if there are any.
        """
        valid = self._valid(x)
        if not bool(valid.all()):
            wrong = x[~valid]
            raise DataError(
                f"dequantisation takes integers from 0 to {self.bins - 1}, got {len(wrong)} {what}"
                f" with others, values from {wrong.min():g} to {wrong.max():g}: multiply and round"
                " them, pass the right bins=…, or build the flow with dequantize='none'"
            )

    def extra_repr(self) -> str:
        """The event's shape and the number of values."""
        return f"{self.event_shape}, bins={self.bins}"

    def _joint(self, x: Tensor, noise: Tensor) -> Tensor:
        scaled = (2 * x + 1) / self.bins - 1
        return torch.cat([scaled, noise], -len(self.event_shape))

    def _valid(self, x: Tensor) -> Tensor:
        """Which samples are integers from 0 to bins − 1, ``(*batch,)``."""
        valid = (x == x.floor()) & (x >= 0) & (x < self.bins)
        return valid.flatten(x.dim() - len(self.event_shape)).all(-1)

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(-len(self.event_shape), 0)))

    def _zeros(self, x: Tensor) -> Tensor:
        axes = x.dim() - len(self.event_shape)
        if axes < 0 or tuple(x.shape[axes:]) != self.event_shape:
            raise ValueError(
                f"expected (*batch, {', '.join(map(str, self.event_shape))}), got {tuple(x.shape)}"
            )
        return x.new_zeros(x.shape[:axes])


def _log_normal(values: Tensor) -> Tensor:
    """Log-density of the standard normal, entry by entry."""
    return -0.5 * (values.square() + math.log(2 * math.pi))
