"""Mixtures of logistic distributions as maps: Flow++'s and NAF's."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cnf.bijections.affine import soft_bound
from cnf.bijections.base import Function, NumericMap, Pair, ScalarMap, invert
from cnf.registry import record


@record
@dataclasses.dataclass(frozen=True)
class LogisticMixture(NumericMap):
    """Flow++'s map: x = logit(Σ πₖ·sigmoid((z − μₖ)/sₖ))·exp(a) + b (Ho et al. 2019).

    Everything is computed from log-CDF and log-survival function, so that neither tail saturates.

    Parameters: ``components`` each of raw weights, means μ and raw log-scales, then b and raw a.
    Components that coincide have equal gradients and would never part, so at zero they stand
    apart as the quadrature of a logistic distribution by narrower ones, which is the identity
    within 0.1 for |z| ≤ 2 and close to it beyond; ``width=1`` is the identity exactly.

    Attributes:
        components: how many logistic distributions are mixed.
        bound: the largest change of a component's log-scale and of a, approached smoothly.
        width: the scale s of the components at zero.

    Example:
        >>> import torch
        >>> mixture = LogisticMixture(components=8, width=1.0)
        >>> x, _ = mixture.forward(torch.tensor([-50.0, 0.5]), torch.zeros(2, mixture.size))
        >>> [round(value, 4) for value in x.tolist()]
        [-50.0, 0.5]
    """

    components: int = 8
    bound: float = 5.0
    width: float = 0.6

    def __post_init__(self) -> None:
        _check_mixture(self.components, self.bound, self.width, "components")

    @property
    def size(self) -> int:
        """Weights, means and log-scales, then a shift and a log-scale."""
        return 3 * self.components + 2

    def curve(self, parameters: Tensor) -> Function:
        """The map, with its parameters prepared."""
        weights, slopes, offsets, shift, log_scale = self._parts(parameters)

        def mapped(z: Tensor) -> Pair:
            logit, log_derivative = _logit_mixture(z, weights, slopes, offsets)
            return logit * torch.exp(log_scale) + shift, log_derivative + log_scale

        return mapped

    def bracket(self, x: Tensor, parameters: Tensor) -> Pair:
        """A mixture's quantile lies between its components' quantiles."""
        _, slopes, offsets, shift, log_scale = self._parts(parameters)
        return _quantiles((x - shift) * torch.exp(-log_scale), slopes, offsets)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = self.components
        raw, means, log_scales, last = parameters.split([count, count, count, 2], -1)
        centres, scale = _spread(raw, self.width)
        slopes = -math.log(scale) - soft_bound(log_scales, self.bound)
        offsets = -(means + centres) * torch.exp(slopes)
        weights = torch.log_softmax(raw, -1)
        return weights, slopes, offsets, last[..., 0], soft_bound(last[..., 1], self.bound)


@record
@dataclasses.dataclass(frozen=True)
class NeuralAutoregressive(ScalarMap):
    """NAF's deep sigmoidal flow: layers of x = logit(Σ wₖ·sigmoid(aₖ·z + bₖ)) (Huang et al. 2018).

    The closed form is ``forward``; to train a density use it ``Inverted``, as the paper does.

    Parameters: for each layer ``units`` each of raw weights, raw log-slopes and offsets b. At zero
    the units stand apart, near the identity, as ``LogisticMixture``'s components do.

    Attributes:
        units: sigmoids in a layer.
        layers: how many layers are composed.
        bound: the largest change of a unit's log-slope, approached smoothly.
        width: the scale of the units at zero; 1 is the identity exactly.

    Example:
        >>> import torch
        >>> naf = NeuralAutoregressive(units=4, layers=2)
        >>> x, log_derivative = naf.forward(torch.tensor(0.3), torch.ones(naf.size))
        >>> z, _ = naf.inverse(x, torch.ones(naf.size))
        >>> round(z.item(), 4)
        0.3
    """

    units: int = 8
    layers: int = 1
    bound: float = 5.0
    width: float = 0.6

    def __post_init__(self) -> None:
        _check_mixture(self.units, self.bound, self.width, "units")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    @property
    def size(self) -> int:
        """Weights, slopes and offsets of every layer."""
        return 3 * self.units * self.layers

    def _layers(self, parameters: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        self.check(parameters)
        prepared = []
        for raw in parameters.split(3 * self.units, -1):
            weights, log_slopes, offsets = raw.split(self.units, -1)
            centres, scale = _spread(weights, self.width)
            slopes = soft_bound(log_slopes, self.bound) - math.log(scale)
            prepared.append((torch.log_softmax(weights, -1), slopes, offsets - centres / scale))
        return prepared

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """The layers in order."""
        total: Tensor | float = 0.0
        for layer in self._layers(parameters):
            z, log_derivative = _logit_mixture(z, *layer)
            total = total + log_derivative
        return z, torch.as_tensor(total)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """The layers undone one by one, each numerically within its units' own inverses."""
        total: Tensor | float = 0.0
        for weights, slopes, offsets in reversed(self._layers(parameters)):
            x, log_derivative = _invert_layer(x, weights, slopes, offsets)
            total = total + log_derivative
        return x, torch.as_tensor(total)


def _invert_layer(x: Tensor, weights: Tensor, slopes: Tensor, offsets: Tensor) -> Pair:
    """One layer's inverse."""
    lower, upper = _quantiles(x, slopes, offsets)
    return invert(
        lambda z: _logit_mixture(z, weights, slopes, offsets), x, lower=lower, upper=upper
    )


def _check_mixture(count: int, bound: float, width: float, name: str) -> None:
    """Refuse what cannot be a mixture."""
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    if not 0 < width <= 1:
        raise ValueError(f"width must lie in (0, 1], got {width}")


def _spread(like: Tensor, width: float) -> tuple[Tensor, float]:
    """Centres and scale of narrow logistic distributions whose equal mixture is nearly logistic.

    A logistic variable is one of scale s plus an independent one with distribution function
    1/2 + arctan(tan(πs/2)·tanh(m/2))/(πs); the centres are the latter's quantiles.
    """
    count = like.shape[-1]
    if count == 1 or width == 1:
        return like.new_zeros(count), 1.0
    levels = (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count - 0.5
    ratio = torch.tan(math.pi * width * levels) / math.tan(math.pi * width / 2)
    return 2 * torch.atanh(ratio), width


def _logit_mixture(z: Tensor, weights: Tensor, slopes: Tensor, offsets: Tensor) -> Pair:
    """Logit Σ exp(weightₖ)·sigmoid(exp(slopeₖ)·z + offsetₖ), and the log-derivative.

    Args:
        z: ``(*shape)``.
        weights: normalised log-weights, ``(*shape, count)``.
        slopes: log-slopes, the same.
        offsets: the same.
    """
    argument = torch.exp(slopes) * z.unsqueeze(-1) + offsets
    log_high, log_low = logsigmoid(argument), logsigmoid(-argument)
    log_cdf = torch.logsumexp(weights + log_high, -1)
    log_survival = torch.logsumexp(weights + log_low, -1)
    log_density = torch.logsumexp(weights + slopes + log_high + log_low, -1)
    return log_cdf - log_survival, log_density - log_cdf - log_survival


def _quantiles(logit: Tensor, slopes: Tensor, offsets: Tensor) -> Pair:
    """The least and the greatest z at which one unit alone reaches the logit."""
    quantiles = ((logit.unsqueeze(-1) - offsets) * torch.exp(-slopes)).detach()
    return quantiles.amin(-1), quantiles.amax(-1)
