"""What a top-k teacher needs of a student's rows: logits at some columns, the mass of all others, their gradient.

A row has K listed columns; the others are one outcome more, the bucket. Its log-mass is a sum over its columns, never
1 minus the mass of the listed ones, so that it keeps its digits however small it is. Which columns are listed is a bit
each: the cost of a column does not depend on K. One read of each logit for the masses, one more and one write for the
gradient.

A row whose label is negative is not read: its masses are 0, its gradient is 0, its gathered logits are −inf.
"""

from typing import Any, NamedTuple

import torch

from ..language import constant, jit, tl, triton
from ..maths.moments import log_sum
from ..maths.quantities import LogSumExp
from .args import CrossEntropyArg, load_numbers, store_numbers
from .backward import gradient_start, store_gradient, store_zeros
from .loads import finite, label_of, load_logits, row_start
from .rows import Logits, Problem, grad_arg, logits_arg
from .tiles import SMALLEST, Tile, TileKey, architecture, tile_for

WORD = 32  # columns whose bits share an int32


class Masses(NamedTuple):
    """Of a row's columns: the bucket's largest logit (0 without one), its log-sum-exp above that, and that of all.

    The first two are of logits over the temperature once the centre is subtracted; ce_lse is at temperature 1.
    """

    centre: Any
    log_bucket: Any
    ce_lse: Any  # 0 without a cross-entropy


MASSES = len(Masses._fields)
_MASSES = constant(MASSES)
_WORD = constant(WORD)


class BucketArg(NamedTuple):
    """Which columns are not listed: V of them, a bit each, 1 where one is."""

    listed_ptr: Any  # (N, words) int32
    words: Any
    V: Any


class ListedGradient(NamedTuple):
    """The gradient by the logits over the temperature, of the K listed columns and of the bucket's log-mass."""

    listed: Any  # (N, K)
    bucket: Any  # (N,)


@jit
def _mark(ids_ptr, listed_ptr, words, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)  # (BLOCK,)
        ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int32)
        bits = tl.full((BLOCK,), 1, tl.int32) << (ids & (_WORD - 1))
        tl.atomic_or(listed_ptr + row * words + ids // _WORD, bits, mask=ids >= 0)


@jit
def _gather(side, label_ptr, ids_ptr, out_ptr, stride_n, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)  # (BLOCK,)
        ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int32)
        x, slope = load_logits(side, row_start(side, row), 0, ids, (ids >= 0) & counted)
        tl.store(out_ptr + row * stride_n + k, x, mask=k < K)


@jit
def in_bucket(bucket, row, cols):
    """Whether columns (BLOCK,) are compared and not listed."""
    word = tl.load(bucket.listed_ptr + row * bucket.words + cols // _WORD, mask=cols < bucket.V, other=-1)
    return ((word >> (cols % _WORD)) & 1) == 0


@jit
def _masses(student, label_ptr, bucket, masses_ptr, width, inv_tau, ce, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    top, total, cross = -1e20, 0.0, LogSumExp(tl.full((), -1e20, tl.float32), tl.full((), 0.0, tl.float32))
    for start in range(0, tl.where(counted, width, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
        s, slope = load_logits(student, row_start(student, row), 0, cols, cols < width)
        s = finite(s)
        if ce is not None:
            x = tl.where(cols < width, s, -1e30)
            raised = tl.maximum(cross.top, tl.max(x))
            cross = LogSumExp(raised, cross.total * tl.exp(cross.top - raised) + tl.sum(tl.exp(x - raised)))
        live = in_bucket(bucket, row, cols)
        x = tl.where(live, s, -1e30)
        raised = tl.maximum(top, tl.max(x))
        total = total * tl.exp((top - raised) * inv_tau) + tl.sum(tl.where(live, tl.exp((x - raised) * inv_tau), 0.0))
        top = raised
    empty = total == 0
    log_bucket = tl.where(empty, float("-inf"), log_sum(total))
    ce_lse = cross.top + log_sum(cross.total)
    if ce is None:
        ce_lse = 0.0
    store_numbers(masses_ptr + row * _MASSES, Masses(tl.where(empty, 0.0, top), log_bucket, ce_lse))


@jit
def _gradient(
    student, label_ptr, ids_ptr, logits_ptr, stride_logits, bucket, masses_ptr, listed_grad_ptr, bucket_grad_ptr,
    upstream_ptr, grad, K, inv_tau, ce, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, counted = label_of(label_ptr, row)
    upstream = 1.0
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + row)
    if counted & (upstream != 0):
        of_row = Masses(*load_numbers(masses_ptr + row * _MASSES, _MASSES))
        of_bucket = tl.load(bucket_grad_ptr + row) * inv_tau
        seen = tl.where(of_bucket != 0, bucket.V, 0)  # nothing is to be shared out where both are renormalised
        if ce is not None:
            seen = grad.width
        for start in range(0, grad.width, BLOCK):
            cols = start + tl.arange(0, BLOCK)  # (BLOCK,)
            s, slope = load_logits(student, row_start(student, row), 0, cols, cols < seen)
            live = in_bucket(bucket, row, cols)
            s = finite(s)
            g = tl.where(live, of_bucket * tl.exp((s - of_row.centre) * inv_tau - of_row.log_bucket), 0.0)
            if ce is not None:
                g += upstream * ce.weight * (tl.exp(s - of_row.ce_lse) - tl.where(cols == label, 1.0, 0.0))
            store_gradient(grad, gradient_start(grad, row), cols, tl.where(s <= -1e30, 0.0, g), slope, grad.width)
        tl.debug_barrier()  # the entries that the sweep wrote there may be another warp's, and still on their way
        for start in range(0, K, LISTED):
            k = start + tl.arange(0, LISTED)  # (LISTED,)
            ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=-1).to(tl.int32)
            # Gathered before the sweep, which may have written over the logits.
            s = tl.load(logits_ptr + row * stride_logits + k, mask=k < K, other=float("-inf"))
            g = tl.load(listed_grad_ptr + row * K + k, mask=k < K, other=0.0) * inv_tau
            if ce is not None:
                g += upstream * ce.weight * (tl.exp(finite(s) - of_row.ce_lse) - tl.where(ids == label, 1.0, 0.0))
            slope = 1.0
            if student.scale is not None:
                slope = slope * student.scale
            if student.softcap is not None:
                slope = slope * (1.0 - (s / student.softcap) * (s / student.softcap))
            g = tl.where(s <= -1e30, 0.0, g)
            store_gradient(grad, gradient_start(grad, row), tl.where(ids < 0, grad.width, ids), g, slope, grad.width)
    else:
        store_zeros(grad, row, BLOCK)


def _tile(student: Logits, width: int) -> Tile:
    return tile_for(TileKey(architecture(student.x.device), "light", student.x.element_size()), width)


def _listed(k: int) -> int:
    """How many of K columns a program takes at a time."""
    return min(1024, max(SMALLEST, triton.next_power_of_2(max(k, 1))))


def mark(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(N, words) int32: the bits of the columns that `ids` (N, K) lists."""
    n, k = ids.shape
    listed = torch.zeros((n, -(-vocab_size // WORD)), dtype=torch.int32, device=ids.device)
    if n and k:
        block = _listed(k)
        _mark[(n,)](ids, listed, listed.shape[1], k, BLOCK=block, **Tile(block, 1).options())
    return listed


def gather(side: Logits, ids: torch.Tensor, labels: torch.Tensor | None, out: torch.Tensor) -> Any:
    """Writes the logits at the columns `ids` (N, K) into `out` (N, K), −inf where one is negative."""
    n, k = ids.shape
    if n and k:
        block = _listed(k)
        return _gather[(n,)](
            logits_arg(side), labels, ids, out, out.stride(0), k, BLOCK=block, **Tile(block, 4).options()
        )
    return None


def masses(problem: Problem, student: Logits, ids: torch.Tensor, labels: torch.Tensor | None, out: torch.Tensor) -> Any:
    """Fills `out` (N, MASSES) from one sweep over the student's rows."""
    n = out.shape[0]
    if n:
        width = student.x.shape[2] if problem.ce_weight else problem.vocab_size
        best = _tile(student, width)
        return _masses[(n,)](
            logits_arg(student), labels, _bucket_arg(problem, ids), out, width, 1.0 / problem.temperature,
            _cross_entropy_arg(problem, student), BLOCK=best.block, **best.options(),
        )  # fmt: skip
    return None


def gradient(
    problem: Problem,
    student: Logits,
    ids: torch.Tensor,
    labels: torch.Tensor | None,
    logits: torch.Tensor,
    kept: torch.Tensor,
    found: ListedGradient,
    upstream: torch.Tensor | None,
    out: torch.Tensor,
) -> Any:
    """Writes the gradient by the student's stored logits into `out` (N, width), which may lie over them.

    From the gathered `logits` (N, K), `kept` (N, MASSES) and `found`, which has the upstream gradient in it already.
    """
    n, k = ids.shape
    if n:
        best = _tile(student, out.shape[1])
        return _gradient[(n,)](
            logits_arg(student), labels, ids, logits, logits.stride(0), _bucket_arg(problem, ids), kept, found.listed,
            found.bucket, upstream, grad_arg(out), k, 1.0 / problem.temperature, _cross_entropy_arg(problem, student),
            BLOCK=best.block, LISTED=_listed(k), **best.options(),
        )  # fmt: skip
    return None


def _bucket_arg(problem: Problem, ids: torch.Tensor) -> BucketArg:
    listed = mark(ids, problem.vocab_size)
    return BucketArg(listed, listed.shape[1], problem.vocab_size)


def _cross_entropy_arg(problem: Problem, student: Logits) -> CrossEntropyArg | None:
    return CrossEntropyArg(float(problem.ce_weight), student.x.shape[2]) if problem.ce_weight else None
