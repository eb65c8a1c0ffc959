"""The top-k losses of axolotl's distillation plugin (signatures of 0.21.0), axolotl.integrations.kd.

`loss` is topk_logprob.forward_kl's, `LigerFusedLinearKLTopKLogprobLoss` is kernels.liger's, which its trainer calls:

    import axolotl.integrations.kd.trainer as trainer
    from fusedkd.compat.axolotl import LigerFusedLinearKLTopKLogprobLoss

    trainer.LigerFusedLinearKLTopKLogprobLoss = LigerFusedLinearKLTopKLogprobLoss
"""

import torch
from torch import Tensor

from .. import checks
from ..head import Head, Side
from ..loss import kd_loss
from ..token_logprobs import token_logprobs
from . import _listed
from ._shared import IGNORED, bias_of, generalized_jsd, over


def loss(
    student_logits: Side,
    target_token_ids: Tensor,
    target_logprobs: Tensor,
    target_mask: Tensor,
    num_items_in_batch: int | Tensor = -1,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Σ p (log p − log q) over tokens and their K targets, with raw p and q, divided by a count; no T².

    Args:
        student_logits: (B, T, V), of which the first tokens are taken, as many as the targets have, or a `fusedkd.Head`
            of hidden states (B, T, D). The gradient flows here.
        target_token_ids: (B, targets, K), int32 or int64.
        target_logprobs: likewise, at kd_temperature; axolotl's data set makes them sum to 1 over K.
        target_mask: likewise; what is not 0 counts.
        num_items_in_batch: the count; what is not above 0 stands for the number of places that the mask counts, which
            is K times that of tokens.
        kd_temperature: divides the student's logits.

    Differences: 0 where nothing counts, not NaN; a masked place may have any id and log-probability; one of −inf is no
    token, where the original's value is NaN.

    Cost: that of `kd_loss` with a `fusedkd.TopK`.
    Source: axolotl 0.21.0, integrations/kd/topk_logprob/forward_kl.py.
    """
    checks.side("student_logits", student_logits)
    checks.positive("kd_temperature", kd_temperature)
    student = _first(student_logits, target_token_ids)
    ids, valid = _targets(student, target_token_ids, target_logprobs, target_mask)
    total = _listed.truncated_kl(student, ids, target_logprobs, kd_temperature).sum()
    if isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch.to(total.device)
        return over(total, torch.where(items > 0, items, valid.sum()))
    return over(total, num_items_in_batch if num_items_in_batch > 0 else valid.sum())


class LigerFusedLinearKLTopKLogprobLoss(torch.nn.Module):
    """weight_hard_loss·CE + weight_soft_loss·T²·D summed over tokens, D over the teacher's K, from hidden states.

    Args:
        weight_hard_loss, weight_soft_loss: in [0, 1].
        temperature: T, of D alone.
        beta: 0 is Σ p (log p − log q), 1 is Σ q (log q − log p), else β Σ p log(p/m) + (1 − β) Σ q log(q/m) with
            m = βp + (1 − β)q.
        ignore_index: labels without a cross-entropy. compute_ce_loss: whether there is one.
        compiled, chunk_size: nothing here; the chunks are `kd_loss`'s.
        normalize_topk: q is the student's renormalised on the K tokens, else its share of the whole vocabulary. p is as
            it is; a β inside (0, 1) with normalize_topk has p renormalised too, which axolotl's data already is.

    Difference: axolotl multiplies the value of D by T² and leaves the gradient as it was. The value is the same here,
    and the gradient is that of the value: T² times axolotl's. For axolotl's steps divide kd_alpha by T². Also: masked
    tokens are left out of the renormalisation (there they take part in the student's); results are float32.

    Cost: three products of (N, D) by (V, D) for D, three for the cross-entropy.
    Source: axolotl 0.21.0, integrations/kd/kernels/liger.py.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        super().__init__()
        checks.within("weight_hard_loss", weight_hard_loss, 0, 1)
        checks.within("weight_soft_loss", weight_soft_loss, 0, 1)
        checks.positive("temperature", temperature)
        checks.within("beta", beta, 0, 1)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.temperature = temperature
        self.beta = beta
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.compute_ce_loss = compute_ce_loss
        self.normalize_topk = normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        """A float32 scalar of hidden states (B, T, D), targets (B, T, K) and labels (B, T).

        The cross-entropy of a token is with the next one's label, the targets are its own, as in axolotl.
        """
        student = Head(
            student_hidden_states,
            lm_head_weight.to(student_hidden_states.dtype),
            bias_of(student_hidden_states, student_bias),
        )
        checks.side("student", student)
        total = student_hidden_states[:0].float().sum()
        if self.weight_soft_loss:
            ids, _ = _targets(student, target_token_ids, target_logprobs, target_mask)
            soft = self._divergence(student, ids, target_logprobs.float()).sum()
            total = total + self.weight_soft_loss * self.temperature**2 * soft
        if self.compute_ce_loss and self.weight_hard_loss:
            following = true_labels.roll(-1, 1)
            following[:, -1:] = self.ignore_index
            following = torch.where(following == self.ignore_index, IGNORED, following)
            total = total - self.weight_hard_loss * token_logprobs(student, following).sum()
        return total

    def _divergence(self, student: Head, ids: Tensor, logp: Tensor) -> Tensor:
        """Per token, without T²."""
        chosen, tau = generalized_jsd(self.beta), self.temperature
        if not self.normalize_topk:
            if self.beta == 0:
                return _listed.truncated_kl(student, ids, logp, tau)
            teacher = _listed.topk(ids, logp, "truncate", tau)
            return kd_loss(student, teacher, divergence=chosen, temperature=tau, reduction="none")
        found = _listed.renormalized(student, ids, logp, chosen, tau)
        # What p that sums to S rather than 1 changes: log p is log S above the renormalised one, and p is S times it.
        some = (ids >= 0).any(-1)
        total = torch.where(ids >= 0, logp.exp(), 0.0).sum(-1)
        size = torch.where(some, total, 1.0)
        if self.beta == 0:
            return size * (found + size.log())
        return found - size.log() if self.beta == 1 else found


def _first(student: Side, ids: Tensor) -> Side:
    """As many tokens of (B, T, ...) as there are targets."""
    if not isinstance(ids, Tensor) or ids.dim() != 3:
        return student
    tokens = ids.shape[1]
    return student._replace(hidden=student.hidden[:, :tokens]) if isinstance(student, Head) else student[:, :tokens]


def _targets(student: Side, ids: Tensor, logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, −1 where a place does not count, and where the mask counts one."""
    _listed.check_pair("target_token_ids", ids, "target_logprobs", logprobs, checks.leading(student))
    if not isinstance(mask, Tensor):
        raise TypeError(f"target_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"target_mask must have the shape {tuple(ids.shape)} of target_token_ids, got {tuple(mask.shape)}"
        )
    valid = mask != 0
    return _listed.present(ids.long(), logprobs, valid), valid
