"""Planar, radial and Sylvester flows: bumps along a few directions, invertible both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, softplus

from cnf.bijections import invert
from cnf.distributions.base import conditioned
from cnf.transforms.base import Mapped, Request, Transform
from cnf.transforms.linear import householder

# keeps a Sylvester layer's diagonal products away from -1, where the map would turn singular
_DIAGONAL_BOUND = 0.999


class Planar(Transform):
    """x = z + û tanh(wᵀz + b); log_det = log |1 + ûᵀw (1 - tanh²(wᵀz + b))| in nats.

    û = u + (m(wᵀu) - wᵀu) w / |w|² with m(a) = softplus(a) - 1 > -1 keeps the map invertible. The
    inverse is one increasing scalar equation along w, solved to ``cnf.bijections.tolerance_of``,
    with gradients. Starts as the identity. From Rezende & Mohamed, "Variational Inference with
    Normalizing Flows" (2015).

    Args:
        features: the length of the event.
        conditioner: a module from context to ``Planar.outputs(features)`` numbers per sample, which
            are added to u, w and b in this order; None for none.
        constrain: False leaves u as it is: ``forward`` then is the bare formula, and ``inverse``
            raises where wᵀu ≤ -1.
        generator: where the initial w comes from.

    Example:
        >>> import torch
        >>> planar = Planar(2, constrain=False)
        >>> _ = planar.load_state_dict(
        ...     {"u": torch.tensor([1.0, 0.0]), "w": torch.tensor([1.0, 2.0]), "b": torch.zeros(())}
        ... )
        >>> round(planar(torch.tensor([0.5, -0.5])).log_det.item(), 3)
        0.58
    """

    def __init__(
        self,
        features: int,
        *,
        conditioner: nn.Module | None = None,
        constrain: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.features = features
        self.bijective = constrain
        self.constrain = constrain
        self.conditioner = conditioner
        w = normalize(torch.randn(features, generator=generator), dim=-1)
        self.w = nn.Parameter(w)
        # m is zero here, so û is
        self.u = nn.Parameter(math.log(math.e - 1) * w if constrain else torch.zeros(features))
        self.b = nn.Parameter(torch.zeros(()))

    @staticmethod
    def outputs(features: int) -> int:
        """How many numbers per sample a conditioner gives."""
        return 2 * features + 1

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x by the formula."""
        _check(z, self.features)
        u, w, b, room = self._terms(context)
        h = torch.tanh((w * z).sum(-1) + b)
        return Mapped(z + u * h.unsqueeze(-1), _log_slope(h, room), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z by solving t + wᵀû tanh(t + b) = wᵀx for t = wᵀz.

        Raises:
            ValueError: if the map is unconstrained and has no inverse.
        """
        _check(x, self.features)
        u, w, b, room = self._terms(context)
        if not self.constrain and bool((room <= 0).any()):
            raise ValueError(
                "this planar map folds space (wᵀu ≤ -1) and has no inverse; build it with "
                "constrain=True"
            )
        t, minus = _solve_ridge((w * x).sum(-1), room - 1, torch.ones_like(room), b, room)
        return Mapped(x - u * torch.tanh(t + b).unsqueeze(-1), minus, {})

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """û, w, b and 1 + wᵀû, the least slope along w."""
        u, w, b = conditioned([self.u, self.w, self.b], self.conditioner, context)
        dot = (w * u).sum(-1)
        if not self.constrain:
            return u, w, b, 1 + dot
        room = softplus(dot)
        norm = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        return u + ((room - 1 - dot) / norm).unsqueeze(-1) * w, w, b, room

    def extra_repr(self) -> str:
        """The length of the event."""
        return f"{self.features}, constrain={self.constrain}"


class Radial(Transform):
    """x = z + β (z - c) / (α + r) with r = |z - c|: space expands or contracts around a centre.

    log_det = (n - 1) log((γ + r) / (α + r)) + log((r² + 2αr + αγ) / (α + r)²) in nats, with
    γ = α + β. α and γ are softpluses, so the map is always invertible; the inverse is the positive
    root of a quadratic in r, in closed form. Starts as the identity. From Rezende & Mohamed,
    "Variational Inference with Normalizing Flows" (2015).

    Args:
        features: n, the length of the event.
        conditioner: a module from context to ``Radial.outputs(features)`` numbers per sample, which
            are added to the centre and to the raw α and γ; None for none.
        generator: where the initial centre comes from.

    Example:
        >>> import torch
        >>> Radial(2)(torch.ones(2)).value.tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        features: int,
        *,
        conditioner: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.features = features
        self.conditioner = conditioner
        self.centre = nn.Parameter(torch.randn(features, generator=generator))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(torch.zeros(()))

    @staticmethod
    def outputs(features: int) -> int:
        """How many numbers per sample a conditioner gives."""
        return features + 2

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x by the formula."""
        _check(z, self.features)
        centre, alpha, gamma = self._terms(context)
        r = torch.linalg.vector_norm(z - centre, dim=-1)
        stretch = ((gamma - alpha) / (alpha + r)).unsqueeze(-1)
        return Mapped(z + stretch * (z - centre), self._log_det(r, alpha, gamma), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z: with R = |x - c|, r solves r² + (γ - R) r = αR."""
        _check(x, self.features)
        centre, alpha, gamma = self._terms(context)
        R = torch.linalg.vector_norm(x - centre, dim=-1)
        half = (gamma - R) / 2
        root = (half.square() + alpha * R).sqrt()
        # the root's two forms, each where it does not cancel
        r = torch.where(half > 0, alpha * R / (root + half.abs()), root + half.abs())
        shrink = ((gamma - alpha) / (gamma + r)).unsqueeze(-1)
        return Mapped(x - shrink * (x - centre), -self._log_det(r, alpha, gamma), {})

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        own = [self.centre, self.alpha, self.gamma]
        centre, alpha, gamma = conditioned(own, self.conditioner, context)
        return centre, softplus(alpha), softplus(gamma)

    def _log_det(self, r: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
        sideways = ((gamma + r) / (alpha + r)).log()
        outwards = ((r * (r + 2 * alpha) + alpha * gamma) / (alpha + r).square()).log()
        return (self.features - 1) * sideways + outwards

    def extra_repr(self) -> str:
        """The length of the event."""
        return f"{self.features}"


class Sylvester(Transform):
    """x = z + Q R tanh(R̃ Qᵀz + b): M planar flows at once, along M orthonormal directions.

    Q holds M columns of a product of Householder reflections; R and R̃ are upper triangles whose
    diagonals r, r̃ lie in (-1, 1), so r r̃ > -1 and the map is invertible.
    log_det = Σ log(1 + r_i r̃_i tanh'(·)_i) in nats. The inverse solves M increasing scalar
    equations from the last to the first, to ``cnf.bijections.tolerance_of``, with gradients. Starts
    as the identity. From van den Berg et al., "Sylvester Normalizing Flows" (2018).

    Args:
        features: n, the length of the event.
        hidden: M, at most n; None for n.
        reflections: how many reflections make Q; None for M.
        conditioner: a module from context to ``Sylvester.outputs(features, hidden, reflections)``
            numbers per sample, which are added to the parameters; None for none.
        generator: where the initial directions and offsets come from.

    Example:
        >>> import torch
        >>> Sylvester(3, 2)(torch.ones(3)).value.tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        reflections: int | None = None,
        conditioner: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        M = features if hidden is None else hidden
        if not 1 <= M <= features:
            raise ValueError(f"hidden must lie between 1 and features = {features}, got {M}")
        self.features = features
        self.hidden = M
        self.conditioner = conditioner
        K = M if reflections is None else reflections
        self.vectors = nn.Parameter(torch.randn(K, features, generator=generator))
        self.outer = nn.Parameter(torch.zeros(M, M))
        self.inner = nn.Parameter(torch.eye(M))
        self.b = nn.Parameter(torch.randn(M, generator=generator))

    @staticmethod
    def outputs(features: int, hidden: int | None = None, reflections: int | None = None) -> int:
        """How many numbers per sample a conditioner gives."""
        M = features if hidden is None else hidden
        return (M if reflections is None else reflections) * features + 2 * M * M + M

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x by the formula."""
        _check(z, self.features)
        Q, R, inner, b, room = self._terms(context)
        h = torch.tanh(_times(inner, _times(Q.mT, z)) + b)
        return Mapped(z + _times(Q, _times(R, h)), _log_slope(h, room).sum(-1), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z by back substitution: each step is one scalar equation."""
        _check(x, self.features)
        Q, R, inner, b, room = self._terms(context)
        y = _times(Q.mT, x)
        a, h = torch.zeros_like(y), torch.zeros_like(y)
        log_det = x.new_zeros(x.shape[:-1])
        for i in reversed(range(self.hidden)):
            # entries after i are known, the others still zero
            target = y[..., i] - (R[..., i, :] * h).sum(-1)
            offset = b[..., i] + (inner[..., i, :] * a).sum(-1)
            outer_i, inner_i = R[..., i, i], inner[..., i, i]
            t, minus = _solve_ridge(target, outer_i, inner_i, offset, room[..., i])
            place = one_hot(torch.tensor(i, device=x.device), self.hidden).to(x.dtype)
            a = a + t.unsqueeze(-1) * place
            h = h + torch.tanh(inner_i * t + offset).unsqueeze(-1) * place
            log_det = log_det + minus
        return Mapped(x - _times(Q, _times(R, h)), log_det, {})

    def _terms(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q, R, R̃, b and 1 + r r̃."""
        own = [self.vectors, self.outer, self.inner, self.b]
        vectors, outer, inner, b = conditioned(own, self.conditioner, context)
        R, inner = _bounded_triangle(outer), _bounded_triangle(inner)
        room = 1 + R.diagonal(dim1=-2, dim2=-1) * inner.diagonal(dim1=-2, dim2=-1)
        return householder(vectors)[..., : self.hidden], R, inner, b, room

    def extra_repr(self) -> str:
        """The length of the event and the number of directions."""
        return f"{self.features}, hidden={self.hidden}"


def _solve_ridge(
    target: Tensor, outer: Tensor, inner: Tensor, offset: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """The t with t + outer tanh(inner t + offset) = target, and log |dt/dtarget|."""

    def ridge(t: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(inner * t + offset)
        return t + outer * h, _log_slope(h, room)

    reach = outer.abs()
    return invert(ridge, target, lower=target - reach, upper=target + reach)


def _log_slope(h: Tensor, room: Tensor) -> Tensor:
    """The number log |1 + p (1 - h²)| from room = 1 + p, without cancellation for p near -1."""
    square = h.square()
    return (square + (1 - square) * room).abs().log()


def _bounded_triangle(raw: Tensor) -> Tensor:
    """The upper triangle with its diagonal squashed into (-1, 1)."""
    diagonal = _DIAGONAL_BOUND * torch.tanh(raw.diagonal(dim1=-2, dim2=-1))
    return raw.triu(1) + torch.diag_embed(diagonal)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, each with any batch axes."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _check(value: Tensor, features: int) -> None:
    if value.ndim == 0 or value.shape[-1] != features:
        raise ValueError(f"expected (*batch, {features}), got {tuple(value.shape)}")
