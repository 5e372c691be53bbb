"""What can go wrong in a solve, by name, with where it happened and what usually helps."""

from __future__ import annotations


class SolverError(RuntimeError):
    """A solve that did not reach its end.

    Attributes:
        time: where the solver stood, in the velocity's time; None when it had not started.
        step: the size of the step that it was about to take; None where there is none.
        nfe: evaluations of the velocity in this pass so far.
        direction: ``"forward"``, or ``"backward"`` for the pass that computes gradients.
    """

    advice: str = ""

    def __init__(
        self,
        what: str,
        time: float | None = None,
        step: float | None = None,
        nfe: int = 0,
        direction: str = "forward",
    ):
        super().__init__(what, time, step, nfe, direction)
        self.what = what
        self.time = time
        self.step = step
        self.nfe = nfe
        self.direction = direction

    def __str__(self) -> str:
        """What happened, where, and what usually helps."""
        where = [f"{self.direction} pass"]
        if self.time is not None:
            where.append(f"t = {self.time:.6g}")
        if self.step is not None:
            where.append(f"step {self.step:.3g}")
        where.append(f"{self.nfe} evaluations so far")
        return f"{self.what} ({', '.join(where)}). {self.advice}".strip()


class NonFiniteState(SolverError):  # noqa: N818
    """NaN or infinity in the state, in the velocity or in their gradients."""

    advice = (
        "Usually the parameters diverged (lower the learning rate, clip gradients), the input was "
        "not finite, or the velocity leaves its domain (sqrt, log, a division)."
    )


class StepUnderflow(SolverError):  # noqa: N818
    """The step that the tolerance needs is too small for the clock to move."""

    advice = (
        "Usually the solution runs to infinity in finite time or the velocity jumps: use a smooth "
        "bounded activation, looser rtol and atol, float64, or Solver(fallback='rk4')."
    )


class TooManySteps(SolverError):  # noqa: N818
    """The solve needs more than ``max_steps`` steps."""

    advice = (
        "Usually the field became stiff: loosen rtol and atol, regularise it (kinetic energy, "
        "Jacobian norm), raise Solver(max_steps=...), or use Solver(fallback='rk4')."
    )


class SecondOrderGradient(RuntimeError):  # noqa: N818
    """A second derivative was asked of a gradient mode that has only first ones."""

    def __init__(self, mode: str):
        super().__init__(
            f"Solver(gradient={mode!r}) gives first derivatives only, and create_graph=True asks "
            "for more; the answer would be silently wrong. Use Solver(gradient='backprop')"
        )


class UntrackedTensor(RuntimeError):  # noqa: N818
    """The velocity depends on a tensor that requires grad and was not declared."""

    def __init__(self, shape: tuple[int, ...], mode: str):
        super().__init__(
            f"the velocity depends on a tensor of shape {shape} that requires grad and is not "
            f"among the parameters of the solve; under Solver(gradient={mode!r}) its gradient "
            "would be silently zero. Register it on the field as a parameter, pass it as context, "
            "detach it, or use Solver(gradient='backprop')"
        )


class SolverWarning(UserWarning):
    """A solve that went another way than it was asked to."""


class CompilationError(RuntimeError):
    """A velocity that the compiler cannot follow.

    Attributes:
        reason: what the compiler says.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(
            "torch.compile cannot make one piece of code of the solver's steps around this field; "
            f"say Solver(compile=False), or mend what it names: {reason}"
        )
