"""Logits on both sides: per-row loss, whose backward pass is one gradient sweep."""

from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..backends.protocol import Sweeps
from ..call import LossCall, empty_rows
from ..kernels.device.rows import Logits, Problem
from ..schedules import topk
from ..schedules.operands import comparison_of
from ..schedules.ranks import ranks_of
from ..schedules.row_work import row_work_of
from ..schedules.token_chunks import FLOOR_DEPTH
from .operator import no_gradients, operator


class Rows(NamedTuple):
    """Loss (N,), statistics (N, STATS) or (0, STATS), and what the gradient needs: row scalars, floors.

    saved: (N, SAVED), wider beside a top-k teacher (schedules.topk.saved_width).

    floors: where support="floor" raises the teacher's logits to, (N,), else (0,).
    """

    loss: Tensor
    stats: Tensor
    saved: Tensor
    floors: Tensor


class RowsBoth(NamedTuple):
    """Loss (N,), statistics, and weight_n · dloss_n/dstudent in the student's shape and dtype."""

    loss: Tensor
    stats: Tensor
    gradient: Tensor


def _empty_rows(call: LossCall) -> Rows:
    loss, stats = empty_rows(call)
    saved = loss.new_empty((loss.shape[0], topk.saved_width(call.teacher_kind, call.teacher)))
    return Rows(loss, stats, saved, floors=_empty_floors(call, loss))


def _empty_gradient(call: LossCall) -> Tensor:
    """In the student's shape: no gaps but of a few columns, with which rows begin as far apart as the student's do,
    modulo 16 elements: kernels load and store whole vectors then."""
    x = call.student
    outer, inner, width = x.shape
    row = width + (x.stride(1) - width) % 16 if x.stride(2) == 1 else width
    return x.new_empty((outer, inner, row))[:, :, :width]


def _empty_floors(call: LossCall, loss: Tensor) -> Tensor:
    return loss.new_empty(loss.shape[0] if call.support == "floor" else 0)


class _Whole(NamedTuple):
    """All rows of both sides as kernels take them."""

    problem: Problem
    student: Logits
    teacher: Logits

    @classmethod
    def of(cls, call: LossCall) -> "_Whole":
        """Of logits that are there: an Operand that needs no buffer."""
        problem, student, teacher = comparison_of(call)
        rows = slice(0, student.rows)
        sides = (x.logits(rows, slice(0, x.width), None) for x in (student, teacher))
        return cls(problem, *sides)

    def raised(self, call: LossCall, floors: Tensor) -> "_Whole":
        """With the teacher raised to `floors`, which are filled in, if there are any."""
        if not floors.numel():
            return self
        row_work = row_work_of(call.teacher_kind, backends.get(call.backend), ranks_of(call))
        row_work.floor_rows(self.problem, self.teacher, call.labels, floors, FLOOR_DEPTH)
        return self.at_floors(floors)

    def sweeps(self, call: LossCall) -> Sweeps:
        """What serves them."""
        backend, ranks = backends.get(call.backend), ranks_of(call)
        row_work = row_work_of(call.teacher_kind, backend, ranks)
        return backend.logits(self.problem, call.student) if row_work is backend.rows else row_work

    def at_floors(self, floors: Tensor) -> "_Whole":
        """With the teacher raised to `floors`, if there are any."""
        return self._replace(teacher=self.teacher._replace(floor=floors)) if floors.numel() else self


@operator("rows")
def rows(call: LossCall) -> Rows:
    """Token weights and the wish for gradients are ignored."""
    made = _empty_rows(call)
    whole = _Whole.of(call).raised(call, made.floors)
    stats = made.stats if call.return_stats else None
    whole.sweeps(call).value(*whole, call.labels, made.loss, made.saved, stats)
    return made


@operator("rows_gradient")
def rows_gradient(call: LossCall, saved: Tensor, floors: Tensor, upstream: Tensor) -> Tensor:
    """upstream_n · dloss_n/dstudent in the student's shape and dtype."""
    whole, gradient = _Whole.of(call).at_floors(floors), _empty_gradient(call)
    out = gradient.flatten(0, 1)
    whole.sweeps(call).gradient(*whole, call.labels, saved, upstream, out)
    return gradient


@operator("rows_both")
def rows_both(call: LossCall) -> RowsBoth:
    """Value sweep and gradient sweep of a row run back to back."""
    (loss, stats), gradient = empty_rows(call), _empty_gradient(call)
    whole = _Whole.of(call).raised(call, _empty_floors(call, loss))
    out = gradient.flatten(0, 1)
    made = stats if call.return_stats else None
    whole.sweeps(call).value_and_gradient(*whole, call.labels, call.token_weights, out, loss, made)
    return RowsBoth(loss, stats, gradient)


def _backward(call: LossCall, made: Rows, upstream: Tensor) -> LossCall:
    gradient = rows_gradient(call, made.saved, made.floors, upstream.contiguous())
    return no_gradients(LossCall)._replace(student=gradient)


rows.register_fake(_empty_rows)
rows.register_autograd(lambda call, made: (call, made._replace(loss=None, stats=None)), _backward)
rows_gradient.register_fake(lambda call, saved, floors, upstream: _empty_gradient(call))
rows_both.register_fake(lambda call: RowsBoth(*empty_rows(call), _empty_gradient(call)))
