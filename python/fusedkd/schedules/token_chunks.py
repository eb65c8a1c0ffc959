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

from typing import NamedTuple

import torch

from ..backends import row_functions
from ..call import LossCall, at_rows, problem_of, row_count, sources_of, wide_dtype
from ..dtypes import accumulation_dtype, gradient_dtype, logit_dtype
from ..kernels.device.rows import STATS, Logits, Problem
from ..sides import Source
from . import gemm

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


def run(call: LossCall) -> Result:
    """Loss rows, statistics and the gradients that `call` needs, of the sum weighted by its token weights."""
    functions = row_functions(call.backend)
    total_rows, kept = row_count(call), _kept(call)
    if kept is not None:
        call = at_rows(call, kept)
    problem, (student, teacher) = problem_of(call), sources_of(call)
    n = total_rows if kept is None else kept.shape[0]
    loss = student.x.new_empty(n, dtype=wide_dtype(call))
    stats = loss.new_empty((n, STATS)) if call.return_stats else None
    floors = torch.empty_like(loss) if call.support == "floor" else None

    width = student.width if problem.ce_weight else problem.vocab_size
    differentiate = call.needs_student or call.needs_weight or call.needs_bias
    is_head = student.weight is not None
    inner, outer = min(call.inner_rows, max(n, 1)), min(call.outer_rows, max(n, 1))
    teacher_buffer = buffer(teacher, inner, problem.vocab_size, kept, call.logits_dtype)
    in_place, dz, student_buffer = False, None, None
    if is_head and differentiate:
        dz = student.x.new_empty((outer, width), dtype=gradient_dtype(student.x))
        in_place = dz.dtype == logit_dtype(student.x.dtype, call.logits_dtype)
    if not in_place:
        student_buffer = buffer(student, inner, width, kept, call.logits_dtype)
    own = accumulation_dtype(student.x)
    grad_x, grad_weight, grad_bias = empty_gradients(student, call.needs_student, call.needs_weight, call.needs_bias)
    picked = None
    if differentiate and not is_head and kept is not None:
        grad_x.zero_()
        picked = grad_x.new_empty((inner, student.width))
    bias_buffer = None if not (is_head and call.needs_bias) else student.x.new_empty(width, dtype=own)
    uncounted = uncounted_rows(call.labels, call.token_weights) if is_head and call.needs_weight else None
    hidden_buffer = None if uncounted is None else student.x.new_empty((outer, student.x.shape[1]))

    for start in range(0, n, outer):
        stop = min(start + outer, n)
        for i in range(start, stop, inner):
            j = min(i + inner, stop)
            rows = slice(i, j)
            out = None
            if dz is not None:
                out = dz[i - start : j - start]
            elif differentiate:
                out = grad_x[rows] if picked is None else picked[: j - i]
            t = side(teacher, kept, i, j, teacher_buffer, problem.vocab_size)
            s = side(student, kept, i, j, out if in_place else student_buffer, width)
            here = _at_rows(problem, rows)
            label = None if call.labels is None else call.labels[rows]
            if floors is not None:
                functions.floor_rows(here, t, label, floors[rows], FLOOR_DEPTH)
                t = t._replace(floor=floors[rows])
            stat = None if stats is None else stats[rows]
            if out is None:
                functions.value(here, s, t, label, loss[rows], None, stat)
            else:
                weight = None if call.token_weights is None else call.token_weights[rows]
                functions.value_and_gradient(here, s, t, label, weight, out, loss[rows], stat)
                if picked is not None and kept is not None:
                    grad_x[kept[rows]] = picked[: j - i]
        if dz is None:
            continue
        assert student.weight is not None
        chunk, rows = dz[: stop - start], slice(start, stop)
        if call.needs_student:
            gemm.hidden_gradient(chunk, student.weight[:width], grad_x[rows])
        if call.needs_weight:
            hidden = student.x[rows]
            if uncounted is not None and hidden_buffer is not None:
                hidden = only_counted(hidden, uncounted[rows], hidden_buffer[: stop - start])
            gemm.weight_gradient(chunk, hidden, grad_weight[:width], accumulate=start > 0)
        if bias_buffer is not None:
            torch.sum(chunk, 0, dtype=own, out=bias_buffer)
            grad_bias[:width] += bias_buffer
    if n == 0:
        grad_weight.zero_()
    else:
        grad_weight[width:] = 0
    if stats is None:
        stats = loss.new_empty((0, STATS))
    if kept is not None:
        loss = _spread(loss, kept, total_rows)
        stats = _spread(stats, kept, total_rows) if call.return_stats else stats
        grad_x = _spread(grad_x, kept, total_rows) if call.needs_student and is_head else grad_x
    return Result(loss, stats, Gradients(grad_x, grad_weight, grad_bias))


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


def _at_rows(problem: Problem, rows: slice | torch.Tensor) -> Problem:
    """The problem with per-row parameters cut to some rows."""

    def cut(values: tuple) -> tuple:
        return tuple(value[rows] if isinstance(value, torch.Tensor) else value for value in values)

    (mix,) = cut((problem.mix,))
    return problem._replace(parameters=cut(problem.parameters), weights=cut(problem.weights), mix=mix)


def buffer(
    source: Source, rows: int, width: int, kept: torch.Tensor | None, asked: torch.dtype | None
) -> torch.Tensor | None:
    """Room for the logits of an inner chunk; logits that are already there need none unless rows are picked."""
    if source.weight is None:
        return None if kept is None else source.x.new_empty((rows, width))
    return source.x.new_empty((rows, width), dtype=logit_dtype(source.x.dtype, asked))


def side(source: Source, kept: torch.Tensor | None, i: int, j: int, buffer: torch.Tensor | None, width: int) -> Logits:
    """Rows i to j as the row kernels take them."""
    if source.weight is None:
        if kept is None:
            return Logits(source.x, first=i)
        assert buffer is not None
        at = kept[i:j]
        buffer[: j - i] = source.x[at // source.x.shape[1], at % source.x.shape[1], :width]
        return Logits(buffer[: j - i].unsqueeze(0))
    assert buffer is not None
    gemm.project(source.x[i:j], source.weight[:width], buffer[: j - i])
    return source.side(buffer[: j - i], source.bias)


def empty_gradients(side: Source, needs_x: bool, needs_weight: bool, needs_bias: bool) -> Gradients:
    """Room for the gradients of a side: of a Head in the accumulators' dtype, of logits as (N, V) in theirs."""
    empty = Gradients(*(side.x.new_empty(0) for _ in Gradients._fields))
    if side.weight is None:
        return empty._replace(x=side.x.new_empty((side.rows, side.width))) if needs_x else empty
    wide = accumulation_dtype(side.x)
    return Gradients(
        side.x.new_empty(side.x.shape, dtype=wide) if needs_x else empty.x,
        side.weight.new_empty(side.weight.shape, dtype=wide) if needs_weight else empty.weight,
        side.weight.new_zeros(side.width, dtype=wide) if needs_bias else empty.bias,
    )
