"""fusedkd.compat.liger against Liger's formulas, rewritten here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HEAD, VALUE, each, near, random_labels, side, unrelated
from compare import assert_close, rounding
from originals import DTYPES, check, gkd_summands
from test_memory import measure
from torch import Tensor

import fusedkd.compat.liger as shim
from fusedkd.compat import _pointwise

BETAS = (0.0, 0.3, 1.0)
V = 97
LEADS = ((12,), (3, 4))


def reduced(summands: Tensor, labels: Tensor | None, reduction: str, ignore_index: int = -100) -> Tensor:
    """Liger's reductions of (..., V), over the rows that count."""
    counted = torch.ones(summands.shape[:-1], dtype=torch.bool) if labels is None else labels != ignore_index
    if reduction == "none":
        return torch.where(counted.unsqueeze(-1), summands, 0)
    items = {"batchmean": counted.sum(), "mean": counted.sum() * summands.shape[-1], "sum": 1}[reduction]
    return summands[counted].sum() / items


def labels_of(lead: tuple[int, ...], ignore_index: int = -100) -> Tensor:
    """Labels of which some are ignored."""
    labels = random_labels(lead, V)
    return torch.where(labels == -100, ignore_index, labels)


def heads(lead: tuple[int, ...], bias: bool = False, vocabulary: int = V) -> dict[str, Tensor]:
    """Hidden states and output layers of two models of different widths."""
    inputs = {}
    for name, width in (("student", 16), ("teacher", 24)):
        head = side(lead, vocabulary, width, bias=bias)
        inputs |= {f"{name}_input": head.hidden, f"{name}_weight": head.weight}
        if head.bias is not None:
            inputs[f"{name}_bias"] = head.bias
    return inputs


def logits_of(inputs: dict[str, Tensor], name: str) -> Tensor:
    return inputs[f"{name}_input"] @ inputs[f"{name}_weight"].T + inputs.get(f"{name}_bias", 0)


def gkd(inputs: dict[str, Tensor], beta: float, temperature: float) -> Tensor:
    """Summands of the divergence of two heads."""
    logq, logp = ((logits_of(inputs, name) / temperature).log_softmax(-1) for name in ("student", "teacher"))
    return gkd_summands(logp, logq, beta)


@each("dtype", DTYPES)
@each("labelled", [True, False])
@each("beta", BETAS)
@each("lead", LEADS)
def test_fused_linear_jsd(lead: tuple[int, ...], beta: float, labelled: bool, dtype: torch.dtype) -> None:
    labels = labels_of(lead, 5) if labelled else None
    module = shim.LigerFusedLinearJSD(beta, ignore_index=5, temperature=1.7)

    def formula(**inputs: Tensor) -> Tensor:
        return reduced(gkd(inputs, beta, 1.7), labels, "batchmean", 5)

    def ours(**inputs: Tensor) -> Tensor:
        return module(**inputs, shift_labels=labels)

    check(ours, formula, heads(lead), ("student_input", "student_weight"), dtype)


MIXES = ((0.5, 0.5), (0.0, 1.0), (0.3, 1.4), (1.0, 0.0))


@pytest.mark.smoke
@each("dtype", DTYPES)
@each("mix", MIXES)
@each("beta", BETAS)
@each("bias", [True, False])
def test_fused_linear_jsd_loss(bias: bool, beta: float, mix: tuple[float, float], dtype: torch.dtype) -> None:
    lead = LEADS[bias]
    labels = labels_of(lead)
    options = dict(weight_hard_loss=mix[0], weight_soft_loss=mix[1], beta=beta, temperature=1.7, compiled=False)
    module = shim.LigerFusedLinearJSDLoss(**options)

    def losses(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        soft = reduced(gkd(inputs, beta, 1.7), labels, "batchmean")
        logits = logits_of(inputs, "student")
        return soft, torch.nn.functional.cross_entropy(logits.view(-1, V), labels.view(-1))

    def formula(**inputs: Tensor) -> Tensor:
        soft, hard = losses(inputs)
        return mix[0] * hard + mix[1] * soft

    def ours(**inputs: Tensor) -> Tensor:
        return module(**inputs, true_labels=labels)

    learns = ("student_input", "student_weight", "student_bias")[: 3 if bias else 2]
    inputs = heads(lead, bias)
    check(ours, formula, inputs, learns, dtype)
    both = shim.LigerFusedLinearJSDLoss(**options, return_soft_hard_loss=True)
    given = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    returned = both(**given, true_labels=labels)
    exact = {name: x.detach().double() for name, x in given.items()}
    for name, part, wanted in zip(("loss", "soft", "hard"), returned, (formula(**exact), *losses(exact)), strict=True):
        assert_close(part, wanted, 2 * VALUE, what=name)
        assert part.requires_grad == (name == "loss")


@each("bias", [torch.float32, torch.bfloat16])
def test_a_bias_in_another_dtype(bias: torch.dtype) -> None:
    """A float32 bias keeps its digits beside bfloat16 operands, and the other way round is no error, as in Liger."""
    dtype = torch.float32 if bias == torch.bfloat16 else torch.bfloat16
    kinds = {name: bias if name.endswith("bias") else dtype for name in heads((12,), True)}
    exact = {name: (3 * x).to(kinds[name]).double() for name, x in heads((12,), True).items()}
    given = {name: x.to(kinds[name]) for name, x in exact.items()}
    learns = ("student_input", "student_weight", "student_bias")
    for inputs in (exact, given):
        for name in learns:
            inputs[name].requires_grad_()
    truth = reduced(gkd(exact, 0.5, 1.0), None, "batchmean")
    loss = shim.LigerFusedLinearJSDLoss(0.0, 1.0)(**given, true_labels=torch.zeros(12, dtype=torch.int64))
    truth.backward()
    loss.backward()
    assert_close(loss, truth.detach(), VALUE + HEAD)
    for name in learns:
        wanted = exact[name].grad
        assert wanted is not None
        bound = VALUE + HEAD + rounding(wanted, kinds[name])
        assert_close(given[name].grad, wanted, bound, dtype=kinds[name], what=name)


def test_flat_labels_of_three_dimensional_states() -> None:
    """As trainers that flatten their labels only."""
    inputs = {name: x.float() for name, x in heads((3, 4)).items()}
    labels = labels_of((3, 4))
    for module in (shim.LigerFusedLinearJSD(), shim.LigerFusedLinearJSDLoss()):
        assert torch.equal(module(*inputs.values(), labels), module(*inputs.values(), labels.view(-1)))


@each("build", [shim.LigerFusedLinearJSD, shim.LigerFusedLinearJSDLoss])
def test_three_dimensional_states_are_chunked(build: Callable[[], Any]) -> None:
    """Liger's chunked loss makes the whole (B·T, V) logits of them, because it cuts B only."""
    lead, vocabulary = (2, 1024), 3000
    inputs = {name: x.float().requires_grad_() for name, x in heads(lead, vocabulary=vocabulary).items()}
    labels = labels_of(lead)
    memory = measure(lambda: build()(*inputs.values(), labels).backward())
    assert max(memory.sizes) < 4 * lead[0] * lead[1] * vocabulary


@each("beta", BETAS)
def test_padded_vocabulary(beta: float) -> None:
    """Two equal models, one with 64 more rows that are no tokens: Liger gives the student a logit of 0 for each."""
    hidden, weight = torch.randn(12, 16), torch.randn(V, 16) / 4
    dead = torch.cat((weight, torch.randn(64, 16) / 4))
    assert shim.LigerFusedLinearJSDLoss(0.0, 1.0, beta)(hidden, weight, hidden, dead, labels_of((12,))) == 0
    padded = torch.cat((hidden @ weight.T, torch.zeros(12, 64)), -1)
    summands = gkd_summands((hidden @ dead.T).log_softmax(-1), padded.log_softmax(-1), beta)
    assert reduced(summands, None, "batchmean") > 1e-3


@each("build", [shim.LigerFusedLinearJSD, shim.LigerFusedLinearJSDLoss, lambda: shim.LigerFusedLinearJSDLoss(1.0, 0.0)])
def test_nothing_counted_is_zero(build: Callable[[], Any]) -> None:
    """Liger's LigerFusedLinearJSD divides by zero there."""
    inputs = {name: x.float().requires_grad_() for name, x in heads((12,)).items()}
    loss = build()(*inputs.values(), torch.full((12,), -100))
    loss.backward()
    assert loss == 0
    for name in ("student_input", "student_weight"):
        gradient = inputs[name].grad
        assert gradient is not None
        assert not gradient.any()


@each("labelled", [True, False])
@each("beta", BETAS)
@each("lead", LEADS)
def test_jsd(lead: tuple[int, ...], beta: float, labelled: bool) -> None:
    """From logits, because the gradient to log-probabilities is another one and the same behind their log_softmax."""
    labels = labels_of(lead, 5) if labelled else None
    module = shim.LigerJSD(beta, ignore_index=5)
    rows = unrelated(*lead, V)

    def ours(q: Tensor, p: Tensor) -> Tensor:
        return module(q.log_softmax(-1), p.log_softmax(-1), labels)

    def formula(q: Tensor, p: Tensor) -> Tensor:
        return reduced(gkd_summands(p.log_softmax(-1), q.log_softmax(-1), beta), labels, "batchmean", 5)

    check(ours, formula, {"q": rows.student, "p": rows.teacher}, ("q",), torch.float32)


def gathered(lead: tuple[int, ...], k: int = 32) -> dict[str, Tensor]:
    """Log-probabilities of the k columns that the teacher likes best: rows of less than 1 each, and not alike."""
    rows = unrelated(*lead, V, std=1.0)
    q, p = (x.log_softmax(-1) for x in (rows.student, rows.teacher))
    best = p.topk(k).indices
    return {"q": q.gather(-1, best), "p": p.gather(-1, best)}


@each("dtype", DTYPES)
@each("labelled", [True, False])
@each("beta", BETAS)
@each("lead", LEADS)
def test_jsd_of_some_columns(lead: tuple[int, ...], beta: float, labelled: bool, dtype: torch.dtype) -> None:
    """Value and gradient of log-probabilities as they are, whose rows do not sum to 1."""
    labels = labels_of(lead, 5) if labelled else None

    def formula(q: Tensor, p: Tensor) -> Tensor:
        return reduced(gkd_summands(p, q, beta), labels, "batchmean", 5)

    check(lambda q, p: shim.liger_jsd(q, p, labels, beta, 5), formula, gathered(lead), ("q",), dtype)


@each("distance", [1e-1, 1e-3])
@each("beta", [0.3, 0.5])
def test_jsd_of_models_that_agree(beta: float, distance: float) -> None:
    """What the two halves have in common does not cancel, so the divergence from the mixture is accurate where tiny."""
    rows = near(distance, 12, V)
    q, p = (x.log_softmax(-1).float() for x in (rows.student, rows.teacher))
    truth = gkd_summands(p.double(), q.double(), beta).sum() / 12
    assert_close(shim.liger_jsd(q, p, beta=beta), truth, VALUE)


@each("beta", BETAS)
def test_jsd_without_some_columns(beta: float) -> None:
    """A column that the teacher lacks is left out; one that only the student lacks is q = 0, infinite in KL(p‖q)."""
    rows = unrelated(12, V)
    q, p = (x.log_softmax(-1).float() for x in (rows.student, rows.teacher))
    p[:, 5] = -torch.inf
    leaf = q.clone().requires_grad_()
    kept = torch.arange(V) != 5
    shim.liger_jsd(leaf, p, beta=beta).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[:, 5].any()
    assert_close(shim.liger_jsd(q, p, beta=beta), gkd_summands(p.double(), q.double(), beta)[:, kept].sum() / 12, VALUE)
    q[:, 9] = -torch.inf
    loss = shim.liger_jsd(q, p, beta=beta)
    assert loss == torch.inf if beta == 0 else loss.isfinite()


@each("beta", BETAS)
def test_probabilities_that_underflow(beta: float) -> None:
    """A probability below float32 in both models, where the logarithm of their mixture was NaN (Liger's issue 1397)."""
    q, p = torch.randn(2, 12, V).unbind()
    q[:, 3], p[:, 3] = -200, -200
    q.requires_grad_()
    loss = shim.liger_jsd(q.log_softmax(-1), p.log_softmax(-1), beta=beta)
    loss.backward()
    exact = [x.detach().double().log_softmax(-1) for x in (p, q)]
    assert_close(loss, gkd_summands(*exact, beta).sum() / 12, VALUE)
    assert q.grad is not None
    assert q.grad.isfinite().all()


def weights_of(lead: tuple[int, ...], kind: str) -> Tensor:
    """Targets: probabilities, some of which are 0, or a share of the mass that differs from row to row."""
    p = (3 * torch.randn(*lead, V, dtype=torch.float64)).softmax(-1)
    if kind == "zeros":
        return torch.where(torch.rand(p.shape) < 0.3, 0.0, p)
    return p * torch.rand(*lead, 1, dtype=torch.float64) if kind == "part" else p


def kl_to(logq: Tensor, p: Tensor, eps: float) -> Tensor:
    """Summands of KL(p‖q) as Liger writes them."""
    return p * (p.clamp_min(eps).log() - logq)


REDUCTIONS = ("batchmean", "mean", "sum", "none")


@each("dtype", DTYPES)
@each("eps", [1e-10, 1e-3])
@each("kind", ["all", "zeros", "part"])
@each("reduction", REDUCTIONS)
def test_kl_div(reduction: str, kind: str, eps: float, dtype: torch.dtype) -> None:
    lead = LEADS[eps < 1e-5]
    module = shim.LigerKLDIVLoss(eps, reduction=reduction)

    def ours(y: Tensor, p: Tensor) -> Tensor:
        return module(y.float().log_softmax(-1), p)

    def formula(y: Tensor, p: Tensor) -> Tensor:
        return reduced(kl_to(y.log_softmax(-1), p, eps), None, reduction)

    check(ours, formula, {"y": unrelated(*lead, V).student, "p": weights_of(lead, kind)}, ("y",), dtype)


@each("dtype", DTYPES)
@each("reduction", REDUCTIONS)
def test_kl_div_of_logarithms(reduction: str, dtype: torch.dtype) -> None:
    def ours(y: Tensor, p: Tensor) -> Tensor:
        return shim.LigerKLDIVLoss(reduction=reduction, log_target=True)(y.float().log_softmax(-1), p)

    def formula(y: Tensor, p: Tensor) -> Tensor:
        return reduced(p.exp() * (p - y.log_softmax(-1)), None, reduction)

    check(ours, formula, {"y": unrelated(12, V).student, "p": weights_of((12,), "part").log()}, ("y",), dtype)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@each("dtype", DTYPES)
@each("log_target", [True, False])
@each("reduction", REDUCTIONS)
def test_kl_div_of_some_columns(reduction: str, log_target: bool, dtype: torch.dtype) -> None:
    """Sparse distillation: what nn.KLDivLoss gives, and -target as the gradient of the input."""
    inputs = gathered((12,))
    if not log_target:
        inputs["p"] = inputs["p"].exp()
    ours = shim.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    original = torch.nn.KLDivLoss(reduction=reduction, log_target=log_target)
    check(lambda q, p: ours(q, p), lambda q, p: original(q, p), inputs, ("q",), dtype)


@each("labelled", [True, False])
@each("dtype", DTYPES)
@each("kind", ["all", "zeros", "part"])
@each("reduction", REDUCTIONS[:3])
def test_fused_linear_kl_div(reduction: str, kind: str, dtype: torch.dtype, labelled: bool) -> None:
    lead = LEADS[labelled]
    labels = labels_of(lead, 5) if labelled else None
    module = shim.LigerFusedLinearKLDivLoss(reduction, ignore_index=5, temperature=1.7, eps=1e-3)
    inputs = {name: x for name, x in heads(lead).items() if name.startswith("student")}

    def ours(**inputs: Tensor) -> Tensor:
        return module(**inputs, shift_labels=labels)

    def formula(target: Tensor, **inputs: Tensor) -> Tensor:
        logq = (logits_of(inputs, "student") / 1.7).log_softmax(-1)
        return reduced(kl_to(logq, target, 1e-3), labels, reduction, 5)

    learns = ("student_input", "student_weight")
    check(ours, formula, inputs | {"target": weights_of(lead, kind)}, learns, dtype)


@each("dtype", DTYPES)
@each("labelled", [True, False])
@each("reduction", REDUCTIONS)
@each("lead", LEADS)
def test_tvd(lead: tuple[int, ...], reduction: str, labelled: bool, dtype: torch.dtype) -> None:
    labels = labels_of(lead, 5) if labelled else None
    module = shim.LigerTVDLoss(reduction, ignore_index=5)
    inputs = {"p": weights_of(lead, "all"), "q": weights_of(lead, "zeros")}

    def formula(p: Tensor, q: Tensor) -> Tensor:
        return reduced(0.5 * (p - q).abs(), labels, reduction, 5)

    check(lambda p, q: module(p, q, labels), formula, inputs, ("p",), dtype)


@each("reduction", REDUCTIONS)
def test_ignored_rows_are_not_read(reduction: str) -> None:
    labels = labels_of((12,))
    hidden, p, q = torch.randn(12, 16), *torch.rand(2, 12, V).softmax(-1)
    for x in (hidden, p, q):
        x[labels == -100] = torch.nan
    calls: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: shim.liger_tvd(x, q, labels, reduction), p),
        (lambda x: shim.liger_jsd(x, q.log(), labels), p.log()),
    ]
    if reduction != "none":
        weight = torch.randn(V, 16)
        calls.append((lambda x: shim.liger_fused_linear_kl_div(x, weight, q, labels, reduction), hidden))
    for loss, leaf in calls:
        leaf.requires_grad_()
        value = loss(leaf)
        value.sum().backward()
        assert value.isfinite().all()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad[labels != -100].any()
        assert not leaf.grad[labels == -100].any()


@each("loss", [shim.liger_tvd, shim.liger_kl_div, shim.liger_jsd])
def test_in_chunks(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, and the same numbers."""
    p, q = torch.rand(2, 12, V).unbind()
    p.requires_grad_()
    whole = loss(p, q)
    (slope,) = torch.autograd.grad(whole, p)
    monkeypatch.setattr(_pointwise, "CHUNK", 5 * V)
    found = loss(p, q)
    assert torch.equal(found, whole)
    assert torch.equal(torch.autograd.grad(found, p)[0], slope)


@pytest.mark.unpoisoned
@each("loss", [shim.liger_tvd, shim.liger_kl_div, shim.liger_jsd])
def test_compiled(loss: Callable[..., Tensor]) -> None:
    """One graph, and the same numbers but for another form of the mixture's logarithm."""
    torch.compiler.reset()
    p, q = torch.rand(2, 12, V).unbind()
    p.requires_grad_()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(p, q)
        found.append((value.detach(), *torch.autograd.grad(value, p)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=VALUE, atol=0)


def test_the_defaults_of_the_functions() -> None:
    """Means over every entry, where the classes have others."""
    p, q = torch.rand(2, 12, V).softmax(-1).unbind()
    assert torch.equal(shim.liger_tvd(p, q), shim.LigerTVDLoss("mean")(p, q))
    assert torch.equal(shim.liger_kl_div(p.log(), q), shim.LigerKLDIVLoss(reduction="mean")(p.log(), q))
    assert torch.equal(shim.LigerTVDLoss()(p, q), shim.liger_tvd(p, q, reduction="batchmean"))


@each("build", [shim.LigerFusedLinearJSD, shim.LigerFusedLinearKLDivLoss])
def test_an_unsupported_accumulator(build: Callable[..., Any]) -> None:
    """The weight's gradient is summed in float32; asking for that is fine."""
    build(accum_dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"does not support accum_dtype=torch\.bfloat16"):
        build(accum_dtype=torch.bfloat16)


@each("name", ["size_average", "reduce"])
def test_deprecated_arguments(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"liger_kl_div does not support {name}=False"):
        shim.liger_kl_div(torch.zeros(2, 3), torch.zeros(2, 3), **{name: False})


def test_bad_input() -> None:
    p = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"reduction must be one of 'batchmean', 'mean', 'sum', got 'none'"):
        shim.LigerFusedLinearKLDivLoss("none")
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'token'"):
        shim.LigerTVDLoss("token")
    with pytest.raises(ValueError, match=r"target must have the shape \(4, 3\), got \(4, 2\)"):
        shim.liger_tvd(p, p[:, :2])
    with pytest.raises(ValueError, match=r"target must have the shape \(4, 3\), got \(4, 2\)"):
        shim.liger_kl_div(p, p[:, :2])
    with pytest.raises(ValueError, match=r"target must have the shape \(4, 7\), got \(4, 3\)"):
        shim.liger_fused_linear_kl_div(p, torch.zeros(7, 3), p)
    with pytest.raises(ValueError, match=r"shift_labels must have the leading shape \(4,\)"):
        shim.liger_tvd(p, p, torch.zeros(5, dtype=torch.int64))
