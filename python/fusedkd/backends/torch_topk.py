"""The row work of a top-k teacher in plain torch, with the interface of kernels/device/topk.py."""

import torch
from torch import Tensor

from ..kernels.device.args import columns_of
from ..kernels.device.rows import Logits, Problem
from ..kernels.device.topk import ListedGradient, Masses
from ..kernels.maths.elementary import exp
from .torch_rows import clear, logits, or_unknown, row_blocks, shaped, stored


def gather(side: Logits, ids: Tensor, labels: Tensor | None, out: Tensor) -> None:
    """Writes the logits at the columns `ids` (N, K) into `out` (N, K), as device.topk.gather."""
    out.fill_(-torch.inf)
    for rows in row_blocks(max(ids.shape[1], 1), labels, len(ids), ids.device):
        at = ids[rows].clamp(min=0)
        picked = stored(side, rows, side.x.shape[2]).gather(1, at).to(out.dtype)
        bias = None if side.bias is None else side.bias[at]
        x, _ = shaped(picked, bias, side.scale, side.softcap)
        out[rows] = torch.where(ids[rows] < 0, -torch.inf, x)


def masses(problem: Problem, student: Logits, ids: Tensor, labels: Tensor | None, out: Tensor) -> None:
    """Fills `out` (N, MASSES) from one sweep over the student's rows, as device.topk.masses."""
    clear(out)
    width = student.x.shape[2] if problem.ce_weight else problem.vocab_size
    for rows in row_blocks(width, labels, len(out), out.device):
        s, _ = logits(student, rows, width, out.dtype)
        ce_lse = torch.logsumexp(s, -1) if problem.ce_weight else out.new_zeros(len(s))
        x = s[:, : problem.vocab_size].masked_fill(_listed(ids[rows], problem.vocab_size), -torch.inf)
        top = or_unknown(x.amax(-1, keepdim=True)) if problem.vocab_size else x.new_full((len(x), 1), -torch.inf)
        empty = top == -torch.inf
        centre = torch.where(empty, 0.0, top)
        total = exp.torch((x - centre) / problem.temperature).sum(-1, keepdim=True)
        found = Masses(centre.squeeze(-1), torch.where(empty, -torch.inf, total.log()).squeeze(-1), ce_lse)
        out[rows] = torch.stack(found, -1)


def gradient(
    problem: Problem,
    student: Logits,
    ids: Tensor,
    labels: Tensor | None,
    logits_at: Tensor,
    kept: Tensor,
    found: ListedGradient,
    upstream: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the gradient by the student's stored logits into `out` (N, width), as device.topk.gradient."""
    V, width, inv_tau = problem.vocab_size, student.x.shape[2], 1.0 / problem.temperature
    for rows in row_blocks(student.x.shape[2], labels, len(out), out.device, out):
        at = ids[rows]
        s, slope = logits(student, rows, width, kept.dtype)
        of_row = columns_of(Masses, kept[rows], keepdim=True)
        bucket = found.bucket[rows].unsqueeze(-1) * inv_tau
        shares = exp.torch((s[:, :V] - of_row.centre) * inv_tau - of_row.log_bucket)
        g = torch.zeros_like(s)
        # Nothing is to be shared out where both sides are renormalised, and a share may be infinite.
        g[:, :V] = torch.where(bucket == 0, 0.0, shares.mul_(bucket))
        # An absent column's entry goes to a column of its own, which is cut off.
        entries = torch.cat((g, g[:, :1]), 1)
        entries.scatter_(1, torch.where(at < 0, s.shape[1], at), found.listed[rows] * inv_tau)
        g = entries[:, :-1]
        up = torch.ones_like(bucket) if upstream is None else upstream[rows].unsqueeze(-1)
        if problem.ce_weight and labels is not None:
            label = labels[rows].unsqueeze(-1)  # of a chunk's columns, or none of them
            one = torch.where(label < s.shape[1], 1.0, 0.0).to(s.dtype)
            q = exp.torch(s - of_row.ce_lse).scatter_add_(1, label.clamp(max=s.shape[1] - 1), -one)
            g = g + (up * problem.ce_weight) * q
        g = torch.where((s == -torch.inf) | (up == 0), 0.0, g * slope)
        out[rows, :width] = g.to(out.dtype)
        out[rows, width:] = 0


def _listed(ids: Tensor, width: int) -> Tensor:
    """(n, width) bool: the columns that `ids` (n, K) lists."""
    listed = torch.zeros((len(ids), width + 1), dtype=torch.bool, device=ids.device)
    return listed.scatter_(1, torch.where(ids < 0, width, ids), True)[:, :width]
