from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.integrate import simpson
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor

from cnf.data import Target, targets, toy
from cnf.data.curves import inner_moon, outer_moon, roll
from cnf.data.mixtures import log_isotropic_mixture

NAMES = targets()
SMOOTH = tuple(name for name in NAMES if name != "checkerboard")
# Half-width of the square that the histograms cover, and their cells along each side.
REACH, CELLS = 4.5, 36


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(low: float, high: float, n: int, seed: int = 0) -> Tensor:
    """Points at distances between low and high, in all directions."""
    radius, turn = torch.rand(2, n, generator=seeded(seed), dtype=torch.float64)
    radius, angle = low + (high - low) * radius, 2 * math.pi * turn
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


@functools.cache
def quadrature(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Cell by cell: where a Gauss rule looks, its weights, the log-density; (cells², points)."""
    places, weights = np.polynomial.legendre.leggauss(5)
    width = 2 * REACH / CELLS
    corners = -REACH + width * torch.arange(CELLS, dtype=torch.float64)
    axis = (corners[:, None] + width / 2 * torch.from_numpy(places + 1)).flatten()
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)

    def by_cell(values: Tensor) -> Tensor:
        values = values.reshape(CELLS, 5, CELLS, 5, *values.shape[2:])
        return values.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    rule = torch.from_numpy(np.outer(weights, weights)) * (width / 2) ** 2
    return by_cell(grid), rule.flatten(), by_cell(toy(name).log_prob(grid))


def recipe(name: str, n: int) -> np.ndarray:
    """Samples made the way FFJORD's scripts make them, spaced evenly where they are."""
    rng = np.random.default_rng(7)
    if name == "8gaussians":
        diagonal = 1 / np.sqrt(2)
        ways = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
        slants = diagonal * np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
        centres = 4 * np.concatenate((ways, slants))
        return (rng.normal(size=(n, 2)) * 0.5 + centres[rng.integers(8, size=n)]) / 1.414
    if name == "pinwheel":
        along, across = 1 + 0.3 * rng.normal(size=n), 0.1 * rng.normal(size=n)
        angle = 2 * np.pi / 5 * (np.arange(n) % 5) + 0.25 * np.exp(along)
        turned = (along + 1j * across) * np.exp(-1j * angle)
        return 2 * np.stack((turned.real, turned.imag), -1)
    if name == "checkerboard":
        x = rng.uniform(size=n) * 4 - 2
        y = rng.uniform(size=n) - 2 * rng.integers(2, size=n) + np.floor(x) % 2
        return 2 * np.stack((x, y), -1)
    if name == "rings":
        angle = np.linspace(0, 2 * np.pi, n // 4, endpoint=False)
        one = np.stack((np.cos(angle), np.sin(angle)), -1)
        x = 3 * np.concatenate([radius * one for radius in (1, 0.75, 0.5, 0.25)])
        return x + 0.08 * rng.normal(size=x.shape)
    if name == "2spirals":
        along = np.sqrt(rng.uniform(size=n // 2)) * 540 * 2 * np.pi / 360
        x = np.stack((-np.cos(along) * along, np.sin(along) * along), -1)
        x = x + 0.5 * rng.uniform(size=x.shape)
        x = np.concatenate((x, -x)) / 3
        return x + 0.1 * rng.normal(size=x.shape)
    datasets = pytest.importorskip("sklearn.datasets")
    if name == "circles":
        return 3 * datasets.make_circles(n_samples=n, factor=0.5, noise=0.08, random_state=7)[0]
    if name == "moons":
        moons = datasets.make_moons(n_samples=n, noise=0.1, random_state=7)[0]
        return 2 * moons + np.array([-1, -0.2])
    return datasets.make_swiss_roll(n_samples=n, noise=1.0, random_state=7)[0][:, [0, 2]] / 5


def test_the_eight_densities_are_there() -> None:
    expected = {"8gaussians", "pinwheel", "checkerboard", "rings"}
    assert set(NAMES) == expected | {"circles", "moons", "swissroll", "2spirals"}
    for name in NAMES:
        assert isinstance(toy(name), Target)
        assert toy(name).name == name
        assert toy(name).event_shape == (2,)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no target is called 'pinwhel'. Did you mean 'pinwheel'"):
        toy("pinwhel")


@pytest.mark.parametrize("name", NAMES)
def test_integrates_to_one(name: str) -> None:
    _, weights, log_density = quadrature(name)
    assert log_density.exp().mul(weights).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_by_quadrature(name: str) -> None:
    target = toy(name)
    if name == "pinwheel":
        # In the coordinates before the twist, where the folds lie in the far tail.
        axis = torch.arange(-8, 8.01, 0.2, dtype=torch.float64)
        normal = torch.cartesian_prod(axis, axis)
        weights = 0.04 * (-0.5 * normal.square().sum(-1)).exp() / (2 * math.pi)
        along, across = 1 + 0.3 * normal[:, 0], 0.1 * normal[:, 1]
        angle = 0.25 * along.exp()
        cos, sin = angle.cos(), angle.sin()
        x = 2 * torch.stack((along * cos + across * sin, across * cos - along * sin), -1)
        entropy = -(weights * target.log_prob(x)).sum().item()
        assert entropy == pytest.approx(target.entropy, abs=1e-8)
        return
    if name == "checkerboard":
        assert target.entropy == math.log(32)
        return
    _, weights, log_density = quadrature(name)
    entropy = -(log_density.exp() * log_density).mul(weights).sum().item()
    assert entropy == pytest.approx(target.entropy, abs=1e-5)
    assert target.entropy_stderr <= 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_the_mean_of_minus_log_prob(name: str) -> None:
    target = toy(name)
    log_density = target.log_prob(target.sample(20_000, generator=seeded(3)).double())
    stderr = log_density.std().item() / math.sqrt(20_000)
    assert abs(log_density.mean().item() + target.entropy) < 4 * stderr + 1e-12


@pytest.mark.parametrize("source", ["sampler", "recipe"])
@pytest.mark.parametrize("name", NAMES)
def test_histogram_follows_the_density(name: str, source: str) -> None:
    n = 1_000_000
    if source == "sampler":
        x = toy(name).sample(n, generator=seeded(1), dtype=torch.float64).numpy()
    else:
        x = recipe(name, n)
    counts = np.histogram2d(*x.T, bins=CELLS, range=[(-REACH, REACH)] * 2)[0].flatten()
    _, weights, log_density = quadrature(name)
    expected = n * (log_density.exp() @ weights).numpy()
    filled = expected > 10
    # Cells that expect little are one cell together, with everything outside of the square.
    observed = np.append(counts[filled], n - counts[filled].sum())
    expected = np.append(expected[filled], n - expected[filled].sum())
    if name == "checkerboard":
        assert counts[~filled].sum() == 0
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(observed) - 1
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert (chi_square - freedom) / math.sqrt(2 * freedom) < 4.5


@pytest.mark.parametrize("name", NAMES)
def test_samples_repeat_and_dtypes_agree(name: str) -> None:
    target = toy(name)
    x = target.sample(500, generator=seeded(5))
    assert x.dtype == torch.float32
    assert x.shape == (500, 2)
    assert torch.equal(x, target.sample(500, generator=seeded(5)))
    assert not torch.equal(x, target.sample(500, generator=seeded(6)))
    double = target.sample(500, generator=seeded(5), dtype=torch.float64, device="cpu")
    assert torch.equal(double.float(), x)
    assert target.sample(0).shape == (0, 2)
    # Any prefix of the rows is a fair sample: the rows are not sorted by component.
    halves = target.sample(20_000, generator=seeded(8)).reshape(2, -1, 2)
    assert torch.allclose(halves[0].mean(0), halves[1].mean(0), atol=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_shapes_and_dtypes(name: str) -> None:
    target = toy(name)
    x = target.sample(12, generator=seeded(2), dtype=torch.float64)
    flat = target.log_prob(x)
    assert flat.dtype == torch.float64
    assert torch.allclose(target.log_prob(x.reshape(3, 4, 2)), flat.reshape(3, 4), atol=1e-12)
    assert target.log_prob(x[0]).shape == ()
    assert target.log_prob(x.new_zeros(0, 2)).shape == (0,)
    assert target.log_prob(x.new_zeros(2, 0, 2)).shape == (2, 0)
    single = target.log_prob(x.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), flat, atol=1e-4)
    log_density = target.log_prob(x.requires_grad_())
    assert torch.allclose(log_density, flat, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_far_points_are_finite_and_never_nan(name: str) -> None:
    target = toy(name)
    x = torch.tensor(
        [[0.0, 0.0], [30, 1], [-2e3, 1e3], [1e8, 0], [1e15, -1e15]], dtype=torch.float64
    )
    log_density = target.log_prob(x)
    assert not log_density.isnan().any()
    if name != "checkerboard":
        assert log_density.isfinite().all()
        assert (log_density[1:].diff() < 0).all()
    beyond = torch.tensor([[math.inf, 0], [0, -math.inf], [1e200, 1]], dtype=torch.float64)
    assert torch.equal(target.log_prob(beyond), beyond.new_full((3,), -math.inf))
    assert target.log_prob(torch.tensor([math.nan, 0.0])).isnan()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_near_and_far(name: str) -> None:
    target = toy(name)
    x = torch.cat((target.sample(6, generator=seeded(4), dtype=torch.float64), ring(6, 9, 3)))
    assert torch.autograd.gradcheck(target.log_prob, (x.requires_grad_(),), atol=1e-4, rtol=1e-4)
    origin = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(target.log_prob(origin).sum(), origin)
    assert slope.isfinite().all()


def test_pinwheel_has_second_derivatives() -> None:
    x = toy("pinwheel").sample(2, generator=seeded(4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(toy("pinwheel").log_prob, (x,))


def test_checkerboard_is_half_open_squares() -> None:
    x = torch.tensor([[-4.0, -4.0], [-2.0, -4.0], [-2.0, -2.0], [3.9, 3.9], [4.0, 4.0], [5, 5]])
    inside = torch.tensor([True, False, True, True, False, False])
    expected = torch.where(inside, -math.log(32), -math.inf)
    assert torch.allclose(toy("checkerboard").log_prob(x), expected)


def test_circles_agree_with_quadrature() -> None:
    angles = 2 * math.pi * torch.arange(400, dtype=torch.float64) / 400
    unit = torch.stack((angles.cos(), angles.sin()), -1)
    centres = torch.cat([radius * unit for radius in (1.5, 3.0)])
    log_weights = centres.new_full((800,), -math.log(800))
    x = ring(0, 7, 200)
    expected = log_isotropic_mixture(x, centres, log_weights, 0.24)
    assert torch.allclose(toy("circles").log_prob(x), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "curves"), [("moons", (outer_moon, inner_moon)), ("swissroll", (roll,))]
)
def test_blurred_curves_agree_with_simpson(name: str, curves: tuple) -> None:
    x = torch.cat((ring(0, 4, 30, seed=1), ring(4, 8, 10, seed=2)))
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    log_density = toy(name).log_prob(x)
    total = torch.zeros_like(log_density)
    for curve in curves:
        square = (curve(u) - x[:, None]).square().sum(-1)
        ratio = (-square / 2 / 0.04 - math.log(2 * math.pi * 0.04) - log_density[:, None]).exp()
        total += torch.from_numpy(simpson(ratio.numpy(), x=u.numpy())) / len(curves)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_two_spirals_agree_near_and_far_and_have_converged() -> None:
    target = toy("2spirals")
    x = torch.cat((target.sample(40, seeded(1), torch.float64), ring(0, 4, 40)))
    near = target._near(x)
    assert torch.allclose(near, target._far(x), atol=1e-6)
    finer = dataclasses.replace(target, nodes=700)
    assert torch.allclose(near, finer.log_prob(x), atol=1e-6)
    x = ring(5, 8, 20)
    assert torch.allclose(target.log_prob(x), finer.log_prob(x), atol=1e-6)


def pinwheel_by_search(x: np.ndarray) -> float:
    """The log-density as a sum over arms and over the sign changes found on a dense scan."""
    radius, phase = np.hypot(*x) / 2, math.atan2(x[1], x[0])
    alphas = np.linspace(-np.pi, np.pi, 100_001)
    terms = []
    for arm in range(5):

        def miss(alpha: np.ndarray, arm: int = arm) -> np.ndarray:
            turned = alpha - 0.25 * np.exp(radius * np.cos(alpha)) - 2 * np.pi * arm / 5
            return (turned - phase) / (2 * np.pi)

        scan = miss(alphas)
        for i in np.flatnonzero(np.floor(scan[1:]) != np.floor(scan[:-1])):
            low, high = sorted((scan[i], scan[i + 1]))
            for turns in range(math.ceil(low), math.floor(high) + 1):
                ends = alphas[i], alphas[i + 1]
                alpha = brentq(lambda a: miss(a) - turns, *ends, xtol=1e-15)  # noqa: B023
                along, across = radius * np.cos(alpha), radius * np.sin(alpha)
                square = ((along - 1) / 0.3) ** 2 + (across / 0.1) ** 2
                slope = abs(1 + 0.25 * across * np.exp(along))
                terms.append(-square / 2 - math.log(2 * math.pi * 0.03 * slope))
    return float(logsumexp(terms)) - math.log(20)


def test_pinwheel_finds_every_solution() -> None:
    x = torch.cat([ring(low, low + 2, 6, seed=low) for low in (0, 2, 4, 6, 8)])
    expected = x.new_tensor([pinwheel_by_search(point) for point in x.numpy()])
    assert torch.allclose(toy("pinwheel").log_prob(x), expected, atol=1e-8, rtol=1e-9)


def test_pinwheel_loses_no_solution_at_its_cut() -> None:
    # These points come from f = (-0.1 k, 0), whose angle is π: the end of the circle.
    along = -0.1 * torch.arange(1, 40, dtype=torch.float64)
    angle = 0.25 * along.exp()
    x = 2 * along[:, None] * torch.stack((angle.cos(), -angle.sin()), -1)
    target = toy("pinwheel")
    assert torch.allclose(target.log_prob(x), target.log_prob(x * (1 + 1e-9)), atol=1e-5)
    assert torch.allclose(target.log_prob(x), target.log_prob(x + 1e-9), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_targets_can_be_copied_and_pickled(name: str) -> None:
    target = toy(name)
    assert copy.deepcopy(target) == target
    assert pickle.loads(pickle.dumps(target)) == target


def test_mistakes_are_named() -> None:
    target = toy("moons")
    with pytest.raises(ValueError, match="n=-1"):
        target.sample(-1)
    with pytest.raises(TypeError, match=r"torch.int64; convert with"):
        target.log_prob(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="got ndarray"):
        target.log_prob(np.zeros((3, 2)))
    for wrong in (torch.zeros(4, 3), torch.zeros(())):
        with pytest.raises(ValueError, match=r"expected x of shape \(\*batch, 2\)"):
            target.log_prob(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str) -> None:
    target = toy(name)
    x = target.sample(1000, generator=seeded(), device="cuda")
    assert x.is_cuda
    assert torch.equal(x.cpu(), target.sample(1000, generator=seeded()))
    on_device = torch.Generator("cuda").manual_seed(0)
    assert target.sample(10, generator=on_device).is_cuda
    log_density = target.log_prob(x)
    assert log_density.is_cuda
    assert torch.allclose(log_density.cpu(), target.log_prob(x.cpu()), atol=1e-5)
