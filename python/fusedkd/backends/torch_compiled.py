"""The sweeps of torch_rows.py through torch.compile, with its interface: backend="compiled".

torch.compile makes loops over the columns of them, which keep nothing of a row's size and look at no value: rows that
are close, where eager torch calculates with care, take as long as others. There is a graph for each sweep, compiled
when a kind of call is first seen, which takes a while and a C++ compiler; numbers per row stay eager, since inductor,
which is to store no column, would write their formulas out at each use. `check_rows` refuses what is not compiled:
float64, since the kernels' series are those of float32, and what searches its rows first (amid.py, akl.py).
"""

import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.device.args import SAVED, TermSums
from ..kernels.device.rows import Logits, Problem
from ..kernels.maths.definition import Definition
from . import torch_rows
from .torch_rows import (
    Call,
    Inputs,
    Kind,
    Rows,
    Statistics,
    Sweeps,
    floor_rows,
    kind_of,
    row_gradients,
    row_values,
    statistics,
    term_sums,
)

__all__ = ["check", "check_rows", "floor_rows", "gradient", "value", "value_and_gradient"]

_BLOCK = 1 << 26  # logits per side that a graph takes at a time: more than a chunk of a Head has
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
    if definition.whole_rows:
        name = definition.name.split("_")[0]
        raise ValueError(f'divergence {name!r} searches its rows and needs backend="torch", got backend="compiled"')


def _statistics(inputs: Inputs, kind: Kind) -> Statistics:
    return _graph(statistics, inputs, kind)(inputs)


def _term_sums(inputs: Inputs, kind: Kind, *rest: Any) -> TermSums:
    return _graph(_terms, inputs, kind)(inputs, *rest)


def _terms(inputs: Inputs, target: Any, centre: Any, log_norms: Any, extras: Any, kind: Kind) -> TermSums:
    return term_sums(inputs, kind, target, centre, log_norms, extras)


_SWEEPS = Sweeps(_statistics, _term_sums)


def _gradient(inputs: Inputs, saved: Tensor, upstream: Tensor | None, out: Tensor | None, kind: Kind) -> Any:
    return row_gradients(inputs, kind, saved, upstream, out)


def _graph(sweep: Callable[..., Any], inputs: Inputs, kind: Kind, out: Tensor | None = None) -> Callable[..., Any]:
    """A sweep compiled for a kind of call and the dtypes of some tensors; sizes are compiled in where they are 1."""
    tensors = (inputs.student.x, inputs.teacher.x, *inputs.numbers.theta, *inputs.numbers.weights, *inputs.numbers.mix)
    seen = tuple(None if x is None else (x.dtype, *(n == 1 for n in x.shape)) for x in (*tensors, out))
    key = (sweep, id(kind.definition), id(kind.online), kind[2:], seen)
    if key not in _graphs:
        # A code object of its own: torch.compile counts the versions of each, and stops at eight.
        name = f"{sweep.__name__.strip('_')}_{kind.definition.name}_{len(_graphs)}"
        own = types.FunctionType(sweep.__code__.replace(co_name=name), sweep.__globals__, name, (kind,))
        _graphs[key] = torch.compile(  # pyright: ignore[reportUnknownMemberType]
            own, dynamic=True, fullgraph=True, options=_OPTIONS
        )
    return _graphs[key]


def _blocks(call: Call, rows: Rows) -> Iterator[tuple[Rows, Inputs]]:
    """Rows for one run of a graph, which shares them out among the threads in a few parallel regions."""
    zero = torch.zeros((), device=call.student.x.device)
    step = max(torch.get_num_threads(), _BLOCK // max(call.problem.vocab_size, 1))
    for i in range(0, torch_rows.count_of(rows), step):
        part = torch_rows.part_of(rows, i, i + step)
        yield part, call.inputs(part, lambda x: zero + x)


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
    torch_rows.clear(loss, stats, saved)
    call, kind = Call(problem, student, teacher, labels, loss.dtype), kind_of(problem, loss.dtype, stats is not None)
    with torch.no_grad():
        for rows, inputs in _blocks(call, torch_rows.counted(labels, None, len(loss))):
            torch_rows.keep(row_values(inputs, kind, _SWEEPS), rows, loss, saved, stats)


def _sweep(inputs: Inputs, kind: Kind, saved: Tensor, upstream: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """row_gradients, compiled. Memory that is read and written must come in once: a copy would be worked on."""
    x = inputs.student.x
    same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride() and out.dtype == x.dtype
    target = None if same else out
    up = torch.ones_like(saved[:, :1]) if upstream is None else upstream
    return _graph(_gradient, inputs, kind, target)(inputs, saved, up, target)


def gradient(
    problem: Problem,
    student: Logits,
    teacher: Logits,
    labels: Tensor | None,
    saved: Tensor,
    upstream: Tensor | None,
    out: Tensor,
) -> None:
    """Writes upstream_n · dloss_n/dx into `out` (N, student width), as device.rows.gradient."""
    call, kind = Call(problem, student, teacher, labels, saved.dtype), kind_of(problem, saved.dtype)
    with torch.no_grad():
        for rows, inputs in _blocks(call, torch_rows.uncounted_zeroed(labels, upstream, out)):
            torch_rows.write_gradient(inputs, kind, rows, saved, upstream, out, _sweep)


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
    saved = loss.new_empty((len(loss), SAVED))
    value(problem, student, teacher, labels, loss, saved, stats)
    gradient(problem, student, teacher, labels, saved, upstream, out)
