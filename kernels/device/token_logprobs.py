"""Log-probability of one given token and entropy per row of logits, and their gradient. One program a row.

    log q_y = −softplus(lse_{k≠y} z − z_y)        H = lse − Σ q z
    d log q_y/dz_k = 1[k=y] − q_k                 dH/dz_k = −q_k (log q_k + H)

The token's column is held out of the sums, so that log q_y and 1 − q_y keep their digits as q_y → 1. One read of each
logit for the value, one more and one write for the gradient. A row with a negative token reads nothing and gives 0.
"""

from typing import Any

import torch

from ..language import jit, tl
from ..maths.decomposition import side_stats
from ..maths.moments import log_sum
from .args import TOKEN_SAVED as SAVED
from .args import TokenScalars, load_token_scalars, store_token_scalars
from .backward import gradient_start, store_gradient, store_zeros
from .loads import load_logits, row_start
from .rows import Logits, grad_arg, logits_arg
from .tiles import TileKey, architecture, tile_for

__all__ = ["SAVED", "gradient", "value"]


@jit
def _finite(side, row, cols, mask):
    """Logits with −inf made finite, and their derivative by the stored number, in the shape of `cols`."""
    s, slope = load_logits(side, row_start(side, row), 0, cols, mask)
    return tl.where(s < -1e30, -1e30, s), slope


@jit
def _value(side, token_ptr, saved_ptr, V, inv_tau, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(token_ptr + row).to(tl.int32)
    top, total, entropy_sum = -1e20, 0.0, 0.0
    for start in range(0, tl.where(y >= 0, V, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
        s, slope = _finite(side, row, cols, cols < V)
        live = (cols < V) & (cols != y)
        raised = tl.maximum(top, tl.max(tl.where(live, s, -1e20)))
        move = (top - raised) * inv_tau
        scale = tl.exp(move)
        z = (s - raised) * inv_tau
        e = tl.where(live, tl.exp(z), 0.0)
        entropy_sum = tl.where(scale > 0, scale * (entropy_sum + move * total), 0.0) + tl.sum(
            tl.where(live, e * z, 0.0)
        )
        total = scale * total + tl.sum(e)
        top = raised
    s_y, slope_y = _finite(side, row, y, y >= 0)
    only_target = total == 0
    top = tl.where(only_target, s_y, top)
    rest = tl.where(only_target, -1e30, log_sum(total))
    stats = side_stats(rest, entropy_sum, (s_y - top) * inv_tau, 0.0, 0.0, s_y != -1e30, y < 0)
    counted = y >= 0
    entropy = tl.where(stats.entropy < 0, 0.0, stats.entropy)  # a maximum would drop NaN
    centre, logprob = tl.where(counted, top, 0.0), tl.where(counted, stats.logprob, 0.0)
    store_token_scalars(saved_ptr, row, TokenScalars(centre, stats.lse, logprob, entropy))


@jit
def _gradient(side, token_ptr, saved_ptr, upstream_ptr, grad, V, inv_tau, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(token_ptr + row).to(tl.int32)
    up_logprob = tl.load(upstream_ptr + row * 2)
    up_entropy = tl.load(upstream_ptr + row * 2 + 1)
    if (y >= 0) & ((up_logprob != 0) | (up_entropy != 0)):
        of_row = load_token_scalars(saved_ptr, row)
        tiles = tl.cdiv(V, BLOCK)
        at_y, slope_y = 0.0 * of_row.lse, 0.0  # NaN where the value is, also without other tokens
        for tile in range(0, tiles):
            cols = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
            s, slope = _finite(side, row, cols, cols < V)
            log_q = (s - of_row.centre) * inv_tau - of_row.lse
            q = tl.exp(log_q)
            g = -q * (up_logprob + up_entropy * tl.where(q > 0, log_q + of_row.entropy, 0.0))
            g = tl.where((cols < V) & (cols != y), g, 0.0)
            at_y -= tl.sum(g)  # a row's gradient sums to 0: at the token nothing cancels this way
            slope_y += tl.sum(tl.where(cols == y, slope * tl.where(s <= -1e30, 0.0, 1.0), 0.0))
            store_gradient(grad, gradient_start(grad, row), cols, g * inv_tau, slope, V)
        tl.debug_barrier()  # the 0 that a tile wrote there may be another warp's, and still on its way
        store_gradient(grad, gradient_start(grad, row), y, at_y * inv_tau, slope_y, None)
    else:
        store_zeros(grad, row, BLOCK)


def tile_key(side: Logits) -> TileKey:
    """The key of the table that logits run with."""
    return TileKey(architecture(side.x.device), "light", side.x.element_size())


def value(side: Logits, tokens: torch.Tensor, saved: torch.Tensor, temperature: float) -> Any:
    """Fills `saved` (N, SAVED): centre, log-sum-exp above it, log q of the token, entropy; zeros where token < 0."""
    if len(saved):
        vocabulary = side.x.shape[2]
        best = tile_for(tile_key(side), vocabulary)
        return _value[(len(saved),)](
            logits_arg(side), tokens, saved, vocabulary, 1.0 / temperature, BLOCK=best.block, **best.options()
        )
    return None


def gradient(
    side: Logits,
    tokens: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
    temperature: float,
) -> Any:
    """Writes upstream (N, 2) · d(log q_y, H)/dx into `out` (N, V), which may lie over the logits."""
    if len(out):
        vocabulary = side.x.shape[2]
        best = tile_for(tile_key(side), vocabulary)
        return _gradient[(len(out),)](
            logits_arg(side), tokens, saved, upstream, grad_arg(out, vocabulary), vocabulary, 1.0 / temperature,
            BLOCK=best.block, **best.options(),
        )  # fmt: skip
    return None
