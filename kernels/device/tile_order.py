"""Which tiles of a row need no mask, and in which order a sweep comes to its tiles.

A full tile has BLOCK columns, all of them compared, and none of them the target's or another that is held out. Sweeps
go through full tiles in a loop of their own, without masks, and through the others in a second one.
"""

from ..language import jit, tl
from .args import TileOrder


@jit
def tile_order(y, other, V, width, allowed, BLOCK: tl.constexpr):
    """TileOrder of a row whose columns y and `other` are held out (negative: none), of `width` columns, V compared.

    No tile goes without a mask unless `allowed`.
    """
    full = tl.where(allowed, V // BLOCK, 0)
    tile_y = tl.where((y >= 0) & (y < full * BLOCK), y // BLOCK, full)
    tile_other = tl.where((other >= 0) & (other < full * BLOCK), other // BLOCK, full)
    tile_other = tl.where(tile_other == tile_y, full, tile_other)
    low = tl.minimum(tile_y, tile_other)
    high = tl.maximum(tile_y, tile_other)
    num_full = full - tl.where(low < full, 1, 0) - tl.where(high < full, 1, 0)
    return TileOrder(num_full, tl.cdiv(width, BLOCK) - num_full, low, high, full)


@jit
def full_tile(order, i, BLOCK: tl.constexpr):
    """First column of the i-th tile that needs no mask."""
    at = i + tl.where(i >= order.low, 1, 0)
    return (at + tl.where(at >= order.high, 1, 0)) * BLOCK


@jit
def masked_tile(order, i, BLOCK: tl.constexpr):
    """First column of the i-th tile that needs a mask: those with a column that is held out come first."""
    second = tl.where((i == 1) & (order.high < order.full), order.high, order.num_full + i)
    return tl.where(i == 0, order.low, second) * BLOCK
