"""Fused Triton kernels for knowledge-distillation divergences over large vocabularies."""

from importlib.metadata import PackageNotFoundError, version

from . import flops as flops  # registers the operators' formulas
from .cald import cald_loss
from .divergence import Divergence, divergence, divergences
from .head import Head
from .logprobs import token_logprobs
from .loss import KDStats, kd_loss, kd_value_and_grad
from .modules import DistillationLoss
from .planner import Plan, plan
from .taid import TAIDSchedule

try:
    __version__ = version("fusedkd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DistillationLoss",
    "Divergence",
    "Head",
    "KDStats",
    "Plan",
    "TAIDSchedule",
    "__version__",
    "cald_loss",
    "divergence",
    "divergences",
    "kd_loss",
    "kd_value_and_grad",
    "plan",
    "token_logprobs",
]
