"""backend="triton" for all rows of a call's logits: one program per row, or several where there are few rows."""

from torch import Tensor

from ..kernels.device import rows, split_rows
from ..kernels.device.rows import Logits, Problem, floor_rows
from .protocol import Sweeps

__all__ = ["FEW_ROWS", "floor_rows", "gradient", "shares_rows", "value", "value_and_gradient"]

FEW_ROWS = 64  # half the multiprocessors of a large GPU: a guess, "not measured"


def shares_rows(problem: Problem, x: Tensor) -> bool:
    """Whether several programs share a row of logits (outer, inner, V): one each would leave most of a GPU idle."""
    few = x.is_cuda and x.shape[0] * x.shape[1] <= FEW_ROWS
    return few and split_rows.serves(problem)


def kernels(problem: Problem, x: Tensor) -> Sweeps:
    """The launchers that serve student logits (outer, inner, V)."""
    return split_rows if shares_rows(problem, x) else rows


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    loss: Tensor,
    saved: Tensor | None,
    stats: Tensor | None,
) -> None:
    """As rows.value."""
    kernels(problem, student.x).value(problem, student, teacher, labels, loss, saved, stats)


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    saved: Tensor,
    upstream: Tensor,
    out: Tensor,
) -> None:
    """As rows.gradient."""
    kernels(problem, student.x).gradient(problem, student, teacher, labels, saved, upstream, out)


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    upstream: Tensor | None,
    out: Tensor,
    loss: Tensor,
    stats: Tensor | None,
) -> None:
    """As rows.value_and_gradient."""
    kernels(problem, student.x).value_and_gradient(problem, student, teacher, labels, upstream, out, loss, stats)
