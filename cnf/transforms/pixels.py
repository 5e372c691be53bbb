"""Rearrangements of an image's pixels: ``Squeeze`` and ``Checkerboard``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.transforms.base import Mapped, Request, Transform


class Rearrangement(Transform):
    """A map that moves pixels about: log_det = 0, and x and z have shapes of their own."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """The pixels of x where z has them."""

    @abstractmethod
    def scatter(self, z: Tensor) -> Tensor:
        """The pixels of z where x has them."""

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x."""
        return self._mapped(z, self.data_shape, self.scatter)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""
        return self._mapped(x, self.latent_shape, self.gather)

    @staticmethod
    def _mapped(
        value: Tensor,
        shape: Callable[[Sequence[int]], tuple[int, ...]],
        move: Callable[[Tensor], Tensor],
    ) -> Mapped:
        shape(value.shape[-3:])  # refuses what cannot be moved
        return Mapped(move(value), value.new_zeros(value.shape[:-3]), {})


class Squeeze(Rearrangement):
    """Space to channels: each square of factor² pixels of x becomes one pixel of z.

    x is ``(*batch, C, H, W)`` and z ``(*batch, C·factor², H/factor, W/factor)``; log_det = 0.
    Dinh et al. 2017, https://arxiv.org/abs/1605.08803.

    Args:
        factor: the side of a square.

    Example:
        >>> import torch
        >>> squeeze = Squeeze()
        >>> squeeze.inverse(torch.zeros(5, 1, 8, 8)).value.shape
        torch.Size([5, 4, 4, 4])
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor

    def gather(self, x: Tensor) -> Tensor:
        """Squares to channels."""
        squares = x.unflatten(-1, (-1, self.factor)).unflatten(-3, (-1, self.factor))
        return squares.movedim((-3, -1), (-4, -3)).flatten(-5, -3)

    def scatter(self, z: Tensor) -> Tensor:
        """Channels to squares."""
        squares = z.unflatten(-3, (-1, self.factor, self.factor))
        return squares.movedim((-4, -3), (-3, -1)).flatten(-2).flatten(-3, -2)

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """More channels, fewer pixels."""
        channels, height, width = image_shape(event_shape)
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {height}×{width} cannot be squeezed by {self.factor}: use fewer "
                "levels, or pad the images"
            )
        factor = self.factor
        return channels * factor**2, height // factor, width // factor

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Fewer channels, more pixels."""
        channels, height, width = image_shape(latent_shape)
        if channels % self.factor**2:
            raise ValueError(
                f"Squeeze({self.factor}) unpacks {self.factor**2} channels into one, got "
                f"{channels} channels"
            )
        return channels // self.factor**2, height * self.factor, width * self.factor

    def extra_repr(self) -> str:
        """The side of a square."""
        return f"{self.factor}"


class Checkerboard(Rearrangement):
    """The two colours of a chessboard as channels: z's first half of them is white, the rest black.

    x is ``(*batch, C, H, W)`` and z ``(*batch, 2C, H, W/2)``; log_det = 0. White are the pixels
    whose row and column add up to an even number. A channel-wise coupling on z's side is the
    checkerboard coupling of Dinh et al. 2017 at half the work, as in Ho et al. 2019 (Flow++).

    Example:
        >>> import torch
        >>> Checkerboard().inverse(torch.tensor([[[1, 2], [3, 4]]])).value.flatten(1).tolist()
        [[1, 4], [2, 3]]
    """

    def gather(self, x: Tensor) -> Tensor:
        """Colours to channels."""
        first, second = x[..., 0::2], x[..., 1::2]
        swap = _odd_rows(first)
        white, black = torch.where(swap, second, first), torch.where(swap, first, second)
        return torch.cat([white, black], -3)

    def scatter(self, z: Tensor) -> Tensor:
        """Channels to colours."""
        white, black = z.chunk(2, -3)
        swap = _odd_rows(white)
        first, second = torch.where(swap, black, white), torch.where(swap, white, black)
        return torch.stack([first, second], -1).flatten(-2)

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """Twice the channels, half the width."""
        channels, height, width = image_shape(event_shape)
        if width % 2:
            raise ValueError(f"a checkerboard needs an even width, got images of {height}×{width}")
        return 2 * channels, height, width // 2

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Half the channels, twice the width."""
        channels, height, width = image_shape(latent_shape)
        if channels % 2:
            raise ValueError(f"Checkerboard needs as many white as black, got {channels} channels")
        return channels // 2, height, 2 * width


def _odd_rows(like: Tensor) -> Tensor:
    """True in rows 1, 3, …, ``(height, 1)``."""
    return (torch.arange(like.shape[-2], device=like.device) % 2 == 1).unsqueeze(-1)


def image_shape(event_shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape of an image, checked.

    Raises:
        ValueError: if it is not ``(channels, height, width)``.
    """
    if len(event_shape) != 3:
        raise ValueError(f"an image has shape (channels, height, width), got {tuple(event_shape)}")
    channels, height, width = event_shape
    return channels, height, width
