"""The row work in compiled torch, with the interface of torch_rows.py: backend="compiled".

Two graphs for a block of rows, value and gradient, follow the sweeps of kernels/device/rows.py and are traced from the
same formulas. torch.compile makes loops over the columns of them, which keep nothing of a row's size and look at no
value: rows that are close, where torch_rows.py must calculate with care, take as long as others. A graph is compiled
when a kind of call is first seen, which takes seconds and a C++ compiler. `check_rows` refuses what is not
compiled: float64, since the kernels' series are those of float32, and what searches its rows first (amid.py, akl.py),
of which a graph would take minutes.
"""

import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..kernels.device.rows import Logits, Problem
from ..kernels.maths.centering import above_centre, at_offsets, centre_of, centred, mixed, no_maxima
from ..kernels.maths.decomposition import ABSENT, decompose, finalize_normalizers, or_infinite, side_stats
from ..kernels.maths.definition import Definition, OnlineForm
from ..kernels.maths.elementary import exp
from ..kernels.maths.moments import entropies_advance, log_sum
from ..kernels.maths.reductions import thread_max, thread_sum
from . import torch_rows
from .torch_rows import columnwise, floor_rows, row_blocks, shaped, stored

__all__ = ["check", "check_rows", "floor_rows", "gradient", "value", "value_and_gradient"]

_SCALARS = 11  # per row, before those that the row itself decides (RowParameters)
# Never keep a number per column that can be calculated again: memory is slower.
_OPTIONS: Any = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 1 << 20
)
_graphs: dict[Any, Callable[..., Any]] = {}


def check() -> None:
    """Refuse to be asked for what this machine cannot do.

    Raises:
        ValueError: no C++ compiler where torch.compile looks for one.
    """
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(name) is None:
        raise ValueError(
            f'backend="compiled" needs a C++ compiler, and {name!r} is not on the PATH: install it, name another one '
            'in the variable CXX, or use backend="torch"'
        )


def check_rows(definition: Definition, dtype: torch.dtype) -> None:
    """Refuse rows that are not compiled.

    Raises:
        ValueError: the losses are float64, or the definition searches its rows.
    """
    if dtype == torch.float64:
        raise ValueError('float64 inputs need backend="torch", got backend="compiled"')
    if not definition.separable:
        name = definition.name.split("_")[0]
        raise ValueError(f'divergence {name!r} searches its rows and needs backend="torch", got backend="compiled"')


class _Kind(NamedTuple):
    """What a graph is compiled for; everything else in it is a tensor."""

    definition: Definition
    online: OnlineForm
    decoupled: bool
    argmax: bool
    with_stats: bool


class _Pair(NamedTuple):
    """Stored numbers of both sides with what makes them logits, and the labels."""

    student: tuple[Any, ...]  # (n, width), bias, scale, softcap
    teacher: tuple[Any, ...]  # (n, V), bias, scale, softcap
    floor: torch.Tensor | None  # (n, 1)
    label: torch.Tensor | None  # (n, 1)


class _Numbers(NamedTuple):
    """0-d tensors, or (n, 1) where they are per row."""

    theta: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    mix: tuple[torch.Tensor | None, ...]  # one
    inv_tau: torch.Tensor
    factor: torch.Tensor
    ce: torch.Tensor | None


class _Columns(NamedTuple):
    """The columns of some rows; −1e30 stands for −inf."""

    s: torch.Tensor  # (n, V)
    t: torch.Tensor  # (n, V)
    full: torch.Tensor  # (n, width) student logits, −inf where they are
    slope: torch.Tensor | float  # their derivative by the stored numbers
    live: torch.Tensor  # (n, V) in the support
    y: torch.Tensor | None  # (n, 1) targets
    held: torch.Tensor | None  # (n, V) the target's column


def _numbered(x: torch.Tensor) -> torch.Tensor:
    """The columns' numbers: 32 bits take half the instructions of 64."""
    return torch.arange(x.shape[1], dtype=torch.int32, device=x.device)


def _columns(pair: _Pair, argmax: bool) -> _Columns:
    full, slope = shaped(pair.student[0].float(), *pair.student[1:])
    t, _ = shaped(pair.teacher[0].float(), *pair.teacher[1:])
    s = full[:, : t.shape[1]]
    live = t != -torch.inf  # true of a NaN, which must show
    if pair.floor is not None:
        live = live | (s != -torch.inf)
        t = torch.maximum(t, pair.floor)
    y = t.argmax(-1, keepdim=True) if argmax else pair.label
    held = None if y is None else _numbered(t) == y.int()
    return _Columns(s.clamp(min=ABSENT), t.clamp(min=ABSENT), full, slope, live, y, held)


def _centre(s: torch.Tensor, t: torch.Tensor, inv_tau: torch.Tensor, mix: tuple[Any, ...]) -> tuple[Any, Any]:
    """The maxima of whole rows and what logits are measured from, as columns.raise_maxima finds them tile by tile."""
    top_s, top_t = (thread_max.torch(x).clamp(min=no_maxima.torch()[0]) for x in (s, t))
    maxima = (top_s, top_t, 0.0)
    centre = centre_of.torch(maxima, inv_tau, ())
    if not mix:
        return maxima, centre
    maxima = (top_s, top_t, thread_max.torch(mixed.torch(*above_centre.torch(s, t, centre), mix)))
    return maxima, centre_of.torch(maxima, inv_tau, mix)


def _value(pair: _Pair, numbers: _Numbers, kind: _Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (n, 1), statistics (n, STATS) if wanted, and the row scalars of the gradient (n, _SCALARS + extras)."""
    s, t, full, _, live, y, held = _columns(pair, kind.argmax)
    inv_tau, mix, theta, online = numbers.inv_tau, numbers.mix, numbers.theta, kind.online
    zero = torch.zeros_like(s[:, :1])
    s_y = t_y = zero + ABSENT
    in_support = zero > 0
    if y is not None and held is not None:
        s_y, t_y = (torch_rows.or_unknown(x.gather(1, y)) for x in (s, t))
        in_support = live.gather(1, y)
        live = live & ~held
    # What does not count has e^z = e^u = 0, and may then be called live (moments.py).
    s, t = torch.where(live, s, ABSENT), torch.where(live, t, ABSENT)
    maxima, centre = _centre(s, t, inv_tau, mix)
    z, u, d = centred.torch(s, t, centre, inv_tau, mix)
    # All columns at once: nothing came before them, and nothing moves.
    state = online.advance.torch(online.init.torch(), (0.0, 0.0, 0.0), z, u, d, exp.torch(z), exp.torch(u), True, theta)
    row_norms = finalize_normalizers.torch(
        maxima, state, s_y, t_y, in_support, inv_tau, mix, online.ratio.torch, kind.decoupled
    )
    centre, at, target, own = row_norms
    q, p, logq, logp, delta, d = at_offsets.torch(s, t, centre, at, inv_tau, mix)
    extras: tuple[torch.Tensor, ...] = ()
    if kind.definition.row_parameters is not None:
        near = (state[3] < 0.5 * state[0]).squeeze(-1)
        columns, of_target = torch_rows.Columns(q, p, (logq, logp), delta), tuple(x.squeeze(-1) for x in target[:3])
        found = kind.definition.row_parameters.torch(torch_rows.Whole(near, s.dtype, t, y, columns, of_target), theta)
        extras = tuple(x.unsqueeze(-1) for x in found)
        theta = (*theta, *extras)
    if online.sums is not None:
        total, mass = online.sums.torch(state, *at, theta)
    else:
        f, phi = kind.definition.term.torch(q, p, logq, logp, delta, theta)
        total, mass = (thread_sum.torch(torch.where(live, x, 0.0)) for x in (f, phi))
        total = or_infinite.torch(total, torch.where(live, d, 0.0).amax(-1, keepdim=True))
    settled = decompose.torch(
        total, mass, target, in_support, theta, *numbers.weights, kind.definition.term.torch, kind.decoupled
    )
    *split, a, b, grad_y = settled
    no_columns = (state[1] == 0) & ~(s_y + t_y).isnan()
    loss, ce_lse = torch.where(no_columns, 0.0, split[0] * numbers.factor), zero
    if numbers.ce is not None and pair.label is not None:
        ce_lse = torch_rows.or_unknown(full.logsumexp(-1, keepdim=True))
        loss = loss + numbers.ce * (ce_lse - full.gather(1, pair.label))
    stats = zero
    if kind.with_stats:
        _, plain, _ = centred.torch(s, t, centre, inv_tau, ())
        entropy_sums = entropies_advance.torch((0.0, 0.0, 0.0), 0.0, 0.0, 0.0, z, plain, live)
        sides = _about_sides(entropy_sums, own, centre, inv_tau, (s_y, t_y), in_support, no_columns)
        terms = [torch.where(no_columns, 0.0, x) for x in split]
        if y is None:
            unknown = zero + torch.nan
            terms = [terms[0], unknown, unknown, unknown, unknown]
            sides = [(entropy, unknown, lse) for entropy, _, lse in sides]
        stats = torch.cat([*terms, *(x for both in zip(*sides, strict=True) for x in both)], -1)
    scalars = (*centre, *at, *(torch.where(no_columns, 0.0, x) for x in (a, b, grad_y)), ce_lse, *extras)
    return loss, stats, torch.cat([x + zero for x in scalars], -1)


def _about_sides(
    entropy_sums: tuple[torch.Tensor, ...],
    own: tuple[torch.Tensor, ...],
    centre: tuple[Any, ...],
    inv_tau: torch.Tensor,
    at_target: tuple[torch.Tensor, torch.Tensor],
    in_support: torch.Tensor,
    no_columns: torch.Tensor,
) -> list[tuple[torch.Tensor, ...]]:
    """Entropy, log-probability of the target and log-sum-exp of the student and of the unmixed teacher."""
    log_zs, zy, own_uy = own
    c_s, c_t, k, _ = centre
    s_alone, t_alone = (x * inv_tau for x in at_target)
    return [
        side_stats.torch(log_zs, entropy_sums[0], zy, c_s * inv_tau, s_alone, in_support, no_columns),
        side_stats.torch(
            log_sum.torch(entropy_sums[2]),
            entropy_sums[1],
            own_uy,
            (c_t + k) * inv_tau,
            t_alone,
            in_support,
            no_columns,
        ),
    ]


def _gradient(
    pair: _Pair,
    numbers: _Numbers,
    scalars: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor | None,
    kind: _Kind,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the gradient into `out`, or over the student's numbers; 0 for a token likelier than 1/2.

    Returns where that token is (−1: there is none) and its entry: minus the sum of the others, which does not cancel.
    """
    s, t, full, slope, live, _, held = _columns(pair, kind.argmax)
    *centre, l_s, l_t, r, a, b, grad_y, ce_lse = scalars[:, :_SCALARS].split(1, -1)
    extras = scalars[:, _SCALARS:].split(1, -1) if kind.definition.extras else ()
    offsets = (l_s, l_t, r)
    q, p, logq, logp, delta, _ = at_offsets.torch(s, t, tuple(centre), offsets, numbers.inv_tau, numbers.mix)
    _, phi = kind.definition.term.torch(q, p, logq, logp, delta, (*numbers.theta, *extras))
    counts = live & ~(s <= ABSENT)
    dominates = counts & (q > 0.5)
    g = a * phi + b * q
    if held is not None:
        dominates = dominates & ~held
        g = torch.where(held, grad_y, g)
    g = torch.where(counts & ~dominates, g, 0.0) * (upstream * numbers.factor * numbers.inv_tau)
    entry = -thread_sum.torch(g)
    top = torch.where(dominates, _numbered(t), -1).amax(-1, keepdim=True)
    at = top.clamp(min=0).long()
    to, V = pair.student[0] if out is None else out, t.shape[1]
    ce = None
    if numbers.ce is not None and pair.label is not None:
        is_label = torch.where(_numbered(full) == pair.label.int(), 1.0, 0.0)
        ce = upstream * numbers.ce * ((full - ce_lse).exp() - is_label)
        entry = entry + ce.gather(1, at)
        g = torch.where(dominates, 0.0, g + ce[:, :V])
    if isinstance(slope, torch.Tensor):
        slope = slope.expand_as(full)
        g, entry = g * slope[:, :V], entry * slope.gather(1, at)
    idle = upstream == 0  # whatever the row holds
    to[:, :V].copy_(torch.where(idle, 0.0, g).to(to.dtype))
    if ce is not None and full.shape[1] > V:
        to[:, V:].copy_(torch.where(idle, 0.0, (ce * slope)[:, V:]).to(to.dtype))
    return top, torch.where(idle, 0.0, entry)


def _graph(sweep: Callable[..., Any], problem: Problem, with_stats: bool, *tensors: torch.Tensor | None) -> Any:
    """A sweep compiled for a kind of call and the dtypes of some tensors; sizes are compiled in where they are 1."""
    online = problem.definition.sweep(problem.parameters)
    kind = _Kind(problem.definition, online, problem.decoupled, problem.argmax, with_stats)
    seen = tuple(None if x is None else (x.dtype, *(n == 1 for n in x.shape)) for x in tensors)
    key = (sweep, id(kind.definition), id(online), kind[2:], seen)
    if key not in _graphs:
        # A code object of its own: torch.compile counts the versions of each, and stops at eight.
        name = f"{sweep.__name__.strip('_')}_{kind.definition.name}_{len(_graphs)}"
        own = types.FunctionType(sweep.__code__.replace(co_name=name), sweep.__globals__, name, (kind,))
        _graphs[key] = torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)
    return _graphs[key]


class _Block(NamedTuple):
    """Some rows of a call."""

    rows: torch.Tensor | slice
    pair: _Pair
    numbers: _Numbers

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those whose dtypes and sizes a graph is compiled for."""
        numbers = self.numbers
        return self.pair.student[0], self.pair.teacher[0], *numbers.theta, *numbers.weights, *numbers.mix


def _blocks(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    n: int,
    out: torch.Tensor | None = None,
) -> Iterator[_Block]:
    """The counted rows, a block at a time; other rows of `out` are zeroed."""
    V, device = problem.vocab_size, student.x.device
    width = student.x.shape[2] if problem.ce_weight else V
    zero = torch.zeros((), device=device)

    def logits(side: Logits, rows: torch.Tensor | slice, width: int) -> tuple[Any, ...]:
        bias = None if side.bias is None else side.bias[:width].detach()
        return (
            stored(side, rows, width).detach(),
            bias,
            *(None if x is None else zero + x for x in (side.scale, side.softcap)),
        )

    inv_tau, factor, ce = (zero + x for x in (1.0 / problem.temperature, problem.factor, problem.ce_weight))
    for rows in row_blocks(V, labels, n, device, out, shared=True):
        pair = _Pair(
            logits(student, rows, width),
            logits(teacher, rows, V),
            None if teacher.floor is None else teacher.floor[rows].unsqueeze(-1),
            None if labels is None else labels[rows].unsqueeze(-1),
        )
        yield _Block(
            rows,
            pair,
            _Numbers(
                columnwise(problem.parameters, rows, zero),
                columnwise(problem.weights, rows, zero),
                () if problem.mix is None else columnwise((problem.mix,), rows, zero),
                inv_tau,
                factor,
                ce if problem.ce_weight else None,
            ),
        )


def _evaluate(problem: Problem, block: _Block, loss: torch.Tensor, stats: torch.Tensor | None) -> torch.Tensor:
    """Loss and statistics of a block; the row scalars of its gradient."""
    graph = _graph(_value, problem, stats is not None, *block.tensors)
    own, about, scalars = graph(block.pair, block.numbers)
    loss[block.rows] = own.squeeze(-1)
    if stats is not None:
        stats[block.rows] = about
    return scalars


def _write(
    problem: Problem, block: _Block, scalars: torch.Tensor, upstream: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The gradient of a block, over the student's width."""
    x = block.pair.student[0]
    width = x.shape[1]
    up = torch.ones_like(scalars[:, :1]) if upstream is None else upstream[block.rows].unsqueeze(-1)
    together = isinstance(block.rows, slice)
    to = out[block.rows, :width] if together else x.new_empty(x.shape, dtype=out.dtype)
    # Memory that is read and written must come in once: torch.compile would work on a copy of it.
    same = to.data_ptr() == x.data_ptr() and to.stride() == x.stride() and to.dtype == x.dtype
    target = None if same else to
    top, entry = _graph(_gradient, problem, False, *block.tensors, target)(
        block.pair, block.numbers, scalars, up, target
    )
    at = top.clamp(min=0).long()
    to.scatter_(1, at, torch.where(top >= 0, entry.to(to.dtype), to.gather(1, at)))
    if not together:
        out[block.rows, :width] = to
    out[block.rows, width:] = 0


def value(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """Fills `loss` (N,), the row scalars `saved` (N, SAVED) and `stats` (N, STATS), as device.rows.value."""
    torch_rows.clear(loss, stats, saved)
    with torch.no_grad():
        for block in _blocks(problem, student, teacher, labels, len(loss)):
            scalars = _evaluate(problem, block, loss, stats)
            if saved is not None:
                saved[block.rows, : scalars.shape[1]] = scalars


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: torch.Tensor | None,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), as device.rows.gradient."""
    with torch.no_grad():
        for block in _blocks(problem, student, teacher, labels, len(out), out):
            _write(problem, block, saved[block.rows, : _SCALARS + problem.definition.extras], upstream, out)


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
    """Fills `loss`, `stats` and `out`, as device.rows.value_and_gradient."""
    torch_rows.clear(loss, stats)
    with torch.no_grad():
        for block in _blocks(problem, student, teacher, labels, len(out), out):
            _write(problem, block, _evaluate(problem, block, loss, stats), upstream, out)
