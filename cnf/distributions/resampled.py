"""The normal distribution, resampled by a learned acceptance probability."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cnf.compiling import expm1
from cnf.distributions.base import Base, as_shape, normal, uniform


class Resampled(Base):
    """Normal proposals π, accepted with a learned probability a(z), the T-th in any case.

    p(z) = π(z) [(1 - r) a(z) / Z + r], with Z = E_π[a] and r = (1 - Z)^(T - 1). Z is the mean of a
    over fixed nodes, a scrambled Sobol set under π, so the log-density is deterministic and
    differentiable through Z; ``normalizer`` says how far off it may be, ``renew`` draws other nodes
    or more. Samples carry no gradient. Bauer and Mnih, "Resampled priors for variational
    autoencoders" (2019); Stimper et al., "Resampling base distributions of normalizing flows"
    (2022).

    Args:
        event_shape: the shape of one z; an int stands for a vector.
        acceptance: a module called with z ``(*batch, entries)`` and the context that gives the
            logit of a, ``(*batch, 1)``.
        truncation: T, how many proposals there are at most.
        nodes: how many points Z is computed from.
        conditional: whether the acceptance depends on the context; Z then is computed for each
            context, at ``nodes`` evaluations each.
        seed: of the nodes.

    Example:
        >>> import torch
        >>> from cnf.nets import MLP
        >>> base = Resampled(2, MLP(2, 1))  # starts by accepting half of everything
        >>> round(base.log_prob(torch.zeros(2)).item(), 4), base.rsample((5,)).shape
        (-1.8379, torch.Size([5, 2]))
    """

    nodes: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        acceptance: nn.Module,
        *,
        truncation: int = 100,
        nodes: int = 1024,
        conditional: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if truncation < 1:
            raise ValueError(f"truncation must be at least 1, got {truncation}")
        self.event_shape = as_shape(event_shape)
        self.acceptance = acceptance
        self.truncation = truncation
        self.conditional = conditional
        self.register_buffer("nodes", _normal_nodes(nodes, math.prod(self.event_shape), seed))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        flat = z.flatten(z.dim() - len(self.event_shape))
        proposal = -0.5 * (flat.square() + math.log(2 * math.pi)).sum(-1)
        log_accept = self._log_accept(flat, context)
        log_Z = self._log_normalizer(context)
        # log r = (T - 1) log(1 - Z): every one of the first T - 1 proposals was rejected
        log_reject = (self.truncation - 1) * _log1mexp(log_Z)
        accepted = _log1mexp(log_reject) + log_accept - log_Z
        return proposal + torch.logaddexp(accepted, log_reject.expand_as(accepted))

    @torch.no_grad()
    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw by rejection, without gradient; the temperature multiplies what was drawn."""
        shape = (*shape, self.nodes.shape[-1])
        sample = normal(shape, self.nodes, generator)
        waiting = torch.ones(shape[:-1], dtype=torch.bool, device=sample.device)
        for _ in range(self.truncation - 1):
            u = uniform(shape[:-1], sample, generator)
            waiting = waiting & (u.log() > self._log_accept(sample, context))
            if not bool(waiting.any()):
                break
            again = normal(shape, self.nodes, generator)
            sample = torch.where(waiting.unsqueeze(-1), again, sample)
        return temperature * sample.reshape(*shape[:-1], *self.event_shape)

    @torch.no_grad()
    def normalizer(
        self,
        context: Tensor | None = None,
        *,
        samples: int = 65_536,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Z as ``log_prob`` uses it, an independent Monte Carlo estimate, and that one's error.

        Args:
            context: ``(*batch, context_features)`` where the acceptance depends on it.
            samples: how many proposals the estimate takes.
            generator: where they come from.

        Returns:
            Z, its estimate and the estimate's standard error, each ``(*batch,)``.
        """
        drawn = normal((samples, self.nodes.shape[-1]), self.nodes, generator)
        accept = self._at(drawn, context).exp()
        return (
            self._log_normalizer(context).exp(),
            accept.mean(0),
            accept.std(0) / math.sqrt(samples),
        )

    def renew(self, seed: int, nodes: int | None = None) -> Resampled:
        """Draw other nodes for Z, as many as before or as many as told."""
        points = _normal_nodes(nodes or len(self.nodes), self.nodes.shape[-1], seed)
        self.nodes = points.to(self.nodes)
        return self

    def _log_accept(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Log a(z), ``(*batch,)``."""
        return logsigmoid(self.acceptance(z, context if self.conditional else None).squeeze(-1))

    def _at(self, points: Tensor, context: Tensor | None) -> Tensor:
        """Log a at points ``(n, entries)``, ``(n,)`` or ``(n, *batch)``."""
        if not self.conditional or context is None:
            return self._log_accept(points, None)
        batch = context.shape[:-1]
        points = points.reshape(len(points), *[1] * len(batch), -1)
        points = points.expand(-1, *batch, -1)
        return self._log_accept(points, context.expand(len(points), *context.shape))

    def _log_normalizer(self, context: Tensor | None) -> Tensor:
        """Log Z, ``()`` or ``(*batch,)``."""
        return torch.logsumexp(self._at(self.nodes, context), 0) - math.log(len(self.nodes))

    def extra_repr(self) -> str:
        """What distinguishes this base."""
        return f"{self.event_shape}, truncation={self.truncation}, nodes={len(self.nodes)}"


def _normal_nodes(count: int, dimension: int, seed: int) -> Tensor:
    """A scrambled Sobol set under the standard normal, ``(count, dimension)``."""
    if count < 1:
        raise ValueError(f"the normaliser needs at least one node, got {count}")
    if dimension > torch.quasirandom.SobolEngine.MAXDIM:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, dimension, generator=generator)
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    points = engine.draw(count, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).eps
    nodes = torch.special.ndtri(points.clamp(tiny, 1 - tiny))
    return nodes.to(torch.get_default_dtype())


def _log1mexp(value: Tensor) -> Tensor:
    """Log(1 - exp(value)) for value ≤ 0, without cancellation; finite at 0."""
    value = value.clamp(max=-torch.finfo(value.dtype).tiny)
    near = torch.log(-expm1(value))
    return torch.where(value > -math.log(2), near, torch.log1p(-torch.exp(value)))
