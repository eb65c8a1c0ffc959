"""The per-sequence losses of DistiLLM-2 (jongwooko/distillm-2, `src/distillm_trainer.py`).

    from fusedkd.compat.distillm2 import get_batch_logps
    DistiLLMTrainer.get_batch_logps = staticmethod(get_batch_logps)

`fusedkd.cald_loss` is the whole loss in one call, for code that is free to be rewritten.
"""

from typing import Any

import torch

from ..divergence import Divergence, divergence
from ..head import Head, Side, detached
from ..loss import kd_loss
from ..recipes.cald import adapted_skew
from ..token_logprobs import token_logprobs
from . import _shared

_GKD = 0.9  # the teacher's weight in the "gkd" mixture


def get_batch_logps(
    logits: Side,
    tea_logits: Side,
    labels: torch.Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
    loss_type: str = "distillm_v2",
    base_alpha_1: float = 0.1,
    base_alpha_2: float = 0.1,
    logp_logq: float | torch.Tensor | None = None,
    logq_logp: float | torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels and two divergences per sequence, four (B,) tensors in nats.

    Returned are the student's log q(y), the teacher's log p(y), the loss for teacher responses and the loss for student
    responses, each the sum over the counted tokens of a sequence, or with `average_log_prob` their mean:

        loss_type contains "distillm"    KL(p‖αp + (1−α)q) and KL(q‖αq + (1−α)p), the student in the second mixture a
                                         constant
        "gkd"                            the generalised Jensen-Shannon divergence of β = 0.9, twice
        anything else                    KL(p‖q) and, with this sign, −KL(q‖p)

    logits, tea_logits: (B, T, V), or Heads (B, T, D), which make no logits. labels: (B, T) int64, `label_pad_token_id`
    where a token does not count; shifted here, with the last position of the logits dropped, unless
    `is_encoder_decoder`. logp_logq, logq_logp: with loss_type="distillm_v2" they adapt α per sequence as in
    `fusedkd.cald_loss` (its anchors), read by no other loss_type, as there. options: those of `fusedkd.kd_loss`.

    Differences: the adapted α is a constant for the gradient (there the gradient also flows through it; values are the
    same, and so is everything with the default None); float32 inside whatever the logits' dtype; a sequence without a
    counted token is 0 (there 0/0); no retry after running out of memory, there being no (B, T, V) temporary to run out
    on. The default of loss_type is this module's: the trainer always passes its own.
    """
    _shared.check_options("get_batch_logps", options)
    _check(loss_type)
    if not is_encoder_decoder:
        labels, logits, tea_logits = labels[:, 1:], _but_last(logits), _but_last(tea_logits)
    options["ignore_index"] = label_pad_token_id
    mask = labels != label_pad_token_id
    length = mask.sum(-1).clamp(min=1)
    for_tokens = {key: options[key] for key in ("backend", "ignore_index") if key in options}
    own, theirs = (
        token_logprobs(side, labels, memory_budget=options.get("memory_budget") if isinstance(side, Head) else None,
                       **for_tokens).sum(-1)
        for side in (logits, detached(tea_logits))
    )  # fmt: skip
    alphas: list[float | torch.Tensor] = [base_alpha_1, base_alpha_2]
    if loss_type == "distillm_v2":
        gap = ((theirs / length).exp() - (own / length).exp()).detach()
        for i, (anchor, sign) in enumerate(((logp_logq, 1), (logq_logp, -1))):
            if anchor is not None:
                alphas[i] = adapted_skew(sign * gap, float((base_alpha_1, base_alpha_2)[i]), anchor).unsqueeze(-1)
    chosen, rejected = (
        kd_loss(logits, tea_logits, labels, divergence=each, reduction="none", **options).sum(-1)
        for each in _divergences(loss_type, *alphas)
    )
    if "distillm" not in loss_type and loss_type != "gkd":
        rejected = -rejected
    scale = length if average_log_prob else 1
    return own / scale, theirs / scale, chosen / scale, rejected / scale


def _check(loss_type: Any) -> None:
    if not isinstance(loss_type, str):
        raise TypeError(f'loss_type must be a str such as "distillm_v2", got {type(loss_type).__name__}')


def _divergences(loss_type: str, alpha_1: Any, alpha_2: Any) -> tuple[Divergence, Divergence]:
    """For the teacher's responses and for the student's."""
    if "distillm" in loss_type:
        return divergence("skl", lam=alpha_1), divergence("srkl", lam=alpha_2, detach_mixture=True)
    if loss_type == "gkd":
        return divergence("jsd", beta=_GKD), divergence("jsd", beta=_GKD)
    return divergence("fkl"), divergence("rkl")


def _but_last(side: Side) -> Side:
    """A side without its last position."""
    return side._replace(hidden=side.hidden[:, :-1]) if isinstance(side, Head) else side[:, :-1]
