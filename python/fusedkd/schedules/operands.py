"""Where the logits of one side come from: what schedules take, as operators pass it and as kernels take it.

A kind of teacher is one class with the members of `Operand`, and its name in KINDS. An operator's schema has only
tensors and numbers: `tensors` and `numbers` take an operand apart, `of` puts it together again below the operator.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from ..call import LossCall, numbers_of, problem_of
from ..dtypes import logit_dtype
from ..head import Head, Side, autocast, both_autocast, detached
from ..kernels.device.rows import Logits, Problem
from . import gemm, topk


class Operand(Protocol):
    """N rows of V logits, stored or made when asked for: a side of the comparison below the public functions."""

    @property
    def kind(self) -> str:
        """Its name in KINDS."""
        ...

    @property
    def rows(self) -> int:
        """N."""
        ...

    @property
    def width(self) -> int:
        """V."""
        ...

    @property
    def stored(self) -> bool:
        """Whether `logits` costs nothing and needs no buffer, so that all rows may be asked for at once."""
        ...

    @property
    def dim(self) -> int:
        """D of the hidden states that a product makes logits of, 0 if no product does."""
        ...

    @property
    def tensors(self) -> list[Tensor]:
        """What it is made of; the first has the dtype and the device of its numbers."""
        ...

    @property
    def numbers(self) -> tuple[float, ...]:
        """Floats that it is made of, which may change from step to step."""
        ...

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "Operand":
        """The operand with these `tensors` and `numbers`."""
        ...

    def at(self, rows: Tensor) -> "Operand":
        """Some of the rows, (n,) int64; of the same kind, with the same numbers, unless it is `stored`."""
        ...

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> Tensor | None:
        """Room for the `logits` of as many rows and columns, made once per call; None if it needs none."""
        ...

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """Neighbouring rows and columns as kernels take them, in the front of `buffer` if it needs one."""
        ...


class Parts(NamedTuple):
    """Logits, or hidden states and what makes logits of them, in the slots that schemas have for a student."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def operand(self) -> "DenseLogits | HeadLogits":
        """What they are the parts of."""
        if self.weight is None:
            return DenseLogits(self.x)
        return HeadLogits(self.x, self.weight, self.bias, self.scale, self.softcap)


class DenseLogits(NamedTuple):
    """Logits as a caller has them."""

    x: Tensor  # (outer, inner, V), any strides

    kind = "logits"
    stored = True
    dim = 0

    @property
    def parts(self) -> Parts:
        """The logits alone."""
        return Parts(self.x)

    @property
    def rows(self) -> int:
        """N = outer · inner."""
        return self.x.shape[0] * self.x.shape[1]

    @property
    def width(self) -> int:
        """V."""
        return self.x.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """The logits."""
        return [self.x]

    @property
    def numbers(self) -> tuple[float, ...]:
        """None."""
        return ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "DenseLogits":
        """From `tensors`."""
        return cls(*tensors)

    def at(self, rows: Tensor) -> "PickedLogits":
        """Not a copy: that would be as large as the logits."""
        return PickedLogits(self.x, rows)

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> None:
        """Needs none."""

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """Where they lie."""
        return Logits(self.x[..., columns], first=rows.start)


class PickedLogits(NamedTuple):
    """Some rows of logits, copied together a chunk at a time."""

    x: Tensor  # (outer, inner, V)
    picked: Tensor  # (N,) int64 in [0, outer · inner)

    kind = "picked logits"
    stored = False
    dim = 0

    @property
    def rows(self) -> int:
        """N."""
        return self.picked.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.x.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """The logits and the rows."""
        return [self.x, self.picked]

    @property
    def numbers(self) -> tuple[float, ...]:
        """None."""
        return ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "PickedLogits":
        """From `tensors`."""
        return cls(*tensors)

    def at(self, rows: Tensor) -> "PickedLogits":
        """Some of the picked rows."""
        return self._replace(picked=self.picked[rows])

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> Tensor:
        """In the dtype of the logits."""
        return room(self.x, rows, columns, self.x.dtype)

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """A copy."""
        at = self.picked[rows]
        out = front(buffer, at.shape[0], columns)
        out.copy_(self.x[at // self.x.shape[1], at % self.x.shape[1], columns])
        return Logits(out.unsqueeze(0))


class HeadLogits(NamedTuple):
    """Logits that a product makes of hidden states: softcap(scale · (hidden @ weight.T + bias))."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    kind = "head"
    stored = False

    @property
    def parts(self) -> Parts:
        """All of it."""
        return Parts(*self)

    @property
    def rows(self) -> int:
        """N."""
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """Hidden states, weight, and the bias if there is one."""
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    @property
    def numbers(self) -> tuple[float, ...]:
        """Scale and softcap."""
        return self.scale, self.softcap

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "HeadLogits":
        """From `tensors` and `numbers`."""
        hidden, weight, *bias = tensors
        scale, softcap = numbers
        return cls(hidden, weight, bias[0] if bias else None, scale, softcap)

    def at(self, rows: Tensor) -> "HeadLogits":
        """A copy of their hidden states."""
        return self._replace(hidden=self.hidden[rows])

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> Tensor:
        """For products, in float32 unless asked."""
        return room(self.hidden, rows, columns, logit_dtype(self.hidden.dtype, logits_dtype))

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """Their products; kernels do the rest."""
        hidden = self.hidden[rows]
        out = front(buffer, hidden.shape[0], columns)
        gemm.project(hidden, self.weight[columns], out)
        bias = None if self.bias is None else self.bias[columns]
        return Logits(out.unsqueeze(0), bias, None if self.scale == 1.0 else self.scale, self.softcap or None)


Student = DenseLogits | PickedLogits | HeadLogits  # those that a gradient flows to
KINDS: dict[str, type[Operand]] = {
    kind.kind: kind for kind in (DenseLogits, PickedLogits, HeadLogits, *topk.TAILS.values())
}
_ROUTED = "routed: "


class RoutedTeachers(NamedTuple):
    """Several teachers of the same N rows, one of which each row has: never whole, but a group of rows at a time."""

    ids: Tensor  # (N,) int64, which of `parts` a row has; negative: none, and the row does not count
    parts: tuple[Operand, ...]

    stored = False

    @property
    def kind(self) -> str:
        """The kinds of the parts, and how many tensors and numbers each is made of."""
        return _ROUTED + "; ".join(f"{x.kind}, {len(x.tensors)}, {len(x.numbers)}" for x in self.parts)

    @property
    def rows(self) -> int:
        """N."""
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """V that all parts have, as far as one has it (that of a top-k teacher is the student's)."""
        return min((x.width for x in self.parts if not topk.is_topk(x.kind)), default=0)

    @property
    def dim(self) -> int:
        """The largest of the parts."""
        return max(x.dim for x in self.parts)

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the parts, then `ids`."""
        return [*(tensor for x in self.parts for tensor in x.tensors), self.ids]

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those of the parts."""
        return tuple(number for x in self.parts for number in x.numbers)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "RoutedTeachers":
        """Not without the parts' kinds: `operand_of`."""
        raise NotImplementedError

    def at(self, rows: Tensor) -> "RoutedTeachers":
        """Some of the rows of every part."""
        return RoutedTeachers(self.ids[rows], tuple(x.at(rows) for x in self.parts))

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> None:
        """Each part has its own."""

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """Those of a part, which alone has some."""
        raise NotImplementedError


def operand_of(kind: str, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Operand:
    """The operand of a kind with these `tensors` and `numbers`."""
    if not kind.startswith(_ROUTED):
        return KINDS[kind].of(tensors, numbers)
    parts: list[Operand] = []
    of_tensors, of_numbers = iter(tensors), iter(numbers)
    for part in kind.removeprefix(_ROUTED).split("; "):
        name, tensor_count, number_count = part.split(", ")
        own = list(islice(of_tensors, int(tensor_count)))
        parts.append(KINDS[name].of(own, list(islice(of_numbers, int(number_count)))))
    return RoutedTeachers(next(of_tensors), tuple(parts))


class Group(NamedTuple):
    """Neighbouring rows that have one teacher."""

    teacher: Operand
    rows: slice


class Grouped(NamedTuple):
    """Which rows of a call are worked on, in this order (None: all, as they are), and the teacher of each."""

    kept: Tensor | None
    groups: list[Group]


def grouped(teacher: Operand, kept: Tensor | None) -> Grouped:
    """A teacher of some rows (None: of all) as groups of neighbours; several teachers take those that they have."""
    if not isinstance(teacher, RoutedTeachers):
        mine = teacher if kept is None else teacher.at(kept)
        return Grouped(kept, [Group(mine, slice(0, mine.rows))])
    kept = torch.arange(teacher.rows, device=teacher.ids.device) if kept is None else kept
    ids = teacher.ids[kept]
    waited_for = torch.bincount(ids + 1, minlength=len(teacher.parts) + 1).cpu()
    counts = [int(x) for x in waited_for]
    kept = kept[ids.argsort(stable=True)][counts[0] :]
    groups: list[Group] = []
    first = 0
    for part, count in zip(teacher.parts, counts[1:], strict=True):
        rows = slice(first, first + count)
        if count:
            groups.append(Group(part.at(kept[rows]), rows))
        first += count
    return Grouped(kept, groups)


def padded(columns: int) -> int:
    """The columns that a buffer has memory for: of its rows all begin at multiples of 16 elements.

    Row kernels load 16 bytes at once then, whatever V is, and products have a leading dimension they are fast with.
    """
    return -(-columns // 16) * 16


def room(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A buffer (rows, columns) on the device of `like`."""
    return like.new_empty((rows, padded(columns)), dtype=dtype)[:, :columns]


def front(buffer: Tensor | None, rows: int, columns: slice) -> Tensor:
    """(rows, columns) of a buffer, with its row stride also where a last chunk is narrower."""
    assert buffer is not None  # `buffer` made it
    return buffer[:rows, : columns.stop - columns.start]


def is_operand(side: object) -> TypeGuard[Operand]:
    """Whether a side is an Operand of a known kind."""
    return isinstance(side, (*KINDS.values(), RoutedTeachers))


def flattened(side: Side) -> DenseLogits | HeadLogits:
    """Hidden states as (N, D), logits as (outer, inner, V) without a copy wherever strides allow."""
    if isinstance(side, Head):
        hidden = side.hidden.reshape(-1, side.hidden.shape[-1])
        return HeadLogits(hidden, side.weight, side.bias, float(side.scale), float(side.softcap or 0.0))
    if side.dim() <= 3:
        return DenseLogits(side[(None,) * (3 - side.dim())])
    for split in range(1, side.dim() - 1):
        try:
            outer, inner = side.shape[:split].numel(), side.shape[split:-1].numel()
            return DenseLogits(side.view(outer, inner, side.shape[-1]))
        except RuntimeError:
            continue
    return DenseLogits(side.reshape(1, -1, side.shape[-1]))


class Operands(NamedTuple):
    """Both sides."""

    student: DenseLogits | HeadLogits
    teacher: Operand


def operands_of(student: Side, teacher: Side | Operand) -> Operands:
    """Both sides as autocast has them, flattened; from the teacher no gradient flows."""
    if isinstance(teacher, Tensor | Head):
        ours, theirs = both_autocast(student, teacher)
        return Operands(flattened(ours), flattened(theirs))
    constant = operand_of(teacher.kind, [x.detach() for x in teacher.tensors], teacher.numbers)
    return Operands(flattened(autocast(student)), constant)


def part_of(teacher: Side | Operand) -> Operand:
    """One of several teachers, likewise."""
    return flattened(autocast(detached(teacher))) if isinstance(teacher, Tensor | Head) else teacher


class Comparison(NamedTuple):
    """A call as schedules take it."""

    problem: Problem
    student: DenseLogits | HeadLogits
    teacher: Operand


def comparison_of(call: LossCall) -> Comparison:
    """What a call compares, put together from its tensors and numbers."""
    numbers = numbers_of(call)
    student = Parts(
        call.student, call.student_weight, call.student_bias, numbers.student_scale, numbers.student_softcap
    )
    teacher = operand_of(call.teacher_kind, call.teacher, numbers.teacher)
    return Comparison(problem_of(call, numbers), student.operand(), teacher)
