"""The fused top-k loss of VeOmni (signature of 0.1.12): `veomni.ops.kernels.cross_entropy.chunk_topk_distill`."""

import sys

import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..head import Head
from ..token_logprobs import token_logprobs
from . import _listed
from ._shared import IGNORED


def chunk_topk_distill_function(
    hidden_states: Tensor,
    weights: Tensor,
    labels: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of the label, entropy, and Σ p (log p − log q) over the teacher's K tokens, from hidden states.

    Args:
        hidden_states: (B, L, D) or (L, D). Gradients of the first three results flow here and to weights.
        weights: (V, D) of the output layer.
        labels: (B, L) or (L,); tokens of `ignore_index` have five zeros. Without shift_labels a token's label is the
            next one's, whose rows of the teacher it takes, and the last token has zeros.
        teacher_topk_ids: (B, L, K). teacher_topk_log_probs: likewise.
        chunk_size: nothing here; the chunks are `kd_loss`'s.
        shift_labels: labels that are shifted already; then nothing is.
        temperature: divides the logits.
        log_prob_min_clamp: the least of both logarithms in the sum.

    Returns: log_probs, entropy, distillation_losses, student_mass and teacher_mass, float32, in the shape of labels;
    the masses are without a graph.

    Under VeOmni's sequence parallelism labels count as shifted, as there. Nothing of N·V elements is made; where VeOmni
    rounds the logits to the dtype of hidden_states, they are float32. An id of −1 is no token.

    Cost: products of (N, D) by (V, D): three for the losses, three for log-probability and entropy, one for the masses.
    Source: VeOmni 0.1.12, veomni/ops/kernels/cross_entropy/chunk_topk_distill.py.
    """
    checks.positive("temperature", temperature)
    if log_prob_min_clamp is not None:
        checks.number("log_prob_min_clamp", log_prob_min_clamp)
    student = Head(hidden_states, weights.to(hidden_states.dtype))
    checks.side("student", student)
    shape = hidden_states.shape[:-1]
    _listed.check_pair("teacher_topk_ids", teacher_topk_ids, "teacher_topk_log_probs", teacher_topk_log_probs, shape)
    target = labels if shift_labels is None else shift_labels
    checks.labels(target, shape, hidden_states.device, ignore_index, len(weights), "labels")
    ids, logprobs = teacher_topk_ids.long(), teacher_topk_log_probs
    shifts = shift_labels is None and labels.shape[-1] > 0 and not _sequence_parallel()
    if shifts:
        student = student._replace(hidden=hidden_states[..., :-1, :])
        target, ids, logprobs = labels[..., 1:], ids[..., 1:, :], logprobs[..., 1:, :]
    target = torch.where(target == ignore_index, IGNORED, target)
    if log_prob_min_clamp is None:
        ids = _listed.present(ids, logprobs)
    ids = ids.masked_fill((target == IGNORED).unsqueeze(-1), -1)
    logprob, entropy = token_logprobs(student, target, temperature, return_entropy=True)
    logq = _listed.logprobs_at(student, ids, temperature)
    with torch.no_grad():
        masses = (logq.exp().sum(-1), torch.where(ids >= 0, logprobs.float().exp(), 0.0).sum(-1))
    losses = _listed.truncated_kl(student, ids, logprobs, temperature, clamp=log_prob_min_clamp, logq=logq)
    found = (logprob, entropy, losses, *masses)
    return tuple(functional.pad(x, (0, 1)) for x in found) if shifts else found  # pyright: ignore[reportReturnType]


def _sequence_parallel() -> bool:
    """Whether VeOmni, if it is there, shards sequences; nothing is imported for that."""
    state = sys.modules.get("veomni.distributed.parallel_state")
    return state is not None and bool(state.get_parallel_state().sp_enabled)
