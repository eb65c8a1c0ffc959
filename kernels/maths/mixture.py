"""The logarithm of a mixture m = λp + (1 − λ)q relative to each of its parts, from δ = log p − log q alone.

Divergences from a mixture saturate: where p and q hardly overlap, log(m/q) is log(1 − λ) at almost every token that the
student likes, and the gradient q_k (h_k − Σ q h) is what is left of a difference of equal numbers. Adding a multiple of
q to phi changes no gradient (Σ phi moves with it), so on such rows (`far`) the terms leave that constant out. The first
sweep knows which rows these are; `SATURATING` hands it on as the last number of theta.
"""

from typing import Any

import torch

from ..language import formula, jit, rowwise, tl
from .definition import RowParameters
from .elementary import expm1_ratio, is_tile, log1p, loses_nothing

NEVER = -2e30  # log of a weight of 0: beyond every δ, absent columns (±1e30) included


def _logs(part, other, delta):
    """log(m/q), log(m/p) and log(m/q) − part where they are far from 0."""
    above = other + delta
    gap = above - part
    tail = gap.abs().neg_().exp_().log1p_()
    beyond = rowwise.maximum(part - delta, other).add_(tail)
    return rowwise.maximum(above, part).add_(tail), beyond, gap.clamp_(min=0.0).add_(tail)


def _log_mixture(weight, delta, far):
    part = rowwise.where(weight < 1, rowwise.log(rowwise.where(weight < 1, 1.0 - weight, 1.0)), NEVER)
    other = rowwise.where(weight > 0, rowwise.log(rowwise.where(weight > 0, weight, 1.0)), NEVER)
    above, beyond, excess = _logs(part, other, delta)
    if is_tile(delta) and isinstance(far, torch.Tensor) and loses_nothing(far, torch.ones_like(far)):
        return above, beyond, excess
    # The near form at c, δ cut to ±1/2, plus the far form at δ minus the far form at c: these cancel exactly where
    # c = δ, so nothing has to be selected (elementary.outside).
    cut = delta.clamp(-0.5, 0.5)
    near = torch.expm1(cut).mul_(weight).log1p_()
    cut_above, cut_beyond, _ = _logs(part, other, cut)
    above.sub_(cut_above).add_(near)
    beyond.sub_(cut_beyond).add_(near.sub_(cut).mul_(weight < 1))
    return above, beyond, torch.lerp(above, excess, far)


@formula(torch=_log_mixture)
def log_mixture(weight, delta, far):
    """(log(m/q), log(m/p), log(m/q) − far·log(1 − weight)) of m = weight·p + (1 − weight)·q.

    The first two are exactly 0 at δ = 0, the first also at weight 0, the second at weight 1.
    """
    part = tl.where(weight < 1, tl.log(tl.where(weight < 1, 1.0 - weight, 1.0)), -2e30)
    other = tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)), -2e30)
    near = tl.abs(delta) < 0.5
    x = tl.where(near, delta, 0.0)
    gap = other + delta - part
    tail = log1p(tl.where(near, weight * x * expm1_ratio(x), tl.exp(-tl.abs(gap))))
    above = tl.where(near, tail, tail + tl.where(gap > 0, other + delta, part))
    beyond = tl.where(near, tl.where(weight < 1, tail - x, 0.0), tail + tl.where(gap > 0, other, part - delta))
    excess = tail + tl.where(near, -part, tl.where(gap > 0, gap, 0.0))
    return above, beyond, tl.where(far == 0, above, excess)


@jit
def _far_kernel(student, teacher, ctx, state, log_norms, label, theta, BLOCK: tl.constexpr):
    return (tl.where(state[3] < 0.5 * state[0], 0.0, 1.0),), ()


def _far_torch(whole: Any, theta: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return (torch.where(whole.near, 0.0, 1.0).to(whole.dtype),)


SATURATING = RowParameters(_far_kernel, _far_torch, 1)
