"""The row work of a CPU in plain torch, with the interface of kernels/device/rows.py: `backend="torch"`.

A transcription of the kernels, from the same formulas: a statistics sweep, normalisers, sums of terms where there is
no one-sweep form, the target's terms, a gradient sweep. A sweep is a function of some rows that reads the logits;
what lies between is calculated per row. torch_compiled.py runs the same functions through torch.compile.

Run eagerly, rows are taken a piece at a time (`Kind.piece`), so that temporaries stay in a cache and in memory that the
allocator keeps. What the first sweep makes of a piece's logits is kept for the next ones, which shift it and
exponentiate nothing again.

A call of more than FEW logits shares its pieces out among a few threads, one parallel region instead of one for each
operation, of which every one would wait for its slowest thread where cores are busy. A smaller call leaves each
operation to the threads of torch: between the hundreds of operations on a number per row, threads of Python would
hand the interpreter's lock to and fro. Computed in float32 (float64 for float64 logits). Rows that do not count are
not read.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..kernels.device.args import (
    MOST_EXTRAS,
    SAVED,
    Dominant,
    RowScalars,
    TermSums,
    TokenStats,
    columns_of,
    extras_of,
    target_of,
)
from ..kernels.device.rows import Logits, Problem
from ..kernels.maths.centering import above_centre, centre_of, centred, mixed, no_maxima
from ..kernels.maths.decomposition import ABSENT, decompose, finalize_normalizers, or_infinite, side_stats
from ..kernels.maths.definition import Definition, OnlineForm
from ..kernels.maths.elementary import exp, tanh
from ..kernels.maths.moments import entropies_advance, log_sum
from ..kernels.maths.quantities import Centre, Decomposition, EntropySums, LogNorms, Maxima, RowNorms
from ..kernels.maths.reductions import thread_max, thread_sum

PIECE = 3 << 18  # logits per side that a thread takes at a time: a cache holds what a sweep makes of them
FEW = 1 << 21  # logits per side of a call that are not worth threads of their own, which wait for the interpreter
WORKERS = 8  # threads that take pieces: each needs memory of its own
_LARGEST_COUNTED = (1 << 25) - (1 << 16)  # bytes of the largest block that glibc's rule for freed memory counts
_RUN = 128  # columns of which torch finds the largest in less time than where it is
# A row with a logit from here down is looked through for masks; those of float64 are far beyond float32's.
_LEAST = {torch.float32: ABSENT, torch.float64: -1e300}

Rows = slice | Tensor  # which of a call's


class Kind(NamedTuple):
    """What the sweeps do, apart from numbers."""

    definition: Definition
    online: OnlineForm
    decoupled: bool
    argmax: bool
    dtype: torch.dtype  # float32 or float64: what is calculated in
    with_stats: bool = False

    @property
    def piece(self) -> int:
        """Logits per side that a thread takes at a time: light sweeps have half as many temporaries as others."""
        return 2 * PIECE if self.online.tile == "light" else PIECE


class Stored(NamedTuple):
    """Numbers of one side as they lie in memory, and what makes logits of them."""

    x: Tensor  # (n, width)
    bias: Tensor | None  # (width,)
    scale: Any
    softcap: Any


class Numbers(NamedTuple):
    """The parameters of a loss: (n, 1) where they are per row, else a float, or a 0-d tensor while compiled."""

    theta: tuple[Any, ...]
    weights: tuple[Any, Any]
    mix: tuple[Any, ...]  # the teacher's weight in a mixed teacher, or nothing
    inv_tau: Any
    factor: Any
    ce: Any  # weight of the cross-entropy, None: none


class Held(NamedTuple):
    """The columns held out, (n, 1)."""

    at: Tensor
    here: Tensor | None = None  # rows that hold one out; None: all


class Tile(NamedTuple):
    """A tile (n, V) each; no logarithms where a definition reads none."""

    q: Tensor
    p: Tensor
    logq: Tensor | None
    logp: Tensor | None
    delta: Tensor


class Columns(NamedTuple):
    """The compared columns of some rows, and the student's logits with all of theirs."""

    s: Tensor  # (n, V), −1e30 for −inf and outside the support
    t: Tensor  # (n, V) likewise
    outside: Tensor | None  # (n, V) columns outside the support; None: no row has one
    full: Tensor  # (n, width)
    slope: Tensor | float  # derivative of `full` by the stored numbers
    holes: bool  # whether s may be −1e30 somewhere


class Kept:
    """What one sweep of a piece leaves to the next, which works in its memory."""

    columns: Columns
    tile: Tile | None = None
    is_normalized = False  # else e^z, e^u, z, u and d


class Inputs(NamedTuple):
    """Some rows of a call."""

    student: Stored
    teacher: Stored
    floor: Tensor | None  # (n, 1) logits to which the teacher's are raised
    label: Held | None
    numbers: Numbers
    kept: Kept | None = None  # None: every sweep reads the logits


class Target(NamedTuple):
    """The held-out column, (n, 1) each."""

    y: Tensor
    s: Tensor
    t: Tensor
    in_support: Tensor


class Statistics(NamedTuple):
    """What the first sweep finds of each row, (n, 1) each."""

    maxima: Maxima
    state: tuple[Any, ...]
    entropy_sums: EntropySums | None
    target: Target
    ce_lse: Tensor  # log-sum-exp of all the student's logits at temperature 1, 0 without a cross-entropy
    label_s: Tensor
    hole: Tensor  # whether the student excludes a column of the support


class RowResult(NamedTuple):
    """Loss (n, 1), statistics (n, STATS) or None, what the gradient needs (n, SAVED)."""

    loss: Tensor
    stats: Tensor | None
    saved: Tensor


Sweep = Callable[..., Any]  # (inputs, kind, saved, upstream, out) -> Dominant, as row_gradients


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    loss: Tensor,
    saved: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fills `loss` (N,), the row scalars `saved` (N, SAVED) and `stats` (N, STATS), as device.rows.value."""
    clear(loss, stats, saved)
    call, kind = Call(problem, student, teacher, labels, loss.dtype), kind_of(problem, loss.dtype, stats is not None)

    def work(rows: Rows) -> None:
        inputs = call.inputs(rows)._replace(kept=Kept() if keeps_tiles(kind) and kind.online.sums is None else None)
        keep(row_values(inputs, kind), rows, loss, saved, stats)

    each(work, call, kind, counted(labels, None, len(loss)))


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    saved: Tensor,
    upstream: Tensor,
    out: Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), as device.rows.gradient."""
    call, kind = Call(problem, student, teacher, labels, saved.dtype), kind_of(problem, saved.dtype)

    def work(rows: Rows) -> None:
        write_gradient(call.inputs(rows), kind, rows, saved, upstream, out, row_gradients)

    each(work, call, kind, uncounted_zeroed(labels, upstream, out))


def value_and_gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    upstream: Tensor | None,
    out: Tensor,
    loss: Tensor,
    stats: Tensor | None,
) -> None:
    """Fills `loss`, `stats` and `out`, as device.rows.value_and_gradient."""
    clear(loss, stats)
    call, kind = Call(problem, student, teacher, labels, loss.dtype), kind_of(problem, loss.dtype, stats is not None)
    saved = loss.new_empty((len(loss), SAVED))

    def work(rows: Rows) -> None:
        inputs = call.inputs(rows)._replace(kept=Kept() if keeps_tiles(kind) else None)
        keep(row_values(inputs, kind), rows, loss, saved, stats)
        write_gradient(inputs, kind, rows, saved, upstream, out, row_gradients)

    each(work, call, kind, counted(labels, None, len(loss)))
    uncounted_zeroed(labels, upstream, out)


def floor_rows(problem: Problem, teacher: Logits, labels: Tensor | None, out: Tensor, depth: float) -> None:
    """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp, as device.rows.floor_rows."""
    out.zero_()
    for rows in row_blocks(problem.vocab_size, labels, out.shape[0], out.device):
        t, _ = logits(teacher, rows, problem.vocab_size, out.dtype)
        out[rows] = (torch.logsumexp(t / problem.temperature, -1) - depth) * problem.temperature


def clear(*tensors: Tensor | None) -> None:
    """Zeros, for the rows that do not count."""
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


# Rows of a call


class Call(NamedTuple):
    """A call of `value` or `gradient`; float32 or float64 is what it is computed in."""

    problem: Problem
    student: Logits
    teacher: Logits
    labels: Tensor | None
    dtype: torch.dtype
    first: int | None = None  # the first column of a chunk of the vocabulary; None: the rows are whole

    @property
    def width(self) -> int:
        """Columns of the student that are read."""
        return self.student.x.shape[2] if self.problem.ce_weight else self.problem.vocab_size

    def parts(self, rows: Rows, size: int) -> list[Rows]:
        """Rows with `size` logits per side at most, but at least one row; all parts but the last have equally many."""
        count, most = count_of(rows), max(1, size // max(self.width, 1))
        step = max(1, -(-count // max(1, -(-count // most))))
        return [part_of(rows, i, i + step) for i in range(0, count, step)]

    def inputs(self, rows: Rows, number: Callable[[float], Any] = float) -> Inputs:
        """Some rows, views where they are neighbours; `number` makes a parameter that is not per row."""

        def side(side: Logits, width: int) -> Stored:
            bias = None if side.bias is None else side.bias[:width].detach()
            scales = (None if x is None else number(x) for x in (side.scale, side.softcap))
            return Stored(stored(side, rows, width).detach(), bias, *scales)

        V, floor = self.problem.vocab_size, self.teacher.floor
        return Inputs(
            side(self.student, self.width),
            side(self.teacher, V),
            None if floor is None else floor[rows].to(self.dtype).unsqueeze(-1),
            None if self.labels is None else self._held(self.labels[rows].unsqueeze(-1)),
            self.numbers(rows, number),
        )

    def _held(self, label: Tensor) -> Held:
        """The labels' columns, of which a chunk has those of some rows."""
        if self.first is None:
            return Held(label)
        at = (label - self.first).clamp(0, self.problem.vocab_size - 1)
        return Held(at, at + self.first == label)

    def numbers(self, rows: Rows, number: Callable[[float], Any] = float) -> Numbers:
        """The parameters at some rows."""
        return numbers_at(self.problem, rows, self.dtype, number)


def numbers_at(problem: Problem, rows: Rows, dtype: torch.dtype, number: Callable[[float], Any] = float) -> Numbers:
    """The parameters of a problem at some rows."""

    def at_rows(values: tuple[Any, ...]) -> Any:
        return tuple(x[rows].to(dtype).unsqueeze(-1) if isinstance(x, Tensor) else number(float(x)) for x in values)

    return Numbers(
        at_rows(problem.parameters),
        at_rows(problem.weights),
        () if problem.mix is None else at_rows((problem.mix,)),
        number(1.0 / problem.temperature),
        number(problem.factor),
        number(problem.ce_weight) if problem.ce_weight else None,
    )


def kind_of(problem: Problem, dtype: torch.dtype, with_stats: bool = False) -> Kind:
    """The kind of a problem."""
    online = problem.definition.sweep(problem.parameters)
    return Kind(problem.definition, online, problem.decoupled, problem.argmax, dtype, with_stats)


def counted(labels: Tensor | None, upstream: Tensor | None, n: int) -> Rows:
    """The rows that have a label and an upstream gradient, as a slice where they are neighbours."""
    counts = None if labels is None else labels >= 0
    if upstream is not None:
        counts = upstream != 0 if counts is None else counts & (upstream != 0)
    if counts is None or bool(counts.all()):
        return slice(0, n)
    return _as_slice(counts.nonzero().squeeze(-1))


def uncounted_zeroed(labels: Tensor | None, upstream: Tensor | None, out: Tensor) -> Rows:
    """`counted`; the other rows of `out` are zeroed, whatever their logits hold."""
    rows = counted(labels, upstream, len(out))
    if isinstance(rows, slice):
        out[: rows.start], out[rows.stop :] = 0, 0
    else:
        rest = torch.ones(len(out), dtype=torch.bool, device=out.device)
        rest[rows] = False
        out[rest] = 0
    return rows


def part_of(rows: Rows, i: int, j: int) -> Rows:
    """The i-th to j-th of some rows, as a slice where they are neighbours."""
    if isinstance(rows, slice):
        return slice(rows.start + i, min(rows.start + j, rows.stop))
    return _as_slice(rows[i:j])


def _as_slice(rows: Tensor) -> Rows:
    """Ascending rows as a slice where they are neighbours."""
    first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def count_of(rows: Rows) -> int:
    """How many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _is_tuple(x: Any) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(x, tuple)


def tree(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Nested tuples with `fn` of each tensor in them; anything else stays what it is."""
    if _is_tuple(x):
        members = [tree(fn, member) for member in x]
        return type(x)(*members) if hasattr(x, "_fields") else tuple(members)
    return fn(x) if isinstance(x, Tensor) else x


def keeps_tiles(kind: Kind) -> bool:
    """Whether sweeps may share tiles: a search for parameters has tiles of its own, and works in them."""
    return not kind.definition.whole_rows


def each(work: Callable[[Rows], None], call: Call, kind: Kind, rows: Rows) -> None:
    """Does the work of some rows, a piece at a time, by several threads on a CPU."""
    count = count_of(rows)
    few = not call.student.x.is_cpu or count * call.width <= FEW
    workers = 1 if few else min(torch.get_num_threads(), WORKERS)
    in_threads(work, call.parts(rows, min(kind.piece, -(-count // workers) * call.width)), workers)


def in_threads(work: Callable[[Any], None], parts: Sequence[Any], workers: int) -> None:
    """Does the work of every part, in as many threads, each with its share of torch's."""
    _keep_freed_memory()
    if min(workers, len(parts)) <= 1:
        for part in parts:
            work(part)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def in_thread(part: Any) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            for done in [pool.submit(in_thread, part) for part in parts]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # what threads that are yet to come take for theirs


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc keep what the temporaries of one piece occupied for those of the next, in every thread.

    It returns freed memory to the kernel beyond twice the largest block that has been freed before (mallopt(3),
    M_MMAP_THRESHOLD: 128 KiB at first, 32 MiB at most), and the page faults of the next temporary take longer than its
    arithmetic. So one such block is freed, untouched. Where a limit is set (MALLOC_TRIM_THRESHOLD_) that one holds;
    other allocators have no such rule.
    """
    torch.UntypedStorage(_LARGEST_COUNTED)


def row_blocks(
    width: int,
    labels: Tensor | None,
    n: int,
    device: torch.device,
    out: Tensor | None = None,
) -> Iterator[Rows]:
    """The rows with a label, some of about PIECE columns at a time; other rows of `out` are zeroed."""
    rows = counted(labels, None, n) if out is None else uncounted_zeroed(labels, None, out)
    step = max(2, PIECE // max(width, 1))
    yield from (part_of(rows, i, i + step) for i in range(0, count_of(rows), step))


# Logits


def logits(side: Logits, rows: Rows, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """A side's first `width` logits at some rows, maybe a view, and their derivative by the stored numbers."""
    bias = None if side.bias is None else side.bias[:width]
    return shaped(stored(side, rows, width).to(dtype), bias, side.scale, side.softcap)


def stored(side: Logits, rows: Rows, width: int) -> Tensor:
    """What lies in memory of a side's first `width` columns at some rows, a view where they are neighbours."""
    inner = side.x.shape[1]
    if not isinstance(rows, slice):
        return side.x[(rows + side.first) // inner, (rows + side.first) % inner, :width]
    first, last = rows.start + side.first, rows.stop + side.first - 1
    if first // inner == last // inner:
        return side.x[first // inner, first % inner : last % inner + 1, :width]
    at = torch.arange(first, last + 1, device=side.x.device)
    return side.x[at // inner, at % inner, :width]


def shaped(x: Tensor, bias: Any, scale: Any, softcap: Any) -> tuple[Tensor, Tensor | float]:
    """Logits from stored numbers, and their derivative by these."""
    slope: Tensor | float = 1.0
    if bias is not None:
        x = x + bias
    if scale is not None:
        x = x * scale
        slope = scale
    if softcap is not None:
        bent = tanh.torch(x / softcap)
        x, slope = bent * softcap, (1 - bent * bent) * slope
    return x, slope


def or_unknown(x: Tensor) -> Tensor:
    """NaN for +inf, which is no logit: beside it every other column's share is 0 and its own inf/inf."""
    return torch.where(x == torch.inf, torch.nan, x)


# What torch.compile's loops and whole tensors at hand do differently


def _at_hand(x: Tensor) -> bool:
    """Whether numbers may be looked at: neither traced, nor on a device that would have to be waited for."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _numbered(x: Tensor) -> Tensor:
    """The columns' numbers: 32 bits take half the instructions of 64."""
    return torch.arange(x.shape[1], dtype=torch.int32, device=x.device)


def at_column(x: Tensor, y: Held, value: Any) -> Tensor:
    """x (n, c) with `value` in the columns y, in place if it is at hand."""
    if y.here is not None:
        value = torch.where(y.here, value, x.gather(1, y.at))
    if torch.compiler.is_compiling():
        return torch.where(_numbered(x) == y.at.int(), value, x)
    return x.scatter_(1, y.at, value)


def _take_out_dominant(g: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g (n, c) with 0 for the column that has more than half of the row's mass, that column, whether there is one."""
    if torch.compiler.is_compiling():
        column = torch.where(q > 0.5, _numbered(q), -1).amax(-1, keepdim=True)
        return torch.where(q > 0.5, 0.0, g), column, column >= 0
    column = likeliest(q).unsqueeze(-1)
    dominates = q.gather(1, column) > 0.5
    return at_column(g, Held(column, dominates), 0.0), column, dominates


def likeliest(q: Tensor) -> Tensor:
    """Where the rows of q (n, c) are largest: torch looks for a maximum's place one by one, for its size at many."""
    width = q.shape[1]
    if width <= _RUN:
        return q.argmax(-1)
    whole = width - width % _RUN
    largest = q[:, :whole].view(len(q), -1, _RUN).amax(-1)
    if whole < width:
        largest = torch.cat((largest, q[:, whole:].amax(-1, keepdim=True)), -1)
    first = largest.argmax(-1, keepdim=True) * _RUN
    piece = torch.arange(_RUN, device=q.device) + first
    return q.gather(1, piece.clamp_(max=width - 1)).argmax(-1) + first.squeeze(-1)


# The sweeps


def _columns(inputs: Inputs, kind: Kind) -> Columns:
    """Logits, views of what is stored where nothing has to be made of it.

    Only a teacher's −inf takes a column out of the support: dtypes' least numbers, with which others mask, are
    probabilities of 0.
    """
    full, slope = shaped(inputs.student.x.to(kind.dtype), *inputs.student[1:])
    t, _ = shaped(inputs.teacher.x.to(kind.dtype), *inputs.teacher[1:])
    s = full[:, : t.shape[1]]
    if _at_hand(t) and bool((torch.minimum(s.amin(-1), t.amin(-1)) > _LEAST[kind.dtype]).all()):
        return Columns(s, t, None, full, slope, holes=False)
    outside = t == -torch.inf  # not a NaN, which must show
    if inputs.floor is not None:
        outside = outside & (s == -torch.inf)
        t = torch.maximum(t, inputs.floor)
    s, t = (torch.where(outside, ABSENT, x.clamp(min=ABSENT)) for x in (s, t))
    return Columns(s, t, outside, full, slope, holes=True)


def _held_out(x: Tensor, y: Held | None) -> Tensor:
    """x without the columns y, in place if it is at hand."""
    return x if y is None else at_column(x, y, ABSENT)


def _target(columns: Columns, label: Held | None, argmax: bool) -> tuple[Target, Held | None]:
    """The target, and its columns if there is one."""
    s, t = columns.s, columns.t
    y = Held(t.argmax(-1, keepdim=True)) if argmax else label
    if y is None:
        nothing = torch.full_like(s[:, :1], ABSENT)
        return Target(torch.full_like(nothing, -1), nothing, nothing, nothing > 0), None
    s_y, t_y = (or_unknown(x.gather(1, y.at)) for x in (s, t))
    outside = torch.zeros_like(y.at, dtype=torch.bool) if columns.outside is None else columns.outside.gather(1, y.at)
    return Target(y.at.to(s.dtype), s_y, t_y, ~outside), y


def _held_of(inputs: Inputs, kind: Kind, target: Tensor | None) -> Held | None:
    """The columns held out; `target` (n, 1) has their numbers where rows look for them."""
    if not kind.argmax:
        return inputs.label
    assert target is not None
    return Held(target.long())


def _maximum(x: Tensor, y: Held | None, x_y: Tensor) -> Tensor:
    """Maxima of rows without the columns y, whose numbers are x_y: (n, 1)."""
    if y is None:
        return thread_max.torch(x)
    if not _at_hand(x):
        return thread_max.torch(torch.where(_numbered(x) == y.at.int(), ABSENT, x))
    top = thread_max.torch(x)
    again = ~(x_y < top)
    again = (again if y.here is None else again & y.here).flatten()
    if again.any():
        top[again] = thread_max.torch(at_column(x[again], Held(y.at[again]), ABSENT))
    return top


def statistics(inputs: Inputs, kind: Kind) -> Statistics:
    """The first sweep: maxima, online sums, the target's column held out."""
    numbers, columns = inputs.numbers, _columns(inputs, kind)
    s, t, inv_tau, mix = columns.s, columns.t, numbers.inv_tau, numbers.mix
    target, y = _target(columns, inputs.label, kind.argmax)
    tops = [_maximum(x, y, x_y) for x, x_y in ((s, target.s), (t, target.t))]
    least = no_maxima.torch().s
    tops = [top.masked_fill(top == ABSENT, least) for top in tops]  # of no column; float64 goes far beyond
    unknown = [0.0 * top for top in tops]  # NaN where a side is not finite, and the other should not know
    tops = [torch.where(nan == 0, top, 0.0) for nan, top in zip(unknown, tops, strict=True)]
    maxima = Maxima(tops[0], tops[1], torch.zeros_like(target.s))
    centre = centre_of.torch(maxima, inv_tau, ())
    if mix:
        tau_u = _held_out(mixed.torch(*above_centre.torch(s, t, centre), mix), y)
        maxima = maxima._replace(mixed=thread_max.torch(tau_u).clamp(min=least))
        centre = centre_of.torch(maxima, inv_tau, mix)
    z, u, d = centred.torch(s, t, centre, inv_tau, mix)
    z, u = _held_out(z, y), _held_out(u, y)
    entropy_sums, still = None, (0.0, 0.0, 0.0)  # nothing came before, and nothing moves
    if kind.with_stats:
        own = _held_out(centred.torch(s, t, centre, inv_tau, ())[1], y) if mix else u
        of_s, *of_t = entropies_advance.torch((0.0, 0.0, 0.0), 0.0, *still[:2], z, own, True)
        entropy_sums = EntropySums(of_s + unknown[0], *(x + unknown[1] for x in of_t))
    logs, exps = _exps(z, u, kind.definition.reads_logs)
    # What does not count has e^z = e^u = 0, and may be called live.
    z_s, z_t, *state = kind.online.advance.torch(kind.online.init.torch(), still, *logs, d, *exps, True, numbers.theta)
    state = (z_s + unknown[0], z_t + unknown[1], *(x + unknown[0] + unknown[1] for x in state))
    if inputs.kept is not None:
        inputs.kept.columns, inputs.kept.tile = columns, Tile(*exps, *logs, d)
    ce_lse = label_s = torch.zeros_like(target.s)
    if numbers.ce is not None and inputs.label is not None:
        ce_lse = or_unknown(columns.full.logsumexp(-1, keepdim=True))
        label_s = columns.full.gather(1, inputs.label.at)
    hole = torch.zeros_like(target.in_support)
    if columns.holes and columns.outside is not None:
        hole = ((s <= ABSENT) & ~columns.outside).any(-1, keepdim=True)
    return Statistics(maxima, state, entropy_sums, target, ce_lse, label_s, hole)


class Reach(NamedTuple):
    """How numbers of the columns that are here become those of whole rows."""

    total: Callable[[Tensor], Tensor]  # sums (n, k) over the columns here -> over all columns
    largest: Callable[[Tensor], Held]  # x (n, V) -> where its first largest number is


def _same(sums: Tensor) -> Tensor:
    return sums


def _largest(x: Tensor) -> Held:
    return Held(x.argmax(-1, keepdim=True))


HERE = Reach(_same, _largest)


class Whole(NamedTuple):
    """Some rows as `RowParameters.torch` sees them; what it asks for is made then."""

    state: tuple[Tensor, ...]  # the online state, (n, 1) each
    log_norms: LogNorms
    teacher: Callable[[], Tensor]  # (n, V) logits
    columns: Callable[[], tuple[Tensor, ...]]  # q, p, log q, log p, δ, (n, V) each
    reach: Reach = HERE


def row_parameters(
    inputs: Inputs, kind: Kind, state: tuple[Any, ...], norms: RowNorms, target: Tensor | None, reach: Reach = HERE
) -> tuple[Tensor, ...]:
    """The parameters that each row finds for itself, (n, 1) each."""
    numbers = inputs.numbers
    y = _held_of(inputs, kind, target)

    def columns() -> tuple[Tensor, ...]:
        found = _normalized(inputs, kind, y, norms.centre, norms.log_norms, with_logs=True)[1]
        tile = [x for x in found if x is not None]  # every one
        if y is None:
            return tuple(tile)
        logq, logp, delta, *_ = norms.binary
        own = (logq.exp(), logp.exp(), logq, logp, delta)
        return tuple(at_column(x, y, x_y) for x, x_y in zip(tile, own, strict=True))

    assert kind.definition.row_parameters is not None
    whole = Whole(state, norms.log_norms, lambda: _columns(inputs, kind).t, columns, reach)
    return kind.definition.row_parameters.torch(whole, numbers.theta)


def term_sums(
    inputs: Inputs, kind: Kind, target: Tensor | None, centre: Centre, log_norms: LogNorms, extras: tuple[Tensor, ...]
) -> TermSums:
    """The sweep of what has no one-sweep form: Σ f, Σ phi and the largest d, (n, 1) each."""
    numbers = inputs.numbers
    y = _held_of(inputs, kind, target)
    columns, tile = _normalized(inputs, kind, y, centre, log_norms)
    widest = _counted(tile.delta.clone(), columns, y)
    f, phi = (_counted(x, columns, y) for x in kind.definition.term.torch(*tile, (*numbers.theta, *extras)))
    # δ of a column with q = 0 < p is as large as its d.
    return TermSums(thread_sum.torch(f), thread_sum.torch(phi), thread_max.torch(widest).clamp(min=0.0))


def _counted(x: Tensor, columns: Columns, y: Held | None) -> Tensor:
    """x (n, V) with 0 in the target's column and outside the support, in place if it is at hand."""
    x = x if columns.outside is None else torch.where(columns.outside, 0.0, x)
    return x if y is None else at_column(x, y, 0.0)


def _normalized(
    inputs: Inputs, kind: Kind, y: Held | None, centre: Centre, log_norms: LogNorms, with_logs: bool | None = None
) -> tuple[Columns, Tile]:
    """The columns, and their tile as centering.at_offsets has it without the columns y, in memory to work in.

    Logarithms that the definition does not read are left out, unless asked for. q is e^z·e^−l_s and not e^(z−l_s),
    whether or not e^z was kept from the first sweep: the gradient is the same number. So is p.
    """
    kept = inputs.kept
    if kept is not None and kept.tile is not None:
        columns, tile = kept.columns, kept.tile
        if kept.is_normalized:
            return columns, tile
        kept.is_normalized = True
    else:
        columns = _columns(inputs, kind)
        z, u, d = centred.torch(columns.s, columns.t, centre, inputs.numbers.inv_tau, inputs.numbers.mix)
        z, u = _held_out(z, y), _held_out(u, y)
        logs, exps = _exps(z, u, kind.definition.reads_logs if with_logs is None else with_logs)
        tile = Tile(*exps, *logs, d)
    for x, offset in zip(tile[2:], log_norms, strict=True):
        if x is not None:
            x.sub_(offset)
    tile.q.mul_((-log_norms.l_s).exp())
    tile.p.mul_((-log_norms.l_t).exp())
    return columns, tile


def _exps(x: Tensor, y: Tensor, with_logs: bool) -> tuple[tuple[Any, Any], tuple[Tensor, Tensor]]:
    """(x, y), (e^x, e^y); these in the memory of those, which are None then, unless they are wanted too."""
    return ((x, y), (exp.torch(x), exp.torch(y))) if with_logs else ((None, None), (x.exp_(), y.exp_()))


class Sweeps(NamedTuple):
    """What goes over the columns of some rows to find their values; between the two are numbers per row."""

    statistics: Callable[[Inputs, Kind], Statistics]
    term_sums: Callable[..., TermSums]


_EAGER = Sweeps(statistics, term_sums)


def row_values(inputs: Inputs, kind: Kind, sweeps: Sweeps = _EAGER) -> RowResult:
    """All sweeps of the value, as `row_value` of device/forward.py."""
    first, numbers = sweeps.statistics(inputs, kind), inputs.numbers
    state, target, online = first.state, first.target, kind.online
    norms = finalize_normalizers.torch(
        first.maxima, state, target.s, target.t, target.in_support, numbers.inv_tau, numbers.mix, online.ratio.torch,
        kind.decoupled,
    )  # fmt: skip
    searches = kind.definition.row_parameters is not None
    extras = row_parameters(inputs, kind, state, norms, target.y) if searches else ()
    theta = (*numbers.theta, *extras)
    if online.sums is None:
        sums = sweeps.term_sums(inputs, kind, target.y, norms.centre, norms.log_norms, extras)
        widest = sums.widest if kind.dtype == torch.float32 else torch.where(first.hole, 1e30, 0.0)
        total, mass = or_infinite.torch(sums.total, widest), sums.mass
    else:
        total, mass = online.sums.torch(state, *norms.log_norms, theta)
        if kind.dtype == torch.float64:
            total = torch.where(first.hole & (total > 1e10), torch.inf, total)
    terms = decompose.torch(
        total, mass, norms.binary, target.in_support, theta, *numbers.weights, *_formulas(kind.definition),
        kind.decoupled,
    )  # fmt: skip
    only_target = (state[1] == 0) & ~(target.s + target.t).isnan()  # nothing to compare but the target: all is 0

    def unless_only_target(x: Tensor) -> Tensor:
        return torch.where(only_target, 0.0, x)

    if not _at_hand(only_target) or bool(only_target.any()):
        terms = tree(unless_only_target, terms)
    loss = terms.loss * numbers.factor
    if numbers.ce is not None:
        loss = loss + numbers.ce * (first.ce_lse - first.label_s)
    stats = _stats(first, norms, terms, only_target, numbers.inv_tau) if kind.with_stats else None
    scalars = RowScalars._make((*norms.centre, *norms.log_norms, terms.a, terms.b, terms.grad_y, first.ce_lse, -1.0))
    rest = (0.0,) * (MOST_EXTRAS - len(extras))
    numbers_of_row = (*scalars, target.y, *extras, *rest)
    each_row = [x if isinstance(x, Tensor) and x.dim() else torch.zeros_like(loss) + x for x in numbers_of_row]
    saved = torch.cat(each_row, -1)
    return RowResult(loss, stats, saved)


def _formulas(definition: Definition) -> tuple[Any, Any]:
    """What `decompose` makes a row's value of."""
    return definition.term.torch, None if definition.outer is None else definition.outer.torch


def _stats(first: Statistics, norms: RowNorms, terms: Decomposition, only_target: Tensor, inv_tau: Any) -> Tensor:
    """(n, STATS): NaN about a target where none is held out."""
    sums, target, (c_s, c_t, k, _), own = first.entropy_sums, first.target, norms.centre, norms.own
    assert sums is not None
    about = (target.in_support, only_target)
    student = side_stats.torch(own.log_zs, sums.student, own.z_y, c_s * inv_tau, target.s * inv_tau, *about)
    log_zt = log_sum.torch(sums.z_t)
    teacher = side_stats.torch(log_zt, sums.teacher, own.own_u_y, (c_t + k) * inv_tau, target.t * inv_tau, *about)
    sides = [x for both in zip(student, teacher, strict=True) for x in both]
    stats = TokenStats(*terms[:5], *sides)
    unknown = torch.zeros_like(target.y).masked_fill(target.y < 0, torch.nan)
    of_target = ("target_loss", "nontarget_loss", "target_grad", "nontarget_grad")
    of_target += ("student_logprob", "teacher_logprob")
    return torch.cat(stats._replace(**{name: getattr(stats, name) + unknown for name in of_target}), -1)


def row_gradients(inputs: Inputs, kind: Kind, saved: Tensor, upstream: Tensor | None, out: Tensor | None) -> Dominant:
    """The gradient sweep: writes into `out` (n, width), or over the student's numbers; wrong at the dominant token.

    Returns that token and what `dominant_entry` takes, (n, 1) each.
    """
    numbers, scalars = inputs.numbers, columns_of(RowScalars, saved, keepdim=True)
    y = _held_of(inputs, kind, target_of(saved))
    columns, tile = _normalized(inputs, kind, y, Centre(*scalars[:4]), LogNorms(*scalars[4:7]))
    extras = extras_of(saved, kind.definition.extras, keepdim=True)
    to, V, slope = inputs.student.x if out is None else out, columns.s.shape[1], columns.slope
    direct = numbers.ce is None and not isinstance(slope, Tensor)
    up = torch.ones_like(scalars.a) if upstream is None else upstream
    scale = up * (numbers.factor * numbers.inv_tau) * (slope if direct else 1.0)
    _, phi = kind.definition.term.slope(*tile, (*numbers.theta, *extras))
    q = tile.q
    workspace = to[:, :V] if direct and _at_hand(to) and to.dtype == phi.dtype else None
    g = torch.addcmul(phi * (scalars.a * scale), q, scalars.b * scale, out=workspace)
    if y is not None:
        q, g = at_column(q, y, 0.0), at_column(g, y, scalars.grad_y * scale)
    if columns.outside is not None:
        g = torch.where(columns.outside, 0.0, g)
    g, token, dominates = _take_out_dominant(g, q)
    rest = torch.where(scale == 0, 0.0, thread_sum.torch(g) / scale)
    at, token = token.clamp(min=0).long(), torch.where(dominates, token, -1)
    if columns.holes:
        g = torch.where(columns.s <= ABSENT, 0.0, g)  # NaN has to pass
    if direct:
        if g is not workspace:
            to[:, :V].copy_(g)
        return Dominant(token, rest, torch.zeros_like(rest), torch.zeros_like(rest) + slope)
    slope_at = slope.gather(1, at) if isinstance(slope, Tensor) else torch.zeros_like(rest) + slope
    found = Dominant(token, rest, columns.full.gather(1, at), slope_at)
    if numbers.ce is not None and inputs.label is not None:
        full, label = columns.full, inputs.label
        whole = cross_entropy_slope(full, 0.0, scalars.ce_lse) * (up * numbers.ce)
        of_label = cross_entropy_slope(full.gather(1, label.at), 1.0, scalars.ce_lse) * (up * numbers.ce)
        whole = at_column(whole, label, of_label)
        if full.shape[1] > V:
            to[:, V:].copy_((whole * slope)[:, V:])
        g = g + whole[:, :V]
    to[:, :V].copy_(g * (slope[:, :V] if isinstance(slope, Tensor) else slope))
    return found


def cross_entropy_slope(s: Tensor, one: Any, ce_lse: Tensor) -> Tensor:
    """Derivative of the cross-entropy by the logits s; `one` is 1 at the label, else 0."""
    return (s - ce_lse).exp() - one


def dominant_entry(found: Dominant, scale: Any, ce: Any, ce_lse: Tensor, label: Tensor | None) -> Tensor:
    """The gradient at the dominant token: minus the sum of the others, which does not cancel.

    scale, ce: what the gradients of the divergence by z and of the cross-entropy are multiplied by; ce may be None.
    """
    entry = -scale * found.rest
    if ce is not None and label is not None:
        entry = entry + ce * cross_entropy_slope(found.logit, (label == found.token).to(entry.dtype), ce_lse)
    return entry * found.slope


def write_gradient(
    inputs: Inputs, kind: Kind, rows: Rows, saved: Tensor, upstream: Tensor | None, out: Tensor, sweep: Sweep
) -> None:
    """The gradient of some rows of a call, whose numbers `saved` and `upstream` are, over the width of `out`."""
    x, numbers = inputs.student.x, inputs.numbers
    beside = isinstance(rows, slice)
    to = out[rows, : x.shape[1]] if beside else x.new_empty(x.shape, dtype=out.dtype)
    up = None if upstream is None else upstream[rows].to(saved.dtype).unsqueeze(-1)
    found: Dominant = sweep(inputs, kind, saved[rows], up, to)
    one = 1.0 if up is None else up
    entry = dominant_entry(
        found,
        one * (numbers.factor * numbers.inv_tau),
        None if numbers.ce is None else one * numbers.ce,
        columns_of(RowScalars, saved[rows], keepdim=True).ce_lse,
        None if inputs.label is None else inputs.label.at,
    )
    at_column(to, Held(found.token.clamp(min=0).long(), found.token >= 0), entry.to(to.dtype))
    if not beside:
        out[rows, : x.shape[1]] = to
    out[rows, x.shape[1] :] = 0


def keep(result: RowResult, rows: Rows, loss: Tensor, saved: Tensor | None, stats: Tensor | None) -> None:
    """Puts what some rows have come to in its place."""
    loss[rows] = result.loss.squeeze(-1).to(loss.dtype)
    if saved is not None:
        saved[rows] = result.saved.to(saved.dtype)
    if stats is not None and result.stats is not None:
        stats[rows] = result.stats.to(stats.dtype)


# For rows that were never whole (schedules/vocab_chunks.py)


def finish_rows(
    problem: Problem,
    rows: Rows,
    pair: tuple[Tensor, ...],
    in_support: Tensor,
    no_columns: Tensor,
    theta: tuple[Tensor, ...],
    total: Tensor,
    mass: Tensor,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Loss; L_T, L_N and their slopes at the target; the gradient's a, b, T: from the target's pair and the sums.

    Loss, a, b and T are 0 where a row is empty.
    """
    weights = values_at(problem.weights, rows, total)
    formulas = _formulas(problem.definition)
    terms = decompose.torch(total, mass, pair, in_support, theta, *weights, *formulas, problem.decoupled)
    result, a, b, grad_y = (torch.where(no_columns, 0.0, x) for x in (terms.loss, terms.a, terms.b, terms.grad_y))
    return result, list(terms[1:5]), (a, b, grad_y)


def values_at(values: tuple[Any, ...], rows: Rows, like: Tensor) -> tuple[Tensor, ...]:
    """Parameters as 0-d tensors, or as (n,) where they are per row."""
    return tuple(
        value[rows].to(like.dtype)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=like.dtype, device=like.device)
        for value in values
    )
