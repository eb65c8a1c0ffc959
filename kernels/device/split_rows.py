"""A row by several programs, one tile each: for few rows, which alone leave a GPU empty.

A row has `num_splits` splits, a tile each. What a program finds in its tile it stores for the others of its row:

    statistics   those of the tile
    sums         Σ f, Σ phi of the tile, for divergences without a one-sweep form
    finalize     loss, statistics and row scalars from all splits of a row: one program per row
    gradient     the tile's gradient from the row scalars

    value        statistics (sums) finalize
    gradient     gradient
    value_and_gradient     all of them

Splits merge as running sums follow a raised maximum (moments.py), all in one step and in the order of the vocabulary,
so the order in which programs run changes no bit. NUM_SPLITS is num_splits rounded up to a power of two. The last
program to finish a row's gradient writes the entry of the dominant token: minus the sum of all others (backward.py).

No path here has been timed on a GPU ("not measured").
"""

from typing import Any

import torch

from ..language import jit, tl, triton
from ..maths.centering import at_offsets, centre_of
from ..maths.decomposition import finalize_normalizers, or_infinite
from ..maths.moments import cross_entropy_advance
from ..maths.quantities import EntropySums, LogSumExp, Maxima
from .args import (
    CARRY,
    DOMINANT,
    SAVED,
    TERM_SUMS,
    Carry,
    Dominant,
    RowSums,
    SharedRow,
    Target,
    TermSums,
    Totals,
    WeightsArg,
    WorkspaceArg,
    carry_at,
    dominant_at,
    empty_carry,
    load_extras,
    load_scalars,
    store_nothing_saved,
    store_numbers,
    store_saved,
    sums_at,
)
from .backward import gradient_start, gradient_tile, merge_dominant, no_dominant, store_dominant, store_zero_tile
from .forward import accumulate_tile, add_terms, finish_row, merge, no_exponentials, no_sums, store_ignored
from .loads import as_numbers, finite, label_of, load_pair, row_ptrs, row_values, upstream_of
from .rows import Logits, Problem, arguments, gradient_term, sweep_of, tile_key
from .tiles import FUSION, Tile
from .vocab_chunks import online_of

_PROGRAMS = 256  # two for every multiprocessor of the largest GPUs; smaller tiles for fewer rows, down to
SMALLEST = 1024
# By class and bytes per logit as in tiles.py: a program has one tile, in registers, and no loop. Compiled without
# spilling; not measured.
LARGEST = {
    ("light", 2): Tile(4096, 16, 128),
    ("light", 4): Tile(4096, 16, 128),
    ("two", 2): Tile(2048, 8, 255),
    ("two", 4): Tile(2048, 16, 128),
    ("heavy", 2): Tile(2048, 8, 255),
    ("heavy", 4): Tile(2048, 8, 255),
}


@jit
def _load_tile(student, teacher, row, split, V, scales, BLOCK: tl.constexpr):
    """Returns (LogitTile of the split's columns, the columns), (BLOCK,) each. The label's column is live too."""
    seen = V
    if scales.ce is not None:
        seen = scales.ce.width
    cols = split * BLOCK + tl.arange(0, BLOCK)
    return load_pair(student, teacher, row_ptrs(student, teacher, row), cols, cols < V, cols < seen), cols


@jit
def _only(x, mask):
    """Returns the one number of x, (BLOCK,), where `mask` is true, −inf if it is nowhere: a maximum would drop NaN."""
    return tl.where(tl.max(tl.where(mask, 1, 0)) > 0, tl.sum(tl.where(mask, x, 0.0)), float("-inf"))


@jit
def _store_statistics(x, cols, label, scales, mix, stats_ptr, theta, at, INIT, ADVANCE):
    """Store Carry and the online state of a LogitTile, (BLOCK,) each."""
    cross = no_exponentials()
    if scales.ce is not None:
        cross = cross_entropy_advance(cross, x.s, cols < scales.ce.width)
    none, live = no_sums(INIT), x.live & (cols != label)
    centre = centre_of(none.maxima, 1.0, ())
    acc, _ = accumulate_tile(x.s, x.t, live, none, centre, scales.inv_tau, mix, stats_ptr, theta, ADVANCE)
    is_label = cols == label
    label_logits = (_only(x.s, is_label), _only(x.t, is_label & x.live))
    store_numbers(at, Carry(*(acc.maxima + acc.entropies + cross + label_logits)) + acc.state)


@jit
def _load_splits(at, mask, COUNT: tl.constexpr, other):
    """Returns COUNT numbers of a row's splits, (NUM_SPLITS,) each, `other` where there is no split.

    Loaded with .cg: the L1 cache knows nothing of other programs' stores.
    """
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(at + i, mask=mask, other=other, cache_modifier=".cg"),)
    return out


@jit
def _load_carries(at, mask):
    """Returns Carry of a row's splits, (NUM_SPLITS,) each, loaded as by `_load_splits`."""
    empty = empty_carry()
    out = ()
    for i in tl.static_range(len(empty)):
        out = out + (tl.load(at + i, mask=mask, other=empty[i], cache_modifier=".cg"),)
    return Carry(*out)


@jit
def _merge_splits(
    partial_ptr, row, num_splits, inv_tau, mix, stats_ptr, theta, ADVANCE, COUNT: tl.constexpr, NUM_SPLITS: tl.constexpr
):
    """Returns a row's RowSums and LogSumExp, and the label's logits, −inf where there is no label: all scalars."""
    index = tl.arange(0, NUM_SPLITS)  # (NUM_SPLITS,)
    mask = index < num_splits
    at = carry_at(partial_ptr, row * num_splits + index, COUNT)  # (NUM_SPLITS,)
    carry = _load_carries(at, mask)
    state = _load_splits(at + len(carry), mask, COUNT, 0.0)
    maxima = Maxima(carry.top_s, carry.top_t, carry.top_mixed)
    entropies = EntropySums(carry.entropy_s, carry.entropy_t, carry.sum_t)
    cross = LogSumExp(carry.ce_top, carry.ce_total)
    acc, cross = merge(RowSums(maxima, state, entropies), cross, index, inv_tau, mix, stats_ptr, theta, ADVANCE)
    s_y, t_y = carry.label_s, carry.label_t
    return acc, cross, _only(s_y, s_y != float("-inf")), _only(t_y, t_y != float("-inf"))


@jit
def _finalize_normalizers(
    partial_ptr, row, num_splits, label, scales, mix, stats_ptr, theta,
    ADVANCE, RATIO, ROW_PARAMETERS, DECOUPLED: tl.constexpr, COUNT: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Returns SharedRow: what `_finish` needs of a row all of whose splits have stored their statistics."""
    acc, cross, s_y, t_y = _merge_splits(
        partial_ptr, row, num_splits, scales.inv_tau, mix, stats_ptr, theta, ADVANCE, COUNT, NUM_SPLITS
    )
    in_support = t_y != float("-inf")
    target = Target(finite(s_y), finite(t_y), in_support, label >= 0)
    norms = finalize_normalizers(
        acc.maxima, acc.state, target.s, target.t, target.in_support, scales.inv_tau, mix, RATIO, DECOUPLED
    )
    extras = ()
    if ROW_PARAMETERS is not None:  # of those whose rows need not be whole
        extras, _ = ROW_PARAMETERS(None, None, None, acc.state, norms.log_norms, None, theta, 0, 0)
    return SharedRow(norms, acc, cross, target, extras)


@jit
def _store_sums(x, cols, label, inv_tau, mix, norms, theta, at, TERM):
    """Store TermSums of a LogitTile, (BLOCK,) each."""
    none = TermSums(*as_numbers((0.0, 0.0, 0.0)))
    of_row = at_offsets(x.s, x.t, norms.centre, norms.log_norms, inv_tau, mix, False)  # of one tile: no loop to shorten
    live = x.live & (cols != label)
    store_numbers(at, add_terms(none, of_row, live, theta, TERM))


@jit
def _finish(
    sums_ptr, row, num_splits, scales, loss_ptr, stats_ptr, shared, theta, weights,
    TERM, OUTER, SUMS, DECOUPLED: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Store loss and statistics, each where it has a pointer. Returns RowScalars."""
    acc, target = shared.acc, shared.target
    if SUMS is None:
        index = tl.arange(0, NUM_SPLITS)
        none = TermSums(0.0, 0.0, 0.0)
        swept = TermSums(
            *_load_splits(sums_at(sums_ptr, row * num_splits + index), index < num_splits, len(none), 0.0)
        )  # (NUM_SPLITS,)
        total = or_infinite(tl.sum(swept.total), tl.max(swept.widest))
        mass = tl.sum(swept.mass)
    else:
        norms = shared.norms.log_norms
        total, mass = SUMS(acc.state, norms.l_s, norms.l_t, norms.r, theta)
    totals = Totals(total, mass, shared.cross, tl.where(target.s <= -1e30, float("-inf"), target.s))
    return finish_row(
        row, scales, loss_ptr, stats_ptr, acc, totals, target, shared.norms, -1, theta, weights, TERM, OUTER, DECOUPLED
    )  # fmt: skip


@jit
def _write_gradient(
    x, cols, student, row, split, num_splits, label, scales, mix, grad, scalars, upstream, theta, dominant_ptr,
    arrived_ptr, TERM, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient. The last program of the row also stores the entry of the dominant token."""
    dominant = gradient_tile(
        x, cols, label, label, scales, mix, student.softcap, grad, gradient_start(grad, row), grad.width, scalars,
        upstream, theta, no_dominant(1), TERM, False,
    )  # fmt: skip
    dominant = merge_dominant(dominant, student)
    slope = tl.where(dominant.token >= 0, dominant.slope, 0.0)
    at = dominant_at(dominant_ptr, row * num_splits + split)
    store_numbers(at, Dominant(dominant.token + 0.0, dominant.rest, dominant.logit, slope))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        index = tl.arange(0, NUM_SPLITS)
        each_at = dominant_at(dominant_ptr, row * num_splits + index)  # (NUM_SPLITS,)
        mask = index < num_splits
        each = Dominant(*_load_splits(each_at, mask, len(dominant), 0.0))  # (NUM_SPLITS,)
        token = tl.max(tl.where(mask, each.token, -1.0)).to(tl.int32)
        whole = Dominant(token, tl.sum(each.rest), tl.sum(each.logit), tl.sum(each.slope))
        store_dominant(row, label, scales, grad, whole, 0.0, scalars.ce_lse, upstream)


@jit
def _statistics(
    student, teacher, label_ptr, stats_ptr, workspace, V, scales, numbers,
    INIT: tl.constexpr, ADVANCE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_splits = workspace.num_splits
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    label, counted = label_of(label_ptr, row)
    if counted:
        x, cols = _load_tile(student, teacher, row, split, V, scales, BLOCK)
        at = carry_at(workspace.partial_ptr, row * num_splits + split, COUNT)
        _store_statistics(
            x, cols, label, scales, row_values(numbers.mix, row), stats_ptr, row_values(numbers.theta, row), at,
            INIT, ADVANCE,
        )  # fmt: skip


@jit
def _sums(
    student, teacher, label_ptr, workspace, V, scales, numbers,
    TERM: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, ROW_PARAMETERS: tl.constexpr,
    DECOUPLED: tl.constexpr, COUNT: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_splits = workspace.num_splits
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers.theta, row)
        mix = row_values(numbers.mix, row)
        shared = _finalize_normalizers(
            workspace.partial_ptr, row, num_splits, label, scales, mix, None, theta,
            ADVANCE, RATIO, ROW_PARAMETERS, DECOUPLED, COUNT, NUM_SPLITS,
        )  # fmt: skip
        x, cols = _load_tile(student, teacher, row, split, V, scales, BLOCK)
        at = sums_at(workspace.sums_ptr, row * num_splits + split)
        _store_sums(x, cols, label, scales.inv_tau, mix, shared.norms, theta + shared.extras, at, TERM)


@jit
def _finalize(
    label_ptr, loss_ptr, saved_ptr, stats_ptr, workspace, scales, numbers,
    TERM: tl.constexpr, OUTER: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr, SUMS: tl.constexpr,
    ROW_PARAMETERS: tl.constexpr, DECOUPLED: tl.constexpr, COUNT: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        theta = row_values(numbers.theta, row)
        shared = _finalize_normalizers(
            workspace.partial_ptr, row, workspace.num_splits, label, scales, row_values(numbers.mix, row), stats_ptr,
            theta, ADVANCE, RATIO, ROW_PARAMETERS, DECOUPLED, COUNT, NUM_SPLITS,
        )  # fmt: skip
        weights = WeightsArg(*row_values(numbers.weights, row))
        scalars = _finish(
            workspace.sums_ptr, row, workspace.num_splits, scales, loss_ptr, stats_ptr, shared, theta + shared.extras,
            weights, TERM, OUTER, SUMS, DECOUPLED, NUM_SPLITS,
        )  # fmt: skip
        store_saved(saved_ptr, row, scalars, label, shared.extras)
    else:
        store_ignored(row, loss_ptr, stats_ptr)
        store_nothing_saved(saved_ptr, row)


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, workspace, V, scales, numbers,
    GRADIENT_TERM: tl.constexpr, EXTRAS: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_splits = workspace.num_splits
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    label, counted = label_of(label_ptr, row)
    upstream = upstream_of(upstream_ptr, row)
    if counted & (upstream != 0):
        x, cols = _load_tile(student, teacher, row, split, V, scales, BLOCK)
        theta = row_values(numbers.theta, row)
        theta = theta + load_extras(saved_ptr, row, EXTRAS)
        _write_gradient(
            x, cols, student, row, split, num_splits, label, scales, row_values(numbers.mix, row), grad,
            load_scalars(saved_ptr, row), upstream, theta, workspace.dominant_ptr,
            workspace.arrived_ptr + row, GRADIENT_TERM, NUM_SPLITS, BLOCK,
        )  # fmt: skip
    else:
        store_zero_tile(grad, row, split * BLOCK, BLOCK)


class _Layout:
    """Tile, programs per row and room for what they leave each other."""

    def __init__(self, problem: Problem, student: Logits, rows: int, best: Tile) -> None:
        self.rows = rows
        self.width = student.x.shape[2]
        self.tile = best
        self.num_splits = triton.cdiv(self.width, best.block)
        self.sweep = sweep_of(problem)
        self.counts = {
            "COUNT": len(online_of(problem).init.torch()),
            "NUM_SPLITS": triton.next_power_of_2(self.num_splits),
        }
        self.device = student.x.device

    def workspace(self) -> WorkspaceArg:
        """Memory for what programs store for each other; none has written its gradient yet."""
        partial, sums, dominant = (
            torch.empty(self.rows * self.num_splits * n, device=self.device, dtype=torch.float32)
            for n in (CARRY + self.counts["COUNT"], TERM_SUMS, DOMINANT)
        )
        arrived = torch.zeros(self.rows, device=self.device, dtype=torch.int32)
        return WorkspaceArg(partial, sums, dominant, arrived, self.num_splits)

    def constants(self, *names: str) -> dict[str, Any]:
        """Some of the compile-time arguments."""
        every = self.sweep | self.counts
        return {name: every[name] for name in names}


def _tile(problem: Problem, student: Logits, teacher: Logits, rows: int) -> Tile:
    """A tile small enough for the rows to give programs enough."""
    key = tile_key(problem, student, teacher)
    best = LARGEST[key.tile_class, key.logit_bytes]
    block, warps = best.block, best.num_warps
    while block > SMALLEST and rows * triton.cdiv(student.x.shape[2], block) < _PROGRAMS:
        block, warps = block // 2, max(warps // 2, min(warps, 4))
    return Tile(block, warps, best.registers)


def serves(problem: Problem) -> bool:
    """Whether a row of this problem can be shared: not where it is searched or swept again as a whole."""
    return not (problem.definition.whole_rows or problem.argmax)


def _check(problem: Problem) -> None:
    if not serves(problem):
        raise ValueError(f"divergence {problem.definition.name!r} with these options needs a whole row in one program")


def _arguments(problem: Problem, student: Logits, teacher: Logits, out: torch.Tensor | None = None) -> dict[str, Any]:
    """Those of rows.py; that rows begin alike would be another variant of kernels that make nothing of it."""
    given = arguments(problem, student, teacher, out)
    return {**given, "teacher": given["teacher"]._replace(congruent=None)}


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """As rows.value."""
    _check(problem)
    if len(loss):
        plan = _Layout(problem, student, len(loss), _tile(problem, student, teacher, len(loss)))
        given = _arguments(problem, student, teacher)
        sides = {key: given[key] for key in ("student", "teacher", "V")}
        common = {
            "label_ptr": labels,
            "workspace": plan.workspace(),
            "scales": given["scales"],
            "numbers": given["numbers"],
        }
        options = {"BLOCK": plan.tile.block, **plan.tile.options()}
        grid = (plan.rows * plan.num_splits,)
        _statistics[grid](**sides, **common, stats_ptr=stats, **plan.constants("INIT", "ADVANCE", "COUNT"), **options)
        shared = {
            "TERM": plan.sweep["TERM"],
            **plan.constants("ADVANCE", "RATIO", "ROW_PARAMETERS", "DECOUPLED", "COUNT", "NUM_SPLITS"),
        }
        if plan.sweep["SUMS"] is None:
            _sums[grid](**sides, **common, **shared, **options)
        kept = loss.new_empty((plan.rows, SAVED)) if saved is None else saved
        _finalize[(plan.rows,)](
            **common,
            loss_ptr=loss,
            saved_ptr=kept,
            stats_ptr=stats,
            **shared,
            **plan.constants("OUTER", "SUMS"),
            num_warps=1,
            **FUSION,
        )


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As rows.gradient."""
    _check(problem)
    if len(out):
        plan = _Layout(problem, student, len(out), _tile(problem, student, teacher, len(out)))
        given = _arguments(problem, student, teacher, out)
        del given["ARGMAX"]
        _gradient[(plan.rows * plan.num_splits,)](
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream,
            workspace=plan.workspace(), **given, GRADIENT_TERM=gradient_term(problem, out),
            EXTRAS=problem.definition.extras, NUM_SPLITS=plan.counts["NUM_SPLITS"],
            BLOCK=plan.tile.block, **plan.tile.options(),
        )  # fmt: skip


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
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
