"""The row work of the streaming schedule in plain torch, with the interface of kernels/device/vocab_chunks.py.

Here the online forms of the divergences run in torch too: their twins sum over the last axis (kernels/language.py).
"""

from collections.abc import Iterator
from typing import Any

import torch

from ..kernels.device.args import Carry, Dominant, RowScalars, columns_of, extras_of
from ..kernels.device.rows import Logits, Problem
from ..kernels.device.vocab_chunks import CARRY, online_of
from ..kernels.maths.centering import centred, raise_maxima
from ..kernels.maths.decomposition import ABSENT
from ..kernels.maths.elementary import exp
from ..kernels.maths.moments import cross_entropy_advance, entropies_advance
from ..kernels.maths.quantities import Centre
from .torch_rows import columnwise, logits, or_unknown, row_blocks


def absorb(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    carry: torch.Tensor,
    first: int,
    with_stats: bool,
) -> None:
    """Adds a chunk to `carry`, as device.vocab_chunks.absorb."""
    advance = online_of(problem).advance.torch
    for rows, s, t, live, _ in _blocks(problem, student, teacher, labels, carry):
        own: Any = columns_of(Carry, carry[rows], keepdim=True)
        maxima, entropy_sums, ce = own[:3], own[3:6], own[6:8]
        state: Any = tuple(carry[rows, CARRY:].unsqueeze(-1).unbind(1))
        if problem.ce_weight:
            ce = cross_entropy_advance.torch(ce, s, torch.ones_like(s, dtype=torch.bool))
        s, t, live = s[:, : problem.vocab_size], t[:, : problem.vocab_size], live[:, : problem.vocab_size]
        label = _local(labels, rows, first)
        picked = [own.label_s, own.label_t]
        if label is not None and problem.vocab_size:
            here = (label >= 0) & (label < problem.vocab_size)
            at = label.clamp(0, problem.vocab_size - 1)
            seen = live.gather(1, at)
            picked = [
                torch.where(here, or_unknown(s.gather(1, at)), picked[0]),
                torch.where(here, torch.where(seen, or_unknown(t.gather(1, at)), -torch.inf), picked[1]),
            ]
            live = live.scatter(1, at, seen & ~here)
        s, t = (torch.where(live, x, ABSENT) for x in (s, t))  # what does not count may then be called live
        if problem.vocab_size:
            inv_tau, mix = 1.0 / problem.temperature, _mix(problem, rows, carry)
            maxima, centre, move, own_log_t = raise_maxima.torch(maxima, s, t, True, inv_tau, mix)
            z, u, d = centred.torch(s, t, centre, inv_tau, mix)
            if with_stats:
                _, plain, _ = centred.torch(s, t, centre, inv_tau, ())
                entropy_sums = entropies_advance.torch(entropy_sums, state[0], move[0], own_log_t, z, plain, True)
            state = advance(state, move, z, u, d, exp.torch(z), exp.torch(u), True, _theta(problem, rows, carry))
        carry[rows] = torch.cat((*maxima, *entropy_sums, *ce, *picked, *state), -1)


def add_sums(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    sums: torch.Tensor,
    first: int,
) -> None:
    """Adds a chunk's Σ f and Σ phi, as device.vocab_chunks.add_sums."""
    for rows, s, t, live, _ in _blocks(problem, student, teacher, labels, saved):
        _, d, f, phi = _terms(problem, rows, s, t, saved)
        live = _without(live, _local(labels, rows, first))
        total, mass, widest = sums[rows].unbind(-1)
        f, phi = torch.where(live, f, 0.0), torch.where(live, phi, 0.0)
        far = torch.maximum(widest, torch.where(live, d, 0.0).amax(-1))
        sums[rows] = torch.stack((total + f.sum(-1), mass + phi.sum(-1), far), -1)


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    dominant: torch.Tensor,
    out: torch.Tensor,
    first: int,
) -> None:
    """A chunk's dZ without the dominant token, as device.vocab_chunks.gradient."""
    V = problem.vocab_size
    for rows, s, t, live, slope in _blocks(problem, student, teacher, labels, saved, out):
        scalars = columns_of(RowScalars, saved[rows], keepdim=True)
        a, b, grad_y, ce_lse = scalars.a, scalars.b, scalars.grad_y, scalars.ce_lse
        up = upstream[rows].unsqueeze(-1)
        idle = up == 0  # its gradient is 0, whatever the row holds
        label = _local(labels, rows, first)
        g = torch.zeros_like(s)
        before = columns_of(Dominant, dominant[rows], keepdim=True)
        rest = before.rest
        dominates = torch.zeros_like(s, dtype=torch.bool)
        if V:
            q, _, _, phi = _terms(problem, rows, s[:, :V], t[:, :V], saved)
            live = live[:, :V]
            inner = torch.where(live, a * phi + b * q, 0.0)
            hot = live & (q > 0.5) & ~idle
            if label is not None:
                at = (torch.arange(V, device=s.device) == label) & live
                inner, hot = torch.where(at, grad_y, inner), hot & ~at
            g[:, :V], dominates[:, :V] = inner.masked_fill(s[:, :V] <= ABSENT, 0.0), hot
            rest = rest + torch.where(hot, 0.0, inner).sum(-1, keepdim=True)
        g *= up * (problem.factor / problem.temperature)
        if problem.ce_weight:
            one = torch.zeros_like(s)
            if label is not None:
                one = (torch.arange(s.shape[1], device=s.device) == label).to(s.dtype)
            g += up * problem.ce_weight * (exp.torch(s - ce_lse) - one)
        slope = slope if isinstance(slope, torch.Tensor) else torch.full_like(s, slope)
        top = dominates.to(torch.int8).argmax(-1, keepdim=True)
        now = Dominant(top + float(first), rest, s.gather(1, top), slope.gather(1, top))
        has = dominates.any(-1, keepdim=True)
        dominant[rows] = torch.where(has, torch.cat(now, -1), torch.cat(before._replace(rest=rest), -1))
        out[rows] = (g * slope).masked_fill_(dominates, 0.0).masked_fill_(idle, 0.0).to(out.dtype)


def _blocks(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    like: torch.Tensor,
    out: torch.Tensor | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Counted rows, student logits over the chunk, teacher logits beside them (−1e30 beyond), compared columns, slope.

    Other rows of `out` are zeroed.
    """
    width, V = student.x.shape[2], problem.vocab_size
    if problem.ce_weight == 0:
        width = V
    for rows in row_blocks(width, labels, len(like), like.device, out):
        s, slope = logits(student, rows, width, like.dtype)
        t, _ = logits(teacher, rows, V, like.dtype)
        live = t != -torch.inf  # true of a NaN, which must show
        t = torch.nn.functional.pad(t.clamp(min=ABSENT), (0, width - V), value=ABSENT)
        live = torch.nn.functional.pad(live, (0, width - V), value=False)
        yield rows, s.clamp(min=ABSENT), t, live, slope


def _terms(
    problem: Problem, rows: torch.Tensor | slice, s: torch.Tensor, t: torch.Tensor, saved: torch.Tensor
) -> tuple[Any, ...]:
    """q, d, f and phi at the final offsets."""
    scalars = columns_of(RowScalars, saved[rows], keepdim=True)
    z, u, d = centred.torch(s, t, Centre(*scalars[:4]), 1.0 / problem.temperature, _mix(problem, rows, saved))
    logq, logp = z - scalars.l_s, u - scalars.l_t
    theta = (*_theta(problem, rows, saved), *extras_of(saved[rows], problem.definition.extras, keepdim=True))
    q = exp.torch(logq)
    f, phi = problem.definition.term.torch(q, exp.torch(logp), logq, logp, d - scalars.r, theta)
    return q, d, f, phi


def _local(labels: torch.Tensor | None, rows: torch.Tensor | slice, first: int) -> torch.Tensor | None:
    """(n, 1) columns of the labels in the chunk; out of its range where they lie elsewhere."""
    if labels is None:
        return None
    label = labels[rows].unsqueeze(-1)
    return label - first


def _without(live: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    return live if label is None else live & (torch.arange(live.shape[1], device=live.device) != label)


def _theta(problem: Problem, rows: torch.Tensor | slice, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return columnwise(problem.parameters, rows, like)


def _mix(problem: Problem, rows: torch.Tensor | slice, like: torch.Tensor) -> tuple[Any, ...]:
    return () if problem.mix is None else columnwise((problem.mix,), rows, like)
