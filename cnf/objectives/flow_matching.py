"""Flow matching: training a continuous flow without solving it."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.divergence import event_dims, velocity_of
from cnf.nets.fields import Field
from cnf.nets.guidance import Guided
from cnf.objectives.base import (
    MISSING,
    Batch,
    Loss,
    Objective,
    dropped_fraction,
    mean,
    without_context,
)
from cnf.objectives.coupling import Coupling, Independent, as_coupling, groups, pair
from cnf.objectives.paths import Path, Times, as_path, as_times
from cnf.transforms import Chain, Continuous
from cnf.transforms.base import Request, Transform

if TYPE_CHECKING:
    from cnf.flow import Flow

VECTOR_DRAWS = 2
LEAST_TIMES = 64  # larger batches share times: coefficients of time are half of a small net's work


class FlowMatching(Objective):
    """Regression of the velocity on that of a path between base and data, E‖v(t, x_t) − ẋ_t‖².

    A step costs one evaluation of the field instead of two solves. The minimiser's flow has the
    data's density exactly, which ``flow.log_prob`` then gives as for any continuous flow; a few
    steps of ``MaximumLikelihood`` afterwards spend what capacity there is on nats:
    ``cnf.fit(flow, x, objective=("flow-matching", "likelihood"))``. The base is held fixed.

    Args:
        flow: its transform is a ``Continuous``, or a ``Chain`` that begins with one (at the base
            end) and goes on with parts that have nothing to train.
        path: ``"linear"``, ``"vp"`` or a record such as ``LinearPath(sigma_min=1e-3)``.
        coupling: who is paired with whom: ``"independent"``; ``"exact"`` or ``"sinkhorn"`` optimal
            transport within the batch, and within equal contexts; ``"reflow"``; or a record.
        times: ``"late"``, ``"uniform"``, ``"logit-normal"`` or a record; None means those of the
            path: late for linear ones, uniform for the variance-preserving.
        draws: with how many base samples and times each row is paired in a step: steps that are
            little work learn more for their time from several. None means 2 for vectors, 1 for
            images.
        drop_context: the fraction of rows whose context is replaced by NaN, "not given", so that
            ``guided`` has an unconditional velocity to start from; None means a tenth for a flow
            whose context is optional, none for others.
        teacher: for ``"reflow"``, the flow whose pairs ``(z, teacher.decode(z))`` are learned in
            place of the data (rectified flow). A frozen copy is made: it may be ``flow`` itself.

    Paper: Lipman et al., ICLR 2023; Liu et al., ICLR 2023; Tong et al., TMLR 2024.

    Example:
        >>> import cnf
        >>> objective = cnf.FlowMatching(cnf.ffjord(2), coupling="exact")
        >>> objective(cnf.Batch(torch.zeros(4, 2))).terms.keys()
        dict_keys(['velocity error'])
    """

    share = 3.0  # what its steps bring costs the likelihood ten times as much
    enough = 5_000
    step_cost = 0.05  # one velocity and its gradient beside a solve with its divergence
    optimizer = "muon"
    lr = 2e-2  # a regression on noisy targets: the average of the weights, not lr, settles them

    def __init__(
        self,
        flow: Flow,
        *,
        path: str | Path = "linear",
        coupling: str | Coupling = "independent",
        times: str | Times | None = None,
        draws: int | None = None,
        drop_context: float | None = None,
        teacher: Flow | None = None,
    ):
        super().__init__(flow)
        part, _ = continuous_part(flow)  # refuse at once what cannot be matched
        vectors = event_dims(part.field) == 1
        if vectors:
            self.lr = 3e-2
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.draws = draws or (VECTOR_DRAWS if vectors else 1)
        self.drop_context = dropped_fraction(flow, drop_context)
        self.path = as_path(path)
        self.times = as_times(self.path.times if times is None else times)
        reflow = coupling == "reflow"
        if reflow and teacher is None:
            raise ValueError(
                "coupling='reflow' needs the flow whose pairs are to be learned: pass teacher=…, "
                "for instance teacher=flow once it is trained"
            )
        if teacher is not None and not reflow:
            raise ValueError("a teacher belongs to coupling='reflow'; pass both or neither")
        if teacher is not None and (teacher.event_shape, teacher.context_features) != (
            flow.event_shape,
            flow.context_features,
        ):
            raise ValueError(
                f"the teacher makes x of shape {teacher.event_shape} given "
                f"{teacher.context_features} features, the flow {flow.event_shape} given "
                f"{flow.context_features}"
            )
        self.coupling = Independent() if reflow else as_coupling(coupling)
        self.teacher = None
        if teacher is not None:
            self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def forward(
        self, batch: Batch, *, generator: torch.Generator | None = None, progress: float = 0.0
    ) -> Loss:
        """The loss of one batch; ``terms`` holds ``"velocity error"``, the squared error."""
        flow = self.flow
        part, outside = continuous_part(flow)
        if self.coupling.joint and batch.context is not None:
            groups(self.coupling, batch.context)  # refused here: repeated contexts are never alone
        batch = batch.repeated(self.draws)
        if self.coupling.joint and batch.weight is not None:
            # base samples would count as unequally as the rows that they are paired with
            drawn = batch.weight.multinomial(len(batch.x), replacement=True, generator=generator)
            batch = batch.map(lambda part: part[drawn])._replace(weight=None)
        # with its gradient: a flow may train an encoder of it
        context = self._context(batch, generator)
        with torch.no_grad():
            z = flow.base.rsample((len(batch.x),), context, 1.0, generator)
            x = batch.x if self.teacher is None else self.teacher.decode(z, batch.context)
            x = flow.scaling.inverse(x).value
            request = Request(log_det=False, generator=generator)
            for transform in reversed(outside):
                x = transform.inverse(x, context, request).value
            z = pair(self.coupling, z, x, batch.context, generator)
            share = _rows_per_time(len(x), part)
            t = self.times.draw(len(x) // share, x, generator)
            point = self.path.at(t.repeat_interleave(share))
            position, target = point.position(z, x), point.velocity(z, x)
        velocity = _velocity(part, t, position, context, share)
        total = mean((velocity - target).square().flatten(1).sum(1), batch.weight)
        return Loss(total, {"velocity error": total.detach()})

    def _context(self, batch: Batch, generator: torch.Generator | None) -> Tensor | None:
        scaling = self.flow.context_scaling
        if (batch.context is None) != (scaling is None):
            raise ValueError(
                f"the flow takes a context of {self.flow.context_features} features, and the batch "
                f"has {'none' if batch.context is None else 'one'}"
            )
        if batch.context is None or scaling is None:
            return None
        context = without_context(batch.context, self.drop_context, generator)
        scaled = scaling.inverse(context).value
        return scaled if self.flow.encoder is None else self.flow.encoder(scaled)


def guided(flow: Flow, weight: float) -> Flow:
    """A copy of a conditional flow whose context counts ``weight`` times (1: as in the flow).

    It is a flow in its own right: its samples are the guided ones, and its ``log_prob`` is exactly
    their density. ``flow`` was built with ``optional_context=True``, so that training dropped some
    of its contexts.

    Args:
        flow: its transform begins with a continuous one, which is the part that is guided.
        weight: more than 1 exaggerates what the context changes.

    Example:
        >>> import cnf
        >>> flow = cnf.ffjord(2, hidden=(8,), context_features=3, optional_context=True)
        >>> guided(flow, 2.0).sample((5,), torch.eye(3)[0]).shape
        torch.Size([5, 2])
    """
    if flow.encoder is None or not flow.optional_context:
        raise ValueError(MISSING)
    nothing = torch.full((flow.context_features,), math.nan, dtype=flow.dtype, device=flow.device)
    missing = flow.encoder(nothing)
    flow = copy.deepcopy(flow)
    flow.recipe = None  # it no longer is what the recipe builds
    part, _ = continuous_part(flow)
    part.field = Guided(part.field, missing, weight)
    return flow


def _rows_per_time(rows: int, part: Continuous) -> int:
    """How many rows in a row share a time: a divisor of their number.

    A field that is not of this package may know one batch axis only, and rows that share a time
    come along a second.
    """
    if not isinstance(part.field, Field) or event_dims(part.field) != 1:
        return 1
    return math.gcd(rows, max(rows // LEAST_TIMES, 1))


def _velocity(part: Continuous, t: Tensor, x: Tensor, context: Tensor | None, share: int) -> Tensor:
    """The velocity at rows of x, of which so many in a row share one of the times t."""
    clock = part.clock(x)
    if share == 1:
        return clock * velocity_of(part.field, clock * t, x, context)
    if context is not None:
        context = context.unflatten(0, (-1, share))
    # expanded rather than repeated, which tells the layers that they may compute it once
    t = (clock * t).unsqueeze(1).expand(-1, share)
    velocity = velocity_of(part.field, t, x.unflatten(0, (-1, share)), context)
    return clock * velocity.flatten(0, 1)


def continuous_part(flow: Flow) -> tuple[Continuous, list[Transform]]:
    """The continuous transform at the base end, and the fixed ones between it and the data.

    Raises:
        TypeError: if the flow does not begin with a continuous transform.
        ValueError: if something after it would have to be trained as well.
    """
    first, *outside = _parts(flow.transform)
    if not isinstance(first, Continuous):
        raise TypeError(
            "flow matching trains a continuous transform at the base end of a flow; this one "
            f"begins with {type(first).__name__}, which only the likelihood can train"
        )
    for number, part in enumerate(outside, 1):
        if any(parameter.requires_grad for parameter in part.parameters()):
            raise ValueError(
                "flow matching trains the continuous transform at the base end only, and part "
                f"{number} of this flow's chain ({type(part).__name__}) has parameters that it "
                "would leave as they are: freeze them with requires_grad_(False), build the flow "
                "with one block, or train by likelihood"
            )
    return first, outside


def _parts(transform: Transform) -> list[Transform]:
    """The transforms of a chain, and of chains in it, in forward order."""
    if not isinstance(transform, Chain):
        return [transform]
    return [part for inner in transform for part in _parts(inner)]
