"""ToDi, token-wise distillation: Σ [w p log(p/q) + (1−w) q log(q/p)], w = sigmoid(log(p/q)) = p/(p + q) a constant.

Every token of the vocabulary weighs the two KLs by which side gives it more: forward where the teacher does, reverse
where the student does.
Summand: f = (p − q)·δ, since w p − (1−w) q = p − q: the value is Jeffreys' divergence (jeffreys.py), not the gradient.
Gradient: w is detached, so phi is the derivative of the sum at that w and not of f: phi = −w p + (1−w) q (1 − δ)
= (q − p) − q δ·q/(p + q). Where q meets p it is three quarters of Jeffreys' gradient.
Edge cases: q = 0 < p gives inf in value, and a finite gradient elsewhere; p = 0 < q would be +inf, which the support
rule prevents. The terms of a split have detached weights of their own, those of (p_y, q_y) and of the rest.
Source: Jung et al., ToDi, EMNLP 2025 (arXiv 2505.16297), and the authors' code (compute_ToDi), which detaches w and
drops columns with an infinite logit on either side.
"""

import torch

from ..language import formula
from ..maths.definition import Definition
from ..maths.elementary import expm1_product, half_expm1_product
from ..maths.mixture import mixture


@formula
def _slope(q, p, gap, delta):
    """phi, given p − q."""
    _, root = mixture(0.5, p, q)
    part = q * root
    return -1.0 * gap - 0.5 * (part * part) * delta


@formula
def term(q, p, logq, logp, delta, theta):
    """f = (p − q)·δ, phi = (q − p) − q δ·q/(p + q)."""
    gap = expm1_product(q, p, delta)
    return gap * delta, _slope(q, p, gap, delta)


@formula(torch=term)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    return 0.0 * q, _slope(q, p, half_expm1_product(q, p, delta), delta)


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The published sum, weights detached; a part whose probability is 0 left out."""
    p, q = logp.exp(), logq.exp()
    x, y = torch.where(p > 0, logp, 0.0), torch.where(q > 0, logq, 0.0)
    both = (p + q).detach()
    w = torch.where(both > 0, p / torch.where(both > 0, both, 1.0), 0.5).detach()
    return (w * p * (x - torch.where(p > 0, logq, 0.0)) + (1 - w) * q * (y - torch.where(q > 0, logp, 0.0))).sum(-1)


TODI = Definition("todi", term, reference, half_term=half_term, reads_logs=False)
