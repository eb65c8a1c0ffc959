"""The value of rows that are nowhere whole: their columns come in parts, one after the other or from several ranks.

    absorb      each part's statistics, as a row's tiles have them, are added to the row's `carry`
    ranks       the carries of all ranks are gathered, and merged by each in the order of the ranks
    add_sums    Σ f, Σ phi of each part, for divergences without a one-sweep form; the ranks' are added up
    finish      loss, statistics and row scalars, from which the gradient of every part follows

What lies between the sweeps is a few numbers per row and is computed in torch, from the kernels' formulas.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import torch_chunks
from ..backends.protocol import ChunkBackend
from ..backends.torch_rows import finish_rows, in_threads, values_at
from ..kernels.device.args import (
    CARRY,
    EMPTY,
    SAVED,
    STATS,
    TERM_SUMS,
    Carry,
    RowScalars,
    TermSums,
    TokenStats,
    columns_of,
    extras_of,
)
from ..kernels.device.rows import Logits, Problem
from ..kernels.device.vocab_chunks import online_of
from ..kernels.maths.decomposition import ABSENT, finalize_normalizers, or_infinite, side_stats
from ..kernels.maths.moments import log_sum
from ..kernels.maths.quantities import Binary, LogNorms, RowNorms, SideStats
from .ranks import Ranks

GATHERED = 8192  # rows of which every rank's numbers are held at once


class _Row(NamedTuple):
    """What `RowParameters.torch` may ask of rows that were never whole."""

    state: tuple[Tensor, ...]
    log_norms: LogNorms


class _RowNorms(NamedTuple):
    """Everything about the rows that does not need the sums: (n,) each."""

    saved: Tensor  # (n, SAVED), the gradient's a, b and grad_y still 0
    binary: Binary
    extras: tuple[Tensor, ...]  # parameters that the rows found for themselves
    in_support: Tensor
    no_columns: Tensor  # nothing to compare but the label
    state: tuple[Tensor, ...]  # the online state
    student: SideStats | None
    teacher: SideStats | None


class Rows(NamedTuple):
    """Loss (N,), statistics (N, STATS) or (0, STATS), and saved row scalars (N, SAVED)."""

    loss: Tensor
    stats: Tensor
    saved: Tensor


class Part(NamedTuple):
    """Some columns of some rows."""

    first: int  # the vocabulary's number of their first column
    problem: Problem  # on these columns, of which its vocab_size are compared
    student: Logits
    teacher: Logits


class PartialRows(NamedTuple):
    """N rows of a problem, and where their parts come from."""

    problem: Problem
    labels: Tensor | None
    like: Tensor  # of the dtype and the device of losses
    chunks: ChunkBackend
    shares: list[slice]  # the rows of each thread
    parts: Callable[[slice], Iterable[Part]]  # those of some rows, one after the other
    ranks: Ranks | None = None  # those that have other columns
    # (online state, RowNorms) -> the parameters that rows find from all their columns, where they have to be whole
    extras: Callable[[tuple[Tensor, ...], RowNorms], tuple[Tensor, ...]] | None = None

    def value(self, n: int, with_stats: bool) -> Rows:
        """The value of every row, and what its gradient needs to know of it."""
        carry = self._carry(n, with_stats)
        norms = _row_norms(self, carry, with_stats)
        total, mass = self._sums(norms, carry)
        return _finish_rows(self.problem, columns_of(Carry, carry), norms, total, mass, self.labels)

    def _carry(self, n: int, with_stats: bool) -> Tensor:
        """What the rows have gathered of all their columns, (n, CARRY + online state)."""
        problem = self.problem
        carry = self.like.new_zeros((n, CARRY + len(online_of(problem).init.torch())))
        for column, value in zip(columns_of(Carry, carry), EMPTY, strict=True):
            column.fill_(value)

        def absorb(rows: slice) -> None:
            for x in self.parts(rows):
                label = self._labels(rows)
                self.chunks.absorb(x.problem, x.student, x.teacher, label, carry[rows], x.first, with_stats)

        in_threads(absorb, self.shares, len(self.shares))
        if self.ranks is not None:
            for start in range(0, n, GATHERED):
                rows = slice(start, min(start + GATHERED, n))
                every = self.ranks.gathered(carry[rows]).unbind()
                carry[rows] = torch_chunks.merged(problem, rows, every, with_stats)
        return carry

    def _sums(self, norms: "_RowNorms", carry: Tensor) -> tuple[Tensor, Tensor]:
        """F and Φ of the rows, (n,) each."""
        problem, sums_of = self.problem, online_of(self.problem).sums
        if sums_of is not None:
            scalars = columns_of(RowScalars, norms.saved)
            theta = (*values_at(problem.parameters, slice(None), carry), *norms.extras)
            return sums_of.traced(norms.state, scalars.l_s, scalars.l_t, scalars.r, theta)
        memory = carry.new_zeros((len(carry), TERM_SUMS))

        def add_sums(rows: slice) -> None:
            for x in self.parts(rows):
                if x.problem.vocab_size:
                    label, saved = self._labels(rows), norms.saved[rows]
                    self.chunks.add_sums(x.problem, x.student, x.teacher, label, saved, memory[rows], x.first)

        in_threads(add_sums, self.shares, len(self.shares))
        sums = columns_of(TermSums, memory)
        if self.ranks is not None:
            every = TermSums(*self.ranks.gathered(memory).unbind(-1))  # (R, n) each
            sums = TermSums(every.total.sum(0), every.mass.sum(0), every.widest.amax(0))
        return or_infinite.torch(sums.total, sums.widest), sums.mass

    def _labels(self, rows: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[rows]


def _row_norms(rows: PartialRows, memory: Tensor, with_stats: bool) -> _RowNorms:
    """The rows' normalisers from what (n, CARRY + online state) has gathered of all columns."""
    problem, labels = rows.problem, rows.labels
    carry, state = columns_of(Carry, memory), memory[:, CARRY:].unbind(-1)
    inv_tau = 1.0 / problem.temperature
    mix = () if problem.mix is None else values_at((problem.mix,), slice(None), memory)
    s_y, t_y = carry.label_s.clamp(min=ABSENT), carry.label_t
    in_support = torch.zeros_like(s_y, dtype=torch.bool) if labels is None else (labels >= 0) & ~torch.isneginf(t_y)
    t_y = t_y.clamp(min=ABSENT)
    maxima = (carry.top_s, carry.top_t, carry.top_mixed)
    norms = finalize_normalizers.torch(
        maxima, state, s_y, t_y, in_support, inv_tau, mix, online_of(problem).ratio.torch, problem.decoupled
    )
    c, own, no_columns = norms.centre, norms.own, state[1] == 0
    row_parameters, extras = problem.definition.row_parameters, ()
    if rows.extras is not None:
        extras = rows.extras(state, norms)
    elif row_parameters is not None:
        theta = values_at(problem.parameters, slice(None), memory)
        extras = row_parameters.torch(_Row(state, norms.log_norms), theta)
    ce_lse = carry.ce_top + log_sum.torch(carry.ce_total)
    later = torch.zeros_like(ce_lse)
    scalars = RowScalars(*c, *norms.log_norms, a=later, b=later, grad_y=later, ce_lse=ce_lse, top_col=later - 1)
    student = teacher = None
    if with_stats:
        own_t = log_sum.torch(carry.sum_t)
        student = side_stats.torch(
            own.log_zs, carry.entropy_s, own.z_y, c.c_s * inv_tau, s_y * inv_tau, in_support, no_columns
        )
        teacher = side_stats.torch(
            own_t, carry.entropy_t, own.own_u_y, (c.c_t + c.k) * inv_tau, t_y * inv_tau, in_support, no_columns
        )
    return _RowNorms(
        _saved(memory, scalars, extras), norms.binary, tuple(extras), in_support, no_columns, state, student, teacher
    )


def _saved(like: Tensor, scalars: RowScalars, extras: Sequence[Tensor]) -> Tensor:
    """Row scalars in memory, (n, SAVED), as kernels read them; the target is the label's affair."""
    saved = like.new_zeros((len(like), SAVED))
    for column, value in zip(columns_of(RowScalars, saved), scalars, strict=True):
        column[:] = value  # m is a number where no teacher is mixed
    for column, value in zip(extras_of(saved, len(extras)), extras, strict=True):
        column[:] = value
    return saved


def _finish_rows(
    problem: Problem, carry: Carry, norms: _RowNorms, total: Tensor, mass: Tensor, labels: Tensor | None
) -> Rows:
    """Loss, statistics and saved scalars from the sums; zeros in ignored rows."""
    theta = (*values_at(problem.parameters, slice(None), total), *norms.extras)
    result, terms, slopes = finish_rows(
        problem, slice(None), norms.binary, norms.in_support, norms.no_columns, theta, total, mass
    )
    scalars = columns_of(RowScalars, norms.saved)
    for column, value in zip((scalars.a, scalars.b, scalars.grad_y), slopes, strict=True):
        column.copy_(value)
    out = result * problem.factor
    if problem.ce_weight:
        label_s = torch.where(carry.label_s <= ABSENT, -torch.inf, carry.label_s)
        out = out + problem.ce_weight * (scalars.ce_lse - label_s)
    counted = None if labels is None else labels >= 0
    stats = out.new_empty((0, STATS))
    if norms.student is not None and norms.teacher is not None:
        stats = torch.stack(_stats(result, terms, norms.student, norms.teacher, norms.no_columns, labels is None), -1)
    if counted is not None:
        out = torch.where(counted, out, 0.0)
        stats = torch.where(counted.unsqueeze(-1), stats, 0.0) if len(stats) else stats
        norms.saved.masked_fill_(~counted.unsqueeze(-1), 0.0)
    return Rows(out, stats, norms.saved)


def _stats(
    loss: Tensor, terms: list[Tensor], student: SideStats, teacher: SideStats, no_columns: Tensor, no_target: bool
) -> TokenStats:
    """Statistics of the rows: 0 where nothing is compared, NaN about a target that there is not."""
    unknown = torch.full_like(loss, torch.nan)
    target_loss, nontarget_loss, target_grad, nontarget_grad = (
        unknown if no_target else torch.where(no_columns, 0.0, x) for x in terms
    )
    return TokenStats(
        loss, target_loss, nontarget_loss, target_grad, nontarget_grad,
        student_entropy=student.entropy, teacher_entropy=teacher.entropy,
        student_logprob=unknown if no_target else student.logprob,
        teacher_logprob=unknown if no_target else teacher.logprob,
        student_lse=student.lse, teacher_lse=teacher.lse,
    )  # fmt: skip
