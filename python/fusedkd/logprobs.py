"""`token_logprobs`: log-probability and entropy of given tokens, through a Head without the logit matrix.

The value pass makes a few rows of logits at a time and keeps four floats per row; the backward pass makes them again,
overwrites them with dZ and feeds the two products of the head's gradient.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from . import checks, chunked, cpu_logprobs, gemm
from .backends import choose_backend
from .dtypes import accumulation_dtype, gradient_dtype, logit_dtype, size_of
from .head import Head
from .kernels import logprobs as triton_logprobs
from .kernels.logprobs import SAVED
from .ops import counted_upstream, outside_autocast, packed, refuse_double_backward, save, saved_of, scaled, source_of
from .planner import Shape, choose
from .sides import Side, autocast, flattened, transform
from .tuning import tuned


def token_logprobs(
    side: Side,
    token_ids: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    *,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Any:
    """log softmax(logits/τ) at given tokens, in nats, and the entropy of the whole distribution; both differentiable.

    What a policy gradient (MiniLLM, on-policy distillation, GRPO) needs of a policy. Nothing of N·V elements is made
    for a `Head`. The token's probability is kept apart from the rest, so log q keeps its digits as q → 1.

    Args:
        side: (..., V) logits, any float dtype and strides, or a `Head`. Gradients flow to the logits, or to hidden,
            weight and bias.
        token_ids: (...) int64 in [0, V), or `ignore_index`: such a row is 0, without a gradient, and is not read.
        temperature: τ > 0, divides the logits.
        return_entropy: also return −Σ q log q.
        memory_budget: for a Head: bytes the call may hold beyond inputs, results and gradients.
        backend: as for `kd_loss`.

    Returns:
        (...) float32 (float64 for float64 inputs), or a pair of them.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what would work. RuntimeError on double backward.

    Cost: one read of each logit forward; backward one more and one write. A Head repeats its product in the backward.
    Source: Gu et al., MiniLLM, ICLR 2024, eq. 3-8, and Agarwal et al., GKD, ICLR 2024, for what it is used for.
    """
    checks.side("side", side)
    checks.positive("temperature", temperature)
    checks.flag("return_entropy", return_entropy)
    checks.integer("ignore_index", ignore_index)
    checks.budget(memory_budget)
    shape, where = checks.leading(side), checks.device(side)
    vocabulary = checks.width(side)
    checks.labels(token_ids, shape, where, ignore_index, vocabulary, name="token_ids")
    if memory_budget is not None and not isinstance(side, Head):
        raise ValueError(f"memory_budget={memory_budget} is about heads, and side is logits: leave it at None")
    resolved = choose_backend(backend, where)
    side = autocast(side)
    x, weight, bias = flattened(side)
    assert x is not None
    if x.dtype == torch.float64 and resolved == "triton":
        raise TypeError('float64 inputs need backend="torch": the Triton kernels compute in float32')
    ids = token_ids.reshape(-1)
    ids = torch.where((ids != ignore_index) & (ids >= 0) & (ids < vocabulary), ids, -1)
    rows = shape.numel()
    inner = rows
    if weight is not None:
        inner = choose(_shape(rows, x, weight), memory_budget).inner
    numbers = packed([float(temperature), *transform(side)])
    saved = logprob_rows(x, weight, bias, ids, numbers, resolved, inner)
    logprob, entropy = saved[:, 2].view(shape), saved[:, 3].view(shape)
    return (logprob, entropy) if return_entropy else logprob


def _shape(rows: int, x: Tensor, weight: Tensor) -> Shape:
    """What the backward pass holds: one buffer of logits, and the accumulators."""
    return Shape(
        rows=rows,
        student_width=weight.shape[0],
        teacher_width=0,
        student_dim=weight.shape[1],
        teacher_dim=0,
        weight_rows=weight.shape[0],
        logit_bytes=logit_dtype(x.dtype, None).itemsize,
        dz_bytes=gradient_dtype(x).itemsize,
        hidden_bytes=x.element_size(),
        accumulator_bytes=accumulation_dtype(x).itemsize,
        on_cpu=x.device.type == "cpu",
        gather=False,
        masked=True,
        needs_hidden=x.requires_grad,
        needs_weight=weight.requires_grad,
    )


def _functions(backend: str) -> Any:
    return tuned(triton_logprobs) if backend == "triton" else cpu_logprobs


@torch.library.custom_op("fusedkd::logprob_rows", mutates_args=())
@outside_autocast
def logprob_rows(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    numbers: Tensor,
    backend: str,
    inner: int,
) -> Tensor:
    """(N, SAVED): centre, log-sum-exp above it, log q of the token, entropy.

    numbers: (3,) temperature, scale, softcap (0: none), on the host.
    """
    source, temperature = source_of((x, weight, bias), numbers[1:]), float(numbers[0])
    saved = x.new_empty((len(ids), SAVED), dtype=accumulation_dtype(x))
    for start, stop, side in _chunks(source, len(ids), inner):
        _functions(backend).value(side, ids[start:stop], saved[start:stop], temperature)
    return saved


def _chunks(source: chunked.Source, rows: int, inner: int) -> Any:
    """(start, stop, logits) a chunk at a time; logits that are there already come whole."""
    buffer = chunked.buffer(source, min(inner, max(rows, 1)), source.width, None, None)
    for start in range(0, rows, max(inner, 1)):
        stop = min(start + inner, rows)
        yield start, stop, chunked.side(source, None, start, stop, buffer, source.width)


@logprob_rows.register_fake
def _(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    numbers: Tensor,
    backend: str,
    inner: int,
) -> Tensor:
    return x.new_empty((ids.shape[0], SAVED), dtype=accumulation_dtype(x))


@torch.library.custom_op("fusedkd::logprob_rows_gradient", mutates_args=())
@outside_autocast
def logprob_rows_gradient(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    saved: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    backend: str,
    inner: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for an upstream gradient (N, 2) of (log q, H); empty where not wanted."""
    source, temperature = source_of((x, weight, bias), numbers[1:]), float(numbers[0])
    functions = _functions(backend)
    grad_x, grad_weight, grad_bias = _gradients(x, weight, needs)
    first, buffer = True, None
    if weight is not None and gradient_dtype(x) != logit_dtype(x.dtype, None):
        buffer = x.new_empty((min(inner, max(len(ids), 1)), source.width), dtype=gradient_dtype(x))
    for start, stop, side in _chunks(source, len(ids), inner):
        out = grad_x.view(-1, source.width) if weight is None else side.x[0]
        out = out if buffer is None else buffer[: stop - start]
        functions.gradient(side, ids[start:stop], saved[start:stop], upstream[start:stop], out, temperature)
        if weight is None:
            continue
        if needs[0]:
            gemm.hidden_gradient(out, weight, grad_x[start:stop])
        if needs[1]:
            hidden = chunked.only_counted(x[start:stop], chunked.uncounted_rows(ids[start:stop], None))
            gemm.weight_gradient(out, hidden, grad_weight, accumulate=not first)
        if needs[2]:
            grad_bias += out.sum(0, dtype=grad_bias.dtype)
        first = False
    if first and weight is not None:
        grad_weight.zero_()
    return grad_x, grad_weight, grad_bias


def _gradients(x: Tensor, weight: Optional[Tensor], needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    wide, empty = accumulation_dtype(x), x.new_empty(0)
    if weight is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), empty, x.new_empty(0)
    return (
        x.new_empty(x.shape, dtype=wide) if needs[0] else empty,
        x.new_empty(weight.shape, dtype=wide) if needs[1] else x.new_empty(0),
        x.new_zeros(weight.shape[0], dtype=wide) if needs[2] else x.new_empty(0),
    )


@logprob_rows_gradient.register_fake
def _(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    ids: Tensor,
    saved: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    backend: str,
    inner: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ids, numbers, ctx.backend, ctx.inner = inputs
    save(ctx, x, weight, bias, ids, numbers, output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    refuse_double_backward(upstream)
    x, weight, bias, ids, numbers, saved = saved_of(ctx)
    assert x is not None and ids is not None and numbers is not None and saved is not None
    needs = list(ctx.needs_input_grad[:3])
    wanted = counted_upstream(upstream[:, 2:].to(saved.dtype), ids)
    size = wanted.new_ones(()) if weight is None else size_of(wanted)
    grads = logprob_rows_gradient(
        x, weight, bias, ids, saved, (wanted / size).contiguous(), numbers, ctx.backend, ctx.inner, needs
    )
    if weight is None:
        return grads[0], None, None, None, None, None, None
    found = [
        scaled(grad, size, like) if need and like is not None else None
        for like, grad, need in zip((x, weight, bias), grads, needs, strict=True)
    ]
    return *found, None, None, None, None


logprob_rows.register_autograd(_backward, setup_context=_setup)
