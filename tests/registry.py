"""Every transform and every model, once, with what the laws need to know about it.

A new member is one line here; `test_laws.py` applies every law that the member declares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

import cnf
from cnf.bijections import Affine, Inverted, NeuralAutoregressive, RationalQuadratic
from cnf.nets import (
    MADE,
    MLP,
    ConvField,
    ConvNet,
    GatedAttention,
    PotentialField,
    ResidualField,
    ResNet,
    TimeMLP,
)
from cnf.transforms import (
    ActNorm,
    Autoregressive,
    BatchNorm,
    BlockAutoregressive,
    Chain,
    Checkerboard,
    Continuous,
    Convolution1x1,
    Coupling,
    Diagonal,
    Elementwise,
    HouseholderLinear,
    Inverse,
    LULinear,
    MatrixExponential,
    Multiscale,
    Permutation,
    QRLinear,
    Rotation,
    Squeeze,
    Standardize,
    SVDLinear,
    Transform,
    Triangular,
    channel_mask,
    half_mask,
)

# of the adaptive methods the one that such a tolerance costs least
TIGHT = cnf.Solver("dopri8", rtol=1e-11, atol=1e-11)
SINGLE = cnf.Solver(rtol=1e-6, atol=1e-6)
# a fixed grid of forty steps, fine enough for its two directions to agree
GRID = cnf.Solver(method="rk4", step_size=0.025)


@dataclasses.dataclass(frozen=True)
class Member:
    """One transform or model under test.

    Attributes:
        name: what the test report calls it.
        build: makes a fresh one, given the solver for whatever is continuous in it.
        event: the shape of one sample.
        latent: the shape of one z of a transform, where it is another than the sample's.
        context: the size of its context, 0 for none.
        tolerance: of a round trip in float64.
        tolerance32: of a round trip in float32.
        spread: how far the laws move the parameters from where they start.
        window: the interval that every feature lives in; None for the whole line.
    """

    name: str
    build: Callable[[cnf.Solver], nn.Module]
    event: tuple[int, ...] = (3,)
    context: int = 0
    tolerance: float = 1e-9
    tolerance32: float = 1e-4
    latent: tuple[int, ...] | None = None
    spread: float = 0.3
    window: tuple[float, float] | None = None

    def __str__(self) -> str:
        return self.name


def continuous(
    solver: cnf.Solver, features: int = 3, context: int = 0, conditioning: str = "concatsquash"
) -> Transform:
    field = TimeMLP(features, (8, 8), conditioning=conditioning, context_features=context)
    return Continuous(field, solver=solver)


def spline_coupling(solver: cnf.Solver = TIGHT) -> Transform:
    spline = RationalQuadratic(bins=4, bound=3.0)
    return Coupling(spline, MLP(1, 2 * spline.size, hidden=(8,)), half_mask(3))


def spline_autoregressive(solver: cnf.Solver = TIGHT) -> Transform:
    spline = RationalQuadratic(bins=4, bound=3.0)
    return Autoregressive(spline, MADE(3, spline.size, hidden=(8,)))


def image_coupling(net: nn.Module, channels: int) -> Transform:
    return Coupling(Affine(), net, channel_mask(channels))


TRANSFORMS = [
    Member(
        "affine coupling", lambda solver: Coupling(Affine(), MLP(1, 4, hidden=(8,)), half_mask(3))
    ),
    Member(
        "affine coupling with context",
        lambda solver: Coupling(Affine(), MLP(1, 4, hidden=(8,), context_features=2), half_mask(3)),
        context=2,
    ),
    Member("spline coupling", spline_coupling),
    Member(
        "affine autoregressive", lambda solver: Autoregressive(Affine(), MADE(3, 2, hidden=(8,)))
    ),
    Member(
        "affine autoregressive with context",
        lambda solver: Autoregressive(Affine(), MADE(3, 2, hidden=(8,), context_features=2)),
        context=2,
    ),
    Member("spline autoregressive", spline_autoregressive),
    Member("block autoregressive", lambda solver: BlockAutoregressive(3, units=3)),
    Member(
        "block autoregressive with context",
        lambda solver: BlockAutoregressive(3, units=3, context_features=2),
        context=2,
    ),
    Member(
        "neural autoregressive",
        lambda solver: Autoregressive(
            Inverted(NeuralAutoregressive(units=3)), MADE(3, 9, hidden=(8,))
        ),
    ),
    Member("inverse autoregressive", lambda solver: Inverse(spline_autoregressive())),
    Member("elementwise", lambda solver: Elementwise(RationalQuadratic(bins=4), (3,))),
    Member(
        "elementwise with context",
        lambda solver: Elementwise(Affine(), (1,), MLP(2, 2, hidden=(8,))),
        event=(1,),
        context=2,
    ),
    Member("permutation", lambda solver: Permutation([2, 0, 1])),
    Member("rotation", lambda solver: Rotation(3, [0.3, 0.2, -0.5])),
    Member("diagonal", lambda solver: Diagonal(3)),
    Member("triangular", lambda solver: Triangular(3)),
    Member("LU", lambda solver: LULinear(3)),
    Member("QR", lambda solver: QRLinear(3)),
    Member("Householder", lambda solver: HouseholderLinear(3)),
    Member("SVD", lambda solver: SVDLinear(3)),
    Member("matrix exponential", lambda solver: MatrixExponential(3)),
    Member("1x1 convolution", lambda solver: Convolution1x1(LULinear(2)), event=(2, 2, 2)),
    Member("squeeze", lambda solver: Squeeze(), event=(1, 4, 2), latent=(4, 2, 1)),
    Member("checkerboard", lambda solver: Checkerboard(), event=(1, 3, 4), latent=(2, 3, 2)),
    Member(
        "channel coupling",
        lambda solver: image_coupling(ConvNet(1, 4, hidden=(4, 4)), 3),
        event=(3, 2, 2),
    ),
    Member(
        "channel coupling with context",
        lambda solver: image_coupling(ResNet(1, 2, hidden=(4,), context_features=2), 2),
        event=(2, 2, 2),
        context=2,
    ),
    Member(
        "checkerboard coupling, attention",
        lambda solver: Chain(
            [
                Inverse(Checkerboard()),
                image_coupling(GatedAttention(1, 2, (2, 1), hidden=(4,), heads=2), 2),
                Checkerboard(),
            ]
        ),
        event=(1, 2, 2),
    ),
    Member(
        "multiscale",
        lambda solver: Multiscale(
            [
                Chain([image_coupling(ConvNet(2, 4, hidden=(4,)), 4), Squeeze()]),
                Chain([image_coupling(ConvNet(4, 8, hidden=(4,)), 8), Squeeze()]),
            ],
            (1, 4, 4),
        ),
        event=(1, 4, 4),
        latent=(16,),
    ),
    Member("act norm", lambda solver: ActNorm((3,))),
    Member("batch norm", lambda solver: BatchNorm((3,)).eval()),
    Member("standardize", lambda solver: Standardize((3,)).fit(torch.randn(9, 3) * 2 + 1)),
    Member("continuous", continuous),
    Member(
        "continuous with context",
        lambda solver: continuous(solver, 2, context=2),
        event=(2,),
        context=2,
    ),
    Member(
        "continuous, hyper", lambda solver: continuous(solver, 1, conditioning="hyper"), event=(1,)
    ),
    Member(
        "continuous, potential",
        lambda solver: Continuous(PotentialField(2, 4, context_features=2), solver=solver),
        event=(2,),
        context=2,
    ),
    Member(
        "continuous, residual",
        lambda solver: Continuous(
            ResidualField(2, 6, 1, frequencies=1, context_features=2), solver=solver
        ),
        event=(2,),
        context=2,
        spread=0.1,
    ),
    Member(
        "continuous, convolutional",
        lambda solver: Continuous(ConvField(1, (2,), context_features=2), solver=solver),
        event=(1, 2, 2),
        context=2,
    ),
    Member(
        "continuous, convolutional film",
        lambda solver: Continuous(
            ConvField(1, (2,), context_features=2, context_by="film"), solver=solver
        ),
        event=(1, 2, 2),
        context=2,
    ),
    Member("continuous, fixed grid", lambda solver: continuous(GRID, 2), event=(2,)),
    Member("chain", lambda solver: Chain([continuous(solver), LULinear(3), spline_coupling()])),
]


def models(features: int, context: int, most: int = 4) -> list[Member]:
    """Every registered model for tables, quick to test, with at most so many layers."""
    small = {"hidden": (8, 8), "context_features": context}
    builders = {
        "ffjord": lambda solver: cnf.ffjord(features, solver=solver, **small),
        "ffjord, two blocks": lambda solver: cnf.ffjord(
            features, blocks=2, solver=solver, trainable_end_time=True, **small
        ),
        "ffjord, film and actnorm": lambda solver: cnf.ffjord(
            features, context_by="film", normalization="actnorm", solver=solver, **small
        ),
        "rnode": lambda solver: cnf.rnode(features, conditioning="squash", solver=solver, **small),
        "otflow": lambda solver: cnf.otflow(
            features, width=6, context_features=context, solver=solver
        ),
        "nice": lambda solver: cnf.nice(features, **small),
        "realnvp": lambda solver: cnf.realnvp(features, layers=most, **small),
        "glow": lambda solver: cnf.glow(features, depth=min(3, most), **small),
        "flowpp": lambda solver: cnf.flowpp(features, layers=min(3, most), components=4, **small),
        "nice, logistic base": lambda solver: cnf.nice(features, base="logistic", **small),
        "maf": lambda solver: cnf.maf(features, layers=min(3, most), **small),
        "iaf": lambda solver: cnf.iaf(features, layers=min(3, most), **small),
        "nsf": lambda solver: cnf.nsf(features, layers=min(3, most), bins=4, **small),
        "nsf, autoregressive": lambda solver: cnf.nsf(
            features, layers=min(3, most), bins=4, autoregressive=True, **small
        ),
        "naf": lambda solver: cnf.naf(features, layers=min(2, most), units=4, **small),
        "unaf": lambda solver: cnf.unaf(features, layers=min(2, most), units=3, **small),
        "bpf": lambda solver: cnf.bpf(features, layers=min(2, most), degree=5, **small),
        "sospf": lambda solver: cnf.sospf(
            features, layers=min(2, most), polynomials=2, degree=1, **small
        ),
        "bnaf": lambda solver: cnf.bnaf(
            features, context_features=context, layers=min(2, most), units=3, hidden=2
        ),
        "gaussianization": lambda solver: cnf.gaussianization(
            features, layers=min(2, most), components=3, **small
        ),
        "planar": lambda solver: cnf.planar(features, layers=min(3, most), **small),
        "planar, forward": lambda solver: cnf.planar(
            features, layers=min(3, most), formula="forward", **small
        ),
        "radial": lambda solver: cnf.radial(features, layers=min(3, most), **small),
        "sylvester": lambda solver: cnf.sylvester(features, layers=min(2, most), **small),
        "residual flow": lambda solver: cnf.residual_flow(features, layers=min(2, most), **small),
        "mixture": lambda solver: cnf.mixture(
            features,
            components=("nice", ("nsf", {"bins": 3, "layers": 2, "hidden": (8,)})),
            **small,
        ),
        "ncsf": lambda solver: cnf.ncsf(features, layers=min(2, most), bins=3, **small),
        "ncsf, autoregressive": lambda solver: cnf.ncsf(
            features, layers=min(2, most), bins=3, autoregressive=True, **small
        ),
    }
    # residual networks are louder than plain ones of the same numbers
    spreads = {"otflow": 0.05, "nsf, autoregressive": 0.15}
    return [
        Member(
            f"{name}, D={features}, C={context}",
            build,
            (features,),
            context,
            window=(-math.pi, math.pi) if name.startswith("ncsf") else None,
            spread=spreads.get(name, 0.3),
        )
        for name, build in builders.items()
    ]


def image_models(event: tuple[int, ...], context: int, most: int = 2) -> list[Member]:
    """Every registered model for images without units of their own, with at most so many layers."""
    small = {"hidden": (4,), "context_features": context}
    builders = {
        "ffjord": lambda solver: cnf.ffjord(event, levels=2, solver=solver, **small),
        "realnvp": lambda solver: cnf.realnvp(event, layers=most, **small),
        "glow": lambda solver: cnf.glow(event, depth=most, **small),
        "flowpp": lambda solver: cnf.flowpp(event, layers=most, components=3, heads=2, **small),
    }
    return [
        Member(f"{name}, {event}, C={context}", build, event, context, spread=0.05)
        for name, build in builders.items()
    ]


MODELS = [
    *models(1, 0),
    *models(1, 2),
    *models(2, 0),
    *models(3, 2),
    *image_models((1, 4, 4), 0),
    *image_models((2, 4, 4), 2),
]
