"""Which schedule a call follows, how much it takes at a time, and what this costs.

Two levels (design of the head path): `inner` rows of logits at once, small because two float32 logit buffers of that
height live together; `outer` rows of dZ at once, larger because every outer chunk reads and writes the whole float32
weight gradient. The streaming schedule takes some vocabulary columns of all rows at once. `plan` says what a call would
do and cost; `kd_loss` follows the same functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .. import checks
from ..backends.torch_chunks import WHOLE, most_threads
from ..backends.torch_rows import FEW, PIECE
from ..divergence import Divergence, as_divergence
from ..dtypes import logit_dtype
from ..kernels.maths.definition import Form
from .ceilings import TABLE, Ceiling, ceiling
from .gemm import BLOCK_GRADIENT, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_WEIGHT
from .model import KernelTime, Product, RowWork, counted_as, table, time_of_product, time_of_rows
from .operands import padded

_BLOCK_COPIES = 20  # block-sized tensors alive at once in torch_rows.py and torch_logprobs.py
_ROW_BYTES = 256  # loss, statistics, labels and weights of one row
_CPU_INNER, _GPU_INNER = 192, 512  # with fewer tokens a product waits for the weight, with more a CPU for new memory
_CPU_LEAST = 128  # from here on a CPU halves the rows: few rows are not worth all their logits at once
_GPU_TILES = 132 * 128 * 256  # C·D that fills the SMs of an H100-class GPU with one wave of 128×256 tiles
_STREAM_ROW = 64  # carry, saved scalars, sums and statistics of a row, and their temporaries
_STREAM_LEAST = 512  # columns of a chunk: fewer, and a product re-reads all hidden states too often
_STREAM_NARROW = 128  # one tile of a product: what is given up for memory ends here
DOMINANT_ROWS = 1024  # rows at a time that get the streamed gradient of their dominant token
_CPU_STREAM, _GPU_STREAM = 1 << 21, 1 << 24  # logits of a chunk: what feeds a product on few cores, four waves on many
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
    outcomes: int = 0  # columns of a top-k teacher
    parameters: bool = False  # rows find parameters from all their columns, shared by ranks
    ranks: int = 1  # that share the vocabulary, each with as many columns as the widths say

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
    if shape.outcomes:  # both sides, gradients and temporaries; a bit for each column
        total += inner * (12 * shape.outcomes * shape.accumulator_bytes + shape.student_width // 8)
    if shape.gather:
        total += shape.rows * (shape.student_dim + shape.teacher_dim) * shape.hidden_bytes
        total += 3 * inner * shape.student_logit_bytes * max(of_student, of_teacher)
    if shape.parameters and not shape.on_cpu:
        total += _BLOCK_COPIES * max(WHOLE, of_student) * shape.accumulator_bytes
    if shape.on_cpu:
        width = max(shape.student_width, shape.teacher_width, 1)
        total += _BLOCK_COPIES * max(PIECE, 2 * width) * max(4, shape.accumulator_bytes)
        total += _products_of_a_cpu(inner, width, shape.student_dim, 1)
        if shape.hidden_bytes < shape.accumulator_bytes:  # blocks of upcast weight, and upcast hidden states
            dim = max(shape.student_dim, shape.teacher_dim)
            total += 4 * (2 * _upcast_of_a_cpu(width, dim) + (inner + outer) * dim)
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
        total += _BLOCK_COPIES * max(PIECE, 2 * width) * max(4, shape.accumulator_bytes)
        workers = most_threads(shape.rows)
        total += _products_of_a_cpu(shape.rows, width, shape.student_dim, workers)
        if shape.hidden_bytes < shape.accumulator_bytes:
            dim = max(shape.student_dim, shape.teacher_dim)
            total += 4 * (2 * workers * _upcast_of_a_cpu(width, dim) + shape.rows * 2 * dim)
    return total


def _products_of_a_cpu(rows: int, width: int, dim: int, workers: int) -> int:
    """Bytes of products before they are in their place: blocks of logits or weight gradient, a hidden gradient."""
    logits = min(rows, workers * BLOCK_TOKENS) * min(width, BLOCK_ROWS)
    return 4 * max(logits + rows * dim, min(width * dim, workers * BLOCK_GRADIENT))


def _upcast_of_a_cpu(width: int, dim: int) -> int:
    """Elements of a block of upcast weight."""
    return min(min(width, BLOCK_ROWS) * dim, max(BLOCK_WEIGHT, dim))


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
        cheap = FEW // max(shape.student_width, shape.teacher_width, 1)  # rows that take no threads: one chunk
        pieces = max(-(-rows // max(_CPU_INNER, cheap)), 1 if rows <= max(_CPU_LEAST, cheap) else 2)
        inner = -(-rows // pieces)
        return inner, inner
    # Ranks wait for each other once or twice a chunk: they take as many more rows as they have fewer columns.
    inner = min(rows, _GPU_INNER * shape.ranks)
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
    expected_ms: the sum of `kernels`, a model (docs/model.md) and no measurement. ceilings: what the device was taken
    for. kernels: every product and row kernel, each with its name, launches, the milliseconds of its limits (FLOPs,
    issue, special functions, bytes), and as `ms` and `limit` the longest of them. row_counts: whose compiled row
    kernels were counted; empty where the device is no part by name, whose row kernels count as bound by memory.
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
    kernels: tuple[KernelTime, ...] = ()
    row_counts: str = ""

    @property
    def products_ms(self) -> float:
        """The part of `expected_ms` that is matrix products."""
        return sum(kernel.ms for kernel in self.kernels if kernel.is_product)

    @property
    def rows_ms(self) -> float:
        """The part of `expected_ms` that is row kernels."""
        return sum(kernel.ms for kernel in self.kernels if not kernel.is_product)

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
            f"expected        {self._time()}"
        )

    def _time(self) -> str:
        if not self.row_counts:
            return f"{self.expected_ms:,.2f} ms at the device's ceilings ({self.ceilings})"
        return (
            f"{self.expected_ms:,.2f} ms, modelled, not measured ({self.ceilings}): {self.products_ms:,.2f} of matrix "
            f"products, {self.rows_ms:,.2f} of row kernels, counted for {self.row_counts}\n\n{table(self.kernels)}"
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
    ranks: int = 1,
) -> Plan:
    """What `kd_loss(Head, Head, ...)` would do for these sizes, without tensors and without the device.

    Args:
        N, V: tokens that count and vocabulary. D_student, D_teacher: widths of the hidden states (the teacher's default
            is the student's). dtype: of both heads.
        divergence, memory_budget, schedule, reduction, logits_dtype: as given to `kd_loss`.
        device: a torch device, or a part by name ("A100", "H100", "H200", "B200"), for which the time is modelled from
            the counted instructions and bytes of the compiled kernels.
        frozen: "hidden" and/or "weight" of the student, if they need no gradient. A weight that the teacher shares
            counts in full: its product with other hidden states is another product.
        ranks: how many share the vocabulary (`VocabShard`), if V is a rank's columns; their collectives are left out.

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
    checks.integer("ranks", ranks)
    checks.positive("ranks", ranks)
    parts = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    for part in parts:
        checks.one_of("frozen", part, ("hidden", "weight"))
    form = as_divergence(divergence).form
    best = ceiling(device)
    on_cpu = not (isinstance(device, str) and device.upper() in TABLE) and torch.device(device).type == "cpu"
    if dtype == torch.float64:
        best = best._replace(part=None)  # which no kernel of ours takes
    shape = _two_heads(N, V, D_student, teacher, dtype, logit_dtype(dtype, logits_dtype), on_cpu)
    shape = replace(shape, needs_hidden="hidden" not in parts, needs_weight="weight" not in parts)
    shape = replace(shape, ranks=ranks, parameters=ranks > 1 and form.definition.whole_rows)
    chosen = choose_schedule(shape, memory_budget, schedule, reduction, whole_rows(form, False, False), sweeps_of(form))
    return _costs(shape, chosen, form, reduction == "none", best)


def plan_chunks(
    N: int, V: int, D_student: int, D_teacher: int, divergence: str, device: str, chunks: tuple[int, int]
) -> Plan:
    """What `plan` says of bfloat16 heads on a GPU, were the rows per outer and inner chunk these."""
    shape = _two_heads(N, V, D_student, D_teacher, torch.bfloat16, torch.float32, False)
    taken = Chunks(*chunks, workspace(shape, *chunks))
    chosen = Chosen("chunked", taken, 0, taken.workspace)
    return _costs(shape, chosen, as_divergence(divergence).form, False, ceiling(device))


def _two_heads(
    rows: int, vocabulary: int, dim: int, teacher_dim: int, dtype: torch.dtype, logits: torch.dtype, on_cpu: bool
) -> Shape:
    wide = 8 if dtype == torch.float64 else 4
    return Shape(
        rows=rows,
        student_width=vocabulary,
        teacher_width=vocabulary,
        student_dim=dim,
        teacher_dim=teacher_dim,
        weight_rows=vocabulary,
        logit_bytes=logits.itemsize,
        dz_bytes=wide if on_cpu else dtype.itemsize,
        hidden_bytes=dtype.itemsize,
        accumulator_bytes=wide,
        on_cpu=on_cpu,
        gather=False,
    )


def sweeps_of(form: Form) -> int:
    """How often the value reads the logits of a row."""
    return 1 if form.definition.sweep(form.theta).sums is not None else 2


def whole_rows(form: Form, argmax: bool, floor: bool) -> str | None:
    """What about a call needs whole rows, which the streaming schedule never has; None if nothing does."""
    if form.definition.whole_rows:
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


def _costs(shape: Shape, chosen: Chosen, form: Form, repeats: bool, best: Ceiling) -> Plan:
    """FLOPs, bytes and time of a schedule with two heads."""
    if chosen.chunks is None:
        products, rows = _streaming_kernels(shape, chosen.width, sweeps_of(form))
        rows_per = shape.rows, shape.rows
    else:
        products, rows = _chunked_kernels(shape, chosen.chunks, repeats and shape.needs_gradient)
        rows_per = chosen.chunks.outer, chosen.chunks.inner
    kernels = (*(time_of_product(x, best) for x in products), *(time_of_rows(x, form, best) for x in rows))
    return Plan(
        chosen.schedule,
        *rows_per,
        chosen.width,
        chosen.workspace,
        sum(product.flops for product in products),
        sum(kernel.bytes for kernel in kernels),
        sum(kernel.ms for kernel in kernels),
        best.source,
        kernels,
        counted_as(rows[-1], form, best),
    )


def _chunked_kernels(shape: Shape, chunks: Chunks, repeats: bool) -> tuple[list[Product], list[RowWork]]:
    """Products and row kernels of the chunked schedule; with `repeats` the backward pass makes the logits again."""
    n, v, d = shape.rows, shape.student_width, shape.student_dim
    inner, outer = -(-n // chunks.inner), -(-n // chunks.outer)
    sweeps = ["value"] * (repeats or not shape.needs_gradient) + ["value_and_gradient"] * shape.needs_gradient
    passes = len(sweeps)
    products = _logit_products(shape, passes, passes * inner, passes * inner, passes)
    dz = n * v * shape.dz_bytes
    if shape.needs_hidden:
        moved = dz + outer * v * d * shape.hidden_bytes + n * d * shape.accumulator_bytes
        products.append(Product("hidden gradient", outer, 2.0 * n * v * d, moved))
    if shape.needs_weight:  # every outer chunk but the first reads what it adds to
        moved = dz + n * d * shape.hidden_bytes + (2 * outer - 1) * v * d * shape.accumulator_bytes
        products.append(Product("weight gradient", outer, 2.0 * n * v * d, moved))
    return products, [RowWork(name, inner, n * v, shape.logit_bytes, shape.dz_bytes) for name in sweeps]


def _streaming_kernels(shape: Shape, width: int, sweeps: int) -> tuple[list[Product], list[RowWork]]:
    """The same of the streaming schedule, which makes the logits again for every sweep."""
    n, v, d = shape.rows, shape.student_width, shape.student_dim
    chunks = -(-v // width)
    kernels = [*["absorb", "add_sums"][:sweeps], *["chunk_gradient"] * shape.needs_gradient]
    passes = len(kernels)
    products = _logit_products(shape, passes, passes * chunks, passes, passes * chunks)
    dz = n * v * shape.dz_bytes
    if shape.needs_hidden:
        moved = dz + v * d * shape.hidden_bytes + (2 * chunks - 1) * n * d * shape.accumulator_bytes
        products.append(Product("hidden gradient", chunks, 2.0 * n * v * d, moved))
    if shape.needs_weight:
        moved = dz + chunks * n * d * shape.hidden_bytes + v * d * shape.accumulator_bytes
        products.append(Product("weight gradient", chunks, 2.0 * n * v * d, moved))
    return products, [RowWork(name, chunks, n * v, shape.logit_bytes, shape.dz_bytes) for name in kernels]


def _logit_products(shape: Shape, passes: int, launches: int, weight_reads: int, hidden_reads: int) -> list[Product]:
    """Those that make the logits of both sides, in all passes together."""
    n, v = shape.rows, shape.student_width
    made: list[Product] = []
    for name, dim in (("teacher logits", shape.teacher_dim), ("student logits", shape.student_dim)):
        read = (weight_reads * v + hidden_reads * n) * dim * shape.hidden_bytes
        moved = read + passes * n * v * shape.logit_bytes
        made.append(Product(name, launches, 2.0 * passes * n * v * dim, moved))
    return made
