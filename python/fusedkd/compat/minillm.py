"""The logit losses of MiniLLM (microsoft/LMOps, `minillm/`).

    import finetune
    from fusedkd.compat import minillm
    finetune.get_distil_loss = minillm.get_distil_loss        # sequence-level and word-level distillation
    Loss._reg_loss = minillm.single_step_reg                  # minillm/losses.py: the single-step term of MiniLLM
    from fusedkd.compat.minillm import get_log_probs          # minillm/utils.py

Model parallelism of that repository (`mpu`) raises NotImplementedError.
"""

from typing import Any

import torch

from ..divergence import divergence
from ..token_logprobs import token_logprobs
from . import _shared, distillm


def get_distil_loss(
    args: Any, tokenizer: Any, model: Any, teacher_model: Any, model_batch: Any, no_model_batch: Any, logits: Any
) -> torch.Tensor:
    """KL(p‖q) + H(p) of the teacher's and the student's logits: `fusedkd.compat.distillm.forward_kl`.

    Runs `teacher_model` on `model_batch` without a gradient, as there; `tokenizer` and `model` play no part, there
    neither. args: an object with model_parallel.
    """
    _refuse_parallel("get_distil_loss", args.model_parallel)
    with torch.no_grad():
        teacher_model.eval()
        teacher_logits = teacher_model(**model_batch, use_cache=False).logits
    return distillm.forward_kl(logits, teacher_logits, no_model_batch)


def single_step_reg(
    self: Any,
    query_ids: torch.Tensor,
    response_ids: torch.Tensor,
    mask: torch.Tensor,
    logits: torch.Tensor,
    inf_mask: torch.Tensor | None,
    stats: dict[str, Any],
) -> torch.Tensor:
    """KL(q‖p) over the whole vocabulary, Σ·mask / Σ mask; the method `Loss._reg_loss`, with its arguments.

    logits: (B, T, V), already divided by the temperature and -inf where sampling forbade a token; inf_mask: (B, T, V)
    bool, those places, or None. self.trainer gives the teacher's logits. stats["reg_loss"] receives the value, which
    waits for the device, as there. Where only the teacher's logit is -inf the column is left out on both sides (there
    log p counts as 0 and the student is rewarded for mass on it); an empty mask gives 0, there 0/0.
    """
    _refuse_parallel("single_step_reg", self.args.model_parallel)
    with torch.no_grad():
        teacher = self.trainer.compute_logits_and_log_probs(
            query_ids, response_ids, inf_mask, base="teacher", return_logprobs=False
        )
        if inf_mask is not None:
            teacher = teacher.masked_fill(inf_mask, -torch.inf)
    loss = _shared.mean_loss(logits, teacher, mask, divergence("rkl"), {})
    stats["reg_loss"] = loss.item()
    return loss


def get_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    inf_mask: torch.Tensor | None = None,
    model_parallel: bool = False,
    **options: Any,
) -> torch.Tensor:
    """log q of the given tokens, 0 where mask is 0, differentiable; (B, T) float32.

    logits: (B, T, V) or a `fusedkd.Head`. inf_mask: (B, T, V) bool: a token that it names is -inf. There a result that
    is not finite stops the program; here it is returned, without a synchronisation. options: backend, memory_budget.
    """
    _refuse_parallel("get_log_probs", model_parallel)
    _shared.refuse("get_log_probs", {k: v for k, v in options.items() if k not in ("backend", "memory_budget")})
    kept = mask != 0
    found = token_logprobs(logits, torch.where(kept, ids, _shared.IGNORED), ignore_index=_shared.IGNORED, **options)
    if inf_mask is None:
        return found
    forbidden = inf_mask.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(forbidden & kept, -torch.inf)


def _refuse_parallel(name: str, model_parallel: Any) -> None:
    _shared.refuse(name, {"model_parallel": model_parallel} if model_parallel else {})
