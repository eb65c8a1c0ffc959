"""The logits loss of NVIDIA ModelOpt (signature of nvidia-modelopt 0.47.0): `criterion=LogitsDistillationLoss()`.

Of its other losses, `MFTLoss` is not here: it changes the teacher towards the label. Those of its Megatron plugin are
`fusedkd.compat.megatron`'s; `TopKLogitsKLLoss` is to be had here too.
"""

import torch
from torch.nn.modules.loss import _Loss

from .. import checks
from ..head import Side
from ..loss import kd_loss
from .megatron import TopKLogitsKLLoss

__all__ = ["LogitsDistillationLoss", "TopKLogitsKLLoss"]


class LogitsDistillationLoss(_Loss):
    """T²·KL(softmax(logits_t/T)‖softmax(logits_s/T)), in nats.

    Args:
        temperature: T > 0.
        reduction: "mean" over all entries (rows × V), "batchmean" over the first dimension only, "sum", or "none": one
            value per row (...), without V.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.

    Differences: the result is float32, where the original's has the dtype of the logits and their bfloat16 rounding; a
    column where both logits are −inf counts nothing, where the original gives NaN; an empty batch gives 0, not NaN.
    Vocabularies may differ in size: the columns of both are compared, and V in "mean" is their number.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        checks.positive("temperature", temperature)
        checks.one_of("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Side, logits_t: Side) -> torch.Tensor:
        """The loss of logits (..., V), or Heads, of the student and the teacher: a float32 scalar or (...)."""
        loss = kd_loss(
            logits_s,
            logits_t,
            temperature=self._temperature,
            temperature_squared=True,
            reduction="none" if self._reduction == "none" else "sum",
            support="floor",
        )
        shape = checks.leading(logits_s)
        columns = checks.vocab_size(None, logits_s, logits_t)
        if self._reduction == "mean":
            return loss / max(shape.numel() * columns, 1)
        if self._reduction == "batchmean":
            return loss / max((*shape, columns)[0], 1)
        return loss
