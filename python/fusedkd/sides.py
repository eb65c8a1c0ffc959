"""A side of the comparison as given, logits or a Head, and as the operators take it."""

import torch

from .head import Head

Side = torch.Tensor | Head
_PARTS = ("hidden", "weight", "bias")


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


def detached(side: Side) -> Side:
    """A side from which no gradient flows."""
    if not isinstance(side, Head):
        return side.detach()
    bias = None if side.bias is None else side.bias.detach()
    return side._replace(hidden=side.hidden.detach(), weight=side.weight.detach(), bias=bias)


def flattened(side: Side) -> list[torch.Tensor | None]:
    """x, weight, bias: hidden states as (N, D), logits as (outer, inner, V) without a copy wherever strides allow."""
    if isinstance(side, Head):
        return [side.hidden.reshape(-1, side.hidden.shape[-1]), side.weight, side.bias]
    if side.dim() <= 3:
        return [side[(None,) * (3 - side.dim())], None, None]
    for split in range(1, side.dim() - 1):
        try:
            outer, inner = side.shape[:split].numel(), side.shape[split:-1].numel()
            return [side.view(outer, inner, side.shape[-1]), None, None]
        except RuntimeError:
            continue
    return [side.reshape(1, -1, side.shape[-1]), None, None]


def transform(side: Side) -> tuple[float, float]:
    """Scale and softcap (0: none)."""
    return (float(side.scale), float(side.softcap or 0.0)) if isinstance(side, Head) else (1.0, 0.0)
