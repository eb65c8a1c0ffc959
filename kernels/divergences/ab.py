"""α-β divergence, −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)].

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

from ..language import formula, tl, torch_twin
from ..maths.definition import Definition, OnlineForm, Parameter
from ..maths.elementary import LOG2E, Summand, expm1_ratio
from ..maths.moments import moments_advance, moments_ratio
from ..maths.reductions import thread_sum

_MARGIN = 0.05  # smallest exponent at which the one-sweep sums, and plain differences, keep their digits
_PLAIN = 0.1  # relative size from which a plain difference of weights keeps its digits
_FAR = 80.0  # e^x overflows float32 beyond 88


def _plain_exponents(*exponents):
    """The exponents as numbers if they are the same for all rows and away from 0, else None."""
    if any(a.dim() or a.device.type != "cpu" for a in exponents):
        return None
    values = [float(a) for a in exponents]
    return values if min(map(abs, values)) >= _MARGIN else None


def _eager_slope(w, v, a, x):
    known = _plain_exponents(a)
    if known is not None and x.dim() == 2:
        plain = v - w
        size = torch.linalg.vector_norm
        if (size(plain, dim=-1) > _PLAIN * size(w, dim=-1)).all():
            return plain.mul_(1 / known[0])
    limit = a == 0
    a = torch.where(limit, 1.0, a)
    y = a * x
    precise = torch.expm1(y.clamp(max=_FAR)).mul_(w).div_(a)
    if y.dim() < 2 or (y > _FAR).any():
        precise = torch.where(y > _FAR, (v - w) / a, precise)
    return torch.where(limit, w * x, precise) if y.dim() < 2 or limit.any() else precise


def _eager_bend(w, v, u, alpha, beta, x):
    known = _plain_exponents(alpha, beta, alpha + beta)
    if known is None or x.dim() < 2:
        return _precise_bend(w, v, u, alpha, beta, x)
    a, b, c = known

    def make():
        plain = (u * (1 / (b * c))).add_(v, alpha=-1 / (a * b)).add_(w, alpha=1 / (a * c))
        if (plain.sum(-1) > _PLAIN * w.sum(-1)).all():
            return plain
        return _precise_bend(w, v, u, alpha, beta, x)

    def sums():
        weight = w.sum(-1)
        return u.sum(-1) / (b * c) - v.sum(-1) / (a * b) + weight / (a * c), _PLAIN * weight

    # An absent column, whose log q is −1e30, has no weight only where no exponent is negative.
    return Summand(make, sums) if min(known) > 0 else make()


def _eager_power(c, logs):
    return (c * LOG2E * logs).exp2_()


def _eager_mixed(alpha, logp, beta, logq):
    scaled, known = alpha * LOG2E * logp, _plain_exponents(beta)
    return (scaled + beta * LOG2E * logq if known is None else scaled.add_(logq, alpha=known[0] * LOG2E)).exp2_()


@formula(eager=_eager_power)
def power(c, logs):
    """q^c, given log q."""
    return tl.exp(c * logs)


@formula(eager=_eager_mixed)
def mixed_power(alpha, logp, beta, logq):
    """p^α q^β."""
    return tl.exp(alpha * logp + beta * logq)


@formula(eager=_eager_slope)
def slope(w, v, a, x):
    """w·φ_a(x), given v = w·e^{a x}."""
    y = a * x
    near = tl.abs(y) < 0.5
    return tl.where(near, w * tl.where(near, x, 0.0) * expm1_ratio(y), (v - w) / tl.where(a == 0, 1.0, a))


def _eager_fall(w, v, a, x):
    return _eager_slope(w, v, a, x).neg_()


@formula(eager=_eager_fall)
def fall(w, v, a, x):
    """−w·φ_a(x), given v = w·e^{a x}."""
    return -slope(w, v, a, x)


def _bend(w, v, u, alpha, beta, x):
    """w·[φ_c(x) − φ_α(x)]/β ≥ 0, given v = w·e^{α x} and u = w·e^{c x}."""
    c = alpha + beta
    h1 = c + alpha
    a2 = alpha * alpha
    h2 = c * h1 + a2
    h3 = c * h2 + a2 * alpha
    h4 = c * h3 + a2 * a2
    h5 = c * h4 + a2 * a2 * alpha
    h6 = c * h5 + a2 * a2 * a2
    near = (tl.abs(c * x) < 0.5) & (tl.abs(alpha * x) < 0.5) & (tl.abs(beta * x) < 0.5)
    y = tl.where(near, x, 0.0)
    series = h4 / 720 + y * (h5 / 5040 + y * (h6 / 40320))
    series = 1 / 2 + y * (h1 / 6 + y * (h2 / 24 + y * (h3 / 120 + y * series)))
    by_beta = (slope(w, u, c, x) - slope(w, v, alpha, x)) / tl.where(beta == 0, 1.0, beta)
    by_alpha = (slope(v, u, beta, x) - slope(w, u, c, x)) / tl.where(alpha == 0, 1.0, alpha)
    far = tl.where(tl.abs(beta) >= tl.abs(alpha), by_beta, by_alpha)
    return tl.where(near, w * (y * y) * series, far)


bend = formula(_bend, eager=_eager_bend)
_precise_bend = torch_twin(_bend)


@formula
def term(q, p, logq, logp, delta, theta):
    """f = q^c [φ_c(δ) − φ_α(δ)]/β, phi = −q^c φ_α(δ)."""
    alpha, beta = theta
    c = alpha + beta
    qc = power(c, logq)
    mixed = mixed_power(alpha, logp, beta, logq)
    pc = power(c, logp)
    return bend(qc, mixed, pc, alpha, beta, delta), fall(qc, mixed, alpha, delta)


@formula
def init():
    """Z_s, Z_t, A, B for r; W, P, G near; Σ p^α q^β and Σ p^c far."""
    return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@formula
def _shift(weight, first, second, w, v, u, alpha, beta, x):
    """(P, G) after d moves by −x, given w, v = w·e^{−αx}, u = w·e^{−cx}."""
    mixed = slope(v, u, beta, -x)  # w (e^{−cx} − e^{−αx})/β
    moved = v * first + slope(w, v, alpha, -x) * weight
    return moved, u * second + mixed * first + bend(w, v, u, alpha, beta, -x) * weight


@formula
def advance(state, move, z, u, d, ez, eu, live, theta):
    """Moments for r, and the α-β sums beside them."""
    z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum = state
    alpha, beta = theta
    c = alpha + beta
    log_s, log_t, x = move
    z_s, z_t, a, b = moments_advance((z_s, z_t, a, b), move, z, u, d, ez, eu, live, theta)
    to_w = tl.exp(c * log_s)
    to_v = tl.exp(alpha * log_t + beta * log_s)
    to_u = tl.exp(c * log_t)
    moved = _shift(weight, first, second, to_w, to_v, to_u, alpha, beta, x)
    w = power(c, z)
    v = mixed_power(alpha, u, beta, z)
    p = power(c, u)
    weight = to_w * weight + thread_sum(tl.where(live, w, 0.0))
    first = moved[0] + thread_sum(tl.where(live, slope(w, v, alpha, d), 0.0))
    second = moved[1] + thread_sum(tl.where(live, bend(w, v, p, alpha, beta, d), 0.0))
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


_EXPONENT = functools.partial(Parameter, low=-16.0, high=16.0, one_sweep_from=_MARGIN)
AB = Definition(
    "ab",
    term,
    reference,
    parameters=(
        _EXPONENT("alpha", 0.2, "exponent of p; float32 overflows beyond"),
        _EXPONENT("beta", 0.7, "exponent of q; float32 overflows beyond"),
    ),
    online=OnlineForm(init, advance, ratio, sums, tile="heavy"),
)
