"""FFJORD's method, plainly: what every continuous flow here is compared with.

torchdiffeq's adjoint around a divergence by reverse-mode differentiation, one pass per dimension or
one with a probe, over a stack of layers (W x + b) ⊙ σ(g t + c) + h t. The layers are written out
one by one, and take over the numbers of a ``cnf.nets.TimeMLP`` so that values can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from cnf.nets import TimeMLP

NAMES = ["bias", "gate_slope", "gate_bias", "shift_slope"]
"""What a ``TimeMLP`` calls its vectors, which hold the layers' numbers end to end."""


class Layer(nn.Module):
    """(W x + b) ⊙ σ(g t + c) + h t."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(1, 1)
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class Net(nn.Module):
    """Tanh between layers; counts its calls."""

    def __init__(self, features: int, hidden: Sequence[int]):
        super().__init__()
        sizes = (features, *hidden, features)
        self.layers = nn.ModuleList([Layer(*pair) for pair in pairwise(sizes)])
        self.calls = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        *inner, last = self.layers
        for layer in inner:
            x = torch.tanh(layer(t, x))
        return last(t, x)

    def calls_of(self, function: Callable[[], object]) -> int:
        """How often a function calls the net."""
        before = self.calls
        function()
        return self.calls - before

    @torch.no_grad()
    def take(self, field: TimeMLP) -> Net:
        """Take over a field's numbers."""
        theirs = dict(field.layers.named_parameters())
        for name, parts in self.named().items():
            sizes = [part.numel() for part in parts]
            for part, values in zip(parts, theirs[name].flatten().split(sizes), strict=True):
                part.copy_(values.reshape(part.shape))
        return self

    def named(self) -> dict[str, list[nn.Parameter]]:
        """The parameters under the names that ``TimeMLP`` has for them end to end."""
        layers = list(self.layers)
        vectors = [
            [layer.linear.bias for layer in layers],
            [layer.gate.weight for layer in layers],
            [layer.gate.bias for layer in layers],
            [layer.shift.weight for layer in layers],
        ]
        return {
            **dict(zip(NAMES, vectors, strict=True)),
            **{f"weights.{i}": [layer.linear.weight] for i, layer in enumerate(layers)},
        }

    def gradient(self) -> Tensor:
        """What ``backward`` left, as one vector in the order of ``named``."""
        parts = [part for parts in self.named().values() for part in parts]
        return torch.cat([part.grad.flatten() for part in parts if part.grad is not None])


class FFJORD(nn.Module):
    """A continuous flow from t = 0 (base) to t = 1 (data), as FFJORD's code computes it.

    Args:
        features: D.
        hidden: sizes of the hidden layers.
        tolerance: rtol and atol, also of the adjoint.
        end_time: None, or where a trainable end time starts, as in FFJORD's scripts.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        tolerance: float = 1e-5,
        end_time: float | None = None,
    ):
        super().__init__()
        self.features = features
        self.net = Net(features, hidden)
        self.tolerance = tolerance
        self.root_time = None
        if end_time is not None:
            self.root_time = nn.Parameter(torch.tensor(math.sqrt(end_time)))

    def log_prob(self, x: Tensor, probe: Tensor | None = None) -> Tensor:
        """The log-density; its trace is exact, or estimated with a probe."""
        state = (x, x.new_zeros(len(x)))
        training = torch.is_grad_enabled()

        def rhs(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = state[0].requires_grad_()
                velocity = self.net(t.requires_grad_(), x)
                divergence = trace(velocity, x, probe)
            return velocity, divergence

        z, change = self._solve(_Module(rhs, self), state, reverse=True, adjoint=training)
        normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
        return normal + change  # backwards in time, the trace's integral is log |det dz/dx|

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Samples."""
        return self.decode(torch.randn(n, self.features))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The data of latent z."""
        rhs = _Module(lambda t, state: (self.net(t, state[0]),), self)
        return self._solve(rhs, (z,), reverse=False, adjoint=False)[0]

    def _solve(
        self, rhs: nn.Module, state: tuple[Tensor, ...], *, reverse: bool, adjoint: bool
    ) -> tuple[Tensor, ...]:
        times = state[0].new_tensor([0.0, 1.0])
        if self.root_time is not None:
            times = torch.stack([torch.zeros_like(self.root_time), self.root_time.square()])
        if reverse:
            times = times.flip(0)
        solve = odeint_adjoint if adjoint else odeint
        found = solve(rhs, state, times, rtol=self.tolerance, atol=self.tolerance, method="dopri5")
        return tuple(part[-1] for part in found)


class _Module(nn.Module):
    """A right-hand side with the parameters that the adjoint is to find."""

    def __init__(self, rhs: Callable[..., tuple[Tensor, ...]], owner: nn.Module):
        super().__init__()
        self.rhs = rhs
        self.net = owner.net

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.rhs(t, state)


def trace(velocity: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """tr ∂v/∂x by reverse mode: a pass per dimension, or εᵀJε."""
    if probe is not None:
        (product,) = torch.autograd.grad(velocity, x, probe, create_graph=True)
        return (product * probe).sum(-1)
    total = x.new_zeros(len(x))
    for i in range(x.shape[-1]):
        (row,) = torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)
        total = total + row[:, i]
    return total


def gradient(field: TimeMLP) -> Tensor:
    """What ``backward`` left in a field of ours, in the same order."""
    parameters = dict(field.layers.named_parameters())
    parts = [parameters[name].grad for name in NAMES + weight_names(field)]
    return torch.cat([part.flatten() for part in parts if part is not None])


def weight_names(field: TimeMLP) -> list[str]:
    """What the field calls its matrices."""
    return [f"weights.{i}" for i in range(len(field.layers.weights))]
