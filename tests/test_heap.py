"""What glibc is told about freed memory."""

import ctypes

import pytest
import torch

from cnf.ode import Solver, heap, integrate


@pytest.fixture
def told(monkeypatch):
    """What an allocator is told, as if for the first time."""
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter, value):
            calls.append((parameter, value))

    for name in heap.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    heap.keep_freed.cache_clear()
    yield calls
    heap.keep_freed.cache_clear()


def test_the_first_solve_tells_it_once(told):
    times = torch.tensor([0.0, 1.0])
    for _ in range(2):
        integrate(
            lambda t, state: (-state[0],), (torch.ones(2),), times, Solver(gradient="checkpoint")
        )
    assert told == [(heap.TRIM_THRESHOLD, heap.KEPT), (heap.MMAP_THRESHOLD, heap.KEPT)]


@pytest.mark.parametrize("name", heap.CHOSEN)
def test_what_somebody_chose_stays(told, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    heap.keep_freed()
    assert told == []


@pytest.mark.parametrize("library", [object(), OSError("no such library"), TypeError("no name")])
def test_other_allocators_are_left_alone(told, monkeypatch, library):
    def found(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", found)
    heap.keep_freed()
    assert told == []
