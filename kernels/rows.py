"""Rows of logits in; per-token loss, statistics and gradient out. One program per row.

Sweeps (each reads every logit once):
    statistics   running maxima and online sums (online.py), the label column held out; one-sweep divergences are done
    sums         only for divergences without a one-sweep form: Σ f, Σ phi at the final offsets
    gradient     dL/ds = a·phi + b·q in reverse tile order, so that it meets the tiles still in cache

    value                    one sweep (two)
    gradient                 one sweep, from the saved row scalars and any upstream weight
    value_and_gradient       two sweeps (three) and one write, in one launch

A row whose label is negative is ignored: nothing of it is read, zeros are written. Columns whose teacher logit is −inf
are outside the support: removed from both sides, gradient 0.
"""

from typing import Any, NamedTuple

import torch

from .divergence import Definition
from .language import jit, tl, triton
from .maths import tanh
from .online import log_sum
from .split import assemble, binary, offsets
from .tiles import SMALLEST, TABLE, Tile

SAVED = 10  # row scalars that the gradient sweep needs
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


@jit
def _row_values(values, row):
    """A tuple of floats and of pointers to one float per row, read at `row`."""
    out = ()
    for i in tl.static_range(len(values)):
        value = values[i]
        if value.dtype.is_ptr():
            out = out + (tl.load(value + row),)
        else:
            out = out + (value,)
    return out


@jit
def _spread(cols, stride):
    """Column offsets, 64-bit only where a stride could carry them past 2³¹.

    Taken from its tuple by index: unpacking would turn a compile-time 1 into a number.
    """
    if stride == 1:
        return cols
    else:
        return tl.cast(cols, tl.int64) * stride


@jit
def _load(side, row, cols, mask):
    """Logits at `cols`, −inf where masked, and their derivative with respect to the stored number."""
    ptr, first, inner, stride_o, stride_n, _, bias_ptr, scale, softcap, floor_ptr = side
    at = ptr + (row + first) // inner * stride_o + (row + first) % inner * stride_n
    x = tl.load(at + _spread(cols, side[5]), mask=mask, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        x *= scale
        slope = slope * scale
    if softcap is not None:
        bent = tanh(x / softcap)
        x = tl.where(mask, softcap * bent, float("-inf"))
        slope = slope * (1.0 - bent * bent)
    return x, slope


@jit
def _load_pair(student, teacher, row, cols, mask, student_mask):
    """Student and teacher logits, which columns are compared, and the student's slope. −inf becomes a finite −1e30."""
    s, slope = _load(student, row, cols, student_mask)
    t, teacher_slope = _load(teacher, row, cols, mask)
    floor_ptr = teacher[9]
    live = mask & (t != float("-inf"))
    if floor_ptr is not None:
        live = mask & ((t != float("-inf")) | (s != float("-inf")))
        floor = tl.load(floor_ptr + row)
        t = tl.where(t < floor, floor, t)
    return tl.where(s < -1e30, -1e30, s), tl.where(t < -1e30, -1e30, t), live, slope


@jit
def _centre(maxima):
    """(c_s, c_t, k): the maxima on a coarse grid, so that s − c_s and t − c_t are exact where it matters, and what d
    lacks to be 0 where both maxima stand."""
    top_s, top_t = maxima
    c_s = tl.floor(top_s * 4.0 + 0.5) * 0.25
    c_t = tl.floor(top_t * 4.0 + 0.5) * 0.25
    return c_s, c_t, (top_t - c_t) - (top_s - c_s)


@jit
def _move(maxima, s, t, live, inv_tau):
    """The running maxima with a tile, their centre, and how the centre moved, over τ."""
    top_s, top_t = maxima
    old_s, old_t, old_k = _centre(maxima)
    raised = (tl.maximum(top_s, tl.max(tl.where(live, s, -1e20))), tl.maximum(top_t, tl.max(tl.where(live, t, -1e20))))
    c_s, c_t, k = _centre(raised)
    log_s = old_s - c_s
    log_t = old_t - c_t
    more = old_k - k  # added last: beside a large move its digits would be lost
    return raised, (c_s, c_t, k), (log_s * inv_tau, (log_t + more) * inv_tau, ((log_s - log_t) - more) * inv_tau)


@jit
def _centred(s, t, centre, inv_tau):
    """z, u and d = u − z."""
    c_s, c_t, k = centre
    z = s - c_s
    u = t - c_t
    return z * inv_tau, (u - k) * inv_tau, ((u - z) - k) * inv_tau


@jit
def _statistics(student, teacher, row, y, V, inv_tau, ce, stats_ptr, theta, INIT, ADVANCE, BLOCK: tl.constexpr):
    """The first sweep: centre, online state, Σ e^z z and Σ e^u u (if statistics are wanted), CE's maximum and sum."""
    maxima = (-1e20, -1e20)
    state = INIT()
    warmth_s, warmth_t = 0.0, 0.0
    ce_max, ce_sum = -1e20, 0.0
    width = V
    if ce is not None:
        width = ce[1]
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t, live, slope = _load_pair(student, teacher, row, cols, cols < V, cols < width)
        live = live & (cols != y)
        if ce is not None:
            top = tl.maximum(ce_max, tl.max(s))
            ce_sum = ce_sum * tl.exp(ce_max - top) + tl.sum(tl.where(cols < width, tl.exp(s - top), 0.0))
            ce_max = top
        maxima, centre, move = _move(maxima, s, t, live, inv_tau)
        z, u, d = _centred(s, t, centre, inv_tau)
        ez = tl.exp(z)
        eu = tl.exp(u)
        if stats_ptr is not None:
            log_s, log_t, x = move
            to_s = tl.exp(log_s)
            to_t = tl.exp(log_t)
            warmth_s = to_s * warmth_s + tl.where(to_s > 0, to_s * log_s, 0.0) * state[0]
            warmth_t = to_t * warmth_t + tl.where(to_t > 0, to_t * log_t, 0.0) * state[1]
            warmth_s += tl.sum(tl.where(live, ez * z, 0.0))
            warmth_t += tl.sum(tl.where(live, eu * u, 0.0))
        state = ADVANCE(state, move, z, u, d, ez, eu, live, theta)
    return _centre(maxima), state, (warmth_s, warmth_t), ce_max + log_sum(ce_sum)


@jit
def _second_sums(student, teacher, row, y, V, inv_tau, centre, l_s, l_t, r, theta, TERM, BLOCK: tl.constexpr):
    """The second sweep of divergences without a one-sweep form: Σ f, Σ phi."""
    total, mass, widest = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t, live, slope = _load_pair(student, teacher, row, cols, cols < V, cols < V)
        live = live & (cols != y)
        z, u, d = _centred(s, t, centre, inv_tau)
        f, phi = TERM(tl.exp(z - l_s), tl.exp(u - l_t), z - l_s, u - l_t, d - r, theta)
        total += tl.sum(tl.where(live, f, 0.0))
        mass += tl.sum(tl.where(live, phi, 0.0))
        widest = tl.maximum(widest, tl.max(tl.where(live, d, 0.0)))
    # A column with q = 0 < p has d of 1e30: where that makes the sum huge, it is infinite.
    return tl.where((widest > 1e20) & (total > 1e10), float("inf"), total), mass


@jit
def _row_scalars(
    student, teacher, row, y, V, scales, ce, loss_ptr, stats_ptr, theta, weights,
    TERM, INIT, ADVANCE, RATIO, SUMS, DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All sweeps of the value: stores loss and statistics, returns what the gradient sweep needs."""
    inv_tau, factor = scales
    target, nontarget = weights
    centre, state, warmth, ce_lse = _statistics(
        student, teacher, row, y, V, inv_tau, ce, stats_ptr, theta, INIT, ADVANCE, BLOCK
    )
    c_s, c_t, k = centre
    log_zs = log_sum(state[0])
    log_zt = log_sum(state[1])
    r = RATIO(state)

    s_y, t_y, present, slope_y = _load_pair(student, teacher, row, y, (y >= 0) & (y < V), (y >= 0) & (y < V))
    zy, uy, dy = _centred(s_y, t_y, centre, inv_tau)
    # An unlikely label stands far from both centres: without a large offset its plain difference is the exact one.
    dy = tl.where(tl.abs(c_t - c_s) < 8.0, (((t_y - s_y) - (c_t - c_s)) - k) * inv_tau, dy)
    zy = tl.where(present, zy, -1e30)
    uy = tl.where(present, uy, -1e30)
    logq_y, logp_y, delta_y, log_rest_q, log_rest_p, delta_rest = binary(
        log_zs, log_zt, r, zy, uy, tl.where(present, dy, r)
    )
    f_y, phi_y = TERM(tl.exp(logq_y), tl.exp(logp_y), logq_y, logp_y, delta_y, theta)
    f_y = tl.where(present, tl.where(f_y > 1e25, float("inf"), f_y), 0.0)
    phi_y = tl.where(present, phi_y, 0.0)
    f_rest, phi_rest = TERM(tl.exp(log_rest_q), tl.exp(log_rest_p), log_rest_q, log_rest_p, delta_rest, theta)

    l_s, l_t, r_row = offsets(log_zs, log_zt, r, log_rest_q, log_rest_p, delta_rest, DECOUPLED)
    if SUMS is None:
        total, mass = _second_sums(student, teacher, row, y, V, inv_tau, centre, l_s, l_t, r_row, theta, TERM, BLOCK)
    else:
        total, mass = SUMS(state, l_s, l_t, r_row, theta)
    loss, target_loss, nontarget_loss, target_grad, nontarget_grad, a, b, grad_y = assemble(
        total, mass, f_y, phi_y, f_rest, phi_rest, logq_y, log_rest_q, target, nontarget, DECOUPLED
    )

    empty = state[1] == 0  # nothing to compare but the label: every term is 0
    out = tl.where(empty, 0.0, loss * factor)
    if ce is not None:
        s_label, slope_label = _load(student, row, y, y >= 0)
        out += ce[0] * (ce_lse - s_label)
    tl.store(loss_ptr + row, out)
    if stats_ptr is not None:
        full_s = log_zs - log_rest_q
        full_t = log_zt - log_rest_p
        warmth_s, warmth_t = warmth
        q_y = tl.where(present, tl.exp(logq_y) * zy, 0.0)
        p_y = tl.where(present, tl.exp(logp_y) * uy, 0.0)
        held = y >= 0
        tl.store(stats_ptr + row * 11, tl.where(empty, 0.0, loss))
        tl.store(stats_ptr + row * 11 + 1, tl.where(held, tl.where(empty, 0.0, target_loss), float("nan")))
        tl.store(stats_ptr + row * 11 + 2, tl.where(held, tl.where(empty, 0.0, nontarget_loss), float("nan")))
        tl.store(stats_ptr + row * 11 + 3, tl.where(held, tl.where(empty, 0.0, target_grad), float("nan")))
        tl.store(stats_ptr + row * 11 + 4, tl.where(held, tl.where(empty, 0.0, nontarget_grad), float("nan")))
        tl.store(stats_ptr + row * 11 + 5, tl.where(empty, 0.0, full_s - warmth_s * tl.exp(-full_s) - q_y))
        tl.store(stats_ptr + row * 11 + 6, tl.where(empty, 0.0, full_t - warmth_t * tl.exp(-full_t) - p_y))
        tl.store(stats_ptr + row * 11 + 7, tl.where(held, tl.where(present, logq_y, float("-inf")), float("nan")))
        tl.store(stats_ptr + row * 11 + 8, tl.where(held, tl.where(present, logp_y, float("-inf")), float("nan")))
        tl.store(stats_ptr + row * 11 + 9, tl.where(empty, s_y * inv_tau, full_s + c_s * inv_tau))
        tl.store(stats_ptr + row * 11 + 10, tl.where(empty, t_y * inv_tau, full_t + (c_t + k) * inv_tau))
    live = tl.where(empty, 0.0, 1.0)
    return centre, l_s, l_t, r_row, live * a, live * b, live * grad_y, ce_lse


@jit
def _gradient_sweep(student, teacher, row, y, V, scales, ce, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr):
    """The last sweep, tiles in reverse: writes upstream · dL/d(stored student number) over the student's width."""
    inv_tau, factor = scales
    centre, l_s, l_t, r, a, b, grad_y, ce_lse = scalars
    grad_ptr, stride_n, _, width = grad
    kd = upstream * factor * inv_tau
    seen = V
    if ce is not None:
        seen = width
    tiles = tl.cdiv(width, BLOCK)
    top, rest, s_top, slope_top = -1, 0.0, 0.0, 0.0
    for tile in range(0, tiles):
        cols = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        s, t, live, slope = _load_pair(student, teacher, row, cols, cols < V, cols < seen)
        z, u, d = _centred(s, t, centre, inv_tau)
        q = tl.exp(z - l_s)
        f, phi = TERM(q, tl.exp(u - l_t), z - l_s, u - l_t, d - r, theta)
        g = tl.where(live, tl.where(cols == y, grad_y, a * phi + b * q), 0.0)
        likeliest = live & (q > 0.5) & (cols != y)
        rest += tl.sum(tl.where(likeliest, 0.0, g))
        top = tl.maximum(top, tl.max(tl.where(likeliest, cols, -1)))
        s_top += tl.sum(tl.where(likeliest, s, 0.0))  # at most one; `grad` may lie over the logits, so no later read
        slope_top += tl.sum(tl.where(likeliest, slope, 0.0))
        g = tl.where(s > -1e30, kd * g, 0.0)
        if ce is not None:
            g += upstream * ce[0] * (tl.exp(s - ce_lse) - tl.where(cols == y, 1.0, 0.0))
        at = grad_ptr + row * stride_n + _spread(cols, grad[2])
        tl.store(at, (g * slope).to(grad_ptr.dtype.element_ty), mask=cols < width)
    if top >= 0:
        # a·phi + b·q cancels in a token with most of the mass; the gradient of a row sums to 0, and the rest does not.
        g = -kd * rest
        if ce is not None:
            g += upstream * ce[0] * tl.exp(s_top - ce_lse)
        tl.store(grad_ptr + row * stride_n + _spread(top, grad[2]), (g * slope_top).to(grad_ptr.dtype.element_ty))


@jit
def _store_zeros(grad, row, BLOCK: tl.constexpr):
    grad_ptr, stride_n, _, width = grad
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + row * stride_n + _spread(cols, grad[2]), zeros, mask=cols < width)


@jit
def _ignore(row, loss_ptr, stats_ptr):
    tl.store(loss_ptr + row, 0.0)
    if stats_ptr is not None:
        for i in tl.static_range(11):
            tl.store(stats_ptr + row * 11 + i, 0.0)


@jit
def _label(label_ptr, row):
    """The label, −1 without labels, and whether the row counts."""
    if label_ptr is None:
        return -1, True
    else:
        y = tl.load(label_ptr + row).to(tl.int32)
        return y, y >= 0


@jit
def _value(
    student, teacher, label_ptr, loss_ptr, saved_ptr, stats_ptr, V, scales, ce, theta, weights,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y, counted = _label(label_ptr, row)
    if counted:
        centre, l_s, l_t, r, a, b, grad_y, ce_lse = _row_scalars(
            student, teacher, row, y, V, scales, ce, loss_ptr, stats_ptr, _row_values(theta, row),
            _row_values(weights, row), TERM, INIT, ADVANCE, RATIO, SUMS, DECOUPLED, BLOCK,
        )  # fmt: skip
        if saved_ptr is not None:
            saved = (centre[0], centre[1], centre[2], l_s, l_t, r, a, b, grad_y, ce_lse)
            for i in tl.static_range(10):
                tl.store(saved_ptr + row * 10 + i, saved[i])
    else:
        _ignore(row, loss_ptr, stats_ptr)
        if saved_ptr is not None:
            for i in tl.static_range(10):
                tl.store(saved_ptr + row * 10 + i, 0.0)


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, V, scales, ce, theta,
    TERM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y, counted = _label(label_ptr, row)
    if counted:
        at = saved_ptr + row * 10
        centre = (tl.load(at), tl.load(at + 1), tl.load(at + 2))
        scalars = (
            centre, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
            tl.load(at + 8), tl.load(at + 9),
        )  # fmt: skip
        upstream = tl.load(upstream_ptr + row)
        _gradient_sweep(
            student, teacher, row, y, V, scales, ce, grad, scalars, upstream, _row_values(theta, row), TERM, BLOCK
        )
    else:
        _store_zeros(grad, row, BLOCK)


@jit
def _value_and_gradient(
    student, teacher, label_ptr, loss_ptr, stats_ptr, upstream_ptr, grad, V, scales, ce, theta, weights,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y, counted = _label(label_ptr, row)
    if counted:
        theta = _row_values(theta, row)
        scalars = _row_scalars(
            student, teacher, row, y, V, scales, ce, loss_ptr, stats_ptr, theta, _row_values(weights, row),
            TERM, INIT, ADVANCE, RATIO, SUMS, DECOUPLED, BLOCK,
        )  # fmt: skip
        upstream = 1.0
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + row)
        _gradient_sweep(student, teacher, row, y, V, scales, ce, grad, scalars, upstream, theta, TERM, BLOCK)
    else:
        _ignore(row, loss_ptr, stats_ptr)
        _store_zeros(grad, row, BLOCK)


def _arguments(problem: Problem, student: Side, teacher: Side) -> dict[str, Any]:
    """Everything the three kernels take in common."""
    ce = (float(problem.ce_weight), student.x.shape[2]) if problem.ce_weight else None
    return {
        "student": _pack(student),
        "teacher": _pack(teacher),
        "V": problem.vocab_size,
        "scales": (1.0 / problem.temperature, float(problem.factor)),
        "ce": ce,
        "theta": problem.parameters,
        "TERM": problem.definition.term,
    }


def _pack(side: Side) -> tuple[Any, ...]:
    return (side.x, side.first, side.x.shape[1], *side.x.stride(), side.bias, side.scale, side.softcap, side.floor)


def _sweep(problem: Problem) -> dict[str, Any]:
    online = problem.definition.sweep(problem.parameters)
    return {
        "weights": problem.weights,
        "INIT": online.init,
        "ADVANCE": online.advance,
        "RATIO": online.ratio,
        "SUMS": online.sums,
        "DECOUPLED": problem.decoupled,
    }


def tile(problem: Problem, student: Side, teacher: Side) -> Tile:
    """The table's tile, cut down for a vocabulary that one smaller tile covers."""
    width = max(student.x.element_size(), teacher.x.element_size())
    chosen = TABLE[problem.definition.sweep(problem.parameters).tile, width]
    covering = max(SMALLEST, triton.next_power_of_2(max(problem.vocab_size, 1)))
    return chosen if covering >= chosen.block else Tile(covering, min(chosen.num_warps, max(1, covering // 256)))


def value(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """Fills the per-row `loss` (N,), the row scalars `saved` (N, SAVED) for `gradient`, and `stats` (N, STATS)."""
    n = loss.shape[0]
    if n:
        best = tile(problem, student, teacher)
        _value[(n,)](
            label_ptr=labels, loss_ptr=loss, saved_ptr=saved, stats_ptr=stats,
            **_arguments(problem, student, teacher), **_sweep(problem), BLOCK=best.block, num_warps=best.num_warps,
        )  # fmt: skip


def gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), any strides."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        _gradient[(n,)](
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream, grad=(out, *out.stride(), out.shape[1]),
            **_arguments(problem, student, teacher), BLOCK=best.block, num_warps=best.num_warps,
        )  # fmt: skip


def value_and_gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss` (N,), `stats` if given, and `out` with upstream_n · dloss_n/dx (upstream 1 if None)."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        _value_and_gradient[(n,)](
            label_ptr=labels, loss_ptr=loss, stats_ptr=stats, upstream_ptr=upstream,
            grad=(out, *out.stride(), out.shape[1]),
            **_arguments(problem, student, teacher), **_sweep(problem), BLOCK=best.block, num_warps=best.num_warps,
        )  # fmt: skip


def floor_rows(problem: Problem, teacher: Side, labels: torch.Tensor | None, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp: what support="floor" raises to."""
    n = out.shape[0]
    if n:
        block = min(4096, max(SMALLEST, triton.next_power_of_2(problem.vocab_size)))
        _floor[(n,)](
            _pack(teacher), labels, out, problem.vocab_size, 1.0 / problem.temperature, depth, BLOCK=block, num_warps=4
        )


@jit
def _floor(teacher, label_ptr, out_ptr, V, inv_tau, depth, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y, counted = _label(label_ptr, row)
    top, total = -1e20, 0.0
    for start in range(0, tl.where(counted, V, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        t, slope = _load(teacher, row, cols, cols < V)
        new = tl.maximum(top, tl.max(t))
        total = total * tl.exp((top - new) * inv_tau) + tl.sum(tl.where(cols < V, tl.exp((t - new) * inv_tau), 0.0))
        top = new
    tl.store(out_ptr + row, top + (log_sum(total) - depth) / inv_tau)
