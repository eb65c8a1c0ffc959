"""Kinds of teacher that the package does not have: one class each, and everything that takes a teacher takes it.

`Wrapped` has its logits in memory, `Doubled` makes them in a buffer, of a tensor and a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cases import IGNORE, VALUE, each, opcheck
from compare import relative
from torch import Tensor

import fusedkd
from fusedkd.kernels.device.rows import Logits
from fusedkd.schedules import planner
from fusedkd.schedules.operands import KINDS, Operand

N, V, D = 23, 301, 8


class Wrapped(NamedTuple):
    """Logits (N, V), as they are."""

    x: Tensor

    kind = "wrapped"
    stored = True
    dim = 0

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x]

    @property
    def numbers(self) -> tuple[float, ...]:
        return ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Wrapped:
        return cls(*tensors)

    def at(self, rows: Tensor) -> Wrapped:
        return Wrapped(self.x[rows])

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> None:
        return None

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        return Logits(self.x[None, rows, columns])


class Doubled(NamedTuple):
    """factor · x, made when asked for."""

    x: Tensor  # (N, V)
    factor: float

    kind = "doubled"
    stored = False
    dim = 0

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x]

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.factor,)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Doubled:
        return cls(*tensors, *numbers)

    def at(self, rows: Tensor) -> Doubled:
        return self._replace(x=self.x[rows])

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> Tensor:
        return self.x.new_empty((rows, columns))

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        assert buffer is not None
        out = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        return Logits(torch.mul(self.x[rows, columns], self.factor, out=out)[None])


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one step that makes a kind known; several chunks of rows and columns in every call."""
    kinds: tuple[type[Operand], ...] = (Wrapped, Doubled)
    for kind in kinds:
        monkeypatch.setitem(KINDS, str(kind.kind), kind)
    for name, value in {"_CPU_INNER": 6, "_CPU_LEAST": 2, "_STREAM_LEAST": 64, "_CPU_STREAM": 64}.items():
        monkeypatch.setattr(planner, name, value)


TEACHERS: dict[str, Callable[[Tensor], Any]] = {"wrapped": Wrapped, "doubled": lambda x: Doubled(x / 2, 2.0)}


def student_of(kind: str) -> tuple[Any, list[Tensor]]:
    """A student and its leaves."""
    if kind == "logits":
        x = 3 * torch.randn(N, V)
        return x.requires_grad_(), [x]
    leaves = [x.requires_grad_() for x in (torch.randn(N, D), torch.randn(V, D), torch.randn(V))]
    return fusedkd.Head(*leaves), leaves


def labels_of(columns: int = V) -> Tensor:
    """One in three is ignored."""
    return torch.randint(columns, (N,)).masked_fill(torch.arange(N) % 3 == 1, IGNORE)


def results(student: Any, leaves: list[Tensor], teacher: Any, labels: Tensor | None, **options: Any) -> list[Tensor]:
    """Loss, gradients and statistics."""
    loss, stats = fusedkd.kd_loss(student, teacher, labels, return_stats=True, **options)
    upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    assert all(x.any() for x in (loss, *gradients))
    return [loss.detach(), *gradients, torch.stack(stats)]  # together: one that should be 0 has nothing but rounding


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"reduction": "none"},
    "cross-entropy": {"ce_weight": 0.4, "vocab_size": 250},
    "temperature": {"temperature": 2.0, "temperature_squared": True, "divergence": "jsd"},
    "decoupled": {"divergence": "drkl"},
    "all rows": {"drop_ignored": False},
    "taid": {"divergence": fusedkd.divergence("taid", t=torch.rand(N, generator=torch.Generator().manual_seed(3)))},
}
WAYS = [("logits", "auto"), ("head", "chunked"), ("head", "streaming")]


@each("teacher", TEACHERS)
@each("way", WAYS)
@each("options", OPTIONS)
def test_the_same_numbers(teacher: str, way: tuple[str, str], options: str, backend: str) -> None:
    """As with the logits themselves: to the bit, but where those take another path, because they are stored.

    A kernel sums in another order where rows begin elsewhere: those that `at` copies, and their places in a buffer.
    """
    if backend == "triton" and options in ("rows", "all rows", "decoupled"):
        pytest.skip("these options and the kind of a teacher meet in no kernel, but outside, as torch tests them")
    (kind, schedule), given = way, {"divergence": "rkl", "backend": backend, **OPTIONS[options]}
    if kind == "logits" and given.pop("drop_ignored", None) is not None:
        pytest.skip("an option of heads")
    student, leaves = student_of(kind)
    logits, labels = 3 * torch.randn(N, V), labels_of(given.get("vocab_size", V))
    ours = results(student, leaves, TEACHERS[teacher](logits), labels, schedule=schedule, **given)
    plain = results(student, leaves, logits, labels, schedule=schedule, **given)
    exact = teacher == "wrapped" and backend != "triton"
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other) if exact else relative(one, other.double()) < VALUE


@each("teacher", TEACHERS)
@each("way", [("logits", "auto"), ("head", "chunked")])
def test_floors(teacher: str, way: tuple[str, str], backend: str) -> None:
    """support="floor" looks through the teacher's rows first."""
    student, leaves = student_of(way[0])
    logits = (3 * torch.randn(N, V)).masked_fill(torch.rand(N, V) < 0.1, -torch.inf)
    options = {"divergence": "rkl", "support": "floor", "schedule": way[1], "backend": backend}
    ours = results(student, leaves, TEACHERS[teacher](logits), None, **options)
    for one, other in zip(ours, results(student, leaves, logits, None, **options), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert relative(one.nan_to_num(), other.nan_to_num().double()) < VALUE


def test_value_and_grad(backend: str) -> None:
    """Without autograd."""
    student, logits, labels = torch.randn(N, V), torch.randn(N, V), labels_of()
    found = [
        fusedkd.kd_value_and_grad(student, teacher, labels, divergence="drkl", backend=backend)
        for teacher in (Wrapped(logits), logits)
    ]
    for one, other in zip(*found, strict=True):
        assert other.any()
        assert torch.equal(one, other)


@pytest.mark.unpoisoned
@each("teacher", TEACHERS)
@each("way", WAYS)
def test_compile(teacher: str, way: tuple[str, str]) -> None:
    """One graph, the same numbers; a teacher made in inference mode, for which the context keeps the tensors."""
    student, leaves = student_of(way[0])
    logits, labels = torch.randn(N, V), labels_of()

    def work(x: Tensor) -> Tensor:
        return fusedkd.kd_loss(student, TEACHERS[teacher](x), labels, divergence="rkl", schedule=way[1])

    torch._dynamo.reset()
    losses = [run(logits) for run in (torch.compile(work, fullgraph=True, backend="aot_eager"), work)]
    with torch.inference_mode():
        inferred = logits.clone()
    losses.append(work(inferred))
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    for loss, found in zip(losses, gradients, strict=True):
        assert torch.equal(loss, losses[1])
        assert all(torch.equal(one, other) for one, other in zip(found, gradients[1], strict=True))


@pytest.mark.unpoisoned
@each("teacher", TEACHERS)
@each("name", ["rows", "heads", "heads_rows", "streamed"])
def test_opcheck(teacher: str, name: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """The operators' schema has its tensors and its numbers."""
    if name == "rows" and teacher == "doubled":
        pytest.skip("for sides whose logits are stored")
    student, _ = student_of("logits" if name == "rows" else "head")
    schedule = {"rows": "auto", "streamed": "streaming"}.get(name, "chunked")
    reduction = "mean" if name == "heads" else "none"
    fusedkd.kd_loss(student, TEACHERS[teacher](torch.randn(N, V)), labels_of(), schedule=schedule, reduction=reduction)
    opcheck(name, calls[name], differentiable=True)


def test_no_gradient_flows_to_it() -> None:
    """As to every teacher; its memory is still watched for changes before the backward pass."""
    student, (leaf,) = student_of("logits")
    logits = torch.randn(N, V).requires_grad_()
    loss = fusedkd.kd_loss(student, Wrapped(logits), divergence="rkl")
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    assert logits.grad is None
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not registered is no teacher, a teacher no student, and what takes logits takes nothing else."""
    with pytest.raises(TypeError, match="student must be"):
        fusedkd.kd_loss(Wrapped(torch.randn(N, V)), torch.randn(N, V))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leading shape"):
        fusedkd.kd_loss(torch.randn(N + 1, V), Wrapped(torch.randn(N, V)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"teacher_logits must be logits, got a Doubled.*kd_loss"):
        fusedkd.kd_value_and_grad(torch.randn(N, V), Doubled(torch.randn(N, V), 2.0))  # type: ignore[arg-type]
    monkeypatch.delitem(KINDS, "wrapped")
    with pytest.raises(TypeError, match="teacher must be"):
        fusedkd.kd_loss(torch.randn(N, V), Wrapped(torch.randn(N, V)))  # type: ignore[arg-type]
