"""Logits centred on running maxima, as moments.py wants them, mixed and normalised.

A teacher that is mixed with the student (divergences/taid.py) is mixed here, after centring: u' = z + mix·d and
d' = mix·d, both minus the m that makes d' too 0 where the maxima of z and u' stand.

Shapes: a tile is (R, T, V) as device/thread_sums.py lays it out, or one axis of columns; a number of a row has no axis,
or is (T,) while each thread keeps its own. In torch a tile is (n, V) and a number of a row (n, 1). mix is (the
teacher's weight,), or () for the teacher itself.
"""

import torch

from ..language import formula, tl
from .elementary import LOG2E, exp
from .quantities import Centre, Maxima, Move, NormalizedTile, Raised, TargetTerms
from .reductions import broadcast_per_thread, thread_max


@formula
def _on_grid(x):
    return tl.floor(x * 4.0 + 0.5) * 0.25


@formula
def _on_fine_grid(x):
    return tl.floor(x * 16384.0 + 0.5) * (1.0 / 16384.0)


@formula
def no_maxima():
    """Maxima of no columns."""
    return Maxima(-1e20, -1e20, -1e20)


@formula
def mixed(x, u, d, mix):
    """(1 − mix)·x + mix·u, given d = u − x; exact at mix 0 and 1.

    Exactly x where d = 0, whether or not a compiler makes product and sum one operation (FMA): of two products it could
    round either, and in two places not the same one.
    """
    near = mix[0] < 0.5
    return tl.where(near, x, u) + tl.where(near, mix[0], mix[0] - 1.0) * d


def _above_centre(s, t, centre):
    c_s, c_t, k, _ = centre
    x, y = s - c_s, t - c_t
    d = (y - x).sub_(k)
    return x, y.sub_(k), d


@formula(torch=_above_centre)
def above_centre(s, t, centre):
    """τ·z, τ·u and τ·d, not mixed."""
    c_s, c_t, k, m = centre
    return s - c_s, (t - c_t) - k, ((t - c_t) - (s - c_s)) - k


@formula
def _excess(maxima):
    """τ·m: how far the maximum of the mixed u' lies above that of z.

    A difference of logits: where a compiler fuses product and sum, only one of two products would be rounded.
    """
    top_s, top_t, top_mixed = maxima
    return top_mixed - (top_s - _on_grid(top_s))


@formula
def centre_of(maxima, inv_tau, mix):
    """Centre of Maxima: these on a coarse grid, so that s − c_s and t − c_t are exact where it matters, and the k that
    d lacks to be 0 where both maxima stand.

    A finer grid of c_t leaves nothing of it where the maxima have the digits of half precision (`at_offsets`).
    """
    top_s, top_t, _ = maxima
    c_s = _on_grid(top_s)
    c_t = _on_grid(top_t)
    c_t += _on_fine_grid((top_t - c_t) - (top_s - c_s))
    m = 0.0
    if len(mix) == 1:
        m = _excess(maxima) * inv_tau
    return Centre(c_s, c_t, (top_t - c_t) - (top_s - c_s), m)


def _centred(s, t, centre, inv_tau, mix):
    z, u, d = above_centre.torch(s, t, centre)
    if isinstance(inv_tau, torch.Tensor) or inv_tau != 1.0:
        z, u, d = (x.mul_(inv_tau) for x in (z, u, d))
    return (z, mixed.torch(z, u, d, mix).sub_(centre[3]), d.mul(mix[0]).sub_(centre[3])) if mix else (z, u, d)


@formula
def _unmixed(s, t, centre, inv_tau, l_s, l_t, r):
    """z − l_s, u − l_t and d − r, each one operation behind a difference that is exact."""
    c_s, c_t, k, _ = centre
    x, y = s - c_s, t - c_t
    return x * inv_tau - l_s, y * inv_tau - (k * inv_tau + l_t), (y - x) * inv_tau - (k * inv_tau + r)


@formula(torch=_centred)
def centred(s, t, centre, inv_tau, mix):
    """z, u and d = u − z, three tiles."""
    z, u, d = _unmixed(s, t, centre, inv_tau, 0.0, 0.0, 0.0)
    if len(mix) == 1:
        u = mixed(z, u, d, mix) - centre[3]
        d = mix[0] * d - centre[3]
    return z, u, d


@formula
def exponentials(s, t, centre, inv_tau, mix, l_s, l_t):
    """e^(z − l_s) and e^(u − l_t), two tiles: one multiplication and addition each before the power of 2."""
    if len(mix) == 1:
        z, u, d = centred(s, t, centre, inv_tau, mix)
        return exp(z - l_s), exp(u - l_t)
    else:
        c_s, c_t, k, m = centre
        scale = inv_tau * LOG2E
        return tl.exp2((s - c_s) * scale - l_s * LOG2E), tl.exp2((t - c_t) * scale - (k * scale + l_t * LOG2E))


@formula
def beside_columns(centre, mix):
    """Centre of each thread, (T,), in the shape of a tile, (1, T, 1)."""
    c_s, c_t, k, m = centre
    if len(mix) == 1:
        m = broadcast_per_thread(m)
    return Centre(broadcast_per_thread(c_s), broadcast_per_thread(c_t), broadcast_per_thread(k), m)


@formula
def target_terms(s_y, t_y, in_support, centre, inv_tau, mix, r):
    """TargetTerms; ABSENT, and r for d, where there is no target in the support."""
    c_s, c_t, k, m = centre
    zy, uy, dy = centred(s_y, t_y, centre, inv_tau, ())
    # An unlikely target stands far from both centres: without a large offset its plain difference is the exact one.
    dy = tl.where(tl.abs(c_t - c_s) < 8.0, (((t_y - s_y) - (c_t - c_s)) - k) * inv_tau, dy)
    zy = tl.where(in_support, zy, -1e30)
    own_uy = tl.where(in_support, uy, -1e30)
    uy = own_uy
    if len(mix) == 1:
        uy = tl.where(in_support, mixed(zy, uy, dy, mix) - m, -1e30)
        dy = mix[0] * dy - m
    return TargetTerms(zy, uy, tl.where(in_support, dy, r), own_uy)


@formula
def _move(centre, top_s, top_t):
    """The unmixed Centre of new maxima, and τ times the Move to it from that of the old ones."""
    old_s, old_t, old_k, _ = centre
    c_s, c_t, k, _ = centre_of(Maxima(top_s, top_t, 0.0), 1.0, ())
    more = old_k - k  # added last: beside a large move its digits would be lost
    x = ((old_s - c_s) - (old_t - c_t)) - more
    return Centre(c_s, c_t, k, 0.0), Move(old_s - c_s, (old_t - c_t) + more, x)


@formula
def _moves(maxima, whole, centre, by, inv_tau, mix):
    """Raised, from the new maxima `whole`, their unmixed centre and τ times the unmixed Move."""
    by_s, by_t, x = by
    own_log_t = by_t * inv_tau
    if len(mix) == 1:
        c_s, c_t, k, _ = centre
        centre = Centre(c_s, c_t, k, _excess(whole) * inv_tau)
        x = mix[0] * x + (_excess(whole) - _excess(maxima))
        # At most 1/4, a step of the grid, but for rounding beside -1e20, the maximum of nothing, whose sums are 0: e to
        # such a power would be infinite, and NaN times 0.
        by_t = tl.where(by_s - x > 0.3, 0.3, by_s - x)
    return Raised(whole, centre, Move(by_s * inv_tau, by_t * inv_tau, x * inv_tau), own_log_t)


@formula
def raise_maxima(maxima, centre, s, t, live, inv_tau, mix):
    """Raised: Maxima, whose unmixed Centre is at hand, with a tile; of each thread where the tile has threads."""
    old_s, old_t, top_mixed = maxima
    top_s = tl.maximum(old_s, thread_max(tl.where(live, s, -1e20)))
    top_t = tl.maximum(old_t, thread_max(tl.where(live, t, -1e20)))
    centre, by = _move(centre, top_s, top_t)
    if len(mix) == 1:
        x, u, d = above_centre(s, t, beside_columns(centre, ()))
        raised = top_mixed + by.log_s - mix[0] * by.d
        top_mixed = tl.maximum(raised, thread_max(tl.where(live, mixed(x, u, d, mix), -1e20)))
    return _moves(maxima, Maxima(top_s, top_t, top_mixed), centre, by, inv_tau, mix)


@formula
def merge_maxima(maxima, inv_tau, mix):
    """Raised: the maximum of Maxima (T,) of a row's threads or splits, and the Move (T,) of each."""
    split_s, split_t, split_mixed = maxima
    top_s = tl.max(split_s)
    top_t = tl.max(split_t)
    top_mixed = tl.max(split_mixed)
    centre, by = _move(centre_of(maxima, 1.0, ()), top_s, top_t)
    if len(mix) == 1:
        top_mixed = tl.max(split_mixed + by.log_s - mix[0] * by.d)
    return _moves(maxima, Maxima(top_s, top_t, top_mixed), centre, by, inv_tau, mix)


@formula
def at_offsets(s, t, centre, log_norms, inv_tau, mix, SHORT: tl.constexpr):
    """NormalizedTile of logits at a row's LogNorms.

    SHORT: logits have no more digits than half precision. k is then 0 and d − r one operation; elsewhere the r of a row
    whose sides are all but equal would lose its digits beside k.
    """
    l_s, l_t, r = log_norms
    q, p = exponentials(s, t, centre, inv_tau, mix, l_s, l_t)
    if len(mix) == 1:
        z, u, d = centred(s, t, centre, inv_tau, mix)
        return NormalizedTile(q, p, z - l_s, u - l_t, d - r)
    else:
        logq, logp, delta = _unmixed(s, t, centre, inv_tau, l_s, l_t, r if SHORT else 0.0)
        return NormalizedTile(q, p, logq, logp, delta if SHORT else delta - r)
