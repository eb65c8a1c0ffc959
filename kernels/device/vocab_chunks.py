"""Rows that come a vocabulary chunk at a time: what a row has gathered is kept in memory between launches.

    absorb      the statistics sweep over a chunk, from and to `carry`
    add_sums    Σ f, Σ phi over a chunk, for divergences without a one-sweep form
    gradient    dZ of a chunk, from the row scalars

What lies between the sweeps is a few numbers per row and is computed in torch (fusedkd/schedules/partial_rows.py). The
token that holds most of a row's mass is left out of dZ: its entry is minus the sum of all others (backward.py), known
at the end.
"""

from typing import Any

import torch

from ..language import jit, tl
from ..maths.definition import OnlineForm
from ..maths.quantities import Centre, EntropySums, LogNorms, LogSumExp, Maxima
from .args import (
    CARRY,
    DOMINANT,
    EMPTY,
    RowContext,
    RowSums,
    carry_at,
    dominant_at,
    load_carried_state,
    load_carry,
    load_extras,
    load_rest,
    load_scalars,
    load_sums,
    store_carried,
    store_carried_label,
    store_chunk_dominant,
    store_sums,
)
from .backward import gradient_sweep, store_zeros
from .forward import statistics_sweep, term_sweep
from .loads import label_of, load_pair, row_ptrs, row_values
from .rows import Logits, Problem, arguments, gradient_term, tile
from .tiles import Tile

__all__ = ["CARRY", "DOMINANT", "EMPTY", "absorb", "add_sums", "gradient", "online_of", "shares"]


def online_of(problem: Problem) -> OnlineForm:
    """The statistics sweep of a problem."""
    return problem.definition.sweep(problem.parameters)


@jit
def _absorb(
    student, teacher, label_ptr, carry_ptr, stats_ptr, V, first, scales, numbers,
    ADVANCE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers.theta, row)
        mix = row_values(numbers.mix, row)
        at = carry_at(carry_ptr, row, COUNT)
        carry = load_carry(at)
        acc = RowSums(
            Maxima(carry.top_s, carry.top_t, carry.top_mixed),
            load_carried_state(at, COUNT),
            EntropySums(carry.entropy_s, carry.entropy_t, carry.sum_t),
        )
        y = label - first
        ptrs = row_ptrs(student, teacher, row)
        _, acc, cross, _ = statistics_sweep(
            student, teacher, ptrs, y, V, scales, mix, stats_ptr, theta, acc, LogSumExp(carry.ce_top, carry.ce_total),
            ADVANCE, False, BLOCK, THREADS,
        )  # fmt: skip
        store_carried(at, acc, cross)
        here = (label >= 0) & (y >= 0) & (y < V)
        x = load_pair(student, teacher, ptrs, y, here, here)
        store_carried_label(at, x.s, tl.where(x.live, x.t, float("-inf")), here)


@jit
def _add_sums(
    student, teacher, label_ptr, saved_ptr, sums_ptr, V, first, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers.theta, row)
        theta = theta + load_extras(saved_ptr, row, EXTRAS)
        ptrs = row_ptrs(student, teacher, row)
        y = label - first
        mix = row_values(numbers.mix, row)
        scalars = load_scalars(saved_ptr, row)  # a, b and grad_y are not known yet
        centre = Centre(scalars.c_s, scalars.c_t, scalars.k, scalars.m)
        ctx = RowContext(ptrs, y, V, scales.inv_tau, mix, centre)
        log_norms = LogNorms(scalars.l_s, scalars.l_t, scalars.r)
        sums = load_sums(sums_ptr, row)
        sums = term_sweep(student, teacher, ctx, log_norms, theta, sums, TERM, BLOCK, THREADS)
        store_sums(sums_ptr, row, sums)


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, dominant_ptr, grad, V, first, scales, numbers,
    GRADIENT_TERM: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        scalars = load_scalars(saved_ptr, row)
        theta = row_values(numbers.theta, row)
        theta = theta + load_extras(saved_ptr, row, EXTRAS)
        y = label - first
        dominant, _ = gradient_sweep(
            student, teacher, row, y, y, V, scales, row_values(numbers.mix, row), grad, scalars, -1, upstream,
            theta, GRADIENT_TERM, BLOCK, THREADS,
        )  # fmt: skip
        at = dominant_at(dominant_ptr, row)
        rest = dominant.rest + load_rest(at)
        tl.debug_barrier()  # every warp reads the sum, one writes it
        store_chunk_dominant(at, rest, dominant, first)
    else:
        store_zeros(grad, row, BLOCK)


def _tile(problem: Problem, student: Logits, teacher: Logits, width: int) -> Tile:
    return tile(problem._replace(vocab_size=max(width, 1)), student, teacher)


def shares(rows: int, device: torch.device) -> list[slice]:
    """All rows: a launch has a program for each."""
    return [slice(0, rows)]


def absorb(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    carry: torch.Tensor,
    first: int,
    with_stats: bool,
) -> Any:
    """Adds a chunk to `carry` (N, CARRY + online state). problem.vocab_size: how many of its columns are compared."""
    online, count = online_of(problem), carry.shape[1] - CARRY
    best = _tile(problem, student, teacher, student.x.shape[2])
    common = arguments(problem, student, teacher)
    return _absorb[(len(carry),)](
        common["student"], common["teacher"], labels, carry, carry if with_stats else None, problem.vocab_size, first,
        common["scales"], common["numbers"], ADVANCE=online.advance, COUNT=count,
        **best.launch(),
    )  # fmt: skip


def add_sums(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    sums: torch.Tensor,
    first: int,
) -> Any:
    """Adds a chunk's Σ f and Σ phi to `sums` (N, 3), beside the largest d."""
    best = _tile(problem, student, teacher, problem.vocab_size)
    common = arguments(problem, student, teacher)
    return _add_sums[(len(saved),)](
        common["student"], common["teacher"], labels, saved, sums, problem.vocab_size, first, common["scales"],
        common["numbers"], TERM=problem.definition.summand(online_of(problem)),
        EXTRAS=problem.definition.extras, **best.launch(),
    )  # fmt: skip


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
) -> Any:
    """Writes a chunk's dZ into `out` (N, chunk), 0 for the dominant token, which goes into `dominant` (N, DOMINANT)."""
    best = _tile(problem, student, teacher, out.shape[1])
    common = arguments(problem, student, teacher, out)
    return _gradient[(len(out),)](
        common["student"], common["teacher"], labels, saved, upstream, dominant, common["grad"],
        problem.vocab_size, first, common["scales"], common["numbers"], GRADIENT_TERM=gradient_term(problem, out),
        EXTRAS=problem.definition.extras, **best.launch(),
    )  # fmt: skip
