"""The sparse losses of DistillKit (arcee-ai/distillkit a61c2e7, `distillkit/lossfuncs`): Σ over tokens of a divergence.

    import fusedkd.compat.distillkit

    distillkit.lossfuncs.kl.sparse_kl_div = fusedkd.compat.distillkit.sparse_kl_div

Each takes (logits, target_ids, target_values, mask, eps, missing, log_target, temperature,
target_generation_temperature, student_generation_temperature, chunk_length) as there: logits (B, T, V), or a
`fusedkd.Head` of hidden states (B, T, D); ids and values (B, T, K) of the teacher; mask (B, T) or (B, T, 1), which
multiplies. Returns a sum over tokens: the caller divides, and multiplies by T² as DistillKit's classes do.

missing: what becomes of the teacher's other tokens, DistillKit's `MissingProbabilityHandling` or its value. "zero": it
has none, so that its listed ones are renormalised. "symmetric_uniform": they are one outcome more on both sides.
log_target: the values are log-probabilities at target_generation_temperature, else logits, which go with "zero" alone.
A log-probability of −inf, or an id of −1, is no token.

Differences: float32, where DistillKit takes logarithms, and returns, in the dtype of the logits; the student's mass
elsewhere is a sum, where DistillKit's is 1 − Σ q, clamped to [eps, 1 − eps]. Of those clamps sparse_kl_div has the one
that a value shows: eps is the least mass of either bucket, and where the student's is below it its gradient is 0.
sparse_js_div has none of them, which changes a token by a few times eps, and DistillKit's sparse_tvd has none either.
chunk_length changes nothing: no temporary has V columns.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..divergence import Divergence, divergence
from ..head import Side
from ..loss import kd_loss
from . import _listed

MISSING = ("zero", "symmetric_uniform")


def sparse_kl_div(
    logits: Side,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Σ KL(p‖q). Source: `distillkit/lossfuncs/kl.py`."""
    checks.positive("eps", eps)
    at = (target_generation_temperature, student_generation_temperature)
    ids, logp, tau, tail = _teacher(logits, target_ids, target_values, missing, log_target, temperature, *at)
    if tail:
        each = _listed.bucketed(logits, ids, logp, divergence("fkl"), eps, tau)
    else:
        each = _listed.truncated_kl(logits, ids, logp, tau)
    return _masked(each, mask)


def sparse_js_div(
    logits: Side,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Σ ½ KL(p‖m) + ½ KL(q‖m), m = ½ (p + q). Source: `distillkit/lossfuncs/jsd.py`."""
    at = (target_generation_temperature, student_generation_temperature)
    found = _teacher(logits, target_ids, target_values, missing, log_target, temperature, *at)
    return _masked(_with_bucket(logits, divergence("jsd", beta=0.5), *found[:3]), mask)


def sparse_tvd(
    logits: Side,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: Any = "zero",
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Σ ½ Σ |p − q|. Source: `distillkit/lossfuncs/tvd.py`."""
    at = (target_generation_temperature, student_generation_temperature)
    found = _teacher(logits, target_ids, target_values, missing, log_target, temperature, *at)
    return _masked(_with_bucket(logits, divergence("tvd"), *found[:3]), mask)


def _with_bucket(student: Side, chosen: Divergence, ids: Tensor, logp: Tensor, tau: float) -> Tensor:
    """Per token; a teacher that has the listed tokens alone leaves its bucket empty."""
    teacher = _listed.topk(ids, logp, "bucket", tau)
    return kd_loss(student, teacher, divergence=chosen, temperature=tau, reduction="none")


def _masked(each: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return each.sum()
    mask = mask.squeeze(-1) if mask.dim() == each.dim() + 1 else mask
    if mask.shape != each.shape:
        raise ValueError(f"mask must have the shape {tuple(each.shape)} of the tokens, got {tuple(mask.shape)}")
    weights = mask.to(each.dtype, copy=True)  # what autograd saves must not come out of inference mode
    return torch.where(weights == 0, 0.0, each * weights).sum()


@torch.no_grad()
def _teacher(
    logits: Side,
    ids: Tensor,
    values: Tensor,
    missing: Any,
    log_target: bool,
    temperature: float,
    of_target: float,
    of_student: float,
) -> tuple[Tensor, Tensor, float, bool]:
    """Ids; log-probabilities at `temperature` that have what `missing` makes of them; τ of the student; the bucket."""
    checks.side("logits", logits)
    _listed.check_pair("target_ids", ids, "target_values", values, checks.leading(logits))
    checks.positive("temperature", temperature)
    checks.positive("target_generation_temperature", of_target)
    checks.positive("student_generation_temperature", of_student)
    missing = getattr(missing, "value", missing)
    checks.one_of("missing", missing, MISSING)
    tail = missing == "symmetric_uniform"
    if tail and not log_target:
        raise ValueError(
            "log_target=False has logits of the listed tokens, which do not tell what the others have: "
            'use missing="zero", or pass log-probabilities'
        )
    ids, values = _listed.present(ids.long(), values), values.float()
    listed, alpha = ids >= 0, of_target / temperature
    logp = torch.where(listed, values * alpha, -torch.inf)
    rest = values.new_full((*ids.shape[:-1], 1), -torch.inf)
    if tail:
        mass = torch.where(listed, values, -torch.inf).double().logsumexp(-1, keepdim=True)
        rest = (torch.log(-torch.expm1(mass.clamp(max=0))) * alpha).float()
    if not tail or alpha != 1:
        whole = torch.cat((logp, rest), -1).logsumexp(-1, keepdim=True)
        logp = torch.where(listed, logp - whole, -torch.inf)
    return ids, logp, temperature / of_student, tail
