"""The streaming schedule: a vocabulary chunk over all tokens at a time, so that the workspace does not depend on V.

    forward     for each chunk: T, S = logits of the chunk; the rows' statistics grow
                (once more for the sums of divergences without a one-sweep form)
    backward    for each chunk: T, S again; dZ with the true upstream gradient;
                dW[chunk] = dZᵀ @ H, written once in its final dtype, or added to the caller's buffer by the product;
                dH += dZ @ W[chunk]  (float32)

Six GEMMs (eight without a one-sweep form) instead of four. The forward keeps a few floats per row; every reduction and
every upstream gradient is exact, because the gradient is formed where it is known.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.torch_rows import dominant_entry, finish_rows, in_threads, values_at
from ..call import LossCall, empty_rows, wide_dtype
from ..dtypes import accumulation_dtype, gradient_dtype, size_of
from ..kernels.device.args import (
    CARRY,
    DOMINANT,
    EMPTY,
    SAVED,
    STATS,
    TERM_SUMS,
    Carry,
    Dominant,
    RowScalars,
    TermSums,
    TokenStats,
    columns_of,
    extras_of,
)
from ..kernels.device.rows import Logits, Problem
from ..kernels.device.vocab_chunks import online_of
from ..kernels.maths.decomposition import ABSENT, finalize_normalizers, or_infinite, side_stats
from ..kernels.maths.moments import log_sum
from ..kernels.maths.quantities import Binary, SideStats
from . import gemm, token_chunks, topk
from .operands import DenseLogits, HeadLogits, Operand, comparison_of, front, room
from .planner import DOMINANT_ROWS


class _Row(NamedTuple):
    """What `RowParameters.torch` may ask of rows that were never whole."""

    near: Tensor
    dtype: torch.dtype


class _RowNorms(NamedTuple):
    """Everything about the rows that does not need the sums: (n,) each."""

    saved: Tensor  # (n, SAVED), the gradient's a, b and grad_y still 0
    binary: Binary
    extras: tuple[Tensor, ...]  # parameters that the rows found for themselves
    in_support: Tensor
    no_columns: Tensor  # nothing to compare but the label
    state: tuple[Tensor, ...]  # the online state
    student: SideStats | None
    teacher: SideStats | None


class _Chunk(NamedTuple):
    """Some vocabulary columns of all rows."""

    columns: slice
    problem: Problem  # on these columns, of which its vocab_size are compared
    student: Logits
    teacher: Logits


class _Pass(NamedTuple):
    """One sweep over the vocabulary."""

    problem: Problem
    student: DenseLogits | HeadLogits
    teacher: Operand
    width: int  # columns per chunk
    student_buffer: Tensor | None  # (N, width) products, of a Head; a thread has its rows of it
    teacher_buffer: Tensor | None

    def columns(self) -> Iterator[slice]:
        """Those of every chunk."""
        total = self.student.width if self.problem.ce_weight else self.problem.vocab_size
        return token_chunks.slices(0, total, self.width)

    def chunk(self, rows: slice, columns: slice) -> _Chunk:
        """A chunk of some rows, in their part of one buffer for each side."""
        start = columns.start
        compared = max(0, min(columns.stop, self.problem.vocab_size) - start)
        mine, theirs = (x if x is None else x[rows] for x in (self.student_buffer, self.teacher_buffer))
        student = self.student.logits(rows, columns, mine)
        # A chunk of student columns alone still needs a teacher to point at: one column, of which none is compared.
        until = max(start + compared, start + 1) if start < self.teacher.width else start
        teacher = student if until == start else self.teacher.logits(rows, slice(start, until), theirs)
        problem = token_chunks.problem_at(self.problem, rows)._replace(vocab_size=compared)
        return _Chunk(columns, problem, student, teacher)


def _pass(call: LossCall) -> _Pass:
    problem, student, teacher = comparison_of(call)
    buffers = (side.buffer(side.rows, call.columns, call.logits_dtype) for side in (student, teacher))
    return _Pass(problem, student, teacher, call.columns, *buffers)


class Rows(NamedTuple):
    """Loss (N,), statistics (N, STATS) or (0, STATS), and saved row scalars (N, SAVED)."""

    loss: Tensor
    stats: Tensor
    saved: Tensor


def forward(call: LossCall) -> Rows:
    """The value of every row, and what the backward pass needs to know of it."""
    if topk.is_topk(call.teacher_kind):
        return _forward_beside_topk(call)
    sweep, chunks, labels = _pass(call), backends.get(call.backend).chunks, call.labels
    problem, n, wide = sweep.problem, sweep.student.rows, wide_dtype(call)
    count = len(online_of(problem).init.torch())
    carry = call.student.new_zeros((n, CARRY + count), dtype=wide)
    for column, value in zip(columns_of(Carry, carry), EMPTY, strict=True):
        column.fill_(value)
    shares = chunks.shares(n, carry.device)

    def absorb(rows: slice) -> None:
        label = None if labels is None else labels[rows]
        for columns in sweep.columns():
            x = sweep.chunk(rows, columns)
            chunks.absorb(x.problem, x.student, x.teacher, label, carry[rows], columns.start, call.return_stats)

    in_threads(absorb, shares, len(shares))
    norms = _row_norms(problem, carry, labels, call.return_stats)
    sums_of = online_of(problem).sums
    if sums_of is None:
        memory = call.student.new_zeros((n, TERM_SUMS), dtype=wide)

        def add_sums(rows: slice) -> None:
            label = None if labels is None else labels[rows]
            for columns in sweep.columns():
                if columns.start < problem.vocab_size:
                    x = sweep.chunk(rows, columns)
                    saved = norms.saved[rows]
                    chunks.add_sums(x.problem, x.student, x.teacher, label, saved, memory[rows], columns.start)

        in_threads(add_sums, shares, len(shares))
        sums = columns_of(TermSums, memory)
        total, mass = or_infinite.torch(sums.total, sums.widest), sums.mass
    else:
        scalars = columns_of(RowScalars, norms.saved)
        theta = (*values_at(problem.parameters, slice(None), carry), *norms.extras)
        total, mass = sums_of.traced(norms.state, scalars.l_s, scalars.l_t, scalars.r, theta)
    return _finish_rows(problem, columns_of(Carry, carry), norms, total, mass, labels)


def _forward_beside_topk(call: LossCall) -> Rows:
    sweep = _pass(call)
    loss, stats = empty_rows(call)
    saved = loss.new_empty((len(loss), topk.saved_width(call.teacher_kind, call.teacher)))
    _topk_chunks(call, sweep).value(_student_chunks(sweep), saved, loss, stats if call.return_stats else None)
    return Rows(loss, stats, saved)


def _topk_chunks(call: LossCall, sweep: _Pass) -> topk.TopKChunks:
    teacher = sweep.teacher.logits(slice(0, sweep.teacher.rows), slice(0, sweep.teacher.width), None)
    return topk.TopKChunks(sweep.problem, backends.get(call.backend), call.teacher_kind, teacher, call.labels)


def _student_chunks(sweep: _Pass) -> Iterator[topk.StudentChunk]:
    for columns in sweep.columns():
        x = sweep.chunk(slice(0, sweep.student.rows), columns)
        yield topk.StudentChunk(x.columns, x.problem, x.student)


def _row_norms(problem: Problem, memory: Tensor, labels: Tensor | None, with_stats: bool) -> _RowNorms:
    """The rows' normalisers from what (n, CARRY + online state) has gathered of all columns."""
    carry, state = columns_of(Carry, memory), memory[:, CARRY:].unbind(-1)
    inv_tau = 1.0 / problem.temperature
    mix = () if problem.mix is None else values_at((problem.mix,), slice(None), memory)
    s_y, t_y = carry.label_s.clamp(min=ABSENT), carry.label_t
    in_support = torch.zeros_like(s_y, dtype=torch.bool) if labels is None else (labels >= 0) & ~torch.isneginf(t_y)
    t_y = t_y.clamp(min=ABSENT)
    maxima = (carry.top_s, carry.top_t, carry.top_mixed)
    norms = finalize_normalizers.torch(
        maxima, state, s_y, t_y, in_support, inv_tau, mix, online_of(problem).ratio.torch, problem.decoupled
    )
    c, own, no_columns = norms.centre, norms.own, state[1] == 0
    row_parameters = problem.definition.row_parameters
    theta = values_at(problem.parameters, slice(None), memory)
    extras = (
        () if row_parameters is None else row_parameters.torch(_Row(state[3] < 0.5 * state[0], memory.dtype), theta)
    )
    ce_lse = carry.ce_top + log_sum.torch(carry.ce_total)
    later = torch.zeros_like(ce_lse)
    scalars = RowScalars(*c, *norms.log_norms, a=later, b=later, grad_y=later, ce_lse=ce_lse, top_col=later - 1)
    student = teacher = None
    if with_stats:
        own_t = log_sum.torch(carry.sum_t)
        student = side_stats.torch(
            own.log_zs, carry.entropy_s, own.z_y, c.c_s * inv_tau, s_y * inv_tau, in_support, no_columns
        )
        teacher = side_stats.torch(
            own_t, carry.entropy_t, own.own_u_y, (c.c_t + c.k) * inv_tau, t_y * inv_tau, in_support, no_columns
        )
    return _RowNorms(
        _saved(memory, scalars, extras), norms.binary, tuple(extras), in_support, no_columns, state, student, teacher
    )


def _saved(like: Tensor, scalars: RowScalars, extras: Sequence[Tensor]) -> Tensor:
    """Row scalars in memory, (n, SAVED), as kernels read them; the target is the label's affair."""
    saved = like.new_zeros((len(like), SAVED))
    for column, value in zip(columns_of(RowScalars, saved), scalars, strict=True):
        column[:] = value  # m is a number where no teacher is mixed
    for column, value in zip(extras_of(saved, len(extras)), extras, strict=True):
        column[:] = value
    return saved


def _finish_rows(
    problem: Problem, carry: Carry, norms: _RowNorms, total: Tensor, mass: Tensor, labels: Tensor | None
) -> Rows:
    """Loss, statistics and saved scalars from the sums; zeros in ignored rows."""
    theta = (*values_at(problem.parameters, slice(None), total), *norms.extras)
    result, terms, slopes = finish_rows(
        problem, slice(None), norms.binary, norms.in_support, norms.no_columns, theta, total, mass
    )
    scalars = columns_of(RowScalars, norms.saved)
    for column, value in zip((scalars.a, scalars.b, scalars.grad_y), slopes, strict=True):
        column.copy_(value)
    out = result * problem.factor
    if problem.ce_weight:
        out = out + problem.ce_weight * (scalars.ce_lse - carry.label_s)
    counted = None if labels is None else labels >= 0
    stats = out.new_empty((0, STATS))
    if norms.student is not None and norms.teacher is not None:
        stats = torch.stack(_stats(result, terms, norms.student, norms.teacher, norms.no_columns, labels is None), -1)
    if counted is not None:
        out = torch.where(counted, out, 0.0)
        stats = torch.where(counted.unsqueeze(-1), stats, 0.0) if len(stats) else stats
        norms.saved.masked_fill_(~counted.unsqueeze(-1), 0.0)
    return Rows(out, stats, norms.saved)


def _stats(
    loss: Tensor, terms: list[Tensor], student: SideStats, teacher: SideStats, no_columns: Tensor, no_target: bool
) -> TokenStats:
    """Statistics of the rows: 0 where nothing is compared, NaN about a target that there is not."""
    unknown = torch.full_like(loss, torch.nan)
    target_loss, nontarget_loss, target_grad, nontarget_grad = (
        unknown if no_target else torch.where(no_columns, 0.0, x) for x in terms
    )
    return TokenStats(
        loss, target_loss, nontarget_loss, target_grad, nontarget_grad,
        student_entropy=student.entropy, teacher_entropy=teacher.entropy,
        student_logprob=unknown if no_target else student.logprob,
        teacher_logprob=unknown if no_target else teacher.logprob,
        student_lse=student.lse, teacher_lse=teacher.lse,
    )  # fmt: skip


def backward(call: LossCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of Σ upstream_n · loss_n in the operands' dtypes; empty where not wanted or added to `weight_grad`."""
    sweep, chunks, labels, weight_grad = _pass(call), backends.get(call.backend).chunks, call.labels, call.weight_grad
    problem, student = sweep.problem, sweep.student
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
    beside_topk = _topk_chunks(call, sweep) if topk.is_topk(call.teacher_kind) else None
    shares = chunks.shares(n, x.device) if beside_topk is None else [slice(0, n)]
    if beside_topk is not None:
        beside_topk.prepare(saved, scaled)

    def by_rows(rows: slice, columns: slice, dz: Tensor) -> None:
        """dZ of a chunk at some rows, and what it adds to the gradient of their hidden states."""
        part, label = sweep.chunk(rows, columns), None if labels is None else labels[rows]
        if beside_topk is not None:
            beside_topk.gradient(topk.StudentChunk(columns, part.problem, part.student), dz)
        else:
            sides = (part.problem, part.student, part.teacher, label)
            chunks.gradient(*sides, saved[rows], scaled[rows], dominant[rows], dz[rows], columns.start)
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
        _add_dominant(call, sweep, hidden, saved, upstream, dominant, whole, sum_x)
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
    at = dominant.token.clamp(min=0).long()
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
