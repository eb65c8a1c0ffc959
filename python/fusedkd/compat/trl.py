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
from ..divergence import Divergence
from ..dtypes import accumulation_dtype
from ..head import Head, Side, detached
from ..loss import kd_loss
from ..token_logprobs import token_logprobs
from . import _listed, _pointwise
from ._shared import IGNORED, as_labels, bias_of, generalized_jsd, over, refuse

_FLOOR = -math.expm1(-1e-7)  # the least mass of a tail bucket, of which TRL clamps the logarithm of 1 minus it
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
        "chunked_divergence_loss", "student_", student_hidden_states, student_lm_head_weight, student_lm_head_bias,
        student_logit_scale, student_final_logit_softcapping,
    )  # fmt: skip
    teacher = _head(
        "chunked_divergence_loss", "teacher_", teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias,
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


def compute_topk_self_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> torch.Tensor:
    """The loss of SDFT and SDPO over the student's likeliest tokens: (B, T) divergences of (B, T, V) logits, in nats.

    Args:
        student_logits: (B, T, V). The gradient flows here.
        teacher_logits: likewise.
        distillation_topk: K, at most V and 4096.
        distillation_alpha: the β of `generalized_jsd_loss`.
        distillation_add_tail: True: all other tokens are one outcome more, whose mass is at least 1e-7 on both sides.
            False: both sides are renormalised on the K tokens.

    Differences: where β is above 0 a student's tail below 1e-7 is as small as it is, which changes the value by less
    than 2e-6; a token that the teacher excludes belongs to the tail, where TRL's value is NaN or infinite.

    Cost: that of `kd_loss` with a `fusedkd.TopK`, one read of each side and a top-k more; with β = 0 and a tail the
    student's logits are read once more.
    """
    checks.side("student_logits", student_logits)
    checks.side("teacher_logits", teacher_logits)
    checks.flag("distillation_add_tail", distillation_add_tail)
    chosen = generalized_jsd(distillation_alpha)
    columns = min(student_logits.shape[-1], teacher_logits.shape[-1])
    checks.integer("distillation_topk", distillation_topk)
    checks.within("distillation_topk", distillation_topk, 1, min(columns, checks.MOST_LISTED))
    student, teacher = (x if x.shape[-1] == columns else x[..., :columns] for x in (student_logits, teacher_logits))
    ids = student.detach().topk(distillation_topk, dim=-1).indices
    logprobs = _listed.logprobs_at(teacher, ids)
    return _sparse_divergence(student, _listed.present(ids, logprobs), logprobs, chosen, distillation_add_tail)


def chunked_jsd_loss(
    hidden_valid: torch.Tensor,
    lm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: torch.Tensor,
    teacher_target_logps: torch.Tensor,
    valid_candidate_mask: torch.Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: torch.Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_chunked_jsd_loss` of TRL's asynchronous distillation: from hidden states, beside a server's candidate tokens.

    Args:
        hidden_valid: (N, D) before the output layer. The gradient flows here, to the weight and its bias.
        lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping: as in `chunked_divergence_loss`.
        target_ids: (N, K), distinct where valid. teacher_target_logps: likewise, at the temperature.
        valid_candidate_mask: (N, K) bool, False where there is no candidate.
        beta: β as in `generalized_jsd_loss`. temperature: divides the student's logits.
        add_tail_bucket: as `distillation_add_tail` of `compute_topk_self_distillation_loss`, with its differences.
        teacher_id_idx: (N,) which teacher a token has, or None. num_teachers: how many there are.
        chunk_size: nothing here; the chunks are `kd_loss`'s.

    Returns: the sum of the divergences; the same without gradient; the sums of the student's and of the teacher's
    entropies, the latter of the candidates and the tail; (3·num_teachers,) count, divergences and teacher's entropies
    of each teacher, 0 without teacher_id_idx.

    Cost: that of `kd_loss` with a Head and a `fusedkd.TopK`, and one product more for the student's entropy.
    """
    student = _head(
        "chunked_jsd_loss", "", hidden_valid, lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping
    )
    checks.side("student", student)
    checks.positive("temperature", temperature)
    _listed.check_pair("target_ids", target_ids, "teacher_target_logps", teacher_target_logps, hidden_valid.shape[:-1])
    chosen = generalized_jsd(beta)
    ids = _listed.present(target_ids.long(), teacher_target_logps, valid_candidate_mask)
    each = _sparse_divergence(student, ids, teacher_target_logps, chosen, add_tail_bucket, temperature)
    with torch.no_grad():
        _, entropy = token_logprobs(detached(student), ids.new_zeros(len(ids)), temperature, return_entropy=True)
        of_teacher = _entropy(ids, teacher_target_logps, add_tail_bucket)
        stats = each.new_zeros(3 * num_teachers)
        if teacher_id_idx is not None:
            rows = torch.stack((torch.ones_like(each), each, of_teacher), -1)
            stats = stats.view(num_teachers, 3).index_add(0, teacher_id_idx.long(), rows).view(-1)
    total = each.sum()
    return total, total.detach(), entropy.sum(), of_teacher.sum(), stats


def server_forward_kl_loss(
    self: Any, teacher_result: dict[str, torch.Tensor], student_log_probs: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """`ServerDistillationTrainer._compute_server_forward_kl_loss`: forward KL beside a server's likeliest tokens.

    Args:
        self: the trainer, of which `loss_add_tail` is read: as `distillation_add_tail` of
            `compute_topk_self_distillation_loss`.
        teacher_result: "topk_token_ids" and "topk_logprobs", (B, T, K), −inf where there is no token.
        student_log_probs: (B, T, V) logits or log-probabilities. The gradient flows here.
        labels: (B, T); -100 does not count.

    Returns: Σ over counted tokens / their number, and 0 where nothing counts.
    """
    ids, logprobs = teacher_result["topk_token_ids"], teacher_result["topk_logprobs"]
    return _server_loss(self, student_log_probs, ids, logprobs, logprobs > -torch.inf, 0.0, labels, None)


def server_sparse_top_1_divergence_loss(
    self: Any,
    student_log_probs: torch.Tensor,
    teacher_top1_token_ids: torch.Tensor,
    teacher_top1_logprobs: torch.Tensor,
    reverse_token_ids: torch.Tensor,
    reverse_teacher_logprobs: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`ServerDistillationTrainer._compute_sparse_top_1_divergence_loss`: β > 0 beside the one or two tokens it has.

    Args:
        self: the trainer, of which `beta` and `loss_add_tail` are read.
        student_log_probs: (B, T, V) logits or log-probabilities. The gradient flows here.
        teacher_top1_token_ids, teacher_top1_logprobs: (B, T), the teacher's likeliest; not looked at where β is 1.
        reverse_token_ids, reverse_teacher_logprobs: (B, T), the token that the student took.
        labels: (B, T); -100 does not count.
        num_items_in_batch: replaces the number of counted tokens.
    """
    ids, logprobs = reverse_token_ids.unsqueeze(-1), reverse_teacher_logprobs.unsqueeze(-1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if self.beta != 1:
        valid = torch.cat((valid, teacher_top1_token_ids.unsqueeze(-1) != ids), -1)
        ids = torch.stack((reverse_token_ids, teacher_top1_token_ids), -1)
        logprobs = torch.stack((reverse_teacher_logprobs, teacher_top1_logprobs), -1)
        # The likeliest is the first of the two in TRL, whose log-probability stands where they are the same token.
        logprobs = torch.where(valid[..., 1:], logprobs, teacher_top1_logprobs.unsqueeze(-1))
    return _server_loss(self, student_log_probs, ids, logprobs, valid, self.beta, labels, num_items_in_batch)


def _server_loss(
    trainer: Any,
    student: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    valid: torch.Tensor,
    beta: float,
    labels: torch.Tensor,
    items: torch.Tensor | int | None,
) -> torch.Tensor:
    """Σ over counted tokens / items, or / their number."""
    checks.side("student_log_probs", student)
    _listed.check_pair("topk_token_ids", ids, "topk_logprobs", logprobs, student.shape[:-1])
    counted = labels != IGNORED
    ids = _listed.present(ids.long(), logprobs, valid & counted.unsqueeze(-1))
    each = _sparse_divergence(student, ids, logprobs, generalized_jsd(beta), bool(trainer.loss_add_tail))
    return over(each.sum(), counted.sum() if items is None else items)


def _sparse_divergence(
    student: Side,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    chosen: Divergence,
    tail: bool,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Per token, with TRL's tail bucket or renormalised."""
    if tail:
        return _listed.bucketed(student, ids, logprobs, chosen, _FLOOR, temperature)
    return _listed.renormalized(student, ids, logprobs, chosen, temperature)


def _entropy(ids: torch.Tensor, logprobs: torch.Tensor, tail: bool) -> torch.Tensor:
    """−Σ p log p per token of listed tokens (..., K) and their tail, or renormalised; 0 where there are none."""
    listed = ids >= 0
    logp = logprobs.float().masked_fill(~listed, -torch.inf)
    total = logp.logsumexp(-1, keepdim=True)
    if tail:
        rest = torch.log(-torch.expm1(total.clamp(max=-1e-7)))
        logp, listed = torch.cat((logp, rest), -1), torch.cat((listed, torch.ones_like(listed[..., :1])), -1)
    else:
        logp = logp - total
    return -torch.where(listed, logp.exp() * logp, 0.0).sum(-1)


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
    function: str,
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Head:
    if not scale > 0:
        refuse(function, {f"{name}logit_scale": scale})
    weight = _whole(f"{name}lm_head_weight", weight).to(hidden.dtype)
    bias = None if bias is None else bias_of(hidden, _whole(f"{name}lm_head_bias", bias))
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
    static: bool = False  # a staticmethod of its owner


_SERVER = "trl.experimental.server_distillation.server_distillation_trainer"


def _self_distillation(module: str) -> tuple[_Site, ...]:
    functions = (compute_full_logit_self_distillation_loss, compute_topk_self_distillation_loss)
    return tuple(_Site(module, None, function.__name__, function) for function in functions)


_SITES = {
    "gkd": (
        _Site("trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss", generalized_jsd_loss, True),
    ),
    "distillation": (
        _Site("trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", chunked_divergence_loss),
    ),
    "sdft": _self_distillation("trl.experimental.sdft.sdft_trainer"),
    "sdpo": _self_distillation("trl.experimental.sdpo.sdpo_trainer"),
    "async_distillation": (
        _Site(
            "trl.experimental.async_distillation.async_distillation_trainer",
            None,
            "_chunked_jsd_loss",
            chunked_jsd_loss,
        ),
    ),
    "server_distillation": (
        _Site(_SERVER, "ServerDistillationTrainer", "_compute_server_forward_kl_loss", server_forward_kl_loss),
        _Site(
            _SERVER,
            "ServerDistillationTrainer",
            "_compute_sparse_top_1_divergence_loss",
            server_sparse_top_1_divergence_loss,
        ),
    ),
}
_USUAL = ("gkd", "distillation", "sdft", "sdpo")  # a plain patch() loads no module of the others


class _Patch(NamedTuple):
    """What stood at a site before, and in which class or module, which a reload replaces."""

    site: _Site
    owner: Any
    original: Any


_patches: list[_Patch] = []


def patch(*trainers: str) -> None:
    """Have TRL's trainers call these functions: "gkd", "distillation", "sdft" and "sdpo", or only those named.

    "async_distillation" and "server_distillation" are patched where they are named.

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
    places = [(site, _owner(site)) for name in dict.fromkeys(trainers or _USUAL) for site in _SITES[name]]
    places = [(site, owner) for site, owner in places if not _ours(site, owner)]
    for site, owner in places:
        _check_signature(site, owner)
    for site, owner in places:
        _patches.append(_Patch(site, owner, vars(owner)[site.name]))
        setattr(owner, site.name, staticmethod(site.replacement) if site.static else site.replacement)


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
    if theirs != ours or isinstance(original, staticmethod) != site.static:
        raise RuntimeError(
            f"fusedkd.compat.trl is for TRL 1.16, where {where} takes {ours}; this one takes {theirs}: "
            "nothing was patched"
        )


def _bare(function: Callable[..., Any]) -> inspect.Signature:
    """Names, order, kinds and defaults; annotations are no part of the call."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)
