"""The logarithm of a mixture m = λp + (1 − λ)q relative to each of its parts, from δ = log p − log q alone.

K(δ) = log(m/q) = log(1 − λ + λe^δ) is the cumulant function of a Bernoulli variable: a power series with coefficients
that depend on λ alone near δ = 0, max(δ + log λ, log(1 − λ)) + log(1 + e^−|δ + log λ − log(1 − λ)|) elsewhere. Kernels
write summands and slopes in K (`cumulants`, `log1p_exp2`); torch, which has log1p and expm1, by `log_mixture`.

Divergences from a mixture saturate: where p and q hardly overlap, log(m/q) is log(1 − λ) at almost every token that the
student likes, and the gradient q_k (h_k − Σ q h) is what is left of a difference of equal numbers. Adding a multiple of
q to phi changes no gradient (Σ phi moves with it), so on such rows (`far`) the terms leave that constant out. The first
sweep knows which rows these are; `SATURATING` hands it on as the last number of theta.
"""

from typing import Any

import torch

from ..language import formula, jit, rowwise, tl
from .definition import RowParameters
from .elementary import LOG2E, horner, is_tile, log1p_exp2, loses_nothing


def _logs(part, other, delta):
    """log(m/q), log(m/p) and log(m/q) − part where they are far from 0."""
    above = other + delta
    gap = above - part
    tail = gap.abs().neg_().exp_().log1p_()
    beyond = rowwise.maximum(part - delta, other).add_(tail)
    return rowwise.maximum(above, part).add_(tail), beyond, gap.clamp_(min=0.0).add_(tail)


def _log_mixture(weight, delta, far):
    part, other = log_weights.torch(weight)
    above, beyond, excess = _logs(part, other, delta)
    if is_tile(delta) and isinstance(far, torch.Tensor) and loses_nothing(far, torch.ones_like(far)):
        return above, beyond, excess
    # The near form at c, δ cut to ±1/2, plus the far form at δ minus the far form at c: these cancel exactly where
    # c = δ, so nothing has to be selected (elementary.outside).
    cut = delta.clamp(-0.5, 0.5)
    near = torch.expm1(cut).mul_(weight).log1p_()
    cut_above, cut_beyond, _ = _logs(part, other, cut)
    above.sub_(cut_above).add_(near)
    beyond.sub_(cut_beyond).add_(near.sub_(cut).mul_(weight < 1))
    return above, beyond, torch.lerp(above, excess, far)


@formula
def log_weights(weight):
    """(log(1 − weight), log(weight)); −2e30 for log 0: beyond every δ, absent columns (±1e30) included."""
    part = tl.where(weight < 1, tl.log(tl.where(weight < 1, 1.0 - weight, 1.0)), -2e30)
    return part, tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)), -2e30)


@formula
def factor(n: tl.constexpr):
    """1/n!."""
    FACTORIALS: tl.constexpr = (1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880)
    return 1.0 / FACTORIALS[n]


@formula
def cumulants(weight):
    """κ_n/n!, n = 1 to 9, of a Bernoulli variable: log(1 − weight + weight·e^x) = Σ κ_n x^n/n!."""
    v = weight * (1.0 - weight)
    skew = v * (1.0 - 2.0 * weight)
    return (
        weight,
        v / 2,
        skew / 6,
        v * (1.0 - 6.0 * v) / 24,
        skew * (1.0 - 12.0 * v) / 120,
        v * (1.0 + v * (-30.0 + v * 120.0)) / 720,
        skew * (1.0 + v * (-60.0 + v * 360.0)) / 5040,
        v * (1.0 + v * (-126.0 + v * (1680.0 - v * 5040.0))) / 40320,
        skew * (1.0 + v * (-252.0 + v * (5040.0 - v * 20160.0))) / 362880,
    )


@formula
def exp_times_cumulants(kappa, n: tl.constexpr):
    """The coefficient of δ^n in e^δ K."""
    total = kappa[0] * factor(n - 1)
    for k in tl.static_range(2, n + 1):
        total += kappa[k - 1] * factor(n - k)
    return total


@formula
def log2_odds(part, other, delta):
    """log₂ of weight·p over (1 − weight)·q, given `log_weights`: one operation, ready for a power of 2."""
    return delta * LOG2E + (other - part) * LOG2E


@formula
def far_above(part, other, delta, tail):
    """log(m/q) where |δ| > 1/2, given `log_weights` and tail = log1p_exp2(log2_odds(...)).

    Both weights' logs less some number give it less that number.
    """
    return tl.maximum(delta + other, part) + tail


@formula
def far_beyond(part, other, delta, tail):
    """log(m/p), likewise."""
    return tl.maximum(other, part - delta) + tail


@formula
def mixture(of_p, p, q):
    """m = of_p·p + (1 − of_p)·q, and 1/√m: dividing by m takes it twice, and a quarter of the instructions. m > 0."""
    m = of_p * p + ((1.0 - of_p) * q + 1e-37)
    return m, tl.rsqrt(m)


@formula
def larger_weight(part, other, far):
    """(above, part, log): far_above(part, other, ...) is log more than far_above(part, above, ...).

    The log is the larger weight's, so that the other one, which may be 0, does not swallow δ; log(1 − weight) on far
    rows, whose terms leave it out.
    """
    by_part = (part >= other) | (far > 0)
    return tl.where(by_part, other - part, 0.0), tl.where(by_part, 0.0, part - other), tl.where(by_part, part, other)


@formula(torch=_log_mixture)
def log_mixture(weight, delta, far):
    """(log(m/q), log(m/p), log(m/q) − far·log(1 − weight)) of m = weight·p + (1 − weight)·q.

    The first two are exactly 0 at δ = 0, the first also at weight 0, the second at weight 1.
    """
    part, other = log_weights(weight)
    near = tl.abs(delta) < 0.5
    x = tl.where(near, delta, 0.0)
    close = x * horner(cumulants(weight), x)
    tail = log1p_exp2(log2_odds(part, other, delta))
    above = tl.where(near, close, far_above(part, other, delta, tail))
    beyond = tl.where(near, close - x, far_beyond(part, other, delta, tail))
    shift = far * part
    excess = tl.where(near, close - shift, far_above(part - shift, other - shift, delta, tail))
    return above, beyond, excess


@formula
def _far(state):
    return tl.where(state[3] < 0.5 * state[0], 0.0, 1.0)


@jit
def _far_kernel(student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    return (_far(state),), ()


def _far_torch(whole: Any, theta: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return (_far.torch(whole.state).to(whole.state[0].dtype),)


SATURATING = RowParameters(_far_kernel, _far_torch, 1)
