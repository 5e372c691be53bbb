"""Maps between base and data, and what they are composed of."""

from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import Chain, Inverse, Mapped, Request, Transform
from cnf.transforms.block import BlockAutoregressive
from cnf.transforms.continuous import Continuous
from cnf.transforms.convolution import Convolution1x1
from cnf.transforms.coupling import (
    Coupling,
    alternating_mask,
    channel_mask,
    half_mask,
    random_mask,
)
from cnf.transforms.dequantize import Dequantize
from cnf.transforms.elementwise import Elementwise
from cnf.transforms.linear import (
    Diagonal,
    HouseholderLinear,
    Linear,
    LULinear,
    MatrixExponential,
    Permutation,
    QRLinear,
    Rotation,
    SVDLinear,
    Triangular,
)
from cnf.transforms.multiscale import Multiscale
from cnf.transforms.normalization import ActNorm, BatchNorm, Standardize
from cnf.transforms.pixels import Checkerboard, Squeeze
from cnf.transforms.planar import Planar, Radial, Sylvester
from cnf.transforms.residual import ExactLogDet, Residual, TruncatedLogDet, UnbiasedLogDet
from cnf.transforms.support import Interval, Simplex, SupportedStandardize, as_support

__all__ = [
    "ActNorm",
    "Autoregressive",
    "BatchNorm",
    "BlockAutoregressive",
    "Chain",
    "Checkerboard",
    "Continuous",
    "Convolution1x1",
    "Coupling",
    "Dequantize",
    "Diagonal",
    "Elementwise",
    "ExactLogDet",
    "HouseholderLinear",
    "Interval",
    "Inverse",
    "LULinear",
    "Linear",
    "Mapped",
    "MatrixExponential",
    "Multiscale",
    "Permutation",
    "Planar",
    "QRLinear",
    "Radial",
    "Request",
    "Residual",
    "Rotation",
    "SVDLinear",
    "Simplex",
    "Squeeze",
    "Standardize",
    "SupportedStandardize",
    "Sylvester",
    "Transform",
    "Triangular",
    "TruncatedLogDet",
    "UnbiasedLogDet",
    "alternating_mask",
    "as_support",
    "channel_mask",
    "half_mask",
    "random_mask",
]
