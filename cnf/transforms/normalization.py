"""Affine maps whose numbers come from data: ``Standardize``, ``ActNorm``, ``BatchNorm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.transforms.base import Mapped, Request, Transform


class Standardize(Transform):
    """x = loc + scale · z with fixed numbers per entry; log_det = Σ log scale in nats.

    Starts as the identity; ``fit`` (or ``initialize``) sets the numbers so that the data's z has
    mean 0 and standard deviation 1. They are buffers: saved, never trained.

    Args:
        event_shape: the shape of one sample.

    Example:
        >>> import torch
        >>> standardize = Standardize((1,)).fit(torch.tensor([[1.0], [3.0]]))
        >>> standardize.inverse(torch.tensor([5.0])).value.item()
        3.0
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Sequence[int]):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardize:
        """Take mean and standard deviation of ``(*batch, *event)``; a constant entry keeps scale 1.

        Raises:
            ValueError: if there is no sample or one is not finite.
        """
        loc, scale = _fitted(_samples(x, self.event_shape), (0,))
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        return self

    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """The same as ``fit``."""
        self.fit(x)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x = loc + scale · z."""
        log_det = _constant(z, self.event_shape, self.scale.log().sum())
        return Mapped(self.loc + self.scale * z, log_det, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z = (x - loc) / scale."""
        log_det = _constant(x, self.event_shape, -self.scale.log().sum())
        return Mapped((x - self.loc) / self.scale, log_det, {})

    def extra_repr(self) -> str:
        """The event's shape."""
        return f"event_shape={self.event_shape}"


class ActNorm(Transform):
    """x = loc + exp(log_scale) · z, trainable, per feature (of an image: per channel).

    log_det = entries per channel · Σ log_scale in nats. Starts as the identity; ``initialize`` sets
    the parameters so that the batch's z has mean 0 and standard deviation 1 in every channel.
    From Kingma & Dhariwal, "Glow" (2018).

    Args:
        event_shape: the shape of one sample, ``(features,)`` or ``(channels, height, width)``.

    Example:
        >>> import torch
        >>> norm = ActNorm((1,))
        >>> norm.initialize(torch.tensor([[1.0], [3.0]]))
        >>> norm.inverse(torch.tensor([5.0])).value.item()
        3.0
    """

    def __init__(self, event_shape: Sequence[int]):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.loc = nn.Parameter(torch.zeros(_per_channel(self.event_shape)))
        self.log_scale = nn.Parameter(torch.zeros(_per_channel(self.event_shape)))

    @torch.no_grad()
    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Set loc and scale from ``(*batch, *event)``; a constant channel keeps scale 1.

        Raises:
            ValueError: if there is no sample or one is not finite.
        """
        loc, scale = _fitted(_samples(x, self.event_shape), _shared(self.event_shape))
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x."""
        log_det = _constant(z, self.event_shape, self._log_det())
        return Mapped(self.loc + self.log_scale.exp() * z, log_det, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""
        log_det = _constant(x, self.event_shape, -self._log_det())
        return Mapped((x - self.loc) * (-self.log_scale).exp(), log_det, {})

    def _log_det(self) -> Tensor:
        return self.log_scale.expand(self.event_shape).sum()

    def extra_repr(self) -> str:
        """The event's shape."""
        return f"event_shape={self.event_shape}"


class BatchNorm(Transform):
    """x = mean + √(variance + ε) · exp(-log_gain) · (z - shift), per feature or channel.

    In ``eval()`` mean and variance are the running ones and both directions are exact inverses. In
    ``train()`` the direction x → z normalises with the batch's own mean and variance (and moves
    the running ones), which couples the samples: there the transform declares itself neither
    ``bijective`` nor ``exact``, for ``log_det`` takes the batch's statistics as constants. A batch
    with fewer than two values per channel has no variance; the running numbers serve then. z → x
    always uses the running ones. From Dinh et al., "Real NVP" (2017).

    Args:
        event_shape: the shape of one sample, ``(features,)`` or ``(channels, height, width)``.
        momentum: how far the running statistics move towards each batch's.
        eps: ε.

    Example:
        >>> import torch
        >>> norm = BatchNorm((1,), momentum=1.0, eps=0.0)
        >>> norm.inverse(torch.tensor([[1.0], [3.0]])).value.flatten().tolist()
        [-1.0, 1.0]
        >>> norm.eval().forward(torch.tensor([1.0])).value.item()
        3.0
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, event_shape: Sequence[int], *, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
        self.event_shape = tuple(event_shape)
        self.momentum = momentum
        self.eps = eps
        self.log_gain = nn.Parameter(torch.zeros(_per_channel(self.event_shape)))
        self.shift = nn.Parameter(torch.zeros(_per_channel(self.event_shape)))
        self.register_buffer("mean", torch.zeros(_per_channel(self.event_shape)))
        self.register_buffer("variance", torch.ones(_per_channel(self.event_shape)))

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        """False in training, where samples are coupled."""
        return not self.training

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """False in training, where samples are coupled."""
        return not self.training

    @torch.no_grad()
    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Set the running statistics from ``(*batch, *event)``.

        Raises:
            ValueError: if there is no sample or one is not finite.
        """
        mean, variance = _moments(_samples(x, self.event_shape), _shared(self.event_shape))
        self.mean.copy_(mean)
        self.variance.copy_(variance)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x with the running statistics."""
        log_scale = self._log_scale(self.variance)
        log_det = self._log_det(z, log_scale)
        return Mapped(self.mean + (z - self.shift) * log_scale.exp(), log_det, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z with the batch's statistics in training, with the running ones otherwise."""
        _batch_axes(x, self.event_shape)
        mean, variance = self.mean, self.variance
        if self.training and x.numel() > self.mean.numel():
            mean, variance = _moments(x.reshape(-1, *self.event_shape), _shared(self.event_shape))
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        log_scale = self._log_scale(variance)
        z = self.shift + (x - mean) * (-log_scale).exp()
        return Mapped(z, self._log_det(x, -log_scale), {})

    def _log_scale(self, variance: Tensor) -> Tensor:
        return 0.5 * (variance + self.eps).log() - self.log_gain

    def _log_det(self, value: Tensor, log_scale: Tensor) -> Tensor:
        return _constant(value, self.event_shape, log_scale.expand(self.event_shape).sum())

    def extra_repr(self) -> str:
        """The event's shape and the constants."""
        return f"event_shape={self.event_shape}, momentum={self.momentum}, eps={self.eps}"


def _per_channel(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number per channel that broadcasts over the event's other axes."""
    if not event_shape:
        raise ValueError("event_shape needs at least one axis; use (1,) for single numbers")
    return event_shape[0], *(1 for _ in event_shape[1:])


def _shared(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of ``(samples, *event)`` that share one number: all but the channels'."""
    return 0, *range(2, len(event_shape) + 1)


def _batch_axes(value: Tensor, event_shape: tuple[int, ...]) -> int:
    """How many batch axes ``value`` has, its event checked."""
    axes = value.ndim - len(event_shape)
    if axes < 0 or tuple(value.shape[axes:]) != event_shape:
        raise ValueError(
            f"expected (*batch, {', '.join(map(str, event_shape))}), got {tuple(value.shape)}"
        )
    return axes


def _samples(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """The data as ``(samples, *event)``, checked to be usable for statistics."""
    _batch_axes(x, event_shape)
    if x.numel() == 0:
        raise ValueError("cannot take statistics of an empty batch; pass at least one sample")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("cannot take statistics of data with NaN or infinity; drop those samples")
    return x.reshape(-1, *event_shape)


def _moments(samples: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over the given axes, without the first axis."""
    variance, mean = torch.var_mean(samples, axes, correction=0, keepdim=True)
    return mean.squeeze(0), variance.squeeze(0)


def _fitted(samples: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the given axes, without the first; constants have scale 1.

    What is nothing but the rounding of a constant counts as one.
    """
    information = torch.finfo(samples.dtype)
    peak = samples.abs().amax(axes, keepdim=True).clamp_min(2 * information.tiny)
    # in a unit near the largest value no square leaves the dtype; a power of two rounds nothing
    unit = torch.exp2(peak.log2().floor() - 1)
    loc, variance = _moments(samples / unit, axes)
    scale, unit = variance.sqrt(), unit.squeeze(0)
    spread = scale * unit
    varies = (scale > 4 * information.eps * loc.abs()) & (spread >= information.tiny)
    return loc * unit, torch.where(varies, spread, torch.ones_like(spread))


def _constant(value: Tensor, event_shape: tuple[int, ...], log_det: Tensor) -> Tensor:
    """The same ``log_det`` for every sample of ``value``."""
    return log_det.expand(value.shape[: _batch_axes(value, event_shape)])
