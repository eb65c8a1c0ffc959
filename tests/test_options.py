"""Every option of kd_loss, against the oracle where it changes numbers and against the plain call where it must not."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from cases import (
    ALL,
    ARGMAX,
    DEFAULTS,
    DISTINCT,
    FEW,
    IGNORE,
    ODD,
    VALUE,
    Case,
    Rows,
    check_heads,
    check_logits,
    chosen,
    cuts,
    device,
    each,
    named,
    random_labels,
    side,
    unrelated,
)
from compare import assert_close, relative, rounding
from torch import Tensor

import fusedkd

LEAD, VOCABULARY = (5,), 257
KINDS = ("logits", "heads")


def check(kind: str, case: Case, backend: str, **options: Any) -> None:
    """The same check for logits and for heads."""
    if kind == "logits":
        check_logits(unrelated(*LEAD, VOCABULARY), case, backend, **options)
    else:
        labels = random_labels(LEAD, VOCABULARY)
        options = {"reduction": "mean"} | options
        check_heads(side(LEAD, VOCABULARY, 24), side(LEAD, VOCABULARY, 40), labels, case, backend, **options)


@each("case", FEW)
@each("temperature", [0.5, 4.0])
@each("squared", [False, True])
@each("kind", KINDS)
def test_temperature(case: Case, temperature: float, squared: bool, kind: str, backend: str) -> None:
    """Both logits are divided; with the square the gradient keeps its size, and the statistics never have it."""
    check(kind, case, backend, temperature=temperature, temperature_squared=squared)


@each("case", DISTINCT)
@each("options", [{}, {"temperature": 2.0, "temperature_squared": True}])
@each("kind", KINDS)
def test_cross_entropy(case: Case, options: dict[str, Any], kind: str, backend: str) -> None:
    """Added at temperature 1, whatever the temperature of the divergence."""
    check(kind, case, backend, ce_weight=0.7, **options)


@each("options", [{}, {"vocab_size": 129}, {"temperature": 2.0}])
def test_cross_entropy_reads_all_columns(options: dict[str, Any], backend: str) -> None:
    """Its vocabulary is the student's own: columns the teacher lacks or forbids included."""
    student, teacher = (5 * torch.randn(5, v, dtype=torch.float64) for v in (300, 257))
    teacher[:, 1::2] = -torch.inf
    rows = Rows.of(student, teacher, torch.randint(64, (5,)) * 2)
    check_logits(rows, ("rkl", {}), backend, ce_weight=0.3, **options)


def test_cross_entropy_is_torch_s(backend: str) -> None:
    """With nothing else in the loss it is F.cross_entropy, mean and ignored rows included."""
    rows, place = unrelated(*LEAD, VOCABULARY), device(backend)
    leaf = rows.student.to(place, torch.float32).requires_grad_()
    options = {"ce_weight": 1.0, "backend": backend}
    loss = fusedkd.kd_loss(leaf, leaf.detach(), rows.labels.to(place), divergence="fkl", **options)
    loss.backward()
    exact = rows.student.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, rows.labels)
    wanted.backward()
    assert_close(loss, wanted, VALUE)
    assert_close(leaf.grad, exact.grad, VALUE)


@each("reduction", ["mean", "sum", "none"])
@each("ce_weight", [0.0, 0.5])
@each("kind", KINDS)
def test_token_weights(reduction: str, ce_weight: float, kind: str, backend: str) -> None:
    """Weights multiply; a weight of 0 still counts as a token, and a negative one is a weight too."""
    weights = torch.rand(LEAD)
    weights[1], weights[4] = 0.0, -0.5
    check(kind, ("rkl", {}), backend, token_weights=weights, reduction=reduction, ce_weight=ce_weight)


@each("num_items", [5, 2.5, torch.tensor(11), torch.tensor(3.5)])
@each("kind", KINDS)
def test_num_items(num_items: float | Tensor, kind: str, backend: str) -> None:
    """A number or a 0-d tensor replaces the count of tokens."""
    check(kind, ("drkl", {}), backend, num_items=num_items, reduction="mean")


@each("reduction", ["mean", "sum", "none"])
@each("case", FEW)
@each("kind", KINDS)
def test_reductions(reduction: str, case: Case, kind: str, backend: str) -> None:
    """The three reductions of every divergence."""
    check(kind, case, backend, reduction=reduction)


@each("kind", KINDS)
@each("ignore_index", [0, 7, -1])
def test_ignore_index(ignore_index: int, kind: str, backend: str) -> None:
    """Any integer may mean "ignore", a valid token included."""
    labels = torch.arange(LEAD[0]) * 3
    labels[2::3] = ignore_index
    options = {"ignore_index": ignore_index, "ce_weight": 0.5, "reduction": "mean"}
    if kind == "logits":
        rows = unrelated(*LEAD, VOCABULARY)
        check_logits(Rows.of(rows.student, rows.teacher, labels), ("drkl", {}), backend, **options)
    else:
        check_heads(side(LEAD, VOCABULARY, 24), side(LEAD, VOCABULARY, 40), labels, ("drkl", {}), backend, **options)


@each("kind", KINDS)
@each("support", ["teacher", "floor"])
def test_support(kind: str, support: str, backend: str) -> None:
    """Heads can have forbidden columns too: a bias of -inf in the teacher's head."""
    labels = random_labels(LEAD, VOCABULARY // 2) * 2
    labels[labels < 0] = IGNORE
    if kind == "logits":
        rows = unrelated(*LEAD, VOCABULARY)
        rows.teacher[:, 1::2] = -torch.inf
        check_logits(Rows.of(rows.student, rows.teacher, labels), ("rkl", {}), backend, support=support)
    else:
        teacher = side(LEAD, VOCABULARY, 40, bias=True)
        teacher.bias[1::2] = -torch.inf
        options = {"support": support, "reduction": "mean"}
        check_heads(side(LEAD, VOCABULARY, 24), teacher, labels, ("rkl", {}), backend, **options)


PER_TOKEN = {
    "akl": ["mu"],
    "alpha": ["alpha"],
    "amid": ["alpha", "lam"],
    "dkd": ["alpha", "beta"],
    "eopd": ["threshold"],
    "frkl": ["w", "target"],
    "jsd": ["beta", "nontarget"],
    "skl": ["lam"],
    "srkl": ["lam"],
    "renyi": ["alpha", "nontarget"],
    "taid": ["t"],
    "tsallis": ["alpha"],
    "jeffreys": ["target"],
    "drkl": ["gamma"],
    "ab": ["alpha", "beta", "target", "nontarget"],
    "decoupled": ["target", "nontarget"],
    "fkl": ["target", "nontarget"],
}


@each("case", [(name, {key: lead}) for name, keys in PER_TOKEN.items() for key in keys for lead in (LEAD, ())])
@each("kind", KINDS)
def test_parameters_per_token(case: tuple[str, dict[str, tuple[int, ...]]], kind: str, backend: str) -> None:
    """A parameter may be a tensor: one number per token, or a 0-d tensor."""
    name, shapes = case
    check(kind, (name, {key: 0.25 + 0.5 * torch.rand(lead) for key, lead in shapes.items()}), backend)


@each("case", [("drkl", ARGMAX), ("jsd", {"target": 2.0, **ARGMAX}), ("taid", {"base": "dkd", **ARGMAX})])
def test_teacher_argmax(case: tuple[str, dict[str, Any]], backend: str) -> None:
    """The teacher's likeliest token as the target: without labels, beside a cross-entropy, the first of equals."""
    rows = unrelated(5, 300)
    check_logits(Rows.of(rows.student, rows.teacher, None), case, backend)
    check_logits(rows, case, backend, ce_weight=0.5)
    ties = Rows.of(rows.student, (rows.teacher / 4).round(), None)
    check_logits(ties, case, backend)
    check_heads(side(LEAD, VOCABULARY, 24), side(LEAD, VOCABULARY, 40), None, case, backend, reduction="none")


def test_ends_per_token(backend: str) -> None:
    """Rows where a parameter stands on an end of its domain beside rows where it does not."""
    ends = torch.tensor([0.0, 1.0, 0.3, 0.0, 1.0])
    for name, key in (("jsd", "beta"), ("skl", "lam"), ("frkl", "w"), ("taid", "t"), ("akl", "mu")):
        check_logits(unrelated(5, 65, std=2.0), (name, {key: ends}), backend)


def test_parameters_broadcast(backend: str) -> None:
    """A parameter of shape (batch, 1) is one per sequence."""
    params = {"alpha": torch.rand(3, 1), "beta": 0.3 + torch.rand(1, 2)}
    check_logits(unrelated(3, 2, 65), ("ab", params), backend)


def test_parameters_in_limits_per_token(backend: str) -> None:
    """Rows at a pole of α-β beside rows that are not."""
    params = {"alpha": torch.tensor([0.0, 0.2, 0.0, 0.5, 1.0]), "beta": torch.tensor([0.7, 0.0, 0.0, -0.5, 0.0])}
    check_logits(unrelated(5, 65, std=2.0), ("ab", params), backend)


@each("case", [case for case in ALL if case[0] != "amid"])
def test_stats_add_up(case: Case, backend: str) -> None:
    """loss = target · target_loss + nontarget · nontarget_loss, and the gradient at the label likewise."""
    name, params = case
    rows, place = unrelated(*LEAD, VOCABULARY), device(backend)
    made = fusedkd.divergence(name, **params)
    leaf = rows.student.to(place, torch.float32).requires_grad_()
    options = {"temperature": 2.0, "reduction": "sum", "return_stats": True, "backend": backend}
    loss, stats = fusedkd.kd_loss(leaf, rows.teacher.to(leaf), rows.labels.to(place), divergence=made, **options)
    loss.backward()
    terms = made.form.target * stats.target_loss.double() + made.form.nontarget * stats.nontarget_loss.double()
    assert relative(stats.loss.cpu(), terms.cpu()) < 1e-6
    assert relative(loss.detach().cpu(), terms.sum().cpu()) < 1e-6
    counted = rows.labels != IGNORE
    at_label = leaf.grad.cpu().gather(1, rows.labels.clamp(min=0)[:, None])[:, 0]
    split = (made.form.target * stats.target_grad + made.form.nontarget * stats.nontarget_grad).double().cpu() / 2.0
    assert relative(at_label[counted], split[counted]) < VALUE


def plain(
    kind: str, case: Case, backend: str, dtype: torch.dtype = torch.float32, columns: int = VOCABULARY, **options: Any
) -> list[Tensor]:
    """Loss, per-token statistics and gradients of one fixed problem."""
    torch.manual_seed(1)
    name, params = case
    place = device(backend)
    leaves = [(5 * torch.randn(*LEAD, columns)).to(place, dtype).requires_grad_()]
    student, teacher = leaves[0], (5 * torch.randn(*LEAD, columns)).to(place, dtype)
    if kind in ("heads", "head-logits"):
        made = side(LEAD, columns, 24, bias=True)
        operands = made.operands(dtype, place)
        operands["bias"] = made.operands(torch.float32, place)["bias"]  # as autocast leaves it
        leaves, student = list(operands.values()), fusedkd.Head(**operands)
    if kind in ("heads", "logits-head"):
        teacher = fusedkd.Head(**{k: x.detach() for k, x in side(LEAD, columns, 40).operands(dtype, place).items()})
    made = fusedkd.divergence(name, **params)
    labels = random_labels(LEAD, columns).to(place)
    loss, stats = fusedkd.kd_loss(
        student, teacher, labels, divergence=made, backend=backend, return_stats=True, **options
    )
    loss.sum().backward()
    return [loss.detach(), stats.loss, *(leaf.grad for leaf in leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], bound: float = 1e-6) -> None:
    """The same numbers up to the order of a sum."""
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other.double().cpu(), bound, dtype=other.dtype)


@each("case", [("rkl", {}), ("drkl", {})])
@each("reduction", ["mean", "none"])
@each("drop_ignored", [True, False])
def test_drop_ignored(case: Case, reduction: str, drop_ignored: bool, backend: str) -> None:
    """Dropping ignored rows saves work and changes nothing."""
    options = {"reduction": reduction, "ce_weight": 0.5}
    assert_same(
        plain("heads", case, backend, drop_ignored=drop_ignored, **options), plain("heads", case, backend, **options)
    )


@each("reduction", ["mean", "none"])
def test_schedule(reduction: str, backend: str) -> None:
    """The chunked schedule by name is the default's."""
    case = ("rkl", {})
    chunked = plain("heads", case, backend, schedule="chunked", reduction=reduction)
    assert_same(chunked, plain("heads", case, backend, reduction=reduction))


@each("kind", ["heads", "head-logits", "logits-head"])
@each("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("backend", "dtype", "drop_ignored"),
    [
        *(("torch", dtype, drop) for dtype in (torch.float32, torch.bfloat16) for drop in (True, False)),
        ("triton", torch.bfloat16, True),
    ],
    ids=named,
)
def test_memory_budget(kind: str, reduction: str, drop_ignored: bool, dtype: torch.dtype, backend: str) -> None:
    """An impossible budget names the least; the least (one row at a time) changes nothing, a byte less is refused."""
    case = ("drkl", {})
    # Few columns: the least of a long vocabulary is one column at a time, many launches in the interpreter.
    options = {"reduction": reduction, "drop_ignored": drop_ignored, "dtype": dtype, "columns": 33}
    with pytest.raises(ValueError, match="memory_budget") as caught:
        plain(kind, case, backend, memory_budget=1, **options)
    least = max(int(re.sub("[_,]", "", number)) for number in re.findall(r"\d[\d_,]*", str(caught.value)))
    # The least may be the other schedule's, which rounds the gradient to bfloat16 once where this one does it twice.
    rounded = VALUE if dtype == torch.float32 else 2**-8
    ours, usual = plain(kind, case, backend, memory_budget=least, **options), plain(kind, case, backend, **options)
    assert_same(ours, usual, rounded)
    with pytest.raises(ValueError, match="memory_budget"):
        plain(kind, case, backend, memory_budget=least - 1, **options)


@each("case", [("fkl", {}), ("drkl", {})])
@each("reduction", ["mean", "none"])
def test_logits_dtype(case: Case, reduction: str, backend: str) -> None:
    """bfloat16 logits are a few per cent off, no more and, to show that the option does something, no less."""
    fast = plain("heads", case, backend, torch.bfloat16, logits_dtype=torch.bfloat16, reduction=reduction)
    exact = plain("heads", case, backend, torch.bfloat16, logits_dtype=torch.float32, reduction=reduction)
    errors = [relative(one.cpu(), other.double().cpu()) for one, other in zip(fast, exact, strict=True)]
    assert max(errors) < 0.05
    assert max(errors) > 1e-4
    assert_same(exact, plain("heads", case, backend, torch.bfloat16, reduction=reduction))


PLAIN: dict[str, Any] = {}
ADDED = {"reduction": "sum", "temperature": 2.0, "ce_weight": 0.3}


@each("case", DEFAULTS)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [(PLAIN, torch.float32), (ADDED, torch.float32), ({"reduction": "none"}, torch.bfloat16)],
    ids=["plain", "added", "none-bfloat16"],
)
def test_kd_value_and_grad(case: Case, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """The gradient of the sum of the result, with no graph and without touching the inputs."""
    name, params = case
    rows, place = unrelated(*LEAD, VOCABULARY, dtype=dtype), device(backend)
    student, teacher = (x.to(place, dtype) for x in (rows.student, rows.teacher))
    kept = student.clone(), teacher.clone()
    made, labels = fusedkd.divergence(name, **params), rows.labels.to(place)
    loss, grad = fusedkd.kd_value_and_grad(student, teacher, labels, divergence=made, backend=backend, **options)
    assert not loss.requires_grad
    assert not grad.requires_grad
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])
    leaf = student.clone().requires_grad_()
    again = fusedkd.kd_loss(leaf, teacher, labels, divergence=made, backend=backend, **options)
    again.sum().backward()
    assert_same([loss, grad], [again.detach(), leaf.grad], 1e-6 if dtype == torch.float32 else 1e-3)
    truth = oracle.distill(
        rows.student,
        rows.teacher,
        rows.labels,
        oracle.meaning(name, **params),
        **chosen(options, ("temperature", "ce_weight")),
    )
    value, weights = oracle.reduce(truth, rows.labels, **chosen(options, ("reduction",)))
    assert_close(loss, value, VALUE)
    wanted = truth.gradient(weights)
    assert_close(grad, wanted, VALUE + rounding(wanted, dtype, cut=cuts(backend)), dtype=dtype)


@each("case", DEFAULTS)
def test_module(case: Case, backend: str) -> None:
    """DistillationLoss holds options and calls kd_loss; it has no parameters of its own."""
    name, params = case
    options = {"temperature": 2.0, "ce_weight": 0.2, "reduction": "sum", "backend": backend}
    module = fusedkd.DistillationLoss(divergence=fusedkd.divergence(name, **params), **options)
    assert not list(module.parameters())
    rows, place = unrelated(*LEAD, VOCABULARY), device(backend)
    ours, theirs = (rows.student.to(place, torch.float32).requires_grad_() for _ in range(2))
    teacher, labels = rows.teacher.to(ours.detach()), rows.labels.to(place)
    made = fusedkd.divergence(name, **params)
    losses = module(ours, teacher, labels), fusedkd.kd_loss(theirs, teacher, labels, divergence=made, **options)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(ours.grad, theirs.grad)


@each("kind", KINDS)
def test_autocast(kind: str, backend: str) -> None:
    """Under autocast the operands of a Head are cast, logits are not; gradients keep the dtype of the leaves."""
    place = device(backend)
    with torch.autocast(place, dtype=torch.bfloat16):
        inside = plain(kind, ("rkl", {}), backend)
    outside = plain(kind, ("rkl", {}), backend, torch.float32 if kind == "logits" else torch.bfloat16)
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        bound = 1e-6 if other.dtype == torch.float32 else 2**-9  # half a unit of bfloat16's last place
        assert_close(one, other.double().cpu(), bound)


@each("kind", KINDS)
def test_nothing_counted(kind: str, backend: str) -> None:
    """The mean over no tokens is 0 with a graph, with num_items and without."""
    place = device(backend)
    labels = torch.full(LEAD, IGNORE, device=place)
    for options in ({}, {"num_items": 4}, {"ce_weight": 1.0}):
        operands = side(LEAD, VOCABULARY, 24).operands(torch.float32, place)
        logits = torch.randn(*LEAD, VOCABULARY, device=place, requires_grad=True)
        student = logits if kind == "logits" else fusedkd.Head(**operands)
        teacher = torch.randn(*LEAD, VOCABULARY, device=place)
        loss = fusedkd.kd_loss(student, teacher, labels, divergence="drkl", backend=backend, **options)
        assert loss.shape == ()
        assert loss.item() == 0
        assert loss.requires_grad
        loss.backward()
        for leaf in [logits] if kind == "logits" else operands.values():
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_teacher_gets_no_gradient(backend: str) -> None:
    """A teacher that requires grad is detached, as logits and as a head."""
    place = device(backend)
    student = torch.randn(4, 65, device=place, requires_grad=True)
    logits = torch.randn(4, 65, device=place, requires_grad=True)
    operands = side((4,), 65, 8, bias=True).operands(torch.float32, place)
    for teacher in (logits, fusedkd.Head(**operands)):
        fusedkd.kd_loss(student, teacher, backend=backend).backward()
    assert all(x.grad is None for x in (logits, *operands.values()))
    assert student.grad.any()


def test_no_grad_and_inference_mode(backend: str) -> None:
    """Evaluation: the value without a graph, for logits and heads."""
    place = device(backend)
    rows = unrelated(4, 65, ignored=False)
    truth = oracle.distill(rows.student, rows.teacher, rows.labels, oracle.meaning("rkl"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            student = rows.student.to(place, torch.float32)
            loss = fusedkd.kd_loss(student, rows.teacher.to(student), divergence="rkl", backend=backend)
            assert_close(loss, truth.loss.mean(), VALUE)
            assert not loss.requires_grad


def test_divergence_by_name_and_object(backend: str) -> None:
    """A name, an object, and the name of the base inside an object mean the same."""
    rows, place = unrelated(4, ODD), device(backend)
    student, teacher = (x.to(place, torch.float32) for x in (rows.student, rows.teacher))
    labels = rows.labels.to(place)
    base = fusedkd.divergence("ab", alpha=0.3, beta=0.4)
    twins = [
        ("rkl", fusedkd.divergence("rkl")),
        (fusedkd.divergence("drkl", gamma=0.5), fusedkd.divergence("decoupled", base="rkl", nontarget=0.5)),
        (fusedkd.divergence("taid", base=base), fusedkd.divergence("taid", base="ab", alpha=0.3, beta=0.4)),
        (fusedkd.divergence("dkd"), fusedkd.divergence("decoupled", base="fkl", nontarget=8.0)),
        (fusedkd.divergence("alpha", alpha=0.3), fusedkd.divergence("ab", alpha=0.3, beta=0.7)),
        (fusedkd.divergence("decoupled", base=base), fusedkd.divergence("decoupled", base="ab", alpha=0.3, beta=0.4)),
    ]
    for pair in twins:
        losses = [fusedkd.kd_loss(student, teacher, labels, divergence=d, backend=backend) for d in pair]
        assert torch.equal(*losses), named((str(pair), {}))
