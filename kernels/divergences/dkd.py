"""Decoupled knowledge distillation, α·TCKD + β·NCKD: the decoupled form (decomposition.py) of forward KL.

    TCKD = KL(b_p‖b_q)        NCKD = KL(p̂‖q̂)        KL(p‖q) = TCKD + (1 − p_y)·NCKD

b is the binary distribution (target, rest), hats are the rows renormalised without the target.
Gradient: dL/dz_y = α (q_y − p_y); dL/dz_k = β (q̂_k − p̂_k) − α (q_y − p_y) q̂_k.
Edge cases: V = 2 leaves the binary part; V = 1 gives 0. With (α, β) = (1, 1 − p_y) per token it is forward KL.
Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7; α = 1, β = 8 are its CIFAR settings, to be used
there with temperature 4 and τ². The paper excludes the target by a logit of −1000; here it is excluded.
"""

from typing import Any

from ..maths.definition import Derived, Form, Parameter
from .fkl import FKL


def form(alpha: Any, beta: Any) -> Form:
    """The decoupled forward KL with weights (α, β)."""
    return Form(FKL, decoupled=True, target=alpha, nontarget=beta)


DKD = Derived(
    "dkd",
    form,
    (Parameter("alpha", 1.0, "weight of TCKD", low=0.0), Parameter("beta", 8.0, "weight of NCKD", low=0.0)),
)
