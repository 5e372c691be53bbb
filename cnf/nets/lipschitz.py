"""Networks that contract: layers of bounded operator norm between 1-Lipschitz activations.

Norms are computed from the weights at every call and are differentiated through: there is no
running state, so two calls with the same weights agree to the bit, in ``train()`` and ``eval()``.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, normalize, softplus

from cnf.nets.activations import activation

# above this width the spectral norm comes from power iteration, whose error the margin covers
_EXACT_WIDTH = 512
_POWER_MARGIN = 1.01

_CONTRACTIVE = ("elu", "relu", "sine", "softplus", "tanh")

NORMS = (1.0, 2.0, math.inf)


class LipSwish(nn.Module):
    """z σ(softplus(β) z) / 1.1 with a learned β: smooth, slope never above 1 in size.

    From Chen et al., "Residual Flows for Invertible Generative Modeling" (2019).

    Example:
        >>> import torch
        >>> LipSwish()(torch.tensor(0.0)).item()
        0.0
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, z: Tensor) -> Tensor:
        """Apply to every entry."""
        return z * torch.sigmoid(softplus(self.beta) * z) / 1.1

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the derivative at every entry."""
        scaled = softplus(self.beta) * z
        open_ = torch.sigmoid(scaled)
        gate = open_ / 1.1
        return z * gate, gate * (1 + scaled * (1 - open_))


def contraction_activation(name: str) -> nn.Module:
    """A 1-Lipschitz activation: ``"lipswish"``, or elu, relu, sine, softplus or tanh.

    >>> contraction_activation("lipswish")
    LipSwish()
    """
    if name == "lipswish":
        return LipSwish()
    if name not in _CONTRACTIVE:
        raise ValueError(
            f"no 1-Lipschitz activation is called {name!r}; "
            f"known: lipswish, {', '.join(_CONTRACTIVE)}"
        )
    return activation(name)


def operator_norm(weight: Tensor, norm: float = 2.0) -> Tensor:
    """‖W‖ induced by the vector norm: largest column sum (1), singular value (2), row sum (∞).

    The spectral norm is exact up to a width of 512 on the narrow side; beyond, it is found by power
    iteration from a fixed start and raised by 1 %.

    >>> operator_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).item()
    5.0
    """
    if norm == 1:
        return weight.abs().sum(0).amax()
    if norm == math.inf:
        return weight.abs().sum(1).amax()
    if min(weight.shape) > _EXACT_WIDTH:
        return _POWER_MARGIN * _power_iteration(weight)
    return _largest_singular_value(weight)


def convolution_norm(weight: Tensor, size: tuple[int, int], norm: float = 2.0) -> Tensor:
    """An upper bound of ‖W‖ for a zero-padded convolution of images of a given size.

    For norm 2: the exact spectral norm of the circular convolution on the image enlarged by the
    kernel, of which the zero-padded one is a block; one small matrix per frequency. For norms 1
    and ∞: the largest absolute sum over the kernel and its outputs or inputs.

    Args:
        weight: ``(outputs, inputs, kernel, kernel)``.
        size: height and width of the image.
        norm: 1, 2 or ∞.
    """
    if norm != 2:
        return operator_norm(weight.abs().sum((-2, -1)), norm)
    grid = [n + k - 1 for n, k in zip(size, weight.shape[-2:], strict=True)]
    # a 1 × 1 kernel has the same matrix at every frequency
    if weight.shape[-2:] == (1, 1):
        grid = [1, 1]
    transfer = torch.fft.rfft2(weight, s=grid)
    return _largest_singular_value(transfer.movedim((-2, -1), (0, 1))).amax()


def _largest_singular_value(matrix: Tensor) -> Tensor:
    gram = matrix @ matrix.mH if matrix.shape[-2] < matrix.shape[-1] else matrix.mH @ matrix
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    # the root of zero has no finite derivative
    return largest.clamp_min(torch.finfo(largest.dtype).tiny).sqrt()


def _power_iteration(weight: Tensor, tolerance: float = 1e-5, max_iterations: int = 500) -> Tensor:
    """The largest singular value, approached from below."""
    with torch.no_grad():
        W = weight.detach()
        start = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0))
        v = normalize(start.to(W), dim=0)
        sigma = W.new_zeros(())
        for _ in range(max_iterations):
            u = normalize(W @ v, dim=0)
            v = normalize(W.mT @ u, dim=0)
            last, sigma = sigma, u @ W @ v
            if bool((sigma - last).abs() <= tolerance * sigma):
                break
    return u @ weight @ v


class Prepared:
    """Layers W_i x + b_i with activations between them, and their products with tangents."""

    def __init__(
        self,
        maps: Sequence[Callable[[Tensor], Tensor]],
        biases: Sequence[Tensor],
        activations: Iterable[nn.Module],
    ):
        self.maps = maps
        self.biases = biases
        self.activations = list(activations)

    def __call__(self, x: Tensor) -> Tensor:
        """g(x)."""
        for apply, bias, activate in zip(
            self.maps, self.biases, [*self.activations, None], strict=True
        ):
            x = apply(x) + bias
            x = x if activate is None else activate(x)
        return x

    def linearize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """g(x), and the function that multiplies tangents by ∂g/∂x there.

        Tangents are ``(k, *batch, *event)``, or broadcast against that.
        """
        slopes: list[Tensor] = []
        for apply, bias, activate in zip(self.maps, self.biases, self.activations, strict=False):
            x, slope = _with_slope(activate, apply(x) + bias)
            slopes.append(slope)

        def push(tangents: Tensor) -> Tensor:
            for apply, slope in zip(self.maps, slopes, strict=False):
                tangents = apply(tangents) * slope
            return self.maps[-1](tangents)

        return self.maps[-1](x) + self.biases[-1], push


class Contraction(nn.Module, ABC):
    """A network g with |g(x) - g(y)| ≤ lipschitz · |x - y|, whatever the context.

    Attributes:
        lipschitz: the bound, below 1.
        norm: the norm that it holds in.
        event_dims: how many axes one sample has.
    """

    lipschitz: float
    norm: float
    event_dims: int

    @abstractmethod
    def prepare(self, context: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The function x ↦ g(x, context), its weights brought under their norms once.

        It may have a method ``linearize(x)`` that gives g(x) and a function for products with its
        Jacobian there, as ``Prepared`` has; one that has none is differentiated.
        """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluate g(x, context)."""
        return self.prepare(context)(x)


class LipschitzMLP(Contraction):
    """A perceptron that contracts: W_L a(… a(W₁ x + C context + b₁) …) + b_L.

    Every ‖W_i‖ is at most lipschitz^(1/L): a weight beyond that is scaled down to it. The context
    only moves the first layer's offset, so it needs no bound.

    Args:
        features: inputs and outputs.
        hidden: widths of the hidden layers.
        context_features: length of the context; 0 for none, and what is given is ignored.
        lipschitz: the bound of the whole.
        norm: the vector norm that bounds are induced by: 1, 2 or ``math.inf``.
        activation: a name that ``contraction_activation`` knows.
        zero_last: start with a last layer of zeros, so that a residual block starts as the
            identity.
        generator: where initial weights come from.

    Example:
        >>> import torch
        >>> LipschitzMLP(3, zero_last=True)(torch.ones(3)).tolist()
        [0.0, 0.0, 0.0]
    """

    event_dims = 1

    def __init__(
        self,
        features: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        lipschitz: float = 0.97,
        norm: float = 2.0,
        activation: str = "lipswish",
        zero_last: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        _check_bound(lipschitz, norm)
        self.lipschitz = lipschitz
        self.norm = norm
        widths = list(itertools.pairwise([features, *hidden, features]))
        self.weights = nn.ParameterList(
            _uniform((after, before), before, generator) for before, after in widths
        )
        self.biases = nn.ParameterList(
            _uniform((after,), before, generator) for before, after in widths
        )
        self.activations = nn.ModuleList(contraction_activation(activation) for _ in hidden)
        self.context = _context_weight(context_features, widths[0][1], generator)
        if zero_last:
            nn.init.zeros_(self.weights[-1])
            nn.init.zeros_(self.biases[-1])

    def prepare(self, context: Tensor | None = None) -> Prepared:
        """The function x ↦ g(x, context), its weights brought under their norms once."""
        bound = self.lipschitz ** (1 / len(self.weights))
        weights = [w * _shrink(operator_norm(w, self.norm), bound) for w in self.weights]
        biases = list(self.biases)
        if self.context is not None:
            biases[0] = biases[0] + linear(_required(context), self.context)
        maps = [functools.partial(linear, weight=weight) for weight in weights]
        return Prepared(maps, biases, self.activations)


class LipschitzConvNet(Contraction):
    """A convolutional network that contracts; of images of one size, which stays.

    Every layer's norm on that size is at most lipschitz^(1/L), see ``convolution_norm``.

    Args:
        event_shape: ``(channels, height, width)``.
        hidden: channels of the hidden layers.
        kernels: odd kernel sizes, one per layer (one more than ``hidden``).
        context_features: length of the context, which moves the first layer's offsets; 0 for none.
        lipschitz: the bound of the whole.
        norm: the vector norm that bounds are induced by: 1, 2 or ``math.inf``.
        activation: a name that ``contraction_activation`` knows.
        zero_last: start with a last layer of zeros.
        generator: where initial weights come from.

    Example:
        >>> import torch
        >>> net = LipschitzConvNet((1, 4, 4), hidden=(8,), kernels=(3, 3))
        >>> net(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([5, 1, 4, 4])
    """

    event_dims = 3

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (64, 64),
        kernels: Sequence[int] = (3, 1, 3),
        context_features: int = 0,
        lipschitz: float = 0.97,
        norm: float = 2.0,
        activation: str = "lipswish",
        zero_last: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        _check_bound(lipschitz, norm)
        if len(kernels) != len(hidden) + 1 or any(k % 2 == 0 for k in kernels):
            raise ValueError(
                f"expected {len(hidden) + 1} odd kernel sizes for {len(hidden)} hidden layers, "
                f"got {tuple(kernels)}"
            )
        channels, height, width = event_shape
        self.lipschitz = lipschitz
        self.norm = norm
        self.size = (height, width)
        layers = list(zip(itertools.pairwise([channels, *hidden, channels]), kernels, strict=True))
        self.weights = nn.ParameterList(
            _uniform((after, before, k, k), before * k * k, generator)
            for (before, after), k in layers
        )
        self.biases = nn.ParameterList(
            _uniform((after, 1, 1), before * k * k, generator) for (before, after), k in layers
        )
        self.activations = nn.ModuleList(contraction_activation(activation) for _ in hidden)
        self.context = _context_weight(context_features, layers[0][0][1], generator)
        if zero_last:
            nn.init.zeros_(self.weights[-1])
            nn.init.zeros_(self.biases[-1])

    def prepare(self, context: Tensor | None = None) -> Prepared:
        """The function x ↦ g(x, context), its weights brought under their norms once."""
        bound = self.lipschitz ** (1 / len(self.weights))
        weights = [
            w * _shrink(convolution_norm(w, self.size, self.norm), bound) for w in self.weights
        ]
        biases = list(self.biases)
        if self.context is not None:
            biases[0] = biases[0] + linear(_required(context), self.context)[..., None, None]
        maps = [functools.partial(_convolve, weight) for weight in weights]
        return Prepared(maps, biases, self.activations)


def _with_slope(activate: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(activate, LipSwish):
        return activate.with_slope(z)
    value, slope, *_ = torch.func.jvp(activate, (z,), (torch.ones_like(z),))
    return value, slope


def _convolve(weight: Tensor, x: Tensor) -> Tensor:
    """The zero-padded convolution of ``(*batch, channels, height, width)``."""
    # conv2d knows one batch axis only
    flat = x.reshape(-1, *x.shape[-3:])
    y = conv2d(flat, weight, padding=weight.shape[-1] // 2)
    return y.reshape(*x.shape[:-3], *y.shape[-3:])


def _shrink(norm: Tensor, bound: float) -> Tensor:
    """The factor, at most 1, that brings a weight of this norm under the bound."""
    return bound / norm.clamp_min(bound)


def _uniform(
    shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None
) -> nn.Parameter:
    reach = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-reach, reach, generator=generator))


def _context_weight(
    context_features: int, width: int, generator: torch.Generator | None
) -> nn.Parameter | None:
    if not context_features:
        return None
    return _uniform((width, context_features), context_features, generator)


def _required(context: Tensor | None) -> Tensor:
    if context is None:
        raise ValueError("this network was built with a context: pass context=")
    return context


def _check_bound(lipschitz: float, norm: float) -> None:
    if not 0 < lipschitz < 1:
        raise ValueError(f"lipschitz must lie in (0, 1) for a contraction, got {lipschitz}")
    if norm not in NORMS:
        raise ValueError(f"norm must be 1, 2 or infinity, got {norm}")
