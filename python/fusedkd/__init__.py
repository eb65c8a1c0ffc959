"""Fused Triton kernels for knowledge-distillation divergences over large vocabularies."""

from importlib.metadata import PackageNotFoundError, version

from .distillation_head import DistillationHead
from .divergence import Divergence, divergence, divergences
from .head import Head
from .loss import KDStats, kd_loss, kd_value_and_grad
from .module import DistillationLoss
from .ops import flops as flops  # registers the operators' formulas
from .recipes.cald import cald_loss
from .recipes.taid import TAIDSchedule
from .schedules.planner import Plan, plan
from .shard import VocabShard
from .sparse import TopK
from .token_logprobs import token_logprobs
from .topk import topk

try:
    __version__ = version("fusedkd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DistillationHead",
    "DistillationLoss",
    "Divergence",
    "Head",
    "KDStats",
    "Plan",
    "TAIDSchedule",
    "TopK",
    "VocabShard",
    "__version__",
    "cald_loss",
    "divergence",
    "divergences",
    "kd_loss",
    "kd_value_and_grad",
    "plan",
    "token_logprobs",
    "topk",
]
