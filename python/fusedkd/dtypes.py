"""Which dtype each intermediate of a call has: one rule each."""

import torch


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Of losses, statistics and gradient accumulators: float64 if an operand is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def logit_dtype(operand: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """What head GEMMs write for operands of a dtype."""
    if operand == torch.float64:
        return torch.float64
    return torch.float32 if asked is None else asked


def gradient_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What dZ is stored in: the operands' dtype; float32 for half precision on a CPU, which has no mixed product."""
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and hidden.device.type == "cpu" else hidden.dtype


def size_of(weights: torch.Tensor) -> torch.Tensor:
    """The power of two just above the largest of the row weights (N, ...), 0-d.

    Taken out of a half-precision dZ and put back into float32 sums, it keeps the dZ of small weights in range, and
    as a power of two it changes no digit.
    """
    smallest = weights.new_full((1,), torch.finfo(weights.dtype).tiny)
    largest = torch.cat((weights.abs().flatten(), smallest)).amax()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
