"""Logits on both sides: per-row loss, whose backward pass is one gradient sweep."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import logit_functions, row_functions
from ..call import LossCall, empty_rows, problem_of
from ..kernels.device.rows import SAVED, Logits, Problem
from ..schedules.token_chunks import FLOOR_DEPTH
from .operator import no_gradients, operator


class Rows(NamedTuple):
    """Loss (N,), statistics (N, STATS) or (0, STATS), and what the gradient needs: row scalars (N, SAVED), floors.

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
    return Rows(loss, stats, saved=loss.new_empty((loss.shape[0], SAVED)), floors=_empty_floors(call, loss))


def _empty_gradient(call: LossCall) -> Tensor:
    return torch.empty_like(call.student, memory_format=torch.contiguous_format)


def _empty_floors(call: LossCall, loss: Tensor) -> Tensor:
    return loss.new_empty(loss.shape[0] if call.support == "floor" else 0)


def _raise_floors(call: LossCall, problem: Problem, floors: Tensor) -> Logits:
    """The teacher's side, its floors filled in if there are any."""
    teacher = Logits(call.teacher)
    if not floors.numel():
        return teacher
    row_functions(call.backend).floor_rows(problem, teacher, call.labels, floors, FLOOR_DEPTH)
    return teacher._replace(floor=floors)


@operator("rows")
def rows(call: LossCall) -> Rows:
    """Token weights and the wish for gradients are ignored."""
    problem, made = problem_of(call), _empty_rows(call)
    logit_functions(call.backend, problem, call.student).value(
        problem, Logits(call.student), _raise_floors(call, problem, made.floors), call.labels, made.loss, made.saved,
        made.stats if call.return_stats else None,
    )  # fmt: skip
    return made


@operator("rows_gradient")
def rows_gradient(call: LossCall, saved: Tensor, floors: Tensor, upstream: Tensor) -> Tensor:
    """upstream_n · dloss_n/dstudent, contiguous, in the student's shape and dtype."""
    problem, gradient = problem_of(call), _empty_gradient(call)
    logit_functions(call.backend, problem, call.student).gradient(
        problem, Logits(call.student), Logits(call.teacher, floor=floors if floors.numel() else None), call.labels,
        saved, upstream, gradient.view(-1, gradient.shape[2]),
    )  # fmt: skip
    return gradient


@operator("rows_both")
def rows_both(call: LossCall) -> RowsBoth:
    """Value sweep and gradient sweep of a row run back to back."""
    problem, (loss, stats), gradient = problem_of(call), empty_rows(call), _empty_gradient(call)
    floors = _empty_floors(call, loss)
    logit_functions(call.backend, problem, call.student).value_and_gradient(
        problem, Logits(call.student), _raise_floors(call, problem, floors), call.labels,
        call.token_weights, gradient.view(-1, gradient.shape[2]), loss, stats if call.return_stats else None,
    )  # fmt: skip
    return RowsBoth(loss, stats, gradient)


def _backward(call: LossCall, made: Rows, upstream: Tensor) -> LossCall:
    gradient = rows_gradient(call, made.saved, made.floors, upstream.contiguous())
    return no_gradients(LossCall)._replace(student=gradient)


rows.register_fake(_empty_rows)
rows.register_autograd(lambda call, made: (call, made._replace(loss=None, stats=None)), _backward)
rows_gradient.register_fake(lambda call, saved, floors, upstream: _empty_gradient(call))
rows_both.register_fake(lambda call: RowsBoth(*empty_rows(call), _empty_gradient(call)))
