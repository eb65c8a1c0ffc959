"""Which tiles of a row need no mask, and in which order a sweep comes to its tiles.

A full tile has BLOCK columns, all of them compared and none of them the target's. Sweeps go through full tiles in a
loop of their own, without masks, and through the others in a second one.
"""

from ..language import jit, tl


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
