"""Losses of Megatron-LM, and those of ModelOpt's Megatron plugin.

`LogitsKLLoss` and `TopKLogitsKLLoss` are modelopt.torch.distill.plugins.megatron's of nvidia-modelopt 0.47.0,
`topk_kl_div` is megatron.training.distillation.cached_logits_loss's (NVIDIA/Megatron-LM d98e8a6).
"""

from typing import Any

import torch
from torch.nn.modules.loss import _Loss

from .. import checks
from ..divergence import divergence
from ..head import Head, Side
from ..loss import kd_loss
from . import _listed

SENTINEL = -1e3  # the log-probability of a place in Megatron's cache that holds no token
_GHOST = 1e-8  # the least mass of the ghost token


class LogitsKLLoss(_Loss):
    """KL(softmax(targets/T)‖softmax(predictions/T)) per token, in nats and float32, without T².

    Args:
        model_config: the student's TransformerConfig; its `tensor_model_parallel_size` must be 1.
        temperature: T > 0.
        reverse: KL(student‖teacher) instead.

    Differences: a column where the teacher's logit is −inf is removed from both sides, where the original's value is
    NaN.

    Raises NotImplementedError for a tensor-parallel vocabulary.
    """

    def __init__(self, model_config: Any, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        ranks = model_config.tensor_model_parallel_size
        if ranks > 1:
            raise NotImplementedError(
                f"model_config.tensor_model_parallel_size is {ranks}: a vocabulary sharded by tensor parallelism is "
                "not supported yet: use a tensor-parallel size of 1, or keep ModelOpt's LogitsKLLoss"
            )
        checks.positive("temperature", temperature)
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse

    def forward(self, predictions: Any, targets: Any) -> tuple[torch.Tensor, bool, bool]:
        """The loss of the student's and the teacher's logits (s, b, V).

        Args:
            predictions, targets: logits, or both tuples that start with them (a ColumnParallelLinear returns its bias
                too); either a `fusedkd.Head` of hidden states (s, b, D).

        Returns: ((b, s) loss, contiguous; True; False): the last two are the original's `tp_reduce`, whether Megatron
        sums the loss over the tensor-parallel group, and `is_sequence_parallel`.
        """
        predictions, targets = _logits_of(predictions, targets)
        loss = kd_loss(
            predictions,
            targets,
            divergence="rkl" if self._reverse else "fkl",
            temperature=self._temperature,
            reduction="none",
        )
        return loss.transpose(0, 1).contiguous(), True, False


class TopKLogitsKLLoss(LogitsKLLoss):
    """The same of both sides renormalised on the teacher's likeliest tokens: what either has elsewhere costs nothing.

    Args:
        model_config, temperature, reverse: as for `LogitsKLLoss`.
        top_k: how many tokens, at most the vocabulary and 4096.

    Differences: a token of which the teacher's logit is −inf is no token, where the original's value is NaN.
    """

    def __init__(self, model_config: Any, temperature: float = 1.0, reverse: bool = False, top_k: int = 1024) -> None:
        super().__init__(model_config, temperature, reverse)
        checks.integer("top_k", top_k)
        checks.within("top_k", top_k, 1, checks.MOST_LISTED)
        self.top_k = top_k

    def forward(self, predictions: Any, targets: Any) -> tuple[torch.Tensor, bool, bool]:
        """The loss of the student's and the teacher's logits (s, b, V), as `LogitsKLLoss.forward`.

        The student may be a `fusedkd.Head`, the teacher has logits. Returns: ((b, s) loss; False; False).
        """
        predictions, targets = _logits_of(predictions, targets)
        if isinstance(targets, Head):
            raise NotImplementedError("targets is a Head, of which the likeliest tokens are not known: pass its logits")
        checks.side("targets", targets)
        if self.top_k > targets.shape[-1]:
            raise ValueError(f"top_k must be at most the vocabulary of targets, {targets.shape[-1]}, got {self.top_k}")
        values, ids = targets.detach().topk(self.top_k, dim=-1)
        chosen = divergence("rkl" if self._reverse else "fkl")
        logp = values.float() / self._temperature
        loss = _listed.renormalized(predictions, _listed.present(ids, values), logp, chosen, self._temperature)
        return loss.transpose(0, 1).contiguous(), False, False


def topk_kl_div(
    student_logits: Side,
    teacher_topk_logprobs: torch.Tensor,
    teacher_topk_indices: torch.Tensor,
    tp_size: int,
    tp_rank: int,
    tp_group: Any,
    add_ghost_token: bool = False,
) -> torch.Tensor:
    """Σ p (log p − log q) per token over the teacher's cached ones, with raw p and q, in nats: (B, S) of (S, B, V).

    Args:
        student_logits: (S, B, V), or a `fusedkd.Head` of hidden states (S, B, D). The gradient flows here.
        teacher_topk_logprobs: (S, B, K), −1e3 where the cache holds no token.
        teacher_topk_indices: (S, B, K), int32 or int64, in [0, V), or −1 where the cache holds no token.
        tp_size: 1. tp_rank, tp_group: not looked at.
        add_ghost_token: one term more, of the masses that both sides have on no listed token, each at least 1e-8: then
            this is a divergence, never negative.

    Differences: the student's mass elsewhere is a sum, where the original's is 1 − Σ q in float32; a log-probability of
    −inf is no token, where the original's value is NaN; float32 logits are not changed in place; an index outside the
    vocabulary is an error on a CPU, where the original drops it. Where rounding has raised Σ p above 1, the likeliest
    token is lowered by that.

    Raises: NotImplementedError for a tp_size above 1.

    Cost: without the ghost token that of `kd_loss` with a `fusedkd.TopK`, with it one more read of the logits.
    """
    if tp_size != 1:
        raise NotImplementedError(
            f"tp_size is {tp_size}: a vocabulary sharded by tensor parallelism is not supported yet: use a "
            "tensor-parallel size of 1, or keep Megatron's topk_kl_div"
        )
    checks.side("student_logits", student_logits)
    names = "teacher_topk_indices", "teacher_topk_logprobs"
    shape = checks.leading(student_logits)
    _listed.check_pair(names[0], teacher_topk_indices, names[1], teacher_topk_logprobs, shape)
    logprobs = teacher_topk_logprobs.float()
    ids = _listed.present(teacher_topk_indices, logprobs, logprobs != SENTINEL)
    if add_ghost_token:
        loss = _listed.bucketed(student_logits, ids, logprobs, divergence("fkl"), _GHOST)
    else:
        loss = _listed.truncated_kl(student_logits, ids, logprobs)
    return loss.transpose(0, 1).contiguous()


def _logits_of(predictions: Any, targets: Any) -> tuple[Any, Any]:
    """Both, or the first of both where a ColumnParallelLinear returned its bias too."""
    if isinstance(predictions, tuple) and not isinstance(predictions, Head):
        return predictions[0], targets[0]
    return predictions, targets
