"""compat.kdflow beside the formulas of KDFlow's losses in float64, and its memory beside that of KDFlow's chunks."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cases import HEAD, IGNORE, VALUE, cuts, device, each, unrelated
from compare import assert_close, rounding
from test_memory import measure
from torch import Tensor
from torch.nn import Linear, functional

import fusedkd
from fusedkd.compat import kdflow

SHAPE = (3, 7, 67)
DTYPES = (torch.float32, torch.bfloat16)
REDUCTIONS = ("none", "mean", "sum")
GONE = -torch.inf

Formula = Callable[..., Tensor]  # log p and log q (..., V) -> (...)


def kl(lp: Tensor, lq: Tensor) -> Tensor:
    return functional.kl_div(lq, lp.exp(), reduction="none").sum(-1)


def rkl(lp: Tensor, lq: Tensor) -> Tensor:
    return (lq.exp() * (lq - lp)).sum(-1)


def jsd(lp: Tensor, lq: Tensor, jsd_beta: float = 0.5) -> Tensor:
    """The student has the weight."""
    lm = (jsd_beta * lq.exp() + (1 - jsd_beta) * lp.exp()).log()
    return jsd_beta * rkl(lm, lq) + (1 - jsd_beta) * rkl(lm, lp)


def skl(lp: Tensor, lq: Tensor, skew_lambda: float = 0.1) -> Tensor:
    return rkl((skew_lambda * lp.exp() + (1 - skew_lambda) * lq.exp()).log(), lp)


def srkl(lp: Tensor, lq: Tensor, skew_lambda: float = 0.1) -> Tensor:
    return rkl((skew_lambda * lq.exp() + (1 - skew_lambda) * lp.exp()).log(), lq)


def akl(lp: Tensor, lq: Tensor, adaptive_kl_alpha: float = 0.5) -> Tensor:
    """The tail is what the teacher's least likely tokens have in sum, as far as that is at most alpha."""
    shape, (p, q) = lp.shape[:-1], (x.detach().exp().flatten(0, -2) for x in (lp, lq))
    share = []
    for p_row, q_row in zip(p, q, strict=True):
        order = sorted(range(len(p_row)), key=lambda i, row=p_row: (float(row[i]), i))
        mass, head, tail = 0.0, 0.0, 0.0
        for i in order:
            mass += float(p_row[i])
            gap = abs(float(p_row[i] - q_row[i]))
            tail, head = (tail + gap, head) if mass <= adaptive_kl_alpha else (tail, head + gap)
        share.append(head / (head + tail))
    of_forward = torch.tensor(share, dtype=lp.dtype).view(shape)
    return of_forward * rkl(lq, lp) + (1 - of_forward) * rkl(lp, lq)


def tvd(lp: Tensor, lq: Tensor) -> Tensor:
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (kl, rkl, jsd, skl, srkl, akl, tvd)}
PARAMETERS = {"jsd": "jsd_beta", "skl": "skew_lambda", "srkl": "skew_lambda", "akl": "adaptive_kl_alpha"}
CASES: list[tuple[str, dict[str, float]]] = [(name, {}) for name in FORMULAS]
CASES += [("jsd", {"jsd_beta": 0.1}), ("jsd", {"jsd_beta": 0.9}), ("skl", {"skew_lambda": 0.6})]
CASES += [("srkl", {"skew_lambda": 0.6}), ("akl", {"adaptive_kl_alpha": 0.2}), ("akl", {"adaptive_kl_alpha": 0.0})]


def rows(name: str, student: Tensor, teacher: Tensor, temperature: float, **given: Any) -> Tensor:
    """One number per token, of the columns that both have."""
    columns = min(student.shape[-1], teacher.shape[-1])
    lp, lq = ((x[..., :columns] / temperature).log_softmax(-1) for x in (teacher, student))
    return FORMULAS[name](lp, lq, **given)


def reduced(loss: Tensor, reduction: str, mask: Tensor | None = None, columns: int = 1) -> Tensor:
    """KDFlow's reductions of a loss per token, over what a mask counts; its kl has a mean over the columns too."""
    if mask is not None:
        loss = loss * mask
    if reduction == "none":
        return loss
    count = loss.numel() if mask is None else int(mask.sum())
    return loss.sum() / (count * columns if reduction == "mean" else 1)


def run(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """A loss and its gradients for upstream gradients that differ from token to token."""
    upstream = 1 + torch.arange(loss.numel(), dtype=torch.float64).view(loss.shape) % 3
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))]


def compare(ours: list[Tensor], truth: list[Tensor], dtype: torch.dtype, bound: float, *, cut: bool = False) -> None:
    assert_close(ours[0], truth[0], bound)
    for found, wanted in zip(ours[1:], truth[1:], strict=True):
        assert_close(found, wanted, bound + rounding(wanted, dtype, cut=cut), dtype=dtype, what="gradient")


def untied(logits: Tensor) -> Tensor:
    """No two of a row are equal: equal ones would be split by their order."""
    ranks = torch.stack([torch.randperm(logits.shape[-1]) for _ in range(logits.shape[:-1].numel())])
    return ((ranks.view(logits.shape) - logits.shape[-1] / 2) / 8).double()


@pytest.mark.smoke
@each("dtype", DTYPES)
@each("reduction", REDUCTIONS)
@each("ignored", [True, False])
@each("case", CASES)
def test_logits(case: tuple[str, dict[str, float]], ignored: bool, reduction: str, dtype: torch.dtype) -> None:
    """Value and gradient of each loss by KDFlow's own formula, with a smaller teacher, at a temperature."""
    name, given = case
    of = unrelated(*SHAPE, dtype=dtype, std=3.0)
    teacher = untied(of.teacher[..., :61])
    assert of.labels is not None
    mask = (of.labels != IGNORE) if ignored else None
    leaf = of.student.clone().requires_grad_()
    truth = reduced(rows(name, leaf, teacher, 2.0, **given), reduction, mask, 61 if name == "kl" else 1)
    given = {**given, "labels": of.labels} if ignored else given
    student = of.student.to(dtype).requires_grad_()
    ours = kdflow.LOSS_DICT[name](student, teacher.to(dtype), 2.0, reduction=reduction, **given)
    compare(run(ours, [student]), run(truth, [leaf]), dtype, VALUE)


@each("name", FORMULAS)
def test_in_triton(name: str) -> None:
    """The same through the kernels."""
    of = unrelated(2, 3, 67, ignored=False)
    place = device("triton")
    leaf, student = of.student.clone().requires_grad_(), of.student.to(place, torch.float32).requires_grad_()
    ours = kdflow.LOSS_DICT[name](student, of.teacher.to(place, torch.float32), backend="triton")
    truth = run(rows(name, leaf, of.teacher, 1.0), [leaf])
    compare([x.cpu() for x in run(ours, [student])], truth, torch.float32, VALUE, cut=cuts("triton"))


class Model(NamedTuple):
    """Hidden states and layers of both sides, float64 but exact in the dtype of the call."""

    hidden: Tensor
    head: Linear
    teacher_hidden: Tensor
    teacher_head: Linear

    def to(self, dtype: torch.dtype) -> Model:
        """Leaves of another dtype."""
        heads = []
        for head in (self.head, self.teacher_head):
            layer = Linear(head.in_features, head.out_features, head.bias is not None, dtype=dtype)
            layer.load_state_dict(head.state_dict())
            heads.append(layer)
        hidden = self.hidden.detach().to(dtype).requires_grad_()
        return Model(hidden, heads[0], self.teacher_hidden.detach().to(dtype), heads[1])

    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of both sides, whole."""
        return self.head(self.hidden), self.teacher_head(self.teacher_hidden).detach()


def model(dtype: torch.dtype, n: int = 21, columns: int = 67, teacher_columns: int = 61, bias: bool = True) -> Model:
    """Heads whose logits have a standard deviation of about 3."""
    heads = [Linear(d, v, bias, dtype=dtype) for d, v in ((8, columns), (12, teacher_columns))]
    hidden = [torch.randn(n, head.in_features, dtype=dtype) for head in heads]
    for head in heads:
        head.weight.data = torch.randn(head.weight.shape).to(dtype)
    return Model(hidden[0], heads[0], hidden[1], heads[1]).to(torch.float64)


@each("dtype", DTYPES)
@each("reduction", REDUCTIONS)
@each("ignored", [True, False])
@each("case", CASES)
def test_chunked_loss(case: tuple[str, dict[str, float]], ignored: bool, reduction: str, dtype: torch.dtype) -> None:
    """Hidden states and layers, the hyper-parameters bound as build_loss_fn does; "mean" is over tokens for all."""
    name, given = case
    exact = model(dtype)
    ours = exact.to(dtype)
    label = torch.randint(67, (21,))
    label[2::5] = IGNORE
    truth = rows(name, *exact.logits(), temperature=2.0, **given)
    truth = run(reduced(truth, reduction, label != IGNORE if ignored else None), exact.leaves())
    loss = kdflow.chunked_loss(
        ours.hidden,
        ours.head,
        functools.partial(kdflow.LOSS_DICT[name], temperature=2.0, **given),
        teacher_hidden=ours.teacher_hidden,
        teacher_head=ours.teacher_head,
        label=label if ignored else None,
        chunk_size=4,
        reduction=reduction,
    )
    compare(run(loss, ours.leaves()), truth, dtype, VALUE + HEAD)


@each("columns", [(61, 67), (67, 67)])
@each("name", FORMULAS)
def test_a_larger_teacher(name: str, columns: tuple[int, int]) -> None:
    """Cut to the student's vocabulary."""
    exact = model(torch.float32, 21, *columns, bias=False)
    ours = exact.to(torch.float32)
    loss = kdflow.chunked_loss(
        ours.hidden, ours.head, kdflow.LOSS_DICT[name], None, ours.teacher_hidden, ours.teacher_head
    )
    truth = rows(name, *exact.logits(), temperature=1.0)
    compare(run(loss, ours.leaves()), run(truth, exact.leaves()), torch.float32, VALUE + HEAD)


@each("name", FORMULAS)
def test_logits_functions(name: str) -> None:
    """Chosen columns of both sides, as simple_ctkd compares vocabularies that differ."""
    exact = model(torch.float32)
    ours = exact.to(torch.float32)
    mine, theirs = torch.randperm(67)[:40], torch.randperm(61)[:40]

    def student_logits(hidden: Tensor, skip: bool = True) -> Tensor:
        assert not skip
        return ours.head(hidden)[:, mine]

    loss = kdflow.chunked_loss(
        ours.hidden,
        ours.head,
        kdflow.LOSS_DICT[name],
        student_logits_fn=student_logits,
        teacher_logits_fn=lambda start, end: ours.teacher_head(ours.teacher_hidden[start:end])[:, theirs],
        reduction="sum",
    )
    student, teacher = exact.logits()
    truth = rows(name, student[:, mine], teacher[:, theirs], temperature=1.0).sum()
    compare(run(loss, ours.leaves()), run(truth, exact.leaves()), torch.float32, VALUE + HEAD)
    assert ours.teacher_head.weight.grad is None


@each("reduction", REDUCTIONS)
@each("ignored", [True, False])
def test_cross_entropy(ignored: bool, reduction: str) -> None:
    """With a label and no teacher."""
    exact = model(torch.float32)
    ours = exact.to(torch.float32)
    label = torch.randint(67, (21,))
    if ignored:
        label[::4] = IGNORE
    truth = -exact.logits()[0].log_softmax(-1).gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    truth = run(reduced(truth, reduction, label != IGNORE), exact.leaves())
    for loss_fn in (kdflow.compute_cross_entropy, functools.partial(kdflow.compute_cross_entropy, backend="torch")):
        loss = kdflow.chunked_loss(ours.hidden, ours.head, loss_fn, label=label, reduction=reduction)
        compare(run(loss, ours.leaves()), truth, torch.float32, VALUE + HEAD)


def seen(**given: Any) -> dict[str, tuple[Any, Any]]:
    """A metric of everything that metrics are given."""
    student, teacher, loss = given["student_logits"], given["teacher_logits"], given["chunk_loss"]
    assert len(student) == len(teacher) == len(loss) == given["end"] - given["start"]
    assert not torch.is_grad_enabled()
    agree = student.argmax(-1) == teacher.argmax(-1)
    logq = student.float().log_softmax(-1)
    return {
        "entropy": (-(logq.exp() * logq).sum(), len(student)),
        "agreement": (agree.sum(), len(student)),
        "loss where they agree": (loss[agree].sum(), agree.sum()),
        "chunks": (1, 1),
    }


@each("reduction", REDUCTIONS)
@each("name", ["kl", "akl"])
def test_metrics(name: str, reduction: str) -> None:
    """Sums and counts over the chunks, beside the same loss as without them."""
    ours = model(torch.float32).to(torch.float32)
    call = functools.partial(
        kdflow.chunked_loss, ours.hidden, ours.head, kdflow.LOSS_DICT[name], teacher_hidden=ours.teacher_hidden,
        teacher_head=ours.teacher_head, chunk_size=4, reduction=reduction,
    )  # fmt: skip
    plain, (loss, found) = run(call(), ours.leaves()), call(metric_fns=[seen], return_metrics=True)
    torch.testing.assert_close(run(loss, ours.leaves()), plain, rtol=1e-5, atol=1e-6)
    student, teacher = (x[:, :61] for x in ours.logits())
    with torch.no_grad():
        whole = seen(
            student_logits=student, teacher_logits=teacher, start=0, end=21,
            chunk_loss=rows(name, student, teacher, 1.0),
        )  # fmt: skip
    assert found.pop("chunks") == (6, 6)
    for key, (total, count) in found.items():
        torch.testing.assert_close(total, whole[key][0], rtol=1e-5, atol=1e-6)
        assert count == whole[key][1]
    assert call(metric_fns=seen, return_metrics=True)[1].keys() == whole.keys()
    assert call(return_metrics=True)[1] == call(metric_fns=[], return_metrics=True)[1] == {}
    with pytest.raises(TypeError, match=r"metric_fns must return .* got int for 'x'"):
        call(metric_fns=lambda **given: {"x": 3})


def test_kdflows_own_functions_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of kdflow.loss stands for the one here; one that is only called alike does not."""
    ours = model(torch.float32).to(torch.float32)

    def compute_tvd(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("KDFlow's own was called")

    def call(loss_fn: Any) -> Tensor:
        return kdflow.chunked_loss(
            ours.hidden, ours.head, loss_fn, teacher_hidden=ours.teacher_hidden, teacher_head=ours.teacher_head
        )

    with pytest.raises(NotImplementedError, match="loss_fn compute_tvd is none of"):
        call(compute_tvd)
    monkeypatch.setitem(sys.modules, "kdflow.loss.tvd", ModuleType("kdflow.loss.tvd"))
    compute_tvd.__module__ = "kdflow.loss.tvd"
    assert torch.equal(call(functools.partial(compute_tvd, temperature=2.0, reduction="mean")), call(
        functools.partial(kdflow.compute_tvd, temperature=2.0)
    ))  # fmt: skip


@each("name", FORMULAS)
def test_signatures(name: str) -> None:
    """KDFlow's order and defaults; the parameters of other losses change nothing."""
    own = {PARAMETERS[name]: {"akl": 0.5, "jsd": 0.5}.get(name, 0.1)} if name in PARAMETERS else {}
    parameters = inspect.signature(kdflow.LOSS_DICT[name]).parameters
    defaults = {"temperature": 1.0, **own, "reduction": "none"}
    assert list(parameters) == ["student_logits", "teacher_logits", *defaults, "labels", "kwargs"]
    assert {key: parameters[key].default for key in defaults} == defaults
    student, teacher = torch.randn(2, 4, 9)
    others = {"jsd_beta": 0.5, "skew_lambda": 0.1, "adaptive_kl_alpha": 0.5}
    loss = kdflow.LOSS_DICT[name]
    assert torch.equal(loss(student, teacher, **others), loss(student, teacher))
    assert list(inspect.signature(kdflow.chunked_loss).parameters)[2:9] == [
        "loss_fn", "student_logits_fn", "teacher_hidden", "teacher_head", "teacher_logits_fn", "label", "chunk_size",
    ]  # fmt: skip


def test_the_crossing_token_is_of_the_head() -> None:
    """By hand: the second of four tokens crosses alpha, 0.5. `divergence("akl")` leaves it in the tail unless told."""
    p, q = torch.tensor([[0.45, 0.3, 0.15, 0.1]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    ours = float(kdflow.compute_adaptive_kl_div(q.log(), p.log()))
    head, tail = 0.35 + 0.1, 0.15 + 0.3
    forward, reverse = float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())
    assert ours == pytest.approx((head * forward + tail * reverse) / (head + tail), rel=1e-6)
    assert ours != pytest.approx(float(fusedkd.kd_loss(q.log(), p.log(), divergence="akl")), rel=1e-3)


def test_akl_at_its_ends() -> None:
    """Equal sides are 0 and not 0/0, everything is tail at 1, and equal probabilities are in the head together."""
    student, teacher = torch.randn(2, 4, 9)
    assert not kdflow.compute_adaptive_kl_div(teacher, teacher).any()
    tail = kdflow.compute_adaptive_kl_div(student, teacher, adaptive_kl_alpha=1.0)
    torch.testing.assert_close(tail, kdflow.compute_reverse_kl_div(student, teacher))
    ties = torch.zeros(1, 4)
    ours = kdflow.compute_adaptive_kl_div(student[:1, :4], ties, adaptive_kl_alpha=0.6)
    torch.testing.assert_close(ours, kdflow.compute_kl_div(student[:1, :4], ties))


@each("name", FORMULAS)
def test_a_column_that_the_teacher_forbids(name: str) -> None:
    """KDFlow's value where it is finite; its limit in jsd and skl; without the column in rkl and akl."""
    of = unrelated(4, 16, std=2.0, ignored=False)
    of.teacher[:, 3] = GONE
    leaf, student = of.student.clone().requires_grad_(), of.student.float().requires_grad_()
    there = [i for i in range(16) if i != 3]
    if name in ("rkl", "akl"):
        truth = rows(name, leaf[:, there], of.teacher[:, there], 1.0)
    else:
        truth = rows(name, leaf, of.teacher.clamp(min=-700), 1.0)
    ours = run(kdflow.LOSS_DICT[name](student, of.teacher.float()), [student])
    compare(ours, run(truth, [leaf]), torch.float32, VALUE)


def test_nothing_to_count() -> None:
    """0 with a graph, in the chunked loss too, also of no tokens."""
    ours = model(torch.float32).to(torch.float32)
    for label, hidden in ((torch.full((21,), IGNORE), ours.hidden), (None, ours.hidden[:0])):
        theirs = ours.teacher_hidden[: len(hidden)]
        for name in FORMULAS:
            loss = kdflow.chunked_loss(
                hidden, ours.head, kdflow.LOSS_DICT[name], None, theirs, ours.teacher_head, label=label,
                chunk_size=len(hidden), reduction="mean",
            )  # fmt: skip
            assert not any(x.any() for x in run(loss, ours.leaves()))
    with pytest.raises(ValueError, match="chunk_size must be > 0"):
        kdflow.chunked_loss(
            ours.hidden, ours.head, kdflow.compute_tvd, None, ours.teacher_hidden, ours.teacher_head, chunk_size=0
        )


def test_arguments() -> None:
    """What is wrong is named."""
    ours = model(torch.float32).to(torch.float32)
    student, teacher = torch.randn(2, 4, 9)

    def wrong(error: type[Exception], match: str, call: Callable[..., Any], *args: Any, **given: Any) -> None:
        with pytest.raises(error, match=match):
            call(*args, **given)

    for loss in kdflow.LOSS_DICT.values():
        wrong(TypeError, "student_logits must be", loss, [1.0], teacher)
        wrong(TypeError, "teacher_logits must be", loss, student, None)
        wrong(ValueError, "teacher_logits must have the leading shape", loss, student, teacher[:3])
        wrong(ValueError, "temperature must be > 0", loss, student, teacher, 0.0)
        wrong(ValueError, "reduction must be one of", loss, student, teacher, reduction="batchmean")
        wrong(ValueError, "labels must have the leading shape", loss, student, teacher, labels=torch.zeros(3).long())
        wrong(TypeError, "labels must be int64", loss, student, teacher, labels=torch.zeros(4))
        wrong(NotImplementedError, "does not support hr_topk=5", loss, student, teacher, hr_topk=5)
    for value in (0, 1, -0.5):
        wrong(ValueError, r"jsd_beta must lie in \(0, 1\)", kdflow.compute_js_div, student, teacher, jsd_beta=value)
        for loss in (kdflow.compute_skewed_kl_div, kdflow.compute_skewed_rkl_div):
            wrong(ValueError, r"skew_lambda must lie in \(0, 1\)", loss, student, teacher, skew_lambda=value)
    akl_loss = kdflow.compute_adaptive_kl_div
    wrong(ValueError, r"adaptive_kl_alpha must lie in \[0, 1\]", akl_loss, student, teacher, adaptive_kl_alpha=1.5)
    wrong(TypeError, "memory_budget must be an int", akl_loss, student, teacher, memory_budget="1 GB")

    call = functools.partial(kdflow.chunked_loss, ours.hidden, ours.head)
    beside = {"teacher_hidden": ours.teacher_hidden, "teacher_head": ours.teacher_head}
    one, label = kdflow.compute_kl_div, torch.zeros(21).long()
    wrong(ValueError, "are all None", call, one)
    wrong(ValueError, "reduction must be one of", call, one, **beside, reduction="batchmean")
    wrong(ValueError, "loss_fn compute_kl_div compares with a teacher", call, one, label=label)
    wrong(ValueError, "loss_fn compute_cross_entropy compares with label", call, kdflow.compute_cross_entropy, **beside)
    wrong(TypeError, "loss_fn must be a function", call, "kl", **beside)
    wrong(NotImplementedError, "positional arguments", call, functools.partial(one, student), **beside)
    wrong(TypeError, "teacher_head must be a torch.nn.Linear", call, one, teacher_hidden=ours.teacher_hidden)
    wrong(ValueError, r"teacher_hidden must have shape \(n, H\)", call, one, **{**beside, "teacher_head": ours.head})
    wrong(NotImplementedError, "does not support hr_topk=5", call, one, **beside, hr_topk=5)
    wrong(ValueError, "must have the leading shape", call, one, **beside, label=label[:5])
    adapted = SimpleNamespace(weight=ours.head.weight, base_layer=ours.head)
    wrong(NotImplementedError, "student_head has an adapter", kdflow.chunked_loss, ours.hidden, adapted, one, **beside)
    sharded = SimpleNamespace(weight=ours.head.weight.detach().as_subclass(type("DTensor", (Tensor,), {})))
    wrong(TypeError, "student_head.weight is a DTensor", kdflow.chunked_loss, ours.hidden, sharded, one, **beside)
    wrong(TypeError, "student_hidden must be", kdflow.chunked_loss, None, ours.head, one, **beside)
    given = {"teacher_logits_fn": lambda start, end: None}
    wrong(TypeError, "the result of teacher_logits_fn", call, one, **given)


def chunks_as_kdflow_has_them(of: Model, chunk_size: int) -> Tensor:
    """Its chunked forward KL: float32 logarithms and probabilities of each chunk, as autograd keeps them."""
    total = of.hidden.new_zeros(())
    for start in range(0, len(of.hidden), chunk_size):
        at = slice(start, start + chunk_size)
        with torch.no_grad():
            p = functional.linear(of.teacher_hidden[at], of.teacher_head.weight).softmax(-1)
        total = total + functional.kl_div(of.head(of.hidden[at]).log_softmax(-1), p, reduction="sum")
    return total


@each("chunk_size", [64, 1024])
def test_the_memory_of_chunks(chunk_size: int) -> None:
    """Chunks in the graph save nothing: at least two float32 matrices of n·V are kept. Here nothing of n·V is made."""
    n, columns = 1024, 12_000
    of = model(torch.float32, n, columns, columns, bias=False).to(torch.float32)
    matrix = n * columns * 4

    def theirs() -> Any:
        return torch.autograd.grad(chunks_as_kdflow_has_them(of, chunk_size), of.leaves())

    def ours(loss_fn: Callable[..., Tensor]) -> Any:
        loss = kdflow.chunked_loss(
            of.hidden, of.head, loss_fn, None, of.teacher_hidden, of.teacher_head, chunk_size=chunk_size,
            reduction="sum",
        )  # fmt: skip
        return torch.autograd.grad(loss, of.leaves())

    there = measure(theirs).peak
    assert there >= 2 * matrix
    # What a chunk is plays no part here, so that the slow search is seen once.
    for loss_fn in (kdflow.compute_kl_div, kdflow.compute_adaptive_kl_div)[: 2 if chunk_size == n else 1]:
        here = measure(functools.partial(ours, loss_fn))
        assert max(here.sizes) < matrix / 4
        assert here.peak < matrix
