"""What does not count reaches nothing: padding may hold NaN, infinity or nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEFAULTS, FEW, IGNORE, VALUE, Case, device, each
from compare import assert_close
from torch import Tensor

import fusedkd

N, V, D, K = 6, 70, 8, 12
PADDING = (1, 4)
KINDS = ("logits", "heads", "head-logits", "logits-head")
HOLES = (torch.nan, torch.inf, -torch.inf)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "cross-entropy": {"ce_weight": 0.5},
    "not dropped": {"drop_ignored": False},
    "not dropped, none": {"drop_ignored": False, "reduction": "none"},
    "streaming": {"schedule": "streaming"},
    "streaming, not dropped": {"schedule": "streaming", "drop_ignored": False},
    "streaming, none": {"schedule": "streaming", "drop_ignored": False, "reduction": "none"},
}


def labels_on(place: str) -> Tensor:
    """Two rows are padding."""
    labels = torch.arange(N) * 7 % V
    labels[list(PADDING)] = IGNORE
    return labels.to(place)


def operands(kind: str, place: str) -> list[Tensor]:
    """Student: logits or hidden, weight and bias; teacher likewise."""
    sides = kind.split("-") if "-" in kind else ["head" if kind == "heads" else "logits"] * 2
    made = []
    for name, width in zip(sides, (D, K), strict=True):
        shapes = [(N, V)] if name == "logits" else [(N, width), (V, width), (V,)]
        made += [torch.randn(shape, device=place) for shape in shapes]
    return made


def as_sides(kind: str, tensors: list[Tensor]) -> tuple[Any, Any]:
    """The two sides of a call."""
    first = 1 if kind.startswith("logits") else 3
    pair = [part[0] if len(part) == 1 else fusedkd.Head(*part) for part in (tensors[:first], tensors[first:])]
    return pair[0], pair[1]


def results(kind: str, tensors: list[Tensor], labels: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    """Loss, statistics and the student's gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss, stats = fusedkd.kd_loss(*as_sides(kind, leaves), labels, return_stats=True, **options)
    learns = leaves[: 1 if kind.startswith("logits") else 3]
    return [loss.detach(), *stats, *torch.autograd.grad(loss, learns, upstream if loss.dim() else None)]


def punched(tensors: list[Tensor], hole: float) -> list[Tensor]:
    """Copies whose rows of padding, of hidden states and logits, hold something else."""
    copies = [x.clone() for x in tensors]
    for x in copies:
        if len(x) == N:
            x[list(PADDING)] = hole
    return copies


@each("options", OPTIONS)
@each("kind", KINDS)
@each("hole", HOLES)
def test_padding_of_either_side(kind: str, options: str, hole: float, backend: str) -> None:
    """The same bits whatever the rows of padding hold, the upstream gradient's included; zeros in their own."""
    chosen = OPTIONS[options]
    if kind == "logits" and ("streaming" in options or "dropped" in options):
        pytest.skip("an option of heads")
    place = device(backend)
    tensors, labels = operands(kind, place), labels_on(place)
    upstream = torch.randn(N, device=place)
    wanted = results(kind, tensors, labels, upstream, backend=backend, divergence="drkl", **chosen)
    upstream = upstream.clone()
    upstream[list(PADDING)] = hole
    found = results(kind, punched(tensors, hole), labels, upstream, backend=backend, divergence="drkl", **chosen)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
        if ours.dim() and len(ours) == N:
            assert not ours[list(PADDING)].any()


@each("case", DEFAULTS)
@each("schedule", ["chunked", "streaming"])
def test_padding_for_every_divergence(case: Case, schedule: str) -> None:
    """The hidden states of rows that are not dropped, through both schedules."""
    name, params = case
    if schedule == "streaming" and name in ("amid", "akl"):
        pytest.skip("needs whole rows")
    tensors, labels = operands("heads", "cpu"), labels_on("cpu")
    options = {"divergence": fusedkd.divergence(name, **params), "schedule": schedule, "drop_ignored": False}
    wanted = results("heads", tensors, labels, torch.ones(N), **options)
    found = results("heads", punched(tensors, torch.nan), labels, torch.ones(N), **options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())  # amid has no split
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert wanted[-2].any()


@each("kind", ["logits", "heads"])
@each("schedule", ["chunked", "streaming"])
@each("reduction", ["mean", "none"])
def test_padded_weights_and_parameters(kind: str, schedule: str, reduction: str, backend: str) -> None:
    """Token weights and per-token parameters are not looked at in padding."""
    if kind == "logits" and schedule == "streaming":
        pytest.skip("a schedule of heads")
    place = device(backend)
    tensors, labels = operands(kind, place), labels_on(place)
    weights, lam = torch.rand(2, N, device=place)
    more = {} if kind == "logits" else {"schedule": schedule, "drop_ignored": False}
    outs = []
    for hole in (None, torch.nan, torch.inf):
        if hole is not None:
            weights[list(PADDING)] = lam[list(PADDING)] = hole
        divergence = fusedkd.divergence("skl", lam=lam.clone(), target=0.5, nontarget=2.0)
        given = {"divergence": divergence, "token_weights": weights.clone(), "reduction": reduction, "backend": backend}
        outs.append(results(kind, tensors, labels, torch.ones(N, device=place), **given, **more))
    for found in outs[1:]:
        assert all(map(torch.equal, found, outs[0]))


@each("kind", ["logits", "heads"])
@each("schedule", ["chunked", "streaming"])
@each("labelled", [True, False])
def test_weight_zero(kind: str, schedule: str, labelled: bool, backend: str) -> None:
    """A token of weight 0 has statistics, counts in the denominator, and adds nothing, NaN or not."""
    if kind == "logits" and schedule == "streaming":
        pytest.skip("a schedule of heads")
    place = device(backend)
    tensors = operands(kind, place)
    labels = torch.arange(N, device=place) * 7 % V if labelled else None
    weights = torch.rand(N, device=place)
    weights[list(PADDING)] = 0
    options: dict[str, Any] = {"token_weights": weights, "backend": backend, "divergence": "fkl"}
    if kind == "heads":
        options["schedule"] = schedule
    first = 1 if kind == "logits" else 3
    outs = []
    for given in (tensors, punched(tensors, torch.nan)):
        leaves = [x.clone().requires_grad_() for x in given]
        loss = fusedkd.kd_loss(*as_sides(kind, leaves), labels, **options)
        outs.append([loss.detach(), *torch.autograd.grad(loss, leaves[:first])])
    for plain, beside_nan in zip(*outs, strict=True):
        # A CPU chooses between two ways to form a number by what it sees in a block of rows.
        assert_close(beside_nan, plain.double().cpu(), VALUE)
    assert outs[0][0] > 0
    assert not outs[0][1][list(PADDING)].any()


@each("kind", ["logits", "heads"])
@each("hole", HOLES)
def test_token_logprobs(kind: str, hole: float, backend: str) -> None:
    """The policy's side."""
    place = device(backend)
    tensors = operands(kind, place)[: 1 if kind == "logits" else 3]
    ids = labels_on(place)
    upstream = torch.randn(2, N, device=place)
    outs = []
    for fill in (None, hole):
        given = tensors if fill is None else punched(tensors, fill)
        if fill is not None:
            upstream[:, list(PADDING)] = fill
        leaves = [x.clone().requires_grad_() for x in given]
        side = leaves[0] if kind == "logits" else fusedkd.Head(*leaves)
        values = fusedkd.token_logprobs(side, ids, 0.8, True, backend=backend)
        outs.append([*(x.detach() for x in values), *torch.autograd.grad(values, leaves, [*upstream.clone()])])
    for ours, theirs in zip(*outs, strict=True):
        assert torch.equal(ours, theirs)
    assert outs[0][2].any()


@each("reduction", ["mean", "sum", "none"])
def test_cald(reduction: str) -> None:
    """Both halves, each with padding of its own."""
    labels = labels_on("cpu").view(2, 3)
    outs = []
    for hole in (0.5, torch.nan):
        torch.manual_seed(0)
        tensors = [operands("heads", "cpu") for _ in range(2)]
        given = [punched(x, hole) for x in tensors]
        leaves = [x.requires_grad_() for part in given for x in part[:3]]
        sides = [side._replace(hidden=side.hidden.view(2, 3, -1)) for part in given for side in as_sides("heads", part)]
        loss = fusedkd.cald_loss(
            *sides[:2], labels, *sides[2:], labels, reduction=reduction, drop_ignored=False, anchor1=0.1
        )
        outs.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    assert all(map(torch.equal, *outs))
    assert outs[0][0].any()


# Nothing at all -------------------------------------------------------------------------------------------------------


@each("kind", KINDS)
@each("num_items", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
@each("rows", ["ignored", "empty"])
def test_nothing_counted_anywhere(kind: str, num_items: Any, rows: str, backend: str) -> None:
    """A global count of 0, as trainers pass it on such a step: 0 with a zero gradient."""
    place = device(backend)
    tensors = operands(kind, place)
    labels = torch.full((N,), IGNORE, device=place)
    if rows == "empty":
        tensors, labels = [x[:0] if len(x) == N else x for x in tensors], labels[:0]
    schedules = ["auto"] if kind == "logits" else ["chunked", "streaming"]
    for schedule in schedules:
        leaves = [x.clone().requires_grad_() for x in tensors]
        given = {"num_items": num_items, "schedule": schedule, "backend": backend}
        loss = fusedkd.kd_loss(*as_sides(kind, leaves), labels, divergence="rkl", **given)
        loss.backward()
        assert loss.item() == 0
        for x in leaves[: 1 if kind.startswith("logits") else 3]:
            assert torch.equal(x.grad, torch.zeros_like(x))


def test_num_items_of_zero_counts_as_one(backend: str) -> None:
    """Where tokens do count, 0 is no reason for infinity; a negative number is refused."""
    place = device(backend)
    student, teacher = operands("logits", place)
    total = fusedkd.kd_loss(student, teacher, reduction="sum", backend=backend)
    assert torch.equal(fusedkd.kd_loss(student, teacher, num_items=0, backend=backend), total)
    loss, grad = fusedkd.kd_value_and_grad(student, teacher, num_items=torch.tensor(0), backend=backend)
    assert torch.equal(loss, total)
    assert grad.isfinite().all()
    with pytest.raises(ValueError, match="num_items must be >= 0, got -1"):
        fusedkd.kd_loss(student, teacher, num_items=-1, backend=backend)


@each("reduction", ["mean", "sum", "none"])
@each("case", FEW)
@each("kind", KINDS)
def test_empty(kind: str, case: Case, reduction: str, backend: str) -> None:
    """No tokens: 0, or nothing, with a graph, through both schedules."""
    place = device(backend)
    name, params = case
    for schedule in ["auto"] if kind == "logits" else ["chunked", "streaming"]:
        leaves = [(x[:0] if len(x) == N else x).clone().requires_grad_() for x in operands(kind, place)]
        labels = torch.zeros(0, dtype=torch.int64, device=place)
        given = {"divergence": fusedkd.divergence(name, **params), "schedule": schedule, "backend": backend}
        loss = fusedkd.kd_loss(*as_sides(kind, leaves), labels, reduction=reduction, **given)
        assert torch.equal(loss.detach(), torch.zeros_like(loss))
        assert loss.shape == ((0,) if reduction == "none" else ())
        loss.sum().backward()
        for x in leaves[: 1 if kind.startswith("logits") else 3]:
            assert torch.equal(x.grad, torch.zeros_like(x))


@each("kind", ["logits", "heads"])
def test_empty_token_logprobs(kind: str, backend: str) -> None:
    """No tokens have no log-probabilities, and a zero gradient."""
    place = device(backend)
    leaves = [(x[:0] if len(x) == N else x).clone().requires_grad_() for x in operands(kind, place)]
    leaves = leaves[: 1 if kind == "logits" else 3]
    side = leaves[0] if kind == "logits" else fusedkd.Head(*leaves)
    ids = torch.zeros(0, dtype=torch.int64, device=place)
    logprobs, entropy = fusedkd.token_logprobs(side, ids, return_entropy=True, backend=backend)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    for x in leaves:
        assert torch.equal(x.grad, torch.zeros_like(x))


@each("shape", [(0, 3), (2, 0), (0, 0)])
@each("anchor", [None, 0.1])
def test_empty_cald(shape: tuple[int, int], anchor: float | None) -> None:
    """No sequence, or none with tokens: 0 with a graph."""
    student = torch.randn(*shape, V, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    pair = (student, torch.randn(*shape, V), labels)
    loss = fusedkd.cald_loss(*pair, *pair, anchor1=anchor, anchor2=anchor)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
