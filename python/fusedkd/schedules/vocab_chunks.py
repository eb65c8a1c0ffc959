"""The streaming schedule: a vocabulary chunk over all tokens at a time, so that the workspace does not depend on V.

    forward     for each chunk: T, S = logits of the chunk; the rows' statistics grow
                (once more for the sums of divergences without a one-sweep form)
    backward    for each chunk: T, S again; dZ with the true upstream gradient;
                dW[chunk] = dZᵀ @ H, written once in its final dtype, or added to the caller's buffer by the product;
                dH += dZ @ W[chunk]  (float32)

Six GEMMs (eight without a one-sweep form) instead of four. The forward keeps a few floats per row; every reduction and
every upstream gradient is exact, because the gradient is formed where it is known.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.torch_rows import dominant_entry, in_threads
from ..call import LossCall, empty_rows, row_count, wide_dtype
from ..dtypes import accumulation_dtype, gradient_dtype, size_of
from ..kernels.device.args import DOMINANT, Dominant, RowScalars, columns_of
from ..kernels.device.rows import Problem
from . import gemm, token_chunks, topk
from .operands import DenseLogits, HeadLogits, Operand, comparison_of, front, room
from .partial_rows import Part, PartialRows, Rows
from .planner import DOMINANT_ROWS
from .ranks import Ranks, ranks_of, reduce_student


class _Pass(NamedTuple):
    """One sweep over the vocabulary."""

    problem: Problem
    student: DenseLogits | HeadLogits
    teacher: Operand
    width: int  # columns per chunk
    student_buffer: Tensor | None  # (N, width) products, of a Head; a thread has its rows of it
    teacher_buffer: Tensor | None
    first: int  # the vocabulary's number of column 0

    def columns(self) -> Iterator[slice]:
        """Those of every chunk."""
        total = self.student.width if self.problem.ce_weight else self.problem.vocab_size
        return token_chunks.slices(0, total, self.width)

    def part(self, rows: slice, columns: slice) -> Part:
        """A chunk of some rows, in their part of one buffer for each side."""
        start = columns.start
        compared = max(0, min(columns.stop, self.problem.vocab_size) - start)
        mine, theirs = (x if x is None else x[rows] for x in (self.student_buffer, self.teacher_buffer))
        student = self.student.logits(rows, columns, mine)
        # A chunk of student columns alone still needs a teacher to point at: one column, of which none is compared.
        until = max(start + compared, start + 1) if start < self.teacher.width else start
        teacher = student if until == start else self.teacher.logits(rows, slice(start, until), theirs)
        problem = token_chunks.problem_at(self.problem, rows)._replace(vocab_size=compared)
        return Part(self.first + start, problem, student, teacher)

    def parts(self, rows: slice) -> Iterator[Part]:
        """Those of all columns in turn."""
        return (self.part(rows, columns) for columns in self.columns())


def _pass(call: LossCall) -> _Pass:
    problem, student, teacher = comparison_of(call)
    buffers = (side.buffer(side.rows, call.columns, call.logits_dtype) for side in (student, teacher))
    return _Pass(problem, student, teacher, call.columns, *buffers, first=call.shard_start)


def forward(call: LossCall) -> Rows:
    """The value of every row, and what the backward pass needs to know of it."""
    sweep, ranks, n = _pass(call), ranks_of(call), row_count(call)
    if topk.is_topk(call.teacher_kind):
        loss, stats = empty_rows(call)
        saved = loss.new_empty((n, topk.saved_width(call.teacher_kind, call.teacher)))
        parts = sweep.parts(slice(0, n))
        _topk_parts(call, sweep, ranks).value(parts, saved, loss, stats if call.return_stats else None)
        return Rows(loss, stats, saved)
    chunks, like = backends.get(call.backend).chunks, call.student.new_empty(0, dtype=wide_dtype(call))
    shares = chunks.shares(n, like.device)
    return PartialRows(sweep.problem, call.labels, like, chunks, shares, sweep.parts, ranks).value(n, call.return_stats)


def _topk_parts(call: LossCall, sweep: _Pass, ranks: Ranks | None) -> topk.TopKParts:
    teacher = sweep.teacher.logits(slice(0, sweep.teacher.rows), slice(0, sweep.teacher.width), None)
    backend = backends.get(call.backend)
    return topk.TopKParts(sweep.problem, backend, call.teacher_kind, teacher, call.labels, ranks)


def backward(call: LossCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of Σ upstream_n · loss_n in the operands' dtypes; empty where not wanted or added to `weight_grad`."""
    sweep, chunks, labels, weight_grad = _pass(call), backends.get(call.backend).chunks, call.labels, call.weight_grad
    problem, student, ranks = sweep.problem, sweep.student, ranks_of(call)
    x, weight, n = call.student, call.student_weight, student.rows
    wide = accumulation_dtype(x)
    saved, upstream = saved.to(wide), token_chunks.counted_upstream(upstream.to(wide), labels)
    hidden = x
    if weight is not None and call.needs_weight:
        hidden = token_chunks.only_counted(x, token_chunks.uncounted_rows(labels, upstream))
    total = student.width if problem.ce_weight else problem.vocab_size
    made = grad_x, grad_weight, grad_bias = empty_gradients(call)
    if weight is None:
        grad_x[..., total:] = 0
    else:
        grad_weight[total:] = 0
        grad_bias[total:] = 0
    sum_x = None
    if weight is not None and call.needs_student:
        sum_x = grad_x.zero_() if grad_x.dtype == wide else torch.zeros_like(grad_x, dtype=wide)
    dominant = x.new_zeros((n, DOMINANT), dtype=wide)
    columns_of(Dominant, dominant).token.fill_(-1)
    dtype = x.dtype if weight is None else gradient_dtype(x)
    # A product that lands in the buffer leaves nothing to put back; only float16 has no range for a plain dZ.
    direct = weight_grad is not None and dtype != torch.float16
    size = upstream.new_ones(()) if direct or weight is None else size_of(upstream)
    scaled = (upstream / size).contiguous()
    if weight is not None and call.needs_weight:
        hidden = hidden.to(dtype)  # a CPU's products are float32
    workspace = sweep.student_buffer  # dZ lies over the student's logits where it has their dtype
    if workspace is not None and workspace.dtype != dtype:
        workspace = room(x, n, sweep.width, dtype)
    beside_topk = _topk_parts(call, sweep, ranks) if topk.is_topk(call.teacher_kind) else None
    shares = chunks.shares(n, x.device) if beside_topk is None else [slice(0, n)]
    if beside_topk is not None:
        beside_topk.prepare(saved, scaled)

    def by_rows(rows: slice, columns: slice, dz: Tensor) -> None:
        """dZ of a chunk at some rows, and what it adds to the gradient of their hidden states."""
        part, label = sweep.part(rows, columns), None if labels is None else labels[rows]
        if beside_topk is not None:
            beside_topk.gradient(part, dz)
        else:
            sides = (part.problem, part.student, part.teacher, label)
            chunks.gradient(*sides, saved[rows], scaled[rows], dominant[rows], dz[rows], part.first)
        if sum_x is not None and weight is not None:
            gemm.hidden_gradient(dz[rows], weight[columns], sum_x[rows], accumulate=True)

    def by_columns(columns: slice, dz: Tensor) -> None:
        """The gradients of weight and bias at some columns, whose dZ is given."""
        if weight_grad is not None:
            _add_product(dz, hidden, size, weight_grad[columns])
        elif call.needs_weight:
            _product_into(dz, hidden, size, grad_weight[columns])
        if call.needs_bias:
            grad_bias[columns] = dz.sum(0, dtype=wide) * size

    for columns in sweep.columns():
        dz = grad_x.view(n, student.width)[:, columns] if workspace is None else front(workspace, n, columns)
        in_threads(lambda rows, at=columns, dz=dz: by_rows(rows, at, dz), shares, len(shares))
        if workspace is not None:
            step = -(-dz.shape[1] // max(len(shares), 1))
            parts = list(
                zip(token_chunks.slices(columns.start, columns.stop, step), torch.split(dz, step, 1), strict=True)
            )
            in_threads(lambda part: by_columns(*part), parts, len(shares))
    if sum_x is not None:
        sum_x *= size
    whole = made if weight_grad is None else made._replace(weight=weight_grad)
    if beside_topk is None:
        if ranks is not None:
            rest = columns_of(Dominant, dominant, keepdim=True).rest
            rest.copy_(ranks.total(rest))
        if student.width:
            _add_dominant(call, sweep, hidden, saved, upstream, dominant, whole, sum_x)
    if sum_x is not None:
        reduce_student(call, sum_x, ranks)
    if sum_x is not None and sum_x is not grad_x:
        grad_x.copy_(sum_x)
    return made


def _product_into(dz: Tensor, hidden: Tensor, size: Tensor, out: Tensor) -> None:
    """out = size · dzᵀ @ hidden, rounded once."""
    wide = accumulation_dtype(dz)
    whole = out if out.dtype == wide else out.new_empty(out.shape, dtype=wide)
    gemm.weight_gradient(dz, hidden, whole, accumulate=False)
    whole.mul_(size)
    if whole is not out:
        out.copy_(whole)


def _add_product(dz: Tensor, hidden: Tensor, size: Tensor, out: Tensor) -> None:
    """out += size · dzᵀ @ hidden, rounded once; size is 1 unless dz is float16."""
    wide = accumulation_dtype(dz)
    if dz.dtype == torch.float16 or out.dtype.itemsize > wide.itemsize:
        whole = out.new_empty(out.shape, dtype=wide)
        gemm.weight_gradient(dz, hidden, whole, accumulate=False)
        out.addcmul_(whole, size)
        return
    whole = out.to(wide)
    gemm.weight_gradient(dz, hidden, whole, accumulate=True)
    if whole is not out:
        out.copy_(whole)


def _add_dominant(
    call: LossCall,
    sweep: _Pass,
    hidden: Tensor,
    saved: Tensor,
    upstream: Tensor,
    found: Tensor,
    grads: token_chunks.Gradients,
    sum_x: Tensor | None,
) -> None:
    """Adds the entry of the token that holds most of a row's mass: minus the sum of the row's others."""
    problem, labels, weight = sweep.problem, call.labels, call.student_weight
    dominant = columns_of(Dominant, found)
    has = dominant.token >= 0 if labels is None else (dominant.token >= 0) & (labels >= 0)
    at = (dominant.token - sweep.first).clamp(min=0).long()
    g = dominant_entry(
        dominant,
        upstream * (problem.factor / problem.temperature),
        upstream * problem.ce_weight if problem.ce_weight else None,
        columns_of(RowScalars, saved).ce_lse,
        labels,
    )
    g = torch.where(has, g, 0.0)
    if weight is None:
        flat = grads.x.view(len(g), sweep.student.width)
        entry = flat.gather(1, at[:, None])
        flat.scatter_(1, at[:, None], torch.where(has[:, None], g[:, None].to(flat.dtype), entry))
        return
    if sum_x is not None:
        for sums, slopes, tokens in zip(*(torch.split(x, DOMINANT_ROWS) for x in (sum_x, g, at)), strict=True):
            sums += slopes.unsqueeze(-1) * weight[tokens].to(sums.dtype)
    if not (call.needs_weight or call.needs_bias):
        return
    # Many rows may share a token: their entries are summed in the wide dtype first, one segment per token.
    at, order = at.sort(stable=True)
    segment = torch.cat((at[:1] * 0, (at.diff() != 0).cumsum(0)))
    g = g[order]
    if call.needs_weight:
        _add_segments(grads.weight, at, segment, g.unsqueeze(-1) * hidden[order].to(g.dtype))
    if call.needs_bias:
        _add_segments(grads.bias, at, segment, g)


def _add_segments(out: Tensor, at: Tensor, segment: Tensor, values: Tensor) -> None:
    """out[at] += values, rounded once per distinct row of out."""
    if not len(at):
        return
    sums = torch.zeros_like(values).index_add_(0, segment, values)
    # All rows of a segment write the same number.
    out[at] = (out[at].to(values.dtype) + sums[segment]).to(out.dtype)


def empty_gradients(call: LossCall) -> token_chunks.Gradients:
    """Room for the gradients in the operands' dtypes; none for the weight's where `weight_grad` takes it."""
    x, weight, bias = call.student, call.student_weight, call.student_bias
    empty = token_chunks.Gradients(*(x.new_empty(0) for _ in token_chunks.Gradients._fields))
    if weight is None:
        return (
            empty._replace(x=torch.empty_like(x, memory_format=torch.contiguous_format))
            if call.needs_student
            else empty
        )
    return token_chunks.Gradients(
        x.new_empty(x.shape) if call.needs_student else empty.x,
        weight.new_empty(weight.shape) if call.needs_weight and call.weight_grad is None else empty.weight,
        bias.new_empty(bias.shape) if call.needs_bias and bias is not None else empty.bias,
    )
