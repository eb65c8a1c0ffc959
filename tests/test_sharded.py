"""A vocabulary that several ranks share: every number against float64, on every rank, and what they tell each other."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import (
    ALL,
    DEFAULTS,
    DISTINCT,
    FEW,
    IGNORE,
    VALUE,
    Rows,
    check_heads,
    check_logits,
    named,
    near,
    side,
    unrelated,
)
from compare import relative
from outcomes import check as check_topk
from outcomes import check_head as check_topk_head
from outcomes import likeliest
from sharded import Check, Own, Sharded, checked
from test_memory import measure
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedkd

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
    for case in DISTINCT if world == 2 else FEW[:2]:
        checks.append(of_logits(case, labelled(unrelated(2, V), 0, V - 1), "triton"))
    for case in FEW:
        student, teacher = side((3,), V, D, bias=True), side((3,), V, D)
        labels = labelled(unrelated(3, V), V // 2).labels
        checks.append(of_heads(case, student, teacher, labels, "triton", ce_weight=0.5))
        if case[0] in ("drkl", "jsd"):
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


def corners(rank: int) -> dict[str, float]:
    """How far calls that have gone wrong before are from those of a whole vocabulary."""
    torch.manual_seed(0)
    found: dict[str, float] = {}
    ranges = [(0, 2), (2, 6), (6, 8)]

    def beside(name: str, teacher: torch.Tensor, given: Any, order: list[tuple[int, int]], **options: Any) -> None:
        whole = student.clone().requires_grad_()
        expected, stats = fusedkd.kd_loss(whole, teacher, labels, return_stats=True, reduction="none", **options)
        expected.nan_to_num().sum().backward()
        start, stop = order[rank]
        part = student[:, start:stop].clone().requires_grad_()
        shard = fusedkd.VocabShard(None, start, stop)
        more = {"return_stats": True, "reduction": "none", "shard": shard}
        loss, ours = fusedkd.kd_loss(part, given(start, stop), labels, **more, **options)
        loss.nan_to_num().sum().backward()
        pairs = [(loss, expected), *zip(ours, stats, strict=True), (part.grad, whole.grad[:, start:stop])]
        alike = [torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True) for x, y in pairs]
        found[name] = float(alike.count(False))

    labels, student, teacher = torch.arange(N) % 4, torch.randn(N, 8), torch.randn(N, 8)
    narrow = teacher[:, :4]
    beside("a whole teacher as wide as a part", narrow, lambda *_: narrow, ranges, vocab_size=4)
    beside("parts wider than what is compared", teacher, lambda i, j: teacher[:, i:j], ranges, vocab_size=4)
    flat, back = torch.zeros(N, 8), ranges[::-1]
    argmax = fusedkd.divergence("drkl", target_token="teacher_argmax")
    beside("ties of ranks in another order", flat, lambda i, j: flat[:, i:j], back, divergence=argmax)
    least = fusedkd.divergence("akl", mu=0.0)
    beside("ties of akl in another order", flat, lambda i, j: flat[:, i:j], back, divergence=least)
    student[1, 0] = torch.nan
    student[2, 7] = torch.inf
    beside("a side that is not finite", teacher, lambda i, j: teacher[:, i:j], ranges, divergence="jsd")
    student = torch.randn(N, 8)
    student[1, 1] = -torch.inf
    beside("a label without a probability", teacher, lambda i, j: teacher[:, i:j], ranges, ce_weight=0.5)
    labels, student, teacher = labels[:0], student[:0], teacher[:0]
    for name in ("akl", "amid", "jsd"):
        beside(f"no rows of {name}", teacher, lambda i, j: teacher[:, i:j], ranges, divergence=name)
    copied = copy.deepcopy(fusedkd.DistillationLoss("jsd", shard=fusedkd.VocabShard(None, 8 * rank, 8 * rank + 8)))
    found["a copied module"] = float(not copied(torch.randn(N, 8), torch.randn(N, 8)).isfinite())
    return found


@pytest.mark.xdist_group("ranks")
def test_corners() -> None:
    """Each was wrong once."""
    for found in ranks.run(3, corners):
        assert not any(found.values()), found


# What the ranks tell each other


ONE_SWEEP, TWO_SWEEPS = ("fkl", {}), ("jsd", {})
COUNTED: dict[str, tuple[Any, dict[str, Any], int, int]] = {  # collectives of forward, of backward, per chunk of rows
    "heads": (ONE_SWEEP, {}, 2, 0),
    "heads without one sweep": (TWO_SWEEPS, {}, 3, 0),
    "heads of which nothing is learnt": (ONE_SWEEP, {"frozen": True}, 1, 0),
    "streaming": (ONE_SWEEP, {"schedule": "streaming"}, 1, 1),
    "streaming without one sweep": (TWO_SWEEPS, {"schedule": "streaming"}, 2, 1),
    "floor": (ONE_SWEEP, {"support": "floor"}, 3, 0),
    "argmax": (("drkl", {"target_token": "teacher_argmax"}), {}, 3, 0),
    "amid": (("amid", {}), {}, 5, 0),
    "akl": (("akl", {}), {}, 8, 0),
}


def told(rank: int) -> dict[str, tuple[int, int, int, int]]:
    """Gathers of forward and backward, all-reduces of both together, and floats per row that were gathered."""
    labels, found = torch.randint(V, (N,)), {}
    labels[1] = IGNORE
    for name, ((divergence, params), options, *_) in COUNTED.items():
        options = dict(options)
        frozen = options.pop("frozen", False)
        student, teacher = (side((N,), V, D).operands(torch.float32, "cpu") for _ in range(2))
        if frozen:
            student = {key: x.detach() for key, x in student.items()}
        calls = Sharded()
        counts = {"all_gather": 0, "all_reduce": 0, "floats": 0}
        with pytest.MonkeyPatch.context() as patch:
            original = dist.all_gather

            def gather(out: Any, x: torch.Tensor, original: Any = original, counts: Any = counts, **more: Any) -> Any:
                counts["all_gather"] += 1
                counts["floats"] += x.numel() // N
                return original(out, x, **more)

            reduce = dist.all_reduce

            def all_reduce(x: torch.Tensor, original: Any = reduce, counts: Any = counts, **more: Any) -> Any:
                counts["all_reduce"] += 1
                return original(x, **more)

            given = (calls.side(fusedkd.Head(**x)) for x in (student, teacher))
            shard = fusedkd.VocabShard(None, *calls._range(V))
            patch.setattr(dist, "all_gather", gather)
            patch.setattr(dist, "all_reduce", all_reduce)
            chosen = fusedkd.divergence(divergence, **params)
            loss = fusedkd.kd_loss(*given, labels, divergence=chosen, shard=shard, drop_ignored=False, **options)
            forward = counts["all_gather"]
            if not frozen:
                patch.setattr(Own, "backward", staticmethod(lambda ctx, *gradients: (None,) * 5))
                loss.backward()
            found[name] = forward, counts["all_gather"] - forward, counts["all_reduce"], counts["floats"]
    return found


@pytest.mark.xdist_group("ranks")
def test_collectives() -> None:
    """As few as docs/sharding.md says, of as few floats: on every rank the same, whatever its rows and columns are."""
    found = ranks.run(2, told)
    assert found[0] == found[1]
    for name, (forward, backward, reduced, floats) in found[0].items():
        *_, of_forward, of_backward = COUNTED[name]
        assert (forward, backward) == (of_forward, of_backward), name
        assert reduced == (0 if "nothing" in name else 1), name  # the gradient of hidden states, once
        if name.startswith(("heads", "streaming")):
            assert floats <= 20, name


def twice(rank: int) -> bool:
    """Whether a call made again has the same bits, of the loss and of all gradients."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        student, teacher = (side((N,), V, D, bias=True).operands(torch.float32, "cpu") for _ in range(2))
        sides = (Sharded().side(fusedkd.Head(**x)) for x in (student, teacher))
        loss = fusedkd.kd_loss(*sides, torch.arange(N), divergence="ab", shard=fusedkd.VocabShard())
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in student.values())])
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.xdist_group("ranks")
def test_same_bits_again() -> None:
    """Nothing depends on who comes first."""
    assert ranks.run(3, twice) == [True, True, True]


# DTensors


def with_dtensors(rank: int) -> dict[str, float]:
    """The largest relative error of loss and gradients beside a whole vocabulary, by kind of call."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    square = init_device_mesh("cpu", (1, dist.get_world_size()))
    found: dict[str, float] = {}
    labels = torch.arange(N)
    student, teacher = 3 * torch.randn(2, N, V)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)

    def apart(name: str, ours: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
        whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in ours]
        found[name] = max(relative(x.detach(), y.detach().double()) for x, y in zip(whole, truth, strict=True))

    leaf = student.clone().requires_grad_()
    loss = fusedkd.kd_loss(leaf, teacher, labels)
    loss.backward()
    shards = [distribute_tensor(x, mesh, [Shard(1)]).detach().requires_grad_() for x in (student, teacher)]
    ours = fusedkd.kd_loss(shards[0], shards[1].detach(), distribute_tensor(labels, mesh, [Replicate()]))
    ours.backward()
    apart("logits", [ours, shards[0].grad], [loss, leaf.grad])
    whole = distribute_tensor(student, mesh, [Shard(1)]).detach().requires_grad_()
    ours = fusedkd.kd_loss(whole, distribute_tensor(teacher, mesh, [Replicate()]), labels)
    ours.backward()
    apart("a whole teacher", [ours, whole.grad], [loss, leaf.grad])
    plain = distribute_tensor(student, mesh, [Replicate()]).detach().requires_grad_()
    ours = fusedkd.kd_loss(plain, teacher, labels)
    ours.backward()
    apart("replicated", [ours, plain.grad], [loss, leaf.grad])

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = fusedkd.kd_loss(fusedkd.Head(*leaves), teacher, labels)
    loss.backward()
    for name, hidden_grad in (("Heads", "reduce"), ("Heads, partial", "partial")):
        h = distribute_tensor(hidden, mesh, [Replicate()]).detach().requires_grad_()
        w = distribute_tensor(weight, mesh, [Shard(0)]).detach().requires_grad_()
        ours = fusedkd.kd_loss(fusedkd.Head(h, w), teacher, labels, hidden_grad=hidden_grad)
        ours.backward()
        apart(name, [ours, h.grad, w.grad], [loss, leaves[0].grad, leaves[1].grad])
    h = distribute_tensor(hidden, mesh, [Replicate()]).detach().requires_grad_()
    start, stop = Sharded()._range(V)
    shard = fusedkd.VocabShard(None, start, stop)
    ours = fusedkd.kd_loss(fusedkd.Head(h, weight[start:stop]), teacher, labels, hidden_grad="partial", shard=shard)
    ours.backward()
    apart("partial beside a plain weight", [h.grad], [leaves[0].grad])
    w, wider = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, torch.randn(V + 9, D)))
    spread = distribute_tensor(hidden, mesh, [Replicate()])
    last = fusedkd.VocabShard(None, *(20 * x for x in (2 - rank, 3 - rank)))

    def refused(name: str, message: str, *sides: Any, **options: Any) -> None:
        try:
            fusedkd.kd_loss(*sides, labels, **options)
        except ValueError as error:
            found[f"refused: {name}"] = float(message not in str(error))

    refused("plain hidden states", "DistillationHead", fusedkd.Head(hidden, w), teacher)
    refused("rows", "student is a DTensor", distribute_tensor(student, mesh, [Shard(0)]), teacher)
    refused("two dimensions", "student is a DTensor", distribute_tensor(student, square, [Shard(1)] * 2), teacher)
    refused("another vocabulary", "not cut alike", fusedkd.Head(spread, w), fusedkd.Head(spread, wider), vocab_size=V)
    refused("another shard", "leave `shard` out", fusedkd.Head(spread, w), teacher, shard=last)
    refused("a whole bias", "distribute_tensor(student.bias", fusedkd.Head(spread, w, torch.randn(V)), teacher)
    return found


@pytest.mark.xdist_group("ranks")
def test_dtensors() -> None:
    """They say what is sharded, uneven parts included; what they cannot say is refused with a way out."""
    for found in ranks.run(3, with_dtensors):
        assert len(found) == 12, found
        assert max(found.values()) < VALUE, found


# Wrong use


def wrong(rank: int) -> list[str]:
    """What each wrong call says: an error on every rank, before any of them waits for the others."""
    said: list[str] = []
    student, teacher = torch.randn(2, N, 8)
    labels = torch.zeros(N, dtype=torch.int64)

    def refused(make: Any) -> None:
        try:
            make()
        except (ValueError, TypeError, NotImplementedError) as error:
            said.append(str(error))
        else:
            said.append("nothing")

    head = fusedkd.Head(torch.randn(N, D), torch.randn(8, D))
    shard = fusedkd.VocabShard(None, 8 * rank, 8 * rank + 8)
    refused(lambda: fusedkd.VocabShard(None, 8 * rank, 8 * rank + 9))
    refused(lambda: fusedkd.VocabShard(None, 9 * rank, 9 * rank + 8))
    refused(lambda: fusedkd.VocabShard(None, 0))
    refused(lambda: fusedkd.VocabShard("tp"))
    refused(lambda: fusedkd.VocabShard(None, rank - 1, rank))
    refused(lambda: fusedkd.VocabShard(None, 0, 0))
    refused(lambda: fusedkd.kd_loss(student[:, :7], teacher, labels, shard=shard))
    refused(lambda: fusedkd.kd_loss(student, teacher[:, :7], labels, shard=shard))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels + 16, shard=shard))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, shard="tp"))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, shard=shard, hidden_grad="sum"))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, shard=shard, hidden_grad="partial"))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, hidden_grad="partial"))
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, shard=shard, backend="compiled"))
    refused(lambda: fusedkd.kd_loss(head, head, labels, divergence="akl", shard=shard, schedule="streaming"))
    argmax = fusedkd.divergence("drkl", target_token="teacher_argmax")
    refused(lambda: fusedkd.kd_loss(student, teacher, labels, divergence=argmax, ce_weight=1.0, shard=shard))
    unequal = student[:, : 3 + 2 * rank]
    refused(lambda: fusedkd.kd_loss(unequal, unequal, labels, shard=fusedkd.VocabShard()))
    return said


WRONG = [
    "overlap",
    "leave columns out",
    "start and stop are given together",
    "group must be a process group",
    "are no ranges of columns",
    "have no column at all",
    "student has 7 on this rank",
    "teacher has 7 columns",
    r"labels must lie in \[0, 16\)",
    "shard must be a fusedkd.VocabShard",
    "hidden_grad must be one of",
    'hidden_grad="partial" leaves',
    'hidden_grad="partial" leaves',
    'backend="compiled" makes loops of whole rows',
    "divergence 'akl'",
    'target_token="teacher_argmax" beside ce_weight',
    r"the ranks have \[3, 5\] columns of student",
]


@pytest.mark.xdist_group("ranks")
def test_wrong_use() -> None:
    """Each error names the argument and what would work."""
    for said in ranks.run(2, wrong):
        assert len(said) == len(WRONG)
        for message, pattern in zip(said, WRONG, strict=True):
            assert re.search(pattern, message), (pattern, message)


def unlike(rank: int) -> list[str]:
    """What FUSEDKD_CHECK=1 says where ranks call with other rows, labels and divergences."""
    said: list[str] = []
    shard = fusedkd.VocabShard()
    x, head = torch.randn(N + rank, 8), fusedkd.Head(torch.randn(N, D), torch.randn(8, D))
    labels = torch.full((N,), rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDKD_CHECK", "1")
        for call in (
            lambda: fusedkd.kd_loss(x, x, shard=shard),
            lambda: fusedkd.kd_loss(x[:N], x[:N], labels, shard=shard),
            lambda: fusedkd.kd_loss(x[:N], x[:N], (labels, None)[rank], shard=shard),
            lambda: fusedkd.kd_loss(x[:N], x[:N], vocab_size=(12, 7)[rank], shard=shard),
            lambda: fusedkd.kd_loss(x[:N], x[:N], divergence=("fkl", "rkl")[rank], shard=shard),
            lambda: fusedkd.kd_loss(x[:N], x[:N], reduction=("sum", "none")[rank], shard=shard),
            lambda: fusedkd.kd_loss(x[:N].clone().requires_grad_(rank == 0), x[:N], shard=shard),
            lambda: fusedkd.kd_loss(head, head, memory_budget=(None, 1 << 30)[rank], shard=shard),
        ):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        fusedkd.kd_loss(x[:N], x[:N], shard=shard)
    return said


@pytest.mark.xdist_group("ranks")
def test_ranks_that_call_otherwise() -> None:
    """Found by one small collective, where it is asked for, on every rank."""
    for said in ranks.run(2, unlike):
        names = ["the leading shape of student", "the sum of labels", "labels (None or not)", "vocab_size"]
        names += ["divergence", "reduction"]
        names += ["what of student requires grad", "memory_budget"]
        assert [text.split(" must be the same")[0] for text in said] == names


def test_without_a_process_group() -> None:
    """No group is made by the library."""
    with pytest.raises(ValueError, match="there is no process group yet"):
        fusedkd.VocabShard()


# torch.compile and memory


def compiled(rank: int) -> bool:
    """Whether a compiled call has the loss and the gradients of an eager one."""
    student, teacher = (side((N,), V, D).operands(torch.float32, "cpu") for _ in range(2))
    columns = Sharded()._range(V)
    shard, labels = fusedkd.VocabShard(None, *columns), torch.arange(N)
    own = slice(*columns)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, shard: fusedkd.VocabShard = shard) -> torch.Tensor:
        theirs = fusedkd.Head(teacher["hidden"], teacher["weight"][own])
        return fusedkd.kd_loss(fusedkd.Head(hidden * 2, weight), theirs, labels, shard=shard)

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden, weight = student["hidden"].detach().requires_grad_(), student["weight"][own].detach().requires_grad_()
        value = run(hidden, weight)
        value.backward()
        found.append((value.detach(), hidden.grad, weight.grad))
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.xdist_group("ranks")
def test_compile() -> None:
    """The collectives are inside of operators."""
    assert ranks.run(2, compiled, timeout=100) == [True, True]


def peaks(rank: int, schedule: str) -> tuple[int, int]:
    """Workspace in bytes of a call on half of the vocabulary: as a shard, and as if it were all there is."""
    torch.manual_seed(0)
    rows, width, dim = 640, 10_000, 8
    hidden, weights, labels = torch.randn(rows, dim), torch.randn(2, width, dim), torch.randint(width, (rows,))
    shard = fusedkd.VocabShard(None, rank * width, (rank + 1) * width)

    def run(**options: Any) -> Any:
        leaves = hidden.clone().requires_grad_(), weights[0].clone().requires_grad_()
        sides = fusedkd.Head(*leaves), fusedkd.Head(hidden, weights[1])
        loss = fusedkd.kd_loss(*sides, labels, divergence="jsd", schedule=schedule, **options)
        return loss, torch.autograd.grad(loss, leaves)

    run(shard=shard)
    return measure(lambda: run(shard=shard)).peak, measure(run).peak


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("schedule", ["chunked", "streaming"])
def test_memory(schedule: str) -> None:
    """That of a call with as many columns, and 20 floats for every row."""
    for shared, alone in ranks.run(2, peaks, schedule):
        assert 0.9 * alone < shared <= alone + 640 * 20 * 4, (shared - alone) / (640 * 4)
