"""Independent entries: a standard density, moved and scaled."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cnf.distributions.base import Base, as_shape, conditioned, keep, normal, uniform


class Independent(Base):
    """Entries that are independent, each loc + scale · u with u from a standard density f.

    log p(z) = Σ log f((z - loc) / scale) - Σ log scale, in nats.

    Args:
        event_shape: the shape of one z; an int stands for a vector.
        loc: where every entry starts.
        scale: how wide every entry starts.
        trainable: learn loc and scale, one of each per entry.
        conditioner: a module from context to ``outputs`` numbers per sample, added to the locs and
            log-scales; None for none.
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        loc: float = 0.0,
        scale: float = 1.0,
        trainable: bool = False,
        conditioner: nn.Module | None = None,
    ):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.event_shape = as_shape(event_shape)
        self.trainable = trainable
        self.conditioner = conditioner
        centre = torch.full(self.event_shape, float(loc))
        log_scale = torch.full(self.event_shape, math.log(scale))
        keep(self, trainable, loc=centre, log_scale=log_scale)

    @staticmethod
    def outputs(event_shape: int | Sequence[int]) -> int:
        """How many numbers per sample a conditioner gives."""
        return 2 * math.prod(as_shape(event_shape))

    @abstractmethod
    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""

    @abstractmethod
    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Entries from f, ``(*shape,)``."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        loc, log_scale = conditioned([self.loc, self.log_scale], self.conditioner, context)
        entries = self.standard((z - loc) * torch.exp(-log_scale))
        return self.event_sum(entries) - self.event_sum(log_scale)

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw by reparameterisation."""
        loc, log_scale = conditioned([self.loc, self.log_scale], self.conditioner, context)
        noise = self.draw((*shape, *self.event_shape), generator)
        return loc + temperature * torch.exp(log_scale) * noise

    def extra_repr(self) -> str:
        """What distinguishes this base."""
        return f"{self.event_shape}, trainable={self.trainable}"


class Normal(Independent):
    """Normal variables, N(loc, scale²) each; the standard normal unless told otherwise.

    log f(u) = -½ u² - ½ log 2π.

    Example:
        >>> import torch
        >>> Normal(2).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""
        return -0.5 * (u.square() + math.log(2 * math.pi))

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Entries from f."""
        return normal(shape, self.loc, generator)


class Laplace(Independent):
    """Laplace variables: log f(u) = -|u| - log 2.

    Example:
        >>> import torch
        >>> Laplace(1).log_prob(torch.zeros(1))
        tensor(-0.6931)
    """

    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""
        return -u.abs() - math.log(2)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """The difference of two exponential variables."""
        first, second = uniform((2, *shape), self.loc, generator)
        return second.log() - first.log()


class Logistic(Independent):
    """Logistic variables: log f(u) = log σ(u) + log σ(-u); the base of NICE.

    Example:
        >>> import torch
        >>> Logistic(1).log_prob(torch.zeros(1))
        tensor(-1.3863)
    """

    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""
        return logsigmoid(u) + logsigmoid(-u)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """The logit of a uniform variable."""
        u = uniform(shape, self.loc, generator)
        return u.log() - torch.log1p(-u)


class Uniform(Independent):
    """Uniform variables on [loc - scale, loc + scale]; the log-density outside is -inf.

    Example:
        >>> import torch
        >>> Uniform(1, scale=2.0).log_prob(torch.tensor([[1.0], [3.0]]))
        tensor([-1.3863,    -inf])
    """

    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""
        inside = torch.full_like(u, -math.log(2))
        return torch.where(u.abs() <= 1, inside, -math.inf)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Entries from f."""
        return 2 * uniform(shape, self.loc, generator) - 1


class StudentT(Independent):
    """Student's t variables with df degrees of freedom: heavy tails, which a flow then keeps.

    log f(u) = -(df + 1)/2 · log(1 + u²/df) + log Γ((df + 1)/2) - log Γ(df/2) - ½ log(π df). For
    heavy-tailed data, as in Jaini et al., "Tails of Lipschitz triangular flows" (2020).

    Args:
        event_shape: the shape of one z; an int stands for a vector.
        df: degrees of freedom of every entry, at the start where they are learned.
        loc: where every entry starts.
        scale: how wide every entry starts.
        trainable: learn loc, scale and df, one of each per entry.
        conditioner: as in ``Independent``; it does not move df.

    Example:
        >>> import torch
        >>> StudentT(1, df=1.0).log_prob(torch.zeros(1))  # Cauchy: -log π
        tensor(-1.1447)
    """

    log_df: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        df: float = 5.0,
        *,
        loc: float = 0.0,
        scale: float = 1.0,
        trainable: bool = False,
        conditioner: nn.Module | None = None,
    ):
        super().__init__(
            event_shape, loc=loc, scale=scale, trainable=trainable, conditioner=conditioner
        )
        if not df > 0:
            raise ValueError(f"df must be positive, got {df}")
        keep(self, trainable, log_df=torch.full(self.event_shape, math.log(df)))

    def standard(self, u: Tensor) -> Tensor:
        """Log f(u), entry by entry."""
        df = torch.exp(self.log_df)
        normalizer = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2)
        normalizer = normalizer - 0.5 * (self.log_df + math.log(math.pi))
        return normalizer - (df + 1) / 2 * torch.log1p(u.square() / df)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Bailey's polar form, √(df (U^(-2/df) - 1)) cos 2πV, differentiable in df."""
        first, second = uniform((2, *shape), self.loc, generator)
        df = torch.exp(self.log_df)
        radius = (df * torch.expm1(-2 / df * first.log())).sqrt()
        return radius * torch.cos(2 * math.pi * second)
