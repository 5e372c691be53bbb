"""The contract of a target: samples and the exact density that they come from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Beyond this a squared coordinate overflows; the density of every target has long been zero.
_FAR = 1e100
# Elements of the largest intermediate tensor of one chunk: 16 MiB in float64.
_CHUNK_ELEMENTS = 2**21


@dataclasses.dataclass(frozen=True)
class Noise:
    """Where a target's random numbers come from; all of them are drawn in float64.

    Attributes:
        generator: None means torch's global generator.
        device: where the numbers are drawn; None means torch's default device.
    """

    generator: torch.Generator | None
    device: torch.device | None

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers on [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    def choice(self, options: int, *shape: int) -> Tensor:
        """Integers, uniform on {0, …, options - 1}."""
        return torch.randint(options, shape, generator=self.generator, device=self.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """A distribution in the plane that can be sampled and whose log-density is exact.

    Attributes:
        name: what ``cnf.data.toy`` calls it.
        entropy: differential entropy, in nats.
        entropy_stderr: how far ``entropy`` may be off, in nats; it is computed by quadrature, so
            this is a bound on the error of that.
        bounds: limits for pictures, ``((x_low, x_high), (y_low, y_high))``.

    Example:
        >>> import torch
        >>> from cnf.data import toy
        >>> target = toy("8gaussians")
        >>> x = target.sample(1000, generator=torch.Generator().manual_seed(0))
        >>> x.shape, target.log_prob(x).shape
        (torch.Size([1000, 2]), torch.Size([1000]))
        >>> abs(target.log_prob(x).mean().item() + target.entropy) < 0.1
        True
    """

    name: str
    entropy: float
    entropy_stderr: float = 0.0
    bounds: tuple[tuple[float, float], tuple[float, float]] = ((-4.0, 4.0), (-4.0, 4.0))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return (2,)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``n`` independent points, ``(n, 2)``.

        Args:
            n: how many.
            generator: makes the draw repeatable; None means torch's global generator. The numbers
                are drawn on its device and in float64, so that one seed gives one sample whatever
                the dtype and the device that are asked for.
            dtype: of the result.
            device: of the result; None means the generator's.

        Raises:
            ValueError: if ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"a sample has zero points or more, got n={n}")
        if device is None:
            drawn_on = generator.device if generator is not None else None
        else:
            drawn_on = generator.device if generator is not None else torch.device(device)
        points = self._draw(n, Noise(generator, drawn_on))
        return points.to(device=device, dtype=dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density at ``x``, in nats.

        It is computed in float64 whatever the dtype of ``x``, and differentiable wherever the
        density is smooth. Infinite coordinates, and any point outside a bounded support, have
        log-density ``-inf``; a NaN coordinate has no density and gives NaN.

        Args:
            x: points, ``(*batch, 2)``, floating point.

        Returns:
            ``(*batch,)``, in the dtype and on the device of ``x``.

        Raises:
            TypeError: if ``x`` is not a floating-point tensor.
            ValueError: if the last axis of ``x`` is not 2.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"log_prob takes a floating-point tensor, got {what}; convert with "
                "torch.as_tensor(x, dtype=torch.float64)"
            )
        if x.shape[-1:] != self.event_shape:
            raise ValueError(
                f"{self.name} is a density on the plane: expected x of shape (*batch, 2), "
                f"got {tuple(x.shape)}"
            )
        points = x.reshape(-1, 2).to(torch.float64)
        inside = (points.abs() < _FAR).all(-1)
        safe = torch.where(inside[:, None], points, 0.0)
        rows = max(1, _CHUNK_ELEMENTS // self._width)
        value = torch.cat([self._log_density(chunk) for chunk in safe.split(rows)])
        outside = torch.where(points.isnan().any(-1), torch.nan, -torch.inf)
        return torch.where(inside, value, outside).reshape(x.shape[:-1]).to(x.dtype)

    @property
    def _width(self) -> int:
        """How many float64 numbers ``_log_density`` holds at once for each point."""
        return 32

    @abstractmethod
    def _draw(self, n: int, noise: Noise) -> Tensor:
        """Draw ``n`` independent points, ``(n, 2)`` in float64."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Log-density of finite float64 points, ``(n, 2)`` to ``(n,)``."""
