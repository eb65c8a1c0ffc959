"""schedule="streaming": the same numbers as the oracle's, and a workspace that does not know the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ARGMAX,
    DISTINCT,
    DTYPES,
    IGNORE,
    VALUE,
    Case,
    check_heads,
    device,
    each,
    named,
    opcheck,
    random_labels,
    side,
)
from compare import assert_close

import fusedkd
from fusedkd.backends import torch_chunks
from fusedkd.call import LossCall
from fusedkd.schedules import planner

LEAD, VOCABULARY = (2, 3), 515
WHOLE_ROWS = ("amid", "akl")
CASES = [case for case in DISTINCT if case[0] not in WHOLE_ROWS and "target_token" not in case[1]]
KINDS = ("head-head", "head-logits", "logits-head")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 columns, so that a few hundred columns are several chunks and a rest."""
    for name in ("_STREAM_LEAST", "_CPU_STREAM", "_GPU_STREAM"):
        monkeypatch.setattr(planner, name, 128)


def sides(kind: str, lead: tuple[int, ...] = LEAD, student: int = VOCABULARY, teacher: int = VOCABULARY) -> list[Any]:
    """A student of width 32 and a teacher of width 48, as heads or as logits."""
    return [
        side(lead, v, width, bias=True) if each_kind == "head" else 5 * torch.randn(*lead, v).double()
        for each_kind, width, v in zip(kind.split("-"), (32, 48), (student, teacher), strict=True)
    ]


# The scaling behind "mean" is the same code for both backends.
WAYS = [("torch", "none"), ("torch", "mean"), ("triton", "none")]


@each("case", CASES)
@each("kind", KINDS)
@pytest.mark.parametrize(("backend", "reduction"), WAYS)
def test_every_way(case: Case, kind: str, reduction: str, backend: str) -> None:
    """Loss, statistics and every gradient under any upstream gradient."""
    check_heads(*sides(kind), random_labels(LEAD, VOCABULARY), case, backend, reduction=reduction, schedule="streaming")


@pytest.mark.smoke
@each("case", [("rkl", {}), ("jsd", {})])
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b, dtypes in DTYPES.items() for d in dtypes if d != torch.float32], ids=named
)
def test_every_dtype(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Half precision costs what rounding dZ and the result costs."""
    check_heads(*sides("head-head"), random_labels(LEAD, VOCABULARY), case, backend, dtype=dtype, schedule="streaming")


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0, "temperature_squared": True},
    "cross-entropy": {"ce_weight": 0.5},
    "weights": {"token_weights": torch.rand(LEAD), "reduction": "sum"},
    "all rows": {"drop_ignored": False},
    "fewer columns": {"vocab_size": 300},
}


@each("options", OPTIONS)
@each("kind", KINDS)
def test_options(options: str, kind: str, backend: str) -> None:
    """What changes numbers."""
    given = OPTIONS[options]
    labels = random_labels(LEAD, given.get("vocab_size", VOCABULARY))
    check_heads(*sides(kind), labels, ("drkl", {}), backend, schedule="streaming", **given)


@each("sizes", [(515, 400), (400, 515), (129, 128)])
@each("ce_weight", [0.0, 0.5])
def test_vocabulary_mismatch(sizes: tuple[int, int], ce_weight: float, backend: str) -> None:
    """Chunks of the student alone take part in the cross-entropy only."""
    labels = random_labels(LEAD, min(sizes))
    check_heads(
        *sides("head-head", LEAD, *sizes), labels, ("rkl", {}), backend, schedule="streaming", ce_weight=ce_weight
    )


@each("operands", [{"scale": 0.5}, {"softcap": 8.0}, {"scale": 1.5, "softcap": 100.0}])
def test_scale_softcap(operands: dict[str, Any], backend: str) -> None:
    """A confident student too, whose likeliest token lies in some chunk."""
    student, teacher = (side(LEAD, VOCABULARY, width, **operands) for width in (32, 48))
    for factor in (1.0, 5.0):
        student = type(student)(student.hidden, factor * student.weight, None, student.scale, student.softcap)
        labels = random_labels(LEAD, VOCABULARY)
        check_heads(student, teacher, labels, ("rkl", {}), backend, schedule="streaming", ce_weight=0.3)


@each("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias")])
def test_frozen_parts(frozen: tuple[str, ...], backend: str) -> None:
    """What does not require grad gets none."""
    labels = random_labels(LEAD, VOCABULARY)
    check_heads(*sides("head-head"), labels, ("drkl", {}), backend, frozen=frozen, schedule="streaming")


@each("lead", [(), (1,), (0,), (2, 1, 3)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    """Any number of them, none and empty ones included; all rows ignored."""
    labels = random_labels(lead, VOCABULARY, ignored=False)
    check_heads(*sides("head-head", lead), labels, ("drkl", {}), backend, schedule="streaming")
    check_heads(*sides("head-head", lead), torch.full(lead, IGNORE), ("drkl", {}), backend, schedule="streaming")


def test_per_token_parameters(backend: str) -> None:
    """A tensor for a parameter, cut where rows are dropped."""
    per_token = torch.rand(LEAD)
    for case in (("drkl", {"gamma": per_token}), ("taid", {"t": per_token}), ("skl", {"lam": per_token[0]})):
        check_heads(*sides("head-head"), random_labels(LEAD, VOCABULARY), case, backend, schedule="streaming")


@each("case", [("fkl", {}), ("rkl", {}), ("ab", {}), ("jsd", {})])
def test_near(case: Case, backend: str) -> None:
    """A student that has nearly become its teacher: only the GEMM's own rounding may show."""
    student = side((6,), 515, 32, bias=True)
    noise = 2.8e-3 * torch.randn_like(student.hidden)
    teacher = type(student)(student.hidden + noise, student.weight, student.bias)
    check_heads(student, teacher, random_labels((6,), 515), case, backend, reduction="sum", schedule="streaming")


def test_without_labels(backend: str) -> None:
    """Nothing is held out."""
    check_heads(*sides("head-head"), None, ("rkl", {}), backend, schedule="streaming", reduction="mean")


def test_minus_infinity(backend: str) -> None:
    """A bias of −inf removes columns, whole chunks of them."""
    student, teacher = sides("head-head")
    teacher.bias[:260] = -torch.inf
    labels = 300 + random_labels(LEAD, 200, ignored=False)
    check_heads(student, teacher, labels, ("rkl", {}), backend, schedule="streaming")


def bytes_held(vocabulary: int, schedule: str, rows: int = 64, width: int = 16) -> int:
    """The largest sum of live allocations of one step, beyond inputs and gradients, as torch's profiler sees it."""
    hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    teacher = fusedkd.Head(torch.randn(rows, 24), torch.randn(vocabulary, 24))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = fusedkd.kd_loss(fusedkd.Head(hidden, weight), teacher, divergence="rkl", schedule=schedule)
        loss.backward()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most > 0
    return most - 4 * (hidden.numel() + weight.numel())


@pytest.mark.unpoisoned
def test_workspace_does_not_know_the_vocabulary() -> None:
    """Four times the vocabulary, the same bytes; a chunked call grows. Both are held to what is announced."""
    small, large = (bytes_held(v, "streaming") for v in (8_000, 32_000))
    assert abs(large - small) < 0.02 * small
    assert bytes_held(32_000, "chunked") > bytes_held(8_000, "chunked") + 24_000 * 16 * 4
    shape = planner.Shape(64, 32_000, 32_000, 16, 24, 32_000, 4, 4, 4, 4, on_cpu=True, gather=False)
    assert large <= planner.streaming_workspace(shape, planner.choose_width(shape, None))


def flops(event: Any) -> int:
    """Of a matrix product that the profiler saw, 0 of anything else."""
    if event.name == "mkldnn::_linear_pointwise":
        (n, k), (m, _) = event.input_shapes[:2]
    elif event.name == "aten::mm":
        (n, k), (_, m) = event.input_shapes[:2]
    elif event.name in ("aten::addmm", "aten::addmm_"):
        (n, k), (_, m) = event.input_shapes[1:3]
    else:
        return 0
    return 2 * n * k * m


@each("case", [("rkl", 6), ("jsd", 8)])
def test_products(case: tuple[str, int]) -> None:
    """Six matrix products, eight without a one-sweep form; none for a frozen weight, none for dropped rows."""
    name, products = case
    rows, vocabulary, width = 6, 400, 8
    labels = torch.tensor([1, 2, IGNORE, 3, IGNORE, 5])
    for frozen, fewer in ((False, 0), (True, 1)):
        hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(vocabulary, width)
        weight.requires_grad_(not frozen)
        teacher = fusedkd.Head(torch.randn(rows, width), torch.randn(vocabulary, width))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
            head = fusedkd.Head(hidden, weight)
            fusedkd.kd_loss(head, teacher, labels, divergence=name, schedule="streaming").backward()
        assert sum(map(flops, seen.events())) == (products - fewer) * 2 * 4 * vocabulary * width


@pytest.mark.unpoisoned
def test_operators(calls: dict[str, tuple[Any, ...]]) -> None:
    """opcheck, torch.compile, retain_graph, and no second derivative."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    teacher = fusedkd.Head(torch.randn(5, 12), torch.randn(300, 12))
    labels = torch.tensor([0, 299, 5, IGNORE, 7])

    def loss(h: torch.Tensor) -> torch.Tensor:
        return fusedkd.kd_loss(fusedkd.Head(h, weight), teacher, labels, divergence="drkl", schedule="streaming")

    value = loss(hidden)
    opcheck("streamed", LossCall(*calls["streamed"])._replace(columns=128, return_stats=True), differentiable=True)
    grads = [torch.autograd.grad(value, (hidden, weight), retain_graph=True) for _ in range(2)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden), value)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss(hidden), hidden, create_graph=True)


@each("case", [("rkl", {}), ("jsd", {}), ("taid", {"t": torch.linspace(0.1, 0.9, 6).view(LEAD)})])
def test_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes rows of its own through the whole vocabulary, ignored and confident rows among them."""
    monkeypatch.setattr(torch_chunks, "_SHARE", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch_chunks.shares(6, torch.device("cpu")) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    student, teacher = sides("head-head")
    labels = random_labels(LEAD, VOCABULARY)
    for factor in (1.0, 5.0):
        ours = type(student)(student.hidden, factor * student.weight, student.bias)
        for options in ({}, {"ce_weight": 0.5, "drop_ignored": False}):
            check_heads(ours, teacher, labels, case, "torch", schedule="streaming", **options)


@each("length", [0, 1, 255, 256, 700, 5000])
def test_shares(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows, in order, as many parts as threads may take; one where threads would take too few."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = torch_chunks.shares(length, torch.device("cpu"))
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert len(parts) == (0 if not length else 1 if length < 256 else 2 if length < 384 else 3)
    assert len(torch_chunks.shares(length, torch.device("meta"))) <= 1


def test_backends_and_schedules_agree() -> None:
    """One problem, both schedules, both backends."""
    student, teacher = sides("head-head")
    labels = random_labels(LEAD, VOCABULARY)
    seen = []
    for backend in ("torch", "triton"):
        for schedule in ("chunked", "streaming"):
            place = device(backend)
            operands = student.operands(torch.float32, place)
            theirs = teacher.operands(torch.float32, place)
            loss = fusedkd.kd_loss(
                student.head(operands), teacher.head({k: x.detach() for k, x in theirs.items()}), labels.to(place),
                divergence="ab", schedule=schedule, backend=backend,
            )  # fmt: skip
            loss.backward()
            seen.append([loss.detach().cpu(), *(x.grad.cpu() for x in operands.values())])
    for other in seen[1:]:
        for one, same in zip(seen[0], other, strict=True):
            assert_close(same, one.double(), VALUE)


MISTAKES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "amid": ({"divergence": "amid"}, NotImplementedError, ("streaming", "amid", "chunked")),
    "akl": ({"divergence": "akl"}, NotImplementedError, ("streaming", "akl", "chunked")),
    "argmax": (
        {"divergence": fusedkd.divergence("drkl", **ARGMAX)},
        NotImplementedError,
        ("streaming", "teacher_argmax", "chunked"),
    ),
    "floor": ({"support": "floor"}, NotImplementedError, ("streaming", "floor", "chunked")),
    "budget": ({"memory_budget": 1000}, ValueError, ("memory_budget", "1000", "streaming", "at least")),
}


@each("mistake", MISTAKES)
def test_refused(mistake: str) -> None:
    """Named before any work, with what would do."""
    changed, error, words = MISTAKES[mistake]
    student, teacher = (fusedkd.Head(torch.randn(3, 8), torch.randn(50, 8)) for _ in range(2))
    with pytest.raises(error) as caught:
        fusedkd.kd_loss(student, teacher, torch.tensor([1, 2, 3]), schedule="streaming", **changed)
    for word in words:
        assert word in str(caught.value)


def test_budget_is_kept() -> None:
    """The width of a chunk shrinks with the budget."""
    shape = planner.Shape(64, 32_000, 32_000, 16, 24, 32_000, 4, 4, 4, 4, on_cpu=False, gather=False)
    widths = []
    for budget in (None, 1 << 20, 1 << 18):
        width = planner.choose_width(shape, budget)
        assert budget is None or planner.streaming_workspace(shape, width) <= budget
        widths.append(width)
    assert widths == sorted(widths, reverse=True)


def test_drop_beside_logits() -> None:
    """Asked for where it would copy a logit matrix: refused, not ignored."""
    student = fusedkd.Head(torch.randn(3, 8), torch.randn(50, 8))
    options = {"schedule": "streaming", "drop_ignored": True}
    with pytest.raises(ValueError, match=r"drop_ignored=True with schedule=.*Head on both sides"):
        fusedkd.kd_loss(student, torch.randn(3, 50), torch.tensor([1, IGNORE, 3]), **options)


def test_rows_that_share_their_likeliest_token() -> None:
    """Hundreds of confident rows add to one row of a bfloat16 weight gradient: their sum is rounded once."""
    rows, vocabulary = 700, 40
    hidden = torch.randn(rows, 16).abs().bfloat16().double()
    weight = 0.1 * torch.randn(vocabulary, 16).bfloat16().double()
    weight[3] = 1.0
    teacher = torch.randn(rows, vocabulary, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    logq, logp = (hidden @ leaf.T).log_softmax(-1), teacher.float().double().log_softmax(-1)
    assert (logq.exp()[:, 3] > 0.5).all()
    (logp.exp() * (logp - logq)).sum().backward()
    ours = weight.bfloat16().requires_grad_()
    head = fusedkd.Head(hidden.bfloat16(), ours)
    fusedkd.kd_loss(head, teacher.float(), reduction="sum", schedule="streaming").backward()
    assert leaf.grad is not None
    assert_close(ours.grad, leaf.grad, 5e-3, dtype=torch.bfloat16)
