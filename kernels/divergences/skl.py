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
from ..maths.elementary import expm1_product, rem2_product
from ..maths.mixture import SATURATING, log_mixture


@formula
def term(q, p, logq, logp, delta, theta):
    """f = p·rem2(b), phi = (1−λ)² (q − p) e^{−a}."""
    lam, far = theta
    above, beyond, _ = log_mixture(lam, delta, far)
    keep = 1.0 - lam
    share = keep * tl.exp(tl.where(above < -80.0, 80.0, -above))  # at λ = 1 a = δ, and the factor is 0
    phi = share * tl.where(far == 0, keep * expm1_product(p, q, -delta), -p)
    return rem2_product(p, lam * p + keep * q, beyond), phi


def reference(logp: torch.Tensor, logq: torch.Tensor, lam: float) -> torch.Tensor:
    """Σ p (log p − log M), a column with p = 0 left out."""
    weight = torch.tensor(lam, dtype=logp.dtype)
    mixture = torch.logaddexp(logp + weight.log(), logq + (1 - weight).log())
    p = logp.exp()
    return torch.where(p > 0, p * (torch.where(p > 0, logp, 0.0) - torch.where(p > 0, mixture, 0.0)), 0.0).sum(-1)


LAM = Parameter("lam", 0.1, "weight in the mixture; 0: the plain KL, 1: zero", low=0.0, high=1.0)
SKL = Definition("skl", term, reference, parameters=(LAM,), reads_logs=False, row_parameters=SATURATING)
