"""A row's sums kept by each thread for itself: reductions that need no other thread until the row ends.

A thread has maxima, online state and sums of its own over the columns that it loads of a row, in all tiles; at the end
they are merged as those of parts of a row are (rows.py, `merge`). A tile then costs no reduction over the block, and
its sums follow higher maxima once for all columns of a thread. An `advance` (moments.py) therefore uses `thread_sum`.

In the shape of a tile, (R, T, V), T are the threads, not a warp's 32 lanes, and V the columns of one vector load.
"""

from types import FunctionType
from typing import Any

import torch

from .language import formula, jit, tl

_REDUCTIONS = {"sum", "max", "min", "argmax", "argmin", "xor_sum", "reduce", "associative_scan", "cumsum", "cumprod"}


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """Σ over the last axis. Compiled loops add one by one, and a long row in float32 would lose a digit or two."""
    if torch.compiler.is_compiling():
        return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return x.sum(-1, keepdim=True)


@formula(torch=_row_sum)
def thread_sum(x):
    """Σ of a tile (R, T, V) over what each thread holds of it, (T,); of a tile with one axis, over all."""
    if len(x.shape) == 3:
        return tl.sum(tl.sum(x, 2), 0)
    else:
        return tl.sum(x)


@formula(torch=lambda x: x.amax(-1, keepdim=True))
def thread_max(x):
    """Maximum of a tile (R, T, V) over what each thread holds of it, (T,); of a tile with one axis, over all."""
    if len(x.shape) == 3:
        return tl.max(tl.max(x, 2), 0)
    else:
        return tl.max(x)


@formula(torch=lambda x: x)
def broadcast_per_thread(x):
    """Broadcast a number of each thread, (T,), to a tile's shape, (1, T, 1); a number of the row passes through."""
    if len(x.shape) == 1:
        return x[None, :, None]  # (1, T, 1)
    else:
        return x


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
    """A tuple of numbers of a row as (T,): thread 0 has them, the others `nothing`, so that a sum counts them once."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.where(thread == 0, values[i], nothing),)
    return out


def reduction_over_threads(advance: Any) -> str | None:
    """The first reduction over all threads, as "tl.sum in NAME", that a function or what it calls makes.

    Every thread would add the whole of it, and the row count it once for each.
    """
    found, waiting = set(), [advance]
    while waiting:
        fn = waiting.pop()
        fn = getattr(fn, "fn", fn)  # what triton.jit wraps
        if not isinstance(fn, FunctionType) or fn.__module__ == __name__ or fn in found:
            continue
        found.add(fn)
        for name in fn.__code__.co_names:
            if name in _REDUCTIONS and fn.__globals__.get(name) is None:
                return f"tl.{name} in {fn.__name__}"
            waiting.append(fn.__globals__.get(name))
    return None
