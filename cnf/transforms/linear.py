"""Linear maps of the last axis, each with a cheap inverse and log-determinant."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.transforms.base import Mapped, Request, Transform


class Linear(Transform):
    """x = W z + b on the last axis; log_det = log |det W| in nats, the same for every sample.

    A subclass says how W multiplies, solves and what its log-determinant is. A context is accepted
    and ignored.

    Args:
        features: the length of the last axis.
        bias: whether there is a trainable b, zero at first.
    """

    def __init__(self, features: int, *, bias: bool = True):
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = features
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    @abstractmethod
    def multiply(self, z: Tensor) -> Tensor:
        """W z for every vector of ``(*batch, features)``."""

    @abstractmethod
    def solve(self, y: Tensor) -> Tensor:
        """W⁻¹ y for every vector of ``(*batch, features)``."""

    @abstractmethod
    def log_abs_det(self) -> Tensor | float:
        """The log-determinant log |det W| in nats, one number."""

    def matrix(self) -> Tensor:
        """W itself, ``(features, features)``, in the dtype of the parameters."""
        like = next(self.parameters(), torch.empty(()))
        eye = torch.eye(self.features, dtype=like.dtype, device=like.device)
        return self.multiply(eye).mT

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x = W z + b."""
        self._check(z)
        x = self.multiply(z)
        if self.bias is not None:
            x = x + self.bias
        return Mapped(x, z.new_zeros(z.shape[:-1]) + self.log_abs_det(), {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z = W⁻¹ (x - b)."""
        self._check(x)
        y = x if self.bias is None else x - self.bias
        return Mapped(self.solve(y), x.new_zeros(x.shape[:-1]) - self.log_abs_det(), {})

    def _check(self, value: Tensor) -> None:
        if value.ndim == 0 or value.shape[-1] != self.features:
            raise ValueError(
                f"{type(self).__name__} expected (*batch, {self.features}), "
                f"got {tuple(value.shape)}"
            )

    def extra_repr(self) -> str:
        """The length of the axis."""
        return f"{self.features}, bias={self.bias is not None}"


class Permutation(Linear):
    """x_i = z_{order[i]}; log_det = 0.

    Args:
        order: which entry of z stands at each place of x.

    Example:
        >>> import torch
        >>> Permutation([2, 0, 1])(torch.tensor([1.0, 2.0, 3.0])).value
        tensor([3., 1., 2.])
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | Tensor):
        order = torch.as_tensor(order)
        if order.ndim != 1 or sorted(order.tolist()) != list(range(order.numel())):
            raise ValueError(f"order must hold each of 0..n-1 exactly once, got {order.tolist()}")
        super().__init__(order.numel(), bias=False)
        self.register_buffer("order", order.long())

    @classmethod
    def reverse(cls, features: int) -> Permutation:
        """The permutation that turns the axis round."""
        return cls(torch.arange(features - 1, -1, -1))

    @classmethod
    def random(cls, features: int, generator: torch.Generator | None = None) -> Permutation:
        """A permutation drawn uniformly."""
        return cls(torch.randperm(features, generator=generator))

    def multiply(self, z: Tensor) -> Tensor:
        """The entries in the given order."""
        return z.index_select(-1, self.order)

    def solve(self, y: Tensor) -> Tensor:
        """The entries back in their places."""
        return y.index_select(-1, self.order.argsort())

    def log_abs_det(self) -> float:
        """Zero."""
        return 0.0


class Diagonal(Linear):
    """x = scale · z + shift with positive scales; log_det = Σ log scale.

    Args:
        features: the length of the last axis.
        scale: initial scale, one number or one per feature; its logarithm is the parameter.
        shift: initial shift, likewise.

    Example:
        >>> import torch
        >>> mapped = Diagonal(2, scale=2.0, shift=1.0)(torch.tensor([1.0, 3.0]))
        >>> mapped.value.tolist(), round(mapped.log_det.item(), 3)
        ([3.0, 7.0], 1.386)
    """

    def __init__(
        self,
        features: int,
        scale: float | Sequence[float] | Tensor = 1.0,
        shift: float | Sequence[float] | Tensor = 0.0,
    ):
        super().__init__(features)
        dtype = torch.get_default_dtype()
        scale = torch.as_tensor(scale, dtype=dtype).expand(features)
        if not bool((scale > 0).all()):
            raise ValueError(f"scales must be positive, got {scale.tolist()}")
        self.log_scale = nn.Parameter(scale.log())
        self.bias = nn.Parameter(torch.as_tensor(shift, dtype=dtype).expand(features).clone())

    def multiply(self, z: Tensor) -> Tensor:
        """Each entry times its scale."""
        return z * self.log_scale.exp()

    def solve(self, y: Tensor) -> Tensor:
        """Each entry over its scale."""
        return y * (-self.log_scale).exp()

    def log_abs_det(self) -> Tensor:
        """The sum of the log-scales."""
        return self.log_scale.sum()


class Triangular(Linear):
    """x = T z + b, T triangular with a positive diagonal; log_det = Σ log T_ii. Starts at T = I.

    Args:
        features: the length of the last axis.
        lower: whether T is lower rather than upper triangular.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> Triangular(3)(torch.ones(3)).value.tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, features: int, *, lower: bool = True, bias: bool = True):
        super().__init__(features, bias=bias)
        self.lower = lower
        self.entries = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))

    def matrix(self) -> Tensor:
        """T."""
        strict = self.entries.tril(-1) if self.lower else self.entries.triu(1)
        return strict + self.log_diagonal.exp().diag()

    def multiply(self, z: Tensor) -> Tensor:
        """T z."""
        return z @ self.matrix().mT

    def solve(self, y: Tensor) -> Tensor:
        """T⁻¹ y by substitution."""
        return _triangular_solve(self.matrix(), y, upper=not self.lower)

    def log_abs_det(self) -> Tensor:
        """The sum of the log-diagonal."""
        return self.log_diagonal.sum()


class LULinear(Linear):
    """x = P L U z + b: a permutation, a unit lower and an upper triangle.

    log_det = Σ log |U_ii|; the size of U's diagonal is ``exp(log_diagonal)`` and its signs are
    fixed, so W never becomes singular. Starts at W = P. From Kingma & Dhariwal, "Glow" (2018).

    Args:
        features: the length of the last axis.
        order: the fixed permutation P as ``Permutation`` takes it; None for the identity.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> W = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> LULinear.from_matrix(W)(torch.tensor([1.0, 3.0])).value.tolist()
        [6.0, 4.0]
    """

    sign: Tensor

    def __init__(
        self, features: int, *, order: Sequence[int] | Tensor | None = None, bias: bool = True
    ):
        super().__init__(features, bias=bias)
        self.permutation = Permutation(torch.arange(features) if order is None else order)
        if self.permutation.features != features:
            raise ValueError(f"order must have {features} entries, has {self.permutation.features}")
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.register_buffer("sign", torch.ones(features))

    @classmethod
    def from_matrix(cls, matrix: Tensor, *, bias: bool = True) -> LULinear:
        """Start at a given invertible W.

        Raises:
            ValueError: if ``matrix`` is not square or is singular.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}")
        P, L, U = torch.linalg.lu(matrix.detach())
        diagonal = U.diagonal()
        if not bool((diagonal != 0).all() and torch.isfinite(U).all()):
            raise ValueError("the matrix is singular or not finite; W must have an inverse")
        linear = cls(len(matrix), order=P.argmax(-1), bias=bias).to(matrix)
        with torch.no_grad():
            linear.lower.copy_(L.tril(-1))
            linear.upper.copy_(U.triu(1))
            linear.log_diagonal.copy_(diagonal.abs().log())
            linear.sign.copy_(diagonal.sign())
        return linear

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        diagonal = self.sign * self.log_diagonal.exp()
        return self.lower.tril(-1) + eye, self.upper.triu(1) + eye * diagonal

    def multiply(self, z: Tensor) -> Tensor:
        """P L U z."""
        L, U = self._factors()
        return self.permutation.multiply(z @ (L @ U).mT)

    def solve(self, y: Tensor) -> Tensor:
        """U⁻¹ L⁻¹ P⁻¹ y by two substitutions."""
        L, U = self._factors()
        y = _triangular_solve(L, self.permutation.solve(y), upper=False)
        return _triangular_solve(U, y, upper=True)

    def log_abs_det(self) -> Tensor:
        """The sum of log |U_ii|."""
        return self.log_diagonal.sum()


class Orthogonal(Linear):
    """x = Q z + b with Qᵀ Q = I; log_det = 0. A subclass says what ``matrix`` is."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Q."""

    def multiply(self, z: Tensor) -> Tensor:
        """Q z."""
        return z @ self.matrix().mT

    def solve(self, y: Tensor) -> Tensor:
        """Qᵀ y."""
        return y @ self.matrix()

    def log_abs_det(self) -> float:
        """Zero."""
        return 0.0


class Rotation(Orthogonal):
    """x = exp(A) z with A skew-symmetric; log_det = 0. Starts at the identity.

    In two dimensions the one parameter is the angle in radians, counter-clockwise; in more, there
    is one per plane of two axes, and together they reach every rotation.

    Args:
        features: the length of the last axis.
        angles: initial values, one number or ``features (features - 1) / 2``, by rows of A's lower
            triangle.

    Example:
        >>> import math, torch
        >>> Rotation(2, math.pi / 2)(torch.tensor([1.0, 0.0])).value.round().tolist()
        [0.0, 1.0]
    """

    def __init__(self, features: int, angles: float | Sequence[float] | Tensor = 0.0):
        super().__init__(features, bias=False)
        planes = features * (features - 1) // 2
        initial = torch.as_tensor(angles, dtype=torch.get_default_dtype())
        if initial.ndim > 1 or (initial.ndim == 1 and len(initial) != planes):
            raise ValueError(
                f"a rotation of {features} features has {planes} angles, got {initial.numel()}"
            )
        self.angles = nn.Parameter(initial.expand(planes).clone())

    def matrix(self) -> Tensor:
        """exp(A)."""
        rows, columns = torch.tril_indices(
            self.features, self.features, -1, device=self.angles.device
        )
        A = self.angles.new_zeros(self.features, self.features)
        A = A.index_put((rows, columns), self.angles)
        return torch.linalg.matrix_exp(A - A.mT)


class HouseholderLinear(Orthogonal):
    """x = Q z + b with Q = H₁ ⋯ H_K, H_k = I - 2 v_k v_kᵀ / |v_k|²; log_det = 0.

    The vectors start in equal pairs, so Q starts as the identity; with ``features`` of them (or
    more) Q reaches every orthogonal matrix of its determinant's sign, which is (-1)^K.
    From Tomczak & Welling, "Improving Variational Auto-Encoders using Householder Flow" (2016).

    Args:
        features: the length of the last axis.
        reflections: K; None for the even number next to ``features``.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> HouseholderLinear(3)(torch.ones(3)).value.tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, features: int, *, reflections: int | None = None, bias: bool = True):
        super().__init__(features, bias=bias)
        self.vectors = _paired_vectors(features, reflections)

    def matrix(self) -> Tensor:
        """Q."""
        return householder(self.vectors)


class QRLinear(Linear):
    """x = Q R z + b: Householder reflections times an upper triangle with a positive diagonal.

    log_det = Σ log R_ii. Starts at the identity. From Hoogeboom et al., "Emerging Convolutions"
    (2019).

    Args:
        features: the length of the last axis.
        reflections: how many reflections make Q; None for the even number next to ``features``.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> QRLinear(3)(torch.ones(3)).log_det.item()
        0.0
    """

    def __init__(self, features: int, *, reflections: int | None = None, bias: bool = True):
        super().__init__(features, bias=bias)
        self.vectors = _paired_vectors(features, reflections)
        self.triangle = Triangular(features, lower=False, bias=False)

    def multiply(self, z: Tensor) -> Tensor:
        """Q R z."""
        return self.triangle.multiply(z) @ householder(self.vectors).mT

    def solve(self, y: Tensor) -> Tensor:
        """R⁻¹ Qᵀ y."""
        return self.triangle.solve(y @ householder(self.vectors))

    def log_abs_det(self) -> Tensor:
        """The sum of the log-diagonal of R."""
        return self.triangle.log_abs_det()


class SVDLinear(Linear):
    """x = Q₁ diag(s) Q₂ z + b, Q₁ and Q₂ products of reflections; log_det = Σ log s_i.

    Starts at the identity.

    Args:
        features: the length of the last axis.
        reflections: how many make each Q; None for the even number next to ``features``.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> SVDLinear(3)(torch.ones(3)).log_det.item()
        0.0
    """

    def __init__(self, features: int, *, reflections: int | None = None, bias: bool = True):
        super().__init__(features, bias=bias)
        self.left = _paired_vectors(features, reflections)
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.right = _paired_vectors(features, reflections)

    def multiply(self, z: Tensor) -> Tensor:
        """Q₁ diag(s) Q₂ z."""
        inner = (z @ householder(self.right).mT) * self.log_scale.exp()
        return inner @ householder(self.left).mT

    def solve(self, y: Tensor) -> Tensor:
        """Q₂ᵀ diag(1/s) Q₁ᵀ y."""
        inner = (y @ householder(self.left)) * (-self.log_scale).exp()
        return inner @ householder(self.right)

    def log_abs_det(self) -> Tensor:
        """The sum of the log-scales."""
        return self.log_scale.sum()


class MatrixExponential(Linear):
    """x = exp(A) z + b with any A; log_det = tr A. Starts at the identity.

    From Xiao & Liu, "Generative Flows with Matrix Exponential" (2020).

    Args:
        features: the length of the last axis.
        bias: whether there is a trainable b.

    Example:
        >>> import torch
        >>> MatrixExponential(2)(torch.ones(2)).value.tolist()
        [1.0, 1.0]
    """

    def __init__(self, features: int, *, bias: bool = True):
        super().__init__(features, bias=bias)
        self.generator_matrix = nn.Parameter(torch.zeros(features, features))

    def multiply(self, z: Tensor) -> Tensor:
        """exp(A) z."""
        return z @ torch.linalg.matrix_exp(self.generator_matrix).mT

    def solve(self, y: Tensor) -> Tensor:
        """exp(-A) y."""
        return y @ torch.linalg.matrix_exp(-self.generator_matrix).mT

    def log_abs_det(self) -> Tensor:
        """The trace of A."""
        return self.generator_matrix.trace()


def householder(vectors: Tensor) -> Tensor:
    """The product H₁ ⋯ H_K of reflections H_k = I - 2 v_k v_kᵀ / |v_k|².

    Computed at once as I - Vᵀ S⁻¹ V with S = triu(V Vᵀ) whose diagonal is halved.

    Args:
        vectors: V, the v_k as rows, ``(*batch, K, n)``; none of them zero.

    Returns:
        The orthogonal matrix, ``(*batch, n, n)``.
    """
    V = nn.functional.normalize(vectors, dim=-1)
    gram = V @ V.mT
    half = 0.5 * torch.eye(V.shape[-2], dtype=V.dtype, device=V.device)
    eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    return eye - V.mT @ torch.linalg.solve_triangular(gram.triu(1) + half, V, upper=True)


def _paired_vectors(features: int, reflections: int | None) -> nn.Parameter:
    """Unit vectors along the axes in equal pairs, whose reflections cancel."""
    count = 2 * math.ceil(features / 2) if reflections is None else reflections
    if count < 1:
        raise ValueError(f"reflections must be at least 1, got {reflections}")
    axes = (torch.arange(count) // 2) % features
    return nn.Parameter(nn.functional.one_hot(axes, features).to(torch.get_default_dtype()))


def _triangular_solve(matrix: Tensor, y: Tensor, *, upper: bool) -> Tensor:
    """matrix⁻¹ y for every vector of ``(*batch, n)``, also when there is none."""
    # x Mᵀ = y as one system with the samples as rows
    rows = y.reshape(-1, y.shape[-1])
    solved = torch.linalg.solve_triangular(matrix.mT, rows, upper=not upper, left=False)
    return solved.reshape(y.shape)
