"""How many rows the chunked schedule takes at a time, and the bytes that this costs.

Two levels (design of the head path): `inner` rows of logits at once, small because two float32 logit buffers of that
height live together; `outer` rows of dZ at once, larger because every outer chunk reads and writes the whole float32
weight gradient. Ceilings of particular GPUs are not consulted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .cpu import BLOCK
from .gemm import UPCAST_ROWS

_BLOCK_COPIES = 16  # block-sized tensors alive at once in cpu.py
_ROW_BYTES = 256  # loss, statistics, labels and weights of one row
_CPU_INNER, _GPU_INNER = 128, 512  # a logit GEMM loses less than 10 % to re-reading the weight at these heights
_GPU_TILES = 132 * 128 * 256  # C·D that fills the SMs of an H100-class GPU with one wave of 128×256 tiles
_GENEROUS = 1 << 30  # dZ may take as much as dW, or this


@dataclass(frozen=True)
class Shape:
    """What the memory of a call depends on. Widths of 0: that side comes as logits."""

    rows: int
    student_width: int  # columns of logits made for the student
    teacher_width: int
    student_dim: int  # D of the student's head
    teacher_dim: int
    weight_rows: int  # V of the student's weight
    logit_bytes: int
    dz_bytes: int
    hidden_bytes: int
    accumulator_bytes: int  # of dW, dH
    on_cpu: bool
    gather: bool  # kept rows are copied together
    student_logit_bytes: int = 0  # element size of logits given as a tensor
    student_logits: int = 0  # V of student logits given as a tensor
    needs_hidden: bool = True
    needs_weight: bool = True

    @property
    def needs_gradient(self) -> bool:
        """Whether dZ is formed at all."""
        return self.needs_hidden or self.needs_weight


@dataclass(frozen=True)
class Chunks:
    """Rows per outer and inner chunk, and the workspace in bytes: beyond inputs, loss and returned gradients."""

    outer: int
    inner: int
    workspace: int


def workspace(shape: Shape, outer: int, inner: int) -> int:
    """Bytes that a call with these chunks holds at its peak."""
    total = shape.rows * _ROW_BYTES + inner * shape.teacher_width * shape.logit_bytes
    in_place = shape.needs_gradient and shape.logit_bytes == shape.dz_bytes
    if shape.student_width and not in_place:
        total += inner * shape.student_width * shape.logit_bytes
    if shape.student_width and shape.needs_gradient:
        total += outer * shape.student_width * shape.dz_bytes
    if shape.needs_hidden and shape.student_dim:
        total += shape.rows * shape.student_dim * shape.accumulator_bytes
    if shape.needs_weight and shape.student_dim:
        total += shape.weight_rows * (shape.student_dim + 1) * shape.accumulator_bytes
        total += shape.student_width * shape.accumulator_bytes
    if shape.needs_hidden:  # the gradient of student logits is formed in the forward and scaled in the backward
        total += shape.rows * shape.student_logits * shape.student_logit_bytes
    if shape.gather:
        total += shape.rows * (shape.student_dim + shape.teacher_dim) * shape.hidden_bytes
        total += 3 * inner * shape.student_logit_bytes * max(shape.student_width, shape.teacher_width)
    if shape.on_cpu:
        width = max(shape.student_width, shape.teacher_width, 1)
        total += _BLOCK_COPIES * max(BLOCK, 2 * width) * max(4, shape.accumulator_bytes)
        if shape.hidden_bytes < shape.accumulator_bytes:
            # Blocks of upcast weight, of logits before they are placed, and upcast hidden states.
            dim = max(shape.student_dim, shape.teacher_dim)
            total += 4 * (2 * UPCAST_ROWS * dim + inner * (UPCAST_ROWS + dim) + outer * dim)
    return total


def choose(shape: Shape, memory_budget: int | None) -> Chunks:
    """The default chunks, shrunk until they keep `memory_budget`. Raises ValueError with the least that would do."""
    for outer, inner in _candidates(*_default(shape)):
        held = workspace(shape, outer, inner)
        if memory_budget is None or held <= memory_budget:
            return Chunks(outer, inner, held)
    least = workspace(shape, 1, 1)
    raise ValueError(
        f"memory_budget={memory_budget} cannot be kept: this call needs at least {least} bytes (workspace, with the "
        f"float32 weight gradient); pass memory_budget={least} or more, or freeze the head to do without its gradient"
    )


def _candidates(outer: int, inner: int) -> Iterator[tuple[int, int]]:
    """Ever smaller chunks: the outer one first, which costs speed least."""
    while outer > inner:
        yield outer, inner
        outer = max(inner, outer // 2)
    while inner:
        yield inner, inner
        inner //= 2


def _default(shape: Shape) -> tuple[int, int]:
    rows = max(1, shape.rows)
    inner = min(rows, _CPU_INNER if shape.on_cpu else _GPU_INNER)
    if not (shape.student_width and shape.needs_gradient):
        return inner, inner
    if shape.on_cpu:  # the cache holds enough of dW that a second level would save nothing
        return inner, inner
    dim = max(1, shape.student_dim)
    outer = min(max(_GPU_TILES // dim, 1024), 4096)
    generous = max(_GENEROUS, 4 * dim * shape.weight_rows)
    outer = min(outer, max(inner, generous // (shape.student_width * shape.dz_bytes)))
    if rows <= dim + outer:
        return rows, inner
    outer = max(inner, outer // inner * inner)
    return min(rows, outer), inner
