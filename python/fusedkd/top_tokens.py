"""`topk`: the likeliest tokens of logits or of a Head and their log-probabilities, without the logit matrix.

A Head's logits are made some vocabulary columns at a time, in one buffer; given logits are read some rows at a time.
Each part gives its k largest logits, which are merged with those found before, and its share of the softmax's sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends.torch_rows import logits as whole_logits
from .dtypes import accumulation_dtype, logit_dtype
from .head import Side, autocast, detached
from .kernels.device.rows import Logits
from .schedules.operands import DenseLogits, HeadLogits, flattened
from .schedules.planner import Shape, choose_width
from .topk import TopK

_CPU_LOGITS, _GPU_LOGITS = 1 << 22, 1 << 24  # of a tensor at once


@torch.no_grad()
def topk(side: Side, k: int, temperature: float = 1.0, vocab_size: int | None = None) -> TopK:
    """The k likeliest tokens of each position with their log-probabilities in the full softmax: a teacher for a cache.

    Args:
        side: (..., V) logits, any float dtype and strides, or a `Head`, whose product is accumulated in float32 and
            runs in autocast's dtype where that is on. No gradient flows.
        k: from 1 to 4096, and no more than the columns.
        temperature: τ > 0, divides the logits: log p = log softmax(logits/τ), as `kd_loss` wants it at the same τ.
        vocab_size: softmax over the first columns only, where the rest is padding.

    Returns:
        `TopK` with ids (..., k) int32 and logprobs (..., k) float32, in nats, descending; of equal logits the lower id
        comes first and is kept. Where fewer than k logits are finite, the rest is absent: id −1, log-probability −inf.
        NaN or +inf among the logits makes the row's log-probabilities NaN. tail is "bucket"; `_replace` changes it.

    Accuracy: beside a float64 softmax of the same logits, wherever they lie (they are centred first): 2⁻²⁴·|log p| for
    the rounding of the result, and what the float32 sum of exponentials costs, below 1e-6 for rows of random logits and
    at most 2⁻²³·(ln V + 2), where a row's many equal logits all round alike.

    Cost: one product for a Head, one read of given logits, a few sweeps over each part of them. Memory beyond inputs
    and results: about 4·N·(c + k) floats for a Head of N tokens, in chunks of c columns (at least k; what the streaming
    schedule of `kd_loss` takes); for logits 4·2²² floats (2²⁴ on a GPU), or 4 rows. Nothing waits for a GPU.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what would work.
    """
    checks.side("side", side)
    checks.integer("k", k)
    checks.positive("temperature", temperature)
    width = checks.width(side)
    if vocab_size is not None:
        checks.integer("vocab_size", vocab_size)
        checks.within("vocab_size", vocab_size, 1, width)
    columns = width if vocab_size is None else int(vocab_size)
    checks.within("k", k, 1, min(checks.MOST_LISTED, columns))
    shape, where = checks.leading(side), checks.device(side)
    operand = flattened(autocast(detached(side)))
    place = where.type if torch.amp.is_autocast_available(where.type) else "cpu"
    with torch.autocast("cpu", enabled=False), torch.autocast(place, enabled=False):
        ids, logprobs = _likeliest(operand, int(k), float(temperature), columns)
    return TopK(ids.view(*shape, k), logprobs.view(*shape, k), temperature=float(temperature), vocab_size=columns)


class _Found(NamedTuple):
    """What some rows have shown so far, in the order of the result."""

    values: Tensor  # (n, k) largest logits
    ids: Tensor  # (n, k) int64
    top: Tensor  # (n, 1) float64, the largest logit
    total: Tensor  # (n, 1) float64, Σ exp((x − top)/τ)


def _likeliest(side: DenseLogits | HeadLogits, k: int, temperature: float, columns: int) -> tuple[Tensor, Tensor]:
    """Ids (N, k) int32 and log-probabilities (N, k) float32."""
    like = side.tensors[0]
    ids = like.new_empty((side.rows, k), dtype=torch.int32)
    logprobs = like.new_empty((side.rows, k), dtype=torch.float32)
    for rows, parts in _parts(side, k, columns):
        found: _Found | None = None
        for first, part, width in parts:
            x, _ = whole_logits(part, slice(0, rows.stop - rows.start), width, accumulation_dtype(like))
            mine = _of_part(x, min(k, width), temperature, first)
            found = mine if found is None else _merged(found, mine, k, temperature)
        assert found is not None  # there is a column
        top = _finite(found.top)
        exact = (found.values.double() - top) / temperature - found.total.log()
        logprobs[rows] = torch.where(found.values == -torch.inf, -torch.inf, exact).float()
        ids[rows] = torch.where(logprobs[rows] == -torch.inf, -1, found.ids).int()
    return ids, logprobs


def _parts(
    side: DenseLogits | HeadLogits, k: int, columns: int
) -> Iterator[tuple[slice, Iterator[tuple[int, Logits, int]]]]:
    """Rows, and the columns of these in turn: the first one, the logits and how many there are."""
    on_cpu, n = side.tensors[0].device.type == "cpu", side.rows
    high, wide, buffer = n, columns, None
    if isinstance(side, HeadLogits):
        wide = min(columns, max(k, choose_width(_shape(side, columns, on_cpu), None)))
        buffer = side.buffer(n, wide, None)
    else:
        high = max(1, (_CPU_LOGITS if on_cpu else _GPU_LOGITS) // columns)

    def across(rows: slice) -> Iterator[tuple[int, Logits, int]]:
        for first in range(0, columns, wide):
            at = slice(first, min(first + wide, columns))
            yield first, side.logits(rows, at, buffer), at.stop - first

    for start in range(0, n, max(high, 1)):
        rows = slice(start, min(start + high, n))
        yield rows, across(rows)


def _shape(side: HeadLogits, columns: int, on_cpu: bool) -> Shape:
    """One buffer of logits, and no gradient."""
    hidden = side.hidden
    return Shape(
        rows=side.rows,
        student_width=columns,
        teacher_width=0,
        student_dim=side.dim,
        teacher_dim=0,
        weight_rows=side.width,
        logit_bytes=logit_dtype(hidden.dtype, None).itemsize,
        dz_bytes=0,
        hidden_bytes=hidden.element_size(),
        accumulator_bytes=accumulation_dtype(hidden).itemsize,
        on_cpu=on_cpu,
        gather=False,
        needs_hidden=False,
        needs_weight=False,
    )


def _of_part(x: Tensor, k: int, temperature: float, first: int) -> _Found:
    """What x (n, c) shows, the columns from `first` on; k ≤ c."""
    top = x.amax(-1, keepdim=True)
    gaps = x - _finite(top)
    total = (gaps if temperature == 1.0 else gaps.div_(temperature)).exp_().sum(-1, keepdim=True)
    del gaps  # so that what finds the largest can have its memory
    values, ids = x.topk(k)
    if k < x.shape[1]:
        # Which of several tokens with the k-th largest logit are among the k, is anyone's guess: the first ones are.
        least = values[:, -1:]
        counts = (x == least).cumsum(-1, dtype=torch.int32)
        tied = values == least
        earliest = torch.searchsorted(counts, tied.cumsum(-1, dtype=torch.int32)).clamp_(max=x.shape[1] - 1)
        ids = torch.where(tied, earliest, ids)
    ids, by_id = ids.sort(-1)
    return _Found(*_sorted(values.gather(-1, by_id), ids + first), top.double(), total.double())


def _merged(before: _Found, mine: _Found, k: int, temperature: float) -> _Found:
    """Both in one; all ids of `before` are below those of `mine`."""
    values, ids = _sorted(torch.cat((before.values, mine.values), -1), torch.cat((before.ids, mine.ids), -1))
    top = torch.maximum(before.top, mine.top)
    shares = (x.total * ((x.top - _finite(top)) / temperature).exp() for x in (before, mine))
    return _Found(values[:, :k], ids[:, :k], top, sum(shares, start=torch.zeros_like(top)))


def _sorted(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By value, the largest first; equal ones as they came."""
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _finite(top: Tensor) -> Tensor:
    """A number to subtract where all logits of a row are −inf."""
    return torch.where(top == -torch.inf, 0.0, top)
