"""Bases made of something else: a ``torch`` distribution, or a transform of another base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.distributions.base import Base, as_shape

if TYPE_CHECKING:
    from cnf.transforms.base import Request, Transform


class Wrapped(Base):
    """Any ``torch.distributions`` object as a base, its parameters fixed.

    The batch axes of the distribution become part of the event, as independent entries. Its tensors
    follow ``.to(…)``. Outside its support the log-density is -inf. Samples carry gradients where
    the distribution has ``rsample`` and none where it has not.

    Args:
        distribution: with at least one axis, for instance ``Gumbel(torch.zeros(3), 1.0)``.

    Example:
        >>> import torch
        >>> base = Wrapped(torch.distributions.Exponential(torch.ones(2)))
        >>> base.event_shape, base.log_prob(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        ((2,), tensor([-2., -inf]))
    """

    def __init__(self, distribution: Distribution):
        super().__init__()
        shape = (*distribution.batch_shape, *distribution.event_shape)
        if not shape:
            raise ValueError(
                f"{distribution} is over single numbers; expand it to the event, for instance "
                "distribution.expand((features,))"
            )
        self.event_shape = as_shape(shape)
        self.distribution = _mapped(distribution, lambda tensor: tensor.detach().clone())

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        values = self.distribution.log_prob(z)
        inside = self.distribution.support.check(z)
        values = torch.where(inside, values, -math.inf)
        # its own event axes are summed already, the batch axes are not
        for _ in self.distribution.batch_shape:
            values = values.sum(-1)
        return values

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw; the temperature multiplies the distance from the mean."""
        draw = (
            self.distribution.rsample
            if self.distribution.has_rsample
            else (self.distribution.sample)
        )
        with _seeded_by(generator):
            sample = draw(torch.Size(shape))
        if temperature == 1:
            return sample
        mean = self.distribution.mean
        if not bool(mean.isfinite().all()):
            raise ValueError(
                f"{self.distribution} has no finite mean, so a temperature has no centre to scale "
                "around; sample at temperature 1"
            )
        return mean + temperature * (sample - mean)

    def extra_repr(self) -> str:
        """The distribution's kind and shape."""
        return f"{type(self.distribution).__name__}, {self.event_shape}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wrapped:
        # what .to(), .double() and .cuda() call on parameters and buffers
        super()._apply(fn, recurse)
        self.distribution = _mapped(self.distribution, fn)
        return self


class Transformed(Base):
    """The distribution of transform(z) with z from a base: a whole flow, as a base.

    Args:
        transform: from z to what this base is over.
        base: of z.
        event_shape: the shape of what this base is over; the base's unless the transform reshapes.

    Example:
        >>> import torch
        >>> from cnf.distributions import Normal
        >>> from cnf.transforms import Diagonal
        >>> Transformed(Diagonal(2, scale=3.0), Normal(2)).rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, transform: Transform, base: Base, event_shape: int | Sequence[int] | None = None
    ):
        super().__init__()
        self.event_shape = as_shape(base.event_shape if event_shape is None else event_shape)
        self.transform = transform
        self.base = base

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, by change of variables."""
        inner, log_det, _ = self.transform.inverse(z, context)
        return self.base.log_prob(inner, context) + log_det

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from the base and transform."""
        inner = self.base.rsample(shape, context, temperature, generator)
        return self.transform.forward(inner, context).value

    def initialize(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Let the transform, then the base, set their data-dependent parameters."""
        self.transform.initialize(z, context, request)
        inner = self.transform.inverse(z, context, request).value
        self.base.initialize(inner, context, request)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor], twins: dict[int, Any] | None = None) -> Any:
    """A distribution (or a part of one) with a function applied to every tensor in it."""
    twins = {} if twins is None else twins
    if id(value) in twins:  # a transform and its inverse hold each other
        return twins[id(value)]
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, fn, twins) for item in value)
    if isinstance(value, (Distribution, torch.distributions.Transform)):
        twin = twins[id(value)] = object.__new__(type(value))
        for name, item in vars(value).items():
            twin.__dict__[name] = _mapped(item, fn, twins)
        if isinstance(twin, Distribution):
            # a point outside the support is an answer here, -inf, not an error
            twin._validate_args = False
        return twin
    return value


@contextlib.contextmanager
def _seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's own generators follow the given one, and restore them after."""
    if generator is None:
        yield
        return
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
