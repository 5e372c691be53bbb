"""Scalar maps: values and log-derivatives given parameters, and their numeric inversion."""

from cnf.bijections.affine import Additive, Affine, soft_bound
from cnf.bijections.base import (
    InversionError,
    Inverted,
    NumericMap,
    ScalarMap,
    invert,
    tolerance_of,
)
from cnf.bijections.fixed import (
    Exp,
    FixedAffine,
    FixedMap,
    LeakyReLU,
    Logit,
    Power,
    Sigmoid,
    Softplus,
    Tanh,
)
from cnf.bijections.intervals import Spline
from cnf.bijections.mixture import LogisticMixture, NeuralAutoregressive
from cnf.bijections.monotone import UnconstrainedMonotone
from cnf.bijections.polynomial import Bernstein, SumOfSquares
from cnf.bijections.rational_quadratic import RationalQuadratic
from cnf.bijections.splines import CubicSpline, LinearSpline, QuadraticSpline

__all__ = [
    "Additive",
    "Affine",
    "Bernstein",
    "CubicSpline",
    "Exp",
    "FixedAffine",
    "FixedMap",
    "InversionError",
    "Inverted",
    "LeakyReLU",
    "LinearSpline",
    "LogisticMixture",
    "Logit",
    "NeuralAutoregressive",
    "NumericMap",
    "Power",
    "QuadraticSpline",
    "RationalQuadratic",
    "ScalarMap",
    "Sigmoid",
    "Softplus",
    "Spline",
    "SumOfSquares",
    "Tanh",
    "UnconstrainedMonotone",
    "invert",
    "soft_bound",
    "tolerance_of",
]
