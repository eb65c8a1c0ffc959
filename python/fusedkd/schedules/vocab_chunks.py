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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import torch_chunks
from ..backends.torch_rows import finish_rows, values_at
from ..call import LossCall, problem_of, sources_of, wide_dtype
from ..dtypes import accumulation_dtype, gradient_dtype, size_of
from ..kernels.device import vocab_chunks as triton_streaming
from ..kernels.device.rows import SAVED, STATS, Logits, Problem
from ..kernels.device.vocab_chunks import CARRY, DOMINANT, EMPTY, online_of
from ..kernels.maths.decomposition import ABSENT, finalize_normalizers, or_infinite, side_stats
from ..kernels.maths.moments import log_sum
from ..sides import Source
from . import gemm, token_chunks
from .planner import DOMINANT_ROWS


def functions_of(backend: str) -> Any:
    """The module whose absorb, add_sums and gradient serve a resolved backend."""
    return triton_streaming if backend == "triton" else torch_chunks


class _Row(NamedTuple):
    """What `RowParameters.torch` may ask of rows that were never whole."""

    near: Tensor
    dtype: torch.dtype


class _RowNorms(NamedTuple):
    """Everything about the rows that does not need the sums: (n,) each."""

    saved: Tensor  # (n, SAVED), the gradient's a, b, T still missing
    pair: tuple[Tensor, ...]  # decomposition.binary
    extras: tuple[Tensor, ...]
    in_support: Tensor
    no_columns: Tensor
    state: tuple[Tensor, ...]
    stats: tuple[Tensor, ...] | None


def _chunks(source: Source, start: int, stop: int, buffer: Tensor | None) -> Logits:
    """All rows' logits of some vocabulary columns."""
    if source.weight is None:
        return Logits(source.x[..., start:stop])
    assert buffer is not None
    bias = None if source.bias is None else source.bias[start:stop]
    # Addressed as a matrix of its own: a narrower last chunk fills the front of the buffer.
    out = buffer.view(-1)[: source.rows * (stop - start)].view(source.rows, stop - start)
    gemm.project(source.x, source.weight[start:stop], out)
    return source.side(out, bias)


class _Pass(NamedTuple):
    """One sweep over the vocabulary."""

    problem: Problem
    student: Source
    teacher: Source
    width: int  # columns per chunk
    student_buffer: Tensor | None  # (N, width) products, of a Head
    teacher_buffer: Tensor | None

    def __iter__(self) -> Iterator[tuple[int, int, Problem, Logits, Logits]]:  # type: ignore[override]
        """(first column, last, the problem on these columns, student, teacher)."""
        total = self.student.width if self.problem.ce_weight else self.problem.vocab_size
        for start in range(0, total, self.width):
            stop = min(start + self.width, total)
            compared = max(0, min(stop, self.problem.vocab_size) - start)
            student = _chunks(self.student, start, stop, self.student_buffer)
            # A chunk of student columns alone still needs a teacher to point at: one column, of which none is compared.
            until = max(start + compared, start + 1) if start < self.teacher.width else start
            teacher = student if until == start else _chunks(self.teacher, start, until, self.teacher_buffer)
            yield start, stop, self.problem._replace(vocab_size=compared), student, teacher


def _pass(call: LossCall) -> _Pass:
    student, teacher = sources_of(call)
    buffers = (
        token_chunks.buffer(source, source.rows, call.columns, None, call.logits_dtype) for source in (student, teacher)
    )
    return _Pass(problem_of(call), student, teacher, call.columns, *buffers)


class Rows(NamedTuple):
    """Loss (N,), statistics (N, STATS) or (0, STATS), and saved row scalars (N, SAVED)."""

    loss: Tensor
    stats: Tensor
    saved: Tensor


def forward(call: LossCall) -> Rows:
    """The value of every row, and what the backward pass needs to know of it."""
    sweep, functions, labels = _pass(call), functions_of(call.backend), call.labels
    problem, x, n = sweep.problem, sweep.student.x, sweep.student.rows
    wide = wide_dtype(call)
    count = len(online_of(problem).init.torch())
    carry = x.new_zeros((n, CARRY + count), dtype=wide)
    for i, value in enumerate(EMPTY):
        carry[:, i] = value
    for start, _, part, student, teacher in sweep:
        functions.absorb(part, student, teacher, labels, carry, start, call.return_stats)
    row_norms = _finalize_normalizers(problem, carry, labels, call.return_stats)
    sums_of = online_of(problem).sums
    if sums_of is None:
        sums = x.new_zeros((n, 3), dtype=wide)
        for start, _, part, student, teacher in sweep:
            if part.vocab_size:
                functions.add_sums(part, student, teacher, labels, row_norms.saved, sums, start)
        total, mass, widest = sums.unbind(-1)
        total = or_infinite.torch(total, widest)
    else:
        theta = (*values_at(problem.parameters, slice(None), carry), *row_norms.extras)
        total, mass = sums_of.torch(row_norms.state, *row_norms.saved[:, 4:7].unbind(-1), theta)
    return _finish_rows(problem, carry, row_norms, total, mass, labels)


def _finalize_normalizers(problem: Problem, carry: Tensor, labels: Tensor | None, with_stats: bool) -> _RowNorms:
    """The rows' normalisers, as `row_value` of kernels/device/forward.py has them."""
    maxima, state = carry[:, :3].unbind(-1), carry[:, CARRY:].unbind(-1)
    inv_tau = 1.0 / problem.temperature
    mix: tuple[Any, ...] = () if problem.mix is None else values_at((problem.mix,), slice(None), carry)
    s_y, t_y = carry[:, 8].clamp(min=ABSENT), carry[:, 9]
    in_support = torch.zeros_like(s_y, dtype=torch.bool) if labels is None else (labels >= 0) & ~torch.isneginf(t_y)
    t_y = t_y.clamp(min=ABSENT)
    (c_s, c_t, k, m), at, pair, (log_zs, zy, own_uy) = finalize_normalizers.torch(
        tuple(maxima), state, s_y, t_y, in_support, inv_tau, mix, online_of(problem).ratio.torch, problem.decoupled
    )
    m = m if isinstance(m, Tensor) else torch.full_like(k, m)
    row_parameters = problem.definition.row_parameters
    theta = values_at(problem.parameters, slice(None), carry)
    extras = () if row_parameters is None else row_parameters.torch(_Row(state[3] < 0.5 * state[0], carry.dtype), theta)
    ce_lse = carry[:, 6] + log_sum.torch(carry[:, 7])
    saved = carry.new_zeros((len(carry), SAVED))
    for i, column in enumerate((c_s, c_t, k, m, *at)):
        saved[:, i] = column
    saved[:, 10] = ce_lse
    for i, column in enumerate(extras):
        saved[:, 12 + i] = column
    no_columns = state[1] == 0
    stats = None
    if with_stats:
        own_t = log_sum.torch(carry[:, 5])
        stats = (
            *side_stats.torch(log_zs, carry[:, 3], zy, c_s * inv_tau, s_y * inv_tau, in_support, no_columns),
            *side_stats.torch(own_t, carry[:, 4], own_uy, (c_t + k) * inv_tau, t_y * inv_tau, in_support, no_columns),
        )
    return _RowNorms(saved, pair, tuple(extras), in_support, no_columns, tuple(state), stats)


def _finish_rows(
    problem: Problem, carry: Tensor, row_norms: _RowNorms, total: Tensor, mass: Tensor, labels: Tensor | None
) -> Rows:
    """Loss, statistics and saved scalars from the sums; zeros in ignored rows."""
    theta = (*values_at(problem.parameters, slice(None), carry), *row_norms.extras)
    result, split, slopes = finish_rows(
        problem, slice(None), row_norms.pair, row_norms.in_support, row_norms.no_columns, theta, total, mass
    )
    out = result * problem.factor
    if problem.ce_weight:
        out = out + problem.ce_weight * (row_norms.saved[:, 10] - carry[:, 8])
    for i, column in enumerate(slopes):
        row_norms.saved[:, 7 + i] = column
    counted = None if labels is None else labels >= 0
    stats = out.new_empty((0, STATS))
    if row_norms.stats is not None:
        terms = [torch.where(row_norms.no_columns, 0.0, x) for x in split]
        entropy_s, logprob_s, lse_s, entropy_t, logprob_t, lse_t = row_norms.stats
        columns = [result, *terms, entropy_s, entropy_t, logprob_s, logprob_t, lse_s, lse_t]
        if labels is None:
            unknown = torch.full_like(result, torch.nan)
            columns[1:5], columns[7:9] = [unknown] * 4, [unknown] * 2
        stats = torch.stack(columns, -1)
    if counted is not None:
        out = torch.where(counted, out, 0.0)
        stats = torch.where(counted.unsqueeze(-1), stats, 0.0) if len(stats) else stats
        row_norms.saved.masked_fill_(~counted.unsqueeze(-1), 0.0)
    return Rows(out, stats, row_norms.saved)


def backward(call: LossCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of Σ upstream_n · loss_n in the operands' dtypes; empty where not wanted or added to `weight_grad`."""
    sweep, functions, labels, weight_grad = _pass(call), functions_of(call.backend), call.labels, call.weight_grad
    problem, student = sweep.problem, sweep.student
    x, weight, n = student.x, student.weight, student.rows
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
    dominant[:, 0] = -1
    dtype = x.dtype if weight is None else gradient_dtype(x)
    # A product that lands in the buffer leaves nothing to put back; only float16 has no range for a plain dZ.
    direct = weight_grad is not None and dtype != torch.float16
    size = upstream.new_ones(()) if direct else size_of(upstream)
    scaled = (upstream / size).contiguous()
    workspace = sweep.student_buffer  # dZ lies over the student's logits where it has their dtype
    if workspace is not None and workspace.dtype != dtype:
        workspace = x.new_empty((n, sweep.width), dtype=dtype)
    for start, stop, part, s, t in sweep:
        if workspace is None:
            dz = grad_x.view(n, student.width)[:, start:stop]
            functions.gradient(part, s, t, labels, saved, upstream, dominant, dz, start)
            continue
        assert weight is not None
        dz = workspace.view(-1)[: n * (stop - start)].view(n, stop - start)
        functions.gradient(part, s, t, labels, saved, scaled, dominant, dz, start)
        if sum_x is not None:
            gemm.hidden_gradient(dz, weight[start:stop], sum_x, accumulate=True)
        if weight_grad is not None:
            _add_product(dz, hidden, size, weight_grad[start:stop])
        elif call.needs_weight:
            _product_into(dz, hidden, size, grad_weight[start:stop])
        if call.needs_bias:
            grad_bias[start:stop] = dz.sum(0, dtype=wide) * size
    if sum_x is not None:
        sum_x *= size
    whole = made if weight_grad is None else made._replace(weight=weight_grad)
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
    dominant: Tensor,
    grads: token_chunks.Gradients,
    sum_x: Tensor | None,
) -> None:
    """Adds the entry of the token that holds most of a row's mass: minus the sum of the row's others."""
    problem, labels, weight = sweep.problem, call.labels, call.student_weight
    top, rest, s_top, slope = dominant.unbind(-1)
    has = top >= 0 if labels is None else (top >= 0) & (labels >= 0)
    at = top.clamp(min=0).long()
    g = -upstream * (problem.factor / problem.temperature) * rest
    if problem.ce_weight:
        one = 0.0 if labels is None else (labels == at).to(g.dtype)
        g = g + upstream * problem.ce_weight * ((s_top - saved[:, 10]).exp() - one)
    g = torch.where(has, g * slope, 0.0)
    if weight is None:
        flat = grads.x.view(len(g), sweep.student.width)
        entry = flat.gather(1, at[:, None])
        flat.scatter_(1, at[:, None], torch.where(has[:, None], g[:, None].to(flat.dtype), entry))
        return
    if sum_x is not None:
        for sums, slopes, tokens in zip(*(x.split(DOMINANT_ROWS) for x in (sum_x, g, at)), strict=True):
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
