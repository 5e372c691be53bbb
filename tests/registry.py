"""Every transform and every model, once, with what the laws need to know about it.

A new member is one line here; `test_laws.py` applies every law that the member declares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

import cnf
from cnf.bijections import Affine, RationalQuadratic
from cnf.nets import MADE, MLP, TimeMLP
from cnf.transforms import (
    ActNorm,
    Autoregressive,
    BatchNorm,
    Chain,
    Continuous,
    Convolution1x1,
    Coupling,
    Diagonal,
    Elementwise,
    HouseholderLinear,
    Inverse,
    LULinear,
    MatrixExponential,
    Permutation,
    QRLinear,
    Rotation,
    Standardize,
    SVDLinear,
    Transform,
    Triangular,
    half_mask,
)

TIGHT = cnf.Solver(rtol=1e-11, atol=1e-11)


@dataclasses.dataclass(frozen=True)
class Member:
    """One transform or model under test.

    Attributes:
        name: what the test report calls it.
        build: makes a fresh one.
        event: the shape of one sample.
        context: the size of its context, 0 for none.
        tolerance: of a round trip in float64.
        tolerance32: of a round trip in float32.
        spread: the size of the noise that the test adds to every parameter.
    """

    name: str
    build: Callable[[], nn.Module]
    event: tuple[int, ...] = (3,)
    context: int = 0
    tolerance: float = 1e-9
    tolerance32: float = 1e-4
    spread: float = 0.3

    def __str__(self) -> str:
        return self.name


def continuous(
    features: int = 3, context: int = 0, solver: cnf.Solver = TIGHT, conditioning="concatsquash"
) -> Transform:
    field = TimeMLP(features, (8, 8), conditioning=conditioning, context_features=context)
    return Continuous(field, solver=solver)


def spline_coupling() -> Transform:
    spline = RationalQuadratic(bins=4, bound=3.0)
    return Coupling(spline, MLP(1, 2 * spline.size, hidden=(8,)), half_mask(3))


def spline_autoregressive() -> Transform:
    spline = RationalQuadratic(bins=4, bound=3.0)
    return Autoregressive(spline, MADE(3, spline.size, hidden=(8,)))


TRANSFORMS = [
    Member("affine coupling", lambda: Coupling(Affine(), MLP(1, 4, hidden=(8,)), half_mask(3))),
    Member(
        "affine coupling with context",
        lambda: Coupling(Affine(), MLP(1, 4, hidden=(8,), context_features=2), half_mask(3)),
        context=2,
    ),
    Member("spline coupling", spline_coupling),
    Member("affine autoregressive", lambda: Autoregressive(Affine(), MADE(3, 2, hidden=(8,)))),
    Member(
        "affine autoregressive with context",
        lambda: Autoregressive(Affine(), MADE(3, 2, hidden=(8,), context_features=2)),
        context=2,
    ),
    Member("spline autoregressive", spline_autoregressive),
    Member("inverse autoregressive", lambda: Inverse(spline_autoregressive())),
    Member("elementwise", lambda: Elementwise(RationalQuadratic(bins=4), (3,))),
    Member(
        "elementwise with context",
        lambda: Elementwise(Affine(), (1,), MLP(2, 2, hidden=(8,))),
        event=(1,),
        context=2,
    ),
    Member("permutation", lambda: Permutation([2, 0, 1])),
    Member("rotation", lambda: Rotation(3, [0.3, 0.2, -0.5])),
    Member("diagonal", lambda: Diagonal(3)),
    Member("triangular", lambda: Triangular(3)),
    Member("LU", lambda: LULinear(3)),
    Member("QR", lambda: QRLinear(3)),
    Member("Householder", lambda: HouseholderLinear(3)),
    Member("SVD", lambda: SVDLinear(3)),
    Member("matrix exponential", lambda: MatrixExponential(3)),
    Member("1x1 convolution", lambda: Convolution1x1(LULinear(2)), event=(2, 2, 2)),
    Member("act norm", lambda: ActNorm((3,))),
    Member("batch norm", lambda: BatchNorm((3,)).eval()),
    Member("standardize", lambda: Standardize((3,)).fit(torch.randn(9, 3) * 2 + 1)),
    Member("continuous", continuous),
    Member("continuous with context", lambda: continuous(2, context=2), event=(2,), context=2),
    Member("continuous, hyper", lambda: continuous(1, conditioning="hyper"), event=(1,)),
    Member("continuous, fixed grid", lambda: continuous(2, solver=GRID), event=(2,)),
    Member("chain", lambda: Chain([continuous(3), LULinear(3), spline_coupling()])),
]

# a fixed grid of forty steps: the two directions differ by its own error
GRID = cnf.Solver(method="rk4", step_size=0.025)


def models(features: int, context: int) -> list[Member]:
    """Every registered model for tables, at a size that is quick to test."""
    small = {"hidden": (8, 8), "context_features": context}
    builders = {
        "ffjord": lambda: cnf.ffjord(features, solver=TIGHT, **small),
        "ffjord, two blocks": lambda: cnf.ffjord(
            features, blocks=2, solver=TIGHT, trainable_end_time=True, **small
        ),
        "nice": lambda: cnf.nice(features, **small),
        "realnvp": lambda: cnf.realnvp(features, layers=4, **small),
        "maf": lambda: cnf.maf(features, layers=3, **small),
        "iaf": lambda: cnf.iaf(features, layers=3, **small),
        "nsf": lambda: cnf.nsf(features, layers=3, bins=4, **small),
        "nsf, autoregressive": lambda: cnf.nsf(
            features, layers=3, bins=4, autoregressive=True, **small
        ),
    }
    return [
        Member(f"{name}, D={features}, C={context}", build, (features,), context)
        for name, build in builders.items()
    ]


MODELS = [*models(1, 0), *models(1, 2), *models(2, 0), *models(3, 2)]
