"""Tsallis relative entropy, (1 − Σ p^α q^(1−α)) / (1−α): α times the α-divergence (alpha.py).

α → 1 is KL(p‖q), without a jump; α = ½ is 2(1 − Σ √(pq)), twice hellinger.py; α = 2 is Pearson's χ². α = 0 is 0, and so
is its gradient: reverse KL with weight 0 (of the α-divergence that limit is reverse KL itself).
Gradient: dL/dz_k = q_k S − p_k^α q_k^(1−α) with S = Σ p^α q^(1−α).
Edge cases: those of ab.py; 0 < α < 1 is finite everywhere. Below α = 0 it is negative and largest at p = q: refused.
target and nontarget multiply the weights, which are α, and KDStats has the terms before these. Having weights it is no
base of `decoupled`: take alpha there.
Source: Tsallis, Generalized entropy-based criterion for consistent testing, Physical Review E 58, 1998.
"""

from typing import Any

from ..maths.definition import NONTARGET, TARGET, Derived, Form, Parameter
from .ab import AB
from .alpha import EXPONENT


def form(alpha: Any, target: Any, nontarget: Any) -> Form:
    """α-β at (α, 1 − α), times α."""
    return Form(AB, (alpha, 1.0 - alpha), target=alpha * target, nontarget=alpha * nontarget)


ORDER = Parameter("alpha", EXPONENT.default, EXPONENT.meaning, low=0.0, high=EXPONENT.high)
TSALLIS = Derived("tsallis", form, (ORDER, TARGET, NONTARGET))
