"""Which base sample goes with which data point when a path is drawn between them.

Any pairing whose two marginals are base and data leaves the matched density exact; a pairing by
distance makes the paths straighter, the target less noisy and the trained field cheaper to solve.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cnf.registry import unknown_name

TELLING = 32  # rows; when so many contexts all differ, that is no accident of a small batch


class Coupling(ABC):
    """How a batch of base samples is dealt out to a batch of data. Subclasses are frozen records.

    Attributes:
        joint: whether who gets which depends on the values.
    """

    joint: bool = True

    @abstractmethod
    def choose(self, z: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """For every row of x, ``(rows, *event)``, the index of its row of z, ``(rows,)``."""


@dataclasses.dataclass(frozen=True)
class Independent(Coupling):
    """Any z for any x."""

    joint = False

    def choose(self, z: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As they come: both are random already."""
        return torch.arange(len(x), device=x.device)


@dataclasses.dataclass(frozen=True)
class ExactTransport(Coupling):
    """The pairing of least mean squared distance within the batch.

    Attributes:
        rows: pair at most so many at a time: the work grows with their cube.

    Paper: Tong et al., "Improving and generalizing flow-based generative models with minibatch
    optimal transport", TMLR 2024; Pooladian et al., "Multisample flow matching", ICML 2023.

    Example:
        >>> z, x = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [3.0], [4.0]])
        >>> ExactTransport().choose(z, x)
        tensor([2, 0, 1])
    """

    rows: int = 256

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2 to have a choice, got {self.rows}")

    def choose(self, z: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Solve the assignment problem."""
        # only the products x·z depend on the pairing; centred, they lose no digits to rounding
        x, z = x.flatten(1), z.flatten(1)
        x, z = x - x.mean(0), z - z.mean(0)
        chosen, start = [], 0
        for part_z, part_x in zip(z.split(self.rows), x.split(self.rows), strict=True):
            product = part_x @ part_z.T
            _, columns = linear_sum_assignment(product.cpu().numpy(), maximize=True)
            chosen.append(start + torch.as_tensor(columns))
            start += len(part_x)
        return torch.cat(chosen).to(x.device) if chosen else torch.arange(0, device=x.device)


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Coupling):
    """A random pairing from the entropic transport plan, by Sinkhorn's iteration on logarithms.

    Attributes:
        epsilon: the regularisation, in units of the batch's mean squared distance; large values
            approach the independent pairing, small ones the exact one at the price of iterations.
        iterations: at most so many.
        tolerance: stop when no row's total differs by more than this fraction from what it should
            be.

    Paper: Cuturi, "Sinkhorn distances", NeurIPS 2013; Tong et al., TMLR 2024.
    """

    epsilon: float = 0.05
    iterations: int = 100
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def choose(self, z: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a z for every x from the plan's row."""
        if len(x) < 2:
            return torch.arange(len(x), device=x.device)
        # every x shares one z's mass evenly, so the marginal of z stays the base's
        return torch.multinomial(self.log_plan(z, x).exp(), 1, generator=generator).squeeze(1)

    def log_plan(self, z: Tensor, x: Tensor) -> Tensor:
        """The logarithm of the plan, ``(rows of x, rows of z)``; it sums to one."""
        squares = torch.cdist(x.flatten(1), z.flatten(1)).square()
        affinity = -squares / (self.epsilon * squares.mean().clamp_min(1e-30))
        log_share = -math.log(len(x))
        of_z = affinity.new_zeros(len(z))
        for _ in range(self.iterations):
            of_x = log_share - torch.logsumexp(affinity + of_z, 1)
            plan = affinity + of_x[:, None]
            totals = torch.logsumexp(plan, 0)
            # the rows are exact here; done when the columns are, too
            if bool(((totals + of_z - log_share).exp() - 1).abs().max() <= self.tolerance):
                break
            of_z = log_share - totals
        return affinity + of_x[:, None] + of_z


COUPLINGS: dict[str, type[Coupling]] = {
    "independent": Independent,
    "exact": ExactTransport,
    "sinkhorn": Sinkhorn,
}


def as_coupling(coupling: str | Coupling) -> Coupling:
    """A coupling by its name, or the coupling itself."""
    if isinstance(coupling, Coupling):
        return coupling
    if coupling not in COUPLINGS:
        raise unknown_name("coupling", coupling, {**COUPLINGS, "reflow": None})
    return COUPLINGS[coupling]()


def pair(
    coupling: Coupling,
    z: Tensor,
    x: Tensor,
    context: Tensor | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The rows of z in the order in which they go with the rows of x, within equal contexts.

    A pairing across contexts would move the base's mass from one context to another, and every
    conditional density would be wrong.

    Args:
        coupling: how to pair.
        z: base samples, ``(rows, *event)``, drawn for the same contexts.
        x: data, ``(rows, *event)``.
        context: ``(rows, context_features)`` or None.
        generator: where randomness comes from.

    Raises:
        ValueError: if no two contexts are equal, so that there is nothing to choose from.
    """
    if not coupling.joint:
        return z
    if context is None:
        return z[coupling.choose(z, x, generator)]
    values, group = groups(coupling, context)
    paired = z.clone()
    for number in range(len(values)):
        (rows,) = torch.nonzero(group == number, as_tuple=True)
        paired[rows] = z[rows][coupling.choose(z[rows], x[rows], generator)]
    return paired


def groups(coupling: Coupling, context: Tensor) -> tuple[Tensor, Tensor]:
    """The contexts that occur, ``(groups, context_features)``, and each row's place among them.

    Raises:
        ValueError: if no two contexts are equal, so that a coupling has nothing to choose from.
    """
    # NaN equals nothing, and contexts that are missing are all alike
    told = torch.where(context.isnan(), math.inf, context)
    values, group = torch.unique(told, dim=0, return_inverse=True)
    if len(values) == len(context) >= TELLING:
        raise ValueError(
            f"{coupling} pairs base and data within equal contexts, and all {len(context)} "
            "contexts of this batch differ: pairing across contexts would bias the conditional "
            "densities, so a continuous context needs coupling='independent'"
        )
    return values, group
