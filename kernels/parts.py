"""A row by several programs, one tile each: for few rows, which alone leave a GPU empty, and for reading rows once.

What a program finds in its tile it leaves in memory for the others of its row:

    deposit      the statistics of the tile
    sums         Σ f, Σ phi of the tile, for divergences without a one-sweep form
    conclude     loss, statistics and row scalars from all parts of a row: one program per row
    gradient     the tile's gradient from the row scalars

    value        deposit (sums) conclude
    gradient     gradient
    value_and_gradient     all of them
    one_read     all of them in one launch: the tile stays in registers, so that a logit is read once

Parts merge as running sums follow a raised maximum (online.py), all in one step and in the order of the vocabulary, so
the order in which programs run changes no bit. The last program to finish a row's gradient writes the entry of the
likeliest token, which is minus the sum of all others (rows.py).

In `one_read` programs wait for the others of their row. They take tiles in the order of tickets, so every row before
the last one begun has all its programs running or done, and these need no more programs to end: nothing waits for ever
as long as one row's programs fit on the device together. The interpreter runs programs one after the other, so there
the phases are launches of their own.

No path here has been timed on a GPU ("not measured").
"""

from typing import Any

import torch

from .columns import (
    as_numbers,
    at_offsets,
    finite,
    load_numbers,
    load_pair,
    no_maxima,
    place_of,
    row_values,
)
from .language import interpreted, jit, tl, triton
from .online import cross_entropy_advance
from .rows import (
    SAVED,
    Problem,
    Side,
    add_terms,
    all_found,
    arguments,
    close,
    gradient_tile,
    ignore,
    label_of,
    line,
    merge,
    nothing_found,
    store_likeliest,
    store_saved,
    store_zero_tile,
    sweep_of,
    take_tile,
    upstream_of,
)
from .split import meet, or_infinite
from .streaming import CARRY, online_of
from .tiles import FUSION, Tile

_PROGRAMS = 256  # two for every multiprocessor of the largest GPUs; smaller tiles for fewer rows, down to
SMALLEST = 1024
# The largest tiles, by class and bytes per logit as in tiles.py: one stays in registers through all phases, and all
# programs of a row must be on a GPU together. Compiled without spilling; not measured.
WHOLE = {
    ("light", 2): Tile(4096, 16, 128),
    ("light", 4): Tile(4096, 16, 128),
    ("two", 2): Tile(2048, 8, 255),
    ("two", 4): Tile(2048, 16, 128),
    ("heavy", 2): Tile(2048, 8, 255),
    ("heavy", 4): Tile(2048, 8, 255),
}


@jit
def _tile_of(student, teacher, row, part, V, scales, BLOCK: tl.constexpr):
    """Logits, which columns are compared (the label's too), the student's slope, columns."""
    seen = V
    if scales[2] is not None:
        seen = scales[2][1]
    cols = part * BLOCK + tl.arange(0, BLOCK)
    s, t, live, slope = load_pair(student, teacher, place_of(student, teacher, row), cols, cols < V, cols < seen)
    return s, t, live, slope, cols


@jit
def _only(x, there):
    """The one number of x that is there, −inf if none is: a maximum would drop NaN."""
    return tl.where(tl.max(tl.where(there, 1, 0)) > 0, tl.sum(tl.where(there, x, 0.0)), float("-inf"))


@jit
def _leave_statistics(columns, label, scales, mix, stats_ptr, theta, at, INIT, ADVANCE, COUNT: tl.constexpr):
    """A tile's statistics into memory at `at`."""
    s, t, live, slope, cols = columns
    inv_tau, factor, ce = scales
    cross = as_numbers((-1e20, 0.0))
    if ce is not None:
        cross = cross_entropy_advance(cross, s, cols < ce[1])
    nothing = (as_numbers(no_maxima()), as_numbers(INIT()), as_numbers((0.0, 0.0, 0.0)))
    maxima, state, warmth = take_tile(s, t, live & (cols != label), nothing, inv_tau, mix, stats_ptr, theta, ADVANCE)
    mine = cols == label
    found = maxima + warmth + cross + (_only(s, mine), _only(t, mine & live)) + state
    for i in tl.static_range(10 + COUNT):
        tl.store(at + i, found[i])


@jit
def _lanes(at, there, COUNT: tl.constexpr, other):
    """COUNT numbers of each part of a row. Past the first cache, which knows nothing of other programs' stores."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(at + i, mask=there, other=other, cache_modifier=".cg"),)
    return out


@jit
def _merged(partial_ptr, row, parts, inv_tau, mix, stats_ptr, theta, ADVANCE, COUNT: tl.constexpr, LANES: tl.constexpr):
    """A row's maxima, online state, entropy sums, CE's maximum and sum, and the label's two logits."""
    lane = tl.arange(0, LANES)
    there = lane < parts
    at = partial_ptr + (row * parts + lane) * (10 + COUNT)
    maxima = _lanes(at, there, 3, -1e20)
    warmth = _lanes(at + 3, there, 3, 0.0)
    tops = tl.load(at + 6, mask=there, other=-1e20, cache_modifier=".cg")
    exps = tl.load(at + 7, mask=there, other=0.0, cache_modifier=".cg")
    label_logits = _lanes(at + 8, there, 2, float("-inf"))
    state = _lanes(at + 10, there, COUNT, 0.0)
    whole, state, warmth, cross = merge(
        maxima, state, warmth, (tops, exps), lane, inv_tau, mix, stats_ptr, theta, ADVANCE
    )
    s_y, t_y = label_logits
    return whole, state, warmth, cross, (_only(s_y, s_y != float("-inf")), _only(t_y, t_y != float("-inf")))


@jit
def _met(
    partial_ptr, row, parts, scales, mix, stats_ptr, theta,
    ADVANCE, RATIO, GATHER, DECOUPLED: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The row's offsets (split.py: meet), what `_concluded` needs beside them, and what the row adds to theta."""
    maxima, state, warmth, cross, at_label = _merged(
        partial_ptr, row, parts, scales[0], mix, stats_ptr, theta, ADVANCE, COUNT, LANES
    )
    s_y, t_y = at_label
    present = t_y != float("-inf")
    target = (finite(s_y), finite(t_y), present)
    met = meet(maxima, state, target[0], target[1], present, scales[0], mix, RATIO, DECOUPLED)
    extras = ()
    if GATHER is not None:  # of those that look at the online state alone
        extras, _ = GATHER(None, None, None, state, met[1], None, theta, 0)
    return (met, state, warmth, cross, target), extras


@jit
def _leave_sums(columns, label, inv_tau, mix, met, theta, at, TERM):
    """A tile's Σ f, Σ phi and largest d into memory at `at`."""
    s, t, live, slope, cols = columns
    centre, at_row, pair, own = met
    q, p, logq, logp, delta, d = at_offsets(s, t, centre, at_row, inv_tau, mix)
    f, phi = TERM(q, p, logq, logp, delta, theta)
    sums = add_terms(as_numbers((0.0, 0.0, 0.0)), f, phi, d, live & (cols != label))
    for i in tl.static_range(3):
        tl.store(at + i, sums[i])


@jit
def _concluded(
    sums_ptr, row, parts, label, scales, loss_ptr, stats_ptr, gathered, theta, weights,
    TERM, SUMS, DECOUPLED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Stores loss and statistics where there is room for them; returns the row scalars."""
    met, state, warmth, cross, target = gathered
    s_y, t_y, present = target
    if SUMS is None:
        lane = tl.arange(0, LANES)
        total, mass, widest = _lanes(sums_ptr + (row * parts + lane) * 3, lane < parts, 3, 0.0)
        total = or_infinite(tl.sum(total), tl.max(widest))
        mass = tl.sum(mass)
    else:
        l_s, l_t, r = met[1]
        total, mass = SUMS(state, l_s, l_t, r, theta)
    ends = (total, mass, cross, tl.where(s_y <= -1e30, float("-inf"), s_y))
    return close(
        row, scales, loss_ptr, stats_ptr, state, warmth, ends, (s_y, t_y, present, label >= 0), met, theta,
        weights[0], weights[1], TERM, DECOUPLED,
    )  # fmt: skip


@jit
def _write(
    columns, student, row, part, parts, label, scales, mix, grad, scalars, upstream, theta, found_ptr, arrived_ptr,
    TERM, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient; whoever is last of the row also writes the likeliest token's entry."""
    found = gradient_tile(
        columns, row, label, label, scales, mix, student[8], grad, scalars, upstream, theta, nothing_found(1), TERM,
    )  # fmt: skip
    top, rest, s_top, slope_top = all_found(found, student)
    at = found_ptr + (row * parts + part) * 4
    tl.store(at, top + 0.0)
    tl.store(at + 1, rest)
    tl.store(at + 2, s_top)
    tl.store(at + 3, tl.where(top >= 0, slope_top, 0.0))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1:
        lane = tl.arange(0, LANES)
        tops, rests, logits, slopes = _lanes(found_ptr + (row * parts + lane) * 4, lane < parts, 4, 0.0)
        likeliest = tl.max(tl.where(lane < parts, tops, -1.0)).to(tl.int32)
        whole = (likeliest, tl.sum(rests), tl.sum(logits), tl.sum(slopes))
        store_likeliest(row, label, scales, grad, whole, scalars[10], upstream)


@jit
def _deposit(
    student, teacher, label_ptr, stats_ptr, room, V, scales, numbers,
    INIT: tl.constexpr, ADVANCE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    partial_ptr, _, _, _, parts = room
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    label, counted = label_of(label_ptr, row)
    if counted:
        columns = _tile_of(student, teacher, row, part, V, scales, BLOCK)
        at = partial_ptr + (row * parts + part) * (10 + COUNT)
        _leave_statistics(
            columns, label, scales, row_values(numbers[2], row), stats_ptr, row_values(numbers[0], row), at,
            INIT, ADVANCE, COUNT,
        )  # fmt: skip


@jit
def _sums(
    student, teacher, label_ptr, room, V, scales, numbers,
    TERM: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, GATHER: tl.constexpr, DECOUPLED: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    partial_ptr, sums_ptr, _, _, parts = room
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers[0], row)
        mix = row_values(numbers[2], row)
        gathered, extras = _met(
            partial_ptr, row, parts, scales, mix, None, theta, ADVANCE, RATIO, GATHER, DECOUPLED, COUNT, LANES
        )
        columns = _tile_of(student, teacher, row, part, V, scales, BLOCK)
        _leave_sums(
            columns, label, scales[0], mix, gathered[0], theta + extras, sums_ptr + (row * parts + part) * 3, TERM
        )


@jit
def _conclude(
    label_ptr, loss_ptr, saved_ptr, stats_ptr, room, scales, numbers,
    TERM: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr, GATHER: tl.constexpr,
    DECOUPLED: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    partial_ptr, sums_ptr, _, _, parts = room
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers[0], row)
        gathered, extras = _met(
            partial_ptr, row, parts, scales, row_values(numbers[2], row), stats_ptr, theta,
            ADVANCE, RATIO, GATHER, DECOUPLED, COUNT, LANES,
        )  # fmt: skip
        scalars = _concluded(
            sums_ptr, row, parts, label, scales, loss_ptr, stats_ptr, gathered, theta + extras,
            row_values(numbers[1], row), TERM, SUMS, DECOUPLED, LANES,
        )  # fmt: skip
        store_saved(saved_ptr, row, scalars + (label + 0.0,) + extras)
    else:
        ignore(row, loss_ptr, stats_ptr)
        store_saved(saved_ptr, row, ())


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, room, V, scales, numbers,
    TERM: tl.constexpr, EXTRAS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, _, found_ptr, meeting_ptr, parts = room
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    label, counted = label_of(label_ptr, row)
    upstream = upstream_of(upstream_ptr, row)
    if counted & (upstream != 0):
        columns = _tile_of(student, teacher, row, part, V, scales, BLOCK)
        theta = row_values(numbers[0], row)
        theta = theta + load_numbers(saved_ptr + row * 14 + 12, EXTRAS)
        _write(
            columns, student, row, part, parts, label, scales, row_values(numbers[2], row), grad,
            load_numbers(saved_ptr + row * 14, 11), upstream, theta, found_ptr, meeting_ptr + 1 + row * 3,
            TERM, LANES, BLOCK,
        )  # fmt: skip
    else:
        store_zero_tile(grad, row, part * BLOCK, BLOCK)


@jit
def _wait(arrived_ptr, parts):
    """Until all programs of the row have been here."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < parts:
        pass


@jit
def _one_read(
    student, teacher, about_rows, out, grad, room, V, scales, numbers,
    TERM: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    GATHER: tl.constexpr, DECOUPLED: tl.constexpr, LANES: tl.constexpr, PHASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(INIT())
    label_ptr, upstream_ptr = about_rows
    loss_ptr, stats_ptr = out
    partial_ptr, sums_ptr, found_ptr, meeting_ptr, parts = room
    if PHASE == 0:
        ticket = tl.atomic_add(meeting_ptr, 1, scope="gpu")
    else:
        ticket = tl.program_id(0)
    row = (ticket // parts).to(tl.int64)
    part = ticket % parts
    arrived_ptr = meeting_ptr + 1 + row * 3  # behind the tickets
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers[0], row)
        mix = row_values(numbers[2], row)
        columns = _tile_of(student, teacher, row, part, V, scales, BLOCK)
        if PHASE == 0 or PHASE == 1:
            at = partial_ptr + (row * parts + part) * (10 + COUNT)
            _leave_statistics(columns, label, scales, mix, stats_ptr, theta, at, INIT, ADVANCE, COUNT)
        if PHASE == 0:
            _wait(arrived_ptr, parts)
        if PHASE != 1:
            gathered, extras = _met(
                partial_ptr, row, parts, scales, mix, stats_ptr, theta, ADVANCE, RATIO, GATHER, DECOUPLED, COUNT, LANES
            )
            theta = theta + extras
            if SUMS is None:
                if PHASE == 0 or PHASE == 2:
                    at = sums_ptr + (row * parts + part) * 3
                    _leave_sums(columns, label, scales[0], mix, gathered[0], theta, at, TERM)
                if PHASE == 0:
                    _wait(arrived_ptr + 1, parts)
            if PHASE == 0 or PHASE == 3:
                # Every program of the row concludes; all store the same bits.
                scalars = _concluded(
                    sums_ptr, row, parts, label, scales, loss_ptr, stats_ptr, gathered, theta,
                    row_values(numbers[1], row), TERM, SUMS, DECOUPLED, LANES,
                )  # fmt: skip
                upstream = upstream_of(upstream_ptr, row)
                if upstream != 0:
                    _write(
                        columns, student, row, part, parts, label, scales, mix, grad, scalars, upstream, theta,
                        found_ptr, arrived_ptr + 2, TERM, LANES, BLOCK,
                    )  # fmt: skip
    elif PHASE == 0 or PHASE == 3:
        ignore(row, loss_ptr, stats_ptr)
    if PHASE == 0 or PHASE == 3:
        if not (counted & (upstream_of(upstream_ptr, row) != 0)):
            store_zero_tile(grad, row, part * BLOCK, BLOCK)


class _Layout:
    """Tile, programs per row and room for what they leave each other."""

    def __init__(self, problem: Problem, student: Side, rows: int, best: Tile) -> None:
        self.rows = rows
        self.width = student.x.shape[2]
        self.tile = best
        self.parts = triton.cdiv(self.width, best.block)
        self.sweep = sweep_of(problem)
        self.counts = {
            "COUNT": len(online_of(problem).init.torch()),
            "LANES": triton.next_power_of_2(self.parts),
        }
        self.device = student.x.device

    def room(self) -> tuple[Any, ...]:
        """Deposits, sums, what the gradient found; tickets and each row's arrivals at three meetings; the parts."""
        numbers = (CARRY + self.counts["COUNT"], 3, 4)
        places = (torch.empty(self.rows * self.parts * n, device=self.device, dtype=torch.float32) for n in numbers)
        meeting = torch.zeros(3 * self.rows + 1, device=self.device, dtype=torch.int32)
        return (*places, meeting, self.parts)

    def chosen(self, *names: str) -> dict[str, Any]:
        """Some of the compile-time arguments."""
        every = self.sweep | self.counts
        return {name: every[name] for name in names}


def _whole(problem: Problem, student: Side, teacher: Side) -> Tile:
    _, kind, width = line(problem, student, teacher)
    return WHOLE[kind, width]


def _tile(problem: Problem, student: Side, teacher: Side, rows: int) -> Tile:
    """A tile small enough for the rows to give programs enough."""
    best = _whole(problem, student, teacher)
    block, warps = best.block, best.num_warps
    while block > SMALLEST and rows * triton.cdiv(student.x.shape[2], block) < _PROGRAMS:
        block, warps = block // 2, max(warps // 2, min(warps, 4))
    return Tile(block, warps, best.registers)


def serves(problem: Problem) -> bool:
    """Whether a row of this problem can be shared: not where it is searched or swept again as a whole."""
    return problem.definition.separable and not problem.argmax


def _check(problem: Problem) -> None:
    if not serves(problem):
        raise ValueError(f"divergence {problem.definition.name!r} with these options needs a whole row in one program")


def value(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """As rows.value."""
    _check(problem)
    if len(loss):
        plan = _Layout(problem, student, len(loss), _tile(problem, student, teacher, len(loss)))
        given = arguments(problem, student, teacher)
        sides = {key: given[key] for key in ("student", "teacher", "V")}
        common = {"label_ptr": labels, "room": plan.room(), "scales": given["scales"], "numbers": given["numbers"]}
        options = {"BLOCK": plan.tile.block, **plan.tile.options()}
        grid = (plan.rows * plan.parts,)
        _deposit[grid](**sides, **common, stats_ptr=stats, **plan.chosen("INIT", "ADVANCE", "COUNT"), **options)
        shared = {"TERM": given["TERM"], **plan.chosen("ADVANCE", "RATIO", "GATHER", "DECOUPLED", "COUNT", "LANES")}
        if plan.sweep["SUMS"] is None:
            _sums[grid](**sides, **common, **shared, **options)
        kept = loss.new_empty((plan.rows, SAVED)) if saved is None else saved
        _conclude[(plan.rows,)](
            **common,
            loss_ptr=loss,
            saved_ptr=kept,
            stats_ptr=stats,
            **shared,
            SUMS=plan.sweep["SUMS"],
            num_warps=1,
            **FUSION,
        )


def gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As rows.gradient."""
    _check(problem)
    if len(out):
        plan = _Layout(problem, student, len(out), _tile(problem, student, teacher, len(out)))
        given = arguments(problem, student, teacher)
        del given["ARGMAX"]
        _gradient[(plan.rows * plan.parts,)](
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream, grad=(out, *out.stride(), out.shape[1]),
            room=plan.room(), **given, EXTRAS=problem.definition.extras, LANES=plan.counts["LANES"],
            BLOCK=plan.tile.block, **plan.tile.options(),
        )  # fmt: skip


def value_and_gradient(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """As rows.value_and_gradient."""
    saved = loss.new_empty((len(out), SAVED))
    value(problem, student, teacher, labels, loss, saved, stats)
    gradient(problem, student, teacher, labels, saved, upstream, out)


def one_read(
    problem: Problem,
    student: Side,
    teacher: Side,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> None:
    """As rows.value_and_gradient, each logit read once. ValueError where a row's programs do not fit on the device."""
    _check(problem)
    if not len(out):
        return
    plan = _Layout(problem, student, len(out), _whole(problem, student, teacher))
    phases = (0,)
    if interpreted():
        phases = (1, 2, 3) if plan.sweep["SUMS"] is None else (1, 3)
    else:
        places = torch.cuda.get_device_properties(plan.device).multi_processor_count
        if plan.parts > places:
            raise ValueError(
                f"one_read needs {plan.parts} programs at once for {plan.width} columns, and the device has {places} "
                "multiprocessors: use value_and_gradient"
            )
    given, room = arguments(problem, student, teacher), plan.room()
    del given["ARGMAX"]
    for phase in phases:
        _one_read[(plan.rows * plan.parts,)](
            about_rows=(labels, upstream), out=(loss, stats), grad=(out, *out.stride(), out.shape[1]), room=room,
            **given, **plan.sweep, LANES=plan.counts["LANES"],
            PHASE=phase, BLOCK=plan.tile.block, **plan.tile.options(),
        )  # fmt: skip
