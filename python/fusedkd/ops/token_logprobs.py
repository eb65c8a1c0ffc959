"""Log-probability and entropy of given tokens, some rows of logits at a time."""

from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import backends
from ..call import unpacked
from ..dtypes import accumulation_dtype, gradient_dtype, logit_dtype, size_of
from ..kernels.device.args import TOKEN_SAVED, TokenScalars, columns_of
from ..kernels.device.rows import Logits
from ..schedules import gemm, token_chunks
from ..schedules.operands import DenseLogits, HeadLogits, Parts, room
from .operator import no_gradients, operator
from .scaled import scaled


class TokensCall(NamedTuple):
    """What these operators take: the fields, in this order, are their schema. x, weight, bias as in `Parts`."""

    x: Tensor
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    token_ids: Tensor  # (N,) int64, negative in rows that do not count
    numbers: Tensor  # `TokenNumbers`, packed
    backend: str
    rows: int  # of logits at a time, for a Head
    needs_x: bool  # whether a gradient is wanted, here and below
    needs_weight: bool
    needs_bias: bool


class TokenNumbers(NamedTuple):
    """The floats of a call, which may change from step to step."""

    temperature: float
    scale: float
    softcap: float  # 0: none


class _Chunk(NamedTuple):
    """Some rows and their logits."""

    rows: slice
    logits: Logits


class _Pass(NamedTuple):
    """All rows, a chunk at a time; logits that are there already come whole."""

    side: DenseLogits | HeadLogits
    temperature: float
    rows: int

    @classmethod
    def of(cls, call: TokensCall) -> "_Pass":
        """Over the rows of a call."""
        temperature, scale, softcap = TokenNumbers(*unpacked(call.numbers))
        return cls(Parts(call.x, call.weight, call.bias, scale, softcap).operand(), temperature, call.rows)

    def chunks(self) -> Iterator[_Chunk]:
        """The chunks in turn, in one buffer."""
        n, side = self.side.rows, self.side
        buffer = side.buffer(min(self.rows, max(n, 1)), side.width, None)
        for start in range(0, n, max(self.rows, 1)):
            rows = slice(start, min(start + self.rows, n))
            yield _Chunk(rows, side.logits(rows, slice(0, side.width), buffer))


def _empty_rows(call: TokensCall) -> Tensor:
    return call.x.new_empty((call.token_ids.shape[0], TOKEN_SAVED), dtype=accumulation_dtype(call.x))


@operator("logprob_rows")
def logprob_rows(call: TokensCall) -> Tensor:
    """`TokenScalars` (N, TOKEN_SAVED)."""
    tokens, saved, sweep = backends.get(call.backend).tokens, _empty_rows(call), _Pass.of(call)
    for rows, logits in sweep.chunks():
        tokens.value(logits, call.token_ids[rows], saved[rows], sweep.temperature)
    return saved


logprob_rows.register_fake(_empty_rows)


def _empty_gradients(call: TokensCall) -> token_chunks.Gradients:
    """As those of the chunked schedule, but of logits in their own shape."""
    side = Parts(call.x, call.weight, call.bias).operand()
    made = token_chunks.empty_gradients(side, call.needs_x, call.needs_weight, call.needs_bias)
    return made if call.weight is not None else made._replace(x=made.x.view(call.x.shape))


@operator("logprob_rows_gradient")
def logprob_rows_gradient(call: TokensCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of x, weight and bias for an upstream gradient (N, 2) of (log q, H); empty where not wanted."""
    x, weight, ids, sweep, made = call.x, call.weight, call.token_ids, _Pass.of(call), _empty_gradients(call)
    tokens = backends.get(call.backend).tokens
    first, buffer = True, None
    if weight is not None and gradient_dtype(x) != logit_dtype(x.dtype, None):
        buffer = room(x, min(call.rows, max(len(ids), 1)), len(weight), gradient_dtype(x))
    for rows, logits in sweep.chunks():
        out = made.x.view(len(ids), -1) if weight is None else logits.x[0]
        out = out if buffer is None else buffer[: rows.stop - rows.start]
        tokens.gradient(logits, ids[rows], saved[rows], upstream[rows], out, sweep.temperature)
        if weight is None:
            continue
        if call.needs_x:
            gemm.hidden_gradient(out, weight, made.x[rows])
        if call.needs_weight:
            hidden = token_chunks.only_counted(x[rows], token_chunks.uncounted_rows(ids[rows], None))
            gemm.weight_gradient(out, hidden, made.weight, accumulate=not first)
        if call.needs_bias:
            made.bias.add_(out.sum(0, dtype=made.bias.dtype))
        first = False
    if first and weight is not None:
        made.weight.zero_()
    return made


logprob_rows_gradient.register_fake(lambda call, saved, upstream: _empty_gradients(call))


def _backward(call: TokensCall, saved: Tensor, upstream: Tensor) -> TokensCall:
    of_row = columns_of(TokenScalars, upstream.to(saved.dtype))
    wanted = token_chunks.counted_upstream(torch.stack((of_row.logprob, of_row.entropy), -1), call.token_ids)
    size = wanted.new_ones(()) if call.weight is None else size_of(wanted)
    found = logprob_rows_gradient(call, saved, (wanted / size).contiguous())
    if call.weight is None:
        return no_gradients(TokensCall)._replace(x=found.x)
    return no_gradients(TokensCall)._replace(
        x=scaled(found.x, size, call.x) if call.needs_x else None,
        weight=scaled(found.weight, size, call.weight) if call.needs_weight else None,
        bias=scaled(found.bias, size, call.bias) if call.needs_bias and call.bias is not None else None,
    )


logprob_rows.register_autograd(lambda call, saved: (call, saved), _backward)
