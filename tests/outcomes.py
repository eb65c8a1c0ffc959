"""What a loss beside a `TopK` should be: float64, the K + 1 outcomes from dense probabilities, and a check of a call.

Nothing is shared with the package but what oracle.py shares. Gradients come from autograd, never from a closed form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cases
import oracle
import torch
from cases import HEAD, MIXED, VALUE, Case, Side, check_stats, chosen, device, moved
from compare import assert_close, relative, rounding
from torch import Tensor

import fusedkd

IGNORE, ABSENT, EMPTY = -100, -1, -50.0
REDUCTION = ("reduction", "num_items", "token_weights")


@dataclasses.dataclass(frozen=True)
class Listed:
    """A top-k teacher on the host, its log-probabilities as their dtype holds them."""

    ids: Tensor  # (..., K)
    logprobs: Tensor  # (..., K)
    tail: str = "bucket"
    temperature: float = 1.0
    vocab_size: int | None = None

    def given(self, place: str) -> fusedkd.TopK:
        """As it is passed."""
        ids, logprobs = self.ids.to(place), self.logprobs.to(place)
        return fusedkd.TopK(ids, logprobs, self.tail, self.temperature, self.vocab_size)

    def counted(self, labels: Tensor | None) -> Tensor:
        """(...) bool: rows that have a token, and a label where there are any."""
        some = ((self.ids >= 0) & (self.logprobs > -torch.inf)).any(-1)
        return some if labels is None else some & (labels != IGNORE)


def likeliest(teacher: Tensor, k: int, tau: float = 1.0, dtype: torch.dtype = torch.float32, **fields: Any) -> Listed:
    """The k likeliest tokens of a teacher's logits (..., V), in no order."""
    logp = (teacher / tau).log_softmax(-1)
    ids = logp.topk(k, -1).indices
    ids = ids.gather(-1, torch.rand(ids.shape).argsort(-1))
    return Listed(ids, logp.gather(-1, ids).to(dtype), temperature=tau, **fields)


def outcomes(logits: Tensor, teacher: Listed, tau: float, columns: int) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits (n, W) of the outcomes of n rows, the last of which nobody gives a probability."""
    ids, logp = (x.reshape(-1, x.shape[-1]) for x in (teacher.ids.long(), teacher.logprobs.double()))
    z = logits[:, :columns] / tau
    there = (ids >= 0) & (logp > -torch.inf)
    ours = torch.where(there, z.gather(1, ids.clamp(min=0)), 0.0)
    theirs = torch.where(there, logp * (teacher.temperature / tau), -torch.inf)
    if teacher.tail == "bucket":
        others = torch.ones_like(z, dtype=torch.bool)
        for row, of_row, at in zip(others, ids, there, strict=True):
            row[of_row[at]] = False
        seen = z.masked_fill(~others, -torch.inf)
        empty = (seen == -torch.inf).all(1)
        rest = torch.where(empty, -torch.inf, torch.where(empty[:, None], 0.0, seen).logsumexp(1))
        left = 1 - theirs.exp().sum(1)
        left = torch.where(left > 0, left.clamp(min=1e-300).log(), EMPTY)
        none = others.sum(1) == 0
        ours = torch.cat((ours, torch.where(none, 0.0, rest)[:, None]), 1)
        theirs = torch.cat((theirs, torch.where(none, -torch.inf, left)[:, None]), 1)
    pad = torch.zeros_like(z[:, :1])
    return torch.cat((ours, pad), 1), torch.cat((theirs, pad - torch.inf), 1)


def integrand(name: str, params: dict[str, Any], logp: Tensor, logq: Tensor) -> Tensor:
    """The published summands on raw probabilities."""
    p, q = logp.exp(), logq.exp()
    forward, reverse = p * (logp - logq), q * (logq - logp)
    if name in ("fkl", "rkl"):
        return forward if name == "fkl" else reverse
    if name == "frkl":
        w = params.get("w", 0.5)
        return (1 - w) * forward + w * reverse
    beta = params.get("beta", 0.5)
    if not isinstance(beta, Tensor) and beta in (0, 1):
        return reverse if beta else forward
    m = beta * p + (1 - beta) * q
    return beta * p * (logp - m.log()) + (1 - beta) * q * (logq - m.log())


@dataclasses.dataclass(frozen=True)
class Truth:
    """Of a call, before token weights and reduction."""

    loss: Tensor  # (...)
    inner: oracle.Truth | None  # of the outcomes; None for "truncate"
    slope: Callable[[Tensor], Tensor]  # from a gradient of `loss` to that of the student's logits (..., V)


def truth(
    student: Tensor,
    teacher: Listed,
    labels: Tensor | None,
    case: Case,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    ce_weight: float = 0.0,
    vocab_size: int | None = None,
) -> Truth:
    """The truth about kd_loss(student, teacher, labels, ...) for logits (..., V), float64."""
    lead, width = student.shape[:-1], student.shape[-1]
    columns = vocab_size or min(width, teacher.vocab_size or width)
    leaf = student.detach().reshape(-1, width).clone().requires_grad_()
    counted = teacher.counted(labels).reshape(-1)
    factor = temperature**2 if temperature_squared else 1.0
    (name, params), inner = case, None
    if teacher.tail == "truncate":
        ids, logp = (x.reshape(-1, x.shape[-1]) for x in (teacher.ids.long(), teacher.logprobs.double()))
        there = (ids >= 0) & (logp > -torch.inf)
        logq = (leaf[:, :columns] / temperature).log_softmax(-1).gather(1, ids.clamp(min=0))
        per_row = {k: v.reshape(-1, 1).double() if isinstance(v, Tensor) else v for k, v in params.items()}
        found = integrand(name, per_row, torch.where(there, logp, 0.0), torch.where(there, logq, 0.0))
        main = factor * torch.where(there & counted[:, None], found, 0.0).sum(1)
        value, main_slope = main.detach(), main
    else:
        z, u = outcomes(leaf, teacher, temperature, columns)
        m, target = oracle.meaning(name, **params), torch.full((len(z),), z.shape[1] - 1)
        ids = torch.where(
            u[:, : teacher.ids.shape[-1]] > -torch.inf, teacher.ids.reshape(-1, teacher.ids.shape[-1]), ABSENT
        )
        if m.argmax:
            target = u[:, : ids.shape[1]].argmax(1)
        elif labels is not None:
            here = ids == labels.reshape(-1, 1)
            target = torch.where(here.any(1), here.int().argmax(1), target)
        target = torch.where(counted, target, IGNORE)
        m = dataclasses.replace(m, argmax=False)
        whole = (*lead, z.shape[1])
        inner = oracle.distill(z.detach().view(whole), u.detach().view(whole), target.view(lead), m)
        value, main_slope = factor * inner.loss.reshape(-1), z
    cross = torch.zeros(len(leaf), dtype=torch.float64)
    if ce_weight and labels is not None:
        own = leaf.logsumexp(1) - leaf.gather(1, labels.reshape(-1, 1).clamp(min=0))[:, 0]
        cross = ce_weight * torch.where(counted, own, 0.0)

    def slope(upstream: Tensor) -> Tensor:
        up = upstream.detach().double().reshape(-1)
        of_main = up if inner is None else factor * inner.gradient(up.view(lead)).reshape(main_slope.shape)
        total = (main_slope * of_main).sum() + (cross * up).sum()
        grad = torch.zeros_like(leaf)
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
        return torch.where(counted[:, None], grad, 0.0).view(student.shape)

    return Truth((value + cross.detach()).view(lead), inner, slope)


def reduced(
    found: Truth,
    counted: Tensor,
    *,
    reduction: str = "mean",
    num_items: Any = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the tokens' losses."""
    labels = torch.where(counted, 0, IGNORE)
    return oracle.reduce(found, labels, reduction=reduction, num_items=num_items, token_weights=token_weights)  # type: ignore[arg-type]


TARGET = ("target_loss", "nontarget_loss", "target_grad", "nontarget_grad", "student_logprob", "teacher_logprob")


def check_outcome_stats(stats: Any, found: Truth, labelled: bool, **bounds: float) -> None:
    """KDStats of the outcomes; what is about a target is NaN where there is none."""
    assert found.inner is not None
    if labelled:
        return check_stats(stats, found.inner, **bounds)
    counted = found.inner.stats["student_lse"] != 0
    for name in TARGET:
        assert torch.equal(getattr(stats, name).isnan().cpu(), counted), name
        assert not getattr(stats, name)[~counted].any()
    blank = dataclasses.replace(
        found.inner, stats=found.inner.stats | {name: getattr(stats, name).double().cpu() for name in TARGET}
    )
    return check_stats(stats, blank, skip=TARGET, **bounds)


def check(
    student: Tensor,
    teacher: Listed,
    labels: Tensor | None,
    case: Case,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Tensor], Tensor] = Tensor.contiguous,
    bound: float = VALUE,
    **options: Any,
) -> None:
    """Value, statistics and gradient of logits (..., V), under a random upstream gradient and in one call."""
    (name, params), place = case, device(backend)
    options = {"reduction": "none", "temperature": teacher.temperature} | options
    student = student.to(dtype).double()
    about = chosen(options, ("temperature", "temperature_squared", "ce_weight", "vocab_size"))
    found = truth(student, teacher, labels, case, **about)
    value, weights = reduced(found, teacher.counted(labels), **chosen(options, REDUCTION))
    given = {"divergence": fusedkd.divergence(name, **moved(params, place)), "backend": backend} | moved(options, place)
    with_stats = teacher.tail != "truncate"
    leaf = student.to(place, dtype, copy=True).requires_grad_()
    sides = prepare(leaf), teacher.given(place), None if labels is None else labels.to(place)
    loss = fusedkd.kd_loss(*sides, return_stats=with_stats, **given)
    if with_stats:
        loss, stats = loss
        argmax = params.get("target_token") == "teacher_argmax"
        check_outcome_stats(stats, found, labels is not None or argmax)
    upstream = torch.randn(value.shape)
    loss.backward(upstream.to(place))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 2e-8 if dtype == torch.float64 else bound
    total = max(bound, MIXED if name == "amid" and dtype != torch.float64 else 0.0)
    assert_close(loss, value, bound, dtype=wide, what="loss")
    wanted = found.slope(upstream.double() * weights)
    allowed = total + rounding(wanted, dtype, cut=cases.cuts(backend))
    assert_close(leaf.grad, wanted, allowed, dtype=dtype, what="gradient")
    both = fusedkd.kd_value_and_grad(prepare(leaf.detach()), *sides[1:], **given)
    assert_close(both[0], value, bound, dtype=wide, what="loss of both")
    wanted = found.slope(torch.ones_like(value) * weights)
    allowed = total + rounding(wanted, dtype, cut=cases.cuts(backend))
    assert_close(both[1], wanted, allowed, dtype=dtype, what="gradient of both")


def check_head(
    student: Side,
    teacher: Listed,
    labels: Tensor | None,
    case: Case,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    bound: float = VALUE + HEAD,
    **options: Any,
) -> None:
    """Value, statistics and gradients of hidden states, weight and bias."""
    (name, params), place = case, device(backend)
    options = {"temperature": teacher.temperature} | options
    student = student.rounded(dtype)
    doubles, operands = student.operands(torch.float64, "cpu"), student.operands(dtype, place)
    product, logits = oracle.head_logits(**doubles, scale=student.scale, softcap=student.softcap)
    about = chosen(options, ("temperature", "temperature_squared", "ce_weight", "vocab_size"))
    found = truth(logits.detach(), teacher, labels, case, **about)
    value, weights = reduced(found, teacher.counted(labels), **chosen(options, REDUCTION))
    with_stats = teacher.tail != "truncate"
    loss = fusedkd.kd_loss(
        student.head(operands),
        teacher.given(place),
        None if labels is None else labels.to(place),
        divergence=fusedkd.divergence(name, **moved(params, place)),
        return_stats=with_stats,
        backend=backend,
        **moved(options, place),
    )
    if with_stats:
        loss, stats = loss
        check_outcome_stats(stats, found, labels is not None, bound=bound, lse=HEAD)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 2e-8 if dtype == torch.float64 else bound
    assert_close(loss, value, bound, dtype=wide, what="loss")
    upstream = torch.randn(value.shape)
    loss.backward(upstream.to(place))
    slope = found.slope(upstream.double() * weights)
    (slope,) = torch.autograd.grad(logits, product, slope, retain_graph=True)
    wanted = torch.autograd.grad(product, list(doubles.values()), slope, retain_graph=True)
    coarse = torch.autograd.grad(product, list(doubles.values()), slope.to(dtype).double())
    for key, exactly, coarsely in zip(doubles, wanted, coarse, strict=True):
        half = 1.2 * relative(coarsely.to(dtype), exactly)  # what rounding dZ and the output costs by itself
        assert_close(operands[key].grad, exactly, bound + half, dtype=dtype, what=f"gradient of {key}")
