"""`token_logprobs`: log-probability and entropy of given tokens, through a Head without the logit matrix.

The value pass makes a few rows of logits at a time and keeps four floats per row; the backward pass makes them again,
overwrites them with dZ and feeds the two products of the head's gradient.
"""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import choose_backend
from .call import packed
from .dtypes import accumulation_dtype, gradient_dtype, logit_dtype
from .head import Head, Side, autocast
from .kernels.device.args import TokenScalars, columns_of
from .ops.token_logprobs import TokenNumbers, TokensCall, logprob_rows
from .schedules.operands import flattened
from .schedules.planner import Shape, choose


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
    if resolved == "compiled":
        raise ValueError('token_logprobs has no backend="compiled": leave it at "auto"')
    x, weight, bias, scale, softcap = flattened(autocast(side)).parts
    if x.dtype == torch.float64 and resolved == "triton":
        raise TypeError('float64 inputs need backend="torch": the Triton kernels compute in float32')
    ids = token_ids.reshape(-1)
    rows = shape.numel()
    live = torch.is_grad_enabled()
    call = TokensCall(
        x=x,
        weight=weight,
        bias=bias,
        token_ids=torch.where((ids != ignore_index) & (ids >= 0) & (ids < vocabulary), ids, -1),
        numbers=packed(TokenNumbers(float(temperature), scale, softcap)),
        backend=resolved,
        rows=rows if weight is None else choose(_shape(rows, x, weight), memory_budget).inner,
        needs_x=live and x.requires_grad,
        needs_weight=live and weight is not None and weight.requires_grad,
        needs_bias=live and bias is not None and bias.requires_grad,
    )
    found = columns_of(TokenScalars, logprob_rows(call))
    logprob, entropy = found.logprob.view(shape), found.entropy.view(shape)
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
