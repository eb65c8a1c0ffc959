"""One more pass over a row's columns, once its normalisers are known: sums that each thread keeps for itself."""

from ..language import jit, tl
from ..maths.centering import at_offsets
from .loads import finite, load_pair, load_raw, short
from .thread_sums import scatter_to_thread0, tile_columns
from .tile_order import full_tile, masked_tile, tile_order
from .vectors import edge_columns, row_vectors


@jit
def column_sweep(
    student, teacher, ctx, log_norms, sums, given, ADD, FORMULA, BLOCK: tl.constexpr, THREADS: tl.constexpr
):
    """Returns `sums`, scalars, as each thread has them after all columns but the target's, (T,): thread 0 began with
    the scalars, the others with zeros.

    ADD(sums, tile, live, given, FORMULA) adds a NormalizedTile (R, T, V), of which `live` counts.
    """
    SHORT: tl.constexpr = short(student, teacher)
    tile = tile_columns(student.ptr, BLOCK, THREADS)  # (R, T, V)
    sums = scatter_to_thread0(sums, 0.0, tl.arange(0, tile.shape[1]))  # each (T,)
    vectors = row_vectors(student, teacher, ctx.ptrs, ctx.V, ctx.V)
    y = ctx.y - vectors.ptrs.first
    order = tile_order(y, -1, vectors.V, vectors.width, True, BLOCK)
    for i in range(0, order.num_full):
        cols = full_tile(order, i, BLOCK) + tile  # (R, T, V)
        x = load_raw(student, teacher, vectors.ptrs, cols, None, None)
        # A teacher's −inf stays: what comes of it does not count.
        tile_of_row = at_offsets(finite(x.s), x.t, ctx.centre, log_norms, ctx.inv_tau, ctx.mix, SHORT)
        sums = ADD(sums, tile_of_row, x.live, given, FORMULA)
    for i in range(0, order.num_masked):
        cols = masked_tile(order, i, BLOCK) + tile  # (R, T, V)
        x = load_pair(student, teacher, vectors.ptrs, cols, cols < vectors.V, cols < vectors.V)
        tile_of_row = at_offsets(x.s, x.t, ctx.centre, log_norms, ctx.inv_tau, ctx.mix, SHORT)
        sums = ADD(sums, tile_of_row, x.live & (cols != y), given, FORMULA)
    if teacher.congruent is not None:
        for i in range(0, tl.cdiv(ctx.V - vectors.V, tile.shape[1])):
            cols = edge_columns(vectors, i, tile.shape[1])  # (1, T, 1)
            before = cols < ctx.V - vectors.ptrs.first
            x = load_pair(student, teacher, vectors.ptrs, cols, before, before)
            tile_of_row = at_offsets(x.s, x.t, ctx.centre, log_norms, ctx.inv_tau, ctx.mix, SHORT)
            sums = ADD(sums, tile_of_row, x.live & (cols != y), given, FORMULA)
    return sums
