"""Reductions of a tile: in kernels over the columns that one thread holds, in torch over each row.

A thread keeps maxima, online state and sums of its own until its row ends (device/thread_sums.py), so an `advance`
(moments.py) uses `thread_sum` and `thread_max`, never `tl.sum`. A tile is (R, T, V): R rounds, T threads, V neighbours.
"""

from types import FunctionType
from typing import Any

from ..language import formula, tl

_REDUCTIONS = {"sum", "max", "min", "argmax", "argmin", "xor_sum", "reduce", "associative_scan", "cumsum", "cumprod"}


@formula
def thread_sum(x):
    """Σ of a tile (R, T, V) over what each thread holds of it, (T,); of a tile with one axis, over all."""
    if len(x.shape) == 3:
        return tl.sum(tl.sum(x, 2), 0)
    else:
        return tl.sum(x)


@formula
def thread_max(x):
    """Maximum of a tile (R, T, V) over what each thread holds of it, (T,); of a tile with one axis, over all."""
    if len(x.shape) == 3:
        return tl.max(tl.max(x, 2), 0)
    else:
        return tl.max(x)


@formula
def broadcast_per_thread(x):
    """Broadcast a per-thread value (T,) to the shape of a tile (R, T, V), as (1, T, 1); scalars pass through."""
    if len(x.shape) == 1:
        return x[None, :, None]  # (1, T, 1)
    else:
        return x


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
