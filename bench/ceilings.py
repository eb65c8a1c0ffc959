"""What the machine gives: a copy of memory, and each matrix product of the head path by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedules.gemm import hidden_gradient, project, weight_gradient
from ..schedules.planner import plan
from .shapes import Shape
from .timing import Clock, interleaved

GPU_SQUARE = 8192
GPU_COPY, CPU_COPY, QUICK_COPY = 1 << 32, 1 << 28, 1 << 22  # bytes that are read, and as many written


class Phase(NamedTuple):
    """A piece of work and how much it is, in bytes moved or floating-point operations."""

    name: str
    amount: int
    unit: str  # "B" or "FLOP"
    prepare: Callable[[], Callable[[], object]]


def phases(shape: Shape, device: str) -> list[Phase]:
    """Return the copy and the products, at the heights of the chunks that the head path takes."""
    gpu = device != "cpu"
    v, d, k = shape.vocab, shape.dim, shape.teacher_dim
    size = QUICK_COPY if v < 10_000 else GPU_COPY if gpu else CPU_COPY
    operand = torch.bfloat16 if gpu else torch.float32
    taken = plan(shape.rows, v, d, k, operand, device=device, schedule="chunked")
    inner, outer = taken.rows_per_product, taken.rows_per_chunk

    def randn(*sizes: int, dtype: torch.dtype = operand) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, device=device, dtype=dtype)

    def copy() -> Callable[[], object]:
        there = empty(size // 4).normal_()
        here = torch.empty_like(there)
        return lambda: here.copy_(there)

    def logits(
        rows: int, width: int, dtype: torch.dtype = torch.float32, product: Callable[..., object] = project
    ) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            hidden, weight, out = randn(rows, width), randn(v, width), empty(rows, v, dtype=dtype)
            return lambda: product(hidden, weight, out=out)

        return prepare

    def to_hidden(product: Callable[..., object] = hidden_gradient) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            dz, weight, out = randn(outer, v), randn(v, d), empty(outer, d)
            return lambda: product(dz, weight, out=out)

        return prepare

    def to_weight(accumulate: bool) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            dz, hidden, out = randn(outer, v), randn(outer, d), empty(v, d).zero_()
            return lambda: weight_gradient(dz, hidden, out, accumulate)

        return prepare

    def square() -> Callable[[], object]:
        a, b = randn(GPU_SQUARE, GPU_SQUARE), randn(GPU_SQUARE, GPU_SQUARE)
        return lambda: a @ b

    found = [
        Phase("copy", 2 * size, "B", copy),
        Phase(f"student logits, {inner} rows", 2 * inner * v * d, "FLOP", logits(inner, d)),
        Phase(f"teacher logits, {inner} rows", 2 * inner * v * k, "FLOP", logits(inner, k)),
        Phase(f"hidden gradient, {outer} rows", 2 * outer * v * d, "FLOP", to_hidden()),
        Phase(f"weight gradient, {outer} rows", 2 * outer * v * d, "FLOP", to_weight(False)),
        Phase(f"weight gradient added, {outer} rows", 2 * outer * v * d, "FLOP", to_weight(True)),
    ]
    if gpu:
        found[3:3] = [
            Phase(f"student logits in bf16, {inner} rows", 2 * inner * v * d, "FLOP", logits(inner, d, operand)),
            Phase(f"square of {GPU_SQUARE}", 2 * GPU_SQUARE**3, "FLOP", square),
        ]
    else:
        found += [
            Phase(
                f"student logits by torch.mm, {inner} rows", 2 * inner * v * d, "FLOP", logits(inner, d, product=_mm)
            ),
            Phase(
                f"teacher logits by torch.mm, {inner} rows", 2 * inner * v * k, "FLOP", logits(inner, k, product=_mm)
            ),
            Phase(f"hidden gradient by torch.mm, {outer} rows", 2 * outer * v * d, "FLOP", to_hidden(torch.mm)),
        ]
    return found


def _mm(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=out)


def measure(
    shape: Shape, device: str, clock: Clock, rounds: int, tick: Callable[[str, bool], object]
) -> list[dict[str, Any]]:
    """Return the seconds of every phase; one after the other, so that no two hold memory at once."""
    measured = []
    for phase in phases(shape, device):
        tick(phase.name, True)
        found = [each[phase.name] for each in interleaved({phase.name: phase.prepare()}, clock, rounds, lambda: False)]
        samples = [x for x in found[1:] if isinstance(x, float)]
        failure = next((x for x in found if isinstance(x, str)), None)
        measured.append(
            {"what": phase.name, "amount": phase.amount, "unit": phase.unit, "seconds": samples, "reason": failure}
        )
    return measured
