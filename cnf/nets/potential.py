"""OT-Flow's field: the gradient of a potential, with the trace of its Hessian in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnf.nets.fields import Field


class PotentialField(Field):
    """v(t, x) = -∇Φ(x, t) for Φ = wᵀN(s) + ½ ‖A s‖² + bᵀs + c with s = [x, t, context].

    N is a residual net, N₀ = φ(K₀ s + b₀), Nᵢ = Nᵢ₋₁ + h φ(Kᵢ Nᵢ₋₁ + bᵢ), h = 1/(layers - 1), with
    φ(h) = log(eʰ + e⁻ʰ), the integral of tanh. Gradient and trace are written out: one pass through
    the net and one back, no automatic differentiation.

    Args:
        features: D, the size of x and of the velocity.
        width: the size of the net's layers.
        layers: how many there are, the opening one counted; at least 2.
        rank: rows of A; no more than s has entries.
        context_features: size of the context, 0 for none.

    Paper: Onken et al., "OT-Flow: Fast and accurate continuous normalizing flows via optimal
    transport", AAAI 2021.

    Example:
        >>> import torch
        >>> field = PotentialField(2, 16)
        >>> velocity, divergence = field.trace(torch.tensor(0.5), torch.zeros(7, 2), None)
        >>> velocity.shape, divergence.shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    def __init__(
        self,
        features: int,
        width: int = 32,
        layers: int = 2,
        *,
        rank: int = 10,
        context_features: int = 0,
    ):
        super().__init__()
        if layers < 2:
            raise ValueError(f"the potential's net needs at least 2 layers, got {layers}")
        inputs = features + 1 + context_features
        self.features, self.step = features, 1 / (layers - 1)
        self.opening = nn.Linear(inputs, width)
        inner = [nn.Linear(width, width) for _ in range(layers - 1)]
        self.weights = nn.ParameterList([layer.weight for layer in inner])
        self.biases = nn.ParameterList([layer.bias for layer in inner])
        self.weight = nn.Parameter(torch.ones(width))
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(min(rank, inputs), inputs)))
        self.affine = nn.Linear(inputs, 1)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def potential(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Φ, ``(*batch,)``."""
        s = self._joined(t, x, context)
        u = self._through(s)[0]
        quadratic = 0.5 * nn.functional.linear(s, self.A).square().sum(-1)
        return u @ self.weight + quadratic + self.affine(s).squeeze(-1)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity -∇Φ at ``(*batch, features)``; ``t`` is a scalar or ``(*batch,)``."""
        s = self._joined(t, x, context)
        _, slopes = self._through(s)
        return self._velocity(s, self._pulled_back(slopes)[0] * slopes[0])

    def trace(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The velocity and its divergence -tr ∇²Φ."""
        s = self._joined(t, x, context)
        _, slopes = self._through(s)
        pulled = self._pulled_back(slopes)
        opening = self.opening.weight[:, : self.features]
        curvatures = (1 - slopes[0].square()) * pulled[0]
        trace = curvatures @ opening.square().sum(-1) + self.A[:, : self.features].square().sum()
        # the columns of ∂N/∂x, (D, *batch, width)
        ahead = opening.T.reshape(self.features, *[1] * (s.dim() - 1), -1)
        columns = slopes[0] * ahead
        for weight, slope, gradient in zip(self.weights, slopes[1:], pulled[1:], strict=True):
            images = nn.functional.linear(columns, weight)
            curvatures = (1 - slope.square()) * gradient
            trace = trace + self.step * (curvatures * images.square().sum(0)).sum(-1)
            if gradient is not pulled[-1]:  # the last layer's columns are nobody's input
                columns = columns + self.step * slope * images
        return self._velocity(s, pulled[0] * slopes[0]), -trace

    def _joined(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        time = t.expand(x.shape[:-1]).unsqueeze(-1)
        return torch.cat([x, time] if context is None else [x, time, context], -1)

    def _through(self, s: Tensor) -> tuple[Tensor, list[Tensor]]:
        """N(s), and φ′ of every layer."""
        before = self.opening(s)
        u, slopes = log_two_cosh(before), [torch.tanh(before)]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            before = nn.functional.linear(u, weight, bias)
            u = u + self.step * log_two_cosh(before)
            slopes.append(torch.tanh(before))
        return u, slopes

    def _pulled_back(self, slopes: list[Tensor]) -> list[Tensor]:
        """The gradient of wᵀN with respect to what each layer adds to, first layer first."""
        gradient = self.weight.expand(slopes[0].shape)
        pulled = [gradient]
        for weight, slope in zip(reversed([*self.weights]), reversed(slopes[1:]), strict=True):
            gradient = gradient + self.step * ((slope * gradient) @ weight)
            pulled.insert(0, gradient)
        return pulled

    def _velocity(self, s: Tensor, gradient: Tensor) -> Tensor:
        """-∇Φ from the gradient of wᵀN with respect to what enters the opening layer's φ."""
        A = self.A[:, : self.features]
        slope = gradient @ self.opening.weight[:, : self.features]
        slope = slope + nn.functional.linear(s, self.A) @ A
        return -(slope + self.affine.weight[0, : self.features])

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"features={self.features}, rank={len(self.A)}"


def log_two_cosh(h: Tensor) -> Tensor:
    """log(eʰ + e⁻ʰ), without overflow and smooth at zero."""
    return -nn.functional.logsigmoid(-2 * h) - h  # torch's softplus is cut off at 20
