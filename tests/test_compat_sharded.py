"""Drop-ins beside a vocabulary that two ranks share: value and gradients, and what their callers do with both."""

from __future__ import annotations

import copy
import dataclasses
import sys
import traceback
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import IGNORE, VALUE
from compare import relative
from torch import Tensor
from torch.distributed.nn import functional as differentiable

import fusedkd
from fusedkd.compat import automodel, megatron

S, B, V, D = 5, 3, 64, 12
TOKENS = 57  # of V columns, the rest is padding
K = 9
CONFIG = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
ALONE = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)


# The formulas of the originals, of whole rows


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ p (log p − log q) per token."""
    logp, logq = ((x / temperature).log_softmax(-1) for x in (p_logits, q_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


def topk_kl(student: Tensor, teacher: Tensor, temperature: float, k: int) -> Tensor:
    """Of both renormalised on the teacher's k likeliest."""
    values, ids = teacher.topk(k, -1)
    return kl(values, student.gather(-1, ids), temperature)


def cached_kl(student: Tensor, logp: Tensor, ids: Tensor, ghost: bool) -> Tensor:
    """Megatron's: raw terms of the listed tokens, and with `ghost` that of all others."""
    logq = student.log_softmax(-1).gather(-1, ids)
    loss = (logp.exp() * (logp - logq)).sum(-1)
    if ghost:
        rest, rest_q = ((1 - x.exp().sum(-1)).clamp(min=1e-8) for x in (logp, logq))
        loss = loss + rest * (rest.log() - rest_q.log())
    return loss


# What Megatron does with them


def masked(found: Any, mask: Tensor) -> Tensor:
    """`_mask_loss` of Megatron-LM and of Megatron-Bridge: a sum over ranks that nobody differentiates."""
    loss, tp_reduce, is_sequence_parallel = found
    assert not is_sequence_parallel
    total = (loss.reshape(-1).float() * mask.reshape(-1).float()).sum()
    if tp_reduce:
        dist.all_reduce(total)
    return total


def cached(share: Tensor, mask: Tensor) -> Tensor:
    """`LossFuncCallable` of Megatron-LM: always a sum over ranks."""
    return masked((share, True, False), mask)


# The originals on shards, written again


def theirs_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """ModelOpt's LogitsKLLoss: the terms of this rank's columns."""
    logq, logp = (x - _log_sum(x) for x in (student, teacher))
    return (logp.exp() * (logp - logq)).sum(-1).transpose(0, 1)


def theirs_topk(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """ModelOpt's TopKLogitsKLLoss: candidates of all ranks are gathered, and each rank has the whole loss."""
    values, ids = teacher.topk(k, -1)
    both = (torch.cat(differentiable.all_gather(x.contiguous()), -1) for x in (values, student.gather(-1, ids)))
    all_values, all_students = both
    values, ids = all_values.topk(k, -1)
    return kl(values, all_students.gather(-1, ids)).transpose(0, 1)


def _log_sum(x: Tensor) -> Tensor:
    return differentiable.all_reduce(x.exp().sum(-1, keepdim=True)).log()


# A call on a rank


@dataclasses.dataclass
class Batch:
    """Whole tensors, the same on every rank."""

    student: Tensor
    teacher: Tensor
    mask: Tensor  # (b, s)
    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def make(cls, columns: int = V) -> Batch:
        """Float64 numbers that float32 has."""
        torch.manual_seed(3)
        sizes = (S, B, columns), (S, B, columns), (B, S), (S, B, D), (columns, D), (columns,)
        made = [torch.randn(*size).double() for size in sizes]
        made[2] = (torch.rand(B, S) > 0.3).double()
        return cls(2 * made[0], 2 * made[1], *made[2:])


def part(x: Tensor, axis: int = -1) -> Tensor:
    """This rank's columns, a leaf in float32."""
    return x.chunk(2, axis)[dist.get_rank()].float().clone().requires_grad_()


def whole(x: Tensor, axis: int = -1) -> Tensor:
    """All ranks' parts of a gradient, which may differ in size."""
    told: list[Any] = [None, None]
    dist.all_gather_object(told, x)
    return torch.cat(told, axis)


def check_value(ours: Tensor, truth: Tensor) -> None:
    """Within the suite's bound, and the same on both ranks."""
    assert relative(ours.detach(), truth.detach()) < VALUE
    told: list[Any] = [None, None]
    dist.all_gather_object(told, ours.detach())
    assert torch.equal(*told)


def check_gradient(ours: Tensor | None, truth: Tensor | None) -> None:
    """Of all columns, zeros included."""
    assert ours is not None and truth is not None
    assert relative(ours, truth) < VALUE
    assert not ours[truth == 0].any()


def truth_of(formula: Callable[[Tensor], Tensor], student: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (b, s), their masked sum and its gradient by the logits."""
    leaf = student.clone().requires_grad_()
    rows = formula(leaf).transpose(0, 1)
    total = (rows * mask).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return rows, total, gradient


def through_megatron(
    loss: Any, alone: Any, formula: Callable[[Tensor, Tensor], Tensor], columns: int = V, teacher: str = "part"
) -> None:
    """From logits: rows, the sum that Megatron makes, the gradient; beside float64 and the drop-in of one rank."""
    x = Batch.make()
    if columns < V:
        x.student[..., columns:] += 30  # padding that would have all of the mass
    rows, total, gradient = truth_of(lambda s: formula(s[..., :columns], x.teacher[..., :columns]), x.student, x.mask)
    mine = part(x.student)
    found = loss(mine, part(x.teacher).detach() if teacher == "part" else x.teacher.float())
    check_value(found[0], rows)
    total_here = masked(found, x.mask)
    check_value(total_here, total)
    total_here.backward()
    check_gradient(whole(mine.grad), gradient)

    leaf = x.student.float().requires_grad_()
    single, *_ = alone(leaf, x.teacher.float())
    (single * x.mask.float()).sum().backward()
    assert relative(found[0].detach(), single.detach().double()) < VALUE
    assert relative(whole(mine.grad), leaf.grad.double()) < VALUE


def logits_kl() -> None:
    """Both directions, a temperature, a linear layer's tuple, a whole teacher."""
    for reverse, temperature in ((False, 1.0), (True, 2.0)):
        options: dict[str, Any] = {"temperature": temperature, "reverse": reverse}
        formula = (lambda s, t: kl(s, t, 2.0)) if reverse else (lambda s, t: kl(t, s))
        loss, alone = megatron.LogitsKLLoss(CONFIG, **options), megatron.LogitsKLLoss(ALONE, **options)
        through_megatron(loss, alone, formula)
        through_megatron(lambda s, t, loss=loss: loss((s, None), (t, None)), alone, formula)
        through_megatron(loss, alone, formula, teacher="whole")
    x = Batch.make()
    assert megatron.LogitsKLLoss(CONFIG)(part(x.student), part(x.teacher).detach())[1:] == (False, False)
    assert megatron.LogitsKLLoss(ALONE)(x.student, x.teacher)[1:] == (True, False)


def padding() -> None:
    """Columns beyond vocab_size have no mass and no gradient; left in, they would."""
    loss, alone = (megatron.LogitsKLLoss(config, vocab_size=TOKENS) for config in (CONFIG, ALONE))
    through_megatron(loss, alone, lambda s, t: kl(t, s), TOKENS)
    every, alone = (megatron.TopKLogitsKLLoss(config, top_k=K, vocab_size=TOKENS) for config in (CONFIG, ALONE))
    through_megatron(every, alone, lambda s, t: topk_kl(s, t, 1.0, K), TOKENS)
    # All of a rank's columns, and more tokens than the other rank has.
    few, alone = (megatron.TopKLogitsKLLoss(config, top_k=K, vocab_size=20) for config in (CONFIG, ALONE))
    through_megatron(few, alone, lambda s, t: topk_kl(s, t, 1.0, K), 20)
    with pytest.raises(AssertionError):
        through_megatron(megatron.LogitsKLLoss(CONFIG), alone, lambda s, t: kl(t, s), TOKENS)


def logits_topk() -> None:
    """The likeliest of all ranks; more than a rank has columns."""
    for k, reverse in ((K, False), (40, False), (V, True)):
        loss, alone = (megatron.TopKLogitsKLLoss(config, 2.0, reverse, k) for config in (CONFIG, ALONE))
        formula = (lambda s, t: topk_reverse(s, t, 2.0)) if reverse else (lambda s, t, k=k: topk_kl(s, t, 2.0, k))
        through_megatron(loss, alone, formula)


def topk_reverse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """All tokens are listed."""
    return kl(student, teacher, temperature)


def through_heads(make: Callable[[Any], Any], formula: Callable[[Tensor, Tensor], Tensor], *, partial: bool) -> None:
    """From hidden states: gradients of hidden, weight and bias."""
    x = Batch.make()
    leaves = [leaf.clone().requires_grad_() for leaf in (x.hidden, x.weight, x.bias)]
    rows = formula(leaves[0] @ leaves[1].t() + leaves[2], x.teacher).transpose(0, 1)
    (rows * x.mask).sum().backward()
    hidden = x.hidden.float().clone().requires_grad_()
    weight, bias = part(x.weight, 0), part(x.bias, 0)
    found = make(CONFIG)(fusedkd.Head(hidden, weight, bias), part(x.teacher).detach())
    check_value(found[0], rows)
    masked(found, x.mask).backward()
    assert hidden.grad is not None
    if partial:
        assert relative(hidden.grad, leaves[0].grad) > 0.1  # so that the sum below has something to do
        dist.all_reduce(hidden.grad)
    for ours, truth in zip((hidden.grad, whole(weight.grad, 0), whole(bias.grad, 0)), leaves, strict=True):
        check_gradient(ours, truth.grad)


def heads() -> None:
    """Whole gradients of hidden states, or parts of them for Megatron's own regions."""
    for partial in (False, True):
        options: dict[str, Any] = {"hidden_grad": "partial"} if partial else {}
        through_heads(
            lambda config, options=options: megatron.LogitsKLLoss(config, **options),
            lambda s, t: kl(t, s),
            partial=partial,
        )
        through_heads(
            lambda config, options=options: megatron.TopKLogitsKLLoss(config, top_k=K, **options),
            lambda s, t: topk_kl(s, t, 1.0, K),
            partial=partial,
        )


def cache(x: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the teacher's likeliest, in float64."""
    found = x.teacher.log_softmax(-1).topk(K, -1)
    return found.values.float().double(), found.indices


def of_cache() -> None:
    """Shares whose sum is the loss, with its gradient; logits and Heads, with the ghost token and without."""
    x = Batch.make()
    logp, ids = cache(x)
    x.student[0, 0] = -50  # a student with everything on a listed token: the ghost token's least mass
    x.student[0, 0, ids[0, 0, 0]] = 0
    group, rank = dist.group.WORLD, dist.get_rank()
    for ghost in (False, True):
        rows, total, gradient = truth_of(lambda s, ghost=ghost: cached_kl(s, logp, ids, ghost), x.student, x.mask)
        mine = part(x.student)
        given = logp.float().clone(), ids.int()
        share = megatron.topk_kl_div(mine, *given, 2, rank, group, ghost)
        assert share.shape == (B, S)
        assert share.is_contiguous()
        dist.all_reduce(summed := share.detach().clone())
        check_value(summed, rows)
        here = cached(share, x.mask)
        check_value(here, total)
        here.backward()
        check_gradient(whole(mine.grad), gradient)
        alone = megatron.topk_kl_div(x.student.float(), *given, 1, 0, None, ghost)
        assert relative(summed, alone.double()) < VALUE

        leaves = [leaf.clone().requires_grad_() for leaf in (x.hidden, x.weight)]
        (cached_kl(leaves[0] @ leaves[1].t(), logp, ids, ghost).transpose(0, 1) * x.mask).sum().backward()
        hidden, weight = x.hidden.float().clone().requires_grad_(), part(x.weight, 0)
        head = fusedkd.Head(hidden, weight)
        cached(megatron.topk_kl_div(head, *given, 2, rank, group, ghost), x.mask).backward()
        check_gradient(hidden.grad, leaves[0].grad)
        check_gradient(whole(weight.grad, 0), leaves[1].grad)


def their_gradients() -> None:
    """What the originals do on shards: LogitsKLLoss counts its gradient once, TopKLogitsKLLoss on each rank."""
    x = Batch.make()
    for theirs, formula, tp_reduce, times in (
        (theirs_kl, lambda s: kl(x.teacher, s), True, 1),
        (lambda s, t: theirs_topk(s, t, K), lambda s: topk_kl(s, x.teacher, 1.0, K), False, 2),
    ):
        _, total, gradient = truth_of(formula, x.student, x.mask)
        mine = part(x.student).detach().double().requires_grad_()
        found = masked((theirs(mine, part(x.teacher).detach().double()), tp_reduce, False), x.mask)
        assert relative(found.detach(), total.detach()) < 1e-6
        found.backward()
        assert mine.grad is not None
        assert relative(whole(mine.grad) / times, gradient) < 1e-6


def in_automodel() -> None:
    """Plain parts with a group, equal or not, and DTensors: T², counts, ignored tokens, a whole teacher, Heads."""
    for columns in (V, 61):
        for count in (None, 50):
            automodel_logits(columns, count)
    x = Batch.make()
    leaves = [leaf.clone().requires_grad_() for leaf in (x.hidden, x.weight)]
    kl(x.teacher, leaves[0] @ leaves[1].t()).mean().backward()
    hidden, weight = x.hidden.float().clone().requires_grad_(), part(x.weight, 0)
    head = fusedkd.Head(hidden, weight)
    labels = torch.zeros(S, B, dtype=torch.int64)
    automodel.KDLoss(tp_group=dist.group.WORLD)(head, part(x.teacher).detach(), labels).backward()
    check_gradient(hidden.grad, leaves[0].grad)
    check_gradient(whole(weight.grad, 0), leaves[1].grad)


def automodel_logits(columns: int, count: int | None) -> None:
    """Every way in which two ranks can have logits."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    x = Batch.make(columns)
    labels = torch.where(x.mask.t() > 0, 0, IGNORE)
    leaf = x.student.clone().requires_grad_()
    truth = 4 * (kl(x.teacher, leaf, 2.0) * x.mask.t()).sum() / (x.mask.sum() if count is None else count)
    truth.backward()

    def placed(y: Tensor, *placements: Any) -> Any:
        where = mesh if len(placements) == 1 else grid
        return distribute_tensor(y.float() if y.is_floating_point() else y, where, placements).requires_grad_(
            y is x.student
        )

    grouped = automodel.KDLoss(temperature=2.0, tp_group=dist.group.WORLD)
    alone = automodel.KDLoss(temperature=2.0)
    mine, teacher, whole_teacher = part(x.student), part(x.teacher).detach(), x.teacher.float()
    here, theirs = placed(x.student, Shard(2)), placed(x.teacher, Shard(2))
    calls: list[tuple[Any, Any, Any, Any]] = [
        (grouped, mine, teacher, labels),
        (grouped, mine, teacher, labels),  # the columns are known
        (grouped, mine, whole_teacher, labels),
        (grouped, mine, theirs, labels),
        (grouped, here, theirs, labels),
        (grouped, placed(x.student, Replicate()), theirs, labels),
        (alone, here, theirs, labels),
        (alone, here, placed(x.teacher, Replicate()), labels),
        (alone, here, placed(x.teacher, Shard(0)), labels),
        (alone, here, whole_teacher, placed(labels, Replicate())),
        (alone, placed(x.student, Replicate(), Shard(2)), placed(x.teacher, Replicate(), Shard(2)), labels),
        (alone, placed(x.student, Shard(0)), theirs, labels),
        (alone, x.student.float().requires_grad_(), whole_teacher, labels),
    ]
    for loss, student, other, y in calls:
        student.grad = None
        found = loss(student, other, y, count)
        check_value(found, truth)
        found.backward()
        gradient = student.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        check_gradient(whole(gradient) if student is mine else gradient, leaf.grad)


def surroundings() -> None:
    """torch.compile once the ranks know their columns, and a copy of a loss that was used."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    x = Batch.make()
    mine, teacher = part(x.student), part(x.teacher).detach()
    labels = torch.zeros(S, B, dtype=torch.int64)
    for loss, rest in (
        (automodel.KDLoss(tp_group=dist.group.WORLD), (labels,)),
        (megatron.LogitsKLLoss(CONFIG), ()),
    ):
        both = []
        for call in (loss, torch.compile(loss, backend="aot_eager")):
            found = call(mine, teacher, *rest)
            value = found[0] if isinstance(found, tuple) else found
            (gradient,) = torch.autograd.grad(value.sum(), mine)
            both.append((value.detach(), gradient))
        assert all(torch.equal(eager, compiled) for eager, compiled in zip(*both, strict=True))
    grid = init_device_mesh("cpu", (1, 2))
    sides = [distribute_tensor(y.float(), grid, [Replicate(), Shard(2)]) for y in (x.student, x.teacher)]
    loss = automodel.KDLoss()
    first = loss(*sides, labels)
    assert torch.equal(copy.deepcopy(loss)(*sides, labels), first)
    megatron_loss = megatron.LogitsKLLoss(CONFIG)
    first = megatron_loss(mine, teacher)[0]
    assert torch.equal(copy.deepcopy(megatron_loss)(mine, teacher)[0], first)


def refusals() -> None:
    """A group that is not that of the ranks, on every rank, before any collective; then the group still works."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    x = Batch.make()
    mine, teacher = part(x.student), part(x.teacher).detach()
    logp, ids = (y.clone() for y in cache(x))
    alone, rank = [dist.new_group([i]) for i in range(2)][dist.get_rank()], dist.get_rank()
    with pytest.raises(ValueError, match="tensor_model_parallel_size is 3, and the tensor-parallel group has 2"):
        megatron.LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=3))(mine, teacher)
    with pytest.raises(ValueError, match="tp_size is 2, and the tensor-parallel group has 1"):
        megatron.topk_kl_div(mine, logp.float(), ids, 2, rank, alone)
    with pytest.raises(ValueError, match="tp_size is 2, and the tensor-parallel group is None"):
        megatron.topk_kl_div(mine, logp.float(), ids, 2, rank, None)
    with pytest.raises(ValueError, match=f"tp_rank is {1 - rank}, and this rank is number {rank}"):
        megatron.topk_kl_div(mine, logp.float(), ids, 2, 1 - rank, dist.group.WORLD)
    with pytest.raises(ValueError, match="targets has 64 columns and predictions 32 on this rank"):
        megatron.TopKLogitsKLLoss(CONFIG, top_k=K)(mine, x.teacher.float())
    with pytest.raises(ValueError, match="top_k must be at most the vocabulary of targets, 64, got 65"):
        megatron.TopKLogitsKLLoss(CONFIG, top_k=65)(mine, teacher)
    with pytest.raises(ValueError, match="vocab_size must be between 1 and 64"):
        megatron.LogitsKLLoss(CONFIG, vocab_size=65)(mine, teacher)
    with pytest.raises(ValueError, match=r"the ranks have .* columns of student, which are no equal parts"):
        # A first part that is the smaller one is none of torch.chunk's.
        columns = 20 + 10 * rank
        automodel.KDLoss(tp_group=dist.group.WORLD)(mine[..., :columns], teacher[..., :columns], ids[..., 0])
    student = distribute_tensor(x.student.float(), init_device_mesh("cpu", (2,)), [Shard(2)])
    with pytest.raises(ValueError, match="tp_group is not the group of the mesh"):
        automodel.KDLoss(tp_group=alone)(student, student, ids[..., 0])
    del sys.modules["megatron.core.parallel_state"]
    with pytest.raises(ImportError, match=r"install megatron-core, or call fusedkd.kd_loss with shard="):
        megatron.LogitsKLLoss(CONFIG)(mine, teacher)


CHECKS = (
    logits_kl, padding, logits_topk, heads, of_cache, their_gradients, in_automodel, surroundings, refusals,
)  # fmt: skip


def on_rank(rank: int) -> dict[str, str]:
    """The traceback of each check that failed, by its name; Megatron's module is a stand-in."""
    state: Any = ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    for name in ("megatron", "megatron.core"):
        sys.modules[name] = ModuleType(name)
    sys.modules["megatron.core.parallel_state"] = state
    failed = {}
    for check in CHECKS:
        error = ""
        try:
            check()
        except Exception:
            error = traceback.format_exc(limit=-4)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, error)
        if any(told):
            failed[check.__name__] = "\n".join(f"rank {i}: {x}" for i, x in enumerate(told) if x)
    return failed


@pytest.mark.xdist_group("ranks")
def test_two_ranks() -> None:
    """Every check above on both, in one group."""
    found, _ = ranks.run(2, on_rank, timeout=110)
    assert not found, "\n".join(f"{name}\n{error}" for name, error in found.items())
