"""The losses of ABKD (ghwang-s/abkd, `distillation_llm/distillm/losses.py`), one import line away.

Arguments, reduction, `fusedkd.Head` sides and further options as in `fusedkd.compat.distillm`, whose list of
differences holds here too. The functions that the two repositories share are the same functions; symmetric_kl and
js_distance have another default here (lam 0.1).

- ab_div follows this repository at the limits: 1/α and 1/β stand there where the limits of the α-β divergence have 1/α²
  and 1/β² (`fusedkd.compat.amid.ab_div`, `fusedkd.divergence("ab")`). The general case has finite gradients where
  probabilities underflow (NaN there), since p^α is formed from log p.
- AKL takes the teacher first.
"""

from typing import Any

import torch

from ..divergence import divergence
from ..head import Side, detached
from ..loss import kd_loss
from . import _shared, distillm
from .distillm import Batch, forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl, tv_distance

__all__ = [
    "AKL",
    "ab_div",
    "alphanet",
    "bdkd",
    "forward_kl",
    "js_distance",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "symmetric_kl",
    "tv_distance",
    "wsd",
]

_HEAVIER = 3.0  # bdkd: what the side of the larger entropy weighs


def ab_div(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, alpha: float, beta: float, **options: Any
) -> torch.Tensor:
    """The α-β divergence, α on the teacher, β on the student; (1, 0) is KL(p‖q) without H(p), (0, 1) KL(q‖p).

    At alpha = 0 the value is β times the divergence's limit, at beta = 0 and at alpha + beta = 0 it is α times it.
    """
    chosen = divergence("ab", alpha=alpha, beta=beta)
    loss = _shared.batch_loss("ab_div", logits, teacher_logits, no_model_batch, chosen, options)
    if alpha == 0 and beta != 0:
        return beta * loss
    if alpha != 0 and (beta == 0 or alpha + beta == 0):
        return alpha * loss
    return loss


def alphanet(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, alpha: float, beta: float, **options: Any
) -> torch.Tensor:
    """The larger of ab_div(alpha, 1 − alpha) and ab_div(beta, 1 − beta), each of the whole batch.

    Chosen on the device, without the synchronisation of an `if`; the price is a second backward sweep.
    """
    one, other = (ab_div(logits, teacher_logits, no_model_batch, a, 1 - a, **options) for a in (alpha, beta))
    return torch.where(one > other, one, other)


def bdkd(logits: Side, teacher_logits: Side, no_model_batch: Batch, **options: Any) -> torch.Tensor:
    """w_p (KL(p‖q) + H(p)) + w_q KL(q‖p) per token: the side of the larger entropy weighs 3, the other 1.

    The weights are constants for the gradient and cost one value sweep. Entropies are compared in float32; there in the
    logits' own dtype.
    """
    _shared.check_options("bdkd", options)
    mask = _shared.counted(no_model_batch)
    first = {key: value for key, value in options.items() if key != "weight_grad"}
    with torch.no_grad():
        labels = _shared.as_labels(mask)
        _, stats = kd_loss(detached(logits), teacher_logits, labels, return_stats=True, **first)
        one = torch.ones_like(stats.teacher_entropy)
        forward = torch.where(stats.teacher_entropy > stats.student_entropy, _HEAVIER, one)
        reverse = torch.where(stats.student_entropy > stats.teacher_entropy, _HEAVIER, one)
    both = forward + reverse
    chosen = divergence("frkl", w=reverse / both)
    return _shared.mean_loss(logits, teacher_logits, mask, chosen, options, entropy=forward, token_weights=both)


def AKL(teacher_logits: Side, logits: Side, no_model_batch: Batch, **options: Any) -> torch.Tensor:
    """Adaptive KL, teacher first: a·KL(p‖q) + (1 − a)·KL(q‖p), a the share of Σ|p − q| in the teacher's head.

    The head is the likeliest half of the teacher's mass. The weights are constants for the gradient. Where p equals q
    it is 0 (0/0 there); equal logits are in the head together or not at all (there as the sort left them); a logit of
    −inf has no mass (there that of a logit of 0).
    """
    return _shared.batch_loss("AKL", logits, teacher_logits, no_model_batch, divergence("akl", mu=0.5), options)


def symmetric_kl(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> torch.Tensor:
    """`fusedkd.compat.distillm.symmetric_kl` with this repository's default."""
    return distillm.symmetric_kl(logits, teacher_logits, no_model_batch, lam, **options)


def wsd(logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.5, **options: Any) -> torch.Tensor:
    """(1 − lam)(KL(p‖q) + H(p)) + lam KL(q‖p)."""
    return distillm.symmetric_kl(logits, teacher_logits, no_model_batch, lam, **options)


def js_distance(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> torch.Tensor:
    """`fusedkd.compat.distillm.js_distance` with this repository's default."""
    return distillm.js_distance(logits, teacher_logits, no_model_batch, lam, **options)
