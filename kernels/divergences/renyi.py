"""Rényi divergence, log(Σ p^α q^(1−α)) / (α − 1).

α → 1 is KL(p‖q), without a jump; α = ½ is −2 log(1 − H), H the squared Hellinger distance (hellinger.py); D grows with
α. A function of one sum: with S = Σ p^α q^(1−α) it is log1p((α − 1) T)/(α − 1), where T = (S − 1)/(α − 1) is α times
the α-divergence (ab.py), of the size of D where that is tiny. Summand: f = α·f_ab(α, 1 − α), so Σ f = T.
Gradient: phi = q − p^α q^(1−α) counts with the slope dD/dT = 1/S, so that dL/dz_k = q_k − w_k: the forward KL's, with
the geometric mixture w ∝ p^α q^(1−α) as teacher. Where p and q hardly overlap and S is small, q_k would be what is left
of q_k/S; such rows (`far`, mixture.py) leave the multiple of q out, phi = −p^α q^(1−α), and have S = −Φ.
Split: the target's term L_T is the Rényi divergence of the binary pair, L_N = D − L_T.
One sweep: the sums of ab.py, which have Σ p^α q^(1−α) beside T.
Edge cases: 0 < α < 1 is finite everywhere, α ≥ 1 is inf where q = 0 < p; a large α can overflow float32 in the sum, as
in ab.py, and is then inf. S counts as at least 1e-37: beyond, D stands still at 85/(1 − α) and its gradient fades.
α = 0, which is 0 whatever the student says, is refused. α → ∞ is not offered.
Source: Rényi, On measures of entropy and information, 1961; van Erven and Harremoës, Rényi divergence and
Kullback-Leibler divergence, IEEE Trans. Inf. Theory 2014 (arXiv 1206.2459). As a loss for distillation: orda-kernel
(`renyi`).
"""

from typing import Any

import torch

from ..language import formula, tl
from ..maths.definition import NONTARGET, POSITIVE, TARGET, Definition, Derived, Form, Parameter
from ..maths.elementary import log1p
from ..maths.mixture import SATURATING
from ..maths.moments import log_sum
from .ab import AB, EXPONENT, mixed_power
from .ab import plain_term as plain_power_term
from .ab import sums as power_sums
from .ab import term as power_term
from .fkl import reference as forward_reference


@formula
def _phi(phi, logp, logq, theta):
    alpha, beta, far = theta
    return tl.where(far == 0, alpha * phi, -mixed_power(alpha, logp, beta, logq))


@formula
def term(q, p, logq, logp, delta, theta):
    """f = α·f_ab, phi = q − p^α q^(1−α)."""
    alpha, beta, far = theta
    f, phi = power_term(q, p, logq, logp, delta, (alpha, beta))
    return alpha * f, _phi(phi, logp, logq, theta)


@formula(torch=term)
def plain_term(q, p, logq, logp, delta, theta):
    """`term` for exponents well away from 0."""
    alpha, beta, far = theta
    f, phi = plain_power_term(q, p, logq, logp, delta, (alpha, beta))
    return alpha * f, _phi(phi, logp, logq, theta)


@formula
def sums(state, l_s, l_t, r, theta):
    """F and Φ from ab's sums; on far rows Φ = −Σ p^α q^(1−α), which is one of them."""
    alpha, beta, far = theta
    z_s, z_t, a, b, weight, first, second, mixed_sum, teacher_sum = state
    total, mass = power_sums(state, l_s, l_t, r, (alpha, beta))
    return alpha * total, tl.where(far == 0, alpha * mass, -tl.exp(-alpha * l_t - beta * l_s) * mixed_sum)


@formula
def outer(total, mass, theta):
    """D and dD/dT = 1/S from T = Σ f; log S from S itself on far rows where that is no small change of 1."""
    alpha, beta, far = theta
    infinite = total == float("inf")
    x = -beta * tl.where(infinite, 0.0, total)  # S − 1
    by_sum = (far > 0) & (tl.abs(x) > 0.5)
    s = tl.where(by_sum, -mass, 1.0 + x)
    s = tl.where(s < 1e-37, 1e-37, s)
    zero = x == 0
    near = total * tl.where(zero, 1.0, log1p(x) / tl.where(zero, 1.0, x))
    value = tl.where(by_sum, log_sum(s) / tl.where(beta == 0, 1.0, -beta), near)
    return tl.where(infinite, total, value), 1.0 / s


def reference(logp: torch.Tensor, logq: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The published formula, and its limit at α = 1."""
    if beta == 0:
        return forward_reference(logp, logq)
    return (alpha * logp + beta * logq).logsumexp(-1) / -beta


OF_SUM = Definition(
    "renyi_rows",
    term,
    reference,
    parameters=(EXPONENT("alpha", 0.5, "exponent of p"), EXPONENT("beta", 0.5, "exponent of q, 1 - alpha")),
    online=AB.online._replace(sums=sums, term=plain_term, half_term=None),
    outer=outer,
    row_parameters=SATURATING,
)


def form(alpha: Any, target: Any, nontarget: Any) -> Form:
    """The sum at (α, 1 − α)."""
    return Form(OF_SUM, (alpha, 1.0 - alpha), target=target, nontarget=nontarget)


ORDER = Parameter("alpha", 0.5, "order; float32 overflows beyond", low=POSITIVE, high=16.0)
RENYI = Derived("renyi", form, (ORDER, TARGET, NONTARGET), definitions=(OF_SUM,))
