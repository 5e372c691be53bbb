"""The normal distribution with a full covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.distributions.base import Base, as_shape, conditioned, keep, normal


class MultivariateNormal(Base):
    """N(loc, L Lᵀ) with a lower triangle L of positive diagonal.

    log p(z) = -½ |L⁻¹ (z - loc)|² - Σ log L_ii - D/2 log 2π, in nats.

    Args:
        features: D.
        loc: the mean at the start, ``(features,)``; zero if None.
        covariance: the covariance at the start, ``(features, features)``; the identity if None.
        trainable: learn mean and covariance.
        conditioner: a module from context to ``outputs`` numbers per sample, added to the mean,
            log L_ii and the entries below the diagonal, row by row; None for none.

    Raises:
        ValueError: if the covariance is not positive definite, or the shapes are wrong.

    Example:
        >>> import torch
        >>> base = MultivariateNormal(2, covariance=torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> round(base.log_prob(torch.zeros(2)).item(), 4)
        -2.531
    """

    loc: Tensor
    log_diagonal: Tensor
    below: Tensor

    def __init__(
        self,
        features: int,
        *,
        loc: Tensor | None = None,
        covariance: Tensor | None = None,
        trainable: bool = True,
        conditioner: nn.Module | None = None,
    ):
        super().__init__()
        self.event_shape = as_shape(features)
        self.trainable = trainable
        self.conditioner = conditioner
        loc = torch.zeros(features) if loc is None else torch.as_tensor(loc).clone()
        covariance = torch.eye(features) if covariance is None else torch.as_tensor(covariance)
        dtype = torch.promote_types(loc.dtype, covariance.dtype)
        loc, covariance = loc.to(dtype), covariance.to(dtype)
        if loc.shape != (features,) or covariance.shape != (features, features):
            raise ValueError(
                f"expected a mean of ({features},) and a covariance of ({features}, {features}), "
                f"got {tuple(loc.shape)} and {tuple(covariance.shape)}"
            )
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise ValueError("the covariance must be symmetric and positive definite, it is not")
        rows, columns = torch.tril_indices(features, features, -1)
        keep(
            self,
            trainable,
            loc=loc,
            log_diagonal=factor.diagonal().log(),
            below=factor[rows, columns].clone(),
        )

    @staticmethod
    def outputs(features: int) -> int:
        """How many numbers per sample a conditioner gives."""
        return 2 * features + features * (features - 1) // 2

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        loc, log_diagonal, factor = self._terms(context)
        difference = (z - loc).unsqueeze(-1)
        u = torch.linalg.solve_triangular(factor, difference, upper=False).squeeze(-1)
        normalizer = z.shape[-1] * math.log(2 * math.pi)
        return -0.5 * (u.square().sum(-1) + normalizer) - log_diagonal.sum(-1)

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw by reparameterisation, loc + L u."""
        loc, _, factor = self._terms(context)
        noise = normal((*shape, *self.event_shape), self.loc, generator).unsqueeze(-1)
        return loc + temperature * (factor @ noise).squeeze(-1)

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, log L_ii and L."""
        own = [self.loc, self.log_diagonal, self.below]
        loc, log_diagonal, below = conditioned(own, self.conditioner, context)
        (features,) = self.event_shape
        rows, columns = torch.tril_indices(features, features, -1, device=below.device)
        place = rows * features + columns
        flat = below.new_zeros((*below.shape[:-1], features * features))
        lower = flat.index_copy(-1, place, below).unflatten(-1, (features, features))
        return loc, log_diagonal, lower + torch.diag_embed(torch.exp(log_diagonal))

    def extra_repr(self) -> str:
        """What distinguishes this base."""
        return f"{self.event_shape}, trainable={self.trainable}"
