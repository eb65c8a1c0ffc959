"""Heads on one or both sides: every divergence, dtype and layout against the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracle
import pytest
import torch
from cases import (
    ALL,
    DEFAULTS,
    DISTINCT,
    DTYPES,
    FEW,
    IGNORE,
    VALUE,
    Case,
    Side,
    check_heads,
    device,
    each,
    named,
    random_labels,
    side,
)
from compare import assert_close
from torch import Tensor

import fusedkd

KINDS = ("head-head", "head-logits", "logits-head")
LEAD, VOCABULARY = (2, 3), 515  # not a multiple of 16: no row of logits but the first is aligned


def sides(kind: str, lead: tuple[int, ...] = LEAD, vocabulary: int = VOCABULARY) -> list[Side | Tensor]:
    """A student of width 32 and a teacher of width 48, as heads or as logits."""
    return [
        side(lead, vocabulary, width) if each_kind == "head" else 5 * torch.randn(*lead, vocabulary).double()
        for each_kind, width in zip(kind.split("-"), (32, 48), strict=True)
    ]


# test_logits runs ALL through the Triton kernels; here their logits come from a product.
PATHS = [*((case, "torch") for case in ALL), *((case, "triton") for case in DEFAULTS)]


@pytest.mark.parametrize(("case", "backend"), PATHS, ids=named)
@each("kind", KINDS)
def test_every_divergence(case: Case, kind: str, backend: str) -> None:
    """Per-token upstream gradients, so that nothing hides in a mean."""
    check_heads(*sides(kind), random_labels(LEAD, VOCABULARY), case, backend, reduction="none")


# The scaling behind the reductions is the same code for both backends.
@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "torch") for case in DISTINCT), *((case, "triton") for case in FEW)], ids=named
)
@each("kind", KINDS)
@each("reduction", ["mean", "sum"])
def test_reductions(case: Case, kind: str, reduction: str, backend: str) -> None:
    """The gradient formed in the forward, scaled by an upstream gradient that only the backward knows."""
    check_heads(*sides(kind), random_labels(LEAD, VOCABULARY), case, backend, reduction=reduction)


HALVES = [(b, d, r) for b, ds in DTYPES.items() for d in ds for r in ("mean", "none") if d != torch.float32]


@each("case", DEFAULTS)
@pytest.mark.parametrize(
    ("backend", "dtype", "reduction"), [x for x in HALVES if (x[0], x[2]) != ("triton", "mean")], ids=named
)
def test_every_dtype(case: Case, dtype: torch.dtype, reduction: str, backend: str) -> None:
    """Half precision costs what rounding dZ and the result costs, not more."""
    check_heads(*sides("head-head"), random_labels(LEAD, VOCABULARY), case, backend, dtype=dtype, reduction=reduction)


OPERANDS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 8.0},
    "all": {"bias": True, "scale": 1.5, "softcap": 10.0},
}


@each("operands", OPERANDS)
@each("reduction", ["mean", "none"])
@each("dtype", [torch.float32, torch.bfloat16])
def test_bias_scale_softcap(operands: str, reduction: str, dtype: torch.dtype, backend: str) -> None:
    """Everything a Head may carry, on both sides, with its gradients."""
    student, teacher = (side(LEAD, VOCABULARY, width, **OPERANDS[operands]) for width in (32, 48))
    labels = random_labels(LEAD, VOCABULARY)
    check_heads(student, teacher, labels, ("rkl", {}), backend, dtype=dtype, reduction=reduction)


@each("softcap", [None, 100.0])
@each("ce_weight", [0.0, 0.5])
@each("reduction", ["mean", "none"])
def test_confident_student(softcap: float | None, ce_weight: float, reduction: str, backend: str) -> None:
    """One token with most of the mass, the label or another: its entry is the one that cancels."""
    student, teacher = side(LEAD, VOCABULARY, 32, softcap=softcap), side(LEAD, VOCABULARY, 48)
    labels = random_labels(LEAD, VOCABULARY)
    _, likely = oracle.head_logits(student.hidden, 4 * student.weight, softcap=softcap)
    labels[0] = likely[0].argmax(-1)
    student = dataclasses.replace(student, weight=4 * student.weight)
    check_heads(student, teacher, labels, ("rkl", {}), backend, ce_weight=ce_weight, reduction=reduction)


@each("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "bias"), ("hidden", "weight")])
@each("reduction", ["mean", "none"])
def test_frozen_parts(frozen: tuple[str, ...], reduction: str, backend: str) -> None:
    """What does not require grad gets none; the rest is unchanged."""
    student, teacher = side(LEAD, VOCABULARY, 32, bias=True), side(LEAD, VOCABULARY, 48)
    labels = random_labels(LEAD, VOCABULARY)
    check_heads(student, teacher, labels, ("drkl", {}), backend, frozen=frozen, reduction=reduction)


@each("sizes", [(300, 257, None), (257, 300, None), (300, 300, 257)])
@each("ce_weight", [0.0, 0.5])
@each("kind", KINDS)
def test_vocabulary_mismatch(sizes: tuple[int, int, int | None], ce_weight: float, kind: str, backend: str) -> None:
    """Rows of the student's weight beyond the common range get a gradient from the cross-entropy only."""
    v_student, v_teacher, vocab_size = sizes
    student, teacher = sides(kind, vocabulary=v_student)[0], sides(kind, vocabulary=v_teacher)[1]
    check_heads(
        student,
        teacher,
        random_labels(LEAD, vocab_size or min(v_student, v_teacher)),
        ("rkl", {}),
        backend,
        vocab_size=vocab_size,
        ce_weight=ce_weight,
        reduction="mean",
    )


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "padded rows": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every second column": lambda x: torch.stack((x, -x), -1)[..., 0],
}


@each("layout", LAYOUTS)
@each("kind", KINDS)
def test_layouts(layout: str, kind: str, backend: str) -> None:
    """Operands that are views of larger memory."""
    labels = random_labels(LEAD, VOCABULARY)
    check_heads(*sides(kind), labels, ("rkl", {}), backend, prepare=LAYOUTS[layout], reduction="mean")


@each("lead", [(), (1,), (0,), (3,), (2, 1, 3)])
@each("reduction", ["mean", "none"])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str, backend: str) -> None:
    """Any number of leading dimensions, none and empty ones included."""
    labels = random_labels(lead, VOCABULARY, ignored=False)
    check_heads(*sides("head-head", lead), labels, ("drkl", {}), backend, reduction=reduction)


@each("kind", KINDS)
@each("drop_ignored", ["auto", True, False])
@each("reduction", ["mean", "none"])
def test_all_rows_ignored(kind: str, drop_ignored: bool | str, reduction: str, backend: str) -> None:
    """Nothing counted: a loss of 0 with a graph, and gradients of exactly 0."""
    labels = torch.full(LEAD, IGNORE)
    check_heads(*sides(kind), labels, ("rkl", {}), backend, drop_ignored=drop_ignored, reduction=reduction)


@each("reduction", ["mean", "none"])
def test_dropped_rows_are_not_read(reduction: str, backend: str) -> None:
    """NaN in a row that is left out of the products reaches neither the loss nor the weight's gradient."""
    place = device(backend)
    exact = sides("head-head")
    labels = random_labels(LEAD, VOCABULARY)
    results = []
    for hole in (0.0, torch.nan):
        operands = [x.operands(torch.float32, place) for x in exact]
        for named_operands in operands:
            named_operands["hidden"].data[labels == IGNORE] = hole
        student, teacher = (fusedkd.Head(**x) for x in operands)
        options = {"drop_ignored": True, "reduction": reduction, "divergence": "rkl", "backend": backend}
        loss = fusedkd.kd_loss(student, teacher, labels.to(place), **options)
        loss.sum().backward()
        results.append([loss.detach(), *(x.grad for x in operands[0].values())])
    for clean, ours in zip(*results, strict=True):
        assert clean.any()
        assert torch.equal(ours, clean)


@pytest.mark.smoke
@each("kind", KINDS)
@each("reduction", ["mean", "none"])
def test_many_chunks(kind: str, reduction: str) -> None:
    """More tokens than one chunk holds, and a remainder. (Chunks of the kernels: test_options, memory_budget.)"""
    lead = (300,)
    check_heads(*sides(kind, lead, 129), random_labels(lead, 129), ("drkl", {}), "torch", reduction=reduction)


@pytest.mark.smoke
def test_without_labels(backend: str) -> None:
    """A divergence that holds nothing out needs no labels."""
    for name in ("fkl", "rkl", "ab"):
        check_heads(*sides("head-head"), None, (name, {}), backend, reduction="mean")


def test_loss_inside_a_graph(backend: str) -> None:
    """The loss is squared after the call and the hidden states come from a layer before it; both see the chain rule."""
    place = device(backend)
    hidden, weight, layer = torch.randn(6, 16), torch.randn(65, 16), torch.randn(16, 16) / 4
    teacher, labels = torch.randn(6, 65) * 3, torch.randint(65, (6,))
    grads = []
    for dtype, run in ((torch.float64, False), (torch.float32, True)):
        w, m = (x.to(place if run else "cpu", dtype, copy=True).requires_grad_() for x in (weight, layer))
        states = torch.tanh(hidden.to(w) @ m)
        if run:
            head = fusedkd.Head(states, w)
            loss = fusedkd.kd_loss(head, teacher.to(w), labels.to(place), divergence="fkl", backend=backend)
        else:
            logq, logp = (states @ w.T).log_softmax(-1), teacher.double().log_softmax(-1)
            loss = (logp.exp() * (logp - logq)).sum(-1).mean()
        (loss**2).backward()
        grads.append((w.grad, m.grad))
    for ours, truth in zip(grads[1], grads[0], strict=True):
        assert_close(ours, truth, VALUE)


@each("schedule", ["chunked", "streaming"])
@each("reduction", ["mean", "none"])
def test_sides_of_different_dtype(schedule: str, reduction: str) -> None:
    """A float64 teacher beside a float32 student: the gradients are the student's affair."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    theirs = (torch.randn(5, 12, dtype=torch.float64), torch.randn(70, 12, dtype=torch.float64))
    labels = torch.arange(5)
    grads = []
    for teacher in (fusedkd.Head(*theirs), fusedkd.Head(*(x.float() for x in theirs))):
        loss = fusedkd.kd_loss(fusedkd.Head(hidden, weight), teacher, labels, reduction=reduction, schedule=schedule)
        grads.append(torch.autograd.grad(loss.sum(), (hidden, weight)))
    for one, other in zip(*grads, strict=True):
        assert_close(one, other.double(), VALUE)
