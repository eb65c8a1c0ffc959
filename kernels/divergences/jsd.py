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
from ..maths.elementary import expm1_product, half_log1p_exp, horner, log1p_exp, negative, rem2_product
from ..maths.mixture import (
    SATURATING,
    cumulants,
    exp_times_cumulants,
    factor,
    far_above,
    far_beyond,
    larger_weight,
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
def _far_log(delta, theta, LOG1P_EXP):
    """(e, log) where |δ| > 1/2: log(M/q) = e + log, `log` a number of the row; log(1 + e^−|...|) of both parts."""
    beta, far = theta
    part, other = log_weights(beta)
    tail = LOG1P_EXP(delta + (other - part))
    above, below, log = larger_weight(part, other, tl.where(beta < 1, far, 0.0))
    return far_above(below, above, delta, tail), log, tail


@formula
def _slope(q, p, delta, theta, excess, log, TERMS: tl.constexpr):
    """−phi, by TERMS terms of its series near 0, or from `_far_log`."""
    beta, far = theta
    far = tl.where(beta < 1, far, 0.0)
    part, other = log_weights(beta)
    of_q = tl.where(beta == 1, 1.0, 1.0 - beta)
    end = tl.where(beta == 0, 1.0, 0.0)
    kappa = cumulants(beta)
    series = ()
    for n in tl.static_range(1, TERMS + 1):
        series = series + (tl.where(beta == 0, factor(n), of_q * kappa[n - 1]),)
    shift = far * part
    near = q * (delta * horner(series, delta) - of_q * shift)
    apart = end * p + q * (of_q * excess + (of_q * (log - shift) - end))
    return tl.where(tl.abs(delta) < 0.5, near, apart)


@formula(torch=_by_logs)
def term(q, p, logq, logp, delta, theta):
    """f = β p log(p/M) + (1 − β) q log(q/M), phi = −w_q q log(M/q); the KL whose end β stands on there."""
    beta, far = theta
    part, other = log_weights(beta)
    excess, log, tail = _far_log(delta, theta, log1p_exp)
    of_q = tl.where(beta == 1, 1.0, 1.0 - beta)
    of_p = tl.where(beta == 0, 1.0, beta)
    end = tl.where(beta == 0, 1.0, 0.0) - tl.where(beta == 1, 1.0, 0.0)
    with_q = (end - of_q * log) - of_q * excess
    with_p = end + of_p * far_beyond(part, other, delta, tail)
    apart = q * with_q - p * with_p
    near = q * (delta * delta) * horner(_value_series(beta), delta)
    return tl.where(tl.abs(delta) < 0.5, near, apart), negative(_slope(q, p, delta, theta, excess, log, 8))


@formula(torch=_by_logs)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    excess, log, _ = _far_log(delta, theta, half_log1p_exp)
    return 0.0 * q, negative(_slope(q, p, delta, theta, excess, log, 6))


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
