"""The one comparison of the suite: relative bounds against a float64 truth, exact zeros where the truth is zero."""

from __future__ import annotations

import torch
from torch import Tensor


def relative(ours: Tensor, truth: Tensor) -> float:
    """‖ours − truth‖ / ‖truth‖ over all entries that are finite in the truth; infinite beside a truth of 0."""
    seen = truth.isfinite()
    gap, size = (ours.double()[seen] - truth[seen]).norm(), truth[seen].norm()
    return float(gap / size) if size > 0 else 0.0 if gap == 0 else torch.inf


def rounding(truth: Tensor, dtype: torch.dtype, *, cut: bool = False) -> float:
    """The error that writing the truth in `dtype` costs by itself; `cut` for a bfloat16 that drops its last bits."""
    if cut and dtype == torch.bfloat16:
        return relative((truth.float().view(torch.int32) & -65536).view(torch.float32), truth)
    return relative(truth.to(dtype), truth)


def assert_close(
    ours: Tensor,
    truth: Tensor,
    bound: float,
    *,
    dtype: torch.dtype = torch.float32,
    per_row: float | None = None,
    typical: float | None = None,
    what: str = "value",
) -> None:
    """Shape, dtype, infinities, exact zeros, then the relative L2 error of the whole and, if asked, of every row.

    A row is the last axis of a matrix and a single entry of a vector. `typical` bounds the median relative error of
    the entries, so that the many small ones count beside the few that make up the norm. Nothing is absolute.
    """
    assert isinstance(ours, Tensor), f"{what}: {type(ours).__name__} instead of a tensor"
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64"
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == dtype, f"{what}: dtype {ours.dtype}, expected {dtype}"
    assert not truth.isnan().any(), f"{what}: the truth is undefined here"
    ours, truth = ours.detach().double().cpu(), truth.detach()
    finite = truth.isfinite()
    assert torch.equal(ours[~finite], truth[~finite]), f"{what}: {ours[~finite]}, expected {truth[~finite]}"
    assert ours[finite].isfinite().all(), f"{what}: {int((~ours[finite].isfinite()).sum())} entries are not finite"
    dust = ours[truth == 0].abs()
    assert not dust.any(), f"{what}: {int((dust > 0).sum())} entries, up to {dust.max():.2e}, where the truth is 0"
    error = relative(ours, truth)
    assert error <= bound, f"{what}: relative error {error:.3e}, allowed {bound:.3e}"
    gap = torch.where(finite, ours - truth, 0)
    if per_row is not None:
        rows = gap.reshape(-1, truth.shape[-1] if truth.ndim > 1 else 1).norm(dim=-1)
        size = torch.where(finite, truth, 0).reshape(len(rows), -1).norm(dim=-1)
        errors = torch.where(size > 0, rows / size, 0)
        worst = int(errors.argmax())
        assert errors[worst] <= per_row, f"{what}: row {worst} is off by {errors[worst]:.3e}, allowed {per_row:.3e}"
    entries = finite & (truth != 0)
    if typical is not None and entries.any():
        median = float((gap[entries] / truth[entries]).abs().median())
        assert median <= typical, f"{what}: the median entry is off by {median:.3e}, allowed {typical:.3e}"
