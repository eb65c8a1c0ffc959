"""DRKL: reverse KL whose student-dependent non-target weight 1 − q_y is replaced by a constant γ.

    DRKL_γ = KL(b_q‖b_p) + γ·KL(q̂‖p̂)

b is the binary distribution (target, rest), hats are the rows renormalised without the target. It is the decoupled form
(decomposition.py) of rkl.py with weights (1, γ).
Gradient: dL/dz_y = B = q_y (1 − q_y)(a_q − a_p), a = log-odds of the target; dL/dz_k = q̂_k [γ (E_q̂[d] − d_k) − B]
with d = u − z. RKL's push on the target logit by the non-target tokens, −q_y (1 − q_y) KL(q̂‖p̂), is gone exactly, and
the tail keeps its gradient as q_y → 1.
Edge cases: V = 2 leaves the binary part (= RKL); V = 1 gives 0.
Source: Luong, Tran and Chen, arXiv 2604.00223. Only its abstract could be read, and we know of no code of the authors:
the formula is that of an independent implementation (novelty-distill), which cites eq. 9 of the paper and has the label
as target and γ = 0.5, by its account inside the range that the paper calls stable. The authors' default is not known.
"""

from typing import Any

from ..maths.definition import POSITIVE, Derived, Form, Parameter
from .rkl import RKL


def form(gamma: Any) -> Form:
    """The decoupled reverse KL with weights (1, γ)."""
    return Form(RKL, decoupled=True, nontarget=gamma)


GAMMA = Parameter("gamma", 0.5, "weight of the non-target part; the authors' default is not known", low=POSITIVE)
DRKL = Derived("drkl", form, (GAMMA,))
