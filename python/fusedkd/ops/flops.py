"""What `torch.utils.flop_counter.FlopCounterMode` counts for a Head: the matrix products that an operator makes inside.

A row kernel's arithmetic is not counted, as that of torch's own elementwise operators is not.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import flop_counter

from ..call import LossCall, row_count
from ..kernels.device.vocab_chunks import online_of
from ..schedules.operands import comparison_of
from .heads import heads, heads_rows
from .operator import Operator
from .streamed import streamed, streamed_gradient
from .token_logprobs import TokensCall, logprob_rows, logprob_rows_gradient


def _formula(operator: Operator[..., Any]) -> Callable[[Callable[..., int]], None]:
    def register(formula: Callable[..., int]) -> None:
        def raw(*args: Any, **_: Any) -> int:
            return formula(*operator.nested(args))

        counter: Any = flop_counter  # without types for what it takes
        counter.register_flop_formula(operator.overload.overloadpacket, get_raw=True)(raw)

    return register


def _heads(call: LossCall, forwards: int, backwards: int) -> int:
    rows = row_count(call)
    if call.drop_ignored and call.labels is not None and not call.labels.is_meta:
        rows = int((call.labels >= 0).sum())
    problem, student, teacher = comparison_of(call)
    of_student = 2 * rows * (student.width if problem.ce_weight else problem.vocab_size) * student.dim
    of_teacher = 2 * rows * problem.vocab_size * teacher.dim
    return forwards * (of_student + of_teacher) + backwards * of_student


@_formula(heads)
def _(call: LossCall) -> int:
    return _heads(call, 1, call.needs_student + call.needs_weight)


@_formula(heads_rows)
def _(call: LossCall) -> int:
    return _heads(call, 1, 0)


@_formula(streamed)
def _(call: LossCall) -> int:
    two_sweeps = online_of(comparison_of(call).problem).sums is None
    return _heads(call, 1 + two_sweeps, 0)


@_formula(streamed_gradient)
def _(call: LossCall, *_: Tensor) -> int:
    return _heads(call, 1, call.needs_student + call.needs_weight)


def _tokens(call: TokensCall, products: int) -> int:
    return 0 if call.weight is None else products * 2 * call.x.shape[0] * call.weight.numel()


@_formula(logprob_rows)
def _(call: TokensCall) -> int:
    return _tokens(call, 1)


@_formula(logprob_rows_gradient)
def _(call: TokensCall, *_: Tensor) -> int:
    return _tokens(call, 1 + call.needs_x + call.needs_weight)
