"""The gradient of a row: dL/ds = a·phi + b·q in one sweep, from the scalars that its value left (args.RowScalars).

Tiles come in reverse order, so that the sweep meets those still in cache. `store_gradient` is the one place that rounds
dZ: everything before it is float32. A token that holds more than half of the row's mass is left out of the sweep; its
entry is minus the sum of all others.
"""

from ..language import jit, tl
from ..maths.centering import at_offsets
from ..maths.quantities import Centre, LogNorms
from ..maths.reductions import thread_max, thread_sum
from .args import Dominant
from .loads import finite, load_pair, load_raw, row_ptrs, short, spread
from .thread_sums import tile_columns
from .tile_order import full_tile, masked_tile, tile_order
from .vectors import NOWHERE, edge_columns, row_vectors, vector_ptr


@jit
def no_dominant(THREADS: tl.constexpr):
    """Dominant of no columns, (THREADS,) each."""
    zeros = tl.zeros((THREADS,), tl.float32)
    return Dominant(tl.full((THREADS,), NOWHERE, tl.int32), zeros, zeros, zeros)


@jit
def slopes(s, t, scalars, inv_tau, mix, theta, TERM, SHORT: tl.constexpr):
    """Returns q and phi of a tile of logits, in its shape."""
    centre = Centre(scalars.c_s, scalars.c_t, scalars.k, scalars.m)
    log_norms = LogNorms(scalars.l_s, scalars.l_t, scalars.r)
    x = at_offsets(s, t, centre, log_norms, inv_tau, mix, SHORT)  # (R, T, V) each
    f, phi = TERM(x.q, x.p, x.logq, x.logp, x.delta, theta)
    return x.q, phi


@jit
def gradient_start(grad, row):
    """The address at which a row of GradArg begins."""
    return grad.ptr + row * grad.stride_n


@jit
def store_gradient(grad, start, cols, g, slope, width):
    """Round dZ = g·slope, float32, to the dtype that it is stored in: no other place does.

    Stores the columns `cols`, counted from the one at `start`, that are below `width`; all if it is None.
    """
    at = start + spread(cols, grad.stride_v)
    dz = (g * slope).to(grad.ptr.dtype.element_ty)
    if width is None:
        tl.store(at, dz)
    else:
        tl.store(at, dz, mask=cols < width)


@jit
def inner_gradient_tile(x, cols, scales, mix, grad, start, scalars, upstream, theta, TERM, SHORT: tl.constexpr):
    """Store the gradient of a full tile (R, T, V) in which no token is the target or the dominant one.

    Returns it, (R, T, V), times upstream. Logits of −inf have their share too, which is stored as 0: of the dominant
    token's entry it is a part.
    """
    q, phi = slopes(finite(x.s), x.t, scalars, scales.inv_tau, mix, theta, TERM, SHORT)
    scale = upstream * scales.factor * scales.inv_tau
    g = tl.where(x.live, (scalars.a * scale) * phi + (scalars.b * scale) * q, 0.0)
    # Not `s > -1e30` the other way round: NaN has to pass.
    store_gradient(grad, start, cols, tl.where(x.s <= -1e30, 0.0, g), x.slope, None)
    return g


@jit
def gradient_tile(
    x, cols, y, label, scales, mix, softcap, grad, start, width, scalars, upstream, theta, dominant, TERM,
    SHORT: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile (R, T, V), its columns below `width`, 0 for the dominant token.

    Returns Dominant, (T,) each, with the tile.
    """
    q, phi = slopes(x.s, x.t, scalars, scales.inv_tau, mix, theta, TERM, SHORT)
    dominates = tl.where(x.live & (cols != y), q, 0.0) > 0.5  # (R, T, V), true in at most one column of the row
    g = tl.where(x.live, tl.where(cols == y, scalars.grad_y, scalars.a * phi + scalars.b * q), 0.0)
    g = tl.where(dominates, 0.0, g)
    rest = dominant.rest + thread_sum(g)  # (T,)
    token = tl.maximum(dominant.token, thread_max(tl.where(dominates, cols, NOWHERE)))
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
    store_gradient(grad, start, cols, g, x.slope, width)
    return Dominant(token, rest, logit, slope)


@jit
def merge_dominant(dominant, student):
    """Merge the Dominant of a row's T threads, (T,) each. Returns Dominant of scalars."""
    if student.softcap is None:
        slope = 1.0
        if student.scale is not None:
            slope = slope * student.scale
    else:
        slope = tl.sum(dominant.slope)
    return Dominant(tl.max(dominant.token), tl.sum(dominant.rest), tl.sum(dominant.logit), slope)


@jit
def store_dominant(row, label, scales, grad, dominant, full_tiles, ce_lse, upstream):
    """Store the gradient's entry of the dominant token, if there is one: minus the sum of all others.

    full_tiles: the sum of those that dominant.rest lacks, already times upstream.
    """
    if dominant.token >= 0:
        g = -upstream * scales.factor * scales.inv_tau * dominant.rest - full_tiles
        if scales.ce is not None:
            q = tl.exp(dominant.logit - ce_lse)
            g += upstream * scales.ce.weight * (q - tl.where(dominant.token == label, 1.0, 0.0))
        store_gradient(grad, gradient_start(grad, row), dominant.token, g, dominant.slope, None)


@jit
def gradient_sweep(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, top_col, upstream, theta, TERM,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Last sweep, tiles in reverse: store upstream · dL/d(stored student number) over the student's width.

    Returns Dominant of the row, scalars, whose entry is stored as 0: a·phi + b·q cancels there. The gradient of a row
    sums to 0, and the sum of the others does not cancel; of the tiles without a mask it comes beside, times upstream.
    The dominant token can be nowhere but in the tile of top_col; with a top_col of −1 it is looked for in every tile.
    """
    ptrs = row_ptrs(student, teacher, row)
    vectors = row_vectors(student, teacher, ptrs, V, grad.width)
    first = vectors.ptrs.first
    seen, seen_vectors = V, vectors.V
    if scales.ce is not None:
        seen, seen_vectors = grad.width, vectors.width
    start = gradient_start(grad, row)
    tile = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    SHORT: tl.constexpr = short(student, teacher)
    if teacher.congruent is not None:
        start = vector_ptr(start, first, tile.shape[2])
    dominant = no_dominant(tile.shape[1])  # (T,) each
    INNER: tl.constexpr = scales.ce is None
    # No q can exceed e^(1/8τ − l_s): a centre lies within 1/8 of its maximum (centering.py).
    none_dominates = tl.exp(0.125 * scales.inv_tau - scalars.l_s) <= 0.5
    # The tiles of the value may lie elsewhere: it had other copies of the logits, or found rows to begin alike.
    known = (top_col >= first) & ((top_col - first) % BLOCK == 0)
    held_out = tl.where(known, top_col - first, -1)
    held_out = tl.where(none_dominates, -1, held_out)
    order = tile_order(y - first, held_out, vectors.V, vectors.width, INNER & (none_dominates | known), BLOCK)
    full_tiles = dominant.rest  # (T,)
    if INNER:
        for i in range(0, order.num_full):
            cols = full_tile(order, order.num_full - 1 - i, BLOCK) + tile  # (R, T, V)
            x = load_raw(student, teacher, vectors.ptrs, cols, None, None)
            g = inner_gradient_tile(x, cols, scales, mix, grad, start, scalars, upstream, theta, TERM, SHORT)
            full_tiles += thread_sum(g)
    for i in range(0, order.num_masked):
        cols = masked_tile(order, i, BLOCK) + tile  # (R, T, V)
        x = load_pair(student, teacher, vectors.ptrs, cols, cols < vectors.V, cols < seen_vectors)
        dominant = gradient_tile(
            x, cols, y - first, label - first, scales, mix, student.softcap, grad, start, vectors.width, scalars,
            upstream, theta, dominant, TERM, SHORT,
        )  # fmt: skip
    if teacher.congruent is not None:
        for i in range(0, tl.cdiv(grad.width - vectors.V, tile.shape[1])):
            cols = edge_columns(vectors, i, tile.shape[1])  # (1, T, 1)
            x = load_pair(student, teacher, vectors.ptrs, cols, cols < V - first, cols < seen - first)
            dominant = gradient_tile(
                x, cols, y - first, label - first, scales, mix, student.softcap, grad, start, grad.width - first,
                scalars, upstream, theta, dominant, TERM, SHORT,
            )  # fmt: skip
    dominant = merge_dominant(dominant, student)
    if teacher.congruent is not None:
        dominant = Dominant(dominant.token + first, dominant.rest, dominant.logit, dominant.slope)
    return dominant, tl.sum(full_tiles)


@jit
def row_gradient(
    student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, TERM, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Last sweep over a whole row, the entry of the dominant token included."""
    dominant, full_tiles = gradient_sweep(
        student, teacher, row, y, label, V, scales, mix, grad, scalars, scalars.top_col.to(tl.int32), upstream, theta,
        TERM, BLOCK, THREADS,
    )  # fmt: skip
    tl.debug_barrier()  # the zero that the sweep wrote there may be another warp's, and still on its way
    store_dominant(row, label, scales, grad, dominant, full_tiles, scalars.ce_lse, upstream)


@jit
def store_zero_tile(grad, row, start, BLOCK: tl.constexpr):
    """Store zeros as BLOCK columns of a row of the gradient."""
    cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
    zeros = tl.zeros((BLOCK,), grad.ptr.dtype.element_ty)
    tl.store(gradient_start(grad, row) + spread(cols, grad.stride_v), zeros, mask=cols < grad.width)


@jit
def store_zeros(grad, row, BLOCK: tl.constexpr):
    """Store zeros as a row of the gradient."""
    for start in range(0, grad.width, BLOCK):
        store_zero_tile(grad, row, start, BLOCK)
