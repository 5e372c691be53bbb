"""Names to builders, and frozen records that turn into JSON and back.

The registry knows nothing of what it holds: a builder is a function whose resolved arguments are
remembered on what it returns, a record is a frozen dataclass that encodes its own fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import numpy as np

T = TypeVar("T")
B = TypeVar("B", bound=Callable[..., Any])


class UnknownNameError(KeyError, ValueError):
    """A name that no entry carries; the message lists what there is."""

    def __str__(self) -> str:
        """The message alone: ``KeyError`` would quote it."""
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to build something again: a builder's name and every argument it was given."""

    builder: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered builder and what is said of it."""

    name: str
    build: Callable[..., T]
    paper: str
    objective: str
    family: str

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


class Registry(Mapping[str, Entry[T]], Generic[T]):
    """Builders by name.

    ``register`` decorates a builder: a function with explicit keywords. What it returns receives a
    ``recipe`` attribute with every resolved argument, which is what saving writes down.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(
        self, *, paper: str = "", objective: str = "likelihood", family: str = ""
    ) -> Callable[[B], B]:
        """Enter the decorated builder under its own name.

        Args:
            paper: the paper that the defaults come from.
            objective: the name of the objective that the paper trains with.
            family: a heading for tables (``"continuous"``, ``"coupling"``, …).
        """

        def decorate(builder: B) -> B:
            name = builder.__name__
            if name in self._entries and not _again(self._entries[name].build, builder):
                raise ValueError(f"a {self.kind} named {name!r} is registered already")
            signature = inspect.signature(builder)
            for parameter in signature.parameters.values():
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    raise TypeError(
                        f"{name}: a builder names its arguments, {parameter} cannot be recorded"
                    )

            @functools.wraps(builder)
            def build(*args: Any, **kwargs: Any) -> Any:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                # numbers that come from an array's shape or statistics are NumPy's
                for argument, value in bound.arguments.items():
                    if isinstance(value, np.generic):
                        bound.arguments[argument] = value.item()
                built = builder(*bound.args, **bound.kwargs)
                built.recipe = Recipe(name, dict(bound.arguments))
                return built

            self._entries[name] = Entry(name, build, paper, objective, family)
            return build  # type: ignore[return-value]

        return decorate

    def __getitem__(self, name: str) -> Entry[T]:
        """The entry of that name.

        Raises:
            UnknownNameError: if there is none; the message lists the names and the nearest one.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _again(known: Any, new: Any) -> bool:
    """Whether both come from one place: a module that is reloaded, or imported twice by a runner.

    A runner may give the second import a name of its own, but not another last part.
    """
    modules = [thing.__module__.rpartition(".")[2] for thing in (known, new)]
    return modules[0] == modules[1] and known.__qualname__ == new.__qualname__


def unknown_name(kind: str, name: str, known: Mapping[str, Any]) -> UnknownNameError:
    """The error for a name that is not among ``known``, with the nearest one suggested."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"no {kind} is called {name!r}.{hint} Known: {', '.join(known)}")


MODELS: Registry[Any] = Registry("model")

_RECORDS: dict[str, type] = {}


def record(cls: type[T]) -> type[T]:
    """Let a frozen dataclass be written into a recipe and read back by ``encode``/``decode``."""
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__}: a record is a frozen dataclass")
    known = _RECORDS.get(cls.__name__)
    if known is not None and not _again(known, cls):
        raise ValueError(f"a record named {cls.__name__!r} is registered already")
    _RECORDS[cls.__name__] = cls
    return cls


def encode(value: Any, where: str = "value") -> Any:
    """Turn an argument into what JSON can hold.

    >>> encode({"hidden": (64, 64)})
    {'hidden': {'tuple': [64, 64]}}

    Raises:
        TypeError: if ``value`` holds something that is neither plain data nor a record.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where}: the keys of a mapping must be strings to be saved")
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        fields = {
            field.name: encode(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(cast("Any", value))
            if field.init
        }
        return {"record": name, "fields": fields}
    raise TypeError(
        f"{where} is a {name}, which cannot be written as data. Write the numbers alone and "
        "build it again in code: flow.save(dir, recipe=False) and cnf.load(dir, into=flow)"
    )


def decode(data: Any) -> Any:
    """Undo ``encode``; only registered records are ever constructed.

    >>> decode(encode((1, "a", None)))
    (1, 'a', None)
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if isinstance(data, Mapping):
        if data.keys() == {"tuple"}:
            return tuple(decode(item) for item in data["tuple"])
        if data.keys() == {"record", "fields"}:
            if data["record"] not in _RECORDS:
                raise unknown_name("record", data["record"], _RECORDS)
            return _RECORDS[data["record"]](**decode(data["fields"]))
        return {key: decode(item) for key, item in data.items()}
    return data
