"""Coupling: one part of the features is mapped under parameters computed from the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnf.bijections import ScalarMap
from cnf.transforms.base import Mapped, Request, Transform


def half_mask(features: int, flip: bool = False) -> Tensor:
    """True for the features after the first half; with ``flip``, for the first half.

    >>> half_mask(4)
    tensor([False, False,  True,  True])
    """
    return (torch.arange(features) >= features // 2) ^ flip


def alternating_mask(features: int, flip: bool = False) -> Tensor:
    """True for every other feature: 1, 3, … or, with ``flip``, 0, 2, ….

    >>> alternating_mask(4)
    tensor([False,  True, False,  True])
    """
    return (torch.arange(features) % 2 == 1) ^ flip


def random_mask(features: int, generator: torch.Generator | None = None) -> Tensor:
    """True for a random half of the features, the larger one if they are odd in number.

    >>> int(random_mask(5).sum())
    3
    """
    return half_mask(features)[torch.randperm(features, generator=generator)]


def channel_mask(channels: int, flip: bool = False) -> Tensor:
    """``half_mask`` over the channels of an image, ``(channels, 1, 1)``.

    >>> channel_mask(4).shape
    torch.Size([4, 1, 1])
    """
    return half_mask(channels, flip)[:, None, None]


class Coupling(Transform):
    """x_A = z_A and x_B = τ(z_B; θ(x_A, context)), with a scalar map τ and any network θ.

    log_det = Σ_{i∈B} log |dτ/dz_i|, in nats. Both directions take one pass of the network. Dinh et
    al. 2017, https://arxiv.org/abs/1605.08803.

    Args:
        scalar_map: τ.
        conditioner: θ, called with x_A ``(*batch, |A|)`` and the context; gives
            ``(*batch, |B| · scalar_map.size)`` or ``(*batch, |B|, scalar_map.size)``. For images
            it takes ``(*batch, |A|, height, width)`` and has its outputs on the channels' axis.
        mask: boolean, ``(features,)``: True for the features that are transformed (B). For images
            ``(channels, 1, 1)``; a checkerboard is ``Checkerboard`` around such a coupling.
        identity_map: what to do with the other part (x_A) instead of leaving it alone: a transform
            of ``(|A|,)``, for instance an elementwise one. The conditioner sees the data's side.

    Raises:
        ValueError: if the mask leaves nothing to transform or nothing to condition on.

    Example:
        >>> import torch
        >>> from cnf.bijections import Affine
        >>> from cnf.nets import MLP
        >>> coupling = Coupling(Affine(), MLP(1, 2), half_mask(2))
        >>> coupling(torch.tensor([1.0, 3.0])).value.detach()  # starts as the identity
        tensor([1., 3.])
    """

    split: Tensor
    merge: Tensor

    def __init__(
        self,
        scalar_map: ScalarMap,
        conditioner: nn.Module,
        mask: Tensor,
        identity_map: Transform | None = None,
    ):
        super().__init__()
        if mask.shape not in ((mask.numel(),), (mask.numel(), 1, 1)) or mask.dtype != torch.bool:
            raise ValueError(
                f"a coupling mask is boolean with shape (features,), for images (channels, 1, 1), "
                f"got {mask.dtype} with shape {tuple(mask.shape)}"
            )
        if mask.all() or not mask.any():
            raise ValueError(
                f"the coupling mask {mask.flatten().tolist()} must be True for some features "
                "(transformed) and False for some (what the others are conditioned on); with one "
                "feature, use Elementwise with a conditioner"
            )
        self.scalar_map = scalar_map
        self.conditioner = conditioner
        self.identity_map = identity_map
        self.axis = -mask.dim()  # the one that is split
        self.sizes = (int((~mask).sum()), int(mask.sum()))
        split = mask.flatten().int().argsort(stable=True)
        self.register_buffer("split", split)
        self.register_buffer("merge", split.argsort())
        self.contiguous = self.flipped = False
        _look(self)
        self.register_load_state_dict_post_hook(_look)

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x."""
        left, right = self._parts(z)
        rest = None
        if self.identity_map is not None:
            rest = self.identity_map.forward(left, context, request)
            left = rest.value
        right, terms = self.scalar_map.forward(right, self._condition(left, context))
        return self._mapped(left, right, terms, rest)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""
        left, right = self._parts(x)
        right, terms = self.scalar_map.inverse(right, self._condition(left, context))
        rest = None
        if self.identity_map is not None:
            rest = self.identity_map.inverse(left, context, request)
            left = rest.value
        return self._mapped(left, right, terms, rest)

    def extra_repr(self) -> str:
        """The scalar map and the sizes of the two parts."""
        return f"{self.scalar_map}, features={sum(self.sizes)}, transformed={self.sizes[1]}"

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The part that conditions and the part that is transformed."""
        if value.dim() < -self.axis or value.shape[self.axis] != sum(self.sizes):
            kind = (
                "features" if self.axis == -1 else "channels of (*batch, channels, height, width)"
            )
            raise ValueError(
                f"this coupling was built for {sum(self.sizes)} {kind}, got a tensor of shape "
                f"{tuple(value.shape)}"
            )
        if not self.contiguous:
            value = value.index_select(self.axis, self.split)
        sizes = self.sizes[::-1] if self.flipped else self.sizes
        left, right = value.split_with_sizes(sizes, self.axis)
        return (right, left) if self.flipped else (left, right)

    def _condition(self, left: Tensor, context: Tensor | None) -> Tensor:
        """The scalar map's parameters, ``(*batch, |B|, size)``, for images ``(…, size)`` too."""
        parameters = self.conditioner(left, context)
        batch, pixels = left.shape[: self.axis], left.shape[left.dim() + self.axis + 1 :]
        wanted = (self.sizes[1], self.scalar_map.size)
        if parameters.shape == (*batch, *wanted, *pixels):
            return parameters.movedim(self.axis, -1)
        if parameters.shape == (*batch, wanted[0] * wanted[1], *pixels):
            parameters = parameters.view(*batch, *wanted, *pixels)
            return parameters.movedim(self.axis, -1) if pixels else parameters
        raise ValueError(
            f"the conditioner of a coupling that transforms {wanted[0]} features by "
            f"{self.scalar_map} must return shape {(*batch, wanted[0] * wanted[1], *pixels)}, got "
            f"{tuple(parameters.shape)}"
        )

    def _mapped(self, left: Tensor, right: Tensor, terms: Tensor, rest: Mapped | None) -> Mapped:
        """Put the parts together again."""
        value = torch.cat([right, left] if self.flipped else [left, right], self.axis)
        if not self.contiguous:
            value = value.index_select(self.axis, self.merge)
        log_det = terms.sum(tuple(range(self.axis, 0)))
        if rest is None:
            return Mapped(value, log_det, {})
        return Mapped(value, log_det + rest.log_det, rest.costs)


def _look(coupling: Coupling, _: object = None) -> None:
    """Note whether the parts lie side by side, so that nothing has to be gathered.

    Which features a part has travels with the state, so it is looked at after loading, too.
    """
    order, features = coupling.split.tolist(), list(range(sum(coupling.sizes)))
    second = coupling.sizes[1]
    coupling.flipped = order == features[second:] + features[:second]
    coupling.contiguous = coupling.flipped or order == features
