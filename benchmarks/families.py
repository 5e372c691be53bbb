"""The four families of discrete flows, each as four packages build it, at equal parameters."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cnf
from cnf.bijections import RationalQuadratic
from cnf.distributions import Normal
from cnf.models.parts import autoregressive_layers, coupling_layers, interleaved

FAMILIES = ("realnvp", "maf", "nsf", "nsf-ar")
PACKAGES = ("cnf", "zuko", "nflows", "normflows")
BOUND = 5.0


class Spec(NamedTuple):
    """What a flow is to be like.

    Every network has two hidden layers, or what the package makes of one residual block.

    Attributes:
        family: one of ``FAMILIES``.
        features: D.
        layers: how many couplings or autoregressive layers.
        bins: of a spline.
        linear: for tables: splines with an LU map before each and residual networks, as in the
            neural spline flows' paper, where the package has these in its own recipe (all but
            zuko). For speed, no package has them.
    """

    family: str
    features: int
    layers: int
    bins: int
    linear: bool


class Model(NamedTuple):
    """A flow of any package.

    Attributes:
        module: what holds the parameters.
        log_prob: from ``(batch, features)`` to ``(batch,)``.
        sample: from a number to so many samples.
        initialize: fills data-dependent parameters from rows; nothing where a package's layers do
            so themselves, from the first batch that they see.
    """

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    initialize: Callable[[Tensor], None] = lambda rows: None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)


def build(package: str, spec: Spec, width: int = 64, seed: int = 0) -> Model:
    """A flow of a package, as wide as makes it have about as many parameters as all others.

    Args:
        package: one of ``PACKAGES``.
        spec: what it is to be like.
        width: of the two hidden layers of our networks, were they plain.
        seed: of the initial weights.
    """
    width = _matched(BUILDERS[package], spec, _cnf(spec, width, residual=False).count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[package](spec, width)


def _matched(make: Callable[[Spec, int], Model], spec: Spec, count: int) -> int:
    """The width whose number of parameters is nearest to ``count``."""
    above = bisect.bisect_left(range(97), count, lo=24, key=lambda width: make(spec, width).count)
    return min(above - 1, above, key=lambda width: abs(make(spec, width).count - count))


def _cnf(spec: Spec, width: int, residual: bool = True) -> Model:
    hidden = (width, width)
    if spec.family == "realnvp":
        flow = cnf.realnvp(spec.features, layers=spec.layers, hidden=hidden)
    elif spec.family == "maf":
        flow = cnf.maf(spec.features, layers=spec.layers, hidden=hidden)
    elif spec.linear:
        flow = cnf.nsf(
            spec.features,
            autoregressive=spec.family == "nsf-ar",
            layers=spec.layers,
            hidden=(width,) if residual else hidden,
            residual=residual,
            bins=spec.bins,
            bound=BOUND,
        )
    else:
        spline = RationalQuadratic(bins=spec.bins, bound=BOUND)
        parts: list[Any]
        if spec.family == "nsf-ar":
            parts = autoregressive_layers(
                spline, spec.features, spec.layers, hidden, 0, "relu", False
            )
        else:
            parts = coupling_layers(spline, spec.features, spec.layers, hidden, 0, "relu")
            parts += interleaved(spec.features)
        flow = cnf.Flow(cnf.Chain(parts), Normal(spec.features))
    return Model(flow, flow.log_prob, lambda n: flow.sample((n,)), flow.initialize)


def _zuko(spec: Spec, width: int) -> Model:
    import zuko

    hidden = (width, width)
    common = {"transforms": spec.layers, "hidden_features": hidden}
    if spec.family == "realnvp":
        flow = zuko.flows.RealNVP(spec.features, **common)
    elif spec.family == "maf":
        flow = zuko.flows.MAF(spec.features, **common)
    elif spec.family == "nsf":
        spline = {
            "univariate": zuko.transforms.MonotonicRQSTransform,
            "shapes": [(spec.bins,), (spec.bins,), (spec.bins - 1,)],
        }
        flow = zuko.flows.RealNVP(spec.features, **common, **spline)
    else:
        flow = zuko.flows.NSF(spec.features, bins=spec.bins, **common)
    return Model(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def _nflows(spec: Spec, width: int) -> Model:
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import MLP, ResidualNet

    class Net(MLP):
        hidden_features = width  # by which the spline layers scale what they get

        def forward(self, inputs: Tensor, context: None = None) -> Tensor:
            return super().forward(inputs)

    def net(inputs: int, outputs: int) -> nn.Module:
        return Net((inputs,), (outputs,), [width, width], activation=torch.relu)

    def residual_net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, width, num_blocks=1)

    splines = spec.family in ("nsf", "nsf-ar")
    masked = {
        "features": spec.features,
        "hidden_features": width,
        "num_blocks": 1,
        "use_residual_blocks": spec.linear and splines,
    }
    spline = {"num_bins": spec.bins, "tails": "linear", "tail_bound": BOUND}
    parts: list[nn.Module] = []
    for layer in range(spec.layers):
        if spec.linear and splines:
            parts += [
                transforms.RandomPermutation(spec.features),
                transforms.LULinear(spec.features, identity_init=True),
            ]
        elif spec.family in ("maf", "nsf-ar"):
            parts.append(transforms.ReversePermutation(spec.features))
        mask = torch.where(torch.arange(spec.features) % 2 == layer % 2, 1, -1)
        if spec.family == "realnvp":
            # its couplings only shrink, so that without these no density is higher than the base's
            parts.append(transforms.ActNorm(spec.features))
            parts.append(transforms.AffineCouplingTransform(mask, net))
        elif spec.family == "maf":
            parts.append(transforms.MaskedAffineAutoregressiveTransform(**masked))
        elif spec.family == "nsf":
            parts.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask, residual_net if spec.linear else net, **spline
                )
            )
        else:
            parts.append(
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    **masked, **spline
                )
            )
    flow = Flow(transforms.CompositeTransform(parts), StandardNormal([spec.features]))
    return Model(flow, flow.log_prob, flow.sample)


def _normflows(spec: Spec, width: int) -> Model:
    import normflows
    from normflows import flows

    D = spec.features
    first, second = (D + 1) // 2, D // 2
    parts: list[nn.Module] = []
    for layer in range(spec.layers):
        if spec.family == "realnvp":
            net = normflows.nets.MLP([first, width, width, 2 * second], init_zeros=True)
            parts += [flows.AffineCouplingBlock(net), flows.Permute(D, mode="swap")]
            parts.append(flows.ActNorm(D))  # as in its own examples
            continue
        if spec.family == "maf":
            made = flows.MaskedAffineAutoregressive(
                D, width, num_blocks=1, use_residual_blocks=False
            )
            # reversed, or else densities are the slow direction; then it only shrinks, as nflows'
            parts += [flows.Reverse(made), flows.Permute(D), flows.ActNorm(D)]
            continue
        if spec.family == "nsf":
            parts.append(
                flows.CoupledRationalQuadraticSpline(
                    D,
                    1,
                    width,
                    num_bins=spec.bins,
                    tail_bound=BOUND,
                    reverse_mask=layer % 2 == 1,
                )
            )
        else:
            parts.append(
                flows.AutoregressiveRationalQuadraticSpline(
                    D, 1, width, num_bins=spec.bins, tail_bound=BOUND
                )
            )
        if spec.linear:
            parts.append(flows.LULinearPermute(D))
        elif spec.family == "nsf-ar":
            parts.append(flows.Permute(D))
    base = normflows.distributions.DiagGaussian(D, trainable=False)
    flow = normflows.NormalizingFlow(base, parts)
    return Model(flow, flow.log_prob, lambda n: flow.sample(n)[0])


BUILDERS: dict[str, Callable[[Spec, int], Model]] = {
    "cnf": _cnf,
    "zuko": _zuko,
    "nflows": _nflows,
    "normflows": _normflows,
}
