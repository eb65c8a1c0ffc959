"""α-divergence, (1 − Σ p^α q^(1−α)) / (α(1−α)): the α-β divergence (ab.py) at β = 1 − α.

α → 1 is KL(p‖q), α → 0 is KL(q‖p), α = ½ is 4(1 − Σ √(pq)), α = 2 is half of Pearson's χ², all without a jump.
Gradient: dL/dz_k = (q_k S − p_k^α q_k^(1−α))/α with S = Σ p^α q^(1−α); at α = 0 that of reverse KL.
Edge cases: those of ab.py; 0 < α < 1 is finite everywhere.
Source: Amari 1985; for language models the family that contains both KLs (Wang et al., ABKD, ICML 2025, section 3).
"""

from typing import Any

from ..maths.definition import NONTARGET, TARGET, Derived, Form, Parameter
from .ab import AB


def form(alpha: Any, target: Any, nontarget: Any) -> Form:
    """α-β at (α, 1 − α)."""
    return Form(AB, (alpha, 1.0 - alpha), target=target, nontarget=nontarget)


EXPONENT = Parameter("alpha", 0.5, "exponent of p; float32 overflows beyond", low=-15.0, high=16.0)
ALPHA = Derived("alpha", form, (EXPONENT, TARGET, NONTARGET))
