"""Divergences of probabilities and log-probabilities taken as they are: their rows need not sum to 1.

Every summand depends on one column of a row, so nothing is normalised, a sum is the sum of what "none" returns, and the
gradient is that of each summand.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dtypes import accumulation_dtype
from ..kernels.divergences.jsd import JSD

CHUNK = 2**24  # elements of a float32 temporary
_FAR = 1e30  # log(p/q) of a column without student: finite, because 0·inf is NaN


class Pointwise(NamedTuple):
    """Summands of student and teacher, and their derivative by the student: both (rows, V), wide."""

    summands: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor], Tensor]


TVD = Pointwise(lambda p, q: 0.5 * (p - q).abs(), lambda p, q: 0.5 * (p - q).sign())


def kl_to_probabilities(eps: float) -> Pointwise:
    """t·(log max(t, eps) − log q) of a student in logarithms and probabilities t, 0 where t is."""
    return Pointwise(lambda x, t: t * torch.where(t == 0, 0.0, t.clamp_min(eps).log() - x), lambda x, t: -t)


def generalized_jsd(beta: float) -> Pointwise:
    """GKD's divergence of log-probabilities: KL(p‖q) at β = 0, KL(q‖p) at β = 1.

    A column where the teacher has −inf is left out of both sides.
    """
    if beta == 0:
        return Pointwise(lambda x, y: _kl(y, x), lambda x, y: -y.exp())
    if beta == 1:
        return Pointwise(lambda x, y: _present(y, _kl(x, y)), lambda x, y: _present(y, x.exp() + _kl(x, y)))
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in [0, 1] (0: forward KL, 1: reverse KL), got {beta}")

    def term(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once. One axis, because of more the formulas look at the numbers, which waits for a GPU."""
        delta = _present(y, y - x).clamp(max=_FAR).flatten()
        theta = delta.new_full((), beta), delta.new_zeros(())
        q, p = _present(y, x.exp()).flatten(), y.exp().flatten()
        return JSD.term.torch(q, p, x.flatten(), y.flatten(), delta, theta)

    return Pointwise(lambda x, y: term(x, y)[0].view(x.shape), lambda x, y: term(x, y)[1].view(x.shape))


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """p log(p/q), 0 where p is."""
    return logp.exp() * torch.where(logp == -math.inf, 0.0, logp - logq)


def _present(teacher: Tensor, x: Tensor) -> Tensor:
    return torch.where(teacher == -math.inf, 0.0, x)


def summands(kind: Pointwise, student: Tensor, teacher: Tensor) -> Tensor:
    """(..., V) float32 (float64 for float64 inputs)."""
    return _flat(kind, student, teacher, False).view(student.shape)


def row_sums(kind: Pointwise, student: Tensor, teacher: Tensor) -> Tensor:
    """(...) sums of `summands`, without a temporary of (..., V)."""
    return _flat(kind, student, teacher, True).view(student.shape[:-1])


def slices(rows: Tensor) -> list[slice]:
    """Rows of a matrix at a time."""
    step = max(1, CHUNK // max(rows.shape[-1], 1))
    return [slice(i, i + step) for i in range(0, len(rows), step)]


def _flat(kind: Pointwise, student: Tensor, teacher: Tensor, summed: bool) -> Tensor:
    shape = student.shape[:-1].numel(), student.shape[-1]
    flat = _Function.apply(student.reshape(shape), teacher.detach().reshape(shape), kind, summed)
    assert isinstance(flat, Tensor)
    return flat


class _Function(torch.autograd.Function):
    """The summands of (rows, V), or their sum per row, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: Pointwise, summed: bool) -> Tensor:
        ctx.kind, ctx.summed = kind, summed
        # save_for_backward refuses tensors made under inference_mode, and torch.compile the question.
        inference = not torch.compiler.is_compiling() and teacher.is_inference()
        ctx.inference = teacher if inference else None
        ctx.save_for_backward(student, None if inference else teacher)
        wide = accumulation_dtype(student, teacher)
        out = student.new_empty(student.shape[:1] if summed else student.shape, dtype=wide)
        for at in slices(student):
            part = kind.summands(student[at].to(wide), teacher[at].to(wide))
            out[at] = part.sum(-1) if summed else part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator's
        student, teacher = ctx.saved_tensors
        teacher = ctx.inference if teacher is None else teacher
        upstream = grads[0].unsqueeze(-1) if ctx.summed else grads[0]
        grad = student.new_empty(student.shape)
        for at in slices(student):
            wide = upstream[at]
            slopes = ctx.kind.slopes(student[at].to(wide.dtype), teacher[at].to(wide.dtype))
            grad[at] = torch.where(wide == 0, 0.0, slopes * wide).to(grad.dtype)
        return grad, None, None, None
