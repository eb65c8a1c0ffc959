"""Rows that come a vocabulary chunk at a time: what a row has gathered is kept in memory between launches.

    absorb      the statistics sweep over a chunk, from and to `carry`
    add_sums    Σ f, Σ phi over a chunk, for divergences without a one-sweep form
    gradient    dZ of a chunk, from the row scalars

What lies between the sweeps is a few numbers per row and is computed in torch (fusedkd/streaming.py). The token that
holds most of a row's mass is left out of dZ: its entry is minus the sum of all others (rows.py), known at the end.
"""

from typing import Any

import torch

from .columns import load_numbers, load_pair, place_of, row_values
from .divergence import Online
from .language import jit, tl
from .rows import Problem, Side, arguments, gradient_sweep, label_of, statistics, store_zeros, term_sums, tile
from .tiles import Tile

CARRY = 10  # three maxima, three entropy sums, CE's maximum and sum, the label's two logits; then the online state
FOUND = 4  # sum of the row's other entries, likeliest token (−1: none), its student logit and that one's slope
EMPTY = (-1e20, -1e20, -1e20, 0.0, 0.0, 0.0, -1e20, 0.0, float("-inf"), float("-inf"))


def online_of(problem: Problem) -> Online:
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
        theta = row_values(numbers[0], row)
        mix = row_values(numbers[2], row)
        at = carry_ptr + row * (10 + COUNT)
        carry = load_numbers(at, 8)
        state = load_numbers(at + 10, COUNT)
        y = label - first
        place = place_of(student, teacher, row)
        _, maxima, state, warmth, ce = statistics(
            student, teacher, place, y, V, scales, mix, stats_ptr, theta,
            (carry[0], carry[1], carry[2]), state, (carry[3], carry[4], carry[5]), (carry[6], carry[7]),
            ADVANCE, False, BLOCK, THREADS,
        )  # fmt: skip
        carry = maxima + warmth + ce
        for i in tl.static_range(8):
            tl.store(at + i, carry[i])
        for i in tl.static_range(COUNT):
            tl.store(at + 10 + i, state[i])
        here = (label >= 0) & (y >= 0) & (y < V)
        s_y, t_y, present, _ = load_pair(student, teacher, place, y, here, here)
        tl.store(at + 8, s_y, mask=here)
        tl.store(at + 9, tl.where(present, t_y, float("-inf")), mask=here)


@jit
def _add_sums(
    student, teacher, label_ptr, saved_ptr, sums_ptr, V, first, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        saved = saved_ptr + row * 14
        theta = row_values(numbers[0], row)
        theta = theta + load_numbers(saved + 12, EXTRAS)
        view = (
            place_of(student, teacher, row),
            label - first,
            V,
            scales[0],
            row_values(numbers[2], row),
            load_numbers(saved, 4),
        )
        at = load_numbers(saved + 4, 3)
        sums = load_numbers(sums_ptr + row * 3, 3)
        sums = term_sums(student, teacher, view, at, theta, sums, TERM, BLOCK, THREADS)
        for i in tl.static_range(3):
            tl.store(sums_ptr + row * 3 + i, sums[i])


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, found_ptr, grad, V, first, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        at = saved_ptr + row * 14
        scalars = load_numbers(at, 11)
        theta = row_values(numbers[0], row)
        theta = theta + load_numbers(at + 12, EXTRAS)
        y = label - first
        top, rest, s_top, slope_top = gradient_sweep(
            student, teacher, row, y, y, V, scales, row_values(numbers[2], row), grad, scalars, upstream, theta, TERM,
            BLOCK, THREADS,
        )  # fmt: skip
        found = found_ptr + row * 4
        rest += tl.load(found)
        tl.debug_barrier()  # every warp reads the sum, one writes it
        tl.store(found, rest)
        tl.store(found + 1, top + first + 0.0, mask=top >= 0)
        tl.store(found + 2, s_top, mask=top >= 0)
        tl.store(found + 3, slope_top, mask=top >= 0)
    else:
        store_zeros(grad, row, BLOCK)


def _tile(problem: Problem, student: Side, teacher: Side, width: int) -> Tile:
    return tile(problem._replace(vocab_size=max(width, 1)), student, teacher)


def absorb(
    problem: Problem,
    student: Side,
    teacher: Side,
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
    student: Side,
    teacher: Side,
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
        common["numbers"], TERM=problem.definition.term, EXTRAS=problem.definition.extras,
        **best.launch(),
    )  # fmt: skip


def gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    found: torch.Tensor,
    out: torch.Tensor,
    first: int,
) -> Any:
    """Writes a chunk's dZ into `out` (N, chunk); the likeliest token is left out and noted in `found` (N, FOUND)."""
    best = _tile(problem, student, teacher, out.shape[1])
    common = arguments(problem, student, teacher)
    return _gradient[(len(out),)](
        common["student"], common["teacher"], labels, saved, upstream, found, (out, *out.stride(), out.shape[1]),
        problem.vocab_size, first, common["scales"], common["numbers"], TERM=problem.definition.term,
        EXTRAS=problem.definition.extras, **best.launch(),
    )  # fmt: skip
