"""Generalised Jensen-Shannon divergence in GKD's convention, β KL(p‖M) + (1−β) KL(q‖M) with M = βp + (1−β)q.

β = 0 and β = 1 mean KL(p‖q) and KL(q‖p), as in GKD, TRL and Liger. These are not the limits: JSD_β itself goes to 0 at
both ends, JSD_β/β → KL(p‖q) and JSD_β/(1−β) → KL(q‖p).

Summand: with a = log(M/q) and b = log(M/p), f = (1−β) q·rem2(a) + β p·rem2(b): the linear terms M − q and M − p, added
with these weights, cancel at every token.
Gradient: phi = −(1−β) q a, so dL/dz_k = (1−β) q_k (log(q_k/M_k) − KL(q‖M)); far rows use a − log(1−β) (mixture.py).
a and b are functions of δ only (mixture.py); log M is never taken from probabilities.
Edge cases: bounded by the entropy of (β, 1−β) for 0 < β < 1, also where p or q is 0; at the ends as fkl.py and rkl.py.
Source: Agarwal et al., GKD, ICLR 2024, section 2; Lin 1991 (weighted JSD).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition, Parameter
from ..maths.elementary import expm1_product, half_log1p_exp2, horner, log1p_exp2, negative, rem2_product
from ..maths.mixture import (
    SATURATING,
    cumulants,
    exp_times_cumulants,
    factor,
    far_above,
    larger_weight,
    log2_odds,
    log_mixture,
    log_weights,
)


@formula
def _by_logs(q, p, logq, logp, delta, theta):
    """f = w_q q·rem2(a) + w_p p·rem2(b), phi = −w_q q a; the KL whose end β stands on there."""
    beta, far = theta
    above, beyond, excess = log_mixture(beta, delta, tl.where(beta < 1, far, 0.0))
    mixed = beta * p + (1.0 - beta) * q
    of_q = tl.where(beta == 1, 1.0, 1.0 - beta)
    of_p = tl.where(beta == 0, 1.0, beta)
    f = of_q * rem2_product(q, mixed, above) + of_p * rem2_product(p, mixed, beyond)
    return f, tl.where(beta == 0, expm1_product(p, q, -delta), -of_q * q * excess)


@formula
def _value_series(beta):
    """f/(q δ²) as a series of δ, f/q = β δ e^δ − e^K K with K = log(M/q); at the ends that of the KL there."""
    kappa = cumulants(beta)
    series = ()
    for n in tl.static_range(2, 9):
        found = beta * factor(n - 1) - (1.0 - beta) * kappa[n - 1] - beta * exp_times_cumulants(kappa, n)
        series = series + (tl.where(beta == 0, (n - 1) * factor(n), tl.where(beta == 1, factor(n), found)),)
    return series


@formula
def _weights(theta):
    """w_q, w_p and what far rows leave out of log(M/q); (1 if β = 0, else 0) and the same of β = 1."""
    beta, far = theta
    first, last = tl.where(beta == 0, 1.0, 0.0), tl.where(beta == 1, 1.0, 0.0)
    part, _ = log_weights(beta)
    return tl.maximum(1.0 - beta, last), tl.maximum(beta, first), (1.0 - last) * far * part, first, last


@formula
def _slope(q, p, delta, theta, with_q, TERMS: tl.constexpr, EDGE: tl.constexpr):
    """−phi: by TERMS terms of its series where |δ| < EDGE, else q times `with_q`, and p at β = 0."""
    of_q, _, shift, first, _ = _weights(theta)
    kappa = cumulants(theta[0])
    series = ()
    for n in tl.static_range(1, TERMS + 1):
        series = series + (tl.where(first == 1, factor(n), of_q * kappa[n - 1]),)
    near = q * (delta * horner(series, delta) - of_q * shift)
    return tl.where(tl.abs(delta) < EDGE, near, first * p + q * with_q)


@formula(torch=_by_logs)
def term(q, p, logq, logp, delta, theta):
    """f = β p log(p/M) + (1 − β) q log(q/M), phi = −w_q q log(M/q); the KL whose end β stands on there."""
    beta, far = theta
    of_q, of_p, shift, first, last = _weights(theta)
    part, other = log_weights(beta)
    tail = log1p_exp2(log2_odds(part, other, delta))
    above, below, log = larger_weight(part, other, (1.0 - last) * far)
    excess = far_above(below, above, delta, tail)  # log(M/q) − log
    with_q = (first - last - of_q * log) - of_q * excess
    # w_p log(M/p) likewise, its numbers of the row multiplied beforehand.
    with_p = tl.maximum(of_p * other + (first - last), (of_p * part + (first - last)) - of_p * delta) + of_p * tail
    near = q * (delta * delta) * horner(_value_series(beta), delta)
    slope = _slope(q, p, delta, theta, of_q * excess + (of_q * (log - shift) - first), 8, 0.5)
    return tl.where(tl.abs(delta) < 0.5, near, q * with_q - p * with_p), negative(slope)


@formula(torch=_by_logs)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    of_q, _, shift, first, _ = _weights(theta)
    part, other = log_weights(theta[0])
    tail = half_log1p_exp2(log2_odds(part, other, delta))
    least, more = of_q * (part - shift) - first, of_q * (other - shift) - first
    with_q = tl.maximum(of_q * delta + more, least) + of_q * tail
    return 0.0 * q, negative(_slope(q, p, delta, theta, with_q, 4, 0.25))


def reference(logp: torch.Tensor, logq: torch.Tensor, beta: float) -> torch.Tensor:
    """The two divergences from the mixture, which is a log-sum-exp."""
    if beta == 0:
        return (logp.exp() * (logp - logq)).sum(-1)
    if beta == 1:
        return (logq.exp() * (logq - logp)).sum(-1)
    weight = torch.tensor(beta, dtype=logp.dtype)
    mixture = torch.logaddexp(logp + weight.log(), logq + (1 - weight).log())
    return (beta * logp.exp() * (logp - mixture) + (1 - beta) * logq.exp() * (logq - mixture)).sum(-1)


JSD = Definition(
    "jsd",
    term,
    reference,
    parameters=(Parameter("beta", 0.5, "0: forward KL, 1: reverse KL", low=0.0, high=1.0),),
    half_term=half_term,
    reads_logs=False,
    row_parameters=SATURATING,
)
