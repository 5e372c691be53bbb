"""Mixtures of bases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnf.distributions.base import Base, as_shape, conditioned, keep, normal, uniform

if TYPE_CHECKING:
    from cnf.transforms.base import Request


class Mixture(Base):
    """Σ_k w_k p_k(z), any bases p_k of one event shape.

    Samples carry gradients to the parts that drew them, none to the weights: which part draws is
    discrete.

    Args:
        parts: the bases p_k.
        conditioner: a module from context to one number for each part, added to log w_k before
            they are normalised; None for none.

    Example:
        >>> import torch
        >>> from cnf.distributions import Normal
        >>> mixture = Mixture([Normal(1, loc=-1.0), Normal(1, loc=1.0)])
        >>> round(mixture.log_prob(torch.zeros(1)).item(), 4)
        -1.4189
    """

    def __init__(self, parts: Iterable[Base], *, conditioner: nn.Module | None = None):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        shapes = {part.event_shape for part in self._bases()}
        if len(shapes) != 1:
            raise ValueError(
                "a mixture needs at least one part, and parts of one event shape, got "
                f"{sorted(shapes)}"
            )
        (self.event_shape,) = shapes
        self.conditioner = conditioner
        self.logits = nn.Parameter(torch.zeros(len(self.parts)))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        terms = torch.stack([part.log_prob(z, context) for part in self._bases()], -1)
        return torch.logsumexp(self.log_weights(context) + terms, -1)

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a part for each sample, then the sample from it at the temperature."""
        choice = choose(self.log_weights(context), shape, generator).flatten()
        if context is not None:
            context = context.flatten(0, -2) if len(shape) else context.unsqueeze(0)
        sample = self.logits.new_empty((len(choice), *self.event_shape))
        for k, part in enumerate(self._bases()):
            chosen = choice == k
            some = None if context is None else context[chosen]
            drawn = part.rsample((int(chosen.sum()),), some, temperature, generator)
            # not in place: every part's draw keeps its own gradient
            sample = sample.index_put((chosen,), drawn)
        return sample.reshape(*shape, *self.event_shape)

    def initialize(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Let every part set its data-dependent parameters."""
        for part in self._bases():
            part.initialize(z, context, request)

    def log_weights(self, context: Tensor | None = None) -> Tensor:
        """Log w_k, ``(parts,)`` or ``(*batch, parts)``."""
        (logits,) = conditioned([self.logits], self.conditioner, context)
        return torch.log_softmax(logits, -1)

    def _bases(self) -> list[Base]:
        return list(self.parts)  # type: ignore[arg-type]


class MixtureOfGaussians(Base):
    """Σ_k w_k N(loc_k, scale_k²), with one loc and scale for each entry of every component.

    Samples carry gradients to locs and scales, none to the weights: which component draws is
    discrete. The temperature multiplies the spread of each component around its own loc.

    Args:
        event_shape: the shape of one z; an int stands for a vector.
        components: how many.
        spread: the standard deviation of the locs at the start.
        trainable: learn weights, locs and scales.
        conditioner: a module from context to ``outputs`` numbers per sample, added to log-weights,
            locs and log-scales; None for none.
        generator: where the initial locs come from.

    Example:
        >>> import torch
        >>> MixtureOfGaussians(2, 3).rsample((5,)).shape
        torch.Size([5, 2])
    """

    logits: Tensor
    locs: Tensor
    log_scales: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: int = 8,
        *,
        spread: float = 1.0,
        trainable: bool = True,
        conditioner: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if components < 1:
            raise ValueError(f"a mixture needs at least one component, got {components}")
        self.event_shape = as_shape(event_shape)
        self.components = components
        self.trainable = trainable
        self.conditioner = conditioner
        shape = (components, *self.event_shape)
        keep(
            self,
            trainable,
            logits=torch.zeros(components),
            locs=spread * torch.randn(shape, generator=generator),
            log_scales=torch.zeros(shape),
        )

    @staticmethod
    def outputs(event_shape: int | Sequence[int], components: int = 8) -> int:
        """How many numbers per sample a conditioner gives."""
        return components * (1 + 2 * math.prod(as_shape(event_shape)))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        log_weights, locs, log_scales = self._terms(context)
        u = (z.unsqueeze(-1 - len(self.event_shape)) - locs) * torch.exp(-log_scales)
        terms = -0.5 * (u.square() + math.log(2 * math.pi)) - log_scales
        return torch.logsumexp(log_weights + self.event_sum(terms), -1)

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a component for each sample, then the sample by reparameterisation."""
        shape = tuple(shape)
        log_weights, locs, log_scales = self._terms(context)
        choice = choose(log_weights, shape, generator)
        index = choice.reshape(*shape, 1, *[1] * len(self.event_shape))
        index = index.expand(*shape, 1, *self.event_shape)

        def chosen(table: Tensor) -> Tensor:
            table = table.expand(*shape, self.components, *self.event_shape)
            return table.gather(len(shape), index).squeeze(len(shape))

        noise = normal((*shape, *self.event_shape), self.locs, generator)
        return chosen(locs) + temperature * torch.exp(chosen(log_scales)) * noise

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        own = [self.logits, self.locs, self.log_scales]
        logits, locs, log_scales = conditioned(own, self.conditioner, context)
        return torch.log_softmax(logits, -1), locs, log_scales

    def extra_repr(self) -> str:
        """What distinguishes this base."""
        return f"{self.event_shape}, components={self.components}, trainable={self.trainable}"


def choose(log_weights: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """An index drawn with the given probabilities for every entry of ``(*shape,)``.

    >>> choose(torch.tensor([0.0, -torch.inf]), (3,), None)
    tensor([0, 0, 0])
    """
    with torch.no_grad():
        u = uniform((*shape, 1), log_weights, generator)
        # the last edge is one up to rounding: nothing may lie beyond it
        edges = torch.exp(log_weights).cumsum(-1)[..., :-1]
        return (u > edges).sum(-1)
