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

from . import gemm
from .backends import row_functions
from .dtypes import accumulation_dtype, gradient_dtype, logit_dtype
from .kernels.rows import STATS, Problem, Side
from .planner import Chunks

FLOOR_DEPTH = 50.0  # support="floor": nats below which a teacher log-probability is raised


class Source(NamedTuple):
    """One side of the comparison: hidden states (N, D) with a weight (V, D), or logits (outer, inner, V) without."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float | None
    softcap: float | None

    @property
    def width(self) -> int:
        """V."""
        return self.x.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0] * self.x.shape[1] if self.weight is None else self.x.shape[0]


class Result(NamedTuple):
    """Losses and statistics per row; gradients of Σ weight·loss (float32 for heads), empty where not asked for."""

    rows: torch.Tensor
    stats: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class _Gathered(NamedTuple):
    """The rows that count, of everything that has rows."""

    kept: torch.Tensor | None
    labels: torch.Tensor | None
    weights: torch.Tensor | None
    problem: Problem
    student: Source
    teacher: Source


def run(
    problem: Problem,
    student: Source,
    teacher: Source,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    chunks: Chunks,
    *,
    backend: str,
    floor: bool = False,
    with_stats: bool = False,
    drop_ignored: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Result:
    """Loss rows, statistics and the gradients with respect to the student's x, weight and bias (`needs`)."""
    functions = row_functions(backend)
    total_rows = student.rows
    part = _gather(problem, student, teacher, labels, weights, drop_ignored)
    student, teacher = part.student, part.teacher
    n = total_rows if part.kept is None else part.kept.shape[0]
    wide = accumulation_dtype(student.x, teacher.x)
    loss = student.x.new_empty(n, dtype=wide)
    stats = student.x.new_empty((n, STATS), dtype=wide) if with_stats else None
    floors = student.x.new_empty(n, dtype=wide) if floor else None

    width = student.width if problem.ce_weight else problem.vocab_size
    differentiate = any(needs)
    is_head = student.weight is not None
    inner, outer = min(chunks.inner, max(n, 1)), min(chunks.outer, max(n, 1))
    teacher_buffer = buffer(teacher, inner, problem.vocab_size, part.kept, logits_dtype)
    in_place, dz, student_buffer = False, None, None
    if is_head and differentiate:
        dz = student.x.new_empty((outer, width), dtype=gradient_dtype(student.x))
        in_place = dz.dtype == logit_dtype(student.x.dtype, logits_dtype)
    if not in_place:
        student_buffer = buffer(student, inner, width, part.kept, logits_dtype)
    own = accumulation_dtype(student.x)
    grad_x, grad_weight, grad_bias = _outputs(student, n if is_head else total_rows, needs, own)
    picked = None
    if differentiate and not is_head and part.kept is not None:
        grad_x.zero_()
        picked = grad_x.new_empty((inner, student.width))
    bias_buffer = None if not (is_head and needs[2]) else student.x.new_empty(width, dtype=own)
    uncounted = uncounted_rows(part.labels, part.weights) if is_head and needs[1] else None
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
            t = side(teacher, part.kept, i, j, teacher_buffer, problem.vocab_size)
            s = side(student, part.kept, i, j, out if in_place else student_buffer, width)
            here = _at_rows(part.problem, rows)
            label = None if part.labels is None else part.labels[rows]
            if floors is not None:
                functions.floor_rows(here, t, label, floors[rows], FLOOR_DEPTH)
                t = t._replace(floor=floors[rows])
            stat = None if stats is None else stats[rows]
            if out is None:
                functions.value(here, s, t, label, loss[rows], None, stat)
            else:
                weight = None if part.weights is None else part.weights[rows]
                functions.value_and_gradient(here, s, t, label, weight, out, loss[rows], stat)
                if picked is not None and part.kept is not None:
                    grad_x[part.kept[rows]] = picked[: j - i]
        if dz is None:
            continue
        assert student.weight is not None
        chunk, rows = dz[: stop - start], slice(start, stop)
        if needs[0]:
            gemm.hidden_gradient(chunk, student.weight[:width], grad_x[rows])
        if needs[1]:
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
    if part.kept is not None:
        loss = _spread(loss, part.kept, total_rows)
        stats = _spread(stats, part.kept, total_rows) if with_stats else stats
        grad_x = _spread(grad_x, part.kept, total_rows) if needs[0] and is_head else grad_x
    return Result(loss, stats, grad_x, grad_weight, grad_bias)


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


def _spread(values: torch.Tensor, kept: torch.Tensor, total: int) -> torch.Tensor:
    """Back to all rows, zero where they were dropped."""
    return values.new_zeros((total, *values.shape[1:])).index_copy_(0, kept, values)


def _gather(
    problem: Problem,
    student: Source,
    teacher: Source,
    labels: torch.Tensor | None,
    weights: torch.Tensor | None,
    drop_ignored: bool,
) -> _Gathered:
    if labels is None or not drop_ignored:
        return _Gathered(None, labels, weights, problem, student, teacher)
    counted = labels >= 0
    if bool(counted.all()):
        return _Gathered(None, labels, weights, problem, student, teacher)
    kept = counted.nonzero().squeeze(-1)
    return _Gathered(
        kept,
        labels[kept],
        None if weights is None else weights[kept],
        _at_rows(problem, kept),
        _take(student, kept),
        _take(teacher, kept),
    )


def _take(source: Source, kept: torch.Tensor) -> Source:
    return source if source.weight is None else source._replace(x=source.x[kept])


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


def side(source: Source, kept: torch.Tensor | None, i: int, j: int, buffer: torch.Tensor | None, width: int) -> Side:
    """Rows i to j as the row kernels take them."""
    if source.weight is None:
        if kept is None:
            return Side(source.x, first=i)
        assert buffer is not None
        at = kept[i:j]
        buffer[: j - i] = source.x[at // source.x.shape[1], at % source.x.shape[1], :width]
        return Side(buffer[: j - i].unsqueeze(0))
    assert buffer is not None
    gemm.project(source.x[i:j], source.weight[:width], buffer[: j - i])
    return Side(buffer[: j - i].unsqueeze(0), source.bias, source.scale, source.softcap)


def _outputs(
    student: Source, n: int, needs: tuple[bool, bool, bool], wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = (student.x.new_empty(0) for _ in needs)
    if student.weight is None:
        return (student.x.new_empty((n, student.width)) if needs[0] else x), weight, bias
    return (
        student.x.new_empty(student.x.shape, dtype=wide) if needs[0] else x,
        student.weight.new_empty(student.weight.shape, dtype=wide) if needs[1] else weight,
        student.weight.new_zeros(student.width, dtype=wide) if needs[2] else bias,
    )
