"""Reverse Kullback-Leibler divergence, KL(q‖p) = Σ q log(q/p).

Summand: f = q·rem2(δ) with rem2(x) = e^x − 1 − x: adding Σ(p − q) = 0 makes every term non-negative.
Gradient: phi = ∂f/∂log q = −q·δ and Φ = KL(q‖p), so dL/dz_k = −q_k (δ_k + KL(q‖p)). The non-target tokens push the
target logit up by q_y (1 − q_y) KL(q̂‖p̂), also where q_y = p_y: what DRKL removes (drkl.py).
One sweep: KL(q‖p) = B/Z − (x − log1p(x)) from student-weighted moments, x = (A + B)/Z (moments.py).
Edge cases: q = 0 contributes nothing; p = 0 < q would be +inf, which the support rule prevents.
Source: Kullback and Leibler 1951; distillation of language models: Gu et al., MiniLLM, ICLR 2024, eq. 1.
"""

import torch

from ..language import formula
from ..maths.definition import Definition, OnlineForm
from ..maths.elementary import rem2_product
from ..maths.moments import moments_advance, moments_init, moments_ratio, remainder_sums


@formula
def term(q, p, logq, logp, delta, theta):
    """f = q·rem2(δ), phi = −q·δ."""
    return rem2_product(q, p, delta), -1.0 * q * delta


@formula
def sums(state, l_s, l_t, r, theta):
    """F = Σ q·rem2(δ) and Φ = −Σ q·δ."""
    z_s, z_t, first, second = state
    total, slope = remainder_sums(z_s, z_t, first, second, l_s, l_t, r)
    return total, -slope


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Σ q (log q − log p), a column with q = 0 left out."""
    q = logq.exp()
    return torch.where(q > 0, q * (torch.where(q > 0, logq, 0.0) - torch.where(q > 0, logp, 0.0)), 0.0).sum(-1)


RKL = Definition(
    "rkl", term, reference, reads_logs=False, online=OnlineForm(moments_init, moments_advance, moments_ratio, sums)
)
