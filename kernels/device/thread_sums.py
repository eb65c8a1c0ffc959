"""A row's sums kept by each thread for itself: reductions that need no other thread until the row ends.

A thread has maxima, online state and sums of its own over the columns that it loads of a row, in all tiles; at the end
they are merged as those of a row's splits are (forward.py, `merge`). A tile then costs no reduction over the block, and
its sums follow higher maxima once for all columns of a thread. An `advance` (moments.py) therefore uses `thread_sum`.

In the shape of a tile, (R, T, V), T are the threads, not a warp's 32 lanes, and V the columns of one vector load.
"""

from ..language import jit, tl


@jit
def tile_columns(ptr, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """The columns of a row's first tile, (R, T, V) int32: R rounds, in each of which T threads load V neighbours.

    V neighbours are 16 bytes of `ptr`; R·T·V = BLOCK.
    """
    NEIGHBOURS: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    ROW_THREADS: tl.constexpr = THREADS if THREADS * NEIGHBOURS <= BLOCK else BLOCK // NEIGHBOURS
    ROUNDS: tl.constexpr = BLOCK // (ROW_THREADS * NEIGHBOURS)
    rounds = tl.arange(0, ROUNDS)[:, None, None] * (ROW_THREADS * NEIGHBOURS)  # (R, 1, 1)
    return rounds + tl.arange(0, ROW_THREADS)[None, :, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, None, :]


@jit
def scatter_to_thread0(values, nothing, thread):
    """Returns a tuple of (T,): thread 0 has the row's scalars, the others `nothing`, so that a sum counts them once."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.where(thread == 0, values[i], nothing),)
    return out
