"""EOPD: reverse KL, and forward KL added to it where the teacher is unsure.

    EOPD = KL(q‖p) + 1[H(p) > threshold]·KL(p‖q),  H(p) = −Σ p log p

H is the entropy of the teacher's row at the temperature of the loss, in nats; above the threshold the loss is twice
frkl.py's at w = ½, below it is rkl.py's.
Gradient: that of the two parts at these weights, which depend on the teacher alone.
One sweep: frkl's moments and, beside them, Σ p log p.
Edge cases: those of the parts; at H = threshold the forward KL is out. A threshold of log V or more is reverse KL.
Within float32's rounding of H, about 1e-6, the gate may fall either way.
A sum over tokens only at given weights, so no target/non-target weights of its own; the statistics split this sum.
Source: Jin et al., Entropy-Aware On-Policy Distillation of Language Models, ICML 2026 (arXiv 2603.07079; code
WLS04/EOPD). Only the paper's abstract and accounts of it by others could be read: reverse KL is there estimated at the
sampled token, and forward KL has a weight; here both are sums over the vocabulary, of weight 1. The authors' threshold
is not known; 1 nat is a choice made here.
"""

from typing import Any

import torch

from ..language import formula, jit, tl
from ..maths.definition import Definition, Derived, Form, OnlineForm, Parameter, RowParameters
from ..maths.elementary import expm1
from ..maths.moments import log_sum
from ..maths.reductions import thread_sum
from .akl import sums as weighted_sums
from .akl import term
from .fkl import reference as forward_reference
from .frkl import advance as moments_advance
from .frkl import init as moments_init
from .frkl import ratio as moments_ratio
from .rkl import reference as reverse_reference


@formula
def init():
    """frkl's moments and Σ e^u u."""
    z_s, z_t, first, second, teacher_first, teacher_second = moments_init()
    return z_s, z_t, first, second, teacher_first, teacher_second, 0.0


@formula
def advance(state, move, z, u, d, ez, eu, live, theta):
    """The moments; u moves with the teacher's maximum."""
    z_s, z_t, first, second, teacher_first, teacher_second, of_u = state
    log_s, log_t, x = move
    to_t = tl.exp(log_t)
    of_u = to_t * of_u + tl.where(to_t > 0, to_t * log_t, 0.0) * z_t + thread_sum(tl.where(live, eu * u, 0.0))
    moments = (z_s, z_t, first, second, teacher_first, teacher_second)
    z_s, z_t, first, second, teacher_first, teacher_second = moments_advance(
        moments, move, z, u, d, ez, eu, live, theta
    )
    return z_s, z_t, first, second, teacher_first, teacher_second, of_u


@formula
def ratio(state):
    """r = log(Z_t/Z_s)."""
    z_s, z_t, first, second, teacher_first, teacher_second, of_u = state
    return moments_ratio((z_s, z_t, first, second, teacher_first, teacher_second))


@formula
def sums(state, l_s, l_t, r, theta):
    """F and Φ of the weighted parts."""
    z_s, z_t, first, second, teacher_first, teacher_second, of_u = state
    return weighted_sums((z_s, z_t, first, second, teacher_first, teacher_second), l_s, l_t, r, theta)


@formula
def entropy(state, l_t):
    """H(p), the target's column with it: its p is what the others leave."""
    z_t, of_u = state[1], state[6]
    others = tl.exp(-l_t) * (l_t * z_t - of_u)
    p_y = -expm1(log_sum(z_t) - l_t)
    return others - tl.where(p_y > 0, p_y * tl.log(tl.where(p_y > 0, p_y, 1.0)), 0.0)


@formula
def weights(state, l_t, theta):
    """Those of forward and reverse KL."""
    gate = tl.where(entropy(state, l_t) > theta[0], 1.0, 0.0)
    return gate, 0.0 * gate + 1.0


@jit
def row_parameters(student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """The weights of both KLs."""
    return weights(state, log_norms.l_t, theta), ()


def _row_parameters_torch(whole: Any, theta: tuple[Any, ...]) -> tuple[Any, ...]:
    return weights.torch(whole.state, whole.log_norms.l_t, theta)


def reference(logp: torch.Tensor, logq: torch.Tensor, threshold: float) -> torch.Tensor:
    """Both KLs by their references."""
    p = logp.exp()
    uncertainty = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(-1)
    forward = torch.where(uncertainty > threshold, forward_reference(logp, logq), 0.0)
    return reverse_reference(logp, logq) + forward


THRESHOLD = Parameter("threshold", 1.0, "nats of the teacher's entropy above which forward KL is added", low=0.0)
GATED = Definition(
    "eopd_rows",
    term,
    reference,
    parameters=(THRESHOLD,),
    online=OnlineForm(init, advance, ratio, sums, tile="heavy"),
    row_parameters=RowParameters(row_parameters, _row_parameters_torch, 2),
    separable=False,
)


def form(threshold: Any) -> Form:
    """Every token's own sum of both KLs."""
    return Form(GATED, (threshold,))


EOPD = Derived("eopd", form, (THRESHOLD,), definitions=(GATED,))
