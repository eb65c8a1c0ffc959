"""Skew reverse Kullback-Leibler divergence, KL(q‖M) with M = λq + (1−λ)p.

Summand: with a = log(M/q), f = q·rem2(a): Σ(M − q) = 0 has been added, so f ≥ 0.
Gradient: phi = −q a − λ q·expm1(−a): the second term is the student inside the mixture. `detach_mixture=True` takes it
for a constant there, phi = −q a, as DistiLLM-2 does; the value is the same.
a = log1p((1−λ)·expm1(δ)) is a function of δ only; far rows use e = a − log λ (mixture.py): −q e − q·expm1(−e).
Edge cases: λ = 0 is KL(q‖p), λ = 1 is 0. For λ > 0 bounded by −log λ, also where p = 0 < q.
Source: Ko et al., DistiLLM, ICML 2024, eq. 5 (λ = 0.1); Ko et al., DistiLLM-2, ICML 2025 (detached mixture).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition, Parameter
from ..maths.elementary import expm1_product, half_log1p_exp2, horner, log1p_exp2, negative, rem2_product
from ..maths.mixture import (
    SATURATING,
    cumulants,
    factor,
    far_above,
    larger_weight,
    log2_odds,
    log_mixture,
    log_weights,
    mixture,
)
from .skl import LAM


@formula
def _by_logs(q, p, logq, logp, delta, theta):
    """f = q·rem2(a), phi = −q a − λ q·expm1(−a), the last term only while the mixture is not detached."""
    lam, detach_mixture, far = theta
    far = tl.where(lam > 0, far, 0.0)
    above, _, excess = log_mixture(1.0 - lam, delta, far)
    inverse = q * tl.exp(tl.where(excess < -80.0, 80.0, -excess))  # q²/M; a ≥ log λ, so the bound only meets λ = 0
    inside = (lam + far * (1.0 - lam)) * (1.0 - detach_mixture) * expm1_product(q, inverse, -excess)
    return rem2_product(q, lam * q + (1.0 - lam) * p, above), -q * excess - inside


@formula
def _value_series(lam):
    """f/(q δ²) as a series of δ: f/q = e^K − 1 − K, K = log(M/q)."""
    kappa = cumulants(1.0 - lam)
    series = ()
    for n in tl.static_range(2, 10):
        series = series + ((1.0 - lam) * factor(n) - kappa[n - 1],)
    return series


@formula
def _left_out(theta):
    """The constant of phi/q that a far row leaves out: −log λ − attached·(1 − λ), less."""
    lam, detach_mixture, far = theta
    part, _ = log_weights(1.0 - lam)
    return tl.where(lam > 0, far, 0.0) * (part + (1.0 - detach_mixture) * (1.0 - lam))


@formula
def _slope(q, delta, theta, share, excess, TERMS: tl.constexpr, EDGE: tl.constexpr):
    """phi: by TERMS terms of its series where |δ| < EDGE, phi/q = −K + attached·(dK/dδ − 1 + λ), else from the share
    dK/dδ that the teacher has of M, and from excess = K + attached·(1 − λ); on far rows without the constants.

    The student's part in the mixture is −λ q·expm1(−K) = q·(share − 1 + λ).
    """
    lam, detach_mixture, far = theta
    attached = 1.0 - detach_mixture
    kappa = cumulants(1.0 - lam)
    series = ()
    for n in tl.static_range(1, TERMS + 1):
        series = series + (attached * (n + 1) * kappa[n] - kappa[n - 1],)
    near = delta * horner(series, delta) + _left_out(theta)
    return q * tl.where(tl.abs(delta) < EDGE, near, attached * share - excess)


@formula(torch=_by_logs)
def term(q, p, logq, logp, delta, theta):
    """f = q·rem2(a), phi = −q a − λ q·expm1(−a), the last term only while the mixture is not detached."""
    lam, detach_mixture, far = theta
    part, other = log_weights(1.0 - lam)
    above, below, log = larger_weight(part, other, tl.where(lam > 0, far, 0.0))
    excess = far_above(below, above, delta, log1p_exp2(log2_odds(part, other, delta)))  # log(M/q) − log
    m, inverse_root = mixture(1.0 - lam, p, q)
    near = q * (delta * delta) * horner(_value_series(lam), delta)
    f = tl.where(tl.abs(delta) < 0.5, near, (m - q * (1.0 + log)) - q * excess)
    share = (1.0 - lam) * p * inverse_root * inverse_root
    whole = log + (1.0 - detach_mixture) * (1.0 - lam) - _left_out(theta)
    return f, _slope(q, delta, theta, share, excess + whole, 8, 0.5)


@formula(torch=_by_logs)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    lam, detach_mixture, far = theta
    part, other = log_weights(1.0 - lam)
    gap = log2_odds(part, other, delta)
    inverse_root = tl.rsqrt(1.0 + tl.exp2(negative(gap)))
    whole = (1.0 - detach_mixture) * (1.0 - lam) - _left_out(theta)
    excess = far_above(part + whole, other + whole, delta, half_log1p_exp2(gap))
    return 0.0 * q, _slope(q, delta, theta, inverse_root * inverse_root, excess, 4, 0.25)


def reference(logp: torch.Tensor, logq: torch.Tensor, lam: float, detach_mixture: float) -> torch.Tensor:
    """Σ q (log q − log M), a column with q = 0 left out."""
    weight = torch.tensor(lam, dtype=logp.dtype)
    student = logq.detach() if detach_mixture else logq
    mixture = torch.logaddexp(student + weight.log(), logp + (1 - weight).log())
    q = logq.exp()
    return torch.where(q > 0, q * (torch.where(q > 0, logq, 0.0) - torch.where(q > 0, mixture, 0.0)), 0.0).sum(-1)


SRKL = Definition(
    "srkl",
    term,
    reference,
    parameters=(LAM, Parameter("detach_mixture", False, "no gradient flows through the mixture")),
    half_term=half_term,
    reads_logs=False,
    row_parameters=SATURATING,
)
