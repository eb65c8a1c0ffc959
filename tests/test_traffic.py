"""Bytes per logit, counted in Triton's interpreter: each sweep reads every logit once, and nothing else is moved.

A figure that holds on every machine, because it does not depend on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import ALL, IGNORE, Case, each
from torch import Tensor

import fusedkd
from fusedkd.backends import triton
from fusedkd.kernels.device import split_rows
from fusedkd.kernels.divergences import REGISTRY
from fusedkd.kernels.language import formula, interpreted
from fusedkd.kernels.maths.definition import Definition
from fusedkd.schedules import planner, vocab_chunks

if not interpreted():
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)
interpreter = pytest.importorskip("triton.runtime.interpreter")

N, V, IGNORED = 5, 700, 2
COUNTED = N - IGNORED
ONE_SWEEP = {  # docs/mathematics.md#one-sweep
    "fkl", "rkl", "drkl", "dkd", "ab", "alpha", "tsallis", "renyi", "decoupled", "frkl", "jeffreys", "eopd", "taid",
}  # fmt: skip
TWO = {"jsd", "skl", "srkl", "tvd", "hellinger", "triangular", "todi"}
FURTHER_READS = {"amid_teacher": 3, "amid_student": 3, "akl_rows": 2}  # normalisers, mixture, sums; sums, gaps


@dataclasses.dataclass
class Access:
    """One load or store of a program: where, and the bytes of its live lanes."""

    kind: str
    address: int
    size: int


class Traffic:
    """Every access of a block of code, asked for by the tensor that it fell into."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []

    def count(self, kind: str, tensor: Tensor) -> float:
        """Bytes that were loaded from or stored to a tensor's memory, in elements of it."""
        storage = tensor.untyped_storage()
        low, high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        moved = sum(a.size for a in self.accesses if a.kind == kind and low <= a.address < high)
        return moved / tensor.element_size()

    def other(self, *tensors: Tensor) -> int:
        """Bytes that were moved to or from anything else."""
        known = sum(self.count(kind, x) * x.element_size() for x in tensors for kind in ("load", "store"))
        return sum(a.size for a in self.accesses) - int(known)


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the masked loads and stores of the interpreter, which all others are lowered to."""
    builder = interpreter.InterpreterBuilder
    originals = {"load": builder.create_masked_load, "store": builder.create_masked_store}
    seen = Traffic()

    def note(kind: str, pointers: Any, mask: Any) -> None:
        live = mask.data.astype(bool).ravel()
        if live.any():
            size = pointers.get_element_ty().primitive_bitwidth // 8
            seen.accesses.append(Access(kind, int(pointers.data.ravel()[live][0]), int(live.sum()) * size))

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("load", pointers, mask)
        return originals["load"](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("store", pointers, mask)
        return originals["store"](self, pointers, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        yield seen
    finally:
        builder.create_masked_load, builder.create_masked_store = originals["load"], originals["store"]


@formula
def toy_term(q, p, logq, logp, delta, theta):
    """½(p − q)², which needs both normalisers first."""
    return 0.5 * (p - q) * (p - q), q * (q - p)


TOY = Definition("toy", toy_term, lambda logp, logq: 0.5 * (logp.exp() - logq.exp()).square().sum(-1))
TWO_SWEEPS: list[Case] = [
    ("toy", {}),
    ("decoupled", {"base": "toy"}),
    ("ab", {"alpha": 0.0, "beta": 0.7}),
    ("ab", {"alpha": 0.5, "beta": torch.full((N,), 0.5)}),
]
CASES = [*ALL, *TWO_SWEEPS]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence without a one-sweep form."""
    monkeypatch.setitem(REGISTRY, "toy", TOY)


def sweeps(case: Case) -> int:
    """Reads of each logit for the value: one, two without a one-sweep form, and what gathered parameters cost."""
    form = fusedkd.divergence(case[0], **case[1]).form
    if form.definition.name in FURTHER_READS:
        return FURTHER_READS[form.definition.name]
    return 1 if form.definition.sweep(form.theta).sums is not None else 2


def teacher_sweeps(case: Case) -> int:
    """The same of the teacher, which the search for AKL's cut reads 16 times."""
    return sweeps(case) + (16 if case[0] == "akl" else 0)


def problem(dtype: torch.dtype = torch.float32, ignored: int = IGNORED) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels; the first rows are ignored."""
    student, teacher = torch.randn(2, N, V).to(dtype)
    labels = torch.randint(V, (N,))
    labels[:ignored] = IGNORE
    return student, teacher.clone(), labels


def assert_reads(moved: Traffic, logits: Tensor, reads: int, rows: int = COUNTED, extra: int = 2) -> None:
    """Each logit of the counted rows `reads` times, and at most a few single elements of each: the label's."""
    found = moved.count("load", logits) - reads * rows * V
    assert 0 <= found <= extra * rows, f"{found} elements more than {reads} reads of {rows} rows"


def test_the_named_ones_take_one_sweep() -> None:
    """Those of one sweep at their defaults; the cases that are meant to take two sweeps do."""
    for name in ONE_SWEEP & fusedkd.divergences().keys():
        assert sweeps((name, {})) == 1, name
    for name in TWO:
        assert sweeps((name, {})) == 2, name
    for case in TWO_SWEEPS:
        assert sweeps(case) == 2, case


def test_the_counter_counts() -> None:
    """What torch does by itself is not counted, what a kernel does is, and only inside the block."""
    student, teacher, labels = problem(ignored=0)
    with traffic() as moved:
        student + teacher
        assert not moved.accesses
        fusedkd.kd_loss(student, teacher, labels, backend="triton")
    assert moved.count("load", student) > N * V
    assert moved.other(student, teacher) > 0
    before = len(moved.accesses)
    fusedkd.kd_loss(student, teacher, labels, backend="triton")
    assert len(moved.accesses) == before


@each("case", [("rkl", {}), ("drkl", {}), ("jsd", {})])
def test_shared_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per row read and write what one does; beside that, a few numbers for each tile."""
    monkeypatch.setattr(triton, "shares_rows", lambda problem, x: True)
    monkeypatch.setattr(split_rows, "SMALLEST", 128)
    name, params = case
    student, teacher, labels = problem()
    with traffic() as moved:
        _, grad = fusedkd.kd_value_and_grad(
            student, teacher, labels, divergence=fusedkd.divergence(name, **params), backend="triton"
        )
    for logits in (student, teacher):
        assert_reads(moved, logits, sweeps(case) + 1, extra=0)
    assert N * V <= moved.count("store", grad) <= N * V + COUNTED
    tiles = COUNTED * -(-V // 128)
    assert moved.other(student, teacher, grad) <= 4 * 64 * (sweeps(case) + 1) * tiles


@each("case", CASES)
def test_value_alone(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """One sweep, or two; only loss and row scalars are written."""
    name, params = case
    student, teacher, labels = problem(dtype)
    options = {"divergence": fusedkd.divergence(name, **params), "backend": "triton"}
    with traffic() as moved:
        fusedkd.kd_loss(student, teacher, labels, **options)
    assert_reads(moved, student, sweeps(case))
    assert_reads(moved, teacher, teacher_sweeps(case))
    assert moved.count("store", student) == moved.count("store", teacher) == 0
    assert moved.other(student, teacher) <= N * 4 * 20  # labels, loss, 14 saved scalars, parameters


@each("case", CASES)
def test_value_and_gradient_through_autograd(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The backward pass adds one read and the one write of the gradient, zeros of ignored rows included."""
    name, params = case
    student, teacher, labels = problem(dtype)
    student.requires_grad_()
    options = {"divergence": fusedkd.divergence(name, **params), "backend": "triton"}
    loss = fusedkd.kd_loss(student, teacher, labels, **options)
    with traffic() as moved:
        (grad,) = torch.autograd.grad(loss, student)
    for logits in (student, teacher):
        assert_reads(moved, logits, 1)
        assert moved.count("store", logits) == 0
    assert moved.count("store", grad) == N * V
    assert moved.count("load", grad) == 0
    assert moved.other(student, teacher, grad) <= N * 4 * 20
    assert not grad[:IGNORED].any()


@each("case", CASES)
@each("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_in_one_call(case: Case, dtype: torch.dtype) -> None:
    """Two reads and one write, or three and one."""
    name, params = case
    student, teacher, labels = problem(dtype)
    options = {"divergence": fusedkd.divergence(name, **params), "backend": "triton"}
    with traffic() as moved:
        _, grad = fusedkd.kd_value_and_grad(student, teacher, labels, **options)
    assert_reads(moved, student, sweeps(case) + 1)
    assert_reads(moved, teacher, teacher_sweeps(case) + 1)
    assert moved.count("store", student) == moved.count("store", teacher) == 0
    assert moved.count("store", grad) == N * V
    assert moved.count("load", grad) == 0
    assert moved.other(student, teacher, grad) <= N * 4 * 20


@each("case", [("rkl", {}), ("drkl", {}), ("toy", {})])
@each("extra", [{}, {"ce_weight": 0.5}, {"support": "floor"}])
def test_ignored_rows(case: Case, extra: dict[str, Any]) -> None:
    """A batch of ignored rows reads no logit at all, forward or backward, and writes zeros."""
    name, params = case
    student, teacher, labels = problem(ignored=N)
    student.requires_grad_()
    options = {"divergence": fusedkd.divergence(name, **params), "backend": "triton"} | extra
    with traffic() as moved:
        (grad,) = torch.autograd.grad(fusedkd.kd_loss(student, teacher, labels, **options), student)
    _, again = fusedkd.kd_value_and_grad(student.detach(), teacher, labels, **options)
    assert moved.accesses
    for logits in (student, teacher):
        assert moved.count("load", logits) == 0
    for written in (grad, again):
        assert not written.any()


@each("case", [("rkl", {}), ("fkl", {}), ("ab", {}), ("toy", {})])
def test_options_are_free(case: Case) -> None:
    """Statistics, cross-entropy, temperature, weights of the two terms: not one logit is read again for them."""
    name, params = case
    student, teacher, labels = problem()
    made = fusedkd.divergence(name, target=0.5, nontarget=2.0, **params)
    options: dict[str, Any] = {"temperature": 2.0, "token_weights": torch.rand(N), "ce_weight": 0.5}
    with traffic() as moved:
        _, grad, stats = fusedkd.kd_value_and_grad(
            student, teacher, labels, divergence=made, backend="triton", return_stats=True, **options
        )
    assert_reads(moved, student, sweeps(case) + 1)
    assert_reads(moved, teacher, sweeps(case) + 1)
    assert moved.count("store", grad) == N * V
    assert stats.student_entropy[IGNORED:].all()


@each("case", [("rkl", {}), ("toy", {})])
def test_floor(case: Case) -> None:
    """Where the teacher is raised to a floor one more read of the teacher finds it; the backward pass keeps it."""
    name, params = case
    student, teacher, labels = problem(ignored=0)
    student.requires_grad_()
    options = {"divergence": fusedkd.divergence(name, **params), "backend": "triton", "support": "floor"}
    with traffic() as moved:
        loss = fusedkd.kd_loss(student, teacher, labels, **options)
    assert_reads(moved, student, sweeps(case), rows=N)
    assert_reads(moved, teacher, sweeps(case) + 1, rows=N)
    with traffic() as moved:
        torch.autograd.grad(loss, student)
    assert_reads(moved, student, 1, rows=N)
    assert_reads(moved, teacher, 1, rows=N)


def test_columns_beyond_the_vocabulary() -> None:
    """What is not compared is not read, and gets zeros without a look."""
    student, teacher, labels = problem(ignored=0)
    labels %= 100
    with traffic() as moved:
        _, grad = fusedkd.kd_value_and_grad(
            student, teacher, labels, divergence="rkl", vocab_size=100, backend="triton"
        )
    for logits in (student, teacher):
        assert 2 * N * 100 <= moved.count("load", logits) <= 2 * N * 100 + 2 * N
    assert moved.count("store", grad) == N * V
    assert not grad[:, 100:].any()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The passes over the vocabulary of a streamed call, forward then backward, kept alive; several chunks each."""
    seen: list[Any] = []
    original = vocab_chunks._pass

    def noted(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(vocab_chunks, "_pass", noted)
    for name in ("_STREAM_LEAST", "_CPU_STREAM"):
        monkeypatch.setattr(planner, name, 256)
    return seen


@each("case", [("drkl", {}), ("jsd", {}), ("toy", {})])
@each("dtype", [torch.float32, torch.bfloat16])
@each("teacher_kind", ["head", "logits"])
def test_streaming(case: Case, dtype: torch.dtype, teacher_kind: str, passes: list[Any]) -> None:
    """Recomputed logits: the value's sweeps read each once, the gradient's once more and writes dZ over the student's.

    Beside them a few numbers per row and chunk travel between the launches.
    """
    name, params = case
    logits, theirs, labels = problem(dtype)
    hidden, weight = (torch.randn(rows, 8).to(dtype).requires_grad_() for rows in logits.shape)
    teacher = theirs if teacher_kind == "logits" else fusedkd.Head(*(torch.randn(n, 4).to(dtype) for n in theirs.shape))
    options = {"divergence": fusedkd.divergence(name, **params), "schedule": "streaming", "backend": "triton"}
    with traffic() as forward:
        loss = fusedkd.kd_loss(fusedkd.Head(hidden, weight), teacher, labels, drop_ignored=False, **options)
    with traffic() as backward:
        torch.autograd.grad(loss, [hidden, weight])
    assert [made.width < V for made in passes] == [True, True]
    for moved, made, reads, writes in ((forward, passes[0], sweeps(case), 0), (backward, passes[1], 1, N * V)):
        student, kept = made.student_buffer, made.teacher_buffer
        kept = theirs if kept is None else kept
        assert_reads(moved, student, reads)
        assert_reads(moved, kept, reads)
        assert moved.count("store", student) == writes
        assert moved.count("store", kept) == 0
        chunks = -(-V // made.width)
        assert moved.other(student, kept) <= N * chunks * reads * 4 * 64
