"""α-β (alpha-beta) divergence, −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)].

(1, 0) is FKL, (0, 1) RKL, (α, 1−α) the α-divergence, (½, ½) is 4(1 − Σ√(pq)), (1, 1) is ½‖p − q‖².

Summand: with c = α + β and φ_a(x) = expm1(a x)/a (φ_0(x) = x), f = q^c [φ_c(δ) − φ_α(δ)]/β, or, the same number,
p^c [φ_c(−δ) − φ_β(−δ)]/α; every f ≥ 0. Far from δ = 0 the form with the larger divisor is used; near, the divided
difference as a series, q^c δ² Σ_n h_n δ^n/(n+2)! with h_n = c h_{n−1} + α^n, which divides by nothing. So every limit
(α = 0, β = 0, α + β = 0, both 0) is the same code, and continuous.
Gradient: phi = q^β (q^α − p^α)/α = −q^c φ_α(δ), at all limits; dL/dz_k = phi_k − q_k Σ phi.
One sweep: W = Σ w, P = Σ w φ_α(d), G = Σ w [φ_c(d) − φ_α(d)]/β with w = e^{c z} shift exactly when d moves by x:
    φ_a(d − x) = e^{−ax} φ_a(d) + φ_a(−x)
    G ← e^{−cx} G + (e^{−cx} − e^{−αx})/β P + [φ_c(−x) − φ_α(−x)]/β W
  so a raised maximum and the row's own r are one function (`shift`). Far apart the plain sums of p^α q^β and p^c are
  used. This needs α, β and α + β well away from 0 and positive; otherwise two sweeps evaluate the summand itself.
Edge cases: α, β ≥ 0, α + β > 0 is safe everywhere. A negative exponent weighs the least likely tokens: the value can
overflow float32 (q = e^−60, β = −1.5 gives e^90) and is then inf. q = 0 < p gives inf if β ≤ 0, p^c/(βc) otherwise.
Source: Cichocki, Cruces and Amari, Entropy 2011 (the α-β divergence and its limits); distillation: Wang et al., ABKD,
ICML 2025. ABKD's own code divides by α, β instead of α², β² at the limits; here they are the true limits.
"""

import functools

import torch

from ..language import formula, rowwise, tl
from ..maths.definition import Definition, OnlineForm, Parameter
from ..maths.elementary import (
    LOG2E,
    clear_difference,
    close_expm1_product,
    exp,
    expm1_product,
    expm1_ratio,
    horner,
    is_tile,
    loses_nothing,
    negative,
)
from ..maths.moments import moments_ratio, ratio_advance
from ..maths.reductions import thread_sum

_MARGIN = 0.05  # smallest exponent at which the one-sweep sums, and plain differences, keep their digits


def _power(c, logs):
    return (c * logs).exp_()


@formula(torch=_power)
def power(c, logs):
    """q^c, given log q."""
    return tl.exp(c * logs)


def _mixed_power(alpha, logp, beta, logq):
    return (alpha * logp).add_(beta * logq).exp_()


@formula(torch=_mixed_power)
def mixed_power(alpha, logp, beta, logq):
    """p^α q^β."""
    return tl.exp(alpha * logp + beta * logq)


@formula
def plain_power(c, logs):
    """`power` where nothing but flushed numbers is lost: one product, by a number of the row, before the power of 2."""
    return tl.exp2((c * LOG2E) * logs)


@formula
def plain_mixed_power(alpha, logp, beta, logq):
    """`mixed_power`, likewise."""
    return tl.exp2((alpha * LOG2E) * logp + (beta * LOG2E) * logq)


def _slope(w, v, a, x):
    limit = a == 0
    by = rowwise.where(limit, 1.0, a)
    plain = clear_difference(w, v)
    if plain is not None and not isinstance(a, torch.Tensor):
        return plain.mul_(1.0 / by)
    return rowwise.where(limit, w * x, expm1_product.torch(w, v, a * x) / by)


@formula(torch=_slope)
def slope(w, v, a, x):
    """w·φ_a(x), given v = w·e^{a x}."""
    y = a * x
    near = tl.abs(y) < 0.5
    return tl.where(near, w * tl.where(near, x, 0.0) * expm1_ratio(y), (v - w) / tl.where(a == 0, 1.0, a))


def _apart(alpha, beta):
    """Whether exponents are the same for all rows, and such that differences of powers may keep their digits."""
    return not isinstance(alpha + beta, torch.Tensor) and min(alpha, beta) >= _MARGIN


def _plain_bend(w, v, u, alpha, beta):
    c = alpha + beta
    return (u * (1 / (beta * c))).add_(v, alpha=-1 / (alpha * beta)).add_(w, alpha=1 / (alpha * c))


@formula
def _bend_series(alpha, beta):
    """h_n/(n + 2)!."""
    c = alpha + beta
    h1 = c + alpha
    a2 = alpha * alpha
    h2 = c * h1 + a2
    h3 = c * h2 + a2 * alpha
    h4 = c * h3 + a2 * a2
    h5 = c * h4 + a2 * a2 * alpha
    h6 = c * h5 + a2 * a2 * a2
    return 1 / 2, h1 * (1 / 6), h2 * (1 / 24), h3 * (1 / 120), h4 * (1 / 720), h5 * (1 / 5040), h6 * (1 / 40320)


def _bend(w, v, u, alpha, beta, x):
    if _apart(alpha, beta) and is_tile(x):
        plain = _plain_bend(w, v, u, alpha, beta)
        if loses_nothing(plain.sum(-1), w.sum(-1) / (alpha * (alpha + beta))):
            return plain
    return bend.traced(w, v, u, alpha, beta, x)


@formula(torch=_bend, summand=True)
def bend(w, v, u, alpha, beta, x):
    """w·[φ_c(x) − φ_α(x)]/β ≥ 0, given v = w·e^{α x} and u = w·e^{c x}."""
    c = alpha + beta
    near = (tl.abs(c * x) < 0.5) & (tl.abs(alpha * x) < 0.5) & (tl.abs(beta * x) < 0.5)
    y = tl.where(near, x, 0.0)
    series = horner(_bend_series(alpha, beta), y)
    by_beta = (slope(w, u, c, x) - slope(w, v, alpha, x)) / tl.where(beta == 0, 1.0, beta)
    by_alpha = (slope(v, u, beta, x) - slope(w, u, c, x)) / tl.where(alpha == 0, 1.0, alpha)
    far = tl.where(tl.abs(beta) >= tl.abs(alpha), by_beta, by_alpha)
    return tl.where(near, w * (y * y) * series, far)


@formula
def _close(alpha, beta, x):
    """Whether the series of plain exponents hold at x."""
    return tl.abs(x) < 0.5 / (alpha + beta)


@formula
def _slope_by_series(w, v, a, x, close, TERMS: tl.constexpr):
    """w·φ_a(x), given v = w·e^{a x}: by TERMS terms of (e^{a x} − 1)/(a x) where the series holds."""
    a2 = a * a
    a3 = a2 * a
    all_terms = (1.0, a * (1 / 2), a2 * (1 / 6), a3 * (1 / 24), a2 * a2 * (1 / 120), a2 * a3 * (1 / 720))
    all_terms = all_terms + (a3 * a3 * (1 / 5040),)
    series = ()
    for n in tl.static_range(TERMS):
        series = series + (all_terms[n],)
    return tl.where(close, w * x * horner(series, x), (v - w) * (1.0 / a))


@formula(torch=lambda w, v, a, x, close: slope.torch(w, v, a, x))
def plain_slope(w, v, a, x, close):
    """w·φ_a(x), given v = w·e^{a x}, for an exponent well away from 0."""
    return _slope_by_series(w, v, a, x, close, 7)


@formula(torch=lambda w, v, u, alpha, beta, x, close: bend.torch(w, v, u, alpha, beta, x), summand=True)
def plain_bend(w, v, u, alpha, beta, x, close):
    """w·[φ_c(x) − φ_α(x)]/β ≥ 0, given v = w·e^{α x} and u = w·e^{c x}, for exponents well away from 0."""
    c = alpha + beta
    far = u * (1.0 / (beta * c)) - v * (1.0 / (alpha * beta)) + w * (1.0 / (alpha * c))
    return tl.where(close, w * (x * x) * horner(_bend_series(alpha, beta), x), far)


def _slope_sum(w, v, alpha, beta, x, live):
    w_sum, v_sum = (thread_sum.torch(rowwise.where(live, y, 0.0)) for y in (w, v))
    if _apart(alpha, beta) and loses_nothing((v_sum - w_sum).abs(), w_sum):
        return (v_sum - w_sum) / alpha
    return slope_sum.traced(w, v, alpha, beta, x, live)


@formula(torch=_slope_sum)
def slope_sum(w, v, alpha, beta, x, live):
    """Σ `plain_slope` of a tile, by alpha."""
    return thread_sum(tl.where(live, close_expm1_product(w, v, alpha * x), 0.0)) * (1.0 / alpha)


def _bend_sum(w, v, u, alpha, beta, x, live):
    if _apart(alpha, beta):
        w_sum, v_sum, u_sum = (thread_sum.torch(rowwise.where(live, y, 0.0)) for y in (w, v, u))
        plain = _plain_bend(w_sum, v_sum, u_sum, alpha, beta)
        if loses_nothing(plain, w_sum / (alpha * (alpha + beta))):
            return plain
    return bend_sum.traced(w, v, u, alpha, beta, x, live)


@formula(torch=_bend_sum)
def bend_sum(w, v, u, alpha, beta, x, live):
    """Σ `plain_bend` of a tile."""
    return thread_sum(tl.where(live, plain_bend(w, v, u, alpha, beta, x, _close(alpha, beta, x)), 0.0))


@formula
def term(q, p, logq, logp, delta, theta):
    """f = q^c [φ_c(δ) − φ_α(δ)]/β, phi = −q^c φ_α(δ)."""
    alpha, beta = theta
    c = alpha + beta
    qc = power(c, logq)
    mixed = mixed_power(alpha, logp, beta, logq)
    pc = power(c, logp)
    return bend(qc, mixed, pc, alpha, beta, delta), -slope(qc, mixed, alpha, delta)


@formula(torch=term)
def plain_term(q, p, logq, logp, delta, theta):
    """`term` for exponents well away from 0: no division, and one choice between near and far."""
    alpha, beta = theta
    c = alpha + beta
    qc = plain_power(c, logq)
    mixed = plain_mixed_power(alpha, logp, beta, logq)
    pc = plain_power(c, logp)
    close = _close(alpha, beta, delta)
    return plain_bend(qc, mixed, pc, alpha, beta, delta, close), negative(plain_slope(qc, mixed, alpha, delta, close))


@formula(torch=term)
def half_plain_term(q, p, logq, logp, delta, theta):
    """`plain_term` for a gradient in half precision."""
    alpha, beta = theta
    qc = plain_power(alpha + beta, logq)
    mixed = plain_mixed_power(alpha, logp, beta, logq)
    close = tl.abs(delta) < 0.024 / alpha
    return 0.0 * qc, negative(_slope_by_series(qc, mixed, alpha, delta, close, 2))


@formula
def init():
    """Z_s, Z_t, A, B for r; W, P, G near; Σ p^α q^β and Σ p^c far."""
    return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@formula
def _shift(weight, first, second, w, v, u, alpha, beta, x):
    """(P, G) after d moves by −x, given w, v = w·e^{−αx}, u = w·e^{−cx}."""
    close = _close(alpha, beta, x)
    mixed = plain_slope(v, u, beta, -x, close)  # w (e^{−cx} − e^{−αx})/β
    moved = v * first + plain_slope(w, v, alpha, -x, close) * weight
    return moved, u * second + mixed * first + plain_bend(w, v, u, alpha, beta, -x, close) * weight


@formula
def advance(state, move, z, u, d, ez, eu, live, theta):
    """Moments for r, and the α-β sums beside them."""
    z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum = state
    alpha, beta = theta
    c = alpha + beta
    log_s, log_t, x = move
    z_s, z_t, a, b = ratio_advance((z_s, z_t, a, b), move, z, u, d, ez, eu, live, theta)
    to_w = exp(c * log_s)
    to_v = exp(alpha * log_t + beta * log_s)
    to_u = exp(c * log_t)
    moved = _shift(weight, first, second, to_w, to_v, to_u, alpha, beta, x)
    w = plain_power(c, z)
    v = plain_mixed_power(alpha, u, beta, z)
    p = plain_power(c, u)
    weight = to_w * weight + thread_sum(tl.where(live, w, 0.0))
    first = moved[0] + slope_sum(w, v, alpha, beta, d, live)
    second = moved[1] + bend_sum(w, v, p, alpha, beta, d, live)
    mixed_sum = to_v * mixed_sum + thread_sum(tl.where(live, v, 0.0))
    teacher_sum = to_u * teacher_sum + thread_sum(tl.where(live, p, 0.0))
    return z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum


@formula
def ratio(state):
    """r = log(Z_t/Z_s)."""
    z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum = state
    return moments_ratio((z_s, z_t, a, b))


@formula
def sums(state, l_s, l_t, r, theta):
    """F = Σ q^c [φ_c(δ) − φ_α(δ)]/β and Φ = −Σ q^c φ_α(δ)."""
    z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum = state
    alpha, beta = theta
    c = alpha + beta
    w = tl.exp(-c * l_s)
    v = tl.exp(-alpha * l_t - beta * l_s)
    u = tl.exp(-c * l_t)
    near_slope, near_total = _shift(weight, first, second, w, v, u, alpha, beta, r)
    qq = w * weight
    pq = v * mixed_sum
    far_slope = (pq - qq) / alpha
    far_total = ((u * teacher_sum - qq) / c - far_slope) / beta
    near = (b < 0.5 * z_s) | (tl.abs(r) < 0.5)
    total = tl.where(near, near_total, far_total)
    return tl.where(total < 0, 0.0, total), -tl.where(near, near_slope, far_slope)


def reference(logp: torch.Tensor, logq: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The published sum and its limits, one case after the other."""
    x, y = logp, logq
    if alpha == 0 and beta == 0:
        return 0.5 * (y - x).square().sum(-1)
    if alpha == 0:
        return ((beta * y).exp() * beta * (y - x) - (beta * y).exp() + (beta * x).exp()).sum(-1) / beta**2
    if beta == 0:
        return ((alpha * x).exp() * alpha * (x - y) - (alpha * x).exp() + (alpha * y).exp()).sum(-1) / alpha**2
    if alpha + beta == 0:
        return (alpha * (y - x) + (alpha * (x - y)).exp() - 1).sum(-1) / alpha**2
    c = alpha + beta
    terms = (alpha * x + beta * y).exp() - alpha / c * (c * x).exp() - beta / c * (c * y).exp()
    return -terms.sum(-1) / (alpha * beta)


EXPONENT = functools.partial(Parameter, low=-16.0, high=16.0, one_sweep_from=_MARGIN)
AB = Definition(
    "ab",
    term,
    reference,
    parameters=(
        EXPONENT("alpha", 0.2, "exponent of p; float32 overflows beyond"),
        EXPONENT("beta", 0.7, "exponent of q; float32 overflows beyond"),
    ),
    online=OnlineForm(init, advance, ratio, sums, tile="heavy", term=plain_term, half_term=half_plain_term),
)
