"""Skew Kullback-Leibler divergence, KL(p‖M) with M = λp + (1−λ)q.

Summand: with b = log(M/p), f = p·rem2(b): Σ(M − p) = 0 has been added, so f ≥ 0.
Gradient: phi = −(1−λ)² (p − q) q/M; with a = log(M/q) = b + δ the factor q/M is e^{−a} ≤ 1/(1−λ). Without its constant
part, (1−λ) q, which far rows leave out (mixture.py), it is −(1−λ) p q/M.
a and b are functions of δ only (mixture.py).
Edge cases: λ = 0 is KL(p‖q), λ = 1 is 0. For λ > 0 bounded by −log λ, also where q = 0 < p.
Source: Ko et al., DistiLLM, ICML 2024, eq. 4 (λ = 0.1); Lee 1999 (skew divergence).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition, Parameter
from ..maths.elementary import (
    expm1_product,
    expm1_ratio,
    half_expm1_ratio,
    horner,
    log1p_exp2,
    rem2_product,
)
from ..maths.mixture import (
    SATURATING,
    cumulants,
    exp_times_cumulants,
    factor,
    far_beyond,
    log2_odds,
    log_mixture,
    log_weights,
    mixture,
)


@formula
def _by_logs(q, p, logq, logp, delta, theta):
    """f = p·rem2(b), phi = (1−λ)² (q − p) e^{−a}."""
    lam, far = theta
    above, beyond, _ = log_mixture(lam, delta, far)
    keep = 1.0 - lam
    share = keep * tl.exp(tl.where(above < -80.0, 80.0, -above))  # at λ = 1 a = δ, and the factor is 0
    phi = share * tl.where(far == 0, keep * expm1_product(p, q, -delta), -p)
    return rem2_product(p, lam * p + keep * q, beyond), phi


@formula
def _series(lam):
    """f/(q δ²) as a series of δ: f/q = (1 − λ)(1 − e^δ) + e^δ (δ − K), K = log(M/q)."""
    kappa = cumulants(lam)
    total = ()
    for n in tl.static_range(2, 9):
        total = total + (factor(n - 1) - (1.0 - lam) * factor(n) - exp_times_cumulants(kappa, n),)
    return total


@formula
def _slope(q, p, delta, theta, near, ratio):
    """phi, given (e^δ − 1)/δ where δ is near 0."""
    lam, far = theta
    keep = 1.0 - lam
    _, inverse_root = mixture(lam, p, q)
    gap = tl.where(near, q * delta * ratio, p - q)
    slope = (keep * keep * (far - 1.0)) * gap - (keep * far) * p
    return (q * inverse_root) * (slope * inverse_root)


@formula(torch=_by_logs)
def term(q, p, logq, logp, delta, theta):
    """f = p·rem2(b), phi = (1−λ)² (q − p) e^{−a}."""
    lam, far = theta
    part, other = log_weights(lam)
    near = tl.abs(delta) < 0.5
    beyond = far_beyond(part, other, delta, log1p_exp2(log2_odds(part, other, delta)))
    close = q * (delta * delta) * horner(_series(lam), delta)
    m, _ = mixture(lam, p, q)
    f = tl.where(near, close, (m - p) - p * beyond)
    return f, _slope(q, p, delta, theta, near, expm1_ratio(delta))


@formula(torch=_by_logs)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    return 0.0 * q, _slope(q, p, delta, theta, tl.abs(delta) < 0.024, half_expm1_ratio(delta))


def reference(logp: torch.Tensor, logq: torch.Tensor, lam: float) -> torch.Tensor:
    """Σ p (log p − log M), a column with p = 0 left out."""
    weight = torch.tensor(lam, dtype=logp.dtype)
    mixture = torch.logaddexp(logp + weight.log(), logq + (1 - weight).log())
    p = logp.exp()
    return torch.where(p > 0, p * (torch.where(p > 0, logp, 0.0) - torch.where(p > 0, mixture, 0.0)), 0.0).sum(-1)


LAM = Parameter("lam", 0.1, "weight in the mixture; 0: the plain KL, 1: zero", low=0.0, high=1.0)
SKL = Definition(
    "skl", term, reference, parameters=(LAM,), half_term=half_term, reads_logs=False, row_parameters=SATURATING
)
