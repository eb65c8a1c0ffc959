"""Rows of logits in; per-token loss, statistics and gradient out. One program per row.

Sweeps (each reads every logit once):
    statistics   running maxima and online sums (moments.py), the target's column held out; the value, if they suffice
    sums         only for divergences without a one-sweep form: Σ f, Σ phi at the final offsets, or the sweeps of
                 RowParameters
    gradient     dL/ds = a·phi + b·q in reverse tile order, so that it meets the tiles still in cache. What eviction
                 hints would save here is not measured, so there are none

    value                    one sweep (two)
    gradient                 one sweep, from the saved row scalars and any upstream weight
    value_and_gradient       two sweeps (three) and one write, in one launch

Each sweep goes through inner tiles first, in a loop of its own that masks nothing: whole tiles without the label and,
for the gradient, of rows in which no other token can be likelier than 1/2. Each thread keeps sums of its own.

A row whose label is negative is ignored: nothing of it is read, zeros are written. So is the gradient of a row whose
upstream gradient is 0, whatever its logits hold. Columns whose teacher logit is −inf are outside the support: removed
from both sides, gradient 0. NaN in a compared column makes the row's loss NaN, and all that its gradient has.

Launchers return what Triton compiled: None in its interpreter and where there are no rows.
"""

from typing import Any, NamedTuple

import torch

from ..language import jit, tl, triton
from ..maths.centering import beside_columns, centred, merge_maxima, no_maxima, raise_maxima
from ..maths.decomposition import decompose, finalize_normalizers, or_infinite, side_stats
from ..maths.definition import Definition, OnlineForm
from ..maths.elementary import exp
from ..maths.moments import cross_entropy_advance, entropies_advance, log_sum
from ..maths.quantities import Centre, EntropySums, LogSumExp, Maxima
from ..maths.reductions import thread_max, thread_sum
from .args import (
    SAVED,
    STATS,
    CrossEntropyArg,
    Dominant,
    GradArg,
    LogitsArg,
    ParametersArg,
    RowContext,
    RowScalars,
    RowSums,
    RowValue,
    ScalesArg,
    Target,
    TargetLogs,
    TermSums,
    Totals,
    WeightsArg,
    load_extras,
    load_scalars,
    load_target,
    store_no_stats,
    store_nothing_saved,
    store_saved,
    store_side_stats,
    store_terms,
)
from .loads import (
    as_numbers,
    finite,
    load_logits,
    load_normalized,
    load_pair,
    load_raw,
    row_ptrs,
    row_start,
    row_values,
    spread,
)
from .thread_sums import scatter_to_thread0, tile_columns
from .tiles import SMALLEST, Tile, TileKey, architecture, tile_for

__all__ = ["SAVED", "STATS", "Logits", "Problem", "floor_rows", "gradient", "value", "value_and_gradient"]


class Logits(NamedTuple):
    """One side's logits as they lie in memory: softcap(scale·(x + bias)), with −inf rules left to the kernel.

    Rows are counted through the first two axes, from `first` on: row n is x[(first + n) // inner, (first + n) % inner].
    """

    x: torch.Tensor  # (outer, inner, ≥ V)
    bias: torch.Tensor | None = None  # (≥ V,)
    scale: float | None = None
    softcap: float | None = None
    floor: torch.Tensor | None = None  # (N,) float32: logits below are raised to it (teacher only)
    first: int = 0


class Problem(NamedTuple):
    """What is computed, apart from the tensors it is computed on."""

    definition: Definition
    decoupled: bool
    parameters: tuple[Any, ...]  # floats, or (N,) float32 tensors
    weights: tuple[Any, Any]  # target, nontarget: likewise
    vocab_size: int
    temperature: float = 1.0
    factor: float = 1.0  # on the divergence: 1 or temperature²
    ce_weight: float = 0.0
    mix: Any = None  # the teacher's weight in a mixed teacher: a float, an (N,) float32 tensor, or None
    argmax: bool = False  # the target is the teacher's argmax, not the label


@jit
def no_sums(INIT: tl.constexpr):
    """RowSums of no columns, as numbers that a loop can carry."""
    return RowSums(Maxima(*as_numbers(no_maxima())), as_numbers(INIT()), EntropySums(*as_numbers((0.0, 0.0, 0.0))))


@jit
def no_exponentials():
    """LogSumExp of nothing, likewise."""
    return LogSumExp(*as_numbers((-1e20, 0.0)))


@jit
def accumulate_tile(s, t, live, acc, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """RowSums with a tile of logits; without its entropies where no statistics are wanted."""
    raised = raise_maxima(acc.maxima, s, t, live, inv_tau, mix)
    centre = beside_columns(raised.centre, mix)  # (1, T, 1)
    z, u, d = centred(s, t, centre, inv_tau, mix)  # (R, T, V)
    ez = exp(z)
    eu = exp(u)
    entropies = acc.entropies
    if stats_ptr is not None:
        _, own, _ = centred(s, t, centre, inv_tau, ())
        entropies = entropies_advance(entropies, acc.state[0], raised.move.log_s, raised.own_log_t, z, own, live)
    state = ADVANCE(acc.state, raised.move, z, u, d, ez, eu, live, theta)
    return RowSums(raised.maxima, state, entropies)


@jit
def reduce_all(values):
    """A tuple of (T,) summed over all threads."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.sum(values[i]),)
    return out


@jit
def merge(acc, cross, thread, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """RowSums and LogSumExp of a row from those (T,) of its threads or parts: sums follow a raised maximum, all in one
    step."""
    raised = merge_maxima(acc.maxima, inv_tau, mix)
    none = tl.zeros(thread.shape, tl.float32)  # (T,)
    entropies = acc.entropies
    if stats_ptr is not None:
        entropies = entropies_advance(
            entropies, acc.state[0], raised.move.log_s, raised.own_log_t, none, none, thread < 0
        )
    state = ADVANCE(acc.state, raised.move, none, none, none, none, none, thread < 0, theta)
    top = tl.max(cross.top)
    whole = RowSums(raised.maxima, reduce_all(state), EntropySums(*reduce_all(entropies)))
    return whole, LogSumExp(top, tl.sum(cross.total * tl.exp(cross.top - top)))


@jit
def accumulate_raw_tile(s, t, live, acc, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """Like accumulate_tile, for logits that may hold −inf. Masked columns become −1e30: their e^z = e^u = 0, and sums
    need no mask."""
    s = tl.where(live, finite(s), -1e30)
    t = tl.where(live, finite(t), -1e30)
    return accumulate_tile(s, t, True, acc, inv_tau, mix, stats_ptr, theta, ADVANCE)


@jit
def inner_tiles(y, V, width, allowed, BLOCK: tl.constexpr):
    """Returns (number of full tiles that need no mask, index of the full tile that holds y, number of tiles that need
    a mask).

    No tile goes without a mask unless `allowed`. Where no full tile holds y, the index is that of the first masked one.
    """
    full = tl.where(allowed, V // BLOCK, 0)
    skip_tile = tl.where((y >= 0) & (y < full * BLOCK), y // BLOCK, full)
    num_full = full - tl.where(skip_tile < full, 1, 0)
    return num_full, skip_tile, tl.cdiv(width, BLOCK) - num_full


@jit
def inner_tile(i, skip_tile, BLOCK: tl.constexpr):
    """First column of the i-th tile that needs no mask."""
    return (i + tl.where(i >= skip_tile, 1, 0)) * BLOCK


@jit
def other_tile(i, num_full, skip_tile, BLOCK: tl.constexpr):
    """First column of the i-th tile that needs a mask: the one that holds y comes first."""
    return tl.where(i == 0, skip_tile, num_full + i) * BLOCK


@jit
def statistics(
    student, teacher, ptrs, y, V, scales, mix, stats_ptr, theta, acc, cross,
    ADVANCE, ARGMAX, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The first sweep: adds the columns to `acc`, RowSums, and to `cross`, LogSumExp, of the row's other columns.

    Returns (target, RowSums, LogSumExp). Entropies are summed only where statistics are wanted.
    """
    best_s, best_t = -1e30, -1e30
    width = V
    if scales.ce is not None:
        width = scales.ce.width
    tile = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    thread = tl.arange(0, tile.shape[1])  # (T,)
    acc = RowSums(
        Maxima(*scatter_to_thread0(acc.maxima, -1e20, thread)),
        scatter_to_thread0(acc.state, 0.0, thread),
        EntropySums(*scatter_to_thread0(acc.entropies, 0.0, thread)),
    )  # each (T,)
    cross = LogSumExp(tl.where(thread == 0, cross.top, -1e20), tl.where(thread == 0, cross.total, 0.0))
    INNER: tl.constexpr = not ARGMAX and scales.ce is None
    num_full, skip_tile, num_masked = inner_tiles(y, V, width, INNER, BLOCK)
    if INNER:
        for i in range(0, num_full):
            cols = inner_tile(i, skip_tile, BLOCK) + tile
            x = load_raw(student, teacher, ptrs, cols, None, None)
            acc = accumulate_raw_tile(x.s, x.t, x.live, acc, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    for i in range(0, num_masked):
        cols = other_tile(i, num_full, skip_tile, BLOCK) + tile
        x = load_raw(student, teacher, ptrs, cols, cols < V, cols < width)
        s, t, live = x.s, x.t, x.live  # (R, T, V)
        if scales.ce is not None:
            cross = cross_entropy_advance(cross, finite(s), cols < width)
        if ARGMAX:
            # The argmax so far is held out; one that beats it takes its place, and the old one that of the new.
            s = finite(s)
            t = finite(t)
            top = tl.max(tl.where(live, t, -2e30))
            new_argmax = tl.min(tl.where(live & (t == top), cols, 2147483647))
            new_argmax = tl.where(top > best_t, new_argmax, -1)
            mine = cols == new_argmax
            s_new = tl.sum(tl.where(mine, s, 0.0))
            s = tl.where(mine, best_s, s)
            t = tl.where(mine, best_t, t)
            live = live & (tl.where(mine, best_t, 0.0) > -1e30)
            y = tl.where(new_argmax >= 0, new_argmax, y)
            best_s = tl.where(new_argmax >= 0, s_new, best_s)
            best_t = tl.where(new_argmax >= 0, top, best_t)
        else:
            live = live & (cols != y)
        acc = accumulate_raw_tile(s, t, live, acc, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    acc, cross = merge(acc, cross, thread, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    return y, acc, cross


@jit
def add_terms(sums, f, phi, d, live):
    """TermSums with a tile."""
    total = sums.total + thread_sum(tl.where(live, f, 0.0))
    mass = sums.mass + thread_sum(tl.where(live, phi, 0.0))
    return TermSums(total, mass, tl.maximum(sums.widest, thread_max(tl.where(live, d, 0.0))))


@jit
def term_sums(student, teacher, ctx, log_norms, theta, sums, TERM, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """`sums`, TermSums, with the columns: the sweep of what has no one-sweep form."""
    tile = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    sums = TermSums(*scatter_to_thread0(sums, 0.0, tl.arange(0, tile.shape[1])))  # each (T,)
    for start in range(0, ctx.V, BLOCK):
        x, live, t = load_normalized(student, teacher, ctx, log_norms, start + tile)
        f, phi = TERM(x.q, x.p, x.logq, x.logp, x.delta, theta)
        sums = add_terms(sums, f, phi, x.d, live)
    return TermSums(tl.sum(sums.total), tl.sum(sums.mass), tl.max(sums.widest))


@jit
def finish_row(
    row, scales, loss_ptr, stats_ptr, acc, totals, target, norms, theta, weights, TERM, DECOUPLED: tl.constexpr
):
    """Stores loss and statistics of a row whose sums are known; returns its RowScalars."""
    terms = decompose(
        totals.total, totals.mass, norms.binary, target.in_support, theta, weights.target, weights.nontarget, TERM,
        DECOUPLED,
    )  # fmt: skip
    no_columns = acc.state[1] == 0  # no column but the target is compared: every term is 0
    out = tl.where(no_columns, 0.0, terms.loss * scales.factor)
    ce_lse = totals.cross.top + log_sum(totals.cross.total)
    if scales.ce is not None:
        out += scales.ce.weight * (ce_lse - totals.label_s)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, out)
    centre, own, inv_tau = norms.centre, norms.own, scales.inv_tau
    if stats_ptr is not None:
        shift_s, logit_s = centre.c_s * inv_tau, target.s * inv_tau
        log_zt = log_sum(acc.entropies.z_t)
        shift_t, logit_t = (centre.c_t + centre.k) * inv_tau, target.t * inv_tau
        store_terms(stats_ptr, row, terms, target.has_target, no_columns)
        of_student = side_stats(
            own.log_zs, acc.entropies.student, own.z_y, shift_s, logit_s, target.in_support, no_columns
        )
        store_side_stats(stats_ptr, row, 0, of_student, target.has_target)
        of_teacher = side_stats(
            log_zt, acc.entropies.teacher, own.own_u_y, shift_t, logit_t, target.in_support, no_columns
        )
        store_side_stats(stats_ptr, row, 1, of_teacher, target.has_target)
    a = tl.where(no_columns, 0.0, terms.a)
    b = tl.where(no_columns, 0.0, terms.b)
    grad_y = tl.where(no_columns, 0.0, terms.grad_y)
    l_s, l_t, r = norms.log_norms
    return RowScalars(centre.c_s, centre.c_t, centre.k, centre.m, l_s, l_t, r, a, b, grad_y, ce_lse)


@jit
def _row_scalars(
    student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
    TERM, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """All sweeps of the value: stores loss and statistics, returns RowValue."""
    theta = row_values(numbers.theta, row)
    weights = WeightsArg(*row_values(numbers.weights, row))
    mix = row_values(numbers.mix, row)
    y = label
    if ARGMAX:
        y = tl.full((), -1, tl.int32)
    ptrs = row_ptrs(student, teacher, row)
    y, acc, cross = statistics(
        student, teacher, ptrs, y, V, scales, mix, stats_ptr, theta, no_sums(INIT), no_exponentials(),
        ADVANCE, ARGMAX, BLOCK, THREADS,
    )  # fmt: skip
    held_out = load_pair(student, teacher, ptrs, y, (y >= 0) & (y < V), (y >= 0) & (y < V))
    target = Target(held_out.s, held_out.t, held_out.live, y >= 0)
    norms = finalize_normalizers(
        acc.maxima, acc.state, target.s, target.t, target.in_support, scales.inv_tau, mix, RATIO, DECOUPLED
    )
    ctx = RowContext(ptrs, y, V, scales.inv_tau, mix, norms.centre)
    extras, sums = (), ()
    if ROW_PARAMETERS is not None:
        logs = TargetLogs(norms.binary.logq_y, norms.binary.logp_y, norms.binary.delta_y, target.in_support)
        extras, sums = ROW_PARAMETERS(student, teacher, ctx, acc.state, norms.log_norms, logs, theta, BLOCK)
        theta = theta + extras
    if len(sums) == 2:
        total, mass = sums
    elif SUMS is None:
        none = TermSums(*as_numbers((0.0, 0.0, 0.0)))
        swept = term_sums(student, teacher, ctx, norms.log_norms, theta, none, TERM, BLOCK, THREADS)
        total, mass = or_infinite(swept.total, swept.widest), swept.mass
    else:
        total, mass = SUMS(acc.state, norms.log_norms.l_s, norms.log_norms.l_t, norms.log_norms.r, theta)
    label_s = 0.0
    if scales.ce is not None:
        label_s, label_slope = load_logits(student, ptrs.student, label, label >= 0)
    totals = Totals(total, mass, cross, label_s)
    scalars = finish_row(row, scales, loss_ptr, stats_ptr, acc, totals, target, norms, theta, weights, TERM, DECOUPLED)
    return RowValue(y, mix, theta, extras, scalars)


@jit
def no_dominant(THREADS: tl.constexpr):
    """Dominant, (THREADS,) each, before any tile."""
    zeros = tl.zeros((THREADS,), tl.float32)
    return Dominant(tl.full((THREADS,), -1, tl.int32), zeros, zeros, zeros)


@jit
def slopes(s, t, scalars, inv_tau, mix, theta, TERM):
    """q and phi of a tile of logits, two tiles."""
    z, u, d = centred(s, t, Centre(scalars.c_s, scalars.c_t, scalars.k, scalars.m), inv_tau, mix)
    q = exp(z - scalars.l_s)
    f, phi = TERM(q, exp(u - scalars.l_t), z - scalars.l_s, u - scalars.l_t, d - scalars.r, theta)
    return q, phi


@jit
def inner_gradient_tile(x, cols, row, scales, mix, grad, scalars, upstream, theta, TERM):
    """Writes a tile of the gradient in which all columns are of one kind: neither the target nor likelier than 1/2."""
    q, phi = slopes(x.s, finite(x.t), scalars, scales.inv_tau, mix, theta, TERM)
    scale = upstream * scales.factor * scales.inv_tau
    g = tl.where(x.live, (scalars.a * scale) * phi + (scalars.b * scale) * q, 0.0)
    g = tl.where(x.s <= -1e30, 0.0, g)  # not `s > -1e30` the other way round: NaN has to pass
    at = grad.ptr + row * grad.stride_n + spread(cols, grad.stride_v)
    tl.store(at, (g * x.slope).to(grad.ptr.dtype.element_ty))


@jit
def gradient_tile(
    x, cols, row, y, label, scales, mix, softcap, grad, scalars, upstream, theta, dominant, TERM
):  # fmt: skip
    """Writes a tile of the gradient, 0 for the dominant token; returns Dominant of each thread with the tile."""
    q, phi = slopes(x.s, x.t, scalars, scales.inv_tau, mix, theta, TERM)
    dominates = tl.where(x.live & (cols != y), q, 0.0) > 0.5  # in at most one column of the row
    g = tl.where(x.live, tl.where(cols == y, scalars.grad_y, scalars.a * phi + scalars.b * q), 0.0)
    g = tl.where(dominates, 0.0, g)
    rest = dominant.rest + thread_sum(g)  # (T,)
    token = tl.maximum(dominant.token, thread_max(tl.where(dominates, cols, -1)))
    # At most one is not 0; `grad` may lie over the logits, so it cannot be read later.
    logit = dominant.logit + thread_sum(tl.where(dominates, x.s, 0.0))
    slope = dominant.slope
    if softcap is not None:
        slope += thread_sum(tl.where(dominates, x.slope, 0.0))
    # Multiplied after it is masked: a select moved behind the rounding to half precision would undo its packing.
    g = tl.where(x.s <= -1e30, 0.0, g) * (upstream * scales.factor * scales.inv_tau)  # NaN has to pass
    if scales.ce is not None:
        g += upstream * scales.ce.weight * (tl.exp(x.s - scalars.ce_lse) - tl.where(cols == label, 1.0, 0.0))
        g = tl.where(dominates, 0.0, g)
    at = grad.ptr + row * grad.stride_n + spread(cols, grad.stride_v)
    tl.store(at, (g * x.slope).to(grad.ptr.dtype.element_ty), mask=cols < grad.width)
    return Dominant(token, rest, logit, slope)


@jit
def merge_dominant(dominant, student):
    """Dominant of the row from those (T,) of its threads."""
    if student.softcap is None:
        slope = 1.0
        if student.scale is not None:
            slope = slope * student.scale
    else:
        slope = tl.sum(dominant.slope)
    return Dominant(tl.max(dominant.token), tl.sum(dominant.rest), tl.sum(dominant.logit), slope)


@jit
def store_dominant(row, label, scales, grad, dominant, ce_lse, upstream):
    """The entry of the dominant token, if there is one: minus the sum of all others."""
    if dominant.token >= 0:
        g = -upstream * scales.factor * scales.inv_tau * dominant.rest
        if scales.ce is not None:
            q = tl.exp(dominant.logit - ce_lse)
            g += upstream * scales.ce.weight * (q - tl.where(dominant.token == label, 1.0, 0.0))
        at = grad.ptr + row * grad.stride_n + spread(dominant.token, grad.stride_v)
        tl.store(at, (g * dominant.slope).to(grad.ptr.dtype.element_ty))


@jit
def gradient_sweep(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The last sweep, tiles in reverse: writes upstream · dL/d(stored student number) over the student's width.

    Returns Dominant of the row, whose entry is not written: a·phi + b·q cancels there. The gradient of a row sums to 0,
    and the sum of the others does not cancel.
    """
    seen = V
    if scales.ce is not None:
        seen = grad.width
    ptrs = row_ptrs(student, teacher, row)
    first = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    dominant = no_dominant(first.shape[1])  # each (T,)
    INNER: tl.constexpr = scales.ce is None
    # No q can exceed e^(1/8τ − l_s): a centre lies within 1/8 of its maximum (centering.py).
    none_dominates = tl.exp(0.125 * scales.inv_tau - scalars.l_s) <= 0.5
    num_full, skip_tile, num_masked = inner_tiles(y, V, grad.width, INNER & none_dominates, BLOCK)
    if INNER:
        for i in range(0, num_full):
            cols = inner_tile(num_full - 1 - i, skip_tile, BLOCK) + first
            x = load_raw(student, teacher, ptrs, cols, None, None)
            inner_gradient_tile(x, cols, row, scales, mix, grad, scalars, upstream, theta, TERM)
    for i in range(0, num_masked):
        cols = other_tile(i, num_full, skip_tile, BLOCK) + first
        x = load_pair(student, teacher, ptrs, cols, cols < V, cols < seen)
        dominant = gradient_tile(
            x, cols, row, y, label, scales, mix, student.softcap, grad, scalars, upstream, theta, dominant, TERM
        )
    return merge_dominant(dominant, student)


@jit
def _whole_gradient(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The last sweep over a whole row, the dominant token included."""
    dominant = gradient_sweep(
        student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK, THREADS
    )
    tl.debug_barrier()  # the zero that the sweep wrote there may be another warp's, and still on its way
    store_dominant(row, label, scales, grad, dominant, scalars.ce_lse, upstream)


@jit
def store_zero_tile(grad, row, start, BLOCK: tl.constexpr):
    """Zeros over BLOCK columns of a row of GradArg."""
    cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
    zeros = tl.zeros((BLOCK,), grad.ptr.dtype.element_ty)
    tl.store(grad.ptr + row * grad.stride_n + spread(cols, grad.stride_v), zeros, mask=cols < grad.width)


@jit
def store_zeros(grad, row, BLOCK: tl.constexpr):
    """Zeros over a row of GradArg."""
    for start in range(0, grad.width, BLOCK):
        store_zero_tile(grad, row, start, BLOCK)


@jit
def upstream_of(upstream_ptr, row):
    """The row's upstream gradient, 1 if none is given."""
    if upstream_ptr is None:
        return 1.0
    else:
        return tl.load(upstream_ptr + row)


@jit
def ignore(row, loss_ptr, stats_ptr):
    """Zeros for a row that does not count."""
    tl.store(loss_ptr + row, 0.0)
    if stats_ptr is not None:
        store_no_stats(stats_ptr, row)


@jit
def label_of(label_ptr, row):
    """The label, −1 without labels, and whether the row counts."""
    if label_ptr is None:
        return -1, True
    else:
        y = tl.load(label_ptr + row).to(tl.int32)
        return y, y >= 0


@jit
def _value(
    student, teacher, label_ptr, loss_ptr, saved_ptr, stats_ptr, V, scales, numbers,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    ROW_PARAMETERS: tl.constexpr, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        of_row = _row_scalars(
            student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
            TERM, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        if saved_ptr is not None:
            store_saved(saved_ptr, row, of_row.scalars, of_row.y, of_row.extras)
    else:
        ignore(row, loss_ptr, stats_ptr)
        if saved_ptr is not None:
            store_nothing_saved(saved_ptr, row)


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, V, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        scalars = load_scalars(saved_ptr, row)
        theta = row_values(numbers.theta, row)
        theta = theta + load_extras(saved_ptr, row, EXTRAS)
        mix = row_values(numbers.mix, row)
        y = label
        if ARGMAX:
            y = load_target(saved_ptr, row)
        _whole_gradient(
            student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK, THREADS
        )
    else:
        store_zeros(grad, row, BLOCK)


@jit
def _value_and_gradient(
    student, teacher, label_ptr, loss_ptr, stats_ptr, upstream_ptr, grad, V, scales, numbers,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    ROW_PARAMETERS: tl.constexpr, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        of_row = _row_scalars(
            student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
            TERM, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        # The gradient may lie over the logits: no warp writes before every warp has read the label's.
        tl.debug_barrier()
        upstream = upstream_of(upstream_ptr, row)
        if upstream != 0:
            _whole_gradient(
                student, teacher, row, of_row.y, label, V, scales, of_row.mix, grad, of_row.scalars, upstream,
                of_row.theta, TERM, BLOCK, THREADS,
            )  # fmt: skip
    else:
        ignore(row, loss_ptr, stats_ptr)
    if not (counted & (upstream_of(upstream_ptr, row) != 0)):  # loaded again: kept, it would cost registers
        store_zeros(grad, row, BLOCK)


def arguments(problem: Problem, student: Logits, teacher: Logits) -> dict[str, Any]:
    """Everything the row kernels take in common."""
    ce = CrossEntropyArg(float(problem.ce_weight), student.x.shape[2]) if problem.ce_weight else None
    mix = () if problem.mix is None else (problem.mix,)
    return {
        "student": logits_arg(student),
        "teacher": logits_arg(teacher),
        "V": problem.vocab_size,
        "scales": ScalesArg(1.0 / problem.temperature, float(problem.factor), ce),
        "numbers": ParametersArg(problem.parameters, WeightsArg(*problem.weights), mix),
        "TERM": problem.definition.term,
        "ARGMAX": problem.argmax,
    }


def logits_arg(side: Logits) -> LogitsArg:
    """A side as kernels take it."""
    outer, n, v = side.x.stride()
    return LogitsArg(side.x, side.first, side.x.shape[1], outer, n, v, side.bias, side.scale, side.softcap, side.floor)


def grad_arg(out: torch.Tensor, width: int | None = None) -> GradArg:
    """A gradient (N, ≥ width) as kernels take it, all of its columns unless told."""
    n, v = out.stride()
    return GradArg(out, n, v, out.shape[1] if width is None else width)


def sweep_of(problem: Problem) -> dict[str, Any]:
    """What the kernels of the value are injected with."""
    online = problem.definition.sweep(problem.parameters)
    row_parameters = problem.definition.row_parameters
    return {
        "INIT": online.init,
        "ADVANCE": online.advance,
        "RATIO": online.ratio,
        "SUMS": online.sums,
        "ROW_PARAMETERS": None if row_parameters is None else row_parameters.kernel,
        "DECOUPLED": problem.decoupled,
    }


def tile(problem: Problem, student: Logits, teacher: Logits) -> Tile:
    """The table's tile for a problem."""
    return tile_for(tile_key(problem, student, teacher), problem.vocab_size)


def tile_key(problem: Problem, student: Logits, teacher: Logits) -> TileKey:
    """The key of the table that a problem runs with."""
    width = max(student.x.element_size(), teacher.x.element_size())
    kind = tile_class(problem.definition.sweep(problem.parameters), problem.argmax or problem.mix is not None)
    return TileKey(architecture(student.x.device), kind, width)


def tile_class(online: OnlineForm, busy: bool) -> str:
    """The row of the table: looking for the target, or mixing the teacher, takes the registers of a heavier one."""
    return "heavy" if busy and online.tile == "light" else online.tile


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> Any:
    """Fills the per-row `loss` (N,), the row scalars `saved` (N, SAVED) for `gradient`, and `stats` (N, STATS)."""
    n = loss.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _value[(n,)](
            label_ptr=labels, loss_ptr=loss, saved_ptr=saved, stats_ptr=stats,
            **arguments(problem, student, teacher), **sweep_of(problem), **best.launch(),
        )  # fmt: skip
    return None


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> Any:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), any strides."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _gradient[(n,)](
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream, grad=grad_arg(out),
            **arguments(problem, student, teacher), EXTRAS=problem.definition.extras,
            **best.launch(),
        )  # fmt: skip
    return None


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> Any:
    """Fills `loss` (N,), `stats` if given, and `out` with upstream_n · dloss_n/dx (upstream 1 if None)."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _value_and_gradient[(n,)](
            label_ptr=labels, loss_ptr=loss, stats_ptr=stats, upstream_ptr=upstream,
            grad=grad_arg(out),
            **arguments(problem, student, teacher), **sweep_of(problem), **best.launch(),
        )  # fmt: skip
    return None


def floor_rows(problem: Problem, teacher: Logits, labels: torch.Tensor | None, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp: what support="floor" raises to."""
    n = out.shape[0]
    if n:
        block = min(4096, max(SMALLEST, triton.next_power_of_2(problem.vocab_size)))
        _floor[(n,)](
            logits_arg(teacher),
            labels,
            out,
            problem.vocab_size,
            1.0 / problem.temperature,
            depth,
            BLOCK=block,
            **Tile(block, 4).options(),
        )


@jit
def _floor(teacher, label_ptr, out_ptr, V, inv_tau, depth, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y, counted = label_of(label_ptr, row)
    top, total = -1e20, 0.0
    for start in range(0, tl.where(counted, V, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        t, slope = load_logits(teacher, row_start(teacher, row), cols, cols < V)
        new = tl.maximum(top, tl.max(t))
        total = total * tl.exp((top - new) * inv_tau) + tl.sum(tl.where(cols < V, tl.exp((t - new) * inv_tau), 0.0))
        top = new
    tl.store(out_ptr + row, top + (log_sum(total) - depth) / inv_tau)
