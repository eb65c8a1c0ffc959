"""One sweep over the vocabulary: running maxima and the second-order sums that make the value exact.

Logits are centred on running maxima rounded to a coarse grid, c_s and c_t (student, teacher): z = (s − c_s)/τ,
u = (t − c_t − k)/τ, and d = u − z is formed as ((t − c_t) − (s − c_s) − k)/τ, with the small k that makes it 0 where
both maxima stand. Where the two distributions are close every one of these subtractions is exact, whatever the offsets
of the logits. First-order sums would lose the divergence to cancellation as it shrinks; sums of second-order remainders
are of its own size:

    Z = Σ e^z    A = Σ e^z d    B = Σ e^z (e^d − 1 − d)    r = log(Z_t/Z_s) = log1p((A + B)/Z)
    Σ e^z rem2(d − x) = e^{−x} B + expm1(−x) A + rem2(−x) Z                              (shift by x)

The shift serves three times: when a tile raises a maximum (x = Δ), when the row's own r is known (x = r), and when two
partial rows merge. Far apart (B/Z ≥ 1/2) it is the remainders that cancel, and r = log(Z_t/Z) is used instead.

Every online state starts with Z_s, Z_t. Functions that a divergence may bring of its own, each a `formula`:

    init() -> state                                         zeros
    advance(state, move, z, u, d, ez, eu, live, theta)      rescale by the move of the maxima, add a tile: thread_sum
    ratio(state) -> r
    sums(state, l_s, l_t, r, theta) -> (F, Φ)               at any row offsets (decomposition.py)

A column that does not count has e^z = e^u = 0 and may be called live: what is summed must vanish with these two.

`move` = (log ρ_s, log ρ_t, Δ): old centres minus new ones, and their difference by which d falls, all over τ.
"""

from ..language import formula, tl
from .elementary import close_expm1_product, exp, expm1_product, log1p, loses_nothing, negative, rem2_product
from .quantities import EntropySums, LogSumExp
from .reductions import broadcast_per_thread, thread_max, thread_sum


@formula
def log_sum(z):
    """log z, finite also for an empty sum (as if it were 1e-37)."""
    return tl.log(tl.where(z < 1e-37, 1e-37, z))


@formula
def entropies_advance(entropy_sums, zeroth, log_s, log_t, z, u, live):
    """EntropySums with a tile; zeroth is Z_s before it, and log_s, log_t say how z and u move."""
    entropy_s, entropy_t, sum_t = entropy_sums
    to_s = tl.exp(log_s)
    to_t = tl.exp(log_t)
    entropy_s = to_s * entropy_s + tl.where(to_s > 0, to_s * log_s, 0.0) * zeroth
    entropy_t = to_t * entropy_t + tl.where(to_t > 0, to_t * log_t, 0.0) * sum_t
    entropy_s += thread_sum(tl.where(live, tl.exp(z) * z, 0.0))
    entropy_t += thread_sum(tl.where(live, tl.exp(u) * u, 0.0))
    sum_t = to_t * sum_t + thread_sum(tl.where(live, tl.exp(u), 0.0))
    return EntropySums(entropy_s, entropy_t, sum_t)


@formula
def cross_entropy_advance(cross, s, live):
    """LogSumExp with a tile."""
    old, total = cross
    top = tl.maximum(old, thread_max(s))
    return LogSumExp(
        top, total * tl.exp(old - top) + thread_sum(tl.where(live, tl.exp(s - broadcast_per_thread(top)), 0.0))
    )


@formula
def moments_init():
    """Z_s, Z_t, A, B."""
    return 0.0, 0.0, 0.0, 0.0


@formula
def _shift(zeroth, first, second, to_s, to_t, x):
    """Move weights by to_s and differences by −x, where to_t = to_s·e^{−x}."""
    second = to_t * second + expm1_product(to_s, to_t, -x) * first + rem2_product(to_s, to_t, -x) * zeroth
    return to_s * zeroth, to_s * (first - x * zeroth), second


@formula
def same(x):
    """x, the sign of what is not `negative`."""
    return x


def _unsigned(d, sign):
    """d as it is: in eager torch `_first_moment` and `_remainders` take the sign, and save a tile."""
    return d


@formula(torch=_unsigned)
def _signed(d, SIGN):
    """The tile that first moment and remainders are sums of."""
    return SIGN(d)


def _first_moment(ez, d, live, sign):
    """The sign of the sum, a number per row, in the place of the tile's."""
    return sign((ez * d).sum(-1, keepdim=True))


@formula(torch=_first_moment)
def first_moment(ez, d, live, SIGN):
    """Σ e^z d of a tile whose d is `_signed`."""
    return thread_sum(tl.where(live, ez * d, 0.0))


def _remainders(ez, eu, d, live, zeroth, other, first, sign):
    plain = other - zeroth - first  # the same sum, of which little may be left
    if loses_nothing(plain, zeroth):
        return plain
    return remainders.traced(ez, eu, sign(d), live, zeroth, other, first, sign)


@formula(torch=_remainders)
def remainders(ez, eu, d, live, zeroth, other, first, SIGN):
    """Σ e^z (e^d − 1 − d) of a tile, given Σ e^z, Σ e^u and Σ e^z d."""
    return thread_sum(tl.where(live, rem2_product(ez, eu, d), 0.0))


@formula
def differences(ez, eu, d, live, zeroth, other, first, SIGN):
    """The same where A + B is all that is asked for: only the sum of both has its digits."""
    return thread_sum(tl.where(live, close_expm1_product(ez, eu, d), 0.0)) - first


@formula
def _weighted_moments(state, log_s, log_t, x, d, ez, eu, live, SIGN, REMAINDERS):
    z_s, z_t, first, second = state
    d = _signed(d, SIGN)
    to_t = exp(log_t)
    z_s, first, second = _shift(z_s, first, second, exp(log_s), to_t, x)
    more_s = thread_sum(tl.where(live, ez, 0.0))
    z_s += more_s
    more_t = thread_sum(tl.where(live, eu, 0.0))
    z_t = to_t * z_t + more_t
    more = first_moment(ez, d, live, SIGN)
    first += more
    second += REMAINDERS(ez, eu, d, live, more_s, more_t, more, SIGN)
    return z_s, z_t, first, second


@formula
def moments_advance(state, move, z, u, d, ez, eu, live, theta):
    """Student-weighted moments: what RKL needs, and what every r comes from."""
    log_s, log_t, x = move
    return _weighted_moments(state, log_s, log_t, x, d, ez, eu, live, same, remainders)


@formula
def teacher_moments_advance(state, move, z, u, d, ez, eu, live, theta):
    """The same with the roles of student and teacher exchanged, kept in the order (Z_s, Z_t, A', B')."""
    log_s, log_t, x = move
    z_s, z_t, first, second = state
    z_t, z_s, first, second = _weighted_moments(
        (z_t, z_s, first, second), log_t, log_s, -x, d, eu, ez, live, negative, remainders
    )
    return z_s, z_t, first, second


@formula(torch=moments_advance)
def ratio_advance(state, move, z, u, d, ez, eu, live, theta):
    """What r comes from, and a B that tells rows which are close from others, but is no sum of a value."""
    log_s, log_t, x = move
    return _weighted_moments(state, log_s, log_t, x, d, ez, eu, live, same, differences)


@formula
def _log_ratio(weight, other, first, second):
    """log(other/weight) from the weight's moments: log1p near, a quotient far."""
    near = second < 0.5 * weight
    x = tl.where(near, (first + second) / tl.where(weight > 0, weight, 1.0), 0.0)
    return tl.where(near, log1p(x), log_sum(other) - log_sum(weight))


@formula
def moments_ratio(state):
    """r = log(Z_t/Z_s)."""
    z_s, z_t, first, second = state
    return _log_ratio(z_s, z_t, first, second)


@formula
def teacher_moments_ratio(state):
    """r = log(Z_t/Z_s), from teacher-weighted moments."""
    z_s, z_t, first, second = state
    return -_log_ratio(z_t, z_s, first, second)


@formula
def remainder_sums(weight, other, first, second, log_weight, log_other, x):
    """Σ w rem2(d − x) and Σ w (d − x), w normalised by e^−log_weight and w·e^d by e^−log_other; x = difference."""
    near = second < 0.5 * weight
    w = tl.exp(-log_weight)
    v = tl.exp(-log_other)  # = w·e^{−x}
    far_second = v * other - w * weight - w * (first - x * weight)
    near_second = v * second + expm1_product(w, v, -x) * first + rem2_product(w, v, -x) * weight
    total = tl.where(near, near_second, far_second)
    return tl.where(total < 0, 0.0, total), w * (first - x * weight)
