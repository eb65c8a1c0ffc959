"""Squared Hellinger distance, 1 − Σ √(pq) = ½ Σ (√p − √q)².

Summand: f = ½ (√p − √q)², with √p − √q = √q·expm1(δ/2).
Gradient: phi = −½ √q (√p − √q); far rows leave out ½ q (mixture.py).
Edge cases: bounded by 1; p = 0 or q = 0 is an ordinary value. One quarter of α-β at (½, ½).
Source: Hellinger 1909; as a distillation loss a member of the α-divergences (alpha.py).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition
from ..maths.elementary import expm1_product, half_expm1_product
from ..maths.mixture import SATURATING


@formula
def term(q, p, logq, logp, delta, theta):
    """f = ½ (√p − √q)², phi = −½ √q (√p − √q)."""
    (far,) = theta
    root, other = tl.sqrt(q), tl.sqrt(p)
    gap = expm1_product(root, other, 0.5 * delta)
    return 0.5 * gap * gap, -0.5 * root * tl.where(far == 0, gap, other)


@formula(torch=term)
def half_term(q, p, logq, logp, delta, theta):
    """`term` for a gradient in half precision."""
    (far,) = theta
    root, other = tl.sqrt(q), tl.sqrt(p)
    gap = half_expm1_product(root, other, 0.5 * delta)
    return 0.0 * q, root * tl.where(far == 0, -0.5 * gap, -0.5 * other)


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Half the squared distance of the roots."""
    return 0.5 * ((logp / 2).exp() - (logq / 2).exp()).square().sum(-1)


HELLINGER = Definition("hellinger", term, reference, half_term=half_term, reads_logs=False, row_parameters=SATURATING)
