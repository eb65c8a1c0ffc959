"""backend="triton" for all rows of a call's logits: one program per row, or several where there are few rows."""

from torch import Tensor

from ..kernels.device import rows, split_rows
from ..kernels.device.rows import Problem
from .protocol import Sweeps

FEW_ROWS = 64  # half the multiprocessors of a large GPU: a guess, "not measured"


def shares_rows(problem: Problem, x: Tensor) -> bool:
    """Whether several programs share a row of logits (outer, inner, V): one each would leave most of a GPU idle."""
    few = x.is_cuda and x.shape[0] * x.shape[1] <= FEW_ROWS
    return few and split_rows.serves(problem)


def kernels(problem: Problem, x: Tensor) -> Sweeps:
    """The launchers that serve student logits (outer, inner, V)."""
    return split_rows if shares_rows(problem, x) else rows
