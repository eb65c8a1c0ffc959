"""A teacher known by its likeliest tokens: value, gradient and statistics of K + 1 outcomes against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL, DEFAULTS, DISTINCT, IGNORE, MIXED, VALUE, Case, Side, each, named, opcheck, random_labels, side
from compare import assert_close
from outcomes import ABSENT, Listed, check, check_head, likeliest, truth

import fusedkd
from fusedkd import backends, checks
from fusedkd.kernels.language import interpreted
from fusedkd.schedules import planner

N, V, K = 6, 131, 9
TAILS = ("bucket", "renormalize")
BOTH = [*((case, "torch") for case in DISTINCT), *((DISTINCT[i], "triton") for i in (1, 4))]


def problem(
    tail: str = "bucket", tau: float = 1.0, lead: tuple[int, ...] = (N,), k: int = K, columns: int = V, **options: Any
) -> tuple[torch.Tensor, Listed, torch.Tensor]:
    """Student's logits, the teacher, labels: listed in every second row, anywhere in the others, some ignored."""
    student, teacher = 3 * torch.randn(2, *lead, columns, dtype=torch.float64)
    listed = likeliest(teacher, k, tau, tail=tail, **options)
    labels = random_labels(lead, columns)
    flat, ids = labels.view(-1), listed.ids.reshape(-1, k)
    flat[::2] = torch.where(flat[::2] == IGNORE, IGNORE, ids[::2, 0])
    return student, listed, labels


PATHS = [*(("bucket", case) for case in ALL), *(("renormalize", case) for case in DEFAULTS)]


@pytest.mark.parametrize(("tail", "case"), PATHS, ids=named)
def test_every_divergence(tail: str, case: Case) -> None:
    """On a CPU."""
    check(*problem(tail), case, "torch")


@pytest.mark.smoke
@each("case", DEFAULTS)
def test_every_divergence_in_triton(case: Case) -> None:
    """The kernels."""
    check(*problem("bucket"), case, "triton")


@each("case", [DISTINCT[i] for i in (0, 2, 5, 7)])
@each("tail", TAILS)
def test_every_tail_in_triton(case: Case, tail: str) -> None:
    """With tokens absent, and no row of a multiple of 16 bytes."""
    check(*ragged(tail), case, "triton", ce_weight=0.5)


TRUNCATED: list[Case] = [
    ("fkl", {}),
    ("rkl", {}),
    ("frkl", {"w": 0.3}),
    ("jsd", {"beta": 0.3}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
]


@each("case", TRUNCATED)
def test_truncate(case: Case, backend: str) -> None:
    """The published integrands on raw probabilities, signed."""
    check(*ragged("truncate"), case, backend, ce_weight=0.5)
    check(*problem("truncate", 2.0), case, backend, temperature_squared=True)


def ragged(tail: str = "bucket", tau: float = 1.0, **options: Any) -> tuple[torch.Tensor, Listed, torch.Tensor]:
    """Rows of fewer tokens, of a token of probability 0, and one of none."""
    student, listed, labels = problem(tail, tau, **options)
    listed.ids[1, ::2] = ABSENT
    listed.ids[3, 1:] = ABSENT
    listed.ids[4] = ABSENT
    listed.logprobs[0, 2] = -torch.inf
    listed.logprobs[1, ::2] = torch.nan  # nobody looks
    labels[4] = 5
    return student, listed, labels


@each("case", DISTINCT)
@each("tail", TAILS)
def test_absent_tokens(case: Case, tail: str) -> None:
    """They are left to the bucket; a row of none is an ignored one, in the mean's denominator too."""
    for labelled in (True, False):
        student, listed, labels = ragged(tail)
        if not labelled and case[0] in ("drkl", "decoupled") and "target_token" not in case[1]:
            continue
        if not labelled and "target" in case[1]:
            continue
        for reduction in ("none", "mean"):
            check(student, listed, labels if labelled else None, case, "torch", reduction=reduction)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0, "temperature_squared": True},
    "low temperature": {"temperature": 0.5},
    "cross-entropy": {"ce_weight": 0.7, "temperature": 2.0},
    "sum": {"reduction": "sum", "token_weights": torch.rand(N)},
    "mean": {"reduction": "mean", "token_weights": torch.rand(N) > 0.5},
    "items": {"reduction": "mean", "num_items": 7},
    "items of a tensor": {"reduction": "mean", "num_items": torch.tensor(7.0)},
    "fewer columns": {"vocab_size": 100, "ce_weight": 0.5},
}


@each("options", OPTIONS)
@each("tail", ["bucket", "renormalize", "truncate"])
def test_options(options: str, tail: str, backend: str) -> None:
    """Everything that a call has, together with a target and without."""
    chosen = OPTIONS[options]
    columns = chosen.get("vocab_size", V)
    teacher = 3 * torch.randn(N, columns, dtype=torch.float64)
    listed = likeliest(teacher, K, chosen.get("temperature", 1.0), tail=tail)
    student, labels = 3 * torch.randn(N, V, dtype=torch.float64), random_labels((N,), columns)
    labels[0] = listed.ids[0, 3]
    for case in [("fkl", {})] if tail == "truncate" else [("drkl", {}), ("jsd", {})][: 1 if backend == "triton" else 2]:
        check(student, listed, labels, case, backend, **chosen)


BY_TOKEN = torch.linspace(0.1, 0.8, N)
PARAMETERS: dict[str, tuple[str, Case]] = {
    "weights": ("bucket", ("fkl", {"target": BY_TOKEN, "nontarget": BY_TOKEN.flip(0)})),
    "exponents": ("bucket", ("ab", {"alpha": BY_TOKEN, "beta": BY_TOKEN.flip(0)})),
    "mixed teacher": ("bucket", ("taid", {"t": BY_TOKEN, "base": "rkl"})),
    "decoupled": ("renormalize", ("decoupled", {"base": "skl", "lam": BY_TOKEN, "nontarget": BY_TOKEN.flip(0)})),
    "truncated": ("truncate", ("jsd", {"beta": BY_TOKEN})),
    "truncated sum": ("truncate", ("frkl", {"w": BY_TOKEN})),
}


@each("name", PARAMETERS)
def test_parameters_per_token(name: str, backend: str) -> None:
    """Each row with its own."""
    tail, case = PARAMETERS[name]
    check(*ragged(tail), case, backend)


DTYPES = [(b, d) for b in ("torch", "triton") for d in (torch.bfloat16, torch.float16, torch.float64)][:-1]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
@each("tail", ["bucket", "renormalize", "truncate"])
def test_dtypes(backend: str, dtype: torch.dtype, tail: str) -> None:
    """Of the student: no error but the rounding of the gradient."""
    check(*ragged(tail), ("rkl", {}), backend, dtype=dtype)


@each("dtype", [torch.bfloat16, torch.float16])
@each("tail", ["bucket", "renormalize", "truncate"])
def test_dtypes_of_the_teacher(dtype: torch.dtype, tail: str, backend: str) -> None:
    """Rounded log-probabilities are what they are, and their sum is above 1 in places; narrow ids."""
    student, listed, labels = problem(tail, k=100, dtype=dtype)
    listed = Listed(listed.ids.int(), listed.logprobs, tail)
    assert dtype == torch.float16 or (listed.logprobs.double().logsumexp(-1) > 0).any()
    several = [("fkl", {}), ("rkl", {})] if tail == "truncate" else [("fkl", {}), ("rkl", {}), ("drkl", {})]
    for case in several if backend == "torch" else several[1:2]:
        check(student, listed, labels, case, backend)


LAYOUTS = {
    "padded rows": lambda x: torch.cat((x, x + 1), -1)[..., : x.shape[-1]],
    "every second column": lambda x: torch.stack((x, -x), -1)[..., 0],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "next token": lambda x: torch.cat((x, x[:, :1]), 1)[:, :-1],
}


@each("layout", LAYOUTS)
def test_layouts(layout: str, backend: str) -> None:
    """Student's logits are read where they lie."""
    check(*problem(lead=(2, 3)), ("drkl", {}), backend, prepare=LAYOUTS[layout])


def test_layouts_of_the_teacher(backend: str) -> None:
    """A cache of (K, N), transposed."""
    student, listed, labels = problem()
    ids, logprobs = (x.t().contiguous().t() for x in (listed.ids, listed.logprobs))
    transposed = dataclasses.replace(listed, ids=ids, logprobs=logprobs)
    assert transposed.given("cpu").ids.stride() == (1, N)
    check(student, transposed, labels, ("rkl", {}), backend)


@each("lead", [(), (1,), (0,), (2, 3), (0, 4), (2, 0)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    """None and empty ones included."""
    student, listed, labels = problem(lead=lead)
    labels = labels.where(labels >= 0, 0)
    check(student, listed, labels, ("rkl", {}), backend)
    check(student, listed, None, ("rkl", {}), backend)


@pytest.mark.parametrize(("case", "backend"), BOTH, ids=named)
@each("tail", TAILS)
def test_one_token(case: Case, tail: str, backend: str) -> None:
    """Two outcomes, or one of which nothing is to be learnt."""
    check(*problem(tail, k=1), case, backend)


# Heads ----------------------------------------------------------------------------------------------------------------

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "scale": 1.5, "softcap": 10.0},
}


def head_problem(tail: str = "bucket", tau: float = 1.0, **operands: Any) -> tuple[Side, Listed, torch.Tensor]:
    """As `ragged`, a student of width 16."""
    _, listed, labels = ragged(tail, tau)
    return side((N,), V, 16, **operands), listed, labels


@pytest.mark.parametrize(("case", "backend"), BOTH, ids=named)
@each("tail", TAILS)
def test_heads(case: Case, tail: str, backend: str) -> None:
    """Per-token upstream gradients."""
    check_head(*head_problem(tail), case, backend, reduction="none")


@each("operands", HEADS)
@each("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operands_of_heads(operands: str, dtype: torch.dtype, backend: str) -> None:
    """Everything a Head may carry, beside a cross-entropy at another temperature, in every reduction."""
    if backend == "triton" and (dtype == torch.float64 or operands == "bias"):
        pytest.skip("no float64 kernels; the bias is among all operands")
    options = {"dtype": dtype, "ce_weight": 0.5, "temperature_squared": True, "token_weights": BY_TOKEN}
    for reduction in ("mean",) if backend == "triton" else ("mean", "sum", "none"):
        check_head(
            *head_problem("bucket", 2.0, **HEADS[operands]), ("drkl", {}), backend, reduction=reduction, **options
        )
    check_head(*head_problem("truncate", **HEADS[operands]), ("rkl", {}), backend, dtype=dtype)


@each("drop_ignored", [True, False])
@each("reduction", ["mean", "none"])
@each("labelled", [True, False])
def test_chunks_of_heads(
    drop_ignored: bool, reduction: str, labelled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of rows, kept ones and all, of which rows without any token are none."""
    if backend == "triton" and (drop_ignored or reduction == "mean"):
        pytest.skip("the loop is the same")
    for name, value in {"_CPU_INNER": 3, "_CPU_LEAST": 2}.items():
        monkeypatch.setattr(planner, name, value)
    student, listed, labels = head_problem()
    options = {"reduction": reduction, "drop_ignored": drop_ignored}
    check_head(student, listed, labels if labelled else None, ("rkl", {}), backend, **options)


@each("reduction", ["mean", "none"])
def test_weight_grad(reduction: str) -> None:
    """A buffer takes the weight's gradient."""
    student, listed, labels = head_problem()
    hidden, weight = student.hidden.float(), student.weight.float()
    found = []
    for given in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        buffer = torch.ones_like(weight) if given else None
        loss = fusedkd.kd_loss(
            fusedkd.Head(*leaves), listed.given("cpu"), labels, reduction=reduction, weight_grad=buffer
        )
        loss.sum().backward()
        found.append([leaves[0].grad, leaves[1].grad if buffer is None else buffer - 1])
        assert (leaves[1].grad is None) == given
    for one, other in zip(*found, strict=True):
        assert_close(other, one.double(), VALUE)


def test_autocast() -> None:
    """Hidden states and weight are rounded as autocast rounds a linear layer's."""
    student, listed, labels = head_problem()
    found = []
    for rounded in (False, True):
        leaves = [x.bfloat16().float().requires_grad_() for x in (student.hidden, student.weight)]
        given = [x.bfloat16() for x in leaves] if rounded else leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=not rounded):
            loss = fusedkd.kd_loss(fusedkd.Head(*given), listed.given("cpu"), labels, divergence="drkl")
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.any()


# Hard rows ------------------------------------------------------------------------------------------------------------


SEPARABLE = [case for case in DEFAULTS if case[0] not in ("amid", "akl", "taid")]


@each("case", SEPARABLE)
@each("spill", [1e-3, 1e-6, 1e-9])
def test_nearly_all_listed(case: Case, spill: float, backend: str) -> None:
    """The student's bucket is a sum over its columns: 1 − Σ q has no digits left, and here each is there."""
    if backend == "triton" and (spill != 1e-6 or case[0] not in ("fkl", "rkl", "drkl", "jsd")):
        pytest.skip("the maths is the same, and its interpreter slow")
    student, listed, labels = problem(lead=(4,))
    top = torch.zeros_like(student).scatter_(1, listed.ids, 1.0).bool()
    inside, outside = (student.masked_fill(~at, -torch.inf).logsumexp(1, keepdim=True) for at in (top, ~top))
    student = (student + torch.where(top, 0.0, inside - outside + math.log(spill))).float().double()
    total = student.softmax(1).gather(1, listed.ids).sum(1)
    assert torch.allclose(1 - total, torch.full((4,), spill, dtype=torch.float64), rtol=1e-3)
    check(student, listed, labels, case, backend)


@each("case", SEPARABLE)
def test_full_teacher(case: Case) -> None:
    """Listed tokens of a rounded sum of 1 or more leave nothing to the bucket: e^−50, and p is normalised."""
    student, listed, labels = problem()
    logp = listed.logprobs - listed.logprobs.logsumexp(-1, keepdim=True)
    for more in (0.0, 1e-3):
        check(student, Listed(listed.ids, (logp + more).bfloat16()), labels, case, "torch")


@each("case", [*DEFAULTS, *DISTINCT[4:]])
def test_all_listed(case: Case) -> None:
    """K = V is the dense call, of teachers of the student's width and less."""
    for columns in (V, 100):
        student, teacher = (3 * torch.randn(N, x) for x in (V, columns))
        labels = random_labels((N,), columns)
        ids = torch.stack([torch.randperm(columns) for _ in range(N)])
        logprobs = teacher.double().log_softmax(-1).float().gather(1, ids)
        made = {"divergence": fusedkd.divergence(case[0], **case[1]), "reduction": "none", "ce_weight": 0.5}
        dense = torch.empty(N, columns).scatter_(1, ids, logprobs)
        listed = fusedkd.TopK(ids, logprobs, vocab_size=columns)
        found, wanted = (
            fusedkd.kd_value_and_grad(student, x, labels, return_stats=True, **made) for x in (listed, dense)
        )
        bound = MIXED if case[0] == "amid" else VALUE
        for ours, theirs in zip(found[:2], wanted[:2], strict=True):
            assert_close(ours, theirs.double(), bound)
        for name, ours, theirs in zip(found[2]._fields, found[2], wanted[2], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True), name


@each("case", DEFAULTS)
@each("tail", TAILS)
def test_equal(case: Case, tail: str) -> None:
    """Where both sides say the same the loss is 0 but for what rounding log p costs, and it is never negative."""
    teacher = 3 * torch.randn(N, V)
    listed = likeliest(teacher.double(), K, tail=tail)
    made = {"divergence": fusedkd.divergence(case[0], **case[1]), "reduction": "none"}
    for shift in (0.0, 1e-4, 1e-2, 1.0):
        student = teacher + shift * torch.randn(N, V)
        labels = listed.ids[:, 0]
        loss, grad = fusedkd.kd_value_and_grad(student, listed.given("cpu"), labels, **made)
        assert (loss >= 0).all()
        if shift == 0:
            assert loss.max() < (1e-12 if case[0] not in ("tvd", "akl") else 1e-6), loss
            assert grad.abs().max() < (1e-6 if case[0] not in ("tvd",) else 1.0)


@each("distance", [1e-1, 1.4e-2, 1.4e-3])
@each("k", [9, 100])
@each("tail", ["bucket", "renormalize", "truncate"])
def test_near(distance: float, k: int, tail: str) -> None:
    """Late in training no digit is lost, whether the bucket has most of the mass or hardly any."""
    teacher = 5 * torch.randn(N, 500, dtype=torch.float64)
    student = (teacher + distance * torch.randn_like(teacher)).float().double()
    listed = likeliest(teacher, k, tail=tail)
    if tail != "truncate":
        for case in [("fkl", {}), ("rkl", {}), ("jsd", {}), ("hellinger", {})]:
            check(student, listed, None, case, "torch")
    elif distance > 1e-2:  # beside a sum of raw integrands, which are of both signs and cancel
        found = truth(student, listed, None, ("jsd", {}))
        _, grad = fusedkd.kd_value_and_grad(student.float(), listed.given("cpu"), divergence="jsd", reduction="none")
        assert_close(grad, found.slope(torch.ones(N)), VALUE)


@each("tail", TAILS)
def test_near_in_triton(tail: str) -> None:
    """The kernels' half of it."""
    teacher = 5 * torch.randn(N, 500, dtype=torch.float64)
    student = (teacher + 1.4e-2 * torch.randn_like(teacher)).float().double()
    check(student, likeliest(teacher, 100, tail=tail), None, ("rkl", {}), "triton")


def test_many_listed(backend: str) -> None:
    """More than a program takes at a time, and the most that there may be."""
    check(*problem(k=1500, columns=2000), ("rkl", {}), backend)
    if backend == "torch":
        check(*problem(k=4096, columns=5000), ("drkl", {}), backend)


@each("sizes", [(300, 257, None), (257, 300, None), (300, 300, 200)])
@each("tail", TAILS)
def test_vocabulary_mismatch(sizes: tuple[int, int, int | None], tail: str, backend: str) -> None:
    """Columns beyond the common range get a gradient from the cross-entropy only, of logits and of heads."""
    v_student, v_teacher, vocab_size = sizes
    common = vocab_size or min(v_student, v_teacher)
    teacher = 3 * torch.randn(N, common, dtype=torch.float64)
    listed = likeliest(teacher, K, tail=tail, vocab_size=v_teacher)
    labels = random_labels((N,), common)
    labels[0] = listed.ids[0, 2]
    student = 3 * torch.randn(N, v_student, dtype=torch.float64)
    given = {"vocab_size": vocab_size, "ce_weight": 0.5}
    check(student, listed, labels, ("drkl", {}), backend, **given)
    student[:, common:] = torch.nan  # nobody looks
    if backend == "torch":
        check_head(side((N,), v_student, 16), listed, labels, ("rkl", {}), backend, **given)
    loss = fusedkd.kd_loss(student.float(), listed.given("cpu"), labels, vocab_size=vocab_size, backend=backend)
    assert loss.isfinite() or v_student == common


@each("tail", ["bucket", "renormalize", "truncate"])
@each("offset", [200.0, -3e4])
def test_offsets(tail: str, offset: float, backend: str) -> None:
    """A constant added to the logits is none of the loss's business, however large."""
    student, listed, labels = problem(tail)
    student = (student * 64).round() / 64 + offset
    check(student, listed, labels, ("rkl", {}), backend, bound=1e-4, reduction="none")


@each("tail", TAILS)
def test_excluded_by_the_student(tail: str, backend: str) -> None:
    """Logits of −inf: in the bucket, all of the bucket, and listed ones."""
    student, listed, labels = problem(tail)
    labels[:] = IGNORE
    student[0, 5:20] = -torch.inf
    student[0].scatter_(0, listed.ids[0], 1.0)
    kept = student[1].gather(0, listed.ids[1])
    student[1] = -torch.inf
    student[1].scatter_(0, listed.ids[1], kept)
    student[2, listed.ids[2, :2]] = -torch.inf
    labels[:3] = 0
    for case in [("rkl", {}), ("fkl", {}), ("jsd", {})]:
        check(student, listed, labels, case, backend)


@each("case", [("rkl", {}), ("frkl", {"w": 1.0}), ("jsd", {"beta": 0.3})])
def test_excluded_by_the_student_and_truncated(case: Case, backend: str) -> None:
    """0·log 0 is 0: as a listed logit that is so small that its probability is none."""
    student, listed, _ = problem("truncate")
    divergence, found = fusedkd.divergence(case[0], **case[1]), []
    for least in (-1e4, -torch.inf):
        leaf = student.float()
        leaf[2, listed.ids[2, :2]] = least
        leaf.requires_grad_()
        loss = fusedkd.kd_loss(leaf, listed.given("cpu"), divergence=divergence, reduction="none", backend=backend)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaf)])
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_labels_that_are_not_listed() -> None:
    """No target term: the whole loss is L_N, as for a label outside a teacher's support."""
    student, listed, labels = problem()
    labels[:] = listed.ids[:, 0]
    there = torch.zeros(N, V, dtype=torch.bool).scatter_(1, listed.ids, True)
    labels[:3] = (~there).int().argmax(1)[:3]
    check(student, listed, labels, ("decoupled", {"base": "rkl", "target": 3.0, "nontarget": 0.5}), "torch")
    given = student.float(), listed.given("cpu"), labels
    loss, stats = fusedkd.kd_loss(*given, divergence="drkl", reduction="none", return_stats=True)
    whole = fusedkd.kd_loss(*given, divergence="rkl", reduction="none")
    assert_close(loss[:3], 0.5 * whole[:3].double(), VALUE)
    assert (loss[3:] != 0.5 * whole[3:]).all()
    assert not stats.target_loss[:3].any()
    assert stats.target_loss[3:].all()
    assert (stats.student_logprob == -torch.inf).tolist() == [True] * 3 + [False] * 3


def test_renormalized_at_another_temperature(backend: str) -> None:
    """What the teacher's temperature was can be taken out of log-probabilities that are renormalised anyway."""
    student, teacher = 3 * torch.randn(2, N, V, dtype=torch.float64)
    listed = likeliest(teacher, K, 0.5, tail="renormalize")
    check(student, listed, None, ("rkl", {}), backend, temperature=2.0)
    logprobs = (teacher / 2).log_softmax(-1).gather(1, listed.ids).float()
    again = fusedkd.TopK(listed.ids, logprobs, "renormalize", 2.0)
    given = {"temperature": 2.0, "reduction": "none"}
    ours, theirs = (fusedkd.kd_loss(student.float(), x, **given) for x in (listed.given("cpu"), again))
    assert_close(ours, theirs.double(), VALUE)


# What does not count, and what is no number ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hole", "backend"), [(torch.nan, "torch"), (torch.inf, "torch"), (-torch.inf, "torch"), (torch.nan, "triton")]
)
@each("tail", ["bucket", "renormalize", "truncate"])
@each("labelled", [True, False])
def test_ignored_rows(hole: float, backend: str, tail: str, labelled: bool) -> None:
    """Rows without a label or a token may hold anything, on both sides, in weights, parameters and upstream."""
    student, listed, labels = ragged(tail)
    labels[2] = IGNORE
    empty = torch.arange(N) == 4
    out = empty | (labels == IGNORE) if labelled else empty
    case = ("jsd", "beta") if tail == "truncate" else ("skl", "lam")
    found = []
    for filler in (0.5, hole):
        leaf = torch.where(out[:, None], filler, student.float()).requires_grad_()
        logprobs = torch.where(out[:, None] & (listed.ids < 0), filler, listed.logprobs)
        teacher = fusedkd.TopK(listed.ids, logprobs, tail)
        by_token = torch.where(out, filler, BY_TOKEN)
        loss = fusedkd.kd_loss(
            leaf,
            teacher,
            labels if labelled else None,
            divergence=fusedkd.divergence(case[0], **{case[1]: by_token}),
            token_weights=by_token,
            reduction="none",
            ce_weight=0.5 if labelled else 0.0,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(loss, leaf, torch.where(out, filler, 1.0))
        found.append((loss.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[out].any()
        assert ours[~out].isfinite().all()
        assert ours[~out].any()


@each("hole", [torch.nan, torch.inf])
@each("reduction", ["mean", "none"])
@each("labelled", [True, False])
@each("drop_ignored", [True, False])
def test_ignored_rows_of_heads(hole: float, reduction: str, labelled: bool, drop_ignored: bool) -> None:
    """Hidden states of rows without a token reach neither the weight nor another row."""
    student, listed, labels = head_problem(bias=True)
    out = torch.arange(N) == 4
    found = []
    for filler in (0.5, hole):
        operands = student.operands(torch.float32, "cpu")
        operands["hidden"].data[out] = filler
        loss, stats = fusedkd.kd_loss(
            student.head(operands),
            listed.given("cpu"),
            labels if labelled else None,
            reduction=reduction,
            drop_ignored=drop_ignored,
            return_stats=True,
        )
        upstream = torch.where(out, filler, 1.0) if reduction == "none" else None
        found.append([loss.detach(), *stats, *torch.autograd.grad(loss, list(operands.values()), upstream)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    for x in found[0]:
        if x.dim() and len(x) == N:
            assert not x[out].any()


@each("tail", TAILS)
@each("value", [torch.nan, torch.inf])
def test_not_finite(tail: str, value: float) -> None:
    """In a counted row: its loss and gradient are NaN, those of the others are what they were."""
    student, listed, labels = problem(tail)
    labels[:] = listed.ids[:, 1]
    student = student.float()
    clean = fusedkd.kd_value_and_grad(student, listed.given("cpu"), labels, divergence="drkl", reduction="none")
    there = torch.zeros(N, V, dtype=torch.bool).scatter_(1, listed.ids, True)
    spoiled = student.clone()
    spoiled[1, listed.ids[1, 3]] = value
    outside = (~there).int().argmax(1)[2]
    spoiled[2, outside] = value
    for backend in ("torch", "triton"):
        leaf = spoiled.clone().requires_grad_()
        loss = fusedkd.kd_loss(leaf, listed.given("cpu"), labels, divergence="drkl", reduction="none", backend=backend)
        loss.sum().backward()
        bad = torch.tensor([False, True, tail == "bucket", False, False, False])
        assert torch.equal(loss.isnan(), bad)
        of_bad = leaf.grad.isnan() if tail == "bucket" else leaf.grad.isnan().gather(1, listed.ids)
        assert torch.equal(of_bad.all(1) if backend == "torch" else of_bad.any(1), bad)
        assert_close(loss[~bad], clean[0][~bad].double(), VALUE)
        assert_close(leaf.grad[~bad], clean[1][~bad].double(), VALUE)


@each("tail", ["bucket", "renormalize", "truncate"])
def test_upstream_of_zero(tail: str, backend: str) -> None:
    """Rows of weight 0 have a gradient of exactly 0, whatever they hold, and still count."""
    student, listed, labels = problem(tail)
    labels = labels.where(labels >= 0, 0)
    weights = BY_TOKEN.where(torch.arange(N) % 3 != 1, 0.0)
    spoiled = student.float().where(weights[:, None] != 0, torch.nan)
    found = []
    for logits in (student.float(), spoiled):
        leaf = logits.clone().requires_grad_()
        given = {"token_weights": weights, "ce_weight": 0.5, "backend": backend}
        loss = fusedkd.kd_loss(leaf, listed.given("cpu"), labels, **given)
        (grad,) = torch.autograd.grad(loss, leaf)
        again = fusedkd.kd_value_and_grad(logits, listed.given("cpu"), labels, **given)
        found.append((loss.detach(), grad, *again))
        assert not grad[weights == 0].any()
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs.double(), VALUE)


def test_a_row_of_none_is_no_token_of_the_mean() -> None:
    """It is left out of the denominator as one whose label is ignore_index."""
    student, listed, labels = ragged()
    given = student.float(), listed.given("cpu")
    for y, count in ((labels, int((labels != IGNORE).sum()) - 1), (None, N - 1)):
        each_loss = fusedkd.kd_loss(*given, y, reduction="none")
        assert each_loss[4] == 0
        assert_close(fusedkd.kd_loss(*given, y), each_loss.sum().double() / count, VALUE)
    nothing = fusedkd.TopK(torch.full((N, K), ABSENT), listed.logprobs)
    leaf = student.float().requires_grad_()
    loss = fusedkd.kd_loss(leaf, nothing)
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.any()


# Operators, compilation, autograd -------------------------------------------------------------------------------------


def kd(side: Any, listed: Listed, labels: torch.Tensor | None, **options: Any) -> Any:
    """kd_loss with a divergence of a target and one of the value's two sweeps."""
    return fusedkd.kd_loss(side, listed.given("cpu"), labels, **{"divergence": "drkl"} | options)


CHECKED = [
    *(
        (name, tail)
        for name in ("rows", "rows_gradient", "rows_both")
        for tail in ("bucket", "renormalize", "truncate")
    ),
    ("heads", "bucket"),
    ("heads_rows", "bucket"),
]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("name", "tail"), CHECKED)
def test_opcheck(name: str, tail: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """Schema, fake tensors, autograd registration and compilation, on the arguments of real calls."""
    student, listed, labels = ragged(tail)
    options = {"divergence": "fkl" if tail == "truncate" else "drkl", "ce_weight": 0.5}
    if name.startswith("heads"):
        reduction = "mean" if name == "heads" else "none"
        head = side((N,), V, 8, bias=True)
        made = head.head(head.operands(torch.float32, "cpu"))
        kd(made, listed, labels, reduction=reduction, **options).sum().backward(retain_graph=True)
    else:
        leaf = student.float().requires_grad_()
        kd(leaf, listed, labels, **options).backward()
        fusedkd.kd_value_and_grad(leaf.detach(), listed.given("cpu"), labels, **options)
    opcheck(name, calls[name], differentiable=name in ("rows", "heads", "heads_rows"))


COMPILED = [("bucket", "logits"), ("truncate", "logits"), ("renormalize", "heads"), ("bucket", "rows of heads")]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("tail", "kind"), COMPILED)
def test_compile(tail: str, kind: str) -> None:
    """fullgraph=True: no graph break; a TopK goes in as an argument."""
    student, listed, labels = ragged(tail)
    options = {"divergence": "rkl", "ce_weight": 0.5, "reduction": "none" if kind == "rows of heads" else "mean"}
    head = side((N,), V, 8)
    leaves = (
        [student.float().requires_grad_()] if kind == "logits" else list(head.operands(torch.float32, "cpu").values())
    )

    def work(teacher: fusedkd.TopK, *parts: torch.Tensor) -> torch.Tensor:
        made = parts[0] * 2 if kind == "logits" else fusedkd.Head(parts[0] * 2, parts[1])
        return fusedkd.kd_loss(made, teacher, labels, **options).sum()

    torch._dynamo.reset()
    found = []
    for run in (work, torch.compile(work, fullgraph=True, backend="aot_eager")):
        loss = run(listed.given("cpu"), *leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*found, strict=True):
        assert eager.any()
        assert_close(compiled, eager.double(), 1e-6)


def test_from_inference_mode(backend: str) -> None:
    """A teacher's tensors may come from there, and get no gradient from anywhere."""
    student, listed, labels = problem()
    found = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            teacher = fusedkd.TopK(listed.ids.clone(), listed.logprobs.clone())
        leaf = student.float().requires_grad_()
        loss = fusedkd.kd_loss(leaf, teacher, labels, divergence="drkl", backend=backend)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *found))
    listed.logprobs.requires_grad_()
    kd(student.float().requires_grad_(), listed, labels).backward()
    assert listed.logprobs.grad is None


def test_module() -> None:
    """DistillationLoss passes one through."""
    student, listed, labels = problem()
    given = student.float(), listed.given("cpu"), labels
    assert torch.equal(fusedkd.DistillationLoss("drkl")(*given), fusedkd.kd_loss(*given, divergence="drkl"))


@each("default", [torch.float64, torch.bfloat16])
@each("tail", ["bucket", "renormalize", "truncate"])
def test_the_default_dtype_changes_nothing(default: torch.dtype, tail: str, backend: str) -> None:
    """Every dtype comes from the operands."""
    student, listed, labels = problem(tail)
    made = fusedkd.divergence("jsd", beta=0.3)
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            given = {"divergence": made, "backend": backend, "ce_weight": 0.5}
            found.append(fusedkd.kd_value_and_grad(student.float(), listed.given("cpu"), labels, **given))
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.unpoisoned
@each("tail", ["bucket", "renormalize", "truncate"])
@each("chosen", ["torch", "triton"])
def test_tensors_without_data(tail: str, chosen: str) -> None:
    """On the meta device: shapes and dtypes as they would be."""
    student, listed, labels = problem(tail)
    leaf = student.float().to("meta").requires_grad_()
    teacher = listed.given("meta")
    for reduction, shape in (("mean", ()), ("none", (N,))):
        loss = fusedkd.kd_loss(leaf, teacher, labels.to("meta"), reduction=reduction, backend=chosen)
        assert loss.shape == shape
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


# Bytes and products ---------------------------------------------------------------------------------------------------

WIDE = 3000  # columns: numbers of (N, K) are few beside them


def moved_by(tail: str, work: str, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """The traffic of the kernels of a call, the student's logits, the gradient."""
    from test_traffic import traffic

    student, listed, labels = problem(tail, columns=WIDE)
    labels[:2], labels[2:] = IGNORE, listed.ids[2:, 0]
    leaf, grad = student.float().requires_grad_(), None
    given = {"divergence": "rkl", "backend": "triton"} | options
    if work == "backward":
        loss = fusedkd.kd_loss(leaf, listed.given("cpu"), labels, **given)
    with traffic() as moved:
        if work == "value":
            fusedkd.kd_loss(leaf, listed.given("cpu"), labels, **given)
        elif work == "backward":
            (grad,) = torch.autograd.grad(loss, leaf)
        else:
            _, grad = fusedkd.kd_value_and_grad(leaf.detach(), listed.given("cpu"), labels, **given)
    return moved, leaf.detach(), grad


TRAFFIC = [  # tail, options, reads of the logits for the value and for the gradient
    ("bucket", {}, 1, 1),
    ("truncate", {}, 1, 1),
    ("bucket", {"ce_weight": 0.5}, 1, 1),
    ("renormalize", {"ce_weight": 0.5}, 1, 1),
    ("renormalize", {}, 0, 0),  # nothing but the listed tokens'
]


@pytest.mark.interpreter("bytes are counted in it")
@pytest.mark.skipif(not interpreted(), reason="bytes are counted in Triton's interpreter")
@pytest.mark.parametrize(("tail", "options", "of_value", "of_gradient"), TRAFFIC)
@each("work", ["value", "backward", "both"])
def test_traffic(tail: str, options: dict[str, Any], of_value: int, of_gradient: int, work: str) -> None:
    """Value: one read of each logit; gradient: one more and one write; beside them numbers of (N, K) and bits."""
    moved, logits, grad = moved_by(tail, work, **options)
    counted, reads = N - 2, {"value": of_value, "backward": of_gradient, "both": of_value + of_gradient}[work]
    few = 2 * counted * (K + 1)  # the gathered logits, and the label's
    found = moved.count("load", logits) - reads * counted * WIDE
    assert 0 <= found <= few
    assert moved.count("store", logits) == 0
    known = [logits]
    if grad is not None:
        known.append(grad)
        assert N * WIDE <= moved.count("store", grad) <= N * WIDE + counted * K
        assert moved.count("load", grad) == 0
        assert not grad[:2].any()
    # A row of outcomes is read and written a few times; each sweep reads a column's bit as a word of 4 bytes.
    sweeps = {"value": of_value, "backward": 1, "both": of_value + 1}[work]
    bits = 4 * sweeps * counted * WIDE
    assert moved.other(*known) - bits <= N * 4 * (20 * (K + 4) + 60)


@pytest.mark.skipif(not interpreted(), reason="counted in Triton's interpreter")
@each("tail", ["bucket", "renormalize", "truncate"])
def test_memory(tail: str) -> None:
    """Of N·V nothing but the gradient, and a bit for each logit."""
    from test_memory import measure

    student, listed, labels = problem(tail, columns=WIDE)
    leaf, teacher, graph = student.float().requires_grad_(), listed.given("cpu"), []
    forward = measure(lambda: graph.append(fusedkd.kd_loss(leaf, teacher, labels, divergence="rkl", backend="triton")))
    bits, rows = N * (WIDE // 8 + 4), N * 4 * 60 * (K + 4)
    assert forward.sizes
    assert max(forward.sizes) <= max(bits, rows)
    assert sum(forward.sizes) <= bits + rows
    backward = measure(lambda: torch.autograd.grad(graph[0], leaf))
    assert max(backward.sizes) == 4 * N * WIDE
    assert sum(backward.sizes) <= 4 * N * WIDE + bits + rows


@each("tail", ["bucket", "truncate"])
def test_memory_on_a_cpu(tail: str) -> None:
    """Of N·V nothing but the gradient: blocks of rows."""
    from test_memory import measure

    rows, columns = 1000, 4000
    leaf = torch.randn(rows, columns).requires_grad_()
    ids = torch.randint(columns - K, (rows, 1)) + torch.arange(K)
    teacher, graph = fusedkd.TopK(ids, torch.full((rows, K), -3.0), tail), []
    forward = measure(lambda: graph.append(fusedkd.kd_loss(leaf, teacher, divergence="rkl", backend="torch")))
    assert max(forward.sizes) < leaf.nbytes
    backward = measure(lambda: torch.autograd.grad(graph[0], leaf))
    assert [size for size in backward.sizes if size >= leaf.nbytes] == [leaf.nbytes]


def many(columns: int, dtype: torch.dtype, tail: str = "bucket", rows: int = 150, **options: Any) -> Any:
    """A call on heads, as test_memory has them, and its rows that count: two thirds."""
    from test_memory import Call

    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (rows, columns))
    listed = likeliest(torch.randn(rows, columns, dtype=torch.float64), K, tail=tail).given("cpu")
    labels = listed.ids[:, 0].clone()
    labels[1::3] = IGNORE

    def loss(**more: Any) -> torch.Tensor:
        return fusedkd.kd_loss(fusedkd.Head(hidden, weight), listed, labels, **{"divergence": "rkl"} | options | more)

    return Call(loss, [hidden, weight], rows * columns * dtype.itemsize)


@each("tail", TAILS)
def test_three_products(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's logits and its two gradients: a teacher without a head has none, ignored rows have none."""
    from test_memory import flops

    for reduction, products in (("mean", 3), ("none", 1 + 3)):
        call = many(500, torch.float32, tail, rows=60, reduction=reduction)
        assert flops(call, monkeypatch) == 2 * 40 * 500 * products * 8


@pytest.mark.parametrize(("tail", "dtype"), [("bucket", torch.float32), ("truncate", torch.bfloat16)])
def test_memory_of_heads(dtype: torch.dtype, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward keep what the planner announced, and hold no N·V tensor; a small budget is kept."""
    from test_memory import least, measure

    announced: list[planner.Chunks] = []
    original = planner.choose
    monkeypatch.setattr(planner, "choose", lambda *args: announced.append(original(*args)) or announced[-1])
    call = many(2500, dtype, tail, rows=2000)  # more logits than a CPU makes at once
    for options in ({}, {"memory_budget": int(1.2 * least(call))}):
        call.run(**options)  # what is made once and kept is not workspace
        memory = measure(lambda options=options: call.run(**options))
        assert max(memory.sizes) < call.matrix, "a tensor of N·V elements"
        assert memory.peak <= announced[-1].workspace
        assert memory.peak <= options.get("memory_budget", memory.peak)


# Bad input ------------------------------------------------------------------------------------------------------------

IDS, LOGPROBS = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), -1.0)


def refused(words: tuple[str, ...], error: type[Exception], student: Any = None, **changed: Any) -> None:
    """A call of 3 rows and 7 columns raises, and the text has every word."""
    options = {"labels": torch.tensor([0, 6, IGNORE])} | {k: changed.pop(k) for k in CALL_OPTIONS & changed.keys()}
    teacher = fusedkd.TopK(**{"ids": IDS, "logprobs": LOGPROBS} | changed)
    student = torch.randn(3, 7) if student is None else student
    with pytest.raises(error) as caught:
        fusedkd.kd_loss(student, teacher, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


CALL_OPTIONS = {"labels", "divergence", "support", "return_stats", "schedule", "ce_weight"}
MISTAKES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "ids a list": ({"ids": [[0, 1]]}, TypeError, ("teacher.ids", "list", "Tensor")),
    "ids floats": ({"ids": IDS.float()}, TypeError, ("teacher.ids", "float32", "int32", "int64")),
    "logprobs a list": ({"logprobs": [[0.5]]}, TypeError, ("teacher.logprobs", "list")),
    "logprobs integers": ({"logprobs": IDS}, TypeError, ("teacher.logprobs", "int64")),
    "logprobs of float64": ({"logprobs": LOGPROBS.double()}, TypeError, ("teacher.logprobs", "float64", ".float()")),
    "K differs": ({"logprobs": LOGPROBS[:, :1]}, ValueError, ("teacher.logprobs", "teacher.ids", "(3, 2)", "(3, 1)")),
    "K of 0": (
        {"ids": IDS[:, :0], "logprobs": LOGPROBS[:, :0]},
        ValueError,
        ("teacher.ids", "K from 1 to 4096", "(3, 0)"),
    ),
    "K too large": (
        {"ids": torch.full((3, 4097), -1), "logprobs": torch.zeros(3, 4097)},
        ValueError,
        ("teacher.ids", "K from 1 to 4096", "(3, 4097)"),
    ),
    "no dimension": ({"ids": IDS[0, 0], "logprobs": LOGPROBS[0, 0]}, ValueError, ("teacher.ids", "(..., K)", "()")),
    "fewer rows": (
        {"ids": IDS[:2], "logprobs": LOGPROBS[:2]},
        ValueError,
        ("teacher", "leading shape", "(3,)", "(2,)"),
    ),
    "more dimensions": (
        {"ids": IDS[None], "logprobs": LOGPROBS[None]},
        ValueError,
        ("teacher", "leading shape", "(3,)", "(1, 3)"),
    ),
    "an id too large": ({"ids": IDS + 2}, ValueError, ("teacher.ids", "[0, 7)", "-1", "got 7")),
    "an id below -1": ({"ids": IDS - 2}, ValueError, ("teacher.ids", "[0, 7)", "-1", "got -2")),
    "an id of columns that the teacher lacks": (
        {"vocab_size": 5, "labels": None},
        ValueError,
        ("teacher.ids", "[0, 5)", "got 5"),
    ),
    "twice the same": ({"ids": IDS // 2}, ValueError, ("teacher.ids", "distinct", "0 twice", "-1")),
    "probabilities": ({"logprobs": LOGPROBS.exp()}, ValueError, ("teacher.logprobs", "at most 1", "log_softmax")),
    "a sum above 1": ({"logprobs": LOGPROBS * 0.69}, ValueError, ("teacher.logprobs", "at most 1", "1.003")),
    "NaN": ({"logprobs": LOGPROBS * torch.nan}, ValueError, ("teacher.logprobs", "NaN")),
    "infinity": ({"logprobs": -LOGPROBS * torch.inf}, ValueError, ("teacher.logprobs", "infinity")),
    "tail": ({"tail": "drop"}, ValueError, ("teacher.tail", "'drop'", "bucket", "renormalize", "truncate")),
    "temperature of the teacher": ({"temperature": 0.0}, ValueError, ("teacher.temperature", "0", "> 0")),
    "temperatures": ({"temperature": 2.0}, ValueError, ("temperature", "2.0", "1.0", "renormalize")),
    "vocab_size text": ({"vocab_size": "7"}, TypeError, ("teacher.vocab_size", "str")),
    "vocab_size of 0": ({"vocab_size": 0}, ValueError, ("teacher.vocab_size", "0")),
    "floor": ({"support": "floor"}, ValueError, ("support", "floor", "'teacher'")),
    "on another device": ({"ids": IDS.to("meta")}, ValueError, ("teacher.ids", "teacher.logprobs", "meta", "cpu")),
    "all on another device": (
        {"ids": IDS.to("meta"), "logprobs": LOGPROBS.to("meta")},
        ValueError,
        ("student", "teacher", "meta", "cpu"),
    ),
    **{
        f"truncated {name}": (
            {"tail": "truncate", "divergence": fusedkd.divergence(name, **params)},
            NotImplementedError,
            ("tail='truncate'", "fkl, rkl, frkl, jsd", name, "bucket"),
        )
        for name, params in [
            *((name, {}) for name in fusedkd.divergences() if name not in ("fkl", "rkl", "frkl", "jsd")),
            ("rkl", {"target": 0.5}),
            ("taid", {"base": "rkl"}),
        ]
    },
    "truncated statistics": (
        {"tail": "truncate", "return_stats": True},
        NotImplementedError,
        ("return_stats", "tail='truncate'", "bucket"),
    ),
}


@pytest.mark.smoke
@each("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    """Each is refused by name, with what would work."""
    changed, error, words = MISTAKES[mistake]
    refused(words, error, **changed)


def test_what_is_no_mistake() -> None:
    """What the table changes is a valid call to begin with; half precision may sum to more than 1."""
    student = torch.randn(3, 7)
    logprobs = torch.tensor([[-0.6914, -0.6914]] * 3).bfloat16()
    assert logprobs.double().exp().sum(-1).max() > 1.001
    for x in (LOGPROBS, logprobs):
        assert fusedkd.kd_loss(student, fusedkd.TopK(IDS, x)).isfinite()
        assert fusedkd.kd_loss(student, fusedkd.TopK(IDS.int(), x, vocab_size=7)).isfinite()


def test_mistakes_of_whole_calls() -> None:
    """A TopK is no student, and a teacher of logits or heads alike."""
    listed = fusedkd.TopK(IDS, LOGPROBS)
    with pytest.raises(TypeError, match="student must be"):
        fusedkd.kd_loss(listed, torch.randn(3, 7))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="student_logits must be"):
        fusedkd.kd_value_and_grad(listed, torch.randn(3, 7))  # type: ignore[arg-type]
    head = fusedkd.Head(torch.randn(3, 4), torch.randn(7, 4))
    with pytest.raises(ValueError, match=r"teacher\.ids must be distinct"):
        fusedkd.kd_loss(head, fusedkd.TopK(IDS // 2, LOGPROBS))
    with pytest.raises(ValueError, match=r"drkl.*labels"):
        fusedkd.kd_loss(head, listed, divergence="drkl")


def test_numbers_are_looked_at_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU always; elsewhere, where that waits for the device, under FUSEDKD_CHECK=1."""
    listed = fusedkd.TopK(IDS // 2, LOGPROBS)
    looked = []
    monkeypatch.setattr(checks, "_looks", lambda where: looked.append(where.type) or False)
    checks.listed(listed, 7)
    assert looked == ["cpu"]
    monkeypatch.undo()
    monkeypatch.delenv("FUSEDKD_CHECK", raising=False)
    assert not checks._looks(torch.device("cuda"))
    monkeypatch.setenv("FUSEDKD_CHECK", "1")
    assert checks._looks(torch.device("cuda"))


def test_ids_out_of_range_where_nobody_looks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: they are absent."""
    student, listed, labels = problem()
    found = []
    monkeypatch.setattr(checks, "_looks", lambda where: False)
    for nowhere in (ABSENT, V, -7, 2**31 + 5):
        ids = listed.ids.clone()
        ids[:, ::4] = nowhere
        teacher = fusedkd.TopK(ids, listed.logprobs)
        found.append(fusedkd.kd_value_and_grad(student.float(), teacher, labels, divergence="drkl", backend=backend))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


# The checks above can fail --------------------------------------------------------------------------------------------


def transposed(listed: torch.Tensor) -> torch.Tensor:
    """The entries of a row in another order."""
    return listed.flip(1)


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeroed": torch.zeros_like,
    "transposed": transposed,
    "one per cent off": lambda x: 1.01 * x,
    "negated": torch.neg,
}


@pytest.mark.smoke
@each("damage", DAMAGE)
@each("part", ["listed", "bucket"])
def test_damage_is_seen(damage: str, part: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong entries of the listed tokens, and a wrong share of the bucket, in either backend."""
    if part == "bucket" and damage == "transposed":
        pytest.skip("one number per row")
    if backend == "triton" and damage in ("negated", "transposed"):
        pytest.skip("as in torch")
    module = backends.get(backend).topk
    original = module.gradient

    def wrong(*args: Any) -> Any:
        found = args[6]._replace(**{part: DAMAGE[damage](getattr(args[6], part))})
        return original(*args[:6], found, *args[7:])

    check(*problem(), ("rkl", {}), backend)
    monkeypatch.setattr(module, "gradient", wrong)
    with pytest.raises(AssertionError, match="gradient"):
        check(*problem(), ("rkl", {}), backend)
