"""The chunked schedule: hidden states to loss and gradients without the logit matrix.

    for each outer chunk of rows:
        for each inner chunk of it:
            T = teacher hidden @ teacher weightᵀ;  S = student hidden @ student weightᵀ
            row kernel: loss, statistics, dZ = w_n · dloss_n/dS
        dH = dZ @ W;   dW += dZᵀ @ H   (float32)

The gradient is formed in the forward pass, from the row weights alone; the backward pass multiplies by the upstream
scalar. Four GEMMs in all, fewer where something is frozen; buffers are made once, before the loop. Where S has dZ's
dtype the row kernel writes dZ over it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import backends
from ..call import LossCall, at_rows, numbers_of, problem_of, row_count, wide_dtype
from ..dtypes import accumulation_dtype, gradient_dtype, logit_dtype
from ..kernels.device.rows import STATS, Problem
from . import gemm
from .operands import DenseLogits, HeadLogits, PickedLogits, Student, comparison_of, grouped, room
from .ranks import ranks_of, reduce_student
from .row_work import row_work_of

FLOOR_DEPTH = 50.0  # support="floor": nats below which a teacher log-probability is raised


class Gradients(NamedTuple):
    """Gradients of a side's x, weight and bias; empty where not wanted."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class Result(NamedTuple):
    """Losses (N,), statistics (N, STATS) or (0, STATS), gradients of Σ weight·loss (float32 for heads)."""

    loss: torch.Tensor
    stats: torch.Tensor
    gradients: Gradients


class _Sink:
    """Where the row work writes dZ, and what becomes of it: nowhere and nothing, where no gradient is wanted."""

    in_place = False  # whether dZ lies over the student's logits

    def __init__(self, student: Student) -> None:
        self.gradients = empty_gradients(student, False, False, False)

    def out(self, chunk: slice, rows: slice) -> torch.Tensor | None:
        """Room for dZ (n, width) of some rows of an outer chunk."""
        return None

    def take_rows(self, rows: slice) -> None:
        """dZ of these rows is in `out`."""

    def take_chunk(self, chunk: slice) -> None:
        """dZ of all rows of an outer chunk is in `out`."""


class _LogitsSink(_Sink):
    """dZ is the gradient of the logits."""

    def __init__(self, student: DenseLogits | PickedLogits, inner: int) -> None:
        self.gradients = empty_gradients(student, True, False, False)
        self.picked, self.copy = None, self.gradients.x
        if isinstance(student, PickedLogits):
            self.picked, self.copy = student.picked, room(student.x, inner, student.width, student.x.dtype)
            self.gradients.x.zero_()

    def out(self, chunk: slice, rows: slice) -> torch.Tensor:
        """Where it belongs, or room for a copy of the picked rows."""
        return self.copy[rows] if self.picked is None else self.copy[: rows.stop - rows.start]

    def take_rows(self, rows: slice) -> None:
        """Put picked rows where they belong."""
        if self.picked is not None:
            self.gradients.x[self.picked[rows]] = self.copy[: rows.stop - rows.start]


class _HeadSink(_Sink):
    """dZ goes into the products that give the gradients of hidden states, weight and bias."""

    def __init__(self, call: LossCall, student: HeadLogits, outer: int, width: int) -> None:
        x, wide = student.hidden, accumulation_dtype(student.hidden)
        self.call, self.student, self.width = call, student, width
        self.gradients = empty_gradients(student, call.needs_student, call.needs_weight, call.needs_bias)
        self.dz = room(x, outer, width, gradient_dtype(x))  # of an outer chunk
        self.in_place = self.dz.dtype == logit_dtype(x.dtype, call.logits_dtype)
        self.bias_sums = x.new_empty(width, dtype=wide) if call.needs_bias else None
        self.uncounted = uncounted_rows(call.labels, call.token_weights) if call.needs_weight else None
        self.hidden = None if self.uncounted is None else x.new_empty((outer, student.dim))
        if call.needs_weight:
            self.gradients.weight[width if student.rows else 0 :] = 0

    def out(self, chunk: slice, rows: slice) -> torch.Tensor:
        """In a buffer of an outer chunk."""
        return self.dz[rows.start - chunk.start : rows.stop - chunk.start]

    def take_chunk(self, chunk: slice) -> None:
        """The products."""
        n, (grad_x, grad_weight, grad_bias) = chunk.stop - chunk.start, self.gradients
        dz = self.dz[:n]
        if self.call.needs_student:
            gemm.hidden_gradient(dz, self.student.weight[: self.width], grad_x[chunk])
        if self.call.needs_weight:
            hidden = self.student.hidden[chunk]
            if self.uncounted is not None and self.hidden is not None:
                hidden = only_counted(hidden, self.uncounted[chunk], self.hidden[:n])
            gemm.weight_gradient(dz, hidden, grad_weight[: self.width], accumulate=chunk.start > 0)
        if self.bias_sums is not None:
            torch.sum(dz, 0, dtype=self.bias_sums.dtype, out=self.bias_sums)
            grad_bias[: self.width] += self.bias_sums


def _sink_of(call: LossCall, student: Student, outer: int, inner: int, width: int) -> _Sink:
    """What takes dZ of a student of `width` columns."""
    if not (call.needs_student or call.needs_weight or call.needs_bias):
        return _Sink(student)
    if isinstance(student, HeadLogits):
        return _HeadSink(call, student, outer, width)
    return _LogitsSink(student, inner)


def run(call: LossCall) -> Result:
    """Loss rows, statistics and the gradients that `call` needs, of the sum weighted by its token weights."""
    backend, total_rows = backends.get(call.backend), row_count(call)
    problem, whole, teacher = comparison_of(call)
    kept, groups = grouped(teacher, _kept(call))
    student: Student = whole
    if kept is not None:
        call = at_rows(call, kept)
        problem, student = problem_of(call, numbers_of(call)), whole.at(kept)
    n, ranks = student.rows, ranks_of(call)
    loss = call.student.new_empty(n, dtype=wide_dtype(call))
    stats = loss.new_empty((n, STATS)) if call.return_stats else None
    floors = torch.empty_like(loss) if call.support == "floor" else None

    of_teacher = slice(0, problem.vocab_size)
    of_student = slice(0, student.width) if problem.ce_weight else of_teacher
    inner, outer = min(call.inner_rows, max(n, 1)), min(call.outer_rows, max(n, 1))
    sink = _sink_of(call, student, outer, inner, of_student.stop)
    student_buffer = None if sink.in_place else student.buffer(inner, of_student.stop, call.logits_dtype)

    for group in groups:
        row_work, first = row_work_of(group.teacher.kind, backend, ranks), group.rows.start
        teacher_buffer = group.teacher.buffer(min(inner, group.teacher.rows), of_teacher.stop, call.logits_dtype)
        for chunk in slices(first, group.rows.stop, outer):
            for rows in slices(chunk.start, chunk.stop, inner):
                out = sink.out(chunk, rows)
                t = group.teacher.logits(slice(rows.start - first, rows.stop - first), of_teacher, teacher_buffer)
                s = student.logits(rows, of_student, out if sink.in_place else student_buffer)
                here = problem_at(problem, rows)
                label = None if call.labels is None else call.labels[rows]
                if floors is not None:
                    row_work.floor_rows(here, t, label, floors[rows], FLOOR_DEPTH)
                    t = t._replace(floor=floors[rows])
                stat = None if stats is None else stats[rows]
                if out is None:
                    row_work.value(here, s, t, label, loss[rows], None, stat)
                else:
                    weight = None if call.token_weights is None else call.token_weights[rows]
                    row_work.value_and_gradient(here, s, t, label, weight, out, loss[rows], stat)
                    sink.take_rows(rows)
            sink.take_chunk(chunk)
    gradients = sink.gradients
    reduce_student(call, gradients.x, ranks)
    if kept is not None:
        loss, stats = _spread(loss, kept, total_rows), None if stats is None else _spread(stats, kept, total_rows)
        if isinstance(student, HeadLogits) and call.needs_student:
            gradients = gradients._replace(x=_spread(gradients.x, kept, total_rows))
    return Result(loss, loss.new_empty((0, STATS)) if stats is None else stats, gradients)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """start to stop, `step` at a time."""
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def uncounted_rows(labels: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor | None:
    """(n, 1), True in rows without a label or of weight 0; None if there is none, as far as the host knows."""
    found = None if labels is None else labels < 0
    if weights is not None:
        found = weights == 0 if found is None else found | (weights == 0)
    if found is None or (found.is_cpu and not bool(found.any())):
        return None
    return found.unsqueeze(-1)


def only_counted(hidden: torch.Tensor, uncounted: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states (n, D) for a product that sums over rows, 0 in the uncounted ones.

    dZ is 0 there, but 0 times what padding may hold, NaN or infinity, is NaN.
    """
    if uncounted is None:
        return hidden
    return hidden.masked_fill(uncounted, 0) if out is None else out.copy_(hidden).masked_fill_(uncounted, 0)


def counted_upstream(upstream: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """An upstream gradient (N, ...) that is 0 in rows that do not count, whatever it holds there."""
    if labels is None:
        return upstream
    counted = (labels >= 0).view(-1, *(1,) * (upstream.dim() - 1))
    return torch.where(counted, upstream, 0.0)


def _spread(values: torch.Tensor, kept: torch.Tensor, total: int) -> torch.Tensor:
    """Back to all rows, zero where they were dropped."""
    return values.new_zeros((total, *values.shape[1:])).index_copy_(0, kept, values)


def _kept(call: LossCall) -> torch.Tensor | None:
    """The rows that count, where others are to be left out and there are any."""
    if call.labels is None or not call.drop_ignored:
        return None
    counted = call.labels >= 0
    return None if bool(counted.all()) else counted.nonzero().squeeze(-1)


def problem_at(problem: Problem, rows: slice) -> Problem:
    """The problem with per-row parameters cut to some rows."""

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, torch.Tensor) else value

    target, nontarget = problem.weights
    parameters = tuple(map(cut, problem.parameters))
    return problem._replace(parameters=parameters, weights=(cut(target), cut(nontarget)), mix=cut(problem.mix))


def empty_gradients(student: Student, needs_x: bool, needs_weight: bool, needs_bias: bool) -> Gradients:
    """Room for the gradients of a side: of a Head in the accumulators' dtype, of logits as (N, V) in theirs."""
    if not isinstance(student, HeadLogits):
        x = student.x
        whole = x.new_empty((x.shape[0] * x.shape[1], x.shape[2])) if needs_x else x.new_empty(0)
        return Gradients(whole, x.new_empty(0), x.new_empty(0))
    x, weight, wide = student.hidden, student.weight, accumulation_dtype(student.hidden)
    return Gradients(
        x.new_empty(x.shape, dtype=wide) if needs_x else x.new_empty(0),
        weight.new_empty(weight.shape, dtype=wide) if needs_weight else x.new_empty(0),
        weight.new_zeros(len(weight), dtype=wide) if needs_bias else x.new_empty(0),
    )
