"""``torch.compile`` as this package calls it, and how its code likes numbers to lie."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cnf import onednn

T = TypeVar("T")

# a loop's body is part of what torch's cache on disk goes by, but has to be said to be
CACHED = {"torch.ops.higher_order.while_loop": torch.__version__}
# how many kinds of arguments a function is compiled for
VARIANTS = 64
# modes that take CUDA graphs, where there is CUDA
GRAPHED = ("reduce-overhead", "max-autotune")


def compiled(
    function: Callable[..., T],
    *,
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    whole: bool = False,
    constants: bool = False,
    native: bool = False,
) -> Callable[..., T]:
    """A function as compiled code of its own; the first call of each variant pays for it.

    Beyond so many variants it runs uncompiled, or with ``whole`` is an error. Tensors reach it row
    by row, because each way to lie would be a variant.

    Without the C++ compiler that Inductor needs it is the function itself, with a warning.

    Args:
        function: what to compile.
        backend: as in ``torch.compile``.
        mode: as in ``torch.compile``.
        dynamic: as in ``torch.compile``.
        whole: raise where torch would compile around what it cannot follow.
        constants: make Python's floats part of the code: faster, and each new value compiles again.
        native: have Inductor call its kernels from C++ as well, which pays where they are short.
    """
    if backend == "inductor" and not has_compiler():
        warnings.warn(
            "torch.compile finds no C++ compiler, so nothing is compiled; install g++ or clang, or "
            "name one in the environment variable CXX",
            stacklevel=2,
        )
        return function
    if native:
        # what is called from C++ by a longer way is right, and nobody can do anything about it
        logging.getLogger("torch._inductor.ir").addFilter(_worth_saying)
    known = inspect.signature(torch.compile).parameters
    wanted: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": VARIANTS}
    limits = {name: value for name, value in wanted.items() if name in known}
    telling: dict[str, Any] = {"mode": mode}
    if backend == "inductor" or mode is None:
        # torch takes a mode or options
        telling = {"options": _options(backend, mode, native)}
    run = torch.compile(
        function, fullgraph=whole, backend=backend, dynamic=dynamic, **telling, **limits
    )

    if mode in GRAPHED and torch.cuda.is_available():
        run = _kept(run)

    told: set[Any] = set()

    @functools.wraps(function)
    def call(*arguments: Any) -> T:
        arguments = tuple(
            value.contiguous() if isinstance(value, Tensor) else value for value in arguments
        )
        # to tell a compiler takes as long as a layer does, and what is compiled needs no telling
        kind = None if whole else _kind(arguments)
        if kind in told or _settled(constants):
            return run(*arguments)
        with settings(constants):
            result = run(*arguments)
        if kind is not None:
            told.add(kind)
        return result

    return call


def _worth_saying(record: logging.LogRecord) -> bool:
    return "missing a c-shim" not in str(record.msg)


def _kind(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells a call from those that other code is compiled for, if there is no more to it."""
    looks = [
        (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        if isinstance(value, Tensor)
        else id(value)
        for value in arguments
    ]
    return torch.is_grad_enabled(), *looks


def _options(backend: str, mode: str | None, native: bool) -> dict[str, Any]:
    """What a compiler is told with a function, whenever it compiles a part of it."""
    options: dict[str, Any] = {}
    if backend == "inductor":
        wanted = {
            # a product and a sum as one instruction: a third off a kernel with a tanh in it
            "cpp.enable_floating_point_contract_flag": "fast",
            # what it makes of a program need not be checked to fit together, call by call
            "size_asserts": False,
            "unsafe_marked_cacheable_functions": CACHED,
            "cpp_wrapper": native,
            # kernels apart from what calls them: a quarter off the time that compiling takes
            "cpp_wrapper_build_separate": native,
            "post_grad_custom_post_pass": _rewriting(),
        }
        known = torch._inductor.list_options()
        options = {name: value for name, value in wanted.items() if name in known}
        options |= torch._inductor.list_mode_options(mode) if mode else {}
    if hasattr(torch._dynamo.types, "GuardFilterEntry"):  # not before torch 2.7
        options["guard_filter_fn"] = _changeable
    return options


def _rewriting() -> Any:
    """What Inductor does with a graph last: what it is told to, or products the fast way."""
    told = torch._inductor.config.post_grad_custom_post_pass
    if told is not None or not onednn.blocks_pay():
        return told
    from cnf.brgemm import Rewriting

    return Rewriting()


def _changeable(guards: Sequence[Any]) -> list[bool]:
    """Which guards are worth a look at every call: not those of what this package's modules hold.

    The names of its functions alone are a hundred.
    """
    return [not guard.name.startswith("G['__import_cnf_dot_") for guard in guards]


@contextlib.contextmanager
def settings(constants: bool = False) -> Iterator[None]:
    """What compilers are to be told while code runs that was made with ``constants``, as they were.

    Every compiled function says so for itself; around many calls, once takes less time.
    """
    wanted = _wanted(constants)
    before = [getattr(config, name) for config, name, _ in wanted]
    with contextlib.ExitStack() as stack:
        for (config, name, value), old in zip(wanted, before, strict=True):
            # torch's own ``patch`` takes several times as long
            setattr(config, name, value)
            stack.callback(setattr, config, name, old)
        # a compiler hides its warnings of its own making from people, but not from filters that
        # turn warnings into errors: looks at ``.grad``, calls of what torch will soon do without,
        # the graph without nodes that torch captures first of all
        if any(action == "error" for action, *_ in warnings.filters):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        yield


@functools.cache
def _wanted(constants: bool) -> list[tuple[Any, str, bool]]:
    """Where compilers look for what they are to be told, if they know of it."""
    from torch.fx.experimental import _config as shapes

    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    known = [
        (dynamo, "trace_autograd_ops", True),
        (dynamo, "specialize_float", constants),
        # or else a batch of as many samples as something else is long makes code for itself alone
        (shapes, "use_duck_shape", False),
        # torch's name for keeping on disk what it made of a function with a derivative of its own,
        # such as the rational tanh: or else it compiles such code again in every process
        (functorch, "autograd_cache_allow_custom_autograd_functions", True),
    ]
    return [setting for setting in known if hasattr(*setting[:2])]


def _settled(constants: bool) -> bool:
    config = torch._dynamo.config
    told = getattr(config, "trace_autograd_ops", False)
    return told and config.specialize_float is constants


def realized(values: Tensor) -> Tensor:
    """The same numbers, which a compiler computes here and not again wherever they are used.

    Views by strides are of memory only.
    """
    return values.as_strided(values.shape, values.stride())


def expm1(values: Tensor) -> Tensor:
    """Eˣ − 1, also of small numbers, which Inductor's own loses on CPUs.

    Example:
        >>> expm1(torch.tensor(0.0))
        tensor(0.)
    """
    if not torch.compiler.is_compiling():
        return torch.expm1(values)
    return torch.tanh(values / 2) * (torch.exp(values) + 1)


def by_columns(points: Tensor) -> bool:
    """Whether this is compiled for a CPU without a gradient: fastest with samples as columns.

    Products of matrices are faster so, a bias costs no pass of its own, and the features of a part
    and the parameters of a kind lie side by side.
    """
    plain = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return plain and points.device.type == "cpu"


def in_columns(points: Tensor) -> Tensor:
    """Points ``(rows, features)`` with each feature's numbers side by side, where that pays."""
    if points.dim() != 2 or not by_columns(points):
        return points
    return realized(points.t().contiguous()).t()


def _kept(run: Callable[..., T]) -> Callable[..., T]:
    """A function whose results stay what they are: the next replay of a graph overwrites them."""

    def keeping(*arguments: Any) -> T:
        if not torch.is_grad_enabled():  # what waits for its backward pass torch looks after itself
            torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(torch.Tensor, torch.Tensor.clone, run(*arguments))

    return keeping


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
