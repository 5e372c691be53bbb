"""Worked numbers, closed forms, and what must be refused."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.bijections import (
    Additive,
    Affine,
    Bernstein,
    CubicSpline,
    FixedAffine,
    LeakyReLU,
    LinearSpline,
    LogisticMixture,
    NeuralAutoregressive,
    Power,
    QuadraticSpline,
    RationalQuadratic,
    Sigmoid,
    Softplus,
    SumOfSquares,
    Tanh,
    UnconstrainedMonotone,
    soft_bound,
)
from cnf.bijections.quadrature import gauss_legendre, integral

DOUBLE = torch.float64


def test_the_textbook_coupling():
    x, log_derivative = Affine().forward(torch.tensor(3.0), torch.tensor([2.0, 0.5]))
    assert x.item() == pytest.approx(6.946, abs=1e-3)
    assert log_derivative.item() == 0.5
    x, log_derivative = Additive().forward(torch.tensor(3.0), torch.tensor([2.0]))
    assert (x.item(), log_derivative.item()) == (5.0, 0.0)


@pytest.mark.parametrize(
    ("scalar_map", "log_scale"),
    [
        (Affine(), 0.7),
        (Affine(bound=3.0), 3 * math.tanh(0.7 / 3)),
        (Affine(bound=3.0, scale="softclip"), 0.7 / (1 + 0.7 / 3)),
        (Affine(scale="sigmoid"), math.log(1 / (1 + math.exp(-2.7)) + 1e-3)),
        (Affine(scale="softplus"), math.log(math.log1p(math.exp(0.7)) + 1e-3)),
    ],
)
def test_log_scales(scalar_map, log_scale):
    x, log_derivative = scalar_map.forward(
        torch.tensor(2.0, dtype=DOUBLE), torch.tensor([0.1, 0.7], dtype=DOUBLE)
    )
    assert log_derivative.item() == pytest.approx(log_scale, abs=1e-14)
    assert x.item() == pytest.approx(2 * math.exp(log_scale) + 0.1, abs=1e-14)


@pytest.mark.parametrize("form", ["tanh", "softclip"])
def test_a_soft_bound_is_never_left(form):
    raw = torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30])
    bounded = soft_bound(raw, 2.0, form)
    assert (bounded.abs() <= 2).all()
    assert (bounded.diff() > 0).all()


def test_mixture_of_one_logistic_is_affine():
    # logit(sigmoid((z − μ)/s))·exp(a) + b
    parameters = torch.tensor([0.4, 1.5, 0.3, -2.0, 0.6], dtype=DOUBLE)
    z = torch.tensor([-300.0, 0.2, 500.0], dtype=DOUBLE)
    x, log_derivative = LogisticMixture(components=1).forward(z, parameters)
    scale, last = 5 * math.tanh(0.3 / 5), 5 * math.tanh(0.6 / 5)
    torch.testing.assert_close(x, (z - 1.5) * math.exp(last - scale) - 2)
    torch.testing.assert_close(log_derivative, torch.full_like(z, last - scale))


def test_mixture_against_the_plain_formula_and_in_the_tails():
    mixture = LogisticMixture(components=3, width=1.0)
    parameters = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    z = torch.linspace(-4, 4, 9, dtype=DOUBLE)
    weights, means, scales = torch.softmax(parameters[:3], 0), parameters[3:6], parameters[6:9]
    scales = torch.exp(5 * torch.tanh(scales / 5))
    cdf = (weights * torch.sigmoid((z[:, None] - means) / scales)).sum(-1)
    expected = torch.logit(cdf) * torch.exp(5 * torch.tanh(parameters[10] / 5)) + parameters[9]
    torch.testing.assert_close(mixture.forward(z, parameters)[0], expected)
    far = torch.tensor([-1e4, 1e4], dtype=torch.float32)
    z, _ = mixture.inverse(mixture.forward(far, parameters.float())[0], parameters.float())
    torch.testing.assert_close(z, far)


def test_narrow_components_make_the_identity():
    z = torch.linspace(-2, 2, 41, dtype=DOUBLE)
    for scalar_map in (LogisticMixture(components=8), NeuralAutoregressive(units=8)):
        x, _ = scalar_map.forward(z, torch.zeros(scalar_map.size, dtype=DOUBLE))
        assert (x - z).abs().max() < 0.1
        exact = type(scalar_map)(8, width=1.0)
        x, _ = exact.forward(z, torch.zeros(exact.size, dtype=DOUBLE))
        torch.testing.assert_close(x, z)


def test_polynomials_are_polynomials():
    generator = torch.Generator().manual_seed(0)
    z = torch.linspace(-4.9, 4.9, 20, dtype=DOUBLE)
    for scalar_map, degree in ((Bernstein(degree=6), 6), (SumOfSquares(2, 3), 7)):
        parameters = torch.randn(scalar_map.size, generator=generator, dtype=DOUBLE)
        x, _ = scalar_map.forward(z, parameters)
        powers = torch.stack([(z / 5) ** k for k in range(degree + 1)], -1)
        solution = torch.linalg.lstsq(powers, x.unsqueeze(-1)).solution
        torch.testing.assert_close(powers @ solution, x.unsqueeze(-1), rtol=0, atol=1e-10)
        # and straight outside
        far, log_derivative = scalar_map.forward(z.new_tensor([6.0, 7.0, 8.0]), parameters)
        torch.testing.assert_close(far.diff(), torch.exp(log_derivative[1:]))


def test_cubic_slopes_are_steffens():
    spline = CubicSpline(bins=4, tails="interval")
    widths = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
    secants = torch.tensor([1.0, 3.0, 0.5, 0.7], dtype=DOUBLE)
    slopes = spline._slopes(widths, secants, torch.zeros(2, dtype=DOUBLE))
    inner = [min(2.0, (1 * 0.2 + 3 * 0.1) / 0.3), min(1.0, (3 * 0.3 + 0.5 * 0.2) / 0.5)]
    inner.append((0.5 * 0.4 + 0.7 * 0.3) / 0.7)
    ends = [0.001 + 2.997 / 3, (0.001 + 2.997 / 3) * 0.7]
    expected = torch.tensor([ends[0], *inner, ends[1]], dtype=DOUBLE)
    torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("tails", ["linear", "interval", "circular"])
@pytest.mark.parametrize("kind", [LinearSpline, QuadraticSpline, CubicSpline, RationalQuadratic])
def test_splines_keep_their_interval_and_are_continuous(kind, tails):
    spline = kind(bins=6, bound=2.0, tails=tails)
    parameters = torch.randn(spline.size, generator=torch.Generator().manual_seed(1)).double()
    ends = torch.tensor([-2.0, 2.0], dtype=DOUBLE)
    torch.testing.assert_close(spline.forward(ends, parameters)[0], ends)
    torch.testing.assert_close(spline.inverse(ends, parameters)[0], ends)
    grid = torch.linspace(-2, 2, 20001, dtype=DOUBLE)
    x, log_derivative = spline.forward(grid, parameters)
    slope = torch.exp(log_derivative)
    assert (x.diff() > 0).all()
    assert x.diff().max() <= 1.01 * slope.max() * (grid[1] - grid[0])
    area = torch.trapezoid(slope, grid)
    assert area.item() == pytest.approx(4.0, abs=2e-2 if kind is LinearSpline else 1e-4)
    if kind is not LinearSpline:
        assert slope.diff().abs().max() < 0.1 * slope.max()  # no jump at a knot


@pytest.mark.parametrize("kind", [QuadraticSpline, RationalQuadratic])
def test_linear_tails_are_joined_smoothly(kind):
    spline = kind(bins=6, bound=2.0)
    parameters = torch.randn(spline.size, generator=torch.Generator().manual_seed(1)).double()
    _, log_derivative = spline.forward(torch.tensor([-2.0, 2.0]).double(), parameters)
    torch.testing.assert_close(log_derivative, torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("kind", [LinearSpline, QuadraticSpline, CubicSpline, RationalQuadratic])
def test_circular_splines_repeat(kind):
    spline = kind(bins=6, bound=math.pi, tails="circular")
    parameters = torch.randn(spline.size, generator=torch.Generator().manual_seed(1)).double()
    z = torch.linspace(-3, 3, 11, dtype=DOUBLE)
    x, log_derivative = spline.forward(z, parameters)
    again, log_again = spline.forward(z + 4 * math.pi, parameters)
    torch.testing.assert_close(again, x + 4 * math.pi)
    torch.testing.assert_close(log_again, log_derivative)


def test_quadrature():
    points, weights = (torch.tensor(column, dtype=DOUBLE) for column in gauss_legendre(4))
    for power in range(8):
        total = (weights * points**power).sum().item()
        assert total == pytest.approx(1 / (power + 1), abs=1e-14)
    end = torch.tensor([-1.0, 0.0, 2.0], dtype=DOUBLE)
    torch.testing.assert_close(integral(torch.exp, end, gauss_legendre(16)), torch.expm1(end))


def test_umnn_integral_agrees_with_a_finer_one():
    coarse, fine = UnconstrainedMonotone(), UnconstrainedMonotone(nodes=100)
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(500, coarse.size, generator=generator, dtype=DOUBLE)
    z = 3 * torch.randn(500, generator=generator, dtype=DOUBLE)
    one, other = coarse.forward(z, parameters)[0], fine.forward(z, parameters)[0]
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_fixed_maps():
    z = torch.tensor([-30.0, -2.0, 0.5, 30.0], dtype=DOUBLE)
    torch.testing.assert_close(Sigmoid().forward(z)[0], torch.sigmoid(z))
    torch.testing.assert_close(Tanh().forward(z)[1][1:3], torch.log(1 - torch.tanh(z[1:3]) ** 2))
    x, _ = Softplus().forward(z)
    torch.testing.assert_close(
        x, torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(Softplus().inverse(x)[0], z, rtol=1e-13, atol=0)
    assert Power(2.0).forward(torch.tensor(3.0))[0].item() == 9.0
    x, log_derivative = LeakyReLU(0.2).forward(torch.tensor([-5.0, 5.0]))
    assert x.tolist() == [-1.0, 5.0]
    torch.testing.assert_close(log_derivative, torch.tensor([math.log(0.2), 0.0]))


def test_pixels_at_the_ends_have_a_density():
    z, log_derivative = Sigmoid(margin=0.05).inverse(torch.tensor([0.0, 1.0], dtype=DOUBLE))
    torch.testing.assert_close(z, torch.tensor([-1.0, 1.0], dtype=DOUBLE) * math.log(19))
    expected = math.log(0.9 / (0.05 * 0.95))
    torch.testing.assert_close(log_derivative, torch.full((2,), expected, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Affine(scale="exp"), "scale must be one of tanh, softclip, sigmoid, softplus"),
        (lambda: Affine(bound=-1.0), "bound must be positive or None, got -1.0"),
        (lambda: Affine(bound=1.0, scale="sigmoid"), "takes no bound"),
        (lambda: RationalQuadratic(tails="flat"), "tails must be one of linear, interval"),
        (lambda: RationalQuadratic(form="pyro"), "form must be one of softplus, nflows, zuko"),
        (lambda: RationalQuadratic(bins=1), "bins >= 2"),
        (lambda: RationalQuadratic(min_width=0.2), "min_width must be positive and below"),
        (lambda: QuadraticSpline(min_slope=1.0), "min_slope must lie between 0 and 1"),
        (lambda: CubicSpline(min_height=0.0), "min_height must be positive"),
        (lambda: LogisticMixture(components=0), "components must be at least 1"),
        (lambda: LogisticMixture(bound=0.0), "bound must be positive"),
        (lambda: NeuralAutoregressive(width=1.5), "width must lie in"),
        (lambda: NeuralAutoregressive(layers=0), "layers must be at least 1"),
        (lambda: Bernstein(degree=0), "degree >= 1"),
        (lambda: SumOfSquares(polynomials=0), "polynomials >= 1"),
        (lambda: SumOfSquares(bound=0.0), "bound > 0"),
        (lambda: UnconstrainedMonotone(units=0), "units and nodes must be at least 1"),
        (lambda: UnconstrainedMonotone(strength=0.0), "must be positive"),
        (lambda: FixedAffine(scale=0.0), "scale must be positive"),
        (lambda: LeakyReLU(0.0), "slope must be positive"),
        (lambda: Power(-1.0), "exponent must be positive"),
        (lambda: Sigmoid(0.5), r"margin must lie in \[0, 0.5\)"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
