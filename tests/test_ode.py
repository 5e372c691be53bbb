"""Solutions against closed forms, what steers the steps, and what is counted."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torchdiffeq import odeint

from cnf.ode import METHODS, Solver, Stats, count_nfe, integrate
from cnf.ode.guard import Watch, error_norm
from cnf.ode.runge_kutta import PlainSteps
from cnf.ode.solver import ADAPTIVE, FIXED, MULTISTEP, options_of
from cnf.ode.stepper import grid, tableau, walk

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
MATRIX = torch.tensor([[0.3, -1.1, 0.2], [0.9, -0.4, 0.5], [-0.3, 0.2, 0.6]], dtype=torch.float64)
TIMES = {
    "unit": [0.0, 1.0],
    "backwards": [1.0, 0.0],
    "uneven": [0.2, 0.25, 0.9, 1.7],
    "uneven backwards": [1.3, 1.2, -0.4],
    "even": [0.0, 0.25, 0.5, 0.75, 1.0],
}


def linear(t, state):
    """dx/dt = cos(t) A x and the integral of the trace."""
    x, log_det = state
    return torch.cos(t) * x @ MATRIX.to(x).T, torch.cos(t) * MATRIX.to(x).trace().expand_as(log_det)


def solution(x, log_det, times):
    """The closed form at every time: exp((sin t - sin t₀) A) x."""
    angles = [math.sin(t) - math.sin(times[0]) for t in times]
    return (
        torch.stack([x @ torch.linalg.matrix_exp(angle * MATRIX).T for angle in angles]),
        torch.stack([log_det + angle * MATRIX.trace() for angle in angles]),
    )


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    return x, torch.ones(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_linear_dynamics_equal_the_matrix_exponential(state, times, method, gradient):
    solver = Solver(method, rtol=1e-11, atol=1e-11, gradient=gradient)
    (x, log_det), stats = integrate(linear, state, torch.tensor(times, dtype=torch.float64), solver)
    expected_x, expected_log_det = solution(*state, times)
    assert torch.allclose(x, expected_x, rtol=0, atol=1e-9)
    assert torch.allclose(log_det, expected_log_det, rtol=0, atol=1e-9)
    assert stats.nfe > stats.accepted > 0


# the order of each fixed grid's method shows in the error of 40 steps
FIXED_ERROR = {"euler": 0.1, "midpoint": 5e-4, "heun2": 5e-4, "heun3": 5e-6, "rk4": 5e-8,
               "explicit_adams": 0.1}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Functional iteration")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", ["unit", "backwards", "even"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_solves(state, method, times, dtype):
    state, times = tuple(part.to(dtype) for part in state), TIMES[times]
    tol = {"fehlberg2": 1e-6, "adaptive_heun": 1e-4}.get(method, 1e-5)
    (x, log_det), _ = integrate(
        linear, state, torch.tensor(times, dtype=dtype), Solver(method, rtol=tol, atol=tol)
    )
    expected_x, expected_log_det = solution(*(part.double() for part in state), times)
    bound = FIXED_ERROR.get(method, 5e-3)
    bound = max(bound, 2e-6) if dtype == torch.float32 else bound
    assert x.dtype == log_det.dtype == dtype
    assert (x - expected_x).abs().max() < bound
    assert (log_det - expected_log_det).abs().max() < bound


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", *ADAPTIVE])
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_our_steps_are_torchdiffeqs(state, method, times):
    times = torch.tensor(times, dtype=torch.float64)
    # steps of the same size: which they are is ours to choose
    sizes = {"first_step": 0.05, "max_step": 0.05} if method in ADAPTIVE else {}
    tol = {"fehlberg2": 1e-3, "adaptive_heun": 1e-2}.get(method, 1e-4)
    known = {"rtol": tol, "atol": tol, "options": sizes}
    (ours, counted), (theirs, reference) = (
        integrate(linear, state, times, Solver(method, **known, gradient=gradient))
        for gradient in ("checkpoint", "backprop")
    )
    # these two start a step from a slope that is not quite the one at its start
    differs = method in ("adaptive_heun", "fehlberg2")
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=2e-3 if differs else 1e-10)
    assert (counted.accepted, counted.rejected) == (reference.accepted, 0)


def steps_of(slope, end, **options):
    """The accepted steps of dy/dt = slope(t) and what was counted, tolerances of 1e-6."""
    solver = Solver(gradient="checkpoint", **options)
    watch = Watch(solver, [0.0, end], 1e-12, "")
    rhs = lambda t, y: slope(t).expand_as(y)  # noqa: E731
    taken = PlainSteps(rhs, tableau("dopri5"), 1e-6, 1e-6, error_norm([torch.Size([1])], ["batch"]))
    path = walk(taken, torch.zeros(1, dtype=torch.float64), [0.0, end], solver, watch)
    return [step.size for step in path.steps], watch


@pytest.mark.parametrize("end", [1.0, -1.0, 2.7])
def test_the_last_steps_are_even(end):
    sizes, watch = steps_of(lambda t: torch.exp(t), end)
    assert sum(sizes) == pytest.approx(end, abs=1e-12)
    assert watch.rejected == 0
    assert sizes[-1] == pytest.approx(sizes[-2], rel=0.05)
    # one that is told its longest step takes equal ones, and no more of them than it needs
    sizes, _ = steps_of(lambda t: torch.exp(t), end, options={"max_step": 0.09, "first_step": 0.09})
    assert sizes == pytest.approx([end / math.ceil(abs(end) / 0.09 - 1e-9)] * len(sizes))


def test_steps_shrink_before_they_are_rejected():
    slope = lambda t: (1.02 - t) ** -2  # noqa: E731
    sizes, watch = steps_of(slope, 1.0)
    _, theirs = integrate(
        lambda t, state: (slope(t).expand_as(state[0]),),
        (torch.zeros(1, dtype=torch.float64),),
        UNIT,
        Solver(gradient="backprop", norm="batch"),
    )
    # torchdiffeq tries every step with the size of the one before
    assert theirs.rejected > theirs.accepted / 3
    assert watch.rejected < 0.6 * theirs.rejected
    assert watch.accepted + watch.rejected < 0.9 * (theirs.accepted + theirs.rejected)
    shorter = sum(after < before for before, after in pairwise(sizes))
    assert shorter > watch.rejected  # after accepted steps, too


def test_the_solution_is_torchdiffeqs_but_for_the_landing(state):
    ours, stats = integrate(linear, state, UNIT, Solver(rtol=1e-8, atol=1e-8))
    theirs = odeint(linear, state, UNIT, rtol=1e-8, atol=1e-8)
    assert stats.nfe > 6 * stats.accepted
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", ["unit", "backwards"])
def test_the_field_is_never_asked_beyond_the_times(method, times):
    asked = []

    def rhs(t, state):
        asked.append(float(t.detach()))
        return (-state[0],)

    times = torch.tensor(TIMES[times])
    x = torch.ones(2, requires_grad=True)
    (y,), _ = integrate(rhs, (x,), times, Solver(method, rtol=1e-3, atol=1e-3))
    y[-1].sum().backward()
    # the first step's size is chosen by a look ahead, which may be longer than the way
    outside = [t for t in asked if not -1e-6 <= t <= 1 + 1e-6]
    assert len(outside) <= 2


def test_a_fixed_grid_is_even_and_ends_on_the_times():
    assert grid([0.0, 1.0], 0.25) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grid([0.0, 0.3, 1.0], 0.1)[3] == 0.3
    assert len(grid([0.0, 0.3], 0.1)) == 4  # 0.3 / 0.1 is above 3 by rounding
    assert grid([1.0, 0.0], 0.4) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    state, count = (torch.ones(2),), {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}
    for method, stages in count.items():
        for gradient in ("adjoint", "checkpoint"):
            _, stats = integrate(
                lambda t, state: (-state[0],),
                state,
                torch.tensor([0.0, 1.0]),
                Solver(method, gradient=gradient),
            )
            assert stats == Stats(nfe=40 * stages, accepted=40)


@pytest.mark.parametrize("method", [*ADAPTIVE, *[m for m in FIXED if m not in MULTISTEP]])
def test_a_tableau_is_consistent(method):
    table = tableau(method)
    assert sum(table.weights) == pytest.approx(1, abs=1e-14)
    assert sum(table.error) == pytest.approx(0, abs=1e-14)
    for node, row in zip(table.nodes, table.stages, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-12)
    assert table.reuses_last == (method in ("dopri5", "dopri8", "bosh3"))


def test_the_docs_table_has_every_method_with_its_options():
    page = Path(__file__).parents[1] / "docs" / "solvers.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    for method in METHODS:
        (row,) = [row for row in rows if f"`{method}`" in row.split("|")[1]]
        assert ("adaptive" in row.split("|")[2]) == (method not in FIXED)
        names = ["adaptive"] if method in ADAPTIVE else options_of(method)
        assert all(name in row.split("|")[5] for name in names)


def test_options_reach_the_method():
    def steps(**arguments):
        rhs = lambda t, state: (torch.cos(9 * t) * state[0],)  # noqa: E731
        return integrate(rhs, (torch.ones(2).double(),), UNIT, Solver(**arguments))[1]

    for gradient in ("adjoint", "checkpoint"):
        short = steps(options={"max_step": 0.01}, gradient=gradient)
        assert 100 <= short.accepted <= 102
        assert short.nfe >= steps(gradient=gradient).nfe * 3
        first = steps(options={"first_step": 0.02}, gradient=gradient)
        assert first.nfe % 6 == 1  # no evaluations to choose the first step
    assert "first_step" in options_of("dopri5")
    assert steps(method="scipy_solver", options={"solver": "LSODA", "max_step": 0.01}).nfe > 100
    assert steps(method="implicit_adams", options={"max_order": 5}).accepted == 40
    assert steps(method="rk4", options={"perturb": True}).accepted == 40


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]])
def test_a_jump_is_met_where_it_is(times):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    rhs = lambda t, state: (torch.where(t < 0.3, 1.0, -2.0) * state[0],)  # noqa: E731
    sign = 1 if times[1] > times[0] else -1
    exact = math.exp(sign * (0.3 - 1.4))
    for options in ({}, {"jump_t": [0.3]}, {"jump_t": [0.3], "step_t": [0.6]}):
        solver = Solver(rtol=1e-8, atol=1e-8, options=options)
        with count_nfe() as nfe:
            (y,), _ = integrate(rhs, (x,), torch.tensor(times).double(), solver)
            (slope,) = torch.autograd.grad(y[-1].sum(), x)
        bound = 1e-7 if options else 1e-5
        assert (y[-1] / exact - 1).abs().max() < bound
        assert (slope / exact - 1).abs().max() < bound
        assert (nfe.rejected <= 2) == bool(options)


# --- the error norm ---------------------------------------------------------------------------


def test_the_norm_per_sample_bounds_the_one_hard_sample():
    rate = torch.zeros(200, 1).double()
    rate[17] = 12.0

    def rhs(t, state):
        return torch.cos(9 * t) * rate * state[0], state[0].sum(-1) * 0

    state = (torch.ones(200, 2).double(), torch.zeros(200).double())
    exact = torch.exp(rate * math.sin(9.0) / 9)
    errors, work = {}, {}
    for gradient in ("adjoint", "checkpoint"):
        for norm in ("batch", "sample"):
            solver = Solver(norm=norm, gradient=gradient)
            (x, _), stats = integrate(rhs, state, UNIT, solver)
            alone, counted = integrate(
                lambda t, s: (torch.cos(9 * t) * 12.0 * s[0],), (state[0][17],), UNIT,
                Solver(norm="batch", gradient=gradient),
            )  # fmt: skip
            errors[norm] = float((x[-1] - exact).abs().max())
            work[norm] = stats.nfe
            if norm == "sample":
                # the easy samples do not dilute: the same steps as the hard one alone
                assert stats == counted
                assert torch.allclose(x[-1, 17], alone[0][-1], atol=1e-12)
        assert errors["sample"] < errors["batch"] / 5
        assert work["sample"] > work["batch"]


def test_a_part_can_be_kept_out_of_the_norm():
    def rhs(t, state):
        return -state[0], torch.cos(50 * t).expand_as(state[1])

    state = (torch.ones(3, 2).double(), torch.zeros(3).double())
    for gradient in ("adjoint", "checkpoint"):
        solver = Solver(gradient=gradient)
        (x, _), stats = integrate(rhs, state, UNIT, solver, in_norm=(True, False))
        _, both = integrate(rhs, state, UNIT, solver)
        _, alone = integrate(lambda t, s: (-s[0],), state[:1], UNIT, solver)
        assert stats == alone
        assert both.nfe > 2 * stats.nfe
        assert torch.allclose(x[-1], torch.tensor(math.exp(-1)).double(), atol=1e-5)


# --- nothing to do ----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_an_empty_batch_returns_at_once(method, gradient):
    if (method, gradient) in {("scipy_solver", "backprop"), ("scipy_solver", "checkpoint")}:
        pytest.skip("refused")
    x, rate = torch.ones(0, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    with count_nfe() as nfe:
        (y, log_det), stats = integrate(
            lambda t, state: (rate * state[0], state[1]),
            (x, torch.zeros(0)),
            torch.tensor([0.0, 0.5, 1.0]),
            Solver(method, gradient=gradient),
            (rate,),
        )
    assert y.shape == (3, 0, 3)
    assert log_det.shape == (3, 0)
    assert stats == Stats()
    assert nfe.solves == 1
    y.sum().backward()
    assert x.grad.shape == (0, 3)
    assert rate.grad == 0


def test_equal_times_return_the_state():
    x = torch.randn(4, 3, requires_grad=True)
    rhs = lambda t, state: (state[0] * math.nan,)  # noqa: E731
    for times in ([0.5], [0.5, 0.5], [1.0, 1.0, 1.0]):
        (y,), stats = integrate(rhs, (x,), torch.tensor(times), Solver())
        assert torch.equal(y, x.expand(len(times), 4, 3))
        assert stats.nfe == 0
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope, torch.full_like(x, len(times)))


def test_no_batch_axes_and_no_axes_at_all():
    for shape in ((), (3,), (2, 1, 3)):
        (y,), _ = integrate(
            lambda t, state: (-state[0],), (torch.ones(shape),), torch.tensor([0.0, 1.0]), Solver()
        )
        assert y.shape == (2, *shape)
        assert torch.allclose(y[-1], torch.tensor(math.exp(-1)), atol=1e-5)


# --- counting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_recorder_counts_what_is_evaluated(method, gradient):
    calls = 0

    def rhs(t, state):
        nonlocal calls
        calls += 1
        return (torch.cos(9 * t) * rate * state[0],)

    rate = torch.tensor(1.5, requires_grad=True)
    with count_nfe() as outer:
        with count_nfe() as nfe:
            (y,), stats = integrate(
                rhs, (torch.ones(3),), torch.tensor([0.0, 1.0]), Solver(method, gradient=gradient),
                (rate,), name="block",
            )  # fmt: skip
        assert nfe.forward == stats.nfe == calls
        assert nfe.accepted == stats.accepted > 0
        # the solve reports to its recorders after they were left, and from another thread
        with ThreadPoolExecutor(1) as pool:
            pool.submit(y[-1].sum().backward).result()
        integrate(rhs, (torch.ones(3),), torch.tensor([0.0, 1.0]), Solver(method), name="other")
    assert nfe.backward == outer.backward
    assert (nfe.backward == 0) == (gradient == "backprop")
    assert outer.forward + outer.backward == calls
    assert nfe.solves == 1
    assert outer.solves == 2
    assert set(outer.blocks) == {"block", "other"}
    assert outer.blocks["block"].backward == nfe.backward
    assert outer.forward == sum(work.forward for work in outer.blocks.values())


def test_without_a_recorder_nothing_is_left_behind():
    with count_nfe() as nfe:
        pass
    integrate(lambda t, s: (-s[0],), (torch.ones(3),), torch.tensor([0.0, 1.0]), Solver())
    assert nfe.forward == nfe.solves == 0


def test_failed_solves_are_counted():
    with count_nfe() as nfe, pytest.raises(RuntimeError):
        integrate(lambda t, s: (s[0] * math.nan,), (torch.ones(3),), UNIT.float(), Solver())
    assert nfe.forward > 0


def test_it_runs_in_inference_mode():
    with torch.inference_mode():
        for gradient in ("adjoint", "backprop", "checkpoint"):
            (y,), _ = integrate(
                lambda t, s: (-s[0],),
                (torch.ones(3),),
                torch.tensor([0.0, 1.0]),
                Solver(gradient=gradient),
            )
            assert torch.allclose(y[-1], torch.tensor(math.exp(-1)), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
def test_it_runs_on_a_gpu(gradient):
    x = torch.ones(3, device="cuda", requires_grad=True)
    with count_nfe() as nfe:
        (y,), _ = integrate(
            lambda t, s: (-s[0],), (x,), torch.tensor([0.0, 1.0]), Solver(gradient=gradient)
        )
    y[-1].sum().backward()
    assert y.device == x.device
    assert torch.allclose(x.grad, torch.tensor(math.exp(-1)).cuda(), atol=1e-5)
    assert (nfe.backward == 0) == (gradient == "backprop")
