"""TRL 1.16: its distillation losses under their own names, and `patch()` for its trainers.

    import fusedkd.compat.trl
    fusedkd.compat.trl.patch()

Values and gradients are TRL's. What differs: results are float32 (float64 for float64 inputs); a batch without a
counted token is 0 with a zero gradient, also where the count given is 0; the functions compare two vocabularies of
different sizes on the columns they share (TRL's functions raise, and so do its trainers before they call one); a column
where the teacher's logit is −inf is left out of both sides (TRL gives NaN). No T² anywhere, as in TRL. TRL is imported
by `patch` only.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import checks
from ..dtypes import accumulation_dtype
from ..head import Head
from ..loss import kd_loss
from . import _pointwise
from ._shared import IGNORED, as_labels, bias_of, generalized_jsd, over, refuse

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

    At β = 1/2 the value is the same with the sides swapped up to float32 rounding, not to the last bit.
    Cost: that of `kd_loss` on logits; "none" holds several float32 (..., V).
    Source: Agarwal et al., GKD, ICLR 2024, eq. 1.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    counted = None if labels is None else labels != IGNORED
    if reduction == "none" and num_items_in_batch is None:
        student, teacher = (x if counted is None else x[counted] for x in (student_logits, teacher_logits))
        return _pointwise.summands(_pointwise.generalized_jsd(beta), *_logprobs(student, teacher, temperature))
    total = kd_loss(
        student_logits, teacher_logits, None if counted is None else as_labels(counted),
        divergence=generalized_jsd(beta), temperature=temperature, reduction="sum",
    )  # fmt: skip
    columns = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return _reduced(total, (*student_logits.shape[:-1], columns), counted, reduction, num_items_in_batch)


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
        student_lm_head_weight: (V, D); a DTensor is gathered once. Cast to the hidden states' dtype; a bias is not, but
            added in float32.
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
    items = n_valid if num_items_in_batch is None else num_items_in_batch
    return over(total, items), stats.student_entropy.sum(), n_valid


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
        student_log_probs: (B, T, V) log-probabilities, taken as they are: rows need not sum to 1.
        teacher_log_probs: likewise; a column where it is −inf is left out.
        mask: (B, T); what is not 0 counts.
        reduction: as in `generalized_jsd_loss`.

    Source: Gu et al., MiniLLM, ICLR 2024, section 2.2, the single-step part.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    counted = None if mask is None else mask != 0
    columns = min(student_log_probs.shape[-1], teacher_log_probs.shape[-1])
    rows = [x[..., :columns] for x in (student_log_probs, teacher_log_probs)]
    reverse_kl = _pointwise.generalized_jsd(1)
    if reduction == "none":
        return _pointwise.summands(reverse_kl, *(rows if counted is None else (x[counted] for x in rows)))
    each = _pointwise.row_sums(reverse_kl, *rows)
    total = (each if counted is None else each.masked_fill(~counted, 0.0)).sum()
    return _reduced(total, rows[0].shape, counted, reduction, None)


def _reduced(
    total: torch.Tensor,
    shape: tuple[int, ...],
    counted: torch.Tensor | None,
    reduction: str,
    num_items: torch.Tensor | int | None,
) -> torch.Tensor:
    """The sum over summands of a shape (..., V), divided as TRL divides it."""
    if num_items is not None:
        return over(total, num_items)
    if reduction == "sum":
        return total
    rows = math.prod(shape[:-1]) if reduction == "mean" else shape[0]
    tokens = rows if counted is None else counted.sum()
    return over(total, tokens * (shape[-1] if reduction == "mean" else 1))


def _logprobs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    """Of the columns that `kd_loss` compares."""
    columns, wide = min(student.shape[-1], teacher.shape[-1]), accumulation_dtype(student, teacher)
    teacher = teacher[..., :columns].detach().to(wide) / temperature
    student = student[..., :columns].to(wide) / temperature
    student = student.masked_fill(teacher == -torch.inf, -torch.inf)
    return [student.log_softmax(-1), teacher.log_softmax(-1)]


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
    weight = _whole(f"{name}_lm_head_weight", weight).to(hidden.dtype)
    bias = None if bias is None else bias_of(hidden, _whole(f"{name}_lm_head_bias", bias))
    return Head(hidden, weight, bias, scale, softcap)


def _whole(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter."""
    if hasattr(parameter, "ds_id"):
        raise NotImplementedError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported: unpatch()")
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


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


class _Patch(NamedTuple):
    """What stood at a site before, and in which class or module, which a reload replaces."""

    site: _Site
    owner: Any
    original: Any


_patches: list[_Patch] = []


def patch(*trainers: str) -> None:
    """Have TRL's trainers call these functions: "gkd", "distillation", "sdft" and "sdpo", or only those named.

    Nothing is changed unless all of them can be. Again is no error, and after a reload of TRL's modules it is needed.
    Trainers made before are patched too. It holds for this process: one that was spawned, or a fresh interpreter, has
    to call it as well.

    Raises TypeError for what is no name, ValueError for another name, ImportError where TRL or a trainer of it cannot
    be imported, and RuntimeError where its function does not have the arguments that are expected here.
    """
    for name in trainers:
        if not isinstance(name, str):
            kind = type(name).__name__
            raise TypeError(f'trainers must be names one by one, as in patch("gkd", "distillation"), got a {kind}')
        if name not in _SITES:
            raise ValueError(f"trainers must be among {', '.join(map(repr, _SITES))}, got {name!r}")
    places = [(site, _owner(site)) for site in (_SITES[name] for name in dict.fromkeys(trainers or _SITES))]
    places = [(site, owner) for site, owner in places if not _ours(site, owner)]
    for site, owner in places:
        _check_signature(site, owner)
    for site, owner in places:
        _patches.append(_Patch(site, owner, vars(owner)[site.name]))
        setattr(owner, site.name, site.replacement if site.owner is None else staticmethod(site.replacement))


def unpatch() -> None:
    """Give TRL its own functions back. What was assigned there after `patch` by anyone else stays."""
    while _patches:
        site, owner, original = _patches.pop()
        if _ours(site, owner):
            setattr(owner, site.name, original)


def _ours(site: _Site, owner: Any) -> bool:
    return getattr(owner, site.name, None) is site.replacement


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
