"""Forward and reverse KL interpolated, (1−w) KL(p‖q) + w KL(q‖p); w = ½ is half of Jeffreys' divergence.

Summand: the same mean of those of fkl.py and rkl.py.
Gradient: phi = (1−w)(q − p) − w q δ, so dL/dz_k = (1−w)(q_k − p_k) − w q_k (δ_k + KL(q‖p)).
One sweep: student- and teacher-weighted moments side by side (moments.py).
Edge cases: those of the two parts; at w = 1 a column with q = 0 < p is no longer infinite.
Source: the weighted sum of DistiLLM's code (symmetric_kl) and of Wu et al., AKL, COLING 2025 (arXiv 2404.02657).
"""

import torch

from ..language import formula, tl
from ..maths.definition import Definition, OnlineForm, Parameter
from ..maths.moments import moments_advance, moments_ratio, teacher_moments_advance
from .fkl import reference as forward_reference
from .fkl import sums as forward_sums
from .fkl import term as forward_term
from .rkl import reference as reverse_reference
from .rkl import sums as reverse_sums
from .rkl import term as reverse_term


@formula
def term(q, p, logq, logp, delta, theta):
    """The mean of both terms."""
    (w,) = theta
    forward, forward_phi = forward_term(q, p, logq, logp, delta, ())
    reverse, reverse_phi = reverse_term(q, p, logq, logp, delta, ())
    return (1.0 - w) * forward + w * reverse, (1.0 - w) * forward_phi + w * reverse_phi


@formula
def init():
    """Z_s, Z_t; A, B weighted by the student, A', B' by the teacher."""
    return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@formula
def advance(state, move, z, u, d, ez, eu, live, theta):
    """Both sets of moments; the normalisers belong to both."""
    z_s, z_t, first, second, teacher_first, teacher_second = state
    _, _, teacher_first, teacher_second = teacher_moments_advance(
        (z_s, z_t, teacher_first, teacher_second), move, z, u, d, ez, eu, live, theta
    )
    z_s, z_t, first, second = moments_advance((z_s, z_t, first, second), move, z, u, d, ez, eu, live, theta)
    return z_s, z_t, first, second, teacher_first, teacher_second


@formula
def ratio(state):
    """r = log(Z_t/Z_s)."""
    z_s, z_t, first, second, teacher_first, teacher_second = state
    return moments_ratio((z_s, z_t, first, second))


@formula
def sums(state, l_s, l_t, r, theta):
    """F and Φ of both parts; a part without weight leaves its infinity behind."""
    (w,) = theta
    z_s, z_t, first, second, teacher_first, teacher_second = state
    forward, forward_mass = forward_sums((z_s, z_t, teacher_first, teacher_second), l_s, l_t, r, ())
    reverse, reverse_mass = reverse_sums((z_s, z_t, first, second), l_s, l_t, r, ())
    total = tl.where(w == 1, 0.0, (1.0 - w) * forward) + w * reverse
    return total, (1.0 - w) * forward_mass + w * reverse_mass


def reference(logp: torch.Tensor, logq: torch.Tensor, w: float) -> torch.Tensor:
    """The mean of both references."""
    return torch.lerp(forward_reference(logp, logq), reverse_reference(logp, logq), w)


FRKL = Definition(
    "frkl",
    term,
    reference,
    parameters=(Parameter("w", 0.5, "0: forward KL, 1: reverse KL", low=0.0, high=1.0),),
    online=OnlineForm(init, advance, ratio, sums, tile="heavy"),
    reads_logs=False,
)
