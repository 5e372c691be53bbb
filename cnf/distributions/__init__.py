"""Base distributions: what a flow starts from."""

from cnf.distributions.base import Base, as_shape, uniform
from cnf.distributions.independent import (
    Independent,
    Laplace,
    Logistic,
    Normal,
    StudentT,
    Uniform,
)
from cnf.distributions.mixture import Mixture, MixtureOfGaussians
from cnf.distributions.multivariate import MultivariateNormal
from cnf.distributions.resampled import Resampled
from cnf.distributions.wrapped import Transformed, Wrapped

__all__ = [
    "Base",
    "Independent",
    "Laplace",
    "Logistic",
    "Mixture",
    "MixtureOfGaussians",
    "MultivariateNormal",
    "Normal",
    "Resampled",
    "StudentT",
    "Transformed",
    "Uniform",
    "Wrapped",
    "as_shape",
    "uniform",
]
