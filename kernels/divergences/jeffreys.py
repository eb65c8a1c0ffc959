"""Jeffreys' divergence, KL(p‖q) + KL(q‖p) = Σ (p − q) log(p/q): frkl.py at w = ½, both terms with weight 2.

Gradient: phi = (q − p) − q δ, so dL/dz_k = (q_k − p_k) − q_k (δ_k + KL(q‖p)).
Edge cases: those of frkl.py; q = 0 < p gives inf. target and nontarget multiply the weights of 2, and KDStats has the
terms before these. Having weights it is no base of `decoupled`: take frkl there, and twice the weights. Half of it is
DistiLLM's symmetric KL at lam = ½; todi.py has its value and another gradient.
Source: Jeffreys 1946, and Kullback and Leibler 1951, who call it the divergence; for distillation orda-kernel 0.1.0
(`jeffreys`), whose code adds the same two.
"""

from typing import Any

from ..maths.definition import NONTARGET, TARGET, Derived, Form
from .frkl import FRKL


def form(target: Any, nontarget: Any) -> Form:
    """Twice the mean of both KLs."""
    return Form(FRKL, (0.5,), target=2.0 * target, nontarget=2.0 * nontarget)


JEFFREYS = Derived("jeffreys", form, (TARGET, NONTARGET))
