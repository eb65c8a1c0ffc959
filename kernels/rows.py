"""Rows of logits in; per-token loss, statistics and gradient out. One program per row.

Sweeps (each reads every logit once):
    statistics   running maxima and online sums (online.py), the target's column held out; the value, if they suffice
    sums         only for divergences without a one-sweep form: Σ f, Σ phi at the final offsets (or what `gather` does)
    gradient     dL/ds = a·phi + b·q in reverse tile order, so that it meets the tiles still in cache. What eviction
                 hints would save here is not measured, so there are none

    value                    one sweep (two)
    gradient                 one sweep, from the saved row scalars and any upstream weight
    value_and_gradient       two sweeps (three) and one write, in one launch

Each sweep goes through inner tiles first, in a loop of its own that masks nothing: whole tiles without the label and,
for the gradient, of rows in which no other token can be likelier than 1/2. Each thread keeps its own sums (lanes.py).

A row whose label is negative is ignored: nothing of it is read, zeros are written. So is the gradient of a row whose
upstream gradient is 0, whatever its logits hold. Columns whose teacher logit is −inf are outside the support: removed
from both sides, gradient 0. NaN in a compared column makes the row's loss NaN, and all that its gradient has.

Launchers return what Triton compiled: None in its interpreter and where there are no rows.
"""

from typing import Any, NamedTuple

import torch

from .columns import (
    as_numbers,
    beside_columns,
    centred,
    columns,
    finite,
    load_numbers,
    load_pair,
    load_raw,
    load_side,
    merge_maxima,
    no_maxima,
    place_of,
    raise_maxima,
    row_start,
    row_values,
    spread,
)
from .divergence import Definition, Online
from .lanes import in_first_lane, lane_max, lane_sum, tile_columns
from .language import jit, tl, triton
from .maths import exp
from .online import cross_entropy_advance, entropies_advance, log_sum
from .split import about_side, meet, or_infinite, settle
from .tiles import SMALLEST, Line, Tile, architecture, fitting

SAVED = 14  # row scalars that the gradient sweep needs
STATS = 11  # per-token statistics, in the order of fusedkd.KDStats


class Side(NamedTuple):
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
    argmax: bool = False  # the target is the teacher's favourite, not the label


@jit
def take_tile(s, t, live, gathered, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """A tile into a row's maxima, online state and, if statistics are wanted, entropy sums."""
    maxima, state, warmth = gathered
    maxima, centre, move, own_log_t = raise_maxima(maxima, s, t, live, inv_tau, mix)
    centre = beside_columns(centre, mix)
    z, u, d = centred(s, t, centre, inv_tau, mix)
    ez = exp(z)
    eu = exp(u)
    if stats_ptr is not None:
        _, own, _ = centred(s, t, centre, inv_tau, ())
        warmth = entropies_advance(warmth, state[0], move[0], own_log_t, z, own, live)
    state = ADVANCE(state, move, z, u, d, ez, eu, live, theta)
    return maxima, state, warmth


@jit
def together(values):
    """The sum over all lanes, of each."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.sum(values[i]),)
    return out


@jit
def merge(maxima, state, warmth, cross, lane, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """What lanes, or parts of a row, have gathered as that of all: sums follow a raised maximum, all in one step."""
    whole, move, own_log_t = merge_maxima(maxima, inv_tau, mix)
    none = tl.zeros(lane.shape, tl.float32)
    if stats_ptr is not None:
        warmth = entropies_advance(warmth, state[0], move[0], own_log_t, none, none, lane < 0)
    state = ADVANCE(state, move, none, none, none, none, none, lane < 0, theta)
    top = tl.max(cross[0])
    return whole, together(state), together(warmth), (top, tl.sum(cross[1] * tl.exp(cross[0] - top)))


@jit
def weigh(s, t, live, gathered, inv_tau, mix, stats_ptr, theta, ADVANCE):
    """take_tile of raw logits, all columns live: what does not count has e^z = e^u = 0, cheaper than masked sums."""
    s = tl.where(live, finite(s), -1e30)
    t = tl.where(live, finite(t), -1e30)
    return take_tile(s, t, True, gathered, inv_tau, mix, stats_ptr, theta, ADVANCE)


@jit
def inner_tiles(y, V, width, allowed, BLOCK: tl.constexpr):
    """How many tiles need no mask: whole ones without the column y, none unless allowed. Which one y keeps out (or the
    first behind them); how many tiles are left."""
    whole = tl.where(allowed, V // BLOCK, 0)
    apart = tl.where((y >= 0) & (y < whole * BLOCK), y // BLOCK, whole)
    inside = whole - tl.where(apart < whole, 1, 0)
    return inside, apart, tl.cdiv(width, BLOCK) - inside


@jit
def inner_tile(i, apart, BLOCK: tl.constexpr):
    """Where the i-th of the inner tiles begins."""
    return (i + tl.where(i >= apart, 1, 0)) * BLOCK


@jit
def other_tile(i, inside, apart, BLOCK: tl.constexpr):
    """Where the i-th of the tiles left begins: that of y first."""
    return tl.where(i == 0, apart, inside + i) * BLOCK


@jit
def statistics(
    student, teacher, place, y, V, scales, mix, stats_ptr, theta, maxima, state, warmth, cross,
    ADVANCE, ARGMAX, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The first sweep: target, maxima, online state, entropy sums (if statistics are wanted), CE's maximum and sum.

    Added to those given, of other columns of the row.
    """
    inv_tau, factor, ce = scales
    best_s, best_t = -1e30, -1e30
    width = V
    if ce is not None:
        width = ce[1]
    tile = tile_columns(student[0], BLOCK, THREADS)
    lane = tl.arange(0, tile.shape[1])
    maxima = in_first_lane(maxima, -1e20, lane)
    state = in_first_lane(state, 0.0, lane)
    warmth = in_first_lane(warmth, 0.0, lane)
    cross = in_first_lane((cross[0],), -1e20, lane) + in_first_lane((cross[1],), 0.0, lane)
    INNER: tl.constexpr = not ARGMAX and ce is None
    inside, apart, others = inner_tiles(y, V, width, INNER, BLOCK)
    if INNER:
        for i in range(0, inside):
            cols = inner_tile(i, apart, BLOCK) + tile
            s, t, live, slope = load_raw(student, teacher, place, cols, None, None)
            gathered = weigh(s, t, live, (maxima, state, warmth), inv_tau, mix, stats_ptr, theta, ADVANCE)
            maxima, state, warmth = gathered
    for i in range(0, others):
        cols = other_tile(i, inside, apart, BLOCK) + tile
        s, t, live, slope = load_raw(student, teacher, place, cols, cols < V, cols < width)
        if ce is not None:
            cross = cross_entropy_advance(cross, finite(s), cols < width)
        if ARGMAX:
            # The favourite so far is held out; one that beats it takes its place, and the old one that of the new.
            s = finite(s)
            t = finite(t)
            top = tl.max(tl.where(live, t, -2e30))
            favourite = tl.min(tl.where(live & (t == top), cols, 2147483647))
            favourite = tl.where(top > best_t, favourite, -1)
            mine = cols == favourite
            s_new = tl.sum(tl.where(mine, s, 0.0))
            s = tl.where(mine, best_s, s)
            t = tl.where(mine, best_t, t)
            live = live & (tl.where(mine, best_t, 0.0) > -1e30)
            y = tl.where(favourite >= 0, favourite, y)
            best_s = tl.where(favourite >= 0, s_new, best_s)
            best_t = tl.where(favourite >= 0, top, best_t)
        else:
            live = live & (cols != y)
        gathered = weigh(s, t, live, (maxima, state, warmth), inv_tau, mix, stats_ptr, theta, ADVANCE)
        maxima, state, warmth = gathered
    maxima, state, warmth, cross = merge(maxima, state, warmth, cross, lane, inv_tau, mix, stats_ptr, theta, ADVANCE)
    return y, maxima, state, warmth, cross


@jit
def add_terms(sums, f, phi, d, live):
    """Σ f, Σ phi and the largest d, with a tile."""
    total = sums[0] + lane_sum(tl.where(live, f, 0.0))
    mass = sums[1] + lane_sum(tl.where(live, phi, 0.0))
    return total, mass, tl.maximum(sums[2], lane_max(tl.where(live, d, 0.0)))


@jit
def term_sums(student, teacher, view, at, theta, sums, TERM, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Σ f, Σ phi and the largest d over the columns, added to `sums`: the sweep of what has no one-sweep form."""
    tile = tile_columns(student[0], BLOCK, THREADS)
    total, mass, widest = in_first_lane(sums, 0.0, tl.arange(0, tile.shape[1]))
    for start in range(0, view[2], BLOCK):
        q, p, logq, logp, delta, d, live, t = columns(student, teacher, view, at, start + tile)
        f, phi = TERM(q, p, logq, logp, delta, theta)
        total, mass, widest = add_terms((total, mass, widest), f, phi, d, live)
    return tl.sum(total), tl.sum(mass), tl.max(widest)


@jit
def _store_stats(stats_ptr, row, held, present, empty, split, about_student, about_teacher):
    """One row of KDStats; what is about the target is NaN where nothing is held out."""
    loss, target_loss, nontarget_loss, target_grad, nontarget_grad = split
    at = stats_ptr + row * 11
    tl.store(at, tl.where(empty, 0.0, loss))
    tl.store(at + 1, tl.where(held, tl.where(empty, 0.0, target_loss), float("nan")))
    tl.store(at + 2, tl.where(held, tl.where(empty, 0.0, nontarget_loss), float("nan")))
    tl.store(at + 3, tl.where(held, tl.where(empty, 0.0, target_grad), float("nan")))
    tl.store(at + 4, tl.where(held, tl.where(empty, 0.0, nontarget_grad), float("nan")))
    for i in tl.static_range(2):
        if i == 0:
            log_z, warmth, x_y, shift, alone = about_student
        else:
            log_z, warmth, x_y, shift, alone = about_teacher
        entropy, logprob, lse = about_side(log_z, warmth, x_y, shift, alone, present, empty)
        tl.store(at + 5 + i, entropy)
        tl.store(at + 7 + i, tl.where(held, logprob, float("nan")))
        tl.store(at + 9 + i, lse)


@jit
def close(
    row, scales, loss_ptr, stats_ptr, state, warmth, ends, about_target, met, theta, target, nontarget,
    TERM, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """Stores loss and statistics of a row whose sums are known; returns what the gradient sweep needs."""
    inv_tau, factor, ce = scales
    total, mass, cross, s_label = ends
    s_y, t_y, present, held = about_target
    centre, at, pair, own = met
    c_s, c_t, k, m = centre
    log_zs, zy, own_uy = own
    loss, target_loss, nontarget_loss, target_grad, nontarget_grad, a, b, grad_y = settle(
        total, mass, pair, present, theta, target, nontarget, TERM, DECOUPLED
    )
    empty = state[1] == 0  # nothing to compare but the label: every term is 0
    out = tl.where(empty, 0.0, loss * factor)
    ce_lse = cross[0] + log_sum(cross[1])
    if ce is not None:
        out += ce[0] * (ce_lse - s_label)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, out)
    if stats_ptr is not None:
        split = (loss, target_loss, nontarget_loss, target_grad, nontarget_grad)
        about_student = (log_zs, warmth[0], zy, c_s * inv_tau, s_y * inv_tau)
        about_teacher = (log_sum(warmth[2]), warmth[1], own_uy, (c_t + k) * inv_tau, t_y * inv_tau)
        _store_stats(stats_ptr, row, held, present, empty, split, about_student, about_teacher)
    a = tl.where(empty, 0.0, a)
    b = tl.where(empty, 0.0, b)
    grad_y = tl.where(empty, 0.0, grad_y)
    return c_s, c_t, k, m, at[0], at[1], at[2], a, b, grad_y, ce_lse


@jit
def _row_scalars(
    student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
    TERM, INIT, ADVANCE, RATIO, SUMS, GATHER, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """All sweeps of the value: stores loss and statistics, returns theta and what the gradient sweep needs."""
    inv_tau, factor, ce = scales
    theta = row_values(numbers[0], row)
    target, nontarget = row_values(numbers[1], row)
    mix = row_values(numbers[2], row)
    y = label
    if ARGMAX:
        y = tl.full((), -1, tl.int32)
    place = place_of(student, teacher, row)
    y, maxima, state, warmth, cross = statistics(
        student, teacher, place, y, V, scales, mix, stats_ptr, theta,
        as_numbers(no_maxima()), as_numbers(INIT()), as_numbers((0.0, 0.0, 0.0)), as_numbers((-1e20, 0.0)),
        ADVANCE, ARGMAX, BLOCK, THREADS,
    )  # fmt: skip
    s_y, t_y, present, slope_y = load_pair(student, teacher, place, y, (y >= 0) & (y < V), (y >= 0) & (y < V))
    centre, at, pair, own = meet(maxima, state, s_y, t_y, present, inv_tau, mix, RATIO, DECOUPLED)
    view = (place, y, V, inv_tau, mix, centre)
    extras, sums = (), ()
    if GATHER is not None:
        label_terms = (pair[0], pair[1], pair[2], present)
        extras, sums = GATHER(student, teacher, view, state, at, label_terms, theta, BLOCK)
        theta = theta + extras
    if len(sums) == 2:
        total, mass = sums
    elif SUMS is None:
        total, mass, widest = term_sums(
            student, teacher, view, at, theta, as_numbers((0.0, 0.0, 0.0)), TERM, BLOCK, THREADS
        )
        total = or_infinite(total, widest)
    else:
        total, mass = SUMS(state, at[0], at[1], at[2], theta)
    s_label = 0.0
    if ce is not None:
        s_label, slope_label = load_side(student, place[1], label, label >= 0)
    ends = (total, mass, cross, s_label)
    about_target = (s_y, t_y, present, y >= 0)
    scalars = close(
        row, scales, loss_ptr, stats_ptr, state, warmth, ends, about_target, (centre, at, pair, own), theta,
        target, nontarget, TERM, DECOUPLED,
    )  # fmt: skip
    return y, mix, theta, extras, scalars


@jit
def nothing_found(LANES: tl.constexpr):
    """What gradient_tile starts from: the likeliest token, the sum of the others, its student logit and its slope."""
    zeros = tl.zeros((LANES,), tl.float32)
    return tl.full((LANES,), -1, tl.int32), zeros, zeros, zeros


@jit
def slopes(s, t, scalars, inv_tau, mix, theta, TERM):
    """q and phi of a tile."""
    c_s, c_t, k, m, l_s, l_t, r, a, b, grad_y, ce_lse = scalars
    z, u, d = centred(s, t, (c_s, c_t, k, m), inv_tau, mix)
    q = exp(z - l_s)
    f, phi = TERM(q, exp(u - l_t), z - l_s, u - l_t, d - r, theta)
    return q, phi


@jit
def inner_gradient_tile(columns, row, scales, mix, grad, scalars, upstream, theta, TERM):
    """Writes a tile of the gradient in which all columns are of one kind: neither the target nor likelier than 1/2."""
    s, t, live, slope, cols = columns
    inv_tau, factor, ce = scales
    c_s, c_t, k, m, l_s, l_t, r, a, b, grad_y, ce_lse = scalars
    grad_ptr, stride_n, _, width = grad
    q, phi = slopes(s, finite(t), scalars, inv_tau, mix, theta, TERM)
    scale = upstream * factor * inv_tau
    g = tl.where(live, (a * scale) * phi + (b * scale) * q, 0.0)
    g = tl.where(s <= -1e30, 0.0, g)  # not `s > -1e30` the other way round: NaN has to pass
    at = grad_ptr + row * stride_n + spread(cols, grad[2])
    tl.store(at, (g * slope).to(grad_ptr.dtype.element_ty))


@jit
def gradient_tile(columns, row, y, label, scales, mix, softcap, grad, scalars, upstream, theta, found, TERM):
    """Writes a tile of the gradient, 0 for the likeliest token; returns `found`, of each lane, with the tile."""
    s, t, live, slope, cols = columns
    inv_tau, factor, ce = scales
    c_s, c_t, k, m, l_s, l_t, r, a, b, grad_y, ce_lse = scalars
    top, rest, s_top, slope_top = found
    grad_ptr, stride_n, _, width = grad
    q, phi = slopes(s, t, scalars, inv_tau, mix, theta, TERM)
    likeliest = tl.where(live & (cols != y), q, 0.0) > 0.5
    g = tl.where(live, tl.where(cols == y, grad_y, a * phi + b * q), 0.0)
    g = tl.where(likeliest, 0.0, g)
    rest += lane_sum(g)
    top = tl.maximum(top, lane_max(tl.where(likeliest, cols, -1)))
    # At most one is not 0; `grad` may lie over the logits, so it cannot be read later.
    s_top += lane_sum(tl.where(likeliest, s, 0.0))
    if softcap is not None:
        slope_top += lane_sum(tl.where(likeliest, slope, 0.0))
    # Multiplied after it is masked: a select moved behind the rounding to half precision would undo its packing.
    g = tl.where(s <= -1e30, 0.0, g) * (upstream * factor * inv_tau)  # NaN has to pass
    if ce is not None:
        g += upstream * ce[0] * (tl.exp(s - ce_lse) - tl.where(cols == label, 1.0, 0.0))
        g = tl.where(likeliest, 0.0, g)
    at = grad_ptr + row * stride_n + spread(cols, grad[2])
    tl.store(at, (g * slope).to(grad_ptr.dtype.element_ty), mask=cols < width)
    return top, rest, s_top, slope_top


@jit
def all_found(found, student):
    """The likeliest token (−1: none), the sum of the others, its student logit and its slope."""
    top, rest, s_top, slope_top = found
    if student[8] is None:
        slope = 1.0
        if student[7] is not None:
            slope = slope * student[7]
    else:
        slope = tl.sum(slope_top)
    return tl.max(top), tl.sum(rest), tl.sum(s_top), slope


@jit
def store_likeliest(row, label, scales, grad, found, ce_lse, upstream):
    """The entry of the likeliest token, if there is one: minus the sum of all others."""
    top, rest, s_top, slope_top = found
    inv_tau, factor, ce = scales
    grad_ptr, stride_n, _, width = grad
    if top >= 0:
        g = -upstream * factor * inv_tau * rest
        if ce is not None:
            g += upstream * ce[0] * (tl.exp(s_top - ce_lse) - tl.where(top == label, 1.0, 0.0))
        tl.store(grad_ptr + row * stride_n + spread(top, grad[2]), (g * slope_top).to(grad_ptr.dtype.element_ty))


@jit
def gradient_sweep(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The last sweep, tiles in reverse: writes upstream · dL/d(stored student number) over the student's width.

    Returns the token that holds most of the mass (−1: none), whose entry is not written: a·phi + b·q cancels there. The
    gradient of a row sums to 0, and the sum of the others, which is returned too, does not cancel.
    """
    inv_tau, factor, ce = scales
    width = grad[3]
    seen = V
    if ce is not None:
        seen = width
    place = place_of(student, teacher, row)
    first = tile_columns(student[0], BLOCK, THREADS)
    top, rest, s_top, slope_top = nothing_found(first.shape[1])
    INNER: tl.constexpr = ce is None
    # No q can exceed e^(1/8τ − l_s): a centre lies within 1/8 of its maximum (columns.py).
    inside, apart, others = inner_tiles(y, V, width, INNER & (tl.exp(0.125 * inv_tau - scalars[4]) <= 0.5), BLOCK)
    if INNER:
        for i in range(0, inside):
            cols = inner_tile(inside - 1 - i, apart, BLOCK) + first
            s, t, live, slope = load_raw(student, teacher, place, cols, None, None)
            inner_gradient_tile(
                (s, t, live, slope, cols), row, scales, mix, grad, scalars, upstream, theta, TERM
            )  # fmt: skip
    for i in range(0, others):
        cols = other_tile(i, inside, apart, BLOCK) + first
        s, t, live, slope = load_pair(student, teacher, place, cols, cols < V, cols < seen)
        top, rest, s_top, slope_top = gradient_tile(
            (s, t, live, slope, cols), row, y, label, scales, mix, student[8], grad, scalars, upstream, theta,
            (top, rest, s_top, slope_top), TERM,
        )  # fmt: skip
    return all_found((top, rest, s_top, slope_top), student)


@jit
def _whole_gradient(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The last sweep over a whole row, the likeliest token included."""
    found = gradient_sweep(
        student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK, THREADS
    )
    tl.debug_barrier()  # the zero that the sweep wrote there may be another warp's, and still on its way
    store_likeliest(row, label, scales, grad, found, scalars[10], upstream)


@jit
def store_zero_tile(grad, row, start, BLOCK: tl.constexpr):
    """A tile of a row of `grad` = (pointer, row stride, column stride, width)."""
    grad_ptr, stride_n, _, width = grad
    cols = start + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row * stride_n + spread(cols, grad[2]), zeros, mask=cols < width)


@jit
def store_zeros(grad, row, BLOCK: tl.constexpr):
    """A row of `grad`."""
    for start in range(0, grad[3], BLOCK):
        store_zero_tile(grad, row, start, BLOCK)


@jit
def store_saved(saved_ptr, row, scalars):
    """What a row's gradient needs, and zeros behind it."""
    for i in tl.static_range(14):
        if i < len(scalars):
            tl.store(saved_ptr + row * 14 + i, scalars[i])
        else:
            tl.store(saved_ptr + row * 14 + i, 0.0)


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
        for i in tl.static_range(11):
            tl.store(stats_ptr + row * 11 + i, 0.0)


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
    GATHER: tl.constexpr, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        y, mix, theta, extras, scalars = _row_scalars(
            student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
            TERM, INIT, ADVANCE, RATIO, SUMS, GATHER, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        if saved_ptr is not None:
            store_saved(saved_ptr, row, scalars + (y + 0.0,) + extras)
    else:
        ignore(row, loss_ptr, stats_ptr)
        if saved_ptr is not None:
            store_saved(saved_ptr, row, ())


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, V, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        at = saved_ptr + row * 14
        scalars = load_numbers(at, 11)
        theta = row_values(numbers[0], row)
        theta = theta + load_numbers(at + 12, EXTRAS)
        mix = row_values(numbers[2], row)
        y = label
        if ARGMAX:
            y = tl.load(at + 11).to(tl.int32)
        _whole_gradient(
            student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK, THREADS
        )
    else:
        store_zeros(grad, row, BLOCK)


@jit
def _value_and_gradient(
    student, teacher, label_ptr, loss_ptr, stats_ptr, upstream_ptr, grad, V, scales, numbers,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    GATHER: tl.constexpr, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        y, mix, theta, extras, scalars = _row_scalars(
            student, teacher, row, label, V, scales, loss_ptr, stats_ptr, numbers,
            TERM, INIT, ADVANCE, RATIO, SUMS, GATHER, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        # The gradient may lie over the logits: no warp writes before every warp has read the label's.
        tl.debug_barrier()
        upstream = upstream_of(upstream_ptr, row)
        if upstream != 0:
            _whole_gradient(
                student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK, THREADS
            )
    else:
        ignore(row, loss_ptr, stats_ptr)
    if not (counted & (upstream_of(upstream_ptr, row) != 0)):  # loaded again: kept, it would cost registers
        store_zeros(grad, row, BLOCK)


def arguments(problem: Problem, student: Side, teacher: Side) -> dict[str, Any]:
    """Everything the row kernels take in common."""
    ce = (float(problem.ce_weight), student.x.shape[2]) if problem.ce_weight else None
    return {
        "student": pack(student),
        "teacher": pack(teacher),
        "V": problem.vocab_size,
        "scales": (1.0 / problem.temperature, float(problem.factor), ce),
        "numbers": (problem.parameters, problem.weights, () if problem.mix is None else (problem.mix,)),
        "TERM": problem.definition.term,
        "ARGMAX": problem.argmax,
    }


def pack(side: Side) -> tuple[Any, ...]:
    """A side as kernels take it (columns.load_side)."""
    return (side.x, side.first, side.x.shape[1], *side.x.stride(), side.bias, side.scale, side.softcap, side.floor)


def sweep_of(problem: Problem) -> dict[str, Any]:
    """What the kernels of the value are injected with."""
    online = problem.definition.sweep(problem.parameters)
    gather = problem.definition.gather
    return {
        "INIT": online.init,
        "ADVANCE": online.advance,
        "RATIO": online.ratio,
        "SUMS": online.sums,
        "GATHER": None if gather is None else gather.kernel,
        "DECOUPLED": problem.decoupled,
    }


def tile(problem: Problem, student: Side, teacher: Side) -> Tile:
    """The table's tile for a problem."""
    return fitting(line(problem, student, teacher), problem.vocab_size)


def line(problem: Problem, student: Side, teacher: Side) -> Line:
    """The line of the table that a problem runs with."""
    width = max(student.x.element_size(), teacher.x.element_size())
    kind = tile_class(problem.definition.sweep(problem.parameters), problem.argmax or problem.mix is not None)
    return architecture(student.x.device), kind, width


def tile_class(online: Online, busy: bool) -> str:
    """The row of the table: looking for the target, or mixing the teacher, takes the registers of a heavier one."""
    return "heavy" if busy and online.tile == "light" else online.tile


def value(
    problem: Problem,
    student: Side,
    teacher: Side,
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
    student: Side,
    teacher: Side,
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
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream, grad=(out, *out.stride(), out.shape[1]),
            **arguments(problem, student, teacher), EXTRAS=problem.definition.extras,
            **best.launch(),
        )  # fmt: skip
    return None


def value_and_gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
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
            grad=(out, *out.stride(), out.shape[1]),
            **arguments(problem, student, teacher), **sweep_of(problem), **best.launch(),
        )  # fmt: skip
    return None


def floor_rows(problem: Problem, teacher: Side, labels: torch.Tensor | None, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp: what support="floor" raises to."""
    n = out.shape[0]
    if n:
        block = min(4096, max(SMALLEST, triton.next_power_of_2(problem.vocab_size)))
        _floor[(n,)](
            pack(teacher),
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
        t, slope = load_side(teacher, row_start(teacher, row), cols, cols < V)
        new = tl.maximum(top, tl.max(t))
        total = total * tl.exp((top - new) * inv_tau) + tl.sum(tl.where(cols < V, tl.exp((t - new) * inv_tau), 0.0))
        top = new
    tl.store(out_ptr + row, top + (log_sum(total) - depth) / inv_tau)
