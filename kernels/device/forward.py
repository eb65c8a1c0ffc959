"""The value of a row: its sweeps over the columns, and what follows from their sums.

    statistics_sweep     running maxima and online sums (moments.py), the target's column held out
    term_sweep           Σ f, Σ phi at the final normalizers, only for divergences without a one-sweep form

A tile is (R, T, V) as thread_sums.tile_columns lays it out. Each of the T threads keeps sums of its own, (T,), which
`merge` makes scalars after the last tile.
"""

from ..language import constant, jit, tl
from ..maths.centering import beside_columns, centre_of, centred, exponentials, merge_maxima, no_maxima, raise_maxima
from ..maths.decomposition import decompose, finalize_normalizers, or_infinite, side_stats
from ..maths.moments import cross_entropy_advance, entropies_advance, log_sum
from ..maths.quantities import Centre, EntropySums, LogSumExp, Maxima
from ..maths.reductions import thread_max, thread_sum
from .args import (
    RowContext,
    RowScalars,
    RowSums,
    RowValue,
    Target,
    TargetLogs,
    TermSums,
    Totals,
    WeightsArg,
    store_no_stats,
    store_side_stats,
    store_terms,
)
from .column_sweep import column_sweep
from .loads import as_numbers, finite, load_logits, load_pair, load_raw, row_ptrs, row_values
from .thread_sums import scatter_to_thread0, tile_columns
from .tile_order import full_tile, masked_tile, tile_order
from .vectors import NOWHERE, edge_columns, row_vectors

# RowScalars.top_col of a row whose largest logit lies in no tile, but among its edges: beyond any vocabulary, exact in
# float32, and a multiple of every BLOCK.
EDGE = 1 << 23
_EDGE = constant(EDGE)


@jit
def no_sums(INIT: tl.constexpr):
    """RowSums of no columns, as scalars that a loop can carry."""
    return RowSums(Maxima(*as_numbers(no_maxima())), as_numbers(INIT()), EntropySums(*as_numbers((0.0, 0.0, 0.0))))


@jit
def no_exponentials():
    """LogSumExp of no columns, as scalars that a loop can carry."""
    return LogSumExp(*as_numbers((-1e20, 0.0)))


@jit
def accumulate_tile(s, t, live, acc, centre, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """Add a tile of logits (R, T, V) to `acc`, RowSums of (T,) each; live is (R, T, V), or True for all of it.

    centre: that of the maxima so far, m left out. The entropies stay as they are where no statistics are wanted:
    stats_ptr is None. Returns RowSums and Centre.
    """
    raised = raise_maxima(acc.maxima, centre, s, t, live, inv_tau, mix)
    beside = beside_columns(raised.centre, mix)  # (1, T, 1)
    z, u, d = centred(s, t, beside, inv_tau, mix)  # (R, T, V)
    ez, eu = exponentials(s, t, beside, inv_tau, mix, 0.0, 0.0)
    entropies = acc.entropies
    if stats_ptr is not None:
        _, own, _ = centred(s, t, beside, inv_tau, ())
        entropies = entropies_advance(entropies, acc.state[0], raised.move.log_s, raised.own_log_t, z, own, live)
    state = ADVANCE(acc.state, raised.move, z, u, d, ez, eu, live, theta)
    centre = Centre(raised.centre.c_s, raised.centre.c_t, raised.centre.k, centre.m)
    return RowSums(raised.maxima, state, entropies), centre


@jit
def accumulate_raw_tile(s, t, live, acc, centre, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """Like accumulate_tile, for logits that may hold −inf. Masked columns become −1e30, so their exp is 0 and the sums
    need no mask."""
    s = tl.where(live, finite(s), -1e30)
    t = tl.where(live, finite(t), -1e30)
    return accumulate_tile(s, t, True, acc, centre, inv_tau, mix, stats_ptr, theta, ADVANCE)


@jit
def reduce_all(values):
    """Returns a tuple of scalars: each (T,) of `values` summed over all threads."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.sum(values[i]),)
    return out


@jit
def merge(acc, cross, thread, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """Merge the RowSums and the LogSumExp of a row's T threads or splits, (T,) each. Returns both as scalars.

    Every sum follows the row's maximum, as it follows a raised one from tile to tile; `thread` is arange(0, T).
    """
    raised = merge_maxima(acc.maxima, inv_tau, mix)  # maxima and centre scalars, moves (T,)
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
def _masked_statistics(
    student, teacher, ptrs, cols, V, width, held_out, acc, centre, cross, scales, mix, stats_ptr, theta, ADVANCE, ARGMAX
):  # fmt: skip
    """Add the columns `cols` (R, T, V) below V to `acc` and those below `width` to `cross`, (T,) each.

    held_out: (y, logits of the argmax so far). Returns it, RowSums, their Centre and LogSumExp.
    """
    y, best_s, best_t = held_out
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
        beats = (top > best_t) | ((top == best_t) & (new_argmax < y))  # the first of equals, in whatever order
        new_argmax = tl.where(beats, new_argmax, NOWHERE)
        mine = cols == new_argmax
        s_new = tl.sum(tl.where(mine, s, 0.0))
        s = tl.where(mine, best_s, s)
        t = tl.where(mine, best_t, t)
        live = live & (tl.where(mine, best_t, 0.0) > -1e30)
        y = tl.where(beats, new_argmax, y)
        best_s = tl.where(beats, s_new, best_s)
        best_t = tl.where(beats, top, best_t)
    else:
        live = live & (cols != y)
    acc, centre = accumulate_raw_tile(s, t, live, acc, centre, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    return (y, best_s, best_t), acc, centre, cross


@jit
def statistics_sweep(
    student, teacher, ptrs, y, V, scales, mix, stats_ptr, theta, acc, cross,
    ADVANCE, ARGMAX, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """First sweep: add a row's columns, the target's held out, to `acc` (RowSums) and `cross` (LogSumExp), all scalars.

    Returns (target, RowSums, LogSumExp, RowScalars.top_col). With ARGMAX the target is searched: y is −1, and the
    teacher's argmax so far is held out of the sums. Entropies are summed only where statistics are wanted.
    """
    width = V
    if scales.ce is not None:
        width = scales.ce.width
    vectors = row_vectors(student, teacher, ptrs, V, width)
    first = vectors.ptrs.first
    tile = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    thread = tl.arange(0, tile.shape[1])  # (T,)
    acc = RowSums(
        Maxima(*scatter_to_thread0(acc.maxima, -1e20, thread)),
        scatter_to_thread0(acc.state, 0.0, thread),
        EntropySums(*scatter_to_thread0(acc.entropies, 0.0, thread)),
    )  # each (T,)
    c_s, c_t, k, _ = centre_of(acc.maxima, 1.0, ())
    centre = Centre(c_s, c_t, k, tl.zeros(thread.shape, tl.float32))  # carried: made again it would cost each tile
    cross = LogSumExp(tl.where(thread == 0, cross.top, -1e20), tl.where(thread == 0, cross.total, 0.0))
    INNER: tl.constexpr = not ARGMAX and scales.ce is None
    y = tl.full((), NOWHERE, tl.int32) if ARGMAX else y - first
    held_out = (y, -1e30, -1e30)  # with logits of the argmax so far
    order = tile_order(y, -1, vectors.V, vectors.width, INNER, BLOCK)
    top_col = tl.full((tile.shape[1],), -1, tl.int32)  # (T,)
    if INNER:
        for i in range(0, order.num_full):
            start, top = full_tile(order, i, BLOCK), acc.maxima.s
            x = load_raw(student, teacher, vectors.ptrs, start + tile, None, None)  # (R, T, V)
            acc, centre = accumulate_raw_tile(
                x.s, x.t, x.live, acc, centre, scales.inv_tau, mix, stats_ptr, theta, ADVANCE
            )
            top_col = tl.where(acc.maxima.s > top, start, top_col)
    for i in range(0, order.num_masked):
        start, top = masked_tile(order, i, BLOCK), acc.maxima.s
        held_out, acc, centre, cross = _masked_statistics(
            student, teacher, vectors.ptrs, start + tile, vectors.V, vectors.width, held_out, acc, centre, cross,
            scales, mix, stats_ptr, theta, ADVANCE, ARGMAX,
        )  # fmt: skip
        top_col = tl.where(acc.maxima.s > top, start, top_col)
    if teacher.congruent is not None:
        for i in range(0, tl.cdiv(width - vectors.V, tile.shape[1])):
            top = acc.maxima.s
            held_out, acc, centre, cross = _masked_statistics(
                student, teacher, vectors.ptrs, edge_columns(vectors, i, tile.shape[1]), V - first, width - first,
                held_out, acc, centre, cross, scales, mix, stats_ptr, theta, ADVANCE, ARGMAX,
            )  # fmt: skip
            top_col = tl.where(acc.maxima.s > top, _EDGE, top_col)
    y, best_s, best_t = held_out
    if ARGMAX:
        y = tl.where(y > NOWHERE, y + first, -1)
        top_col = -1  # the logits that change places are not where they were loaded
    else:
        y = y + first
        top_col = tl.max(tl.where(acc.maxima.s == tl.max(acc.maxima.s), top_col, -1))
        if teacher.congruent is not None:
            top_col = tl.where(top_col >= 0, top_col + first, -1)
    acc, cross = merge(acc, cross, thread, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    return y, acc, cross, top_col


@jit
def add_terms(sums, x, live, theta, TERM):
    """Add a NormalizedTile (R, T, V) to TermSums, (T,) each. δ of a column that does not count is no large one."""
    f, phi = TERM(x.q, x.p, x.logq, x.logp, x.delta, theta)  # (R, T, V) each
    total = sums.total + thread_sum(tl.where(live, f, 0.0))
    mass = sums.mass + thread_sum(tl.where(live, phi, 0.0))
    return TermSums(total, mass, tl.maximum(sums.widest, thread_max(x.delta)))


@jit
def _add_terms(sums, x, live, theta, TERM):
    """`add_terms` for column_sweep."""
    return add_terms(TermSums(*sums), x, live, theta, TERM)


@jit
def term_sweep(student, teacher, ctx, log_norms, theta, sums, TERM, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Second sweep, for divergences without a one-sweep form: add a row's columns to `sums`, TermSums of scalars."""
    sums = TermSums(*column_sweep(student, teacher, ctx, log_norms, sums, theta, _add_terms, TERM, BLOCK, THREADS))
    return TermSums(tl.sum(sums.total), tl.sum(sums.mass), tl.max(sums.widest))


@jit
def finish_row(
    row, scales, loss_ptr, stats_ptr, acc, totals, target, norms, top_col, theta, weights, TERM, OUTER,
    DECOUPLED: tl.constexpr,
):  # fmt: skip
    """Store loss and statistics of a row whose sums are complete. Returns its RowScalars."""
    terms = decompose(
        totals.total, totals.mass, norms.binary, target.in_support, theta, weights.target, weights.nontarget, TERM,
        OUTER, DECOUPLED,
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
    return RowScalars(centre.c_s, centre.c_t, centre.k, centre.m, l_s, l_t, r, a, b, grad_y, ce_lse, top_col + 0.0)


@jit
def row_value(
    student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
    TERM, OUTER, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """All sweeps of a row's value: store loss and statistics. Returns RowValue."""
    theta = row_values(numbers.theta, row)
    weights = WeightsArg(*row_values(numbers.weights, row))
    mix = row_values(numbers.mix, row)
    y = label
    if ARGMAX:
        y = tl.full((), -1, tl.int32)
    ptrs = row_ptrs(student, teacher, row)
    y, acc, cross, top_col = statistics_sweep(
        student, teacher, ptrs, y, V, scales, mix, stats_ptr, theta, no_sums(INIT), no_exponentials(),
        ADVANCE, ARGMAX, BLOCK, THREADS,
    )  # fmt: skip
    held_out = load_pair(student, teacher, ptrs, y, (y >= 0) & (y < V), (y >= 0) & (y < V))
    target = Target(held_out.s, held_out.t, (y >= 0) & held_out.live, y >= 0)
    norms = finalize_normalizers(
        acc.maxima, acc.state, target.s, target.t, target.in_support, scales.inv_tau, mix, RATIO, DECOUPLED
    )
    ctx = RowContext(ptrs, y, V, scales.inv_tau, mix, norms.centre)
    extras, sums = (), ()
    if ROW_PARAMETERS is not None:
        logs = TargetLogs(norms.binary.logq_y, norms.binary.logp_y, norms.binary.delta_y, target.in_support)
        extras, sums = ROW_PARAMETERS(student, teacher, ctx, acc.state, norms.log_norms, logs, theta, BLOCK, THREADS)
        theta = theta + extras
    if len(sums) == 2:
        total, mass = sums
    elif SUMS is None:
        none = TermSums(*as_numbers((0.0, 0.0, 0.0)))
        swept = term_sweep(student, teacher, ctx, norms.log_norms, theta, none, TERM, BLOCK, THREADS)
        total, mass = or_infinite(swept.total, swept.widest), swept.mass
    else:
        total, mass = SUMS(acc.state, norms.log_norms.l_s, norms.log_norms.l_t, norms.log_norms.r, theta)
    label_s = 0.0
    if scales.ce is not None:
        label_s, label_slope = load_logits(student, ptrs.student, 0, label, label >= 0)
    totals = Totals(total, mass, cross, label_s)
    scalars = finish_row(
        row, scales, loss_ptr, stats_ptr, acc, totals, target, norms, top_col, theta, weights, TERM, OUTER, DECOUPLED
    )
    return RowValue(y, mix, theta, extras, scalars)


@jit
def store_ignored(row, loss_ptr, stats_ptr):
    """Store zeros as loss and statistics of a row that does not count."""
    tl.store(loss_ptr + row, 0.0)
    if stats_ptr is not None:
        store_no_stats(stats_ptr, row)
