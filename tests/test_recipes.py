"""What is built on the divergences: the CALD loss of DistiLLM-2 and the schedule of TAID."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import IGNORE, VALUE, device, each, random_labels
from compare import assert_close
from torch import Tensor

import fusedkd

B, T, V = 3, 6, 67


def batch(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (float64, representable in float32) and labels with padding."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(B, tokens, V, generator=generator)).double(), None
    teacher = student + torch.randn(B, tokens, V, generator=generator).double()
    labels = torch.randint(V, (B, tokens), generator=generator)
    labels[:, -2:] = IGNORE
    return student.float().double(), teacher.float().double(), labels


def written_out(
    chosen: tuple[Tensor, Tensor, Tensor],
    rejected: tuple[Tensor, Tensor, Tensor],
    beta: float,
    anchors: tuple[float | None, float | None],
) -> Tensor:
    """(B,): what the authors' code computes (docs/mathematics.md#cald), from probabilities."""
    halves = []
    for (student, teacher, labels), anchor, sign in zip((chosen, rejected), anchors, (1, -1), strict=True):
        logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
        mask = labels != IGNORE
        lam = torch.full((B, 1, 1), 0.1, dtype=torch.float64)
        if anchor is not None:
            picked = [x.gather(-1, labels.clamp(min=0)[..., None])[..., 0] for x in (logp, logq.detach())]
            means = [((x * mask).sum(-1) / mask.sum(-1)).exp() for x in picked]
            gap = sign * (means[0] - means[1])
            lam = (1 - (1 - 0.1) * anchor / (gap + 1e-5)).clamp(0.01, 0.1)[:, None, None]
        q = logq.exp() if sign == 1 else logq.exp().detach()
        p = logp.exp()
        if sign == 1:
            token = (p * (logp - (lam * p + (1 - lam) * q).log())).sum(-1)
        else:
            token = (logq.exp() * (logq - ((1 - lam) * p + lam * q).log())).sum(-1)
        halves.append((token * mask).sum(-1) / mask.sum(-1))
    return (2 - beta) * halves[0] + beta * halves[1]


@each("beta", [1.0, 1.5])
@each("anchors", [(None, None), (0.02, None), (0.001, -0.03)])
def test_cald(beta: float, anchors: tuple[float | None, float | None], backend: str) -> None:
    """Value and gradient per sequence; two batches of different length; adapted λ per sequence."""
    chosen, rejected, place = batch(0, T), batch(1, T + 3), device(backend)
    leaves = [x[0].clone().requires_grad_() for x in (chosen, rejected)]
    wanted = written_out((leaves[0], *chosen[1:]), (leaves[1], *rejected[1:]), beta, anchors)
    ours = [x[0].to(place, torch.float32).requires_grad_() for x in (chosen, rejected)]
    found = fusedkd.cald_loss(
        ours[0], chosen[1].to(ours[0]), chosen[2].to(place), ours[1], rejected[1].to(ours[1]), rejected[2].to(place),
        beta=beta, anchor1=anchors[0], anchor2=anchors[1], reduction="none", backend=backend,
    )  # fmt: skip
    up = torch.randn(B, dtype=torch.float64)
    (wanted * up).sum().backward()
    (found * up.to(found)).sum().backward()
    assert_close(found, wanted.detach(), VALUE)
    for mine, theirs in zip(ours, leaves, strict=True):
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad, VALUE)


@pytest.mark.smoke
def test_cald_through_heads_and_reductions() -> None:
    """Heads give what their logits give; mean and sum are over sequences; an empty sequence is 0."""
    weight, teacher_weight = torch.randn(V, 8), torch.randn(V, 12)
    states = [torch.randn(B, t, d) for t in (4, 5) for d in (8, 12)]
    labels = [random_labels((B, t), V, ignored=False) for t in (4, 5)]
    labels[0][1] = IGNORE
    heads = [fusedkd.Head(x, weight if x.shape[-1] == 8 else teacher_weight) for x in states]
    logits = [head.hidden @ head.weight.T for head in heads]
    each_one = fusedkd.cald_loss(heads[0], heads[1], labels[0], heads[2], heads[3], labels[1], reduction="none")
    plain = fusedkd.cald_loss(logits[0], logits[1], labels[0], logits[2], logits[3], labels[1], reduction="none")
    assert torch.allclose(each_one, plain, rtol=1e-4)
    given = (heads[0], heads[1], labels[0], heads[2], heads[3], labels[1])
    assert torch.allclose(fusedkd.cald_loss(*given), each_one.mean())
    assert torch.allclose(fusedkd.cald_loss(*given, reduction="sum"), each_one.sum())


CALD: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "alpha1": ({"alpha1": 1.5}, ValueError, ("alpha1", "[0, 1]", "1.5")),
    "beta": ({"beta": 3}, ValueError, ("beta", "[0, 2]", "3")),
    "anchor": ({"anchor2": "x"}, TypeError, ("anchor2", "str")),
    "reduction": ({"reduction": "batchmean"}, ValueError, ("reduction", "batchmean")),
    "stats": ({"return_stats": True}, TypeError, ("return_stats",)),
    "divergence": ({"divergence": "fkl"}, TypeError, ("divergence",)),
    "no sequences": ({"student_chosen": torch.randn(4, V)}, ValueError, ("student_chosen", "batch", "(4,)")),
    "sequences": (
        {"student_rejected": torch.randn(2, T, V), "labels_rejected": torch.zeros(2, T, dtype=torch.int64)},
        ValueError,
        ("student_rejected", "3", "2"),
    ),
    "labels": ({"labels_chosen": None}, TypeError, ("labels_chosen", "NoneType")),
}


@each("mistake", CALD)
def test_cald_arguments(mistake: str) -> None:
    """Named before any work."""
    changed, error, words = CALD[mistake]
    x, labels = torch.randn(B, T, V), torch.zeros(B, T, dtype=torch.int64)
    names = (
        "student_chosen",
        "teacher_chosen",
        "labels_chosen",
        "student_rejected",
        "teacher_rejected",
        "labels_rejected",
    )
    given = dict(zip(names, (x, x, labels, x, x, labels), strict=True))
    with pytest.raises(error) as caught:
        fusedkd.cald_loss(**{**given, **changed})
    for word in words:
        assert word in str(caught.value)


def authors(losses: list[float], total: int, t_start: float, alpha: float, beta: float) -> list[float]:
    """TAID's update as its code has it: a first call that only stores, then docs/mathematics.md#taid."""
    t, momentum, previous, seen = t_start, 0.0, None, []
    for step, loss in enumerate(losses, 1):
        if previous is not None:
            change = (previous - loss) / (previous + 1e-15)
            momentum = beta * momentum + (1 - beta) * change
            delta = alpha * (1 / (1 + math.exp(-momentum))) * (1 - t)
            t = min(1.0, max(t_start + (1 - t_start) * step / total, t + delta))
        previous = loss
        seen.append(t)
    return seen


@pytest.mark.smoke
def test_taid_schedule() -> None:
    """The authors' rule, t never falls, it ends at 1, and a checkpoint goes on where it was."""
    losses = [5 * 0.99**i + 0.3 * math.sin(i) for i in range(60)]
    schedule = fusedkd.TAIDSchedule(50, t_start=0.2, alpha=0.05, beta=0.9)
    assert schedule.t == 0.2
    seen = [schedule.update(torch.tensor(loss, dtype=torch.float64)) for loss in losses[:30]]
    again = fusedkd.TAIDSchedule(50, t_start=0.2, alpha=0.05, beta=0.9)
    again.load_state_dict(schedule.state_dict())
    seen += [again.update(loss) for loss in losses[30:]]
    assert seen == pytest.approx(authors(losses, 50, 0.2, 0.05, 0.9))
    assert all(a <= b for a, b in itertools.pairwise(seen))
    assert seen[-1] == 1.0
    kept = again.t
    assert again.update(float("nan")) == kept


@each("mistake", [{"total_steps": 0}, {"t_start": -0.1}, {"t_end": 0.1}, {"alpha": 0.0}, {"beta": 1.0}])
def test_taid_schedule_arguments(mistake: dict[str, Any]) -> None:
    """Named, with what would work."""
    with pytest.raises(ValueError, match=next(iter(mistake))):
        fusedkd.TAIDSchedule(**{"total_steps": 10, **mistake})
    with pytest.raises(ValueError, match="state_dict"):
        fusedkd.TAIDSchedule(10).load_state_dict({})
