"""Autoregressive transforms: each feature is mapped under parameters from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.bijections import ScalarMap
from cnf.nets import MADE
from cnf.transforms.base import Mapped, Request, Transform


class Autoregressive(Transform):
    """x_i = τ(z_i; θ_i(x_{<i}, context)), with a scalar map τ and a masked network θ.

    log_det = Σ_i log |dτ/dz_i|, in nats. ``inverse`` takes one pass of the network, ``forward``
    finds the features one after the other at about the same arithmetic; ``Inverse`` of this makes
    sampling the parallel direction. Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057
    (as it stands), Kingma et al. 2016, https://arxiv.org/abs/1606.04934 (inverted).

    Args:
        scalar_map: τ.
        made: θ, with ``made.outputs == scalar_map.size``.

    Example:
        >>> import torch
        >>> from cnf.bijections import Affine
        >>> from cnf.nets import MADE
        >>> transform = Autoregressive(Affine(), MADE(3, 2, zero_last=False))
        >>> z = torch.randn(5, 3)
        >>> x, log_det, _ = transform(z)
        >>> torch.allclose(transform.inverse(x).value, z, atol=1e-5), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, scalar_map: ScalarMap, made: MADE):
        super().__init__()
        if made.outputs != scalar_map.size:
            raise ValueError(
                f"{scalar_map} takes {scalar_map.size} parameters for each feature, but the "
                f"network gives {made.outputs}; build it as MADE(features, {scalar_map.size})"
            )
        self.scalar_map = scalar_map
        self.made = made

    @property
    def steps(self) -> tuple[int, int]:  # type: ignore[override]
        """As many as the network has, forward."""
        return self.made.passes, 1

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x, feature by feature."""
        self._check(z)
        wanted = request is None or request.log_det
        terms: list[Any] = []

        def keeping(function: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
            def step(part: Any, parameters: Any) -> Any:
                value, term = function(part, parameters)
                if wanted:
                    terms.append(term)
                return value

            return step

        scalar_map = self.scalar_map
        x = self.made.autoregress(
            keeping(scalar_map.forward), z, context, keeping(scalar_map.forward_array)
        )
        batch = z.shape[:-1]
        if not wanted:
            return Mapped(x, x.new_full(batch, math.nan), {})
        if isinstance(terms[0], Tensor):
            log_det = torch.cat(terms).sum(0)
        else:
            log_det = torch.from_numpy(np.concatenate(terms).sum(0))
        return Mapped(x, log_det.view(batch), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z, all features at once."""
        self._check(x)
        z, terms = self.scalar_map.inverse(x, self.made(x, context))
        return Mapped(z, terms.sum(-1), {})

    def extra_repr(self) -> str:
        """The scalar map."""
        return str(self.scalar_map)

    def _check(self, value: Tensor) -> None:
        """Refuse a tensor that does not have the network's features."""
        if value.shape[-1] != self.made.features:
            raise ValueError(
                f"this transform was built for {self.made.features} features, got a tensor of "
                f"shape {tuple(value.shape)}"
            )
