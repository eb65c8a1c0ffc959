"""Triangular discrimination, Σ (p − q)²/(p + q) = 2 − 4 Σ pq/(p + q); half of it is Le Cam's distance.

Summand: f = (p − q)·u with u = (p − q)/(p + q) = tanh(δ/2).
Gradient: phi = −q u (2 + u) = q (1 − (1 + u)²), and 1 + u = 2p/(p + q); far rows leave out q (mixture.py).
Edge cases: bounded by 2; p = 0 or q = 0 is an ordinary value. It lies between 2·hellinger and 4·hellinger, is at most
2·tvd, and is four times the α-divergence of α = 2 (half of Pearson's χ²) from p to (p + q)/2.
Source: Le Cam 1986; Topsøe, Some inequalities for information divergence, IEEE Trans. Inf. Theory 46, 2000. orda-kernel
0.1.0 has it for distillation (`triangular`), without a factor; Le Cam's form is ½ Σ (p − q)²/(p + q).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition
from ..maths.elementary import expm1_product, half_expm1_product
from ..maths.mixture import SATURATING, mixture


@formula
def _ratios(p, root, gap):
    """2p/(p + q) and (p − q)/(p + q), given 1/√((p + q)/2) and p − q."""
    return (p * root) * root, 0.5 * (gap * root) * root


@formula
def _slope(q, far, share, u):
    """phi, given `_ratios`."""
    return q * tl.where(far == 0, (-2.0 - u) * u, -1.0 * share * share)


@formula
def term(q, p, logq, logp, delta, theta):
    """f = (p − q)²/(p + q), phi = −q u (2 + u)."""
    (far,) = theta
    _, root = mixture(0.5, p, q)
    gap = expm1_product(q, p, delta)
    share, u = _ratios(p, root, gap)
    return gap * u, _slope(q, far, share, u)


@formula(torch=term)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    (far,) = theta
    _, root = mixture(0.5, p, q)
    share, u = _ratios(p, root, half_expm1_product(q, p, delta))
    return 0.0 * q, _slope(q, far, share, u)


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Squared differences of probabilities over their sums, a column with p = q = 0 left out."""
    p, q = logp.exp(), logq.exp()
    both = p + q
    return torch.where(both > 0, (p - q).square() / torch.where(both > 0, both, 1.0), 0.0).sum(-1)


TRIANGULAR = Definition("triangular", term, reference, half_term=half_term, reads_logs=False, row_parameters=SATURATING)
