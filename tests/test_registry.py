"""Names: builders that remember their arguments, records that encode themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cnf.registry import Recipe, Registry, UnknownNameError, decode, encode, record


class Built:
    """What a builder returns."""

    recipe: Recipe


def builder_in(module: str, name: str = "thing"):
    def thing(size: int, *, scale: float = 1.0) -> Built:
        return Built()

    thing.__module__, thing.__qualname__, thing.__name__ = module, name, name
    return thing


def test_a_recipe_holds_every_resolved_argument():
    things: Registry[Built] = Registry("thing")
    build = things.register(paper="A paper")(builder_in("a"))
    assert build(3).recipe == Recipe("thing", {"size": 3, "scale": 1.0})
    assert things["thing"].paper == "A paper"
    numpys = build(np.int64(3), scale=np.float32(0.5)).recipe.arguments
    assert [type(value) for value in numpys.values()] == [int, float]


def test_a_name_belongs_to_one_builder():
    things: Registry[Built] = Registry("thing")
    things.register()(builder_in("package.a"))
    with pytest.raises(ValueError, match="a thing named 'thing' is registered already"):
        things.register()(builder_in("package.b"))


def test_a_module_may_be_imported_again():
    things: Registry[Built] = Registry("thing")
    things.register()(builder_in("package.a"))
    again = things.register()(builder_in("package.a"))
    assert things["thing"].build is again
    # a test runner's name for the same file
    third = things.register()(builder_in("a"))
    assert things["thing"].build is third
    assert len(things) == 1


def test_a_builder_names_its_arguments():
    things: Registry[Built] = Registry("thing")

    def anything(**options: float) -> Built:
        return Built()

    with pytest.raises(TypeError, match="anything: a builder names its arguments"):
        things.register()(anything)


def test_an_unknown_name_suggests_the_nearest():
    things: Registry[Built] = Registry("thing")
    things.register()(builder_in("a"))
    with pytest.raises(UnknownNameError, match="Did you mean 'thing'"):
        things["thinq"]


@record
@dataclasses.dataclass(frozen=True)
class Place:
    """A record of this file."""

    x: float
    shape: tuple[int, ...] = ()


def test_records_are_written_and_read():
    place = Place(1.5, (2, 3))
    assert decode(encode({"at": [place, None]})) == {"at": [place, None]}
    assert record(Place) is Place


def test_a_record_of_another_place_is_refused():
    other = dataclasses.make_dataclass("Place", [("x", float)], frozen=True)
    other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="a record named 'Place' is registered already"):
        record(other)


def test_what_is_no_record_is_refused():
    with pytest.raises(TypeError, match="a record is a frozen dataclass"):
        record(dataclasses.make_dataclass("Loose", ["x"]))
    with pytest.raises(TypeError, match=r"where\[0\] is a object"):
        encode([object()], "where")
