"""A side of the comparison as given, logits or a Head, and as the operators take it."""

from typing import NamedTuple

import torch

from .head import Head
from .kernels.device.rows import Logits

Side = torch.Tensor | Head
_PARTS = ("hidden", "weight", "bias")


class Source(NamedTuple):
    """A side as a schedule takes it: hidden states (N, D) with a weight (V, D), or logits (outer, inner, V) alone."""

    x: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    @property
    def width(self) -> int:
        """V."""
        return self.x.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0] * self.x.shape[1] if self.weight is None else self.x.shape[0]

    def side(self, products: torch.Tensor, bias: torch.Tensor | None) -> Logits:
        """Products (n, v) of hidden states with rows of the weight, and these rows' bias, as kernels take them."""
        scale = None if self.scale == 1.0 else self.scale
        return Logits(products.unsqueeze(0), bias, scale, self.softcap or None)


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


def flattened(side: Side) -> Source:
    """Hidden states as (N, D), logits as (outer, inner, V) without a copy wherever strides allow."""
    if isinstance(side, Head):
        hidden = side.hidden.reshape(-1, side.hidden.shape[-1])
        return Source(hidden, side.weight, side.bias, float(side.scale), float(side.softcap or 0.0))
    if side.dim() <= 3:
        return Source(side[(None,) * (3 - side.dim())])
    for split in range(1, side.dim() - 1):
        try:
            outer, inner = side.shape[:split].numel(), side.shape[split:-1].numel()
            return Source(side.view(outer, inner, side.shape[-1]))
        except RuntimeError:
            continue
    return Source(side.reshape(1, -1, side.shape[-1]))
