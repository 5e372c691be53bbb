"""The contract of every map between base and data: ``Mapped``, ``Request``, ``Transform``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cnf.costs import Cost
    from cnf.divergence import Divergence

T = TypeVar("T")


class Mapped(NamedTuple):
    """What a map returns; everything in it but the value adds along a composition.

    Attributes:
        value: the mapped tensor, ``(*batch, *event)``.
        log_det: log |det d(output)/d(input)| in nats, ``(*batch,)``; NaN where the request said
            that it is not wanted and computing it would have cost something.
        costs: integrals along the path that the request asked for, unweighted, each ``(*batch,)``.
    """

    value: Tensor
    log_det: Tensor
    costs: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call wants besides the value. Most discrete transforms ignore it.

    Attributes:
        divergence: the trace estimator to use; None means the transform's own.
        tolerance: rtol and atol of every solve, forward and backward, in place of the solver's own,
            on average over the batch.
            Training is usually content with less accuracy than a density that is reported.
        costs: the path costs to integrate along.
        costs_in_norm: whether they enter the error norm that chooses the steps. By default they are
            only looked at: asking for a cost changes neither the path nor its price, and the
            integral is as accurate as the steps happen to make it.
        generator: where probes and other noise come from; None means torch's global generator.
        log_det: False says that nobody will read ``log_det``: a continuous transform then skips
            the trace and returns NaN for it, an autoregressive one its sum.
        variance: True asks a stochastic trace for the variance of its ``log_det``, returned as the
            cost ``"log_det_variance"`` (zero where the trace is exact).
        clock: multiplies the clock of every continuous transform, for random end times (STEER).
    """

    divergence: Divergence | None = None
    tolerance: float | None = None
    costs: tuple[Cost, ...] = ()
    costs_in_norm: bool = False
    generator: torch.Generator | None = None
    log_det: bool = True
    variance: bool = False
    clock: float = 1.0


class Transform(nn.Module, ABC):
    """A map between the base's side ``z`` and the data's side ``x``.

    ``forward`` generates (z → x), ``inverse`` normalises (x → z). Both take tensors of shape
    ``(*batch, *event)`` with any number of batch axes and a context of ``(*batch, features)``.

    Attributes:
        bijective: whether inverse∘forward is the identity, sample by sample.
        exact: whether ``log_det`` is the log-determinant, not a bound or an estimate.
        steps: how many steps ``forward`` and ``inverse`` take that a compiler would unroll.
    """

    bijective: bool = True
    exact: bool = True
    steps: tuple[int, int] = (1, 1)

    @abstractmethod
    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x."""

    @abstractmethod
    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z."""

    def trajectory(
        self, z: Tensor, times: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The path from z (t = 0) to x (t = 1), where the transform has one.

        A discrete transform knows its two ends only, whatever ``times`` asks for.

        Args:
            z: the start, ``(*batch, *event)``.
            times: increasing times in [0, 1].
            context: as in ``forward``.

        Returns:
            The times that the path is known at, and the values there, ``(times, *batch, *event)``.
        """
        ends = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        x = self(z, context, Request(log_det=False)).value
        if x.shape != z.shape:
            raise ValueError(
                f"{type(self).__name__} takes z of shape {tuple(z.shape)} to x of shape "
                f"{tuple(x.shape)}, so the two cannot be stacked into one path"
            )
        return ends, torch.stack([z, x])

    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Set data-dependent parameters from a batch on the data's side; most have none."""

    def check(self, x: Tensor, what: str = "samples") -> None:
        """Refuse data that no parameters would give a density; most transforms take any.

        Args:
            x: on the data's side, ``(*batch, *event)``.
            what: what to call them.

        Raises:
            DataError: if there are such.
        """

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one latent ``z`` when one ``x`` has shape ``event_shape``."""
        return tuple(event_shape)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one ``x`` when one latent ``z`` has shape ``latent_shape``."""
        return tuple(latent_shape)


class Chain(Transform):
    """Transforms one after the other, in the order in which ``forward`` applies them.

    ``log_det`` and costs add: log |det J| of a composition is the sum of its parts'.

    Example:
        >>> import torch
        >>> from cnf.transforms import Chain, Permutation
        >>> chain = Chain([Permutation.reverse(3), Permutation.reverse(3)])
        >>> chain(torch.tensor([1.0, 2.0, 3.0])).value
        tensor([1., 2., 3.])
    """

    def __init__(self, parts: Iterable[Transform]):
        super().__init__()
        self.parts = nn.ModuleList(of_kind("part of a chain", p, Transform) for p in parts)

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(part.bijective for part in self)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(part.exact for part in self)

    @property
    def steps(self) -> tuple[int, int]:  # type: ignore[override]
        """The most that any part takes."""
        forward, inverse = zip((1, 1), *(part.steps for part in self), strict=True)
        return max(forward), max(inverse)

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.parts)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Transform:
        return self.parts[index]  # type: ignore[return-value]

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x through every part in order."""
        return compose(z, [part.forward for part in self], context, request)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z through every part's inverse in reverse order."""
        return compose(x, [part.inverse for part in reversed(list(self))], context, request)

    def trajectory(
        self, z: Tensor, times: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Part i of n walks from time i/n to (i + 1)/n; a discrete part shows its ends only."""
        all_times, all_values = [z.new_zeros(1)], [z.unsqueeze(0)]
        for i, part in enumerate(self):
            local = torch.cat([z.new_zeros(1), (times * len(self) - i).clamp(0, 1), z.new_ones(1)])
            part_times, values = part.trajectory(z, torch.unique(local), context)
            # each part starts where the one before it ended
            all_times.append((part_times[1:] + i) / len(self))
            all_values.append(values[1:])
            z = values[-1]
        if len({values.shape[1:] for values in all_values}) > 1:
            raise ValueError(
                "the parts of this chain have different event shapes, so their path cannot be "
                "stacked; ask the parts for their own trajectories"
            )
        return torch.cat(all_times), torch.cat(all_values)

    def initialize(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Initialise the parts from the data's end, each on what the ones after it pass on."""
        request = value_only(request)
        for part in reversed(list(self)):
            part.initialize(x, context, request)
            x = part.inverse(x, context, request).value

    def check(self, x: Tensor, what: str = "samples") -> None:
        """What the part at the data's end says of them; the others see what it makes of them."""
        if len(self):
            self[-1].check(x, what)

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of z, carried through every part from the data's end."""
        for part in reversed(list(self)):
            event_shape = part.latent_shape(event_shape)
        return tuple(event_shape)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of x, carried through every part from the base's end."""
        for part in self:
            latent_shape = part.data_shape(latent_shape)
        return tuple(latent_shape)


def of_kind(role: str, given: T, kind: type, advice: str = "") -> T:
    """What was given, refused at once if it is of another kind, not where it is called."""
    if isinstance(given, kind):
        return given
    if kind is Transform and hasattr(given, "transform"):
        advice = "of a flow, take flow.transform"
    what = type(given).__name__ if isinstance(given, nn.Module) else repr(given)
    raise TypeError(
        f"the {role} must be a {kind.__name__}, got {what}" + (f"; {advice}" if advice else "")
    )


def check_path_times(times: Tensor) -> None:
    """Refuse times that a path from base to data does not have, or in another order."""
    if times.dim() == 1 and len(times):
        inside = (times >= 0) & (times <= 1)
        if bool(inside.all()) and bool((times.diff() > 0).all()):
            return
    raise ValueError(f"times are a list of increasing numbers in [0, 1], got {times.tolist()}")


def value_only(request: Request | None) -> Request:
    """The same request for a call whose ``log_det`` nobody reads."""
    return dataclasses.replace(request or Request(), log_det=False)


def compose(
    value: Tensor,
    maps: Iterable[Callable[..., Mapped]],
    context: Tensor | None,
    request: Request | None,
) -> Mapped:
    """Apply maps in order; sum their ``log_det`` and merge their costs."""
    log_det: Tensor | None = None
    costs: dict[str, Tensor] = {}
    for apply in maps:
        value, term, more = apply(value, context, request)
        log_det = term if log_det is None else log_det + term
        for name, cost in more.items():
            costs[name] = costs[name] + cost if name in costs else cost
    if log_det is None:
        raise ValueError("a chain needs at least one transform")
    return Mapped(value, log_det, costs)


class Inverse(Transform):
    """A transform the other way round: its ``forward`` is the part's ``inverse``.

    Example:
        >>> import torch
        >>> from cnf.transforms import Diagonal, Inverse
        >>> halve = Inverse(Diagonal(2, scale=2.0))
        >>> halve(torch.tensor([2.0, 4.0])).value
        tensor([1., 2.], grad_fn=...)
    """

    def __init__(self, part: Transform):
        super().__init__()
        self.part = of_kind("part to invert", part, Transform)

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        """Whether the part is."""
        return self.part.bijective

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the part is."""
        return self.part.exact

    @property
    def steps(self) -> tuple[int, int]:  # type: ignore[override]
        """The part's, in the other order."""
        forward, inverse = self.part.steps
        return inverse, forward

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x by the part's inverse."""
        return self.part.inverse(z, context, request)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z by the part's forward."""
        return self.part.forward(x, context, request)

    def trajectory(
        self, z: Tensor, times: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The part's path to where its inverse takes z, walked from its end to its start."""
        end = self.part.inverse(z, context, Request(log_det=False)).value
        known, values = self.part.trajectory(end, (1 - times).flip(0), context)
        return (1 - known).flip(0), values.flip(0)

    def latent_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """What the part makes of a z of that shape."""
        return self.part.data_shape(event_shape)

    def data_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """What the part makes of an x of that shape."""
        return self.part.latent_shape(latent_shape)
