"""A side of the comparison as callers give it: logits, or the output layer of a model instead of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Hidden states and the output layer's weights: logits = softcap(scale · (hidden @ weight.T + bias)).

    hidden: (..., D) float; weight: (V, D) and bias: (V,) of the same dtype. scale: a positive number (Cohere's
    `logit_scale`). softcap: c in c·tanh(logits/c) (Gemma 2's `final_logit_softcapping`), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


Side = Tensor | Head
_PARTS = ("hidden", "weight", "bias")


def detached(side: Side) -> Side:
    """A side from which no gradient flows."""
    if not isinstance(side, Head):
        return side.detach()
    bias = None if side.bias is None else side.bias.detach()
    return side._replace(hidden=side.hidden.detach(), weight=side.weight.detach(), bias=bias)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of the operands of a product on a device; None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(side: Side) -> Side:
    """Under autocast a Head's product takes its dtype, as in nn.Linear, which leaves float64 alone.

    The bias stays as it is: it is added to float32 logits. Logits stay as they are.
    """
    if not isinstance(side, Head) or side.hidden.dtype == torch.float64:
        return side
    dtype = autocast_dtype(side.hidden.device)
    return side if dtype is None else side._replace(hidden=side.hidden.to(dtype), weight=side.weight.to(dtype))


def both_autocast(student: Side, teacher: Side) -> tuple[Side, Side]:
    """`autocast` of the student and of the detached teacher. What is one tensor on both sides is cast once."""
    ours = autocast(student)
    if isinstance(student, Head) and isinstance(teacher, Head):
        shared = {part: getattr(ours, part) for part in _PARTS if getattr(student, part) is getattr(teacher, part)}
        teacher = teacher._replace(**shared)
    return ours, autocast(detached(teacher))
