"""Total variation distance, ½ Σ |p − q|.

Summand: f = ½ |p − q| = ½ q |expm1(δ)|.
Gradient: phi = −½ q sgn(δ), a subgradient: 0 where p = q; far rows leave out ½ q (mixture.py).
Edge cases: bounded by 1; p = 0 or q = 0 is an ordinary value. The gradient does not vanish as p and q meet: it is as
large at a distance of 1e-8 as at 1, and jumps at 0.
Source: Wen et al., f-DISTILL, ACL 2023, section 3 (TVD for sequence distillation).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition
from ..maths.elementary import expm1_product
from ..maths.mixture import SATURATING


@formula
def term(q, p, logq, logp, delta, theta):
    """f = ½ |p − q|, phi = −½ q sgn(δ)."""
    (far,) = theta
    half = 0.5 * q
    slope = tl.where(delta < 0, half, 0.0) - tl.where(delta > 0, half, 0.0) - far * half
    return 0.5 * tl.abs(expm1_product(q, p, delta)), slope


def reference(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Half the L1 distance of the probabilities."""
    return 0.5 * torch.nn.functional.l1_loss(logq.exp(), logp.exp(), reduction="none").sum(-1)


TVD = Definition("tvd", term, reference, reads_logs=False, row_parameters=SATURATING)
