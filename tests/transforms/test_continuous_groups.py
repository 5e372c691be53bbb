"""Large batches, which a continuous flow solves in groups."""

import dataclasses

import pytest
import torch
from torch import nn

import cnf
from cnf.costs import JacobianNorm, KineticEnergy
from cnf.nets import TimeMLP
from cnf.ode import NonFiniteState, Solver, count_nfe
from cnf.transforms import Continuous, Request

GRADIENTS = ("adjoint", "backprop", "checkpoint")
DIVERGENCES = (cnf.Exact(), cnf.Hutchinson(3), cnf.HutchPlusPlus(2, 1))
KINDS = [type(divergence).__name__ for divergence in DIVERGENCES]


def transform(solver, features=3, context_features=0):
    """A small flow that goes somewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = TimeMLP(features, (8, 8), context_features=context_features).double()
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.6)
    return Continuous(field, solver=solver)


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def found(flow, z, context, request=Request):
    """Everything that a training step computes, and its evaluations."""
    z = z.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    flow.zero_grad()
    asked = request(generator=torch.Generator().manual_seed(2))
    with count_nfe() as nfe:
        x, log_det, costs = flow(z, context, asked)
        (x.sum() + log_det.square().sum() + sum(cost.sum() for cost in costs.values())).backward()
    grads = [z.grad, *[parameter.grad for parameter in flow.parameters()]]
    return [x, log_det, *costs.values(), *grads, *([] if context is None else [context.grad])], nfe


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=KINDS)
@pytest.mark.parametrize("batch", [(7,), (2, 4), (1, 3, 2)])
def test_groups_find_what_the_whole_batch_does(gradient, divergence, batch):
    solver = Solver(rtol=1e-8, atol=1e-8, gradient=gradient)
    z, context = points(*batch, 3), points(*batch, 2)
    costs = (KineticEnergy(), JacobianNorm())

    def request(generator):
        return Request(divergence, costs=costs, generator=generator)

    whole, _ = found(transform(solver, 3, 2), z, context, request)
    grouped, _ = found(transform(dataclasses.replace(solver, rows=3), 3, 2), z, context, request)
    for mine, wanted in zip(grouped, whole, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)


def test_each_group_is_a_solve_of_its_own():
    z = points(10, 3)
    flow = transform(Solver(rows=4))
    parts = [flow(part) for part in z.tensor_split(3)]
    x, log_det, _ = flow(z)
    assert torch.equal(x, torch.cat([part.value for part in parts]))
    assert torch.equal(log_det, torch.cat([part.log_det for part in parts]))
    # and no other: one step size for all would have given other numbers
    assert not torch.equal(x, transform(Solver())(z).value)


def test_the_variance_of_an_estimate_is_each_samples_own():
    def request(generator):
        return Request(cnf.Hutchinson(4), variance=True, generator=generator)

    z = points(9, 3)
    whole, _ = found(transform(Solver(rtol=1e-8, atol=1e-8)), z, None, request)
    grouped, _ = found(transform(Solver(rtol=1e-8, atol=1e-8, rows=2)), z, None, request)
    assert grouped[2].shape == (9,)
    assert grouped[2].min() > 0
    torch.testing.assert_close(grouped[:3], whole[:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_groups_count_as_one_solve(gradient):
    solver = Solver(rtol=1e-9, atol=1e-9, gradient=gradient)
    # samples far from the origin need other steps than those near it
    z = points(6, 3) * torch.tensor([0.1, 0.1, 0.1, 9.0, 9.0, 9.0]).unsqueeze(1)
    groups = [found(transform(solver), part, None)[1] for part in z.tensor_split(2)]
    _, nfe = found(transform(dataclasses.replace(solver, rows=3)), z, None)
    assert groups[0].forward != groups[1].forward
    assert nfe.solves == 1
    for name in ("forward", "backward", "accepted", "rejected"):
        assert getattr(nfe, name) == max(getattr(group, name) for group in groups)
    assert nfe.blocks[""].forward == nfe.forward


def test_counts_of_nested_recorders_and_of_two_backward_passes_add_up():
    flow, z = transform(Solver(rows=2)), points(6, 3)
    with count_nfe() as outer:
        flow(z)
        with count_nfe() as inner:
            log_det = flow(z).log_det.sum()
    assert outer.solves == 2
    assert inner.solves == 1
    assert outer.forward == 2 * inner.forward
    log_det.backward(retain_graph=True)
    once = inner.backward
    log_det.backward()
    assert once > 0
    assert inner.backward == 2 * once == outer.backward


class Mean(nn.Module):
    """A velocity that depends on the whole batch."""

    def __init__(self, couples_batch=None):
        super().__init__()
        if couples_batch is not None:
            self.couples_batch = couples_batch

    def forward(self, t, x, context=None):
        return x.mean(0, keepdim=True).expand_as(x) - x


def test_a_field_that_may_couple_samples_has_all_of_them():
    z, request = points(8, 2), Request(log_det=False)
    together = [
        Continuous(Mean(said), solver=Solver(rows=rows))(z, request=request).value
        for said, rows in ((None, 3), (True, 3), (None, None))
    ]
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1], together[2])
    apart = Continuous(Mean(False), solver=Solver(rows=3))(z, request=request).value
    assert not torch.allclose(apart, together[2])


def test_a_context_for_all_samples_at_once_keeps_them_together():
    flow, z = transform(Solver(rows=3), 3, 2), points(8, 3)
    x = flow(z, points(1, 2)).value
    assert torch.equal(x, transform(Solver(), 3, 2)(z, points(1, 2)).value)


def test_a_group_that_fails_is_an_error():
    z = points(6, 3)
    z[5, 0] = torch.nan
    with count_nfe() as nfe, pytest.raises(NonFiniteState, match="initial state"):
        transform(Solver(rows=3))(z)
    assert nfe.forward > 0


def test_empty_and_single_batches():
    flow = transform(Solver(rows=3))
    assert flow(points(0, 3)).log_det.shape == (0,)
    assert flow(points(3)).log_det.shape == ()


def test_how_many_are_together_when_nobody_says():
    cpu, gpu, threads = torch.device("cpu"), torch.device("cuda"), torch.get_num_threads()
    assert Solver().rows_together(cpu) == 4096 * threads
    assert Solver(compile=True).rows_together(cpu) == 1024 * threads
    assert Solver().rows_together(gpu) is None
    assert Solver(rows=5).rows_together(cpu) == Solver(rows=5).rows_together(gpu) == 5


@pytest.mark.parametrize("rows", [0, -1, 2.5])
def test_rows_is_a_positive_integer(rows):
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        Solver(rows=rows)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_groups_share_their_code(gradient):
    def request(generator):
        return Request(cnf.Hutchinson(3), generator=generator)

    plain = Solver(rows=7, rtol=1e-8, atol=1e-8, gradient=gradient)
    compiled = transform(dataclasses.replace(plain, compile="eager"), 3, 2)
    # numbers of samples that are no other size of the net or of the solve
    for batch, known in ((20, False), (26, True)):
        z, context = points(batch, 3), points(batch, 2)
        wanted, _ = found(transform(plain, 3, 2), z, context, request)
        with torch._dynamo.config.patch(error_on_recompile=known):
            mine, _ = found(compiled, z, context, request)
        for one, other in zip(mine, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
