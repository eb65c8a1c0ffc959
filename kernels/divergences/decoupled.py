"""The decoupled form of any divergence D: target·D(b_p, b_q) + nontarget·D(p̂, q̂).

b is the binary distribution (target, rest), hats are the rows renormalised without the target (see decomposition.py).
Gradient: dL/dz_y = T = target·[Q phi_y − q_y phi(P,Q)]; dL/dz_k = nontarget·[phi(p̂_k, q̂_k) − q̂_k Φ̂] − T q̂_k.
With base fkl this is DKD with weights (target, nontarget) = (α, β), with base rkl and (1, γ) it is DRKL. The decoupled
forms of the others are derived here; we know of no publication that has them.
Edge cases: an empty non-target set gives 0; a label outside the teacher's support leaves the non-target part.
Source: the structure is that of Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7.
"""

from typing import Any

from ..maths.definition import NONTARGET, TARGET, Derived, Form, Parameter


def form(base: Form, target: Any, nontarget: Any) -> Form:
    """The base in the decoupled structure."""
    if not (base.plain and base.definition.separable):
        raise ValueError(
            "base of 'decoupled' must be a sum over tokens without weights of its own (such as fkl, rkl, ab, jsd)"
        )
    return base._replace(decoupled=True, target=target, nontarget=nontarget)


DECOUPLED = Derived(
    "decoupled", form, (Parameter("base", "rkl", "a sum over tokens without weights of its own"), TARGET, NONTARGET)
)
