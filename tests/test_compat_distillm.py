"""The drop-ins for the authors' repositories against the formulas of their code, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import IGNORE, MIXED, VALUE, Rows, cuts, device, each, unrelated
from compare import assert_close, rounding
from torch import Tensor

import fusedkd
from fusedkd.compat import abkd, amid, distillm, distillm2, minillm, taid

B, T, V = 2, 5, 67
DTYPES = [torch.float32, torch.bfloat16]
Formula = Callable[[Tensor, Tensor], Tensor]  # log p and log q (..., V) -> (...)


def forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return -(lp.exp() * lq).sum(-1)


def reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    return (lq.exp() * (lq - lp)).sum(-1)


def mixed(*weights: float) -> Formula:
    """Both forward and reverse KL as the repositories have them: a cross-entropy and a divergence."""
    return lambda lp, lq: weights[0] * forward_kl(lp, lq) + weights[1] * reverse_kl(lp, lq)


def js(lam: float) -> Formula:
    def formula(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        lm = ((1 - lam) * p + lam * q).log()
        return (lam * q * (lq - lm) + (1 - lam) * p * (lp - lm)).sum(-1)

    return formula


def tv(lp: Tensor, lq: Tensor) -> Tensor:
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


def skewed_forward(lam: float) -> Formula:
    return lambda lp, lq: -(lp.exp() * (lam * lp.exp() + (1 - lam) * lq.exp()).log()).sum(-1)


def skewed_reverse(lam: float) -> Formula:
    return lambda lp, lq: (lq.exp() * (lq - ((1 - lam) * lp.exp() + lam * lq.exp()).log())).sum(-1)


def ab(a: float, b: float, power: int) -> Formula:
    """The α-β divergence; `power` of the exponent that divides at the limits: 1 in ABKD, 2 in AMiD."""

    def formula(lp: Tensor, lq: Tensor) -> Tensor:
        p, q = lp.exp(), lq.exp()
        if a == 0 and b == 0:
            return 0.5 * (q.log() - p.log()).square().sum(-1)
        if a == 0:
            return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**power
        if b == 0:
            return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**power
        if a + b == 0:
            return ((q**a / p**a).log() + p**a / q**a - 1).sum(-1) / a**power
        c = a + b
        return -(p**a * q**b - a / c * p**c - b / c * q**c).sum(-1) / (a * b)

    return formula


def akl(lp: Tensor, lq: Tensor) -> Tensor:
    """The authors' sort; the cumulated mass up to 0.5 and the first token are the head."""
    p, q = lp.exp(), lq.detach().exp()
    p, order = p.sort(-1, descending=True)
    tail = p.cumsum(-1) > 0.5
    tail[..., 0] = False
    gap = (p - q.gather(-1, order)).abs()
    share = gap.masked_fill(tail, 0).sum(-1) / gap.sum(-1)
    return share * (forward_kl(lp, lq) + (lp.exp() * lp).sum(-1)) + (1 - share) * reverse_kl(lp, lq)


def bdkd(lp: Tensor, lq: Tensor) -> Tensor:
    """Weight 3 on the side of the larger entropy."""
    h_p, h_q = (-(x.exp() * x).sum(-1).detach() for x in (lp, lq))
    return torch.where(h_p > h_q, 3.0, 1.0) * forward_kl(lp, lq) + torch.where(h_q > h_p, 3.0, 1.0) * reverse_kl(lp, lq)


def alpha_mixture(a: float, lam: float, name: str, order: str) -> Formula:
    """AMiD."""

    def formula(lp: Tensor, lq: Tensor) -> Tensor:
        if lam <= 0 or lam >= 1:
            lr = lq if lam <= 0 else lp
        elif a >= 1:
            lr = (lam * lp + (1 - lam) * lq).log_softmax(-1)
        else:
            parts = math.log(lam) + 0.5 * (1 - a) * lp, math.log(1 - lam) + 0.5 * (1 - a) * lq
            lr = (2 / (1 - a) * torch.logaddexp(*parts)).log_softmax(-1)
        by_name = {"p": lp, "q": lq, "r": lr}
        x, y = (by_name[letter] for letter in order)
        return ab(0.2, 0.7, 2)(x, y) if name == "ab" else (x.exp() * (x - y)).sum(-1)

    return formula


def amid_arguments(a: float, lam: float, name: str, order: str) -> SimpleNamespace:
    return SimpleNamespace(amid_alpha=a, amid_lam=lam, amid_div_name=name, amid_div_order=order)


Original = tuple[Callable[..., Tensor], tuple[Any, ...], Formula]
ORIGINALS: dict[str, Original] = {
    "forward_kl": (distillm.forward_kl, (), forward_kl),
    "reverse_kl": (distillm.reverse_kl, (), reverse_kl),
    "symmetric_kl": (distillm.symmetric_kl, (), mixed(0.1, 0.9)),
    "symmetric_kl(0)": (distillm.symmetric_kl, (0.0,), forward_kl),
    "js_distance": (distillm.js_distance, (), js(0.9)),
    "tv_distance": (distillm.tv_distance, (), tv),
    "skewed_forward_kl": (distillm.skewed_forward_kl, (), skewed_forward(0.1)),
    "skewed_forward_kl(0.4)": (distillm.skewed_forward_kl, (0.4,), skewed_forward(0.4)),
    "skewed_reverse_kl": (distillm.skewed_reverse_kl, (), skewed_reverse(0.1)),
    "abkd symmetric_kl": (abkd.symmetric_kl, (), mixed(0.9, 0.1)),
    "abkd js_distance": (abkd.js_distance, (), js(0.1)),
    "wsd": (abkd.wsd, (), mixed(0.5, 0.5)),
    "bdkd": (abkd.bdkd, (), bdkd),
    "AKL": (lambda s, t, *rest, **options: abkd.AKL(t, s, *rest, **options), (), akl),
    "ab_div": (abkd.ab_div, (0.2, 0.7), ab(0.2, 0.7, 1)),
    "ab_div(1, 0)": (abkd.ab_div, (1, 0), ab(1, 0, 1)),
    "ab_div(0, 1)": (abkd.ab_div, (0, 1), ab(0, 1, 1)),
    "ab_div(0.5, 0)": (abkd.ab_div, (0.5, 0), ab(0.5, 0, 1)),
    "ab_div(0, 0.5)": (abkd.ab_div, (0, 0.5), ab(0, 0.5, 1)),
    "ab_div(0.5, -0.5)": (abkd.ab_div, (0.5, -0.5), ab(0.5, -0.5, 1)),
    "ab_div(0, 0)": (abkd.ab_div, (0, 0), ab(0, 0, 1)),
    "amid ab_div": (amid.ab_div, (0.2, 0.7), ab(0.2, 0.7, 2)),
    "amid ab_div(0.5, 1e-9)": (amid.ab_div, (0.5, 1e-9), ab(0.5, 0, 2)),
    "amid ab_div(0, 0.5)": (amid.ab_div, (0, 0.5), ab(0, 0.5, 2)),
    "amid ab_div(0.5, -0.5)": (amid.ab_div, (0.5, -0.5), ab(0.5, -0.5, 2)),
}
MIXTURES = [(a, 0.5, name, order) for a in (-1.0, 0.5, 1.0) for name in ("fkl", "ab") for order in ("pr", "rq")]
MIXTURES += [(0.5, 0.3, "fkl", "qr"), (3.0, 0.3, "ab", "rp"), (0.5, -1.0, "fkl", "pr"), (0.5, 2.0, "ab", "qr")]
ORIGINALS |= {f"amid{x}": (amid.amid, (amid_arguments(*x),), alpha_mixture(*x)) for x in MIXTURES}


def batch(*shape: int, dtype: torch.dtype = torch.float32, ignored: bool = True, std: float = 2.0) -> Rows:
    return unrelated(*(shape or (B, T, V)), dtype=dtype, std=std, ignored=ignored)


def wanted(rows: Rows, formula: Formula, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over the counted tokens by their number, and its gradient."""
    assert rows.labels is not None
    mask = (rows.labels != IGNORE).double() if mask is None else mask.double()
    leaf = rows.student.clone().requires_grad_()
    loss = (formula(rows.teacher.log_softmax(-1), leaf.log_softmax(-1)) * mask).sum() / mask.sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def check(
    rows: Rows,
    run: Callable[[Tensor, Tensor], Tensor],
    truth: tuple[Tensor, Tensor],
    backend: str = "torch",
    bound: float = VALUE,
) -> None:
    """Value and gradient of a drop-in; the value is float32 whatever the logits are."""
    place = device(backend)
    leaf = rows.student.to(place, rows.dtype).requires_grad_()
    loss = run(leaf, rows.teacher.to(place, rows.dtype))
    loss.backward()
    value, grad = truth
    assert_close(loss, value, VALUE)
    size = bound + rounding(grad, rows.dtype, cut=cuts(backend))
    assert_close(leaf.grad, grad, size, dtype=rows.dtype, what="gradient")


@pytest.mark.smoke
@each("dtype", DTYPES)
@each("ignored", [True, False])
@each("name", ORIGINALS)
def test_originals(name: str, ignored: bool, dtype: torch.dtype) -> None:
    """Value and gradient of every function, by the repository's own formula."""
    shim, arguments, formula = ORIGINALS[name]
    rows = batch(dtype=dtype, ignored=ignored)
    bound = MIXED if name.startswith("amid(") else VALUE
    run = lambda s, t: shim(s, t, {"label": rows.labels}, *arguments)  # noqa: E731
    check(rows, run, wanted(rows, formula), bound=bound)


@each("name", ["forward_kl", "js_distance", "bdkd", "AKL", "ab_div", "amid(0.5, 0.5, 'ab', 'pr')"])
def test_originals_in_triton(name: str) -> None:
    """The same through the kernels, whose backend is one of the further options."""
    shim, arguments, formula = ORIGINALS[name]
    rows = batch(1, 3, V)
    assert rows.labels is not None
    label = rows.labels.to(device("triton"))
    run = lambda s, t: shim(s, t, {"label": label}, *arguments, backend="triton")  # noqa: E731
    check(rows, run, wanted(rows, formula), "triton", MIXED if name.startswith("amid") else VALUE)


def test_alphanet() -> None:
    """The larger of two α-divergences, whichever argument it belongs to."""
    rows = batch()
    larger = max((wanted(rows, ab(a, 1 - a, 1)) for a in (0.2, 0.9)), key=lambda truth: float(truth[0]))
    check(rows, lambda s, t: abkd.alphanet(s, t, {"label": rows.labels}, 0.2, 0.9), larger)
    check(rows, lambda s, t: abkd.alphanet(s, t, {"label": rows.labels}, 0.9, 0.2), larger)


def test_the_two_repositories_differ_at_the_limits() -> None:
    """ABKD's value is α (or β) times AMiD's there."""
    rows = batch()
    label = {"label": rows.labels}
    for a, b, factor in ((0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, -0.5, 0.5), (0.2, 0.7, 1.0), (0.0, 0.0, 1.0)):
        one, other = (f(rows.student.float(), rows.teacher.float(), label, a, b) for f in (abkd.ab_div, amid.ab_div))
        assert torch.allclose(one, factor * other)


@each("name", ["js_distance", "skewed_forward_kl", "skewed_reverse_kl", "ab_div"])
def test_underflow(name: str) -> None:
    """A token at logit -200 in both models: NaN in the original's float32, the formula's float64 value here."""
    shim, arguments, formula = ORIGINALS[name]
    rows = batch()
    rows.student[..., 3] = rows.teacher[..., 3] = -200
    run = lambda s, t: shim(s, t, {"label": rows.labels}, *arguments)  # noqa: E731
    check(rows, run, wanted(rows, formula))
    leaf = rows.student.float().requires_grad_()
    theirs = formula(rows.teacher.float().softmax(-1).log(), leaf.softmax(-1).log()).sum()
    (grad,) = torch.autograd.grad(theirs, leaf)
    assert grad.isnan().any()


@each("name", ["reverse_kl", "js_distance", "skewed_reverse_kl", "AKL", "wsd"])
def test_a_forbidden_token(name: str) -> None:
    """A teacher logit of -inf takes its column out of both sides, with a gradient of exactly 0."""
    shim, arguments, formula = ORIGINALS[name]
    rows = batch()
    narrow = Rows(rows.student[..., :-1], rows.teacher[..., :-1], rows.labels)
    value, grad = wanted(narrow, formula)
    rows.teacher[..., -1] = -torch.inf
    truth = value, torch.cat((grad, torch.zeros(B, T, 1, dtype=torch.float64)), -1)
    check(rows, lambda s, t: shim(s, t, {"label": rows.labels}, *arguments), truth)


def test_a_token_the_student_forbids() -> None:
    """A cross-entropy is infinite there; it is not dropped."""
    rows = batch()
    rows.student[..., -1] = -torch.inf
    loss = distillm.forward_kl(rows.student.float(), rows.teacher.float(), {"label": rows.labels})
    assert loss == torch.inf


@each("name", ORIGINALS)
def test_nothing_counts(name: str) -> None:
    """0 with a graph, where the originals divide 0 by 0."""
    shim, arguments, _ = ORIGINALS[name]
    leaf = torch.randn(B, T, V, requires_grad=True)
    loss = shim(leaf, torch.randn(B, T, V), {"label": torch.full((B, T), IGNORE)}, *arguments)
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


@each("name", ["forward_kl", "tv_distance", "AKL", "bdkd"])
def test_vocabularies_of_different_size(name: str) -> None:
    """The common columns are compared; labels are a mask and may lie beyond them."""
    shim, arguments, formula = ORIGINALS[name]
    rows = batch()
    label = torch.where(rows.labels == IGNORE, IGNORE, V + 5)
    student = torch.cat((rows.student, torch.randn(B, T, 9)), -1).float()
    loss = shim(student, rows.teacher.float(), {"label": label}, *arguments)
    assert_close(loss, wanted(rows, formula)[0], VALUE)


@each("lam", [0.0, 1.0])
def test_js_at_its_ends(lam: float) -> None:
    """The mixture is one of the two: 0, and not a plain KL as GKD's β has it."""
    rows = batch()
    leaf = rows.student.float().requires_grad_()
    for shim in (distillm.js_distance, abkd.js_distance):
        loss = shim(leaf, rows.teacher.float(), {"label": rows.labels}, lam)
        loss.backward()
        assert loss == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_heads() -> None:
    """Hidden states and weights in the place of logits."""
    weight, hidden = torch.randn(V, 8, requires_grad=True), torch.randn(B, T, 8)
    teacher = fusedkd.Head(torch.randn(B, T, 12), torch.randn(V, 12))
    rows = batch()
    for name in ("forward_kl", "skewed_reverse_kl", "bdkd", "AKL", "amid(0.5, 0.5, 'fkl', 'pr')"):
        shim, arguments, _ = ORIGINALS[name]
        grads, losses = [], []
        for student, other in (
            (fusedkd.Head(hidden, weight), teacher),
            (hidden @ weight.T, teacher.hidden @ teacher.weight.T),
        ):
            losses.append(shim(student, other, {"label": rows.labels}, *arguments))
            grads.append(torch.autograd.grad(losses[-1], weight)[0])
        assert_close(losses[0], losses[1].detach().double(), VALUE)
        assert_close(grads[0], grads[1].double(), VALUE)


MISTAKES: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "option": (lambda x, y: distillm.forward_kl(x, x, y, temperature=2.0), NotImplementedError, "temperature"),
    "amid option": (lambda x, y: amid.amid(x, x, y, amid_arguments(0, 0.5, "fkl", "pr"), epoch=3),
                    NotImplementedError, "epoch"),
    "no label": (lambda x, y: distillm.tv_distance(x, x, {"labels": y["label"]}), ValueError, "label"),
    "float label": (lambda x, y: abkd.AKL(x, x, {"label": y["label"].float()}), TypeError, "float32"),
    "lam": (lambda x, y: distillm.js_distance(x, x, y, lam=1.5), ValueError, "lam"),
    "amid name": (lambda x, y: amid.amid(x, x, y, amid_arguments(0, 0.5, "rkl", "pr")), ValueError, "amid_div_name"),
    "amid order": (lambda x, y: amid.amid(x, x, y, amid_arguments(0, 0.5, "fkl", "pq")), ValueError, "order"),
    "loss_type": (lambda x, y: distillm2.get_batch_logps(x, x, y["label"], loss_type=1), TypeError, "loss_type"),
    "logps option": (lambda x, y: distillm2.get_batch_logps(x, x, y["label"], ce_weight=1.0), NotImplementedError,
                     "ce_weight"),
    "parallel": (lambda x, y: minillm.get_log_probs(x, y["label"], y["label"] == 0, model_parallel=True),
                 NotImplementedError, "model_parallel"),
    "TAID heads": (lambda x, y: taid.TAID().compute_loss(fusedkd.Head(x, torch.randn(9, V)), x, y["label"]),
                   NotImplementedError, "logits"),
    "TAID t_end": (lambda x, y: taid.TAID(t_start=0.5, t_end=0.1), ValueError, "t_end"),
}  # fmt: skip


@each("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    """Named, never ignored."""
    call, error, word = MISTAKES[mistake]
    with pytest.raises(error, match=word):
        call(torch.randn(B, T, V), {"label": torch.zeros(B, T, dtype=torch.int64)})


# DistiLLM-2


def per_sequence(
    rows: Rows, kind: str, average: bool, shift: bool, anchors: tuple[float | None, float | None]
) -> tuple[list[Tensor], Tensor]:
    """The four results and the student they hang on; an adapted α is a constant."""
    leaf = rows.student.clone().requires_grad_()
    labels = rows.labels
    assert labels is not None
    student, teacher = leaf, rows.teacher
    if shift:
        labels, student, teacher = labels[:, 1:], student[:, :-1], teacher[:, :-1]
    mask = labels != IGNORE
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)
    own, theirs = (x.gather(-1, labels.clamp(min=0)[..., None])[..., 0] for x in (lq, lp))
    mean = lambda x: (x * mask).sum(-1) / mask.sum(-1)  # noqa: E731
    alphas = [torch.full((B, 1, 1), 0.1, dtype=torch.float64) for _ in anchors]
    gap = (mean(theirs).exp() - mean(own).exp()).detach()
    for i, (anchor, sign) in enumerate(zip(anchors, (1, -1), strict=True)):
        if anchor is not None:
            alphas[i] = (1 - 0.9 * anchor / (sign * gap + 1e-5)).clamp(0.01, 0.1)[:, None, None]
    p, q = lp.exp(), lq.exp()
    if "distillm" in kind:
        one = (p * (lp - (alphas[0] * p + (1 - alphas[0]) * q).log())).sum(-1)
        other = (q * (lq - ((1 - alphas[1]) * p + alphas[1] * q.detach()).log())).sum(-1)
    elif kind == "gkd":
        one = other = js(0.1)(lp, lq)
    else:
        one, other = (p * (lp - lq)).sum(-1), (q * (lp - lq)).sum(-1)
    return [mean(x) if average else (x * mask).sum(-1) for x in (own, theirs, one, other)], leaf


ANCHORS: dict[str, tuple[float | None, float | None]] = {
    "distillm_v2": (None, None),
    "distillm_v1": (None, None),
    "gkd": (None, None),
    "kd": (None, None),
    "adapted": (0.02, -0.03),
    "half adapted": (None, 0.05),
}


@each("dtype", DTYPES)
@each("shape", [(True, False), (False, True)])
@each("kind", ANCHORS)
def test_distillm2(kind: str, shape: tuple[bool, bool], dtype: torch.dtype) -> None:
    """The four tensors of every loss_type, averaged and shifted or neither, each with its own gradient."""
    average, whole = shape
    rows = batch(B, T + 3, V, dtype=dtype)
    anchors, loss_type = ANCHORS[kind], "distillm_v2" if "adapted" in kind else kind
    truths, leaf = per_sequence(rows, loss_type, average, not whole, anchors)
    ours = rows.student.to(dtype).requires_grad_()
    assert rows.labels is not None
    found = distillm2.get_batch_logps(
        ours, rows.teacher.to(dtype), rows.labels, average, IGNORE, whole, loss_type,
        logp_logq=anchors[0], logq_logp=anchors[1],
    )  # fmt: skip
    up = torch.randn(B)
    for mine, truth in zip(found, truths, strict=True):
        assert_close(mine, truth.detach(), VALUE)
        if not truth.requires_grad:
            assert not mine.requires_grad
            continue
        (grad,) = torch.autograd.grad(mine, ours, up, retain_graph=True)
        (wanted_grad,) = torch.autograd.grad(truth, leaf, up.double(), retain_graph=True)
        assert_close(grad, wanted_grad, VALUE + rounding(wanted_grad, dtype), dtype=dtype)


def test_distillm2_reads_anchors_only_for_v2() -> None:
    """distillm_v1 leaves α alone whatever the anchors, as there."""
    rows = batch()
    arguments = (rows.student.float(), rows.teacher.float(), rows.labels)
    for kind, same in (("distillm_v1", True), ("distillm_v2", False)):
        one, other = (
            distillm2.get_batch_logps(*arguments, loss_type=kind, logp_logq=anchor)[2] for anchor in (None, 0.5)
        )
        assert torch.equal(one, other) == same


def test_distillm2_with_a_small_alpha() -> None:
    """The clip from 0.01 to base_alpha gives base_alpha where that is the smaller one."""
    rows = batch()
    arguments = (rows.student.float(), rows.teacher.float(), rows.labels)
    one, other = (
        distillm2.get_batch_logps(*arguments, base_alpha_1=0.005, logp_logq=anchor)[2] for anchor in (None, 0.5)
    )
    assert torch.allclose(one, other)


def test_distillm2_heads_and_an_empty_sequence() -> None:
    """Heads give what their logits give, and a sequence where nothing counts is 0."""
    student, teacher = (fusedkd.Head(torch.randn(B, T, d), torch.randn(V, d)) for d in (8, 12))
    labels = torch.randint(V, (B, T))
    labels[1] = IGNORE
    heads = distillm2.get_batch_logps(student, teacher, labels, True)
    logits = distillm2.get_batch_logps(*(x.hidden @ x.weight.T for x in (student, teacher)), labels, True)
    for one, other in zip(heads, logits, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)
        assert one[1] == 0


# TAID

MASKED: dict[str, tuple[Callable[[], torch.nn.Module], Formula]] = {
    "ForwardKL": (taid.ForwardKL, forward_kl),
    "ReverseKL": (taid.ReverseKL, reverse_kl),
    "JS": (taid.JS, js(0.9)),
    "TVD": (taid.TVD, tv),
    "SkewForwardKL": (taid.SkewForwardKL, skewed_forward(0.1)),
    "SkewReverseKL": (taid.SkewReverseKL, skewed_reverse(0.1)),
}
CONTEXT = SimpleNamespace(
    trainer=SimpleNamespace(global_step=0, estimated_stepping_batches=10), tokenizer=SimpleNamespace(pad_token_id=4)
)


@each("dtype", DTYPES)
@each("kind", ["int", "bool", "weights"])
@each("name", MASKED)
def test_taid_modules(name: str, kind: str, dtype: torch.dtype) -> None:
    """Masks of any kind, keywords as the trainer gives them."""
    make, formula = MASKED[name]
    rows = batch(dtype=dtype)
    assert rows.labels is not None
    mask = {"int": (rows.labels != IGNORE).int(), "bool": rows.labels != IGNORE, "weights": torch.rand(B, T)}[kind]
    run = lambda s, t: make()(lightning_module=CONTEXT, logits=s, teacher_logits=t, mask=mask, batch={})  # noqa: E731
    check(rows, run, wanted(rows, formula, mask))


@each("dtype", DTYPES)
@each("temperature", [1.0, 2.0])
def test_taid_dkd(temperature: float, dtype: torch.dtype) -> None:
    """All positions divide, the padding's target is the pad token, T² in value and gradient."""
    rows = batch(dtype=dtype)
    assert rows.labels is not None
    mask = (torch.rand(B, T) > 0.4).int()
    mask.view(-1)[2] = 1  # a row with label -100 that counts
    labels = torch.cat((torch.zeros(B, 1, dtype=torch.int64), rows.labels), 1)
    target = rows.labels.where(rows.labels != IGNORE, 4)[..., None]
    leaf = rows.student.clone().requires_grad_()
    lq, lp = (x / temperature for x in (leaf, rows.teacher))
    lq, lp = lq.log_softmax(-1), lp.log_softmax(-1)
    q_y, p_y = lq.gather(-1, target).exp(), lp.gather(-1, target).exp()
    binary = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    gone = torch.zeros_like(lq).scatter(-1, target, -torch.inf)
    rest_q, rest_p = (lq + gone).log_softmax(-1), (lp + gone).log_softmax(-1)
    rest = (rest_p.exp() * (rest_p - rest_q).masked_fill(gone < 0, 0)).sum(-1)
    truth = ((0.7 * binary[..., 0] + 1.3 * rest) * mask).sum() * temperature**2 / (B * T)
    (grad,) = torch.autograd.grad(truth, leaf)
    module = taid.DKD(0.7, 1.3, temperature)
    run = lambda s, t: module(CONTEXT, s, t, mask, {"model_inputs": {"labels": labels}})  # noqa: E731
    check(rows, run, (truth.detach(), grad))


def test_taid_dkd_saturated() -> None:
    """A target with all of the student's probability: log 0 in the original, a finite loss and gradient here."""
    labels = torch.tensor([[0, 3, 7]])
    student = torch.zeros(1, 2, 9).scatter(-1, labels[..., 1:, None], 200.0).requires_grad_()
    mask = torch.ones(1, 2)
    loss = taid.DKD()(CONTEXT, student, torch.randn(1, 2, 9), mask, {"model_inputs": {"labels": labels}})
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (1 - student.softmax(-1).amax(-1)).log().isinf().all()


@each("dtype", DTYPES)
@each("t", [0.0, 0.4, 0.9, 1.0])
def test_taid_value(t: float, dtype: torch.dtype) -> None:
    """A cross-entropy with the interpolated teacher, with the gradient of the student alone."""
    rows = batch(dtype=dtype)
    assert rows.labels is not None
    mask = (rows.labels != IGNORE).int()
    module = taid.TAID()
    module.t.fill_(t)
    t = float(module.t)
    truth = wanted(Rows(rows.student, (1 - t) * rows.student + t * rows.teacher, rows.labels, dtype), forward_kl)
    if t == 0:
        leaf = rows.student.to(dtype).requires_grad_()
        loss = module.compute_loss(leaf, rows.teacher.to(dtype), mask)
        loss.backward()
        assert_close(loss, truth[0], VALUE)
        assert leaf.grad is not None
        assert not leaf.grad.any()
        return
    check(rows, lambda s, u: module.compute_loss(s, u, mask), truth)


@each("t", [0.0, 0.5, 1.0])
def test_taid_beside_minus_infinity(t: float) -> None:
    """A token both forbid: the value of the other columns, NaN in the original at both ends."""
    rows = batch()
    assert rows.labels is not None
    module = taid.TAID()
    module.t.fill_(t)
    mask = rows.labels != IGNORE
    held = (1 - t) * rows.student + t * rows.teacher
    narrow = Rows(rows.student[..., 1:], held[..., 1:], rows.labels)
    rows.student[..., 0] = rows.teacher[..., 0] = -torch.inf
    loss = module.compute_loss(rows.student.float(), rows.teacher.float(), mask)
    assert_close(loss, wanted(narrow, forward_kl)[0], VALUE)


@each("disable", [False, True])
def test_taid_schedule(disable: bool) -> None:
    """t, its step and the momentum as the original moves them, across a checkpoint."""
    losses, total = [5 * 0.98**i + 0.3 * math.sin(i) for i in range(12)], 12
    t_start, alpha, beta = 0.2, 0.5, 0.9
    module = taid.TAID(t_start, 1.0, alpha, beta, disable)
    t, momentum, previous = t_start, 0.0, math.inf
    for step, loss in enumerate(losses):
        if step == 5:
            state = module.state_dict()
            assert set(state) == {"t", "prev_loss", "momentum"}
            module = taid.TAID(t_start, 1.0, alpha, beta, disable)
            module.load_state_dict(state)
        delta = module.update_t(torch.tensor(loss), step, total)
        if previous == math.inf:
            previous = loss
            assert delta is None
            assert float(module.t) == pytest.approx(t)
            continue
        momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
        pushed = alpha / (1 + math.exp(-momentum)) * (1 - t)
        line = t_start + (1 - t_start) * step / total
        t, previous = line if disable else min(1.0, max(line, t + pushed)), loss
        assert delta is not None
        assert float(delta) == pytest.approx(pushed, rel=1e-5)
        assert float(module.t) == pytest.approx(t, rel=1e-5)
        assert float(module.momentum) == pytest.approx(momentum, rel=1e-4)


def test_taid_forward() -> None:
    """What the trainer receives; a loss that is not finite does not spoil t."""
    rows = batch()
    assert rows.labels is not None
    module, mask = taid.TAID(), (rows.labels != IGNORE).int()
    given = {"lightning_module": CONTEXT, "teacher_logits": rows.teacher.float(), "mask": mask, "batch": {}}
    first = module(logits=rows.student.float(), **given)
    second = module(logits=rows.student.float(), **given)
    assert set(first) == {"distil_loss", "tiki_t", "delta_t"}
    assert first["delta_t"] is None
    assert second["tiki_t"] == module.t
    assert second["tiki_t"] > first["tiki_t"]
    module.update_t(torch.tensor(torch.nan), 5, 10)
    assert float(module.t) == pytest.approx(0.7)


# MiniLLM


class Teacher:
    """Answers with the logits it was given."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def eval(self) -> None:
        self.evaluated = True

    def __call__(self, *, use_cache: bool, input_ids: Tensor) -> SimpleNamespace:
        assert self.evaluated
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.logits)


@each("dtype", DTYPES)
def test_minillm_distil_loss(dtype: torch.dtype) -> None:
    """The function of finetune.py, model call included."""
    rows = batch(dtype=dtype)
    args = SimpleNamespace(model_parallel=False)
    run = lambda s, t: minillm.get_distil_loss(  # noqa: E731
        args, None, None, Teacher(t), {"input_ids": rows.labels}, {"label": rows.labels}, s
    )
    check(rows, run, wanted(rows, forward_kl))
    args.model_parallel = True
    with pytest.raises(NotImplementedError, match="model_parallel"):
        minillm.get_distil_loss(args, None, None, None, {}, {}, None)


@each("dtype", DTYPES)
def test_minillm_single_step(dtype: torch.dtype) -> None:
    """The method of Loss, with tokens that sampling forbade on both sides."""
    rows = batch(dtype=dtype)
    assert rows.labels is not None
    mask, forbidden = (rows.labels != IGNORE).int(), torch.zeros(B, T, V, dtype=torch.bool)
    forbidden[..., -7:] = True
    value, grad = wanted(Rows(rows.student[..., :-7], rows.teacher[..., :-7], rows.labels), reverse_kl)
    truth = value, torch.cat((grad, torch.zeros(B, T, 7, dtype=torch.float64)), -1)
    stats: dict[str, Any] = {}

    def run(s: Tensor, t: Tensor) -> Tensor:
        trainer = SimpleNamespace(compute_logits_and_log_probs=lambda q, r, inf_mask, base, return_logprobs: t)
        loss = SimpleNamespace(trainer=trainer, args=SimpleNamespace(model_parallel=False))
        masked = s.masked_fill(forbidden, -torch.inf)
        return minillm.single_step_reg(loss, rows.labels, rows.labels, mask, masked, forbidden, stats)

    check(rows, run, truth)
    assert stats["reg_loss"] == pytest.approx(float(value), rel=VALUE)


@each("dtype", DTYPES)
def test_minillm_log_probs(dtype: torch.dtype) -> None:
    """0 where the mask is, -inf for a forbidden token, the gradient of log q elsewhere."""
    rows = batch(dtype=dtype, ignored=False)
    assert rows.labels is not None
    mask = torch.ones(B, T).int()
    mask[:, -1] = 0
    leaf, ours = rows.student.clone().requires_grad_(), rows.student.to(dtype).requires_grad_()
    truth = leaf.log_softmax(-1).gather(-1, rows.labels[..., None])[..., 0] * mask
    found = minillm.get_log_probs(ours, rows.labels, mask)
    up = torch.randn(B, T)
    (truth * up).sum().backward()
    (found * up).sum().backward()
    assert_close(found, truth.detach(), VALUE)
    assert leaf.grad is not None
    assert_close(ours.grad, leaf.grad, VALUE + rounding(leaf.grad, dtype), dtype=dtype)
    forbidden = torch.zeros(B, T, V, dtype=torch.bool).scatter(-1, rows.labels[..., None], True)
    found = minillm.get_log_probs(ours, rows.labels, mask, forbidden)
    assert torch.equal(found == -torch.inf, mask != 0)
    assert not found[:, -1].any()
