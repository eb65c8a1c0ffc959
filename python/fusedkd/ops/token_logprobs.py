"""Log-probability and entropy of given tokens, some rows of logits at a time."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from torch import Tensor

from ..backends import torch_logprobs
from ..dtypes import accumulation_dtype, gradient_dtype, logit_dtype, size_of
from ..kernels.device import token_logprobs as triton_logprobs
from ..kernels.device.rows import Logits
from ..kernels.device.token_logprobs import SAVED
from ..schedules import gemm, token_chunks
from ..sides import Source
from .operator import no_gradients, operator
from .scaled import scaled


class TokensCall(NamedTuple):
    """What these operators take: the fields, in this order, are their schema. x, weight, bias as in `Source`."""

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


def functions_of(backend: str) -> Any:
    """The module whose value and gradient serve a resolved backend."""
    return triton_logprobs if backend == "triton" else torch_logprobs


class _Chunk(NamedTuple):
    """Some rows and their logits."""

    rows: slice
    side: Logits


class _Pass(NamedTuple):
    """All rows, a chunk at a time; logits that are there already come whole."""

    functions: Any
    source: Source
    temperature: float
    rows: int

    @classmethod
    def of(cls, call: TokensCall) -> "_Pass":
        """Over the rows of a call."""
        temperature, scale, softcap = TokenNumbers(*call.numbers.tolist())
        source = Source(call.x, call.weight, call.bias, scale, softcap)
        return cls(functions_of(call.backend), source, temperature, call.rows)

    def chunks(self) -> Iterator[_Chunk]:
        """The chunks in turn, in one buffer."""
        n, source = self.source.rows, self.source
        buffer = token_chunks.buffer(source, min(self.rows, max(n, 1)), source.width, None, None)
        for start in range(0, n, max(self.rows, 1)):
            stop = min(start + self.rows, n)
            yield _Chunk(slice(start, stop), token_chunks.side(source, None, start, stop, buffer, source.width))


def _empty_rows(call: TokensCall) -> Tensor:
    return call.x.new_empty((call.token_ids.shape[0], SAVED), dtype=accumulation_dtype(call.x))


@operator("logprob_rows")
def logprob_rows(call: TokensCall) -> Tensor:
    """(N, SAVED): centre, log-sum-exp above it, log q of the token, entropy."""
    saved, sweep = _empty_rows(call), _Pass.of(call)
    for rows, side in sweep.chunks():
        sweep.functions.value(side, call.token_ids[rows], saved[rows], sweep.temperature)
    return saved


logprob_rows.register_fake(_empty_rows)


def _empty_gradients(call: TokensCall) -> token_chunks.Gradients:
    """As those of the chunked schedule, but of logits in their own shape."""
    source = Source(call.x, call.weight, call.bias)
    made = token_chunks.empty_gradients(source, call.needs_x, call.needs_weight, call.needs_bias)
    return made if call.weight is not None else made._replace(x=made.x.view(call.x.shape))


@operator("logprob_rows_gradient")
def logprob_rows_gradient(call: TokensCall, saved: Tensor, upstream: Tensor) -> token_chunks.Gradients:
    """Gradients of x, weight and bias for an upstream gradient (N, 2) of (log q, H); empty where not wanted."""
    x, weight, ids, sweep, made = call.x, call.weight, call.token_ids, _Pass.of(call), _empty_gradients(call)
    first, buffer = True, None
    if weight is not None and gradient_dtype(x) != logit_dtype(x.dtype, None):
        buffer = x.new_empty((min(call.rows, max(len(ids), 1)), len(weight)), dtype=gradient_dtype(x))
    for rows, side in sweep.chunks():
        out = made.x.view(len(ids), -1) if weight is None else side.x[0]
        out = out if buffer is None else buffer[: rows.stop - rows.start]
        sweep.functions.gradient(side, ids[rows], saved[rows], upstream[rows], out, sweep.temperature)
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
    wanted = token_chunks.counted_upstream(upstream[:, 2:].to(saved.dtype), call.token_ids)
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
