"""torchdyn's continuous flow, asked over a pipe: it lives in an environment of its own.

It brings a training framework along and wants a torchvision that need not fit torch, so that the
``bench`` extra leaves it out::

    python -m venv ENV
    ENV/bin/pip install -c constraints.txt -e . torchcde torchsde pytorch-lightning
    ENV/bin/pip install --no-deps torchdyn
    python -m benchmarks continuous --torchdyn ENV/bin/python

Run as a program, this module is the process that answers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.continuous import Found, Step, torch_step
from benchmarks.reference import Net


class Torchdyn:
    """A net in the other process, with the numbers of one here.

    Args:
        python: the environment's interpreter.
        net: the velocity from t = 0 (base) to t = 1 (data).
    """

    def __init__(self, python: str, net: Net):
        self.pipe = _pipe(python)
        sizes = [layer.linear.in_features for layer in net.layers]
        self.place = self.pipe.ask("take", sizes[0], sizes[1:], net.state_dict())

    def step(self, x: Tensor, tolerance: float, probe: Tensor | None) -> Step:
        """A likelihood training step."""
        place = self.pipe.ask("prepare", self.place, x, tolerance, probe)
        call, look = (functools.partial(self.pipe.ask, name, place) for name in ("call", "look"))
        return Step(call, look)

    def log_prob(self, x: Tensor, tolerance: float) -> Any:
        """Log-densities with the exact trace."""
        return self.pipe.ask("log_prob", self.place, x, tolerance)

    def decode(self, z: Tensor, tolerance: float) -> Any:
        """The data of latent z."""
        return self.pipe.ask("decode", self.place, z, tolerance)

    def work(self, what: str, points: Tensor, tolerance: float) -> int:
        """How many evaluations one of the two takes."""
        return self.pipe.ask("work", self.place, what, points, tolerance)


@functools.cache
def _pipe(python: str) -> _Pipe:
    return _Pipe(python)


class _Pipe:
    """The process that answers; it ends with this one's end of the pipe."""

    def __init__(self, python: str):
        command = [python, "-W", "ignore", "-m", __name__, str(torch.get_num_threads())]
        with contextlib.ExitStack() as ending:
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                ending.enter_context(process)  # closes the pipe, and waits
                self.requests, self.answers = cast(Any, process.stdin), cast(Any, process.stdout)
                self.version: str = pickle.load(self.answers)
            except (OSError, EOFError) as error:
                raise SystemExit(
                    f"--torchdyn: {python} does not run torchdyn; how its environment is made "
                    "stands in benchmarks/peers_torchdyn.py"
                ) from error
            atexit.register(ending.pop_all().close)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have a method called there."""
        pickle.dump((method, arguments), self.requests)
        self.requests.flush()
        return pickle.load(self.answers)


def version(python: str) -> str:
    """Which torchdyn an interpreter has."""
    return _pipe(python).version


class _Served:
    """What can be asked for; nets and steps are known by their places."""

    def __init__(self) -> None:
        self.nets: list[Net] = []
        self.steps: list[Step] = []

    def take(self, features: int, hidden: Sequence[int], numbers: dict[str, Tensor]) -> int:
        net = Net(features, hidden)
        net.load_state_dict(numbers)
        self.nets.append(net)
        return len(self.nets) - 1

    def prepare(self, place: int, x: Tensor, tolerance: float, probe: Tensor | None) -> int:
        net = self.nets[place]
        log_prob = _log_prob(net, tolerance, probe)
        self.steps.append(torch_step(net, net, lambda: log_prob(x)))
        return len(self.steps) - 1

    def call(self, place: int) -> object:
        return self.steps[place].call()

    def look(self, place: int) -> Found:
        return self.steps[place].look()

    @torch.no_grad()
    def log_prob(self, place: int, x: Tensor, tolerance: float) -> Tensor:
        return _log_prob(self.nets[place], tolerance, None)(x)

    @torch.no_grad()
    def decode(self, place: int, z: Tensor, tolerance: float) -> Tensor:
        field = _Timed(self.nets[place], backwards=False)
        return _solver(field, tolerance)(z)[-1]

    def work(self, place: int, what: str, points: Tensor, tolerance: float) -> int:
        evaluate = getattr(self, what)
        return self.nets[place].calls_of(lambda: evaluate(place, points, tolerance))


class _Timed(nn.Module):
    """A net whose time torchdyn sets, from the base to the data or backwards."""

    def __init__(self, net: Net, *, backwards: bool):
        super().__init__()
        self.net, self.backwards = net, backwards
        self.t = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return -self.net(1 - self.t, x) if self.backwards else self.net(self.t, x)


class _Given:
    """A distribution that always gives the same probe."""

    def __init__(self, probe: Tensor):
        self.probe = probe

    def sample(self, shape: Sequence[int]) -> Tensor:
        return self.probe


def _solver(field: nn.Module, tolerance: float) -> nn.Module:
    from torchdyn.core import NeuralODE

    tolerances = dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), tolerance)
    return NeuralODE(
        field, solver="dopri5", sensitivity="adjoint", return_t_eval=False, **tolerances
    )


def _log_prob(net: Net, tolerance: float, probe: Tensor | None) -> Callable[[Tensor], Tensor]:
    from torchdyn.models import CNF
    from torchdyn.models.cnf import autograd_trace, hutch_trace

    field = _Timed(net, backwards=True)
    trace = autograd_trace if probe is None else hutch_trace
    noise = None if probe is None else _Given(probe)
    solver = _solver(CNF(field, trace_estimator=trace, noise_dist=noise), tolerance)

    def log_prob(x: Tensor) -> Tensor:
        end = solver(torch.cat([x.new_zeros(len(x), 1), x], 1))[-1]
        change, z = end[:, 0], end[:, 1:]
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) - change

    return log_prob


def main() -> None:
    """Answer until nobody asks any more."""
    from importlib.metadata import version

    import torchdyn.core  # noqa: F401

    torch.set_num_threads(int(sys.argv[1]))
    served, requests, answers = _Served(), sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 what is printed is no answer
    answer: Any = version("torchdyn")
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        answer = getattr(served, method)(*arguments)


if __name__ == "__main__":
    main()
