"""Scalar maps: values and log-derivatives given parameters, and their numeric inversion."""

from cnf.bijections.affine import Additive, Affine
from cnf.bijections.base import InversionError, Inverted, ScalarMap, invert
from cnf.bijections.rational_quadratic import RationalQuadratic

__all__ = [
    "Additive",
    "Affine",
    "InversionError",
    "Inverted",
    "RationalQuadratic",
    "ScalarMap",
    "invert",
]
