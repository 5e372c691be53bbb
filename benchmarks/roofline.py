"""What nobody can leave out of a training step: its matrix products and activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cnf import compiling
from cnf.nets import TimeMLP
from cnf.ode.solver import ROWS_COMPILED
from cnf.tanh import quick_tanh

ALONE = "matrix products and tanh alone"
COMPILED = "the same as compiled code"


class _Products:
    """Products of (rows, inputs, outputs) each, with tanh after the first ``activated``."""

    def __init__(self, like: Tensor, shapes: Sequence[tuple[int, int, int]], activated: int):
        self.pairs = [
            (like.new_empty(rows, inputs).normal_(), like.new_empty(inputs, outputs).normal_())
            for rows, inputs, outputs in shapes
        ]
        self.ends = [points @ weight for points, weight in self.pairs]
        self.hidden = [torch.empty_like(end) for end in self.ends[:activated]]

    def evaluate(self) -> None:
        for (points, weight), end in zip(self.pairs, self.ends, strict=True):
            torch.mm(points, weight, out=end)
        for end, out in zip(self.ends, self.hidden, strict=False):
            torch.tanh(end, out=out)

    def differentiate(self) -> None:
        for (points, weight), end in zip(self.pairs, self.ends, strict=True):
            torch.mm(end, weight.T)
            torch.mm(points.T, end)


def alone(
    field: TimeMLP,
    x: Tensor,
    tangents: int | None,
    forward: int,
    backward: int,
    kind: type[_Products] = _Products,
) -> Callable[[], None]:
    """The matrix products and activations of a checkpointed training step, and nothing else.

    Every evaluation takes the batch through all layers, and those with a divergence the tangents
    through the inner ones (None: through a trilinear form of three slopes instead); a
    differentiated evaluation adds two products for each, towards the input and the weight. A step
    forward has eight evaluations, three with a divergence, beside two to begin with; a step that
    is differentiated has nine, four of them with one.
    """
    sizes = field.layers.sizes
    if tangents is None:
        inner_shapes = [(len(x), sizes[1], sizes[2] * sizes[3])]
    else:
        inner_shapes = [(tangents * len(x), *pair) for pair in pairwise(sizes[1:-1])]
    whole = kind(x, [(len(x), *pair) for pair in pairwise(sizes)], len(sizes) - 2)
    inner = kind(x, inner_shapes, 0)
    traced, differentiated = 2 + 3 * (forward - 2) // 8, 4 * backward // 9

    def call() -> None:
        for _ in range(forward + backward):
            whole.evaluate()
        for _ in range(traced + differentiated):
            inner.evaluate()
        for _ in range(backward):
            whole.differentiate()
        for _ in range(differentiated):
            inner.differentiate()

    return call


class _Compiled(_Products):
    """The same in code that Inductor makes."""

    def evaluate(self) -> None:
        _code(_evaluate)(*self._operands(), len(self.hidden))

    def differentiate(self) -> None:
        _code(_differentiate)(*self._operands(), self.ends)

    def _operands(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        points, weights = zip(*self.pairs, strict=True)
        return points, weights


@functools.cache
def _code(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    return compiling.compiled(function, dynamic=True, whole=True, native=True)


def _evaluate(points: Sequence[Tensor], weights: Sequence[Tensor], activated: int) -> list[Tensor]:
    ends = [part @ weight for part, weight in zip(points, weights, strict=True)]
    return [*map(quick_tanh, ends[:activated]), *ends[activated:]]


def _differentiate(
    points: Sequence[Tensor], weights: Sequence[Tensor], ends: Sequence[Tensor]
) -> list[Tensor]:
    parts = zip(points, weights, ends, strict=True)
    return [product for x, w, end in parts for product in (end @ w.T, x.T @ end)]


def compiled(
    field: TimeMLP, x: Tensor, tangents: int, forward: int, backward: int
) -> Callable[[], None]:
    """``alone`` by the products and the tanh that compiled steps have, in their groups."""
    parts = x.split(ROWS_COMPILED)
    groups = [alone(field, part, tangents, forward, backward, _Compiled) for part in parts]

    def call() -> None:
        for group in groups:
            group()

    return call
