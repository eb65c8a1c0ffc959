"""What the drop-ins of top-k losses share: tokens that count, and the clamps that their originals have.

A clamp inside the sum over tokens is no divergence's. It is had from one: where a clamp holds, its term is a constant
without a gradient, so that such a token is left out of the teacher, and the constant is added.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..divergence import Divergence
from ..dtypes import accumulation_dtype
from ..head import Head, Side, autocast_dtype, detached
from ..loss import kd_loss
from ..schedules.ranks import local
from ..shard import VocabShard
from ..sparse import TopK
from ..token_logprobs import token_logprobs
from ._shared import IGNORED

_ABOVE = 1e-6  # by which listed tokens that have everything are raised, so that no rounding leaves their bucket a mass


def check_pair(ids_name: str, ids: Any, values_name: str, values: Any, shape: torch.Size) -> None:
    """Ids and log-probabilities (..., K) beside a student of the leading `shape`, by the names that a caller knows."""
    for name, value in ((ids_name, ids), (values_name, values)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{ids_name} must be int32 or int64, got {ids.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"{values_name} must be floating-point, got {values.dtype}")
    if ids.dim() < 1 or ids.shape[:-1] != shape or ids.shape != values.shape:
        raise ValueError(
            f"{ids_name} and {values_name} must both have the shape (*{tuple(shape)}, K), whose first part is that of "
            f"the student's tokens, got {tuple(ids.shape)} and {tuple(values.shape)}"
        )


def present(ids: Tensor, logprobs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Ids, −1 where a token has no probability or is not valid."""
    absent = logprobs == -torch.inf
    return ids.masked_fill(absent if valid is None else absent | ~valid, -1)


def topk(ids: Tensor, logprobs: Tensor, tail: str, temperature: float = 1.0) -> TopK:
    """A TopK of logarithms of any dtype."""
    logprobs = logprobs.detach()
    return TopK(ids, logprobs.float() if logprobs.dtype == torch.float64 else logprobs, tail, float(temperature))


@torch.no_grad()
def logits_at(student: Side, ids: Tensor, shard: VocabShard | None = None) -> Tensor:
    """The student's logits at ids (..., K), −inf where an id is −1, wide and without gradient.

    Of a Head, a few rows of the listed weights at a time, rounded as autocast rounds those of the loss. With a shard
    that knows its columns, ids are the vocabulary's and each logit is its owner's: all ranks gather K floats a token.
    """
    if shard is not None:
        here = logits_at(student, local(ids, slice(shard.first, shard.first + shard.width)))
        return shard.ranks.gathered(here).amax(0)  # −inf elsewhere; NaN passes
    if not isinstance(student, Head):
        z = student.gather(-1, ids.long().clamp(0, student.shape[-1] - 1))
        return z.to(accumulation_dtype(student)).masked_fill(ids < 0, -torch.inf)
    hidden, weight, bias, scale, softcap = student
    wide, rows = accumulation_dtype(hidden), hidden.reshape(-1, hidden.shape[-1])
    rounded = wide if wide == torch.float64 else autocast_dtype(hidden.device) or hidden.dtype
    flat = ids.reshape(len(rows), ids.shape[-1]).long().clamp(0, len(weight) - 1)
    z = rows.new_empty(flat.shape, dtype=wide)
    step = max(1, 2**24 // max(flat.shape[-1] * rows.shape[-1], 1))
    for start in range(0, len(rows), step):
        at = slice(start, start + step)
        # Not a matrix product, which autocast would round once more.
        z[at] = (weight[flat[at]].to(rounded).to(wide) * rows[at].to(rounded).to(wide).unsqueeze(-2)).sum(-1)
    if bias is not None:
        z += bias[flat]
    z *= scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.view(ids.shape).masked_fill(ids < 0, -torch.inf)


@torch.no_grad()
def logprobs_at(student: Side, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log q at ids (..., K), −inf where an id is −1, without gradient: one fused read of the logits."""
    z = logits_at(student, ids)
    best = z.max(-1)
    anchor = ids.gather(-1, best.indices.unsqueeze(-1)).squeeze(-1).long()
    anchor = torch.where((anchor < 0) | (anchor >= checks.width(student)), IGNORED, anchor)
    logq = token_logprobs(detached(student), anchor, temperature).unsqueeze(-1)
    return torch.where(z == -torch.inf, z, logq + (z - best.values.unsqueeze(-1)) / temperature)


def truncated_kl(
    student: Side,
    ids: Tensor,
    logprobs: Tensor,
    temperature: float = 1.0,
    *,
    clamp: float | None = None,
    logq: Tensor | None = None,
    labels: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Σ p (log p − log q) per token over the listed ones, with p as it is; an id of −1 is no token.

    clamp: the least of both logarithms. The gradient of a log q that is clamped is 0. It needs `logq` (..., K), the
    student's at ids, beforehand (`logprobs_at`). labels: IGNORED where a token does not count. shard: of the student.
    """
    logp = logprobs.detach().to(torch.float32)
    constant = 0.0
    if clamp is not None:
        assert logq is not None
        logp = logp.clamp_min(clamp)
        cut = (ids >= 0) & (logq < clamp)
        constant = torch.where(cut, logp.exp() * (logp - clamp), 0.0).sum(-1)
        ids = ids.masked_fill(cut, -1)
    # Raw masses may add up to more than 1, by a clamp or as a caller has them: c·(those of p/c) is the same sum.
    total = torch.where(ids >= 0, logp.exp(), 0.0).sum(-1)
    c = total.clamp_min(1.0)
    shifted = logp - c.log().unsqueeze(-1)
    loss = kd_loss(
        student, topk(ids, shifted, "truncate", temperature), labels, temperature=temperature, reduction="none",
        shard=shard,
    )  # fmt: skip
    loss = loss * c + total * c.log() + constant
    return loss if labels is None else torch.where(labels == IGNORED, 0.0, loss)


def renormalized(
    student: Side,
    ids: Tensor,
    logprobs: Tensor,
    chosen: Divergence,
    temperature: float = 1.0,
    labels: Any = None,
    **sharding: Any,
) -> Tensor:
    """D per token of both sides renormalised on the listed tokens; logprobs at `temperature`, of any sum.

    sharding: `shard` and `hidden_grad` of kd_loss.
    """
    listed = logprobs.detach().to(torch.float32).masked_fill(ids < 0, -torch.inf)
    some = (ids >= 0).any(-1, keepdim=True)
    logp = torch.where(some, listed - torch.logsumexp(listed, -1, keepdim=True), -torch.inf)
    return kd_loss(
        student, topk(ids, logp, "renormalize", temperature), labels, divergence=chosen, temperature=temperature,
        reduction="none", **sharding,
    )  # fmt: skip


def bucketed(
    student: Side,
    ids: Tensor,
    logprobs: Tensor,
    chosen: Divergence,
    floor: float,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """D per token of the listed tokens and one bucket of all others, whose mass is at least `floor` on both sides.

    A bucket of the teacher that is smaller has the floor, which its likeliest token lacks then; so it is where rounding
    has raised the sum of the teacher above 1. A bucket of the student that is smaller is a constant in fkl, whose value
    grows with it without bound; in the other divergences, which it changes by a few times the floor, it stays as it is.
    """
    given: dict[str, Any] = {
        "divergence": chosen, "temperature": temperature, "reduction": "none", "shard": shard,
    }  # fmt: skip
    logp = _raised(ids, logprobs, floor)
    if chosen.name != "fkl":
        return kd_loss(student, topk(ids, logp, "bucket", temperature), labels, **given)
    with torch.no_grad():
        teacher = topk(ids, logp, "bucket", temperature)
        loss, stats = kd_loss(detached(student), teacher, labels, return_stats=True, **given)
        logq = logits_at(student, ids, shard) / temperature - stats.student_lse.unsqueeze(-1)
        p = torch.where(ids >= 0, logp.exp(), 0.0)
        of_listed = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
        rest = (1 - p.double().sum(-1)).clamp_min(floor).to(loss.dtype)
        most = rest * (rest / floor).log()  # what the bucket adds where the student's has the floor
        cut = loss - of_listed > most
        if labels is not None:
            cut &= labels != IGNORED
        total = torch.where(cut, p.sum(-1), 1.0)
        # A teacher that has only the listed tokens leaves the student's bucket out of the sum.
        logp = torch.where(cut.unsqueeze(-1), logp - total.log().unsqueeze(-1) + _ABOVE, logp)
    loss = kd_loss(student, topk(ids, logp, "bucket", temperature), labels, **given)
    return torch.where(cut, (loss + total.log()) * total + most, loss)


def _raised(ids: Tensor, logprobs: Tensor, floor: float) -> Tensor:
    """Log-probabilities (..., K) in float32 of which at least `floor` is left to others."""
    logp = logprobs.detach().to(torch.float32).masked_fill(ids < 0, -torch.inf)
    p = logp.double().exp()
    lacking = (floor - (1 - p.sum(-1, keepdim=True))).clamp_min(0)
    best = p.max(-1, keepdim=True)
    lowered = (best.values - lacking).clamp_min(floor).log().to(torch.float32)
    return torch.where(lacking > 0, logp.scatter(-1, best.indices, lowered), logp)
