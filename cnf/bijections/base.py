"""The contract of scalar maps, and the one numeric inversion that stands here."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from cnf.arrays import Array
from cnf.registry import record

Pair = tuple[Tensor, Tensor]
Function = Callable[[Tensor], Pair]


class ScalarMap(ABC):
    """An increasing map of one number, given its parameters: a frozen record without modules.

    All-zero parameters give the identity, or the nearest to it that the family has. Values have
    any shape; parameters have that shape with ``size`` more numbers at the end, and broadcast.

    Outside its support a map answers with a finite value and a log-derivative of −inf, so that the
    density there is zero and nothing is NaN.

    Attributes:
        domain: the interval that ``forward`` takes its values from.
        codomain: the interval that ``forward`` maps onto.
    """

    domain: tuple[float, float] = (-math.inf, math.inf)
    codomain: tuple[float, float] = (-math.inf, math.inf)

    @property
    @abstractmethod
    def size(self) -> int:
        """How many parameters one scalar needs."""

    @abstractmethod
    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """Map z to x.

        Args:
            z: values, ``(*shape)``.
            parameters: ``(*shape, size)``.

        Returns:
            x and log |dx/dz| in nats, both ``(*shape)``.
        """

    @abstractmethod
    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """Map x to z.

        Args:
            x: values, ``(*shape)``.
            parameters: ``(*shape, size)``.

        Returns:
            z and log |dz/dx| in nats, both ``(*shape)``.
        """

    def forward_array(self, z: Array, parameters: Array) -> tuple[Array, Array]:
        """``forward`` of arrays, which have no gradient.

        Where a few numbers at a time are mapped, a formula of NumPy's takes less time than torch
        takes to start. This may overwrite the parameters, and whoever calls it z.
        """
        # a copy of z, because what is returned may be a view of it
        x, log_derivative = self.forward(torch.from_numpy(z.copy()), torch.from_numpy(parameters))
        return x.numpy(), log_derivative.numpy()

    def check(self, parameters: Tensor) -> None:
        """Refuse parameters of the wrong size.

        Raises:
            ValueError: if the last axis is not ``size`` long.
        """
        if parameters.ndim == 0 or parameters.shape[-1] != self.size:
            raise ValueError(
                f"{self} needs {self.size} parameters per scalar on the last axis, got a tensor "
                f"of shape {tuple(parameters.shape)}; give the conditioner {self.size} outputs "
                "per feature"
            )


@record
@dataclasses.dataclass(frozen=True)
class Inverted(ScalarMap):
    """A scalar map the other way round: its ``forward`` is the part's ``inverse``.

    A density is trained through ``inverse``: a map whose closed form is ``forward`` trains faster
    inverted.

    Attributes:
        part: the map to swap.

    Example:
        >>> import torch
        >>> from cnf.bijections import Affine, Inverted
        >>> Inverted(Affine()).forward(torch.tensor(3.0), torch.tensor([2.0, 0.0]))
        (tensor(1.), tensor(-0.))
    """

    part: ScalarMap

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain", self.part.codomain)
        object.__setattr__(self, "codomain", self.part.domain)

    @property
    def size(self) -> int:
        """The part's size."""
        return self.part.size

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """The part's inverse."""
        return self.part.inverse(z, parameters)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """The part's forward."""
        return self.part.forward(x, parameters)


class NumericMap(ScalarMap):
    """A scalar map with a closed form forward and a numeric inverse."""

    @abstractmethod
    def curve(self, parameters: Tensor) -> Function:
        """The map from z to (x, log |dx/dz|), with everything computed that z has no part in."""

    def bracket(self, x: Tensor, parameters: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """A z below and one above the root, where they are known."""
        return None, None

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """The closed form."""
        self.check(parameters)
        return self.curve(parameters)(z)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """Solved by ``invert``."""
        self.check(parameters)
        lower, upper = self.bracket(x, parameters)
        return invert(self.curve(parameters), x, lower=lower, upper=upper)


class InversionError(ArithmeticError):
    """An increasing function could not be inverted within the iterations allowed."""


def tolerance_of(dtype: torch.dtype) -> float:
    """The accuracy that ``invert`` works to, relative to 1 + |z|.

    1e-12 in float64, 1e-6 in float32, eight units in the last place in anything coarser; the
    Newton steps after the search sharpen it further where the function is smooth.
    """
    known = {torch.float64: 1e-12, torch.float32: 1e-6}
    return known.get(dtype, 8 * torch.finfo(dtype).eps)


def invert(
    function: Function,
    target: Tensor,
    *,
    guess: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 300,
) -> Pair:
    """Solve f(z) = x for an increasing f, with exact gradients to x and to all that f closes over.

    A Newton search inside a bracket that expands until it holds the root and is halved whenever
    Newton's step does not shrink fast enough. It runs without gradients; two differentiable Newton
    steps from its result then carry them: dz/dx = 1/f', dz/dθ = −f_θ/f', and by the quadratic
    convergence of Newton's method the derivatives up to the third order.

    Args:
        function: from z to (f(z), log f'(z)), elementwise.
        target: x, any shape. Where x or f is not a number, the result is not either.
        guess: where to start; by default the middle of the bracket, or x itself.
        lower: a z below the root, where one is known.
        upper: a z above the root, where one is known.
        tolerance: the accuracy of z relative to 1 + |z|; by default ``tolerance_of(dtype)``.
        max_iterations: when to give up.

    Returns:
        z and log |dz/dx| = −log f'(z), both shaped like x.

    Raises:
        InversionError: if some element has not converged after ``max_iterations``.

    Example:
        >>> import torch
        >>> cubic = lambda z: (z**3 + z, (3 * z**2 + 1).log())
        >>> z, log_derivative = invert(cubic, torch.tensor(10.0))
        >>> round(z.item(), 5), round(log_derivative.item(), 5)
        (2.0, -2.56495)
    """
    tolerance = tolerance_of(target.dtype) if tolerance is None else tolerance
    # a compiler that traces this call stays out of the search, whose length depends on the values
    search = torch.compiler.disable(_search) if torch.compiler.is_dynamo_compiling() else _search
    with torch.no_grad():
        root = search(
            function, target.detach(), guess, lower, upper, tolerance, max_iterations
        ).detach()
    z = root
    for _ in range(2):
        value, log_derivative = function(z)
        step = (value - target) * torch.exp(-log_derivative.clamp(min=_floor(target.dtype)))
        # where rounding makes f flat a Newton step is noise: it may move z by the tolerance only
        reach = 10 * tolerance * (1 + root.abs())
        z = z - step + (step - torch.clamp(step, -reach, reach)).detach()
    return z, -function(z)[1]


def _floor(dtype: torch.dtype) -> float:
    """The log of the smallest derivative that may be divided by."""
    return math.log(torch.finfo(dtype).tiny) / 2


def _search(
    function: Function,
    target: Tensor,
    guess: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """The root of f(z) = target, elementwise, without gradients."""
    infinite = torch.full_like(target, math.inf)
    low, high = -infinite, infinite
    exact = torch.zeros_like(target, dtype=torch.bool)
    start = target if guess is None else guess.detach().expand_as(target)
    # rounding may put the root just outside a bracket that the caller computed: each end is tried
    for end, below in ((lower, True), (upper, False)):
        if end is not None:
            end = end.detach().expand_as(target)
            residual = function(end)[0] - target
            start, exact = torch.where(residual == 0, end, start), exact | (residual == 0)
            if below:
                low = torch.where(residual <= 0, end, low)
            else:
                high = torch.where(residual >= 0, end, high)
    if guess is None:
        middle = low + (high - low) / 2
        start = torch.where(middle.isfinite() & ~exact, middle, start)
    z = torch.minimum(torch.maximum(start, low), high)
    if target.numel() == 0:
        return z
    reach = 1 + z.abs()  # how far the next step may go while the bracket is open
    last = earlier = infinite  # Newton must halve the step before last, or the bracket is halved
    rounding = torch.finfo(target.dtype).eps * (1 + target.abs())
    root, done = z, torch.zeros_like(target, dtype=torch.bool)
    for _ in range(max_iterations):
        value, log_derivative = function(z)
        residual = value - target
        low = torch.where(residual <= 0, z, low)
        high = torch.where(residual >= 0, z, high)
        step = -residual * torch.exp(-log_derivative.clamp(min=_floor(target.dtype)))
        scale = tolerance * (1 + z.abs())
        inside = (z + step >= low - scale) & (z + step <= high + scale)
        closed = low.isfinite() & high.isfinite()
        converged = (step.abs() <= scale) | (high - low <= scale) | ~(residual.abs() > rounding)
        root = torch.where(done, root, z)
        done = done | converged
        if bool(done.all()):
            return root
        trusted = inside & (step.abs() <= torch.where(closed, earlier / 2, reach))
        fallback = torch.where(closed, (high - low) / 2 + (low - z), -reach * residual.sign())
        step = torch.where(trusted, step, fallback)
        reach = torch.where(closed, reach, 2 * reach)
        last, earlier = torch.where(closed, step.abs(), infinite), last
        z = z + step
    stuck = target[~done]
    raise InversionError(
        f"{stuck.numel()} of {target.numel()} values could not be inverted to a tolerance of "
        f"{tolerance:g} in {max_iterations} iterations, the first of them {stuck[0].item():g}. "
        "Either they lie outside what the map can reach, or its parameters are so extreme that it "
        "is flat there: bound the parameters, or work in float64"
    )
