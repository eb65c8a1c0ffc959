"""The losses as one writes them in plain torch, all logits in memory: what the demo and the benchmark compare with.

Each takes the student's and the teacher's logits (N, V) and labels (N,), and returns (N,) in nats.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def fkl(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student)."""
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def rkl(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """KL(student || teacher)."""
    return fkl(t, s, labels)


def ab(s: Tensor, t: Tensor, labels: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """The α-β divergence, away from its limits."""
    logq, logp = s.log_softmax(-1), t.log_softmax(-1)
    c = alpha + beta
    mixed = (alpha * logp + beta * logq).exp().sum(-1)
    powers = alpha / c * (c * logp).exp().sum(-1) + beta / c * (c * logq).exp().sum(-1)
    return (powers - mixed) / (alpha * beta)


def drkl(s: Tensor, t: Tensor, labels: Tensor, gamma: float = 0.5) -> Tensor:
    """The reverse KL of (label, rest), and γ times that of the renormalised rest."""
    (binary_s, rest_s), (binary_t, rest_t) = _split(s, labels), _split(t, labels)
    return rkl(binary_s, binary_t, labels) + gamma * rkl(rest_s, rest_t, labels)


def jsd(s: Tensor, t: Tensor, labels: Tensor, beta: float = 0.5) -> Tensor:
    """The generalised Jensen-Shannon divergence."""
    logq, logp = s.log_softmax(-1), t.log_softmax(-1)
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    to_p, to_q = (F.kl_div(logm, x, reduction="none", log_target=True).sum(-1) for x in (logp, logq))
    return beta * to_p + (1 - beta) * to_q


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of (label, any other), and all logits with the label's mass taken out."""
    column = labels.unsqueeze(-1)
    # -inf would do too, but p log(p/q) is NaN there.
    rest = logits.scatter_add(-1, column, torch.full_like(column, -1000, dtype=logits.dtype))
    return torch.cat([logits.gather(-1, column), rest.logsumexp(-1, keepdim=True)], -1), rest


EAGER: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fkl": fkl,
    "rkl": rkl,
    "drkl": drkl,
    "ab": ab,
    "jsd": jsd,
}
