"""`topk`: the likeliest tokens of logits or of a Head and their log-probabilities, without the logit matrix.

A Head's logits are made some vocabulary columns at a time, in one buffer, and are looked at, as given logits are, some
rows at a time. Each part gives its k largest logits, which are merged with those found before, and its share of the
softmax's sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends.torch_rows import logits as whole_logits
from .dtypes import accumulation_dtype, logit_dtype
from .head import Side, autocast, detached
from .schedules.operands import DenseLogits, HeadLogits, flattened
from .schedules.planner import Shape, choose_width
from .schedules.token_chunks import slices
from .sparse import TopK

_CPU_LOGITS, _GPU_LOGITS = 1 << 20, 1 << 24  # looked at together: as many rows as have them, with what they become
_OF_EACH = 8  # elements like a logit that each of the k takes while two lists of them become one


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
    and results: for a Head of N tokens N·c floats, in chunks of c columns (what the streaming schedule of `kd_loss`
    takes, k at least), on a CPU as many again of up to 256 tokens and what upcasts half precision; and on either side
    at most 8·2²⁰ floats for some rows at a time (8·2²⁴ on a GPU; what one row needs, if that is more). Nothing waits
    for a GPU.

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
    """What rows have shown so far, in the order of the result; absent where they have not shown as many."""

    values: Tensor  # (n, k) largest logits
    ids: Tensor  # (n, k) int32
    top: Tensor  # (n, 1) float64, the largest logit
    total: Tensor  # (n, 1) float64, Σ exp((x − top)/τ)


def _likeliest(side: DenseLogits | HeadLogits, k: int, temperature: float, columns: int) -> tuple[Tensor, Tensor]:
    """Ids (N, k) int32 and log-probabilities (N, k) float32."""
    like, n = side.tensors[0], side.rows
    on_cpu, dtype = like.device.type == "cpu", accumulation_dtype(like)
    wide, buffer = columns, None
    if isinstance(side, HeadLogits):
        wide = min(columns, max(k, choose_width(_shape(side, columns, on_cpu), None)))
        buffer = side.buffer(n, wide, None)
    found = _Found(
        like.new_full((n, k), -torch.inf, dtype=dtype),
        like.new_full((n, k), -1, dtype=torch.int32),
        like.new_full((n, 1), -torch.inf, dtype=torch.float64),
        like.new_zeros((n, 1), dtype=torch.float64),
    )
    for first in range(0, columns, wide):
        at = slice(first, min(first + wide, columns))
        part, width = side.logits(slice(0, n), at, buffer), at.stop - first
        for rows in _blocks(n, width + _OF_EACH * k, on_cpu):
            before = _Found(*(x[rows] for x in found))
            x, _ = whole_logits(part, rows, width, dtype)
            merged = _merged(before, _of_part(x, min(k, width), temperature, first), k, temperature)
            for to, new in zip(before, merged, strict=True):
                to.copy_(new)
    logprobs = found.values if dtype == torch.float32 else like.new_empty((n, k), dtype=torch.float32)
    for rows in _blocks(n, _OF_EACH * k, on_cpu):
        values, ids, top, total = (x[rows] for x in found)
        exact = (values.double() - _finite(top)) / temperature - total.log()
        logprobs[rows] = torch.where(values == -torch.inf, -torch.inf, exact).float()
        ids.masked_fill_(logprobs[rows] == -torch.inf, -1)
    return found.ids, logprobs


def _blocks(n: int, elements: int, on_cpu: bool) -> Iterator[slice]:
    """Some rows at a time, of so many elements each."""
    return slices(0, n, max(1, (_CPU_LOGITS if on_cpu else _GPU_LOGITS) // elements))


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
    return _Found(*_sorted(values.gather(-1, by_id), (ids + first).int()), top.double(), total.double())


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
