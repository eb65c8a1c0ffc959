"""Forward Kullback-Leibler divergence, KL(p‖q) = Σ p log(p/q).

Summand: f = p·rem2(−δ) with rem2(x) = e^x − 1 − x: adding Σ(q − p) = 0 makes every term non-negative, so a tiny
divergence is a sum of tiny terms instead of a difference of large ones.
Gradient: phi = ∂f/∂log q = q − p = p·expm1(−δ); Φ = Σ phi = 0, so dL/dz_k = q_k − p_k. No force of the non-target
tokens acts on the target logit: dL_N/dz_y = 0.
One sweep: KL(p‖q) = B'/Z_t − (x − log1p(x)) from teacher-weighted moments, x = (A' + B')/Z_t (moments.py).
Edge cases: p = 0 contributes nothing; q = 0 < p gives inf in value, and a finite gradient elsewhere.
Source: Kullback and Leibler 1951; distillation: Hinton et al. 2015 (arXiv 1503.02531), eq. 2-4 (up to the teacher's
entropy, which this value does not contain, and τ²).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition, OnlineForm
from ..maths.elementary import fall_product, fall_rem2_product, half_expm1_product, negative
from ..maths.moments import moments_init, remainder_sums, teacher_moments_advance, teacher_moments_ratio


@formula
def term(q, p, logq, logp, delta, theta):
    """f = p·rem2(−δ), phi = q − p."""
    return fall_rem2_product(p, q, delta), fall_product(p, q, delta)


@formula(torch=term)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    return 0.0 * q, half_expm1_product(p, q, negative(delta))


@formula
def _finite_sums(state, l_s, l_t, r, theta):
    """`sums`, F not yet infinite where a column has q = 0 < p."""
    z_s, z_t, first, second = state
    total, slope = remainder_sums(z_t, z_s, first, second, l_t, l_s, -r)
    near = second < 0.5 * z_t
    return total, tl.where(near, total + slope, z_s * tl.exp(-l_s) - z_t * tl.exp(-l_t))


def _sums(state, l_s, l_t, r, theta):
    # float64 holds logits as far apart as a column with q = 0 seems to be: who calls knows whether there is one.
    form = _finite_sums.torch if l_s.dtype == torch.float64 else sums.traced
    return form(state, l_s, l_t, r, theta)


@formula(torch=_sums)
def sums(state, l_s, l_t, r, theta):
    """F = Σ p·rem2(−δ) and Φ = Σ (q − p)."""
    total, mass = _finite_sums(state, l_s, l_t, r, theta)
    return tl.where(total > 1e10, float("inf"), total), mass  # 1e10: only a column with q = 0 < p gets there


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Σ p (log p − log q), a column with p = 0 left out."""
    p = logp.exp()
    return torch.where(p > 0, p * (torch.where(p > 0, logp, 0.0) - torch.where(p > 0, logq, 0.0)), 0.0).sum(-1)


FKL = Definition(
    "fkl",
    term,
    reference,
    half_term=half_term,
    reads_logs=False,
    online=OnlineForm(moments_init, teacher_moments_advance, teacher_moments_ratio, sums),
)
