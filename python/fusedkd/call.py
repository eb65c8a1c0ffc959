"""`LossCall`: a checked call of the losses, by the same names from the public functions to the row work."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .dtypes import accumulation_dtype
from .kernels.device.rows import STATS, Problem
from .kernels.divergences import definitions


class LossCall(NamedTuple):
    """What the operators of the losses take: the fields, in this order, are their schema (ops/operator.py).

    The student is hidden states (N, D) where its weight is given, else logits (outer, inner, V).
    """

    student: Tensor
    student_weight: Optional[Tensor]  # (V, D)
    student_bias: Optional[Tensor]  # (V,)
    teacher: Sequence[Tensor]  # of its Operand (schedules/operands.py)
    teacher_kind: str  # in schedules.operands.KINDS
    labels: Optional[Tensor]  # (N,) int64, negative in rows that do not count
    token_weights: Optional[Tensor]  # (N,) multiply the loss in a sum, and the gradient formed with it
    token_parameters: Optional[Tensor]  # (P, N): the parameters of the divergence that differ by token
    per_token: Sequence[bool]  # which of Numbers.parameters they are, in the same order
    numbers: Tensor  # `Numbers`, packed
    vocab_size: int  # compared columns
    definition: str
    decoupled: bool
    mixed: bool  # the divergence mixes the student into the teacher
    target_token: str  # label, teacher_argmax
    support: str  # teacher, floor
    backend: str  # triton, torch, compiled
    return_stats: bool
    logits_dtype: Optional[torch.dtype]
    weight_grad: Optional[Tensor]  # (V, D) to which the backward pass adds the weight's gradient, returning none
    drop_ignored: bool = False
    needs_student: bool = False  # whether a gradient is wanted, here and below
    needs_weight: bool = False
    needs_bias: bool = False
    outer_rows: int = 0  # chunked: tokens per gradient chunk
    inner_rows: int = 0  # chunked: tokens per product
    columns: int = 0  # streaming: vocabulary per chunk
    shard_group: str = ""  # torch.distributed's name of the ranks that share the vocabulary; "": it is whole
    shard_start: int = 0  # the first of this rank's columns; `vocab_size` says how many of these are compared
    shard_widest: int = 0  # columns of the rank that has most of them
    reduce_hidden: bool = False  # whether the gradient of hidden states is summed over the ranks


class Numbers(NamedTuple):
    """The floats of a call, which may change from step to step."""

    temperature: float
    factor: float  # on the divergence: 1 or temperature²
    ce_weight: float
    student_scale: float
    student_softcap: float  # 0: none
    parameters: tuple[float, ...]  # target, nontarget, mix, *theta (maths.definition.Form); 0 where per token
    teacher: tuple[float, ...]  # of its Operand


def packed(numbers: tuple[float | tuple[float, ...], ...]) -> Tensor:
    """A NamedTuple of numbers, and of tuples of them, as an operator takes it: (P,) float64 on the host.

    While torch.compile traces, each is a product with a tensor: so a number that changes from step to step becomes an
    input of the graph. A float in the schema, or `torch.tensor`, would be compiled in: a graph for each value.
    """
    values = [number for x in numbers for number in (x if isinstance(x, tuple) else (x,))]
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * value for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def unpacked(numbers: Tensor) -> list[float]:
    """What `packed` was given, without its nesting."""
    return numbers.tolist()


def numbers_of(call: LossCall) -> Numbers:
    """The numbers of a call, unpacked."""
    values = unpacked(call.numbers)
    single = len(Numbers._fields) - 2  # before the tuples
    last = single + len(call.per_token)
    return Numbers(*values[:single], parameters=tuple(values[single:last]), teacher=tuple(values[last:]))


def problem_of(call: LossCall, numbers: Numbers) -> Problem:
    """What the row work computes, with the call's numbers."""
    tensors = iter(() if call.token_parameters is None else call.token_parameters.unbind())
    target, nontarget, mix, *theta = (
        next(tensors) if per_token else number
        for number, per_token in zip(numbers.parameters, call.per_token, strict=True)
    )
    return Problem(
        definitions()[call.definition],
        call.decoupled,
        parameters=tuple(theta),
        weights=(target, nontarget),
        vocab_size=call.vocab_size,
        temperature=numbers.temperature,
        factor=numbers.factor,
        ce_weight=numbers.ce_weight,
        mix=mix if call.mixed else None,
        argmax=call.target_token == "teacher_argmax",
    )


class Rows(NamedTuple):
    """Loss (N,) and statistics (N, STATS), or (0, STATS) where they are not wanted."""

    loss: Tensor
    stats: Tensor


def empty_rows(call: LossCall) -> Rows:
    """Room for them, which are float64 if a side is, else float32."""
    n = row_count(call)
    loss = call.student.new_empty(n, dtype=wide_dtype(call))
    return Rows(loss, loss.new_empty((n if call.return_stats else 0, STATS)))


def row_count(call: LossCall) -> int:
    """N."""
    outer, inner = call.student.shape[:2]
    return outer if call.student_weight is not None else outer * inner


def wide_dtype(call: LossCall) -> torch.dtype:
    """Of losses and statistics."""
    return accumulation_dtype(call.student, *call.teacher)


def at_rows(call: LossCall, rows: Tensor) -> LossCall:
    """The call with what it has for each row at some rows of N; both sides stay as they are."""

    def cut(values: Optional[Tensor]) -> Optional[Tensor]:
        return None if values is None else values[rows]

    return call._replace(
        labels=cut(call.labels),
        token_weights=cut(call.token_weights),
        token_parameters=None if call.token_parameters is None else call.token_parameters[:, rows],
    )
