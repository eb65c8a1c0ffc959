"""How a program sees the columns of its row: loaded, centred on running maxima, normalised.

Every sweep goes through here. Logits are centred as online.py wants them. A teacher that is mixed with the student
(divergences/taid.py) is mixed here, after centring: u' = z + mix·d and d' = mix·d, both minus the m that makes d' too 0
where the maxima of z and u' stand.

    centre   (c_s, c_t, k, m): what z and u are measured from
    mix      the teacher's weight as a tuple of one, () for the teacher itself
    place    (row, where it begins at the student, at the teacher)
    view     (place, y, V, inv_tau, mix, centre): what a later sweep needs to know beside the two sides, which must not
             lie in a tuple made in a kernel: that would turn their compile-time 1 into a number
    at       (l_s, l_t, r): the row's log-normalisers, as split.py gives them
"""

from .lanes import across, lane_max
from .language import formula, jit, tl
from .maths import tanh


@jit
def row_values(values, row):
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
def as_numbers(values):
    """Compile-time constants as numbers, which a loop can carry from a caller."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.full((), values[i], tl.float32),)
    return out


@jit
def load_numbers(ptr, COUNT: tl.constexpr):
    """The first COUNT numbers behind a pointer."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(ptr + i),)
    return out


@jit
def spread(cols, stride):
    """Column offsets, 64-bit only where a stride could carry them past 2³¹.

    Taken from its tuple by index: unpacking would turn a compile-time 1 into a number.
    """
    if isinstance(stride, tl.constexpr):  # 1 and no other number is compiled in
        return cols
    else:
        return tl.cast(cols, tl.int64) * stride


@jit
def row_start(side, row):
    """Where a row begins."""
    ptr, first, inner, stride_o, stride_n, _, bias_ptr, scale, softcap, floor_ptr = side
    return ptr + (row + first) // inner * stride_o + (row + first) % inner * stride_n


@jit
def place_of(student, teacher, row):
    """The row, and where it begins on both sides: a division that no compiler takes out of a loop."""
    return row, row_start(student, row), row_start(teacher, row)


@jit
def load_side(side, start, cols, mask):
    """Logits at `cols`, −inf where masked (None: nowhere), and their derivative with respect to the stored number."""
    ptr, first, inner, stride_o, stride_n, _, bias_ptr, scale, softcap, floor_ptr = side
    at = start + spread(cols, side[5])
    if mask is None:
        x = tl.load(at).to(tl.float32)
    else:
        x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if bias_ptr is not None:
        if mask is None:
            x += tl.load(bias_ptr + cols).to(tl.float32)
        else:
            x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        x *= scale
        slope = slope * scale
    if softcap is not None:
        bent = tanh(x / softcap)
        if mask is None:
            x = softcap * bent
        else:
            x = tl.where(mask, softcap * bent, float("-inf"))
        slope = slope * (1.0 - bent * bent)
    return x, slope


@jit
def load_raw(student, teacher, place, cols, mask, student_mask):
    """Student and teacher logits, −inf where they are, which columns are compared, and the student's slope."""
    row, start_s, start_t = place
    s, slope = load_side(student, start_s, cols, student_mask)
    t, teacher_slope = load_side(teacher, start_t, cols, mask)
    floor_ptr = teacher[9]
    live = t != float("-inf")
    if floor_ptr is not None:
        live = live | (s != float("-inf"))
        floor = tl.load(floor_ptr + row)
        t = tl.where(t < floor, floor, t)
    if mask is not None:
        live = mask & live
    return s, t, live, slope


@jit
def load_pair(student, teacher, place, cols, mask, student_mask):
    """The same with −inf as a finite −1e30."""
    s, t, live, slope = load_raw(student, teacher, place, cols, mask, student_mask)
    return finite(s), finite(t), live, slope


@jit
def finite(x):
    """−1e30 for −inf."""
    return tl.where(x < -1e30, -1e30, x)


@formula
def _on_grid(x):
    return tl.floor(x * 4.0 + 0.5) * 0.25


@formula
def no_maxima():
    """The maxima of nothing: of s, of t, and of what the mixed u' is before it is divided by τ."""
    return -1e20, -1e20, -1e20


@formula
def mixed(x, u, d, mix):
    """(1 − mix)·x + mix·u, given d = u − x; exact at mix 0 and 1.

    Exactly x where d = 0, whether or not a compiler makes product and sum one operation (FMA): of two products it could
    round either, and in two places not the same one.
    """
    near = mix[0] < 0.5
    return tl.where(near, x, u) + tl.where(near, mix[0], mix[0] - 1.0) * d


@formula
def above_centre(s, t, centre):
    """τ·z, τ·u and τ·d, not mixed."""
    c_s, c_t, k, m = centre
    return s - c_s, (t - c_t) - k, ((t - c_t) - (s - c_s)) - k


@formula
def _excess(maxima):
    """τ·m: how far the maximum of the mixed u' lies above that of z.

    A difference of logits: where a compiler fuses product and sum, only one of two products would be rounded.
    """
    return maxima[2] - (maxima[0] - _on_grid(maxima[0]))


@formula
def centre_of(maxima, inv_tau, mix):
    """The maxima on a coarse grid, so that s − c_s and t − c_t are exact where it matters, and what d lacks to be 0
    where both maxima stand."""
    top_s, top_t, _ = maxima
    c_s = _on_grid(top_s)
    c_t = _on_grid(top_t)
    m = 0.0
    if len(mix) == 1:
        m = _excess(maxima) * inv_tau
    return c_s, c_t, (top_t - c_t) - (top_s - c_s), m


@formula
def centred(s, t, centre, inv_tau, mix):
    """z, u and d = u − z."""
    c_s, c_t, k, m = centre
    x, y, gap = above_centre(s, t, centre)
    z = x * inv_tau
    u = y * inv_tau
    d = gap * inv_tau
    if len(mix) == 1:
        u = mixed(z, u, d, mix) - m
        d = mix[0] * d - m
    return z, u, d


@formula
def beside_columns(centre, mix):
    """Each lane's centre beside its columns."""
    c_s, c_t, k, m = centre
    if len(mix) == 1:
        m = across(m)
    return across(c_s), across(c_t), across(k), m


@formula
def target_terms(s_y, t_y, present, centre, inv_tau, mix, r):
    """z, u and d of the target, and u of the unmixed teacher; ABSENT and r where there is none."""
    c_s, c_t, k, m = centre
    zy, uy, dy = centred(s_y, t_y, centre, inv_tau, ())
    # An unlikely target stands far from both centres: without a large offset its plain difference is the exact one.
    dy = tl.where(tl.abs(c_t - c_s) < 8.0, (((t_y - s_y) - (c_t - c_s)) - k) * inv_tau, dy)
    zy = tl.where(present, zy, -1e30)
    own_uy = tl.where(present, uy, -1e30)
    uy = own_uy
    if len(mix) == 1:
        uy = tl.where(present, mixed(zy, uy, dy, mix) - m, -1e30)
        dy = mix[0] * dy - m
    return zy, uy, tl.where(present, dy, r), own_uy


@formula
def _move(maxima, top_s, top_t):
    """The unmixed centre of new maxima, and how τ·z, τ·u and τ·d move to it from that of the old ones."""
    old_s, old_t, old_k, _ = centre_of(maxima, 1.0, ())
    c_s, c_t, k, _ = centre_of((top_s, top_t, 0.0), 1.0, ())
    more = old_k - k  # added last: beside a large move its digits would be lost
    x = ((old_s - c_s) - (old_t - c_t)) - more
    return (c_s, c_t, k, 0.0), (old_s - c_s, (old_t - c_t) + more, x)


@formula
def _moves(maxima, whole, centre, by, inv_tau, mix):
    """The centre of the new maxima `whole`, how z, u and d move to it (online.py), and how the unmixed u does."""
    by_s, by_t, x = by
    own_log_t = by_t * inv_tau
    if len(mix) == 1:
        centre = (centre[0], centre[1], centre[2], _excess(whole) * inv_tau)
        x = mix[0] * x + (_excess(whole) - _excess(maxima))
        # At most 1/4, a step of the grid, but for rounding beside -1e20, the maximum of nothing, whose sums are 0: e to
        # such a power would be infinite, and NaN times 0.
        by_t = tl.where(by_s - x > 0.3, 0.3, by_s - x)
    return centre, (by_s * inv_tau, by_t * inv_tau, x * inv_tau), own_log_t


@formula
def raise_maxima(maxima, s, t, live, inv_tau, mix):
    """The running maxima with a tile, their centre, how z, u and d move (online.py), and how the unmixed u does."""
    top_s = tl.maximum(maxima[0], lane_max(tl.where(live, s, -1e20)))
    top_t = tl.maximum(maxima[1], lane_max(tl.where(live, t, -1e20)))
    top_m = maxima[2]
    centre, by = _move(maxima, top_s, top_t)
    if len(mix) == 1:
        x, u, d = above_centre(s, t, beside_columns(centre, ()))
        top_m = tl.maximum(top_m + by[0] - mix[0] * by[2], lane_max(tl.where(live, mixed(x, u, d, mix), -1e20)))
    whole = (top_s, top_t, top_m)
    centre, move, own_log_t = _moves(maxima, whole, centre, by, inv_tau, mix)
    return whole, centre, move, own_log_t


@formula
def merge_maxima(maxima, inv_tau, mix):
    """The maxima of the parts of a row, one lane each, together; how each part moves, and its unmixed u."""
    top_s = tl.max(maxima[0])
    top_t = tl.max(maxima[1])
    top_m = tl.max(maxima[2])
    centre, by = _move(maxima, top_s, top_t)
    if len(mix) == 1:
        top_m = tl.max(maxima[2] + by[0] - mix[0] * by[2])
    whole = (top_s, top_t, top_m)
    _, move, own_log_t = _moves(maxima, whole, centre, by, inv_tau, mix)
    return whole, move, own_log_t


@formula
def at_offsets(s, t, centre, at, inv_tau, mix):
    """q, p, log q, log p, δ and d of logits at a row's final offsets."""
    l_s, l_t, r = at
    z, u, d = centred(s, t, centre, inv_tau, mix)
    return tl.exp(z - l_s), tl.exp(u - l_t), z - l_s, u - l_t, d - r, d


@jit
def columns(student, teacher, view, at, cols):
    """A tile at its final offsets: q, p, log q, log p, δ, d; which columns count (not the held-out one); t."""
    place, y, V, inv_tau, mix, centre = view
    s, t, live, slope = load_pair(student, teacher, place, cols, cols < V, cols < V)
    q, p, logq, logp, delta, d = at_offsets(s, t, centre, at, inv_tau, mix)
    return q, p, logq, logp, delta, d, live & (cols != y), t
