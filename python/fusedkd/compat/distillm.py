"""The losses of DistiLLM (jongwooko/distillm, `distillm/losses.py`), one import line away.

    from fusedkd.compat.distillm import forward_kl, skewed_reverse_kl

Each takes (logits, teacher_logits, no_model_batch) as there: logits (B, T, V), student first; `no_model_batch["label"]`
(B, T), already shifted, -100 where a token does not count. The result is the sum over the counted tokens divided by
their number, a float32 scalar, in nats, at temperature 1. p is the teacher, q the student. `forward_kl` and
`skewed_forward_kl` are cross-entropies: the divergence plus the teacher's entropy H(p), as there.

Better: no (B, T, V) temporary; either side may be a `fusedkd.Head` (hidden states and output
weights), and then no logits are made at all, which is the way to take wherever the model allows it. Further keyword
arguments are options of `fusedkd.kd_loss` such as backend, memory_budget or vocab_size; NotImplementedError names any
other.

Where the values differ from the original, and why:
- no NaN where a token's probability underflows in both models (js_distance and both skewed losses there);
- no NaN gradient in reverse_kl beside a logit of -inf: a teacher logit of -inf removes the column from both sides
  (there the term is dropped and the student is rewarded for mass on the forbidden token);
- a student logit of -inf where the teacher's is finite makes forward_kl +inf, which it is; there the term is dropped;
- a batch without a counted token is 0 with a graph, there 0/0;
- vocabularies of different size are compared on the common columns; there a shape error.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .. import checks
from ..divergence import divergence
from ..head import Side
from ._shared import batch_loss, jsd

Batch = Mapping[str, torch.Tensor]


def forward_kl(logits: Side, teacher_logits: Side, no_model_batch: Batch, **options: Any) -> torch.Tensor:
    """KL(p‖q) + H(p): the cross-entropy of the student under the teacher."""
    return batch_loss("forward_kl", logits, teacher_logits, no_model_batch, divergence("fkl"), options, entropy=1.0)


def reverse_kl(logits: Side, teacher_logits: Side, no_model_batch: Batch, **options: Any) -> torch.Tensor:
    """KL(q‖p)."""
    return batch_loss("reverse_kl", logits, teacher_logits, no_model_batch, divergence("rkl"), options)


def symmetric_kl(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.9, **options: Any
) -> torch.Tensor:
    """(1 − lam)(KL(p‖q) + H(p)) + lam KL(q‖p), 0 ≤ lam ≤ 1."""
    checks.within("lam", lam, 0, 1)
    chosen = divergence("frkl", w=lam)
    return batch_loss("symmetric_kl", logits, teacher_logits, no_model_batch, chosen, options, entropy=1.0 - lam)


def js_distance(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.9, **options: Any
) -> torch.Tensor:
    """(1 − lam) KL(p‖m) + lam KL(q‖m), m = (1 − lam)p + lam·q: GKD's β is 1 − lam. 0 at lam 0 and 1."""
    checks.within("lam", lam, 0, 1)
    return batch_loss("js_distance", logits, teacher_logits, no_model_batch, jsd(1 - lam), options)


def tv_distance(logits: Side, teacher_logits: Side, no_model_batch: Batch, **options: Any) -> torch.Tensor:
    """½ Σ |p − q|."""
    return batch_loss("tv_distance", logits, teacher_logits, no_model_batch, divergence("tvd"), options)


def skewed_forward_kl(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> torch.Tensor:
    """KL(p‖lam·p + (1 − lam)q) + H(p)."""
    checks.within("lam", lam, 0, 1)
    chosen = divergence("skl", lam=lam)
    return batch_loss("skewed_forward_kl", logits, teacher_logits, no_model_batch, chosen, options, entropy=1.0)


def skewed_reverse_kl(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, lam: float = 0.1, **options: Any
) -> torch.Tensor:
    """KL(q‖(1 − lam)p + lam·q), with the gradient of the student inside the mixture."""
    checks.within("lam", lam, 0, 1)
    return batch_loss("skewed_reverse_kl", logits, teacher_logits, no_model_batch, divergence("srkl", lam=lam), options)
