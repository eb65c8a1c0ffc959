"""Which schedule a call follows, how much it takes at a time, and what this costs.

Two levels (design of the head path): `inner` rows of logits at once, small because two float32 logit buffers of that
height live together; `outer` rows of dZ at once, larger because every outer chunk reads and writes the whole float32
weight gradient. The streaming schedule takes some vocabulary columns of all rows at once. `plan` says what a call would
do and cost; `kd_loss` follows the same functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import checks
from ..backends.torch_rows import BLOCK
from ..divergence import Divergence, as_divergence
from ..dtypes import logit_dtype
from ..kernels.maths.definition import Form
from .ceilings import TABLE, Ceiling, ceiling
from .gemm import BLOCK_ROWS, BLOCK_TOKENS
from .operands import padded

_BLOCK_COPIES = 20  # block-sized tensors alive at once in torch_rows.py and torch_chunks.py
_ROW_BYTES = 256  # loss, statistics, labels and weights of one row
_CPU_INNER, _GPU_INNER = 192, 512  # with fewer tokens a product waits for the weight, with more a CPU for new memory
_CPU_LEAST = 128  # from here on a CPU halves the rows: few rows are not worth all their logits at once
_GPU_TILES = 132 * 128 * 256  # C·D that fills the SMs of an H100-class GPU with one wave of 128×256 tiles
_STREAM_ROW = 64  # carry, saved scalars, sums and statistics of a row, and their temporaries
_STREAM_LEAST = 512  # columns of a chunk: fewer, and a product re-reads all hidden states too often
_STREAM_NARROW = 128  # one tile of a product: what is given up for memory ends here
DOMINANT_ROWS = 1024  # rows at a time that get the streamed gradient of their dominant token
_CPU_STREAM, _GPU_STREAM = 1 << 22, 1 << 24  # logits of a chunk: what feeds a product on few cores, four waves on many
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
    masked: bool = False  # hidden states are copied with zeros in the rows that do not count
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
    of_student, of_teacher = padded(shape.student_width), padded(shape.teacher_width)
    total = shape.rows * _ROW_BYTES + inner * of_teacher * shape.logit_bytes
    in_place = shape.needs_gradient and shape.logit_bytes == shape.dz_bytes
    if shape.student_width and not in_place:
        total += inner * of_student * shape.logit_bytes
    if shape.student_width and shape.needs_gradient:
        total += outer * of_student * shape.dz_bytes
    if shape.needs_hidden and shape.student_dim:
        total += shape.rows * shape.student_dim * shape.accumulator_bytes
    if shape.needs_weight and shape.student_dim:
        total += shape.weight_rows * (shape.student_dim + 1) * shape.accumulator_bytes
        total += shape.student_width * shape.accumulator_bytes
        total += outer * shape.student_dim * shape.hidden_bytes * shape.masked
    if shape.needs_hidden:  # the gradient of student logits is formed in the forward and scaled in the backward
        total += shape.rows * shape.student_logits * shape.student_logit_bytes
    if shape.gather:
        total += shape.rows * (shape.student_dim + shape.teacher_dim) * shape.hidden_bytes
        total += 3 * inner * shape.student_logit_bytes * max(of_student, of_teacher)
    if shape.on_cpu:
        width = max(shape.student_width, shape.teacher_width, 1)
        total += _BLOCK_COPIES * max(BLOCK, 2 * width) * max(4, shape.accumulator_bytes)
        total += _products_of_a_cpu(inner, width, shape.student_dim)
        if shape.hidden_bytes < shape.accumulator_bytes:  # blocks of upcast weight, and upcast hidden states
            dim = max(shape.student_dim, shape.teacher_dim)
            total += 4 * (2 * min(width, BLOCK_ROWS) * dim + (inner + outer) * dim)
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


def streaming_workspace(shape: Shape, width: int) -> int:
    """Bytes that the streaming schedule holds at its peak with chunks of `width` vocabulary columns."""
    total = shape.rows * (_ROW_BYTES + _STREAM_ROW * shape.accumulator_bytes)
    sides = bool(shape.student_width) + bool(shape.teacher_width)
    total += shape.rows * padded(width) * sides * shape.logit_bytes
    if shape.student_width and shape.needs_gradient and shape.logit_bytes != shape.dz_bytes:
        total += shape.rows * padded(width) * shape.dz_bytes
    if shape.needs_hidden and shape.student_dim:
        total += 3 * min(shape.rows, DOMINANT_ROWS) * shape.student_dim * shape.accumulator_bytes
        if shape.hidden_bytes < shape.accumulator_bytes:
            total += shape.rows * shape.student_dim * shape.accumulator_bytes
    if shape.needs_weight and shape.student_dim:
        total += width * (shape.student_dim + 1) * shape.accumulator_bytes
        total += 2 * shape.rows * shape.student_dim * shape.accumulator_bytes  # rows whose dominant token is put back
        total += shape.rows * shape.student_dim * shape.hidden_bytes * shape.masked
    if shape.gather:
        total += shape.rows * (shape.student_dim + shape.teacher_dim) * shape.hidden_bytes
    if shape.on_cpu:
        total += _BLOCK_COPIES * max(BLOCK, 2 * width) * max(4, shape.accumulator_bytes)
        total += _products_of_a_cpu(shape.rows, width, shape.student_dim)
        if shape.hidden_bytes < shape.accumulator_bytes:
            dim = max(shape.student_dim, shape.teacher_dim)
            total += 4 * (2 * min(width, BLOCK_ROWS) * dim + shape.rows * 2 * dim)
    return total


def _products_of_a_cpu(rows: int, width: int, dim: int) -> int:
    """Bytes of products before they are in their place: a block of logits, a chunk's hidden gradient."""
    return 4 * (min(rows, BLOCK_TOKENS) * min(width, BLOCK_ROWS) + rows * dim)


def choose_width(shape: Shape, memory_budget: int | None) -> int:
    """Vocabulary columns per streamed chunk. Raises ValueError with the least that would do.

    Wide enough to feed the products, but not so wide that the call takes more than the chunked schedule would: with few
    tokens a chunk of that many logits is the whole vocabulary, and memory is what this schedule is asked for.
    """
    vocabulary = max(shape.student_width, shape.teacher_width, shape.student_logits, 1)
    logits = _CPU_STREAM if shape.on_cpu else _GPU_STREAM
    width = min(vocabulary, max(_STREAM_LEAST, logits // max(shape.rows, 1) // _STREAM_LEAST * _STREAM_LEAST))
    chunked = choose(shape, None).workspace
    while width > _STREAM_NARROW and streaming_workspace(shape, width) > chunked:
        width = max(_STREAM_NARROW, width // 2)
    while memory_budget is not None and streaming_workspace(shape, width) > memory_budget:
        if width == 1:
            least = streaming_workspace(shape, 1)
            raise ValueError(
                f"memory_budget={memory_budget} cannot be kept: the streaming schedule needs at least {least} bytes; "
                f"pass memory_budget={least} or more, or fewer tokens at once"
            )
        width = max(1, width // 2)
    return width


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
    if shape.on_cpu:  # the cache holds enough of dW that a second level would save nothing
        pieces = max(-(-rows // _CPU_INNER), 1 if rows <= _CPU_LEAST else 2)
        inner = -(-rows // pieces)
        return inner, inner
    inner = min(rows, _GPU_INNER)
    if not (shape.student_width and shape.needs_gradient):
        return inner, inner
    dim = max(1, shape.student_dim)
    outer = min(max(_GPU_TILES // dim, 1024), 4096)
    generous = max(_GENEROUS, 4 * dim * shape.weight_rows)
    outer = min(outer, max(inner, generous // (shape.student_width * shape.dz_bytes)))
    if rows <= dim + outer:
        return rows, inner
    outer = max(inner, outer // inner * inner)
    return min(rows, outer), inner


@dataclass(frozen=True)
class Plan:
    """How `kd_loss` would run a call with two Heads, and what that costs. `str(plan)` is a table.

    schedule: "chunked" or "streaming". rows_per_chunk, rows_per_product: tokens per outer and inner chunk (chunked).
    columns_per_chunk: vocabulary per chunk (streaming). workspace: bytes beyond inputs, loss and gradients.
    gemm_flops: of all matrix products. bytes_moved: by products and row kernels, nothing assumed to stay in cache.
    expected_ms: gemm_flops and the row kernels' bytes at the ceilings of the device: a floor, not a measurement.
    """

    schedule: str
    rows_per_chunk: int
    rows_per_product: int
    columns_per_chunk: int
    workspace: int
    gemm_flops: float
    bytes_moved: float
    expected_ms: float
    ceilings: str

    def __str__(self) -> str:
        cut = (
            f"{self.rows_per_chunk} tokens per gradient chunk, {self.rows_per_product} per product"
            if self.schedule == "chunked"
            else f"{self.columns_per_chunk} vocabulary columns per chunk"
        )
        return (
            f"schedule        {self.schedule}: {cut}\n"
            f"workspace       {self.workspace / 2**20:,.1f} MiB beyond inputs, loss and gradients\n"
            f"matrix products {self.gemm_flops / 1e12:,.3f} TFLOP\n"
            f"bytes moved     {self.bytes_moved / 1e9:,.2f} GB\n"
            f"expected        {self.expected_ms:,.2f} ms at the device's ceilings ({self.ceilings})"
        )


def plan(
    N: int,
    V: int,
    D_student: int,
    D_teacher: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    divergence: str | Divergence = "fkl",
    memory_budget: int | None = None,
    device: str | torch.device = "cpu",
    frozen: Sequence[str] = (),
    schedule: str = "auto",
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
) -> Plan:
    """What `kd_loss(Head, Head, ...)` would do for these sizes, without tensors and without the device.

    Args:
        N, V: tokens that count and vocabulary. D_student, D_teacher: widths of the hidden states (the teacher's default
            is the student's). dtype: of both heads.
        divergence, memory_budget, schedule, reduction, logits_dtype: as given to `kd_loss`.
        device: a torch device, or a part by name ("A100", "H100", "H200", "B200"): its ceilings give the expected time.
        frozen: "hidden" and/or "weight" of the student, if they need no gradient. A weight that the teacher shares
            counts in full: its product with other hidden states is another product.

    Raises:
        ValueError, TypeError: naming the argument; for a budget that cannot be kept, with the least that would do.
    """
    teacher = D_student if D_teacher is None else D_teacher
    for name, value in (("N", N), ("V", V), ("D_student", D_student), ("D_teacher", teacher)):
        checks.integer(name, value)
        checks.positive(name, value)
    checks.one_of("dtype", dtype, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    checks.one_of("schedule", schedule, ("auto", "chunked", "streaming"))
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    checks.budget(memory_budget)
    parts = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    for part in parts:
        checks.one_of("frozen", part, ("hidden", "weight"))
    form = as_divergence(divergence).form
    best = ceiling(device)
    on_cpu = not (isinstance(device, str) and device.upper() in TABLE) and torch.device(device).type == "cpu"
    wide = 8 if dtype == torch.float64 else 4
    shape = Shape(
        rows=N,
        student_width=V,
        teacher_width=V,
        student_dim=D_student,
        teacher_dim=teacher,
        weight_rows=V,
        logit_bytes=logit_dtype(dtype, logits_dtype).itemsize,
        dz_bytes=wide if on_cpu else dtype.itemsize,
        hidden_bytes=dtype.itemsize,
        accumulator_bytes=wide,
        on_cpu=on_cpu,
        gather=False,
        needs_hidden="hidden" not in parts,
        needs_weight="weight" not in parts,
    )
    chosen = choose_schedule(shape, memory_budget, schedule, reduction, whole_rows(form, False, False), sweeps_of(form))
    return _costs(shape, chosen, sweeps_of(form), reduction == "none", best)


def sweeps_of(form: Form) -> int:
    """How often the value reads the logits of a row."""
    return 1 if form.definition.sweep(form.theta).sums is not None else 2


def whole_rows(form: Form, argmax: bool, floor: bool) -> str | None:
    """What about a call needs whole rows, which the streaming schedule never has; None if nothing does."""
    if not form.definition.separable:
        return f"divergence {form.definition.name.split('_')[0]!r}"
    if argmax:
        return 'target_token="teacher_argmax"'
    return 'support="floor"' if floor else None


class Chosen(NamedTuple):
    """A schedule with its chunks."""

    schedule: str
    chunks: Chunks | None
    width: int
    workspace: int


def choose_schedule(
    shape: Shape, memory_budget: int | None, schedule: str, reduction: str, needs_rows: str | None, sweeps: int
) -> Chosen:
    """The schedule that `kd_loss` follows.

    "auto" is chunked. It is streaming where only that keeps the budget, and on a GPU for reduction="none", whose
    backward pass repeats the products anyway: six of them either way, and no float32 weight gradient.
    """
    if schedule == "streaming" and needs_rows is not None:
        raise NotImplementedError(f'schedule="streaming" cannot do {needs_rows}, which needs whole rows: use "chunked"')
    repeats = reduction == "none" and shape.needs_gradient and sweeps == 1 and not shape.on_cpu
    repeats = repeats and (memory_budget is None or streaming_workspace(shape, 1) <= memory_budget)
    if schedule == "streaming" or (schedule == "auto" and needs_rows is None and repeats):
        return _streamed(shape, memory_budget)
    try:
        chunks = choose(shape, memory_budget)
    except ValueError:
        if schedule == "chunked" or needs_rows is not None:
            raise
        if workspace(shape, 1, 1) <= streaming_workspace(shape, 1):
            raise  # with the least that would do
        return _streamed(shape, memory_budget)
    return Chosen("chunked", chunks, 0, chunks.workspace)


def _streamed(shape: Shape, memory_budget: int | None) -> Chosen:
    width = choose_width(shape, memory_budget)
    return Chosen("streaming", None, width, streaming_workspace(shape, width))


def _costs(shape: Shape, chosen: Chosen, sweeps: int, repeats: bool, best: Ceiling) -> Plan:
    """FLOPs, bytes and time of a schedule with two heads."""
    n, v = shape.rows, shape.student_width
    forward = shape.student_dim + shape.teacher_dim
    backward = shape.student_dim * (shape.needs_hidden + shape.needs_weight)
    logits = n * v * 2 * shape.logit_bytes
    dz = n * v * shape.dz_bytes * shape.needs_gradient
    weights = v * forward * shape.hidden_bytes
    if chosen.schedule == "chunked":
        passes = 2 if repeats and shape.needs_gradient else 1
        assert chosen.chunks is not None
        products = -(-n // chosen.chunks.inner)
        outer = -(-n // chosen.chunks.outer)
        accumulated = 2 * outer * v * shape.student_dim * shape.accumulator_bytes * shape.needs_weight
        rows = passes * logits * (1 + sweeps) + (logits if shape.needs_gradient else 0) + dz
        moved = rows + passes * products * weights + accumulated + 2 * dz
        rows_per = (chosen.chunks.outer, chosen.chunks.inner)
    else:
        passes = sweeps + (1 if shape.needs_gradient else 0)
        chunks = -(-v // chosen.width)
        hidden = n * forward * shape.hidden_bytes
        sums = 2 * chunks * n * shape.student_dim * shape.accumulator_bytes * shape.needs_hidden
        rows = passes * 2 * logits + dz
        moved = rows + passes * (weights + chunks * hidden) + sums + 2 * dz
        rows_per = (n, n)
    flops = 2.0 * n * v * (passes * forward + backward)
    seconds = flops / best.flops + rows / best.bandwidth
    return Plan(
        chosen.schedule, *rows_per, chosen.width, chosen.workspace, flops, float(moved), 1e3 * seconds, best.source
    )
