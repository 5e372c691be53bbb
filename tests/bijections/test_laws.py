"""Every law for every scalar map, in both directions."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from cnf.bijections import (
    Additive,
    Affine,
    Bernstein,
    CubicSpline,
    Exp,
    FixedAffine,
    Inverted,
    LeakyReLU,
    LinearSpline,
    LogisticMixture,
    Logit,
    NeuralAutoregressive,
    Power,
    QuadraticSpline,
    RationalQuadratic,
    ScalarMap,
    Sigmoid,
    Softplus,
    SumOfSquares,
    Tanh,
    UnconstrainedMonotone,
    rational_quadratic,
)
from cnf.registry import decode, encode

TAILS = ("linear", "interval", "circular")
RATIONAL: list[ScalarMap] = [
    *(RationalQuadratic(bins=5, bound=3.0, tails=tails) for tails in TAILS),
    RationalQuadratic(bins=5, bound=3.0, form="nflows"),
    RationalQuadratic(bins=5, bound=3.0, form="zuko"),
    RationalQuadratic(bins=5, bound=3.0, min_width=1e-2),
]
SPLINES: list[ScalarMap] = [
    *RATIONAL,
    *(LinearSpline(bins=5, bound=3.0, tails=tails) for tails in TAILS),
    *(QuadraticSpline(bins=5, bound=3.0, tails=tails) for tails in TAILS),
]
CUBIC: list[ScalarMap] = [CubicSpline(bins=5, bound=3.0, tails=tails) for tails in TAILS]
NUMERIC: list[ScalarMap] = [
    *CUBIC,
    LogisticMixture(components=4),
    LogisticMixture(components=1),
    NeuralAutoregressive(units=4, layers=2),
    Bernstein(degree=6),
    SumOfSquares(polynomials=2, degree=3),
    UnconstrainedMonotone(units=4),
    Inverted(Bernstein(degree=3)),
]
AFFINE: list[ScalarMap] = [
    Additive(),
    Affine(),
    Affine(bound=2.0),
    Affine(bound=math.log(1e3), scale="softclip"),
    Affine(scale="sigmoid"),
    Affine(scale="softplus"),
]
FIXED: list[ScalarMap] = [
    FixedAffine(1.0, 2.0),
    LeakyReLU(0.1),
    Sigmoid(),
    Sigmoid(0.05),
    Logit(),
    Logit(0.05),
    Softplus(),
    Exp(),
    Tanh(),
    Power(3.0),
    Power(0.5),
]
ALL = [*AFFINE, *SPLINES, *NUMERIC, *FIXED]
DIRECTIONS = ("forward", "inverse")

every = pytest.mark.parametrize("scalar_map", ALL, ids=str)
both = pytest.mark.parametrize("direction", DIRECTIONS)


def draw(interval: tuple[float, float], n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random places in an interval, some outside ±3 where it is the whole line."""
    lower, upper = interval
    generator = torch.Generator().manual_seed(seed)
    if math.isinf(lower) and math.isinf(upper):
        return 2.5 * torch.randn(n, generator=generator, dtype=dtype)
    share = 0.02 + 0.96 * torch.rand(n, generator=generator, dtype=dtype)
    return lower + min(upper - lower, 4.0) * share


def numbers(scalar_map: ScalarMap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random parameters."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, scalar_map.size, generator=generator, dtype=dtype)


def start(scalar_map: ScalarMap, direction: str, n: int, dtype: torch.dtype) -> Tensor:
    """Places to map in the direction."""
    interval = scalar_map.domain if direction == "forward" else scalar_map.codomain
    return draw(interval, n, dtype)


@every
@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_round_trip(scalar_map, direction, dtype, tolerance):
    value = start(scalar_map, direction, 300, dtype)
    parameters = numbers(scalar_map, (300,), dtype)
    there, log_there = getattr(scalar_map, direction)(value, parameters)
    other = DIRECTIONS[direction == "forward"]
    back, log_back = getattr(scalar_map, other)(there, parameters)
    assert there.dtype == log_there.dtype == dtype
    # rounding in the middle is magnified by the slope of the way back
    scale = 1 + value.abs() + there.abs() * torch.exp(log_back)
    assert ((back - value).abs() / scale).max() < tolerance / 10
    bound = tolerance * (1 + torch.exp(log_back) + torch.exp(log_there))
    assert ((log_there + log_back).abs() / bound).max() < 1


@pytest.mark.parametrize("scalar_map", FIXED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_forward_returns_is_inside(scalar_map, dtype):
    if scalar_map.domain != (-math.inf, math.inf):
        scale = torch.finfo(dtype).max if math.isinf(scalar_map.domain[1]) else 1.0
        value = scale * torch.tensor([0.01, 0.5, 0.99], dtype=dtype)
    else:
        value = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], dtype=dtype)
    x, _ = scalar_map.forward(value)
    lower, upper = scalar_map.codomain
    assert ((x > lower) & (x < upper)).all()
    assert scalar_map.inverse(x)[1].isfinite().all()


@every
def test_closed_forms_return_to_the_last_digits(scalar_map):
    if scalar_map in NUMERIC:
        pytest.skip("numeric inverse")
    value = start(scalar_map, "forward", 300, torch.float64)
    parameters = numbers(scalar_map, (300,), torch.float64) / 2
    there, _ = scalar_map.forward(value, parameters)
    back, log_back = scalar_map.inverse(there, parameters)
    assert ((back - value).abs() / (1 + torch.exp(log_back))).max() < 1e-13


@every
@both
def test_log_derivative_is_the_derivative(scalar_map, direction):
    value = start(scalar_map, direction, 200, torch.float64).requires_grad_()
    parameters = numbers(scalar_map, (200,), torch.float64)
    mapped, log_derivative = getattr(scalar_map, direction)(value, parameters)
    inside = log_derivative.isfinite()
    assert inside.any()
    (slope,) = torch.autograd.grad(mapped.sum(), value)
    torch.testing.assert_close(slope.log()[inside], log_derivative[inside], rtol=0, atol=2e-9)


@every
@both
def test_gradients(scalar_map, direction):
    value = start(scalar_map, direction, 6, torch.float64).requires_grad_()
    parameters = numbers(scalar_map, (6,), torch.float64).requires_grad_(scalar_map.size > 0)

    def finite(value, parameters):
        mapped, log_derivative = getattr(scalar_map, direction)(value, parameters)
        return mapped, torch.where(log_derivative.isfinite(), log_derivative, 0.0)

    assert torch.autograd.gradcheck(finite, (value, parameters), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    "scalar_map",
    [Affine(2.0), SPLINES[0], SPLINES[8], CUBIC[0], *NUMERIC[3:9]],
    ids=str,
)
@both
def test_second_derivatives(scalar_map, direction):
    value = start(scalar_map, direction, 3, torch.float64).requires_grad_()
    parameters = numbers(scalar_map, (3,), torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        getattr(scalar_map, direction), (value, parameters), atol=1e-4, rtol=1e-3, fast_mode=True
    )


@every
@both
def test_increasing(scalar_map, direction):
    value = start(scalar_map, direction, 400, torch.float64).sort().values
    mapped, log_derivative = getattr(scalar_map, direction)(
        value, numbers(scalar_map, (1,), torch.float64)
    )
    inside = log_derivative.isfinite()
    assert (mapped[inside].diff() > 0).all()


@every
@both
def test_shapes(scalar_map, direction):
    for shape in [(), (0,), (0, 3), (5,), (2, 1, 3)]:
        value = start(scalar_map, direction, math.prod(shape), torch.float32).reshape(shape)
        parameters = numbers(scalar_map, shape, torch.float32)
        mapped, log_derivative = getattr(scalar_map, direction)(value, parameters)
        assert mapped.shape == log_derivative.shape == shape


@every
@both
def test_parameters_broadcast(scalar_map, direction):
    value = start(scalar_map, direction, 12, torch.float64).reshape(4, 3)
    parameters = numbers(scalar_map, (3,), torch.float64)
    shared = getattr(scalar_map, direction)(value, parameters)
    expanded = getattr(scalar_map, direction)(value, parameters.expand(4, 3, -1))
    for one, other in zip(shared, expanded, strict=True):
        torch.testing.assert_close(one, other)


@every
@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_inputs_and_parameters_are_finite(scalar_map, direction, dtype):
    value = torch.tensor([-1e4, -1.0, 0.0, 1e-30, 1.0, 3.0, 1e4], dtype=dtype)
    for size in (0.0, 1.0, 10.0):
        parameters = size * numbers(scalar_map, (7,), dtype)
        point = value.clone().requires_grad_()
        parameters.requires_grad_(scalar_map.size > 0)
        mapped, log_derivative = getattr(scalar_map, direction)(point, parameters)
        if isinstance(scalar_map, Exp) and direction == "forward":
            assert not mapped.isnan().any()  # exp(10⁴) is infinite in any dtype
            continue
        assert mapped.isfinite().all(), mapped
        assert not log_derivative.isnan().any()
        assert (log_derivative < math.inf).all()
        total = mapped.sum() + log_derivative.clamp(min=-1e30).sum()
        inputs = (point, parameters) if scalar_map.size else (point,)
        for gradient in torch.autograd.grad(total, inputs):
            assert not gradient.isnan().any()


@every
@both
def test_outside_the_support_the_density_is_zero(scalar_map, direction):
    interval = scalar_map.domain if direction == "forward" else scalar_map.codomain
    outside = torch.tensor([end for end in interval if math.isfinite(end)], dtype=torch.float64)
    outside = outside + torch.tensor([-0.5, 0.5], dtype=torch.float64)[: len(outside)]
    mapped, log_derivative = getattr(scalar_map, direction)(
        outside, numbers(scalar_map, tuple(outside.shape), torch.float64)
    )
    assert mapped.isfinite().all()
    assert (log_derivative == -math.inf).all()


@every
def test_zero_is_the_identity(scalar_map):
    far = scalar_map in FIXED or getattr(scalar_map, "form", "") == "nflows"
    if far or getattr(scalar_map, "scale", "") in ("sigmoid", "softplus"):
        pytest.skip("not in this family")
    value = draw(scalar_map.domain, 100, torch.float64)
    x, log_derivative = scalar_map.forward(value, torch.zeros(scalar_map.size).double())
    near = getattr(scalar_map, "components", getattr(scalar_map, "units", 1)) > 1
    if near and not isinstance(scalar_map, UnconstrainedMonotone):
        inner = value.abs() < 1.5
        assert (x - value).abs()[inner].max() < 0.3
        return
    torch.testing.assert_close(x, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=1e-12)


@every
def test_no_two_parameters_are_stuck_together_at_zero(scalar_map):
    if scalar_map.size < 4:
        pytest.skip("too few parameters")
    generator = torch.Generator().manual_seed(3)
    value = 2 * torch.rand(200, generator=generator, dtype=torch.float64) - 0.7
    parameters = torch.zeros(scalar_map.size, dtype=torch.float64, requires_grad=True)
    x, log_derivative = scalar_map.forward(value, parameters)
    weight = torch.randn(200, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * (x + log_derivative)).sum(), parameters)
    gradient = gradient[gradient.abs() > 1e-9]
    assert len(gradient.unique()) == len(gradient) > 1


@every
def test_records(scalar_map):
    assert decode(encode(scalar_map)) == scalar_map
    assert pickle.loads(pickle.dumps(scalar_map)) == scalar_map
    assert copy.deepcopy(scalar_map) == scalar_map
    assert decode(encode(scalar_map)).codomain == scalar_map.codomain


@every
def test_wrong_size_is_named(scalar_map):
    if scalar_map in FIXED:
        pytest.skip("no parameters")
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match=f"needs {scalar_map.size} parameters"):
            getattr(scalar_map, direction)(torch.zeros(2), torch.zeros(2, scalar_map.size + 1))


@every
def test_not_a_number_stays_one(scalar_map):
    value = torch.tensor([math.nan, 0.3], dtype=torch.float64)
    for direction in DIRECTIONS:
        mapped, _ = getattr(scalar_map, direction)(value, numbers(scalar_map, (2,), value.dtype))
        assert mapped.isnan().tolist() == [True, False]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
def test_arrays_are_mapped_alike(scalar_map, dtype, rows):
    value = start(scalar_map, "forward", 60, dtype)
    value[7] = math.nan
    value = value.reshape(rows, -1)
    parameters = numbers(scalar_map, tuple(value.shape), dtype)
    expected = scalar_map.forward(value, parameters)
    laid_out = parameters.mT.contiguous().mT  # as networks of arrays give them
    found = scalar_map.forward_array(value.numpy(), laid_out.numpy())
    # sums in another order, which steep bins magnify
    rounding = isinstance(scalar_map, RationalQuadratic) and dtype == torch.float32
    bounds = {"atol": 1e-4, "rtol": 1e-4} if rounding else {}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, equal_nan=True, **bounds)


@both
@pytest.mark.parametrize("spline", [*RATIONAL, RationalQuadratic(bins=40, bound=3.0)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_splines_are_the_plain_ones(spline, direction, shared):
    value = start(spline, direction, 60, torch.float64)
    value[7], value[8] = math.nan, 10.0
    value = value.view(20, 3)
    parameters = numbers(spline, (3,) if shared else (20, 3), torch.float64)

    def found(call):
        given = value.clone().requires_grad_(), parameters.clone().requires_grad_()
        mapped, log_derivative = call(*given)
        kept = torch.isfinite(log_derivative)
        total = mapped[kept].sin().sum() + log_derivative[kept].sum()
        return mapped, log_derivative, *torch.autograd.grad(total, given)

    torch.compiler.reset()
    call = getattr(spline, direction)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for one, other in zip(found(compiled), found(call), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@every
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_gradient_the_same_and_nothing_given_is_overwritten(scalar_map, direction):
    count = 1 << 11  # so many that arrays stand in for some formulas
    value = start(scalar_map, direction, count, torch.float32)
    parameters = numbers(scalar_map, (count,), torch.float32)
    given = value.clone(), parameters.clone()
    expected = getattr(scalar_map, direction)(value, parameters.clone().requires_grad_())
    with torch.no_grad():
        found = getattr(scalar_map, direction)(value, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(value, given[0])
    assert torch.equal(parameters, given[1])


def test_functorch_and_compile():
    spline = RationalQuadratic(bins=4)
    value = draw(spline.domain, 7, torch.float64)
    parameters = numbers(spline, (7,), torch.float64)
    for direction in DIRECTIONS:
        function = getattr(spline, direction)
        expected = function(value, parameters)
        mapped = torch.func.vmap(function)(value, parameters)
        torch.testing.assert_close(mapped, expected)
        _, slope = torch.func.jvp(
            lambda value, f=function: f(value, parameters)[0], (value,), (torch.ones_like(value),)
        )
        torch.testing.assert_close(slope.log(), expected[1], rtol=0, atol=1e-10)
    compiled = torch.compile(spline.inverse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value, parameters), spline.inverse(value, parameters))


def test_numeric_inverse_under_forward_mode_and_inference():
    polynomial = Bernstein(degree=5)
    value, parameters = draw((-1, 1), 5, torch.float64), numbers(polynomial, (5,), torch.float64)
    _, slope = torch.func.jvp(
        lambda value: polynomial.inverse(value, parameters)[0],
        (value,),
        (torch.ones_like(value),),
    )
    with torch.inference_mode():
        _, log_derivative = polynomial.inverse(value, parameters)
    torch.testing.assert_close(slope.log(), log_derivative, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(700, 4), (2800,)], ids=["parameters of each", "shared"])
@pytest.mark.parametrize("form", ["softplus", "nflows", "zuko"])
@pytest.mark.parametrize("tails", TAILS)
def test_many_points_go_through_a_spline_as_few_do(tails, form, shape, backward, monkeypatch):
    spline = RationalQuadratic(bins=5, bound=3.0, tails=tails, form=form)
    like = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    places = torch.rand(2 if shape == (2800,) else 1, *shape, **like)
    raw = torch.randn(*shape, spline.size, **like)
    weights = torch.randn(2, *places.shape, **like)
    assert raw[..., :10].numel() >= rational_quadratic.MANY

    def found():
        x = (6 * places - 3).requires_grad_()
        parameters = raw.clone().requires_grad_()
        results = (spline.inverse if backward else spline.forward)(x, parameters)
        total = sum((part * weight).sum() for part, weight in zip(results, weights, strict=True))
        return *results, *torch.autograd.grad(total, (x, parameters))

    many = found()
    monkeypatch.setattr(rational_quadratic, "MANY", math.inf)
    torch.testing.assert_close(many, found(), rtol=1e-9, atol=1e-11)
