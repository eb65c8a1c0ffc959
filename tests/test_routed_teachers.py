"""Several teachers in one call, and a top-k teacher beside a streamed head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DEFAULTS, HEAD, IGNORE, VALUE, Case, each, named, opcheck
from compare import assert_close, relative
from outcomes import check_head
from test_topk import DISTINCT, TAILS, head_problem, ragged
from torch import Tensor

import fusedkd
from fusedkd.schedules import gemm, planner

N, V, D, K = 19, 131, 8, 6


def teachers() -> list[Any]:
    """Logits, a TopK with a row of no token, logits of a wider vocabulary, a Head."""
    wide = 3 * torch.randn(N, V + 3)
    ids = wide[:, :V].topk(K).indices
    logprobs = wide[:, :V].log_softmax(-1).gather(1, ids)
    ids[4] = -1
    head = fusedkd.Head(torch.randn(N, 5), torch.randn(V, 5), torch.randn(V))
    return [3 * torch.randn(N, V), fusedkd.TopK(ids, logprobs), wide, head]


def routing() -> Tensor:
    """Which teacher a token has: none for some, the third never."""
    ids = torch.tensor([0, 1, 3, -1, 1, 1, 0, 3, 0, 0, -1, 1, 3, 3, 0, 1, 1, 0, 3])
    assert len(ids) == N
    assert not (ids == 2).any()
    return ids


def students() -> tuple[dict[str, Any], list[Tensor]]:
    """A Head, and logits that it makes."""
    leaves = [x.requires_grad_() for x in (torch.randn(N, D), torch.randn(V, D), torch.randn(V))]
    hidden, weight, bias = leaves
    return {"head": fusedkd.Head(*leaves), "logits": hidden @ weight.T + bias}, leaves


def rows_of(side: Any, rows: Tensor) -> Any:
    """Some rows of a side."""
    if isinstance(side, fusedkd.Head):
        return side._replace(hidden=side.hidden[rows])
    if isinstance(side, fusedkd.TopK):
        return side._replace(ids=side.ids[rows], logprobs=side.logprobs[rows])
    return side[rows]


def one_by_one(
    student: Any, given: Sequence[Any], ids: Tensor, labels: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,) by a call for each teacher, and which rows count."""
    loss, counted = torch.zeros(N), torch.zeros(N, dtype=torch.bool)
    for i, teacher in enumerate(given):
        mine = ids == i
        if isinstance(teacher, fusedkd.TopK):
            mine &= (teacher.ids >= 0).any(-1)
        rows = mine.nonzero().squeeze(-1)
        if not len(rows):
            continue
        own = {key: x[rows] if isinstance(x, Tensor) and x.dim() else x for key, x in options.items()}
        label = None if labels is None else labels[rows]
        found = fusedkd.kd_loss(
            rows_of(student, rows), rows_of(teacher, rows), label, reduction="none", vocab_size=V, **own
        )
        loss = loss.index_copy(0, rows, found)
        counted[rows] = True if label is None else label != IGNORE
    return loss, counted


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"divergence": "rkl"},
    "jsd": {"divergence": "jsd", "token_weights": torch.linspace(0.1, 2, N)},
    "drkl, cross-entropy": {"divergence": "drkl", "ce_weight": 0.5},
}


@each("kind", ["head", "logits"])
@each("options", OPTIONS)
@each("labelled", [True, False])
def test_as_one_call_for_each(kind: str, options: str, labelled: bool, backend: str) -> None:
    """Value and gradients in every reduction; rows without a teacher are none of the mean."""
    given, ids, chosen = teachers(), routing(), {**OPTIONS[options], "backend": backend}
    if not labelled and "drkl" in options:
        pytest.skip("needs a target")
    sides, leaves = students()
    labels = torch.randint(V, (N,)).masked_fill(torch.arange(N) % 5 == 2, IGNORE) if labelled else None
    loss, counted = one_by_one(sides[kind], given, ids, labels, **chosen)
    for reduction in ("mean", "sum", "none"):
        ours = fusedkd.kd_loss(sides[kind], given, labels, teacher_ids=ids, reduction=reduction, vocab_size=V, **chosen)
        plain = {"mean": loss.sum() / counted.sum(), "sum": loss.sum(), "none": loss}[reduction]
        assert_close(ours, plain.double(), VALUE)
        upstream = torch.linspace(1, 2, ours.numel()).view(ours.shape)
        pairs = (torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (ours, plain))
        for one, other in zip(*pairs, strict=True):
            assert other.any()
            assert relative(one, other.double()) < VALUE + HEAD


def test_statistics_and_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has those of its own teacher, also where a group is several chunks."""
    for name, value in {"_CPU_INNER": 2, "_CPU_LEAST": 1}.items():
        monkeypatch.setattr(planner, name, value)
    given, ids = teachers(), routing()
    sides, _ = students()
    labels = torch.randint(V, (N,))
    options = {"divergence": "drkl", "return_stats": True, "backend": backend, "vocab_size": V}
    _, stats = fusedkd.kd_loss(sides["head"], given, labels, teacher_ids=ids, **options)
    for i, teacher in enumerate(given):
        rows = (ids == i).nonzero().squeeze(-1)
        if len(rows):
            _, own = fusedkd.kd_loss(rows_of(sides["head"], rows), rows_of(teacher, rows), labels[rows], **options)
            for one, other in zip(stats, own, strict=True):
                torch.testing.assert_close(one[rows], other, rtol=1e-4, atol=1e-5)
    assert all(not column[ids < 0].any() for column in stats)


@each("hole", [torch.nan, torch.inf])
@each("kind", ["head", "logits"])
@each("reduction", ["mean", "none"])
def test_rows_without_a_teacher(hole: float, kind: str, reduction: str) -> None:
    """They may hold anything, and their upstream gradient too."""
    given, ids = teachers(), routing()
    none = ids < 0
    found = []
    for damaged in (False, True):
        torch.manual_seed(3)
        _, (hidden, weight, bias) = students()
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        x = leaves[0].masked_fill(none.unsqueeze(-1), hole) if damaged else leaves[0]
        logits = (leaves[0] @ leaves[1].T + leaves[2]).masked_fill(none.unsqueeze(-1) & torch.tensor(damaged), hole)
        student = fusedkd.Head(x, *leaves[1:]) if kind == "head" else logits
        loss = fusedkd.kd_loss(student, given, teacher_ids=ids, reduction=reduction, vocab_size=V)
        upstream = torch.ones_like(loss)
        if damaged and reduction == "none":
            upstream = upstream.masked_fill(none, hole)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves[1:], upstream)])
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_no_row_at_all() -> None:
    """No token has a teacher: 0, and gradients of 0."""
    sides, leaves = students()
    loss = fusedkd.kd_loss(sides["head"], teachers(), teacher_ids=torch.full((N,), -1), vocab_size=V)
    loss.backward()
    assert loss == 0
    for x in leaves:
        assert x.grad is not None
        assert not x.grad.any()


def test_a_teacher_of_no_row_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits of its rows are made."""
    made: list[int] = []
    real = gemm.project

    def counted(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        made.append(hidden.shape[1])
        real(hidden, weight, out)

    monkeypatch.setattr(gemm, "project", counted)
    given = [fusedkd.Head(torch.randn(N, d), torch.randn(V, d)) for d in (3, 5, 7)]
    fusedkd.kd_loss(fusedkd.Head(torch.randn(N, D), torch.randn(V, D)), given, teacher_ids=torch.arange(N) % 2)
    assert set(made) == {D, 3, 5}


@pytest.mark.unpoisoned
@each("kind", ["head", "logits"])
def test_compile(kind: str) -> None:
    """One graph, in which the ids are an input."""
    given, labels = teachers(), torch.randint(V, (N,))

    def work(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        student = fusedkd.Head(hidden, weight) if kind == "head" else hidden @ weight.T
        return fusedkd.kd_loss(student, given, labels, teacher_ids=ids, vocab_size=V)

    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for ids in (routing(), routing().roll(1)):
        leaves = [x.requires_grad_() for x in (torch.randn(N, D), torch.randn(V, D))]
        pairs = [torch.autograd.grad(run(*leaves, ids), leaves) for run in (compiled, work)]
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.unpoisoned
@each("name", ["heads", "heads_rows"])
def test_opcheck(name: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """The operators' schema has all teachers' tensors in one list."""
    sides, _ = students()
    reduction = "mean" if name == "heads" else "none"
    fusedkd.kd_loss(sides["head"], teachers(), teacher_ids=routing(), reduction=reduction, vocab_size=V)
    opcheck(name, calls[name], differentiable=True)


IDS = torch.zeros(N, dtype=torch.int64)
MISTAKES: dict[str, tuple[Any, Any, type[Exception], tuple[str, ...]]] = {
    "ids without a list": (torch.randn(N, V), IDS, ValueError, ("teacher_ids", "one Tensor", "list of teachers")),
    "a list without ids": ([torch.randn(N, V)], None, ValueError, ("teacher is a list", "teacher_ids", "int64")),
    "an empty list": ([], IDS, ValueError, ("teacher", "at least one")),
    "no teacher": ([torch.randn(N, V), "t"], IDS, TypeError, ("teacher[1]", "str")),
    "fewer rows": ([torch.randn(N, V), torch.randn(2, V)], IDS, ValueError, ("teacher[1]", "leading shape", "(2,)")),
    "int32": ([torch.randn(N, V)], IDS.int(), TypeError, ("teacher_ids", "int64", "long()")),
    "no tensor": ([torch.randn(N, V)], [0] * N, TypeError, ("teacher_ids", "list")),
    "shape": ([torch.randn(N, V)], IDS[:3], ValueError, ("teacher_ids", "leading shape", "(3,)")),
    "too large": ([torch.randn(N, V)], IDS + 1, ValueError, ("teacher_ids", "[0, 1)", "-1", "got 1")),
    "below -1": ([torch.randn(N, V)], IDS - 2, ValueError, ("teacher_ids", "got -2")),
    "an id of a TopK": (
        [fusedkd.TopK(torch.full((N, 1), V), torch.zeros(N, 1))],
        IDS,
        ValueError,
        ("teacher[0].ids", f"got {V}"),
    ),
}


@pytest.mark.smoke
@each("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    """Each is refused by name, with what would work."""
    teacher, ids, error, words = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        fusedkd.kd_loss(torch.randn(N, V), teacher, teacher_ids=ids)
    for word in words:
        assert word in str(caught.value)


def test_what_has_one_teacher_only() -> None:
    """Streaming, and value and gradient without autograd."""
    sides, _ = students()
    with pytest.raises(NotImplementedError, match="a list of teachers"):
        fusedkd.kd_loss(sides["head"], teachers(), teacher_ids=routing(), schedule="streaming", vocab_size=V)
    with pytest.raises(TypeError, match="teacher_logits must be"):
        fusedkd.kd_value_and_grad(torch.randn(N, V), teachers())  # type: ignore[arg-type]


# A top-k teacher beside a head whose vocabulary is streamed


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 columns."""
    for name, value in {"_CPU_STREAM": 1, "_STREAM_LEAST": 32, "_STREAM_NARROW": 32}.items():
        monkeypatch.setattr(planner, name, value)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "torch") for case in DISTINCT), *((case, "triton") for case in DISTINCT[1:3])],
    ids=named,
)
@each("tail", TAILS)
def test_streaming(case: Case, tail: str, backend: str) -> None:
    """Value, statistics and gradients against float64."""
    check_head(*head_problem(tail), case, backend, schedule="streaming")


@pytest.mark.usefixtures("narrow")
@each("tail", ["bucket", "renormalize", "truncate"])
@each("reduction", ["mean", "none"])
def test_streaming_with_a_cross_entropy(tail: str, reduction: str, backend: str) -> None:
    """Over more columns than are compared, at another temperature than the divergence."""
    student, listed, labels = head_problem(tail, 2.0)
    listed.ids[listed.ids >= 100] = -1
    labels[labels >= 100] = IGNORE
    options = {"ce_weight": 0.5, "vocab_size": 100, "reduction": reduction, "schedule": "streaming"}
    check_head(student, listed, labels, ("rkl", {}), backend, **options)


@pytest.mark.usefixtures("narrow")
@each("case", [case for case in DEFAULTS if case[0] in ("amid", "akl")])
def test_streaming_of_whole_rows(case: Case) -> None:
    """The outcomes are whole rows, whatever becomes of the vocabulary."""
    student, listed, labels = head_problem("bucket")
    made = student.head(student.operands(torch.float32, "cpu"))
    losses = [
        fusedkd.kd_loss(
            made, listed.given("cpu"), labels, divergence=fusedkd.divergence(case[0], **case[1]), schedule=x
        )
        for x in ("streaming", "chunked")
    ]
    assert_close(losses[0], losses[1].detach().double(), VALUE)


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("narrow")
@each("name", ["streamed", "streamed_gradient"])
@each("tail", ["bucket", "truncate"])
def test_opcheck_of_streaming(name: str, tail: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """What the value leaves to the gradient is wider beside a TopK."""
    _, listed, labels = ragged(tail)
    sides, _ = students()
    head = fusedkd.Head(sides["head"].hidden[: len(labels)].detach().requires_grad_(), *sides["head"][1:3])
    loss = fusedkd.kd_loss(head, listed.given("cpu"), labels, schedule="streaming", reduction="none", divergence="fkl")
    loss.sum().backward()
    opcheck(name, calls[name], differentiable=name == "streamed")


@each("kind", ["head", "logits"])
def test_fewer_columns_than_the_student_has(kind: str, backend: str) -> None:
    """A padded vocabulary: what the teachers lack is not read, and has no gradient."""
    sides, leaves = students()
    cache = fusedkd.topk(3 * torch.randn(N, V - 9), K)
    ids = torch.arange(N) % 2
    found = []
    for given in ([cache, cache], cache):
        chosen = {"teacher_ids": ids} if isinstance(given, list) else {}
        loss = fusedkd.kd_loss(sides[kind], given, divergence="rkl", backend=backend, **chosen)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)])
    for one, other in zip(*found, strict=True):
        assert other.any()
        assert relative(one, other.double()) < VALUE


def test_a_teacher_of_float64(backend: str) -> None:
    """Everything is calculated in the widest dtype of a list, as with one teacher."""
    if backend == "triton":
        pytest.skip("no float64 kernels")
    sides, leaves = students()
    cache, ids = fusedkd.topk(3 * torch.randn(N, V), K), torch.arange(N) % 2
    loss = fusedkd.kd_loss(sides["logits"], [cache, 3 * torch.randn(N, V, dtype=torch.float64)], teacher_ids=ids)
    assert loss.dtype == torch.float64
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, leaves))


def test_dtypes_of_products_by_teacher() -> None:
    """logits_dtype is about each Head of a list, and errors name the one."""
    half = {"dtype": torch.bfloat16}
    student, ids = fusedkd.Head(torch.randn(N, D, **half), torch.randn(V, D, **half)), torch.arange(N) % 2
    cache = fusedkd.topk(torch.randn(N, V), K)
    heads = [
        fusedkd.Head(torch.randn(N, 5, dtype=x), torch.randn(V, 5, dtype=x)) for x in (torch.bfloat16, torch.float32)
    ]
    options = {"teacher_ids": ids, "logits_dtype": torch.bfloat16}
    assert fusedkd.kd_loss(student, [cache, heads[0]], **options).isfinite()
    with pytest.raises(ValueError, match=r"bfloat16 teacher\[1\] Head, got torch.float32"):
        fusedkd.kd_loss(student, [heads[0], heads[1]], **options)
