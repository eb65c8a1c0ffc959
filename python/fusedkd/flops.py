"""What `torch.utils.flop_counter.FlopCounterMode` counts for a Head: the matrix products that an operator makes inside.

A row kernel's arithmetic is not counted, as that of torch's own elementwise operators is not.
"""

from typing import Any, Optional

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import logprobs, ops, streaming
from .kernels.streaming import online_of


def _formula(operator: Any) -> Any:
    return register_flop_formula(operator._opoverload.overloadpacket, get_raw=True)


def _rows(x: Tensor, weight: Optional[Tensor], labels: Optional[Tensor], dropped: bool) -> int:
    """Rows that enter the products."""
    if dropped and labels is not None and not labels.is_meta:
        return int((labels >= 0).sum())
    return x.shape[0] if weight is not None else x.shape[0] * x.shape[1]


def _product(rows: int, columns: int, weight: Optional[Tensor]) -> int:
    """One product of `rows` hidden states, or logit gradients, with `columns` rows of a weight."""
    return 0 if weight is None else 2 * rows * columns * weight.shape[1]


def _heads(
    x: Tensor,
    weight: Optional[Tensor],
    others: ops.Operands,
    numbers: Tensor,
    dropped: bool,
    forwards: int,
    backwards: int,
) -> int:
    rows = _rows(x, weight, others[3], dropped)
    compared, _, _, ce_weight = numbers[:4].tolist()
    columns = weight.shape[0] if ce_weight and weight is not None else int(compared)
    student, teacher = _product(rows, columns, weight), _product(rows, int(compared), others[1])
    return forwards * (student + teacher) + backwards * student


@_formula(ops.heads)
def _(x, weight, bias, others, names, numbers, chunks, flags, *_: Any, **__: Any) -> int:
    return _heads(x, weight, others, numbers, flags[1], 1, flags[2] + flags[3])


@_formula(ops.heads_rows)
def _(x, weight, bias, others, names, numbers, chunks, flags, *_: Any, **__: Any) -> int:
    return _heads(x, weight, others, numbers, flags[1], 1, 0)


@_formula(streaming.streamed)
def _(x, weight, bias, others, names, numbers, *_: Any, **__: Any) -> int:
    two_sweeps = online_of(ops.problem_of([x, weight, bias, *others], names, numbers)).sums is None
    return _heads(x, weight, others, numbers, False, 1 + two_sweeps, 0)


@_formula(streaming.streamed_gradient)
def _(x, weight, bias, others, saved, upstream, names, numbers, width, needs, *_: Any, **__: Any) -> int:
    return _heads(x, weight, others, numbers, False, 1, needs[0] + needs[1])


@_formula(logprobs.logprob_rows)
def _(x, weight, *_: Any, **__: Any) -> int:
    return 0 if weight is None else _product(x.shape[0], weight.shape[0], weight)


@_formula(logprobs.logprob_rows_gradient)
def _(x, weight, bias, ids, saved, upstream, numbers, backend, inner, needs, *_: Any, **__: Any) -> int:
    return 0 if weight is None else (1 + needs[0] + needs[1]) * _product(x.shape[0], weight.shape[0], weight)
