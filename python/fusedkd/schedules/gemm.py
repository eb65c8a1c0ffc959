"""The four matrix products of the head path, accumulated in float32 whatever the operands' dtype.

On a GPU half-precision operands go to cuBLAS with a float32 result (`out_dtype`), never upcast. A CPU has no such
product, so there the weight is upcast a block of vocabulary rows at a time.

float32 products of a CPU come from oneDNN, which torch has beside the BLAS that `torch.mm` calls: with a chunk's few
tokens a BLAS spends much of its time on rearranging a large weight (the ceilings section of the benchmark times both).
A small one is in the cache, and a BLAS writes its product where it belongs.
"""

from collections.abc import Iterator

import torch

BLOCK_ROWS = 8192  # vocabulary rows of a weight that a CPU multiplies for logits at once
BLOCK_WEIGHT = 1 << 21  # elements of a weight that a CPU upcasts at once
BLOCK_TOKENS = 256  # tokens beside them: a block of logits is copied to its place while it is in the cache
BLOCK_GRADIENT = 1 << 20  # elements of a weight gradient that a CPU makes at once, likewise
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out (n, V) = hidden (n, D) @ weight (V, D)ᵀ."""
    if _of_a_cpu(out) and not _is_small(weight, out):
        wide = hidden.float()
        for rows, block in _upcast(weight):
            for tokens, to in zip(torch.split(wide, BLOCK_TOKENS), torch.split(out, BLOCK_TOKENS), strict=True):
                to[:, rows] = _product(tokens, block)
    elif hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def hidden_gradient(dz: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out (n, D) = dz (n, V) @ weight (V, D), added to what is there if `accumulate`."""
    if not len(weight):  # a rank of a shard without a column
        if not accumulate:
            out.zero_()
    elif _of_a_cpu(out) and not _is_small(weight, out):
        # oneDNN copies rows that have gaps between them: those of a block, never all of dZ.
        whole = weight.dtype == out.dtype and dz.is_contiguous()
        for rows, block in ((slice(None), weight),) if whole else _upcast(weight):
            product = _product(dz[:, rows], block.t())
            out.copy_(product if not accumulate else product.add_(out))
            accumulate = True
    elif dz.dtype == weight.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, dz, weight, out=out)
        else:
            torch.mm(dz, weight, out=out)
    elif accumulate:
        torch.addmm(out, dz, weight, out_dtype=out.dtype, out=out)
    else:
        torch.mm(dz, weight, out_dtype=out.dtype, out=out)


def _of_a_cpu(out: torch.Tensor) -> bool:
    return out.is_cpu and out.dtype == torch.float32


def _is_small(weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether a weight (V, D), or its gradient, is one that a BLAS multiplies sooner than oneDNN."""
    return weight.dtype == out.dtype and weight.shape[0] <= BLOCK_ROWS


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, k) @ b (m, k)ᵀ of a CPU in float32."""
    nothing = 0 in a.shape or 0 in b.shape  # of which oneDNN has no product
    return a @ b.t() if nothing or _ONEDNN is None else _ONEDNN(a, b, None, "none", [], "")


def weight_gradient(dz: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """out (V, D) = dz (n, V)ᵀ @ hidden (n, D), added to what is there if `accumulate`."""
    if dz.dtype != hidden.dtype:
        hidden = hidden.to(dz.dtype)  # a CPU's float32 dz; a few rows of hidden
    if _of_a_cpu(out) and not _is_small(out, out):
        step = max(1, BLOCK_GRADIENT // max(out.shape[1], 1))
        for columns, to in zip(torch.split(dz, step, 1), torch.split(out, step), strict=True):
            product = _product(columns.t(), hidden.t())
            to.copy_(product if not accumulate else product.add_(to))
    elif dz.dtype == out.dtype:
        if accumulate:
            out.addmm_(dz.t(), hidden)
        else:
            torch.mm(dz.t(), hidden, out=out)
    elif accumulate:
        torch.addmm(out, dz.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        torch.mm(dz.t(), hidden, out_dtype=out.dtype, out=out)


def _upcast(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    whole = weight.dtype == torch.float32
    step = BLOCK_ROWS if whole else min(BLOCK_ROWS, max(1, BLOCK_WEIGHT // max(weight.shape[1], 1)))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].float()
