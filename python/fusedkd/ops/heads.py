"""A Head on at least one side, some tokens at a time (schedules/token_chunks.py), the gradient beside the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import LossCall, Rows, empty_rows
from ..dtypes import size_of
from ..schedules import token_chunks
from ..schedules.operands import Parts
from .operator import no_gradients, operator
from .scaled import delivered


class Sum(NamedTuple):
    """Σ weight·loss (), loss (N,), statistics, and the gradients of the sum, empty where not wanted."""

    total: Tensor
    loss: Tensor
    stats: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


@operator("heads")
def heads(call: LossCall) -> Sum:
    """The backward pass multiplies the gradients by the upstream scalar."""
    loss, stats, gradients = token_chunks.run(call)
    weights = call.token_weights
    total = loss.sum() if weights is None else torch.where(weights == 0, 0.0, weights * loss).sum()
    return Sum(total, loss, stats, *gradients)


@heads.register_fake
def _(call: LossCall) -> Sum:
    loss, stats = empty_rows(call)
    student = Parts(call.student, call.student_weight, call.student_bias).operand()
    gradients = token_chunks.empty_gradients(student, call.needs_student, call.needs_weight, call.needs_bias)
    return Sum(loss.new_empty(()), loss, stats, *gradients)


def _keep(call: LossCall, made: Sum) -> tuple[LossCall, Sum]:
    student = no_gradients(LossCall)._replace(
        student=call.student,
        student_weight=call.student_weight,
        student_bias=call.student_bias,
        needs_student=call.needs_student,
        needs_weight=call.needs_weight,
        needs_bias=call.needs_bias,
        weight_grad=call.weight_grad,
    )
    return student, made._replace(total=None, loss=None, stats=None)


def _backward(call: LossCall, made: Sum, upstream: Tensor) -> LossCall:
    return delivered(call, token_chunks.Gradients(made.x, made.weight, made.bias), upstream)


heads.register_autograd(_keep, _backward)


@operator("heads_rows")
def heads_rows(call: LossCall) -> Rows:
    """The backward pass runs `heads` with the upstream gradient for token weights."""
    found = token_chunks.run(call._replace(needs_student=False, needs_weight=False, needs_bias=False))
    return Rows(found.loss, found.stats)


def _rows_backward(call: LossCall, _: Rows, upstream: Tensor) -> LossCall:
    upstream = token_chunks.counted_upstream(upstream, call.labels)
    size = size_of(upstream)
    made = heads(call._replace(token_weights=upstream / size, return_stats=False, weight_grad=None))
    return delivered(call, token_chunks.Gradients(made.x, made.weight, made.bias), size)


heads_rows.register_fake(empty_rows)
heads_rows.register_autograd(lambda call, made: (call, no_gradients(Rows)), _rows_backward)
