"""Rows of logits in; per-token loss, statistics and gradient out. One program per row.

Kernels and their launchers; the sweeps are in forward.py and backward.py. Each sweep reads every logit once:

    value                    one sweep; two without a one-sweep form (forward.py)
    gradient                 one sweep (backward.py), from the saved row scalars and any upstream weight
    value_and_gradient       two sweeps (three) and one write, in one launch

What eviction hints would save is not measured, so there are none.

A row whose label is negative is ignored: nothing of it is read, zeros are written. So is the gradient of a row whose
upstream gradient is 0, whatever its logits hold. Columns whose teacher logit is −inf are outside the support: removed
from both sides, gradient 0. NaN in a compared column makes the row's loss NaN, and all that its gradient has.

Launchers return what Triton compiled: None in its interpreter and where there are no rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..language import jit, tl, triton
from ..maths.definition import Definition, OnlineForm
from ..maths.moments import log_sum
from .args import (
    SAVED,
    STATS,
    CrossEntropyArg,
    GradArg,
    LogitsArg,
    ParametersArg,
    ScalesArg,
    ValueArg,
    WeightsArg,
    load_extras,
    load_scalars,
    load_target,
    store_nothing_saved,
    store_saved,
)
from .backward import row_gradient, store_zeros
from .forward import row_value, store_ignored
from .loads import label_of, load_logits, row_start, row_values, upstream_of
from .tiles import SMALLEST, Tile, TileKey, architecture, tile_for

__all__ = ["SAVED", "STATS", "Logits", "Problem", "floor_rows", "gradient", "value", "value_and_gradient"]


VECTOR = 16  # bytes that a thread loads at once


class Logits(NamedTuple):
    """One side's logits as they lie in memory: softcap(scale·(x + bias)), with −inf rules left to the kernel.

    Rows are counted through the first two axes, from `first` on: row n is x[(first + n) // inner, (first + n) % inner].
    """

    x: torch.Tensor  # (outer, inner, ≥ V)
    bias: torch.Tensor | None = None  # (≥ V,)
    scale: float | None = None
    softcap: float | None = None
    floor: torch.Tensor | None = None  # (N,) float32: logits below are raised to it (teacher only)
    first: int = 0
    outcomes: "Outcomes | None" = None  # what the columns are, where they are not the vocabulary (teacher only)


class Outcomes(NamedTuple):
    """The columns of a top-k teacher: K listed ones of the vocabulary, the bucket of all others if it has one, and one
    without probability for a target that is not listed."""

    ids: torch.Tensor  # (N, K) int64, distinct in a row; −1: absent
    targets: torch.Tensor  # (N,) int64: which column is the target; negative: the row does not count
    bucket: bool  # whether column K is one


class Problem(NamedTuple):
    """What is computed, apart from the tensors it is computed on."""

    definition: Definition
    decoupled: bool
    parameters: tuple[Any, ...]  # floats, or (N,) float32 tensors
    weights: tuple[Any, Any]  # target, nontarget: likewise
    vocab_size: int
    temperature: float = 1.0
    factor: float = 1.0  # on the divergence: 1 or temperature²
    ce_weight: float = 0.0
    mix: Any = None  # the teacher's weight in a mixed teacher: a float, an (N,) float32 tensor, or None
    argmax: bool = False  # the target is the teacher's argmax, not the label


@jit
def _value(
    student, teacher, label_ptr, out, saved_ptr, V, scales, numbers,
    TERM: tl.constexpr, OUTER: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr, RATIO: tl.constexpr,
    SUMS: tl.constexpr, ROW_PARAMETERS: tl.constexpr, DECOUPLED: tl.constexpr, ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        of_row = row_value(
            student, teacher, row, label, V, scales, out.loss_ptr, out.stats_ptr, numbers,
            TERM, OUTER, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        if saved_ptr is not None:
            store_saved(saved_ptr, row, of_row.scalars, of_row.y, of_row.extras)
    else:
        store_ignored(row, out.loss_ptr, out.stats_ptr)
        if saved_ptr is not None:
            store_nothing_saved(saved_ptr, row)


@jit
def _gradient(
    student, teacher, label_ptr, saved_ptr, upstream_ptr, grad, V, scales, numbers,
    GRADIENT_TERM: tl.constexpr, EXTRAS: tl.constexpr, ARGMAX: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        scalars = load_scalars(saved_ptr, row)
        theta = row_values(numbers.theta, row)
        theta = theta + load_extras(saved_ptr, row, EXTRAS)
        mix = row_values(numbers.mix, row)
        y = label
        if ARGMAX:
            y = load_target(saved_ptr, row)
        row_gradient(
            student, teacher, row, y, label, V, scales, mix, grad, scalars, upstream, theta, GRADIENT_TERM, BLOCK,
            THREADS,
        )  # fmt: skip
    else:
        store_zeros(grad, row, BLOCK)


@jit
def _value_and_gradient(
    student, teacher, label_ptr, out, upstream_ptr, grad, V, scales, numbers,
    TERM: tl.constexpr, GRADIENT_TERM: tl.constexpr, OUTER: tl.constexpr, INIT: tl.constexpr, ADVANCE: tl.constexpr,
    RATIO: tl.constexpr, SUMS: tl.constexpr, ROW_PARAMETERS: tl.constexpr, DECOUPLED: tl.constexpr,
    ARGMAX: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    if counted:
        of_row = row_value(
            student, teacher, row, label, V, scales, out.loss_ptr, out.stats_ptr, numbers,
            TERM, OUTER, INIT, ADVANCE, RATIO, SUMS, ROW_PARAMETERS, DECOUPLED, ARGMAX, BLOCK, THREADS,
        )  # fmt: skip
        # The gradient may lie over the logits: no warp writes before every warp has read the label's.
        tl.debug_barrier()
        upstream = upstream_of(upstream_ptr, row)
        if upstream != 0:
            row_gradient(
                student, teacher, row, of_row.y, label, V, scales, of_row.mix, grad, of_row.scalars, upstream,
                of_row.theta, GRADIENT_TERM, BLOCK, THREADS,
            )  # fmt: skip
    else:
        store_ignored(row, out.loss_ptr, out.stats_ptr)
    if not (counted & (upstream_of(upstream_ptr, row) != 0)):  # loaded again: kept, it would cost registers
        store_zeros(grad, row, BLOCK)


def arguments(problem: Problem, student: Logits, teacher: Logits, out: torch.Tensor | None = None) -> dict[str, Any]:
    """Everything the row kernels take in common, and the gradient where there is one."""
    others = [teacher] if out is None else [teacher, Logits(out[None])]
    ce = CrossEntropyArg(float(problem.ce_weight), student.x.shape[2]) if problem.ce_weight else None
    mix = () if problem.mix is None else (problem.mix,)
    given = {
        "student": logits_arg(student),
        "teacher": logits_arg(teacher, 1 if congruent(problem, student, others) else None),
        "V": problem.vocab_size,
        "scales": ScalesArg(1.0 / problem.temperature, float(problem.factor), ce),
        "numbers": ParametersArg(problem.parameters, WeightsArg(*problem.weights), mix),
        "ARGMAX": problem.argmax,
    }
    if out is not None:
        given["grad"] = grad_arg(out)
    return given


def logits_arg(side: Logits, congruent: int | None = None) -> LogitsArg:
    """A side as kernels take it."""
    outer, n, v = side.x.stride()
    about = side.bias, side.scale, side.softcap, side.floor
    return LogitsArg(side.x, side.first, side.x.shape[1], outer, n, v, *about, congruent)


def grad_arg(out: torch.Tensor, width: int | None = None) -> GradArg:
    """A gradient (N, ≥ width) as kernels take it, all of its columns unless told."""
    n, v = out.stride()
    return GradArg(out, n, v, out.shape[1] if width is None else width)


def congruent(problem: Problem, student: Logits, others: Sequence[Logits]) -> bool:
    """Whether kernels are to find the whole vectors of a row: Triton does not see them, and all tensors' lie alike."""
    sides = [student, *others]
    numbers = [problem.vocab_size, *(n for side in sides for n in (side.x.data_ptr(), *side.x.stride()[:2]))]
    return any(number % 16 for number in numbers) and all(_in_step(student, other) for other in others)


def _in_step(student: Logits, other: Logits) -> bool:
    """Whether each row of `other` begins as far from a boundary of the vectors that kernels load as the student's."""
    vector = VECTOR // max(student.x.element_size(), other.x.element_size())
    if student.x.stride(2) != 1 or other.x.stride(2) != 1 or not vector:
        return False
    return _residues(student, vector) == _residues(other, vector)


def _residues(side: Logits, vector: int) -> tuple[int, ...]:
    """Where rows begin, in elements modulo `vector`: equal for two tensors only if all their rows begin alike."""
    (outer, n, _), (rows, inner, _) = side.x.stride(), side.x.shape
    at = side.x.data_ptr() // side.x.element_size()
    if rows == 1 or (outer - inner * n) % vector == 0:
        return (at + side.first * n) % vector, n % vector
    return at % vector, n % vector, outer % vector, inner, side.first


def gradient_term(problem: Problem, out: torch.Tensor) -> Any:
    """The summand whose phi a gradient takes: one with the digits of its dtype."""
    online = problem.definition.sweep(problem.parameters)
    return problem.definition.gradient_summand(online, out.dtype.itemsize == 2)


def sweep_of(problem: Problem) -> dict[str, Any]:
    """What the kernels of the value are injected with."""
    online = problem.definition.sweep(problem.parameters)
    row_parameters = problem.definition.row_parameters
    return {
        "TERM": problem.definition.summand(online),
        "OUTER": problem.definition.outer,
        "INIT": online.init,
        "ADVANCE": online.advance,
        "RATIO": online.ratio,
        "SUMS": online.sums,
        "ROW_PARAMETERS": None if row_parameters is None else row_parameters.kernel,
        "DECOUPLED": problem.decoupled,
    }


def tile(problem: Problem, student: Logits, teacher: Logits) -> Tile:
    """The table's tile for a problem."""
    return tile_for(tile_key(problem, student, teacher), problem.vocab_size)


def tile_key(problem: Problem, student: Logits, teacher: Logits) -> TileKey:
    """The key of the table that a problem runs with."""
    width = max(student.x.element_size(), teacher.x.element_size())
    kind = tile_class(problem.definition.sweep(problem.parameters), problem.argmax or problem.mix is not None)
    return TileKey(architecture(student.x.device), kind, width)


def tile_class(online: OnlineForm, busy: bool) -> str:
    """The row of the table: looking for the target, or mixing the teacher, takes the registers of a heavier one."""
    return "heavy" if busy and online.tile == "light" else online.tile


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> Any:
    """Fills the per-row `loss` (N,), the row scalars `saved` (N, SAVED) for `gradient`, and `stats` (N, STATS)."""
    n = loss.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _value[(n,)](
            label_ptr=labels, out=ValueArg(loss, stats), saved_ptr=saved,
            **arguments(problem, student, teacher), **sweep_of(problem), **best.launch(),
        )  # fmt: skip
    return None


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> Any:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), any strides."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _gradient[(n,)](
            label_ptr=labels, saved_ptr=saved, upstream_ptr=upstream,
            **arguments(problem, student, teacher, out), GRADIENT_TERM=gradient_term(problem, out),
            EXTRAS=problem.definition.extras, **best.launch(),
        )  # fmt: skip
    return None


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
    loss: torch.Tensor,
    stats: torch.Tensor | None,
) -> Any:
    """Fills `loss` (N,), `stats` if given, and `out` with upstream_n · dloss_n/dx (upstream 1 if None)."""
    n = out.shape[0]
    if n:
        best = tile(problem, student, teacher)
        return _value_and_gradient[(n,)](
            label_ptr=labels, out=ValueArg(loss, stats), upstream_ptr=upstream,
            GRADIENT_TERM=gradient_term(problem, out),
            **arguments(problem, student, teacher, out), **sweep_of(problem), **best.launch(),
        )  # fmt: skip
    return None


def floor_rows(problem: Problem, teacher: Logits, labels: torch.Tensor | None, out: torch.Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp: what support="floor" raises to."""
    n = out.shape[0]
    if n:
        block = min(4096, max(SMALLEST, triton.next_power_of_2(problem.vocab_size)))
        _floor[(n,)](
            logits_arg(teacher),
            labels,
            out,
            problem.vocab_size,
            1.0 / problem.temperature,
            depth,
            BLOCK=block,
            **Tile(block, 4).options(),
        )


@jit
def _floor(teacher, label_ptr, out_ptr, V, inv_tau, depth, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y, counted = label_of(label_ptr, row)
    top, total = -1e20, 0.0
    for start in range(0, tl.where(counted, V, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        t, slope = load_logits(teacher, row_start(teacher, row), 0, cols, cols < V)
        new = tl.maximum(top, tl.max(t))
        total = total * tl.exp((top - new) * inv_tau) + tl.sum(tl.where(cols < V, tl.exp((t - new) * inv_tau), 0.0))
        top = new
    tl.store(out_ptr + row, top + (log_sum(total) - depth) / inv_tau)
