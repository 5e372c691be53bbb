import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

from cnf.transforms.planar import Planar, Radial, Sylvester


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


BUILDERS = {
    "planar": (Planar, Planar.outputs),
    "radial": (Radial, Radial.outputs),
    "sylvester": (Sylvester, Sylvester.outputs),
    "sylvester-1": (
        lambda n, **k: Sylvester(n, 1, reflections=3, **k),
        lambda n: Sylvester.outputs(n, 1, 3),
    ),
}


def build(name, features, dtype=torch.float64, conditional=False, spread=0.8, seed=0):
    builder, outputs = BUILDERS[name]
    conditioner = nn.Linear(2, outputs(features)) if conditional else None
    generator = torch.Generator().manual_seed(seed)
    transform = builder(features, conditioner=conditioner, generator=generator).to(dtype)
    with torch.no_grad():
        for parameter in transform.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (spread * noise).to(dtype)
    return transform


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_log_det_is_the_jacobians_both_ways(name, features, seed):
    transform = build(name, features, seed=seed)
    value = torch.randn(features, dtype=torch.float64)
    for direction in (transform.forward, transform.inverse):
        mapped = direction(value)
        J = jacobian(lambda v, f=direction: f(v).value, value)
        torch.testing.assert_close(mapped.log_det, torch.linalg.slogdet(J).logabsdet)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("conditional", [False, True])
def test_round_trip_and_shapes(name, shape, dtype, tolerance, conditional):
    transform = build(name, 3, dtype, conditional)
    z = 2 * torch.randn(*shape, 3, dtype=dtype)
    context = torch.randn(*shape, 2, dtype=dtype)
    x, log_det, costs = transform(z, context)
    back, minus, _ = transform.inverse(x, context)
    assert x.dtype == log_det.dtype == back.dtype == minus.dtype == dtype
    assert x.shape == back.shape == z.shape
    assert log_det.shape == minus.shape == shape
    assert costs == {}
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip_of_many_maps_and_far_points(name):
    for seed in range(20):
        transform = build(name, 3, spread=2.0, seed=seed)
        z = 10 * torch.randn(50, 3, dtype=torch.float64)
        x = transform(z).value
        torch.testing.assert_close(transform(transform.inverse(x).value).value, x)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("features", [1, 3])
def test_starts_as_the_identity(name, features):
    transform = BUILDERS[name][0](features).double()
    z = torch.randn(6, features, dtype=torch.float64)
    x, log_det, _ = transform(z)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(6).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_through_both_directions(name):
    transform = build(name, 2, conditional=True)
    value = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for direction in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(
            lambda v, c, f=direction: tuple(f(v, c)[:2]), (value, context)
        )
    mapped = transform.inverse(value, context)
    (mapped.value.square().sum() + mapped.log_det.sum()).backward()
    for parameter in transform.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_every_parameter_learns_from_the_identity(name):
    # at the identity one gradient step must be enough to leave it
    transform = BUILDERS[name][0](2)
    mapped = transform.inverse(torch.randn(20, 2))
    (mapped.value.square().sum() - mapped.log_det.sum()).backward()
    assert max(p.grad.abs().max().item() for p in transform.parameters()) > 1e-3


def test_second_derivatives_of_the_inverse():
    transform = build("planar", 2)
    x = torch.randn(2, dtype=torch.float64)

    def score(value):
        mapped = transform.inverse(value)
        return mapped.value.sin().sum() + mapped.log_det

    H = hessian(score, x)
    step = 1e-5
    for i in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[i] = step
        difference = (jacobian(score, x + shift) - jacobian(score, x - shift)) / (2 * step)
        torch.testing.assert_close(H[i], difference, rtol=1e-5, atol=1e-7)


def textbook(constrain):
    planar = Planar(2, constrain=constrain).double()
    numbers = {"u": torch.tensor([1.0, 0.0]), "w": torch.tensor([1.0, 2.0]), "b": torch.zeros(())}
    planar.load_state_dict(numbers)
    return planar(torch.tensor([0.5, -0.5], dtype=torch.float64))


def test_the_textbooks_planar_values():
    assert textbook(constrain=False).log_det.item() == pytest.approx(0.580, abs=5e-4)
    assert textbook(constrain=True).log_det.item() == pytest.approx(0.220, abs=5e-4)


def test_an_unconstrained_planar_map_says_when_it_folds():
    planar = Planar(2, constrain=False)
    assert not planar.bijective
    assert Planar(2).bijective
    torch.testing.assert_close(planar.inverse(torch.ones(2)).value, torch.ones(2))
    with torch.no_grad():
        planar.u.copy_(-2 * planar.w)
    with pytest.raises(ValueError, match=r"folds space .* constrain=True"):
        planar.inverse(torch.ones(2))


def test_planar_stays_invertible_at_the_edge():
    planar = Planar(2)
    with torch.no_grad():
        planar.w.copy_(torch.tensor([1.0, 0.0]))
        planar.u.copy_(torch.tensor([-40.0, 0.3]))
    # softplus(-40) vanishes next to 1 in float32, yet the slope at the ridge does not
    mapped = planar(torch.zeros(2))
    assert mapped.log_det.item() == pytest.approx(-40, abs=1e-3)
    assert torch.isfinite(planar.inverse(torch.randn(100, 2)).value).all()


def test_radial_at_its_centre():
    radial = build("radial", 3)
    centre = radial.centre.detach().clone().requires_grad_()
    mapped = radial(centre)
    torch.testing.assert_close(mapped.value, centre)
    expected = 3 * (nn.functional.softplus(radial.gamma) / nn.functional.softplus(radial.alpha))
    torch.testing.assert_close(mapped.log_det, 3 * (expected / 3).log())
    mapped.log_det.backward()
    assert torch.isfinite(centre.grad).all()


def test_sylvester_with_one_direction_is_planar():
    sylvester = build("sylvester-1", 3)
    Q, R, inner, b, _ = sylvester._terms(None)
    planar = Planar(3, constrain=False).double()
    with torch.no_grad():
        planar.u.copy_(Q[:, 0] * R[0, 0])
        planar.w.copy_(Q[:, 0] * inner[0, 0])
        planar.b.copy_(b[0])
    z = torch.randn(5, 3, dtype=torch.float64)
    for got, expected in zip(sylvester(z)[:2], planar(z)[:2], strict=True):
        torch.testing.assert_close(got, expected)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"expected \(\*batch, 2\), got \(3,\)"):
        Planar(2)(torch.zeros(3))
    with pytest.raises(ValueError, match="hidden must lie between 1 and features = 2, got 3"):
        Sylvester(2, 3)
    with pytest.raises(ValueError, match="pass context="):
        Radial(2, conditioner=nn.Linear(1, 4))(torch.zeros(2))
    with pytest.raises(ValueError, match="must return 4 numbers per sample"):
        Radial(2, conditioner=nn.Linear(1, 3))(torch.zeros(2), torch.zeros(1))
