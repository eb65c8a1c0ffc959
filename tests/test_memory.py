"""Bytes and GEMMs of a call: nothing of N·V elements, no more than the planner announced, no product too many.

Bytes come from the profiler's record of every allocation, because a dispatch mode does not see inside a registered
operator; FLOPs and operators from a mode around `chunked.run`, replayed with the arguments that a call gave it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import IGNORE, each, named
from compare import relative
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedkd
from fusedkd import loss
from fusedkd.call import LossCall
from fusedkd.kernels.language import interpreted
from fusedkd.schedules import gemm, planner, token_chunks

N, V, D, K = 640, 20_000, 8, 12  # rows, vocabulary, widths of student and teacher; a chunk of rows is 214 on a CPU
interpreter = pytest.mark.skipif(not interpreted(), reason="counted in Triton's interpreter")


class Memory(NamedTuple):
    """Bytes of some work: the peak of what was gone when it ended, every allocation's size, what it left behind."""

    peak: int
    sizes: list[int]
    kept: int


def measure(work: Callable[[], Any]) -> Memory:
    """Run `work` and read the profiler's record of the CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    events: list[tuple[int, int, int]] = []
    todo = list(record.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort(key=lambda event: event[0])
    sizes: list[int] = []
    live: dict[int, int] = {}  # address -> which allocation
    owners = []  # of each event
    for _, address, size in events:
        if size > 0:
            live[address] = len(sizes)
            sizes.append(size)
            owners.append(live[address])
        else:
            owners.append(live.pop(address, None))
    kept = set(live.values())
    now = peak = 0
    for (_, _, size), owner in zip(events, owners, strict=True):
        if owner is not None and owner not in kept:
            now += size
            peak = max(peak, now)
    del result
    return Memory(peak, sizes, sum(sizes[i] for i in kept))


def test_the_measurement() -> None:
    """Known allocations come out as they are."""
    size = 1 << 20

    def work() -> Tensor:
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size // 2, dtype=torch.uint8)
        del first
        third = torch.empty(size // 4, dtype=torch.uint8)
        return second if third is None else torch.empty(10, dtype=torch.uint8)

    assert measure(work) == Memory(size + size // 2, [size, size // 2, size // 4, 10], 10)


def test_rows_with_gaps_are_copied_a_block_at_a_time() -> None:
    """A product of a CPU wants its operand without gaps, and dZ of an odd vocabulary has them."""
    width = 2 * gemm.BLOCK_ROWS + 1
    dz = torch.randn(96, width + 15)[:, :width]
    weight, out = torch.randn(width, 4), torch.empty(96, 4)
    peak = measure(lambda: gemm.hidden_gradient(dz, weight, out)).peak
    assert peak < 0.75 * dz.numel() * dz.element_size()
    assert torch.allclose(out, dz @ weight, rtol=1e-4, atol=1e-2)


class Call(NamedTuple):
    """A call of kd_loss, its leaves, and how many bytes an N·V tensor would have."""

    loss: Callable[..., Tensor]
    leaves: list[Tensor]
    matrix: int

    def run(self, **options: Any) -> tuple[Tensor, ...]:
        """Loss and gradients, forward and backward."""
        loss = self.loss(**options)
        return loss, *(torch.autograd.grad(loss.sum(), self.leaves) if self.leaves else ())


def heads(
    dtype: torch.dtype = torch.float32,
    *,
    student: str = "head",
    teacher: str = "head",
    frozen: str = "",
    ignored: bool = False,
    bias: bool = False,
    rows: int = N,
    columns: int = V,
    **options: Any,
) -> Call:
    """Heads or logits on random numbers; `frozen` names parts of the student."""
    labels = torch.randint(options.get("vocab_size", columns), (rows,))
    if ignored:
        labels[1::3] = IGNORE
    operands = {"hidden": torch.randn(rows, D), "weight": torch.randn(columns, D)}
    if bias:
        operands["bias"] = torch.randn(columns)
    operands = {key: x.to(dtype).requires_grad_(key not in frozen) for key, x in operands.items()}
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    fixed = {"hidden": torch.randn(rows, K).to(dtype), "weight": torch.randn(columns, K).to(dtype)}
    leaves = [logits] if student == "logits" else [x for x in operands.values() if x.requires_grad]
    theirs = torch.randn(rows, columns).to(dtype) if teacher == "logits" else fusedkd.Head(**fixed)

    def loss(**more: Any) -> Tensor:
        ours = logits if student == "logits" else fusedkd.Head(**operands)
        return fusedkd.kd_loss(ours, theirs, labels, **{"divergence": "rkl", "schedule": "chunked"} | options | more)

    return Call(loss, leaves, rows * columns * dtype.itemsize)


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[planner.Chunks]:
    """What the planner chose, call by call."""
    chosen: list[planner.Chunks] = []
    original = planner.choose

    def choose(*args: Any) -> planner.Chunks:
        chosen.append(original(*args))
        return chosen[-1]

    monkeypatch.setattr(planner, "choose", choose)
    return chosen


def least(call: Call) -> int:
    """The smallest memory_budget that a call accepts."""
    with pytest.raises(ValueError, match="memory_budget") as refusal:
        call.run(memory_budget=1)
    return max(int(number) for number in re.findall(r"\d+", str(refusal.value)))


def check(call: Call, announced: list[planner.Chunks], **options: Any) -> Memory:
    """Forward and backward stay within the announcement and hold no N·V tensor."""
    call.run(**options)  # what is made once and kept is not workspace
    memory = measure(lambda: call.run(**options))
    assert max(memory.sizes) < call.matrix, "a tensor of N·V elements"
    assert memory.peak <= announced[-1].workspace
    return memory


CALLS = [
    {},
    {"ignored": True},
    {"ignored": True, "drop_ignored": False},
    {"frozen": "weight", "reduction": "none"},
    {"frozen": "hidden"},
    {"bias": True, "ce_weight": 0.5, "ignored": True, "reduction": "none"},
    {"teacher": "logits", "ignored": True},
    {"divergence": fusedkd.divergence("ab", alpha=torch.rand(N), beta=torch.rand(N)), "support": "floor"},
]


def spelled(options: dict[str, Any]) -> str:
    """A test id."""
    plain = (f"{key}={value}" for key, value in options.items() if isinstance(value, str | bool | float))
    return ",".join(plain) or "plain"


@pytest.mark.parametrize("options", CALLS, ids=spelled)
@each("dtype", [torch.float32, torch.bfloat16])
def test_heads(options: dict[str, Any], dtype: torch.dtype, announced: list[planner.Chunks]) -> None:
    """The default chunks."""
    memory = check(heads(dtype, **options), announced)
    assert memory.peak >= announced[-1].inner * V * 4, "the logits of a chunk were not seen"
    assert memory.kept >= N * D * dtype.itemsize or "hidden" in options.get("frozen", "")


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.float32, 16), (torch.bfloat16, 1)])
@each("options", [{"ignored": True}, {"reduction": "none"}])
def test_small_budget(dtype: torch.dtype, options: dict[str, Any], rows: int, announced: list[planner.Chunks]) -> None:
    """A budget is kept down to the least, and a larger one is used."""
    call = heads(dtype, rows=96, **options)
    budget = least(call) + 2 * (rows - 1) * V * 4
    memory = check(call, announced, memory_budget=budget)
    assert memory.peak <= budget
    assert announced[-1].inner == 1 if rows == 1 else 1 < announced[-1].inner <= rows


@each("dtype", [torch.float32, torch.bfloat16])
@each("frozen", ["", "hidden", "weight"])
def test_backward_makes_the_gradients_alone(dtype: torch.dtype, frozen: str) -> None:
    """They were formed in the forward pass: what is left is one rounding, without a copy or zeros beside it.

    Where nothing is to be rounded and nobody can ask again, they leave in the memory that they were formed in.
    """
    call = heads(dtype, frozen=frozen, columns=9000)
    for retain in (True, False):
        loss = call.loss()
        memory = measure(lambda loss=loss, retain=retain: torch.autograd.grad(loss, call.leaves, retain_graph=retain))
        gradients = sum(x.nbytes for x in call.leaves) if retain or dtype == torch.bfloat16 else 0
        assert gradients <= memory.kept <= gradients + 1024
        assert memory.peak <= 1 << 16  # a block of rows that is rounded


# (of the head, of the buffer)
BUFFERS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "stored"), BUFFERS, ids=named)
@each("reduction", ["mean", "none"])
def test_chunked_backward_into_a_buffer(dtype: torch.dtype, stored: torch.dtype, reduction: str) -> None:
    """The float32 gradient of the forward pass is added as it is: nothing of (V, D) is made for it."""
    call = heads(dtype, columns=9000, reduction=reduction)
    hidden, weight = call.leaves
    buffer = torch.zeros_like(weight, dtype=stored, requires_grad=False)
    plain = call.loss().sum()
    loss = call.loss(weight_grad=buffer).sum()
    memory = measure(lambda: torch.autograd.grad(loss, call.leaves, allow_unused=True))
    with_gradient = measure(lambda: torch.autograd.grad(plain, call.leaves))
    wide = dtype == torch.float32
    kept = 0 if wide and reduction == "mean" else hidden.nbytes  # formed in the forward pass, and handed over
    assert kept <= memory.kept <= kept + 1024
    # Without a buffer the float32 gradient of the backward pass is what is returned; with one it goes again.
    formed = weight.nbytes if wide and reduction == "none" else 0
    assert memory.peak <= with_gradient.peak + formed + (1 << 16)  # a block of rows that is rounded
    assert buffer.any()
    if reduction == "mean":
        assert max(memory.sizes) < weight.nbytes


@pytest.mark.parametrize(("dtype", "stored"), BUFFERS, ids=named)
def test_streamed_backward_into_a_buffer(
    dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk's product lands where it belongs: no tensor of (V, D) from start to end; without a buffer, one."""
    monkeypatch.setattr(planner, "_CPU_STREAM", 1)
    rows, columns = 16, 8000
    call = heads(dtype, rows=rows, columns=columns, schedule="streaming", drop_ignored=False)
    hidden, weight = call.leaves
    buffer = torch.zeros_like(weight, dtype=stored, requires_grad=False)
    announced = fusedkd.plan(rows, columns, D, K, dtype, divergence="rkl", schedule="streaming").workspace

    def run(**options: Any) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(call.loss(**options), call.leaves, allow_unused=True)

    for given in ({}, {"weight_grad": buffer}):
        run(**given)  # what is made once and kept is not workspace
        memory = measure(lambda given=given: run(**given))
        assert memory.peak <= announced
        largest = max(memory.sizes)
        assert largest < weight.nbytes // 2 if given else largest == weight.nbytes
        assert memory.kept <= hidden.nbytes + (0 if given else weight.nbytes) + 1024
    assert buffer.any()


def test_student_logits(announced: list[planner.Chunks]) -> None:
    """Beside a teacher's head the student's own gradient is the one N·V tensor, and the rest is announced."""
    call = heads(student="logits", ignored=True, rows=1024)
    call.run()
    memory = measure(call.run)
    assert memory.kept >= call.matrix
    assert memory.peak <= announced[-1].workspace


def test_value_alone(announced: list[planner.Chunks]) -> None:
    """Without anything to train there is no dZ and no weight gradient, and the planner knows."""
    memory = check(heads(frozen="hidden weight"), announced)
    assert memory.kept <= 1024
    alone = announced[-1].workspace
    check(heads(), announced)
    assert alone < announced[-1].workspace


def test_a_planted_matrix_is_found(announced: list[planner.Chunks], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail for one N·V tensor, however short its life."""
    rows = 2048  # more than the blocks that a plan always has
    call, original = heads(rows=rows), gemm.project

    def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.empty(rows, V)
        original(hidden, weight, out)

    check(call, announced)
    monkeypatch.setattr(gemm, "project", project)
    with pytest.raises(AssertionError, match="N·V"):
        check(call, announced)
    assert measure(call.run).peak > announced[-1].workspace


@each("dtype", [torch.float32, torch.bfloat16])
@each("layout", ["plain", "next token"])
def test_logits(dtype: torch.dtype, layout: str) -> None:
    """Forward makes nothing of N·V elements, backward the gradient alone; logits[:, :-1] is read where it lies."""
    whole = torch.randn(4, 66, V).to(dtype).requires_grad_()
    other = torch.randn(4, 66, V).to(dtype)
    cut = slice(None, -1) if layout == "next token" else slice(None)
    student, teacher = whole[:, cut], other[:, cut]
    labels = torch.randint(V, student.shape[:-1])
    labels[:, ::5] = IGNORE
    matrix = student.numel() * dtype.itemsize
    graph: list[Tensor] = []
    forward = measure(lambda: graph.append(fusedkd.kd_loss(student, teacher, labels, divergence="rkl")))
    assert forward.sizes
    assert max(forward.sizes) < matrix
    assert forward.kept <= student.shape[:-1].numel() * 256, "the forward pass keeps more than a few numbers per row"
    backward = measure(lambda: torch.autograd.grad(graph[0], student))
    assert [size for size in backward.sizes if size >= matrix] == [matrix]


@interpreter
@each("layout", ["plain", "next token"])
def test_logits_in_triton(layout: str) -> None:
    """The same where torch has no arithmetic to do: the gradient is all that is made of any size."""
    whole, other = torch.randn(2, 2, 4, 3000)
    cut = slice(None, -1) if layout == "next token" else slice(None)
    student, teacher = whole.requires_grad_()[:, cut], other[:, cut]
    labels = torch.randint(3000, student.shape[:-1])
    graph: list[Tensor] = []
    options = {"divergence": "rkl", "backend": "triton"}
    forward = measure(lambda: graph.append(fusedkd.kd_loss(student, teacher, labels, **options)))
    assert sum(forward.sizes) <= student.shape[:-1].numel() * 256
    backward = measure(lambda: torch.autograd.grad(graph[0], student))
    assert max(backward.sizes) == student.numel() * 4
    assert sum(backward.sizes) <= student.numel() * 4 + student.shape[:-1].numel() * 256


@each("rows", [1, N])
@each("frozen", ["", "weight"])
@each("dtype", [torch.float32, torch.bfloat16])
def test_streaming(rows: int, frozen: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens too keep what was announced, which is no more than the chunked schedule announces."""
    seen: list[planner.Chosen] = []
    original = planner.choose_schedule
    monkeypatch.setattr(loss, "choose_schedule", lambda *args: seen.append(original(*args)) or seen[-1])
    call = heads(dtype, frozen=frozen, rows=rows)
    for schedule in ("streaming", "chunked"):
        call.run(schedule=schedule)
        assert measure(lambda schedule=schedule: call.run(schedule=schedule)).peak <= seen[-1].workspace
    assert seen[0].workspace <= seen[-1].workspace


@each("shared", [("weight",), ("hidden",), ("weight", "hidden"), ()])
def test_autocast_casts_what_is_shared_once(shared: tuple[str, ...]) -> None:
    """Self-distillation: one half-precision copy of the operands that both sides have; the same numbers either way."""
    hidden, weight = torch.randn(40, D).requires_grad_(), torch.randn(3001, D).requires_grad_()
    student = fusedkd.Head(hidden, weight)
    made = {"hidden": torch.randn(40, D), "weight": torch.randn(3001, D)}
    theirs = fusedkd.Head(**made | {part: getattr(student, part) for part in shared})

    def run(teacher: fusedkd.Head) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = fusedkd.kd_loss(student, teacher, divergence="rkl")
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    copied = fusedkd.Head(*(x.detach().clone() for x in theirs[:2]))
    for one, other in zip(run(theirs), run(copied), strict=True):
        assert torch.equal(one, other)
    for part, operand in (("hidden", hidden), ("weight", weight)):
        copies = [measure(lambda teacher=t: run(teacher)).sizes.count(2 * operand.numel()) for t in (theirs, copied)]
        assert copies[1] - copies[0] == (part in shared)


def again(call: LossCall) -> token_chunks.Result:
    """The same call once more."""
    with torch.no_grad():
        return token_chunks.run(call)


def runs(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[LossCall]:
    """What forward and backward of a call ask chunked.run to do."""
    seen: list[LossCall] = []
    original = token_chunks.run

    def run(call: LossCall) -> token_chunks.Result:
        seen.append(call)
        return original(call)

    with monkeypatch.context() as patch:
        patch.setattr(token_chunks, "run", run)
        call.run()
    return seen


def in_place_flops(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Of addmm_; unknown to torch's counter, like the next."""
    return 2 * left[0] * left[1] * right[1]


def linear_flops(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of oneDNN's left @ rightᵀ."""
    return 2 * left[0] * left[1] * right[0]


FORMULAS = {torch.ops.aten.addmm_: in_place_flops, torch.ops.mkldnn._linear_pointwise: linear_flops}


def flops(call: Call, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of all matrix products, forward and backward."""
    replayed = runs(call, monkeypatch)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        for run in replayed:
            again(run)
    return counter.get_total_flops()


COLUMNS = 9000  # more than the 8192 rows of a half-precision weight that a CPU upcasts at once
FLOPS = [
    ({}, 3 * D + K),
    ({"frozen": "weight"}, 2 * D + K),
    ({"frozen": "hidden"}, 2 * D + K),
    ({"frozen": "weight hidden"}, D + K),
    ({"bias": True, "frozen": "weight hidden"}, D + K),
    ({"teacher": "logits"}, 3 * D),
    ({"student": "logits"}, K),
    ({"ce_weight": 0.5, "temperature": 2.0, "return_stats": False}, 3 * D + K),
]


@pytest.mark.parametrize(("options", "per_logit"), FLOPS, ids=[spelled(options) for options, _ in FLOPS])
@each("ignored", [False, True])
@each("dtype", [torch.float32, torch.bfloat16])
def test_gemms(
    options: dict[str, Any], per_logit: int, ignored: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four products with everything trainable, none for frozen parts, none for ignored rows."""
    call = heads(dtype, ignored=ignored, rows=150, columns=COLUMNS, **options)
    assert flops(call, monkeypatch) == 2 * (100 if ignored else 150) * COLUMNS * per_logit > 0


def test_gemms_of_ignored_rows_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """drop_ignored=False multiplies them all; the counter tells the difference."""
    call = heads(ignored=True, drop_ignored=False, rows=150, columns=COLUMNS)
    assert flops(call, monkeypatch) == 2 * 150 * COLUMNS * (3 * D + K)


def test_gemms_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """reduction="none" repeats the two products of the forward pass in its backward."""
    call = heads(reduction="none", rows=150, columns=COLUMNS)
    assert flops(call, monkeypatch) == 2 * 150 * COLUMNS * (D + K + 3 * D + K)


def test_gemms_of_the_common_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are not compared are not multiplied."""
    call = heads(vocab_size=COLUMNS // 4, rows=150, columns=COLUMNS)
    assert flops(call, monkeypatch) == 2 * 150 * (COLUMNS // 4) * (3 * D + K)


class Operators(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@interpreter
@each("student", ["head", "logits"])
@each("ce_weight", [0.0, 0.5])
def test_chunk_loop_of_triton(student: str, ce_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks make no more allocations, with the products as a GPU makes them."""
    monkeypatch.setattr(gemm, "_of_a_cpu", lambda out: False)
    options = {"student": student, "ignored": True, "drop_ignored": False, "backend": "triton", "ce_weight": ce_weight}
    (run,) = runs(heads(rows=12, columns=130, **options), monkeypatch)
    results, allocations = [], []
    for outer, inner in ((12, 12), (6, 3), (2, 1)):
        call = run._replace(outer_rows=outer, inner_rows=inner)
        operators = Operators()
        with operators:
            results.append(again(call))
        assert operators.count["mm"] > 0
        memory = measure(lambda call=call: again(call))
        allocations.append(len([size for size in memory.sizes if size > 0]))
    assert allocations[0] > 0
    assert len(set(allocations)) == 1, allocations
    assert results[0].gradients.x.any()
    assert all(relative(result.gradients.x, results[0].gradients.x.double()) < 1e-5 for result in results)
