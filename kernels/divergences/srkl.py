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
from ..maths.elementary import expm1_product, half_log1p_exp, horner, log1p_exp, rem2_product
from ..maths.mixture import SATURATING, cumulants, factor, far_above, larger_weight, log_mixture, log_weights, mixture
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
def _slope(q, p, delta, theta, excess, TERMS: tl.constexpr, EDGE: tl.constexpr):
    """phi: by TERMS terms of its series where |δ| < EDGE, phi/q = −K + attached·(dK/dδ − 1 + λ), else from excess = K.

    The student's part in the mixture is q·expm1(−K) = (1 − λ)(q − p) q/M, and on far rows −(1 − λ) p q/M.
    """
    lam, detach_mixture, far = theta
    far = tl.where(lam > 0, far, 0.0)
    attached = 1.0 - detach_mixture
    part, _ = log_weights(1.0 - lam)
    kappa = cumulants(1.0 - lam)
    series = ()
    for n in tl.static_range(1, TERMS + 1):
        series = series + (attached * (n + 1) * kappa[n] - kappa[n - 1],)
    _, inverse_root = mixture(1.0 - lam, p, q)
    of_q = attached * (1.0 - lam) * lam * (1.0 - far)
    of_p = attached * (1.0 - lam) * tl.where(far == 0, lam, 1.0)
    inside = (of_p * p - of_q * q) * inverse_root
    apart = q * (inside * inverse_root - excess)
    near = q * (delta * horner(series, delta) + far * (part + attached * (1.0 - lam)))
    return tl.where(tl.abs(delta) < EDGE, near, apart)


@formula(torch=_by_logs)
def term(q, p, logq, logp, delta, theta):
    """f = q·rem2(a), phi = −q a − λ q·expm1(−a), the last term only while the mixture is not detached."""
    lam, detach_mixture, far = theta
    far = tl.where(lam > 0, far, 0.0)
    part, other = log_weights(1.0 - lam)
    above, below, log = larger_weight(part, other, far)
    excess = far_above(below, above, delta, log1p_exp(delta + (other - part)))  # log(M/q) − log
    m, _ = mixture(1.0 - lam, p, q)
    near = q * (delta * delta) * horner(_value_series(lam), delta)
    f = tl.where(tl.abs(delta) < 0.5, near, (m - q * (1.0 + log)) - q * excess)
    return f, _slope(q, p, delta, theta, excess + (log - far * part), 8, 0.5)


@formula(torch=_by_logs)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    lam, detach_mixture, far = theta
    part, other = log_weights(1.0 - lam)
    shift = tl.where(lam > 0, far, 0.0) * part
    excess = far_above(part - shift, other - shift, delta, half_log1p_exp(delta + (other - part)))
    return 0.0 * q, _slope(q, p, delta, theta, excess, 4, 0.25)


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
