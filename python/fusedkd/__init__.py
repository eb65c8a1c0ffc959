"""Fused Triton kernels for knowledge-distillation divergences over large vocabularies."""

from importlib.metadata import PackageNotFoundError, version

from .divergence import Divergence, divergence, divergences
from .head import Head
from .loss import KDStats, kd_loss, kd_value_and_grad
from .modules import DistillationLoss

try:
    __version__ = version("fusedkd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DistillationLoss",
    "Divergence",
    "Head",
    "KDStats",
    "__version__",
    "divergence",
    "divergences",
    "kd_loss",
    "kd_value_and_grad",
]
