"""TRL 1.16: its distillation losses under their own names, and `patch()` for its trainers.

    import fusedkd.compat.trl
    fusedkd.compat.trl.patch()

Values and gradients are TRL's. What differs: results are float32 whatever the inputs are; a batch without a counted
token is 0 with a zero gradient; two vocabularies of different sizes are compared on the columns they share (TRL
raises); a column where the teacher's logit is −inf is left out of both sides (TRL gives NaN). No T² anywhere, as in
TRL. TRL is imported by `patch` only.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..head import Head
from ..loss import kd_loss
from ._shared import IGNORED, as_labels, generalized_jsd, refuse

REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`GKDTrainer.generalized_jsd_loss`: the generalised Jensen-Shannon divergence of logits, in nats.

    Args:
        student_logits: (B, T, V) logits, already shifted; or (..., V). The gradient flows here.
        teacher_logits: likewise, with its own V.
        labels: (B, T), already shifted; -100 is ignored. Other values are not looked at.
        beta: β; 0 is KL(teacher‖student), 1 is KL(student‖teacher).
        temperature: divides both logits.
        reduction: "batchmean": Σ / counted tokens, or Σ / B without labels. "sum": Σ. "mean": Σ / (tokens·V). "none":
            every summand, (counted, V), or (B, T, V) without labels, in plain torch.
        num_items_in_batch: replaces the reduction by Σ / num_items_in_batch.

    Raises: ValueError for another reduction (TRL takes any other word as "none").

    Cost: that of `kd_loss` on logits; "none" holds several float32 (..., V).
    Source: Agarwal et al., GKD, ICLR 2024, eq. 1.
    """
    counted = None if labels is None else labels != IGNORED
    return _reduced(student_logits, teacher_logits, counted, beta, temperature, reduction, num_items_in_batch)


def chunked_divergence_loss(
    student_hidden_states: torch.Tensor,
    teacher_hidden_states: torch.Tensor,
    student_lm_head_weight: torch.Tensor,
    teacher_lm_head_weight: torch.Tensor,
    completion_mask: torch.Tensor,
    beta: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    student_lm_head_bias: torch.Tensor | None = None,
    teacher_lm_head_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_chunked_divergence_loss` of TRL's `DistillationTrainer`: the divergence from hidden states, logits never made.

    Args:
        student_hidden_states: (B, K, D) before the output layer. The gradient flows here, to the student's weight and
            its bias.
        teacher_hidden_states: (B, K, its own D).
        student_lm_head_weight: (V, D); a DTensor is gathered once. Cast to the hidden states' dtype.
        teacher_lm_head_weight: likewise.
        completion_mask: (B, K); what is not 0 counts.
        beta: β as in `generalized_jsd_loss`.
        num_items_in_batch: the denominator; None is the number of counted tokens here.
        student_lm_head_bias: (V,) or None. teacher_lm_head_bias: likewise.
        student_logit_scale: multiplies the logits. teacher_logit_scale: likewise.
        student_final_logit_softcapping: c of c·tanh(logits/c), after the scale. teacher_final_logit_softcapping:
            likewise.
        temperature: divides both, last.

    Returns:
        The loss; the sum of the student's entropies in nats, without gradient; the number of counted tokens.

    Raises: NotImplementedError for a logit scale that is not above 0 and for a weight that DeepSpeed has partitioned.

    Unlike TRL's, the value is summed without cancellation: never negative, and accurate where the models agree.
    Cost: that of `kd_loss` with two Heads.
    """
    counted = completion_mask != 0
    student = _head(
        "student", student_hidden_states, student_lm_head_weight, student_lm_head_bias,
        student_logit_scale, student_final_logit_softcapping,
    )  # fmt: skip
    teacher = _head(
        "teacher", teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias,
        teacher_logit_scale, teacher_final_logit_softcapping,
    )  # fmt: skip
    total, stats = kd_loss(
        student, teacher, as_labels(counted), divergence=generalized_jsd(beta), temperature=temperature,
        reduction="sum", return_stats=True,
    )  # fmt: skip
    n_valid = counted.sum()
    return _divided(total, n_valid, num_items_in_batch), stats.student_entropy.sum(), n_valid


def compute_full_logit_self_distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, distillation_alpha: float
) -> torch.Tensor:
    """The loss of SDFT and SDPO over the full vocabulary: (B, T) divergences of (B, T, V) logits, in nats.

    distillation_alpha is the β of `generalized_jsd_loss`. Cost: that of `kd_loss` on logits.
    """
    return kd_loss(student_logits, teacher_logits, divergence=generalized_jsd(distillation_alpha), reduction="none")


def single_step_decomposition_loss(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "batchmean",
) -> torch.Tensor:
    """`MiniLLMTrainer._single_step_decomposition_loss` (TRL before 1.16): KL(student‖teacher) of log-probabilities.

    Args:
        student_log_probs: (B, T, V) log-probabilities. Logits give the same, so the log_softmax before can go.
        teacher_log_probs: likewise.
        mask: (B, T); what is not 0 counts.
        reduction: as in `generalized_jsd_loss`.

    The gradient is that of normalised log-probabilities: it differs from TRL's by a multiple of the student's
    probabilities, which the backward pass of log_softmax removes.
    Source: Gu et al., MiniLLM, ICLR 2024, section 2.2, the single-step part.
    """
    counted = None if mask is None else mask != 0
    return _reduced(student_log_probs, teacher_log_probs, counted, 1.0, 1.0, reduction, None)


def _reduced(
    student: torch.Tensor,
    teacher: torch.Tensor,
    counted: torch.Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if reduction == "none" and num_items is None:
        rows = (student, teacher) if counted is None else (student[counted], teacher[counted])
        return _summands(*rows, beta, temperature)
    labels = None if counted is None else as_labels(counted)
    total = kd_loss(
        student, teacher, labels, divergence=generalized_jsd(beta), temperature=temperature, reduction="sum"
    )  # fmt: skip
    if num_items is None and reduction == "sum":
        return total
    if counted is None:
        tokens = torch.tensor(student.shape[:-1].numel() if reduction == "mean" else student.shape[0])
    else:
        tokens = counted.sum()
    columns = min(student.shape[-1], teacher.shape[-1]) if reduction == "mean" else 1
    return _divided(total, tokens * columns, num_items)


def _divided(total: torch.Tensor, tokens: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Over the given number, or over the tokens, at least one."""
    if num_items is None:
        return total / tokens.clamp(min=1)
    return total / (num_items.to(total.device, non_blocking=True) if isinstance(num_items, torch.Tensor) else num_items)


def _summands(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """Every summand of the divergence, as `F.kl_div` leaves them, from the columns that `kd_loss` compares."""
    columns = min(student.shape[-1], teacher.shape[-1])
    teacher = teacher[..., :columns].detach().float() / temperature
    student = student[..., :columns].float() / temperature
    gone = teacher == -torch.inf
    student = student.masked_fill(gone, -torch.inf)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    if beta == 0:
        return _kl_summands(logp, logq)
    if beta == 1:
        return _kl_summands(logq, logp)
    share = logp.new_tensor([beta, 1 - beta]).log()
    logm = torch.logaddexp(*((x + w).masked_fill(gone, 0.0) for x, w in zip((logp, logq), share, strict=True)))
    return beta * _kl_summands(logp, logm) + (1 - beta) * _kl_summands(logq, logm)


def _kl_summands(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    return logp.exp() * torch.where(logp == -torch.inf, 0.0, logp - logq)


def _head(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Head:
    if not scale > 0:
        refuse("chunked_divergence_loss", {f"{name}_logit_scale": scale})
    weight = _whole(f"{name}_lm_head_weight", weight, hidden.dtype)
    bias = None if bias is None else _whole(f"{name}_lm_head_bias", bias, hidden.dtype)
    return Head(hidden, weight, bias, scale, softcap)


def _whole(name: str, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All of a parameter, in the dtype of the hidden states it meets."""
    if hasattr(parameter, "ds_id"):
        raise NotImplementedError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported: unpatch()")
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).to(dtype)


class _Site(NamedTuple):
    """A name in TRL that a trainer looks up at call time."""

    module: str
    owner: str | None
    name: str
    replacement: Callable[..., Any]


_SITES = {
    "gkd": _Site("trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss", generalized_jsd_loss),
    "distillation": _Site(
        "trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", chunked_divergence_loss
    ),
    "sdft": _Site(
        "trl.experimental.sdft.sdft_trainer",
        None,
        "compute_full_logit_self_distillation_loss",
        compute_full_logit_self_distillation_loss,
    ),
    "sdpo": _Site(
        "trl.experimental.sdpo.sdpo_trainer",
        None,
        "compute_full_logit_self_distillation_loss",
        compute_full_logit_self_distillation_loss,
    ),
}
_originals: dict[str, Any] = {}


def patch(*trainers: str) -> None:
    """Have TRL's trainers call these functions: "gkd", "distillation", "sdft" and "sdpo", or only those named.

    Nothing is changed unless all of them can be. Again is no error. Trainers made before are patched too.

    Raises ValueError for another name, ImportError where TRL or a trainer of it cannot be imported, and RuntimeError
    where its function does not have the arguments that are expected here.
    """
    chosen = [name for name in trainers or _SITES if name not in _originals]
    for name in chosen:
        if name not in _SITES:
            raise ValueError(f"trainers must be among {', '.join(map(repr, _SITES))}, got {name!r}")
    owners = {name: _owner(_SITES[name]) for name in chosen}
    for name, owner in owners.items():
        _check_signature(_SITES[name], owner)
    for name, owner in owners.items():
        site = _SITES[name]
        _originals[name] = vars(owner)[site.name]
        setattr(owner, site.name, site.replacement if site.owner is None else staticmethod(site.replacement))


def unpatch() -> None:
    """Give TRL its own functions back."""
    while _originals:
        name, original = _originals.popitem()
        setattr(_owner(_SITES[name]), _SITES[name].name, original)


def _owner(site: _Site) -> Any:
    try:
        module = importlib.import_module(site.module)
    except ImportError as error:
        raise ImportError(
            f"fusedkd.compat.trl is for TRL 1.16, and {site.module} cannot be imported: {error}"
        ) from error
    return module if site.owner is None else getattr(module, site.owner)


def _check_signature(site: _Site, owner: Any) -> None:
    where = ".".join(filter(None, (site.module, site.owner, site.name)))
    original = vars(owner).get(site.name)
    if original is None:
        raise RuntimeError(f"fusedkd.compat.trl is for TRL 1.16, and {where} does not exist: nothing was patched")
    theirs, ours = (_bare(function) for function in (getattr(owner, site.name), site.replacement))
    if theirs != ours or isinstance(original, staticmethod) != (site.owner is not None):
        raise RuntimeError(
            f"fusedkd.compat.trl is for TRL 1.16, where {where} takes {ours}; this one takes {theirs}: "
            "nothing was patched"
        )


def _bare(function: Callable[..., Any]) -> inspect.Signature:
    """Names, order, kinds and defaults; annotations are no part of the call."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)
