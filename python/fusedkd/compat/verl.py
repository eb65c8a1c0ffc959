"""The top-k loss of verl (signature of 0.9.1): `verl.trainer.distillation.fsdp.losses.compute_forward_kl_topk`.

    import fusedkd.compat.verl
    import verl.trainer.distillation.fsdp.losses as losses

    losses.compute_forward_kl_topk = fusedkd.compat.verl.compute_forward_kl_topk

verl looks the name up in that module at each call, for its strategies "fsdp", "fsdp2" and "veomni".
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import _listed
from ._shared import refuse


def compute_forward_kl_topk(
    student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
) -> dict[str, Tensor]:
    """Σ p (log p − log q) over the teacher's K tokens, per token, with raw p and q: no divergence, it can be negative.

    Args:
        student_logits: (B, T, V), already divided by the temperature. The gradient flows here.
        teacher_topk_log_probs: (B, T, K), or a nested tensor of rows (tokens, K) beside logits (1, all tokens, V).
        teacher_topk_ids: likewise, int32 or int64.
        config: a DistillationConfig. Of its `distillation_loss`, log_prob_min_clamp is read: the least of both
            logarithms in the sum, None for none. loss_max_clamp is verl's own affair: it clamps what is returned here
            afterwards. use_chunked_topk and chunked_topk_chunk_size change nothing: nothing of V columns is made.
        data_format: as in verl, which does not look at it either.

    Returns: five tensors (B, T): "distillation_losses"; "student_mass" and "teacher_mass", Σ q and Σ p over the K
    tokens before the clamp; "overlap_count" (int64), how many of them are among the student's K likeliest;
    "overlap_token_advantage", the mean over those of −p (log p − log q).

    Differences: float32, where verl takes the logarithms in the dtype of the logits; all but the losses are without a
    graph; an id of −1 is no token; a batch without tokens is no error.

    Raises: NotImplementedError for a fusedkd.Head (`fusedkd.compat.veomni` takes hidden states) and for logits of
    fewer tokens than the teacher's, which are sharded by Ulysses.

    Cost: two reads of the logits and a top-k forward; one read and one write backward.
    Source: verl 0.9.1, verl/trainer/distillation/fsdp/losses.py.
    """
    if not isinstance(student_logits, Tensor):
        refuse("compute_forward_kl_topk", {"student_logits": student_logits})
    checks.side("student_logits", student_logits)
    clamp = config.distillation_loss.log_prob_min_clamp
    if clamp is not None:
        checks.number("config.distillation_loss.log_prob_min_clamp", clamp)
    logprobs, ids = (_whole(x) for x in (teacher_topk_log_probs, teacher_topk_ids))
    shape = student_logits.shape[:-1]
    if isinstance(ids, Tensor) and ids.dim() == 3 and len(shape) == 2 and 0 < shape[1] < ids.shape[1]:
        raise NotImplementedError(
            f"student_logits has {shape[1]} tokens and teacher_topk_ids {ids.shape[1]}: logits that are sharded by "
            "Ulysses sequence parallelism are not supported: slice the teacher's tensors (verl.utils.ulysses."
            "slice_input_tensor) before this call, or keep verl's function"
        )
    _listed.check_pair("teacher_topk_ids", ids, "teacher_topk_log_probs", logprobs, shape)
    ids = ids.long()
    if clamp is None:
        ids = _listed.present(ids, logprobs)
    with torch.no_grad():
        p = logprobs.float()
        logq = _listed.logprobs_at(student_logits, ids)
        masses = (logq.exp().sum(-1), torch.where(ids >= 0, p.exp(), 0.0).sum(-1))
        of_student = student_logits.topk(ids.shape[-1], dim=-1).indices
        shared = (ids.unsqueeze(-1) == of_student.unsqueeze(-2)).any(-1)
        count = shared.sum(-1)
        low = -torch.inf if clamp is None else clamp
        p, q = p.clamp_min(low), logq.clamp_min(low)
        advantage = torch.where(shared, p.exp() * (q - p), 0.0).sum(-1) / count.clamp_min(1)
    return {
        "distillation_losses": _listed.truncated_kl(student_logits, ids, logprobs, clamp=clamp, logq=logq),
        "student_mass": masses[0],
        "teacher_mass": masses[1],
        "overlap_count": count,
        "overlap_token_advantage": advantage,
    }


def _whole(x: Any) -> Any:
    """All rows of a nested tensor, in a batch of one."""
    return x.values().unsqueeze(0) if isinstance(x, Tensor) and x.is_nested else x
