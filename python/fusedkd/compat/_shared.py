"""What the modules here have in common: the mean over a mask, refusals, and one divergence with other ends."""

from collections.abc import Mapping
from typing import Any

import torch

from ..divergence import Divergence, divergence
from ..dtypes import accumulation_dtype
from ..head import Side
from ..loss import kd_loss

IGNORED = -100
OPTIONS = (
    "backend",
    "drop_ignored",
    "logits_dtype",
    "memory_budget",
    "schedule",
    "support",
    "vocab_size",
    "weight_grad",
)


def refuse(name: str, unsupported: Mapping[str, Any]) -> None:
    """NotImplementedError that names the first of some arguments, if there is one."""
    for key, value in unsupported.items():
        raise NotImplementedError(f"{name} does not support {key}={value!r}: leave it out, or use the original for it")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Keyword arguments beyond the original's are the options of kd_loss about how and where, not about the value."""
    refuse(name, {key: value for key, value in options.items() if key not in OPTIONS})


def counted(no_model_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) bool: where `no_model_batch["label"]` is not -100."""
    try:
        label = no_model_batch["label"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            'no_model_batch must be a mapping with "label", (B, T) int64, already shifted, -100 where a token does not '
            f"count, got {type(no_model_batch).__name__}"
        ) from None
    if not isinstance(label, torch.Tensor) or label.is_floating_point():
        kind = label.dtype if isinstance(label, torch.Tensor) else type(label).__name__
        raise TypeError(f'no_model_batch["label"] must be an int64 tensor, got {kind}')
    return label != IGNORED


def as_labels(mask: torch.Tensor) -> torch.Tensor:
    """Labels that count where a mask is not 0; which token they name plays no part in these losses."""
    return torch.where(mask != 0, 0, IGNORED)


def summable(mask: torch.Tensor) -> torch.Tensor:
    """A mask, bool or in float32: the half-precision sum of a long one would be rounded, or infinite."""
    return mask if mask.dtype == torch.bool else mask.to(accumulation_dtype(mask))


def over(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """total / count, and total itself where nothing was counted."""
    if not isinstance(count, torch.Tensor):
        return total / (count or 1)
    # From a CPU the host goes on once the number is staged; to a CPU it must wait, or would read too early.
    count = count.detach().to(total.device, non_blocking=not total.is_cpu)
    return total / torch.where(count == 0, 1, count)


def bias_of(hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as a Head of these hidden states takes it: of their dtype, or in float32, in which it is added."""
    return bias if bias is None or bias.dtype == hidden.dtype else bias.to(accumulation_dtype(hidden))


def mean_loss(
    student: Side,
    teacher: Side,
    mask: torch.Tensor,
    chosen: Divergence,
    options: dict[str, Any],
    *,
    entropy: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ mask·(weight·D + entropy·H(teacher)) / Σ mask, 0 where the mask is empty; mask bool or numbers, (...)."""
    mask, weights = summable(mask), token_weights
    if mask.dtype != torch.bool:
        weights = mask if weights is None else mask * weights
    total = mask.sum()
    total = torch.where(total == 0, 1, total)
    given: dict[str, Any] = {"divergence": chosen, "num_items": total, "token_weights": weights, **options}
    if entropy is None:
        return kd_loss(student, teacher, as_labels(mask), **given)
    loss, stats = kd_loss(student, teacher, as_labels(mask), return_stats=True, **given)
    return loss + (stats.teacher_entropy * entropy * mask).sum() / total


def batch_loss(
    name: str,
    student: Side,
    teacher: Side,
    no_model_batch: Mapping[str, torch.Tensor],
    chosen: Divergence,
    options: dict[str, Any],
    *,
    entropy: float | None = None,
) -> torch.Tensor:
    """`mean_loss` of the function `name` over the labels of a DistiLLM batch."""
    check_options(name, options)
    return mean_loss(student, teacher, counted(no_model_batch), chosen, options, entropy=entropy)


def jsd(beta: float) -> Divergence:
    """β KL(p‖M) + (1−β) KL(q‖M), M = βp + (1−β)q, also at its ends: 0 there, where GKD's β is a plain KL."""
    return divergence("jsd", beta=float(beta)) if 0 < beta < 1 else divergence("skl", lam=1.0)


def generalized_jsd(beta: float) -> Divergence:
    """GKD's divergence: KL(p‖q) at β = 0, KL(q‖p) at β = 1, else JSD_β with the mixture βp + (1−β)q."""
    if beta in (0, 1):
        return divergence("rkl" if beta else "fkl")
    return divergence("jsd", beta=beta)
