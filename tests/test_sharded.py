"""A vocabulary that several ranks share: every number against float64, on every rank, and what they tell each other."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from cases import ALL, DEFAULTS, DISTINCT, FEW, IGNORE, Rows, check_heads, check_logits, named, near, side, unrelated
from outcomes import check as check_topk
from outcomes import check_head as check_topk_head
from outcomes import likeliest
from sharded import Check, Sharded, checked

N, V, D = 6, 61, 8
WORLDS = (1, 2, 3, 4)
WHOLE = ("amid", "akl")  # need whole rows, or so much of them that streaming refuses
UNEVEN = [0.1, 0.75, 0.75]  # the third rank of four has no column


def labelled(rows: Rows, *labels: int) -> Rows:
    """With some labels in the first rows."""
    assert rows.labels is not None
    rows.labels.view(-1)[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
    return rows


def cut(teacher: torch.Tensor, *dead: slice) -> torch.Tensor:
    """A teacher without some columns."""
    for columns in dead:
        teacher[..., columns] = -torch.inf
    return teacher


def of_logits(case: Any, rows: Rows, backend: str = "torch", **options: Any) -> Check:
    """A check of logits."""
    about = "-".join(f"{key}={value}"[:24] for key, value in options.items())
    return f"logits {named(case)} {backend} {about}", check_logits, (rows, case, backend), options


def of_heads(case: Any, student: Any, teacher: Any, labels: Any, backend: str = "torch", **options: Any) -> Check:
    """A check of Heads."""
    about = "-".join(f"{key}={value}"[:24] for key, value in options.items())
    return f"heads {named(case)} {backend} {about}", check_heads, (student, teacher, labels, case, backend), options


def every_divergence(world: int) -> list[Check]:
    """All settings through logits; all names through Heads, by both schedules."""
    checks: list[Check] = []
    edge = -(-V // world)
    for i, case in enumerate(ALL if world == 3 else DISTINCT):
        rows = labelled((unrelated if i % 2 else (lambda *s: near(0.1, *s)))(N, V), 0, edge - 1, edge % V)
        checks.append(of_logits(case, rows))
    for case in DEFAULTS if world in (2, 4) else DISTINCT[:3]:
        student, teacher = side((N,), V, D, bias=True, softcap=20.0), side((N,), V, D + 1)
        labels = labelled(unrelated(N, V), 0, edge - 1, edge % V, V - 1).labels
        checks.append(of_heads(case, student, teacher, labels, ce_weight=0.3))
        if case[0] not in WHOLE:
            streaming = {"schedule": "streaming", "reduction": "none"}
            checks.append(of_heads(case, student, teacher, labels, ce_weight=0.3, **streaming))
    return checks


def options(world: int) -> list[Check]:
    """What a call can ask for, where one path leads to another one than in test_options.py."""
    student, teacher = side((2, 3), V, D, bias=True), side((2, 3), V, D, softcap=9.0)
    labels = labelled(unrelated(2, 3, V)).labels
    assert labels is not None
    weights, per_token = torch.rand(2, 3), torch.linspace(0.1, 0.8, N).view(2, 3)
    given: list[dict[str, Any]] = [
        {"temperature": 2.0, "temperature_squared": True, "ce_weight": 0.5},
        {"reduction": "sum", "token_weights": weights, "vocab_size": V - 9, "ce_weight": 0.5},
        {"reduction": "mean", "num_items": 7, "vocab_size": V - 9},
        {"weight_grad": torch.float32},
        {"frozen": ("weight", "bias"), "token_weights": weights},
        {"frozen": ("hidden",)},
        {"dtype": torch.bfloat16, "ce_weight": 0.5},
        {"dtype": torch.float64, "temperature": 0.7},
        {"drop_ignored": True},
    ]
    checks: list[Check] = []
    for i, option in enumerate(given):
        case = FEW[i % len(FEW)]
        checks.append(of_heads(case, student, teacher, labels, **option))
        if "drop_ignored" not in option and case[0] not in WHOLE:
            checks.append(of_heads(case, student, teacher, labels, **option, schedule="streaming"))
    for case in (("ab", {"alpha": per_token}), ("taid", {"t": per_token, "base": "rkl"})):
        checks.append(of_heads(case, student, teacher, labels))
    for case in FEW[:3]:
        checks.append(of_logits(case, unrelated(2, 3, V), support="floor"))
        checks.append(of_heads(case, student, teacher, labels, support="floor"))
        checks.append(of_heads(case, unrelated(2, 3, V).student, teacher, labels, reduction="none"))
        checks.append(of_heads(case, student, unrelated(2, 3, V).teacher, labels))
    for case in (("fkl", {}), ("jsd", {})):
        checks.append(of_heads(case, student, teacher, None, reduction="none"))
        checks.append(of_heads(case, student, teacher, None, schedule="streaming"))
    checks.append(of_logits(("drkl", {"target_token": "teacher_argmax"}), unrelated(N, V, ignored=False)))
    return checks


def hard_rows(world: int) -> list[Check]:
    """Columns and rows of which a rank knows nothing, and such that it knows alone."""
    checks: list[Check] = []
    most = -(-V // world)
    for case in DISTINCT:
        rows = unrelated(N, V)
        dead = cut(rows.teacher.clone(), slice(0, most - 1))  # a shard without a live column, but for a label's
        checks.append(of_logits(case, labelled(Rows.of(rows.student, dead, rows.labels), most - 1)))
        peaked = rows.student.clone()
        peaked[:, -1] += 40  # a token that holds most of the row, on the last rank that has any
        checks.append(
            of_logits(case, Rows.of(peaked, rows.teacher, rows.labels), ce_weight=0.5 * ("target_token" not in case[1]))
        )
    few = unrelated(N, 3)  # ranks without any column
    checks += [of_logits(case, Rows.of(few.student, few.teacher, few.labels)) for case in DISTINCT]
    student, teacher = side((N,), 3, D, bias=True), side((N,), 3, D)
    checks += [of_heads(case, student, teacher, few.labels, ce_weight=0.5) for case in FEW]
    checks.append(of_heads(FEW[0], student, teacher, few.labels, schedule="streaming", ce_weight=0.5))
    ignored = torch.full((N,), IGNORE)
    checks.append(of_heads(FEW[0], side((N,), V, D), side((N,), V, D), ignored))
    return checks


def listed(world: int) -> list[Check]:
    """Top-k teachers."""
    checks: list[Check] = []
    for tail in ("bucket", "renormalize", "truncate"):
        teacher = likeliest(3 * torch.randn(N, V, dtype=torch.float64), 7, tail=tail)
        student, head = 3 * torch.randn(N, V, dtype=torch.float64), side((N,), V, D, bias=True)
        labels = labelled(unrelated(N, V), int(teacher.ids[0, 2]), int(teacher.ids[1, 0])).labels
        for case in [("fkl", {}), ("jsd", {})] if tail == "truncate" else DISTINCT[:-1]:
            checks.append((f"{tail} {named(case)}", check_topk, (student, teacher, labels, case, "torch"), {}))
        for schedule in ("chunked", "streaming"):
            option = {"schedule": schedule, "ce_weight": 0.5}
            name = f"{tail} {schedule}"
            checks.append((name, check_topk_head, (head, teacher, labels, ("fkl", {}), "torch"), option))
    return checks


def in_triton(world: int) -> list[Check]:
    """The kernels."""
    checks: list[Check] = []
    for case in DISTINCT if world == 2 else FEW:
        checks.append(of_logits(case, labelled(unrelated(3, V), 0, V - 1), "triton"))
        student, teacher = side((3,), V, D, bias=True), side((3,), V, D)
        labels = labelled(unrelated(3, V), V // 2).labels
        checks.append(
            of_heads(case, student, teacher, labels, "triton", ce_weight=0.5 * ("target_token" not in case[1]))
        )
        if case[0] not in WHOLE and "target_token" not in case[1]:
            checks.append(of_heads(case, student, teacher, labels, "triton", schedule="streaming"))
    teacher = likeliest(3 * torch.randn(N, V, dtype=torch.float64), 5)
    student = 3 * torch.randn(N, V, dtype=torch.float64)
    labels = labelled(unrelated(N, V), int(teacher.ids[0, 2])).labels
    checks.append(("bucket", check_topk, (student, teacher, labels, ("rkl", {}), "triton"), {"ce_weight": 0.5}))
    few = unrelated(3, 1)
    checks.append(of_logits(("fkl", {}), few, "triton"))
    return checks


GROUPS = {
    "every divergence": (every_divergence, Sharded()),
    "options": (options, Sharded()),
    "hard rows": (hard_rows, Sharded()),
    "uneven": (options, Sharded(cuts=UNEVEN)),
    "whole teacher": (every_divergence, Sharded(cuts=UNEVEN, teacher="whole")),
    "top-k": (listed, Sharded()),
    "in triton": (in_triton, Sharded()),
}
RUNS = [
    *((world, "every divergence") for world in WORLDS),
    *((world, "options") for world in (3,)),
    *((world, "hard rows") for world in (2, 4)),
    *((world, group) for world, group in ((4, "uneven"), (3, "whole teacher"), (2, "top-k"), (4, "top-k"))),
    *((world, "in triton") for world in (2, 3)),
]


@pytest.mark.parametrize(("world", "group"), RUNS)
@pytest.mark.xdist_group("ranks")
def test_every_number(world: int, group: str) -> None:
    """Loss, statistics and gradients of each check of a group, on every rank, and the same bits on all of them."""
    torch.manual_seed(world)
    make, how = GROUPS[group]
    checks = make(world)
    found = ranks.run(world, checked, how, checks, timeout=110)
    assert not any(found), f"{len(found[0])} of {len(checks)} checks failed:\n" + "\n".join(
        f"{name}\n{error}" for name, error in found[0].items()
    )
