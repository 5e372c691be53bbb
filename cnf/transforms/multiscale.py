"""Multiscale flows: part of the image leaves after every level."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cnf.transforms.base import Mapped, Request, Transform, compose, value_only
from cnf.transforms.pixels import image_shape


class Multiscale(Transform):
    """Levels of transforms; after each but the last, half of the channels leaves for z.

    z is one flat vector: what left first stands first, what went through all levels last. The
    log-determinants of the levels add. Dinh et al. 2017, https://arxiv.org/abs/1605.08803.

    The channels that leave are the later ones. A level that begins (on z's side) with a
    ``Coupling`` of mask ``channel_mask(channels)`` gives them a learned normal prior given those
    that stay, as in Kingma & Dhariwal 2018 (Glow), while the base stays a standard normal.

    Args:
        levels: from the data's end inwards; usually each is a ``Chain`` with a ``Squeeze`` last.
        event_shape: the shape of one x, ``(channels, height, width)``.

    Example:
        >>> import torch
        >>> from cnf.transforms import Squeeze
        >>> multiscale = Multiscale([Squeeze(), Squeeze()], (1, 4, 4))
        >>> multiscale.latent_shape((1, 4, 4))
        (16,)
        >>> multiscale.inverse(torch.arange(16.0).reshape(1, 4, 4)).value[:4]
        tensor([ 4.,  6., 12., 14.])
    """

    def __init__(self, levels: Iterable[Transform], event_shape: Sequence[int]):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        if len(self.levels) == 0:
            raise ValueError("a multiscale transform needs at least one level")
        self.event_shape = image_shape(event_shape)
        self.stay, self.leave = self._shapes()

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        """Whether every level is."""
        return all(level.bijective for level in self._levels())

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether every level is."""
        return all(level.exact for level in self._levels())

    @property
    def steps(self) -> tuple[int, int]:  # type: ignore[override]
        """The most that any level takes."""
        forward, inverse = zip(*(level.steps for level in self._levels()), strict=True)
        return max(forward), max(inverse)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x: what left joins again, level by level."""
        size = math.prod(self.event_shape)
        if z.dim() < 1 or z.shape[-1] != size:
            raise ValueError(f"expected (*batch, {size}), got {tuple(z.shape)}")
        shapes = [*self.leave, self.stay[-1]]
        parts = [
            part.unflatten(-1, shape)
            for part, shape in zip(z.split([math.prod(s) for s in shapes], -1), shapes, strict=True)
        ]
        steps = [
            functools.partial(self._join, level, part)
            for level, part in zip(self._levels(), [*parts[:-1], None], strict=True)
        ]
        return compose(parts[-1], reversed(steps), context, request)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z: half of the channels leaves after every level but the last."""
        if tuple(x.shape[-3:]) != self.event_shape:
            raise ValueError(
                f"expected (*batch, {', '.join(map(str, self.event_shape))}), got {tuple(x.shape)}"
            )
        left: list[Tensor] = []
        steps = [functools.partial(self._part, level, left) for level in self._levels()]
        last, log_det, costs = compose(x, steps, context, request)
        return Mapped(torch.cat([*left, last.flatten(-3)], -1), log_det, costs)

    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Initialise the levels from the data's end, each on what the one before it passes on."""
        request = value_only(request)
        for level in self._levels():
            level.initialize(x, context, request)
            x = self._part(level, [], x, context, request).value

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """One flat vector."""
        if tuple(event_shape) != self.event_shape:
            raise ValueError(
                f"this transform was built for {self.event_shape}, got {tuple(event_shape)}"
            )
        return (math.prod(self.event_shape),)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The image."""
        return self.event_shape

    def extra_repr(self) -> str:
        """The event's shape."""
        return f"event_shape={self.event_shape}"

    def _levels(self) -> list[Transform]:
        return list(self.levels)  # type: ignore[arg-type]

    def _shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """What stays after each level, and what leaves after each but the last."""
        stay: list[tuple[int, ...]] = []
        leave: list[tuple[int, ...]] = []
        shape: tuple[int, ...] = self.event_shape
        for level in self._levels():
            shape = level.latent_shape(shape)
            if len(leave) + 1 < len(self.levels):
                channels, *pixels = image_shape(shape)
                if channels < 2:
                    raise ValueError(
                        f"level {len(leave) + 1} ends with {shape}: one channel cannot be divided; "
                        "end the level with a Squeeze"
                    )
                leave.append((channels - channels // 2, *pixels))
                shape = (channels // 2, *pixels)
            stay.append(shape)
        return stay, leave

    def _part(
        self,
        level: Transform,
        left: list[Tensor],
        x: Tensor,
        context: Tensor | None,
        request: Request | None,
    ) -> Mapped:
        """One level x → z; what leaves is added to ``left``."""
        value, log_det, costs = level.inverse(x, context, request)
        if level is not self.levels[-1]:
            kept = value.shape[-3] // 2
            value, out = value.split([kept, value.shape[-3] - kept], -3)
            left.append(out.flatten(-3))
        return Mapped(value, log_det, costs)

    @staticmethod
    def _join(
        level: Transform,
        part: Tensor | None,
        z: Tensor,
        context: Tensor | None,
        request: Request | None,
    ) -> Mapped:
        """One level z → x, after ``part`` has come back."""
        if part is not None:
            z = torch.cat([z, part], -3)
        return level.forward(z, context, request)
