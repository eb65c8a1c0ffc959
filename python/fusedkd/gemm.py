"""The four matrix products of the head path, accumulated in float32 whatever the operands' dtype.

On a GPU half-precision operands go to cuBLAS with a float32 result (`out_dtype`), never upcast. A CPU has no such
product, so there the weight is upcast a block of vocabulary rows at a time.
"""

from collections.abc import Iterator

import torch

UPCAST_ROWS = 8192  # vocabulary rows of a half-precision weight that are upcast at once on a CPU


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out (n, V) = hidden (n, D) @ weight (V, D)ᵀ."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cpu":
        for rows, block in _upcast(weight):
            out[:, rows] = hidden.float() @ block.t()
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def hidden_gradient(dz: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out (n, D) = dz (n, V) @ weight (V, D), added to what is there if `accumulate`."""
    if dz.dtype == weight.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, dz, weight, out=out)
        else:
            torch.mm(dz, weight, out=out)
    elif dz.device.type == "cpu":
        if not accumulate:
            out.zero_()
        for rows, block in _upcast(weight):
            out.addmm_(dz[:, rows], block)
    elif accumulate:
        torch.addmm(out, dz, weight, out_dtype=out.dtype, out=out)
    else:
        torch.mm(dz, weight, out_dtype=out.dtype, out=out)


def weight_gradient(dz: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """out (V, D) = dz (n, V)ᵀ @ hidden (n, D), added to what is there if `accumulate`."""
    if dz.dtype != hidden.dtype:
        hidden = hidden.to(dz.dtype)  # a CPU's float32 dz; a few rows of hidden
    if dz.dtype == out.dtype:
        if accumulate:
            out.addmm_(dz.t(), hidden)
        else:
            torch.mm(dz.t(), hidden, out=out)
    elif accumulate:
        torch.addmm(out, dz.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        torch.mm(dz.t(), hidden, out_dtype=out.dtype, out=out)


def _upcast(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, weight.shape[0], UPCAST_ROWS):
        rows = slice(start, min(start + UPCAST_ROWS, weight.shape[0]))
        yield rows, weight[rows].float()
