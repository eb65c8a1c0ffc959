"""The host never waits for the device: forward and backward as a GPU would walk them, with nothing there to wait for.

Tensors live on torch's meta device, which has shapes but no numbers and is no CPU, so every branch for a GPU is taken;
kernel launches are noted and left out; registered operators run their implementation in view of a dispatch mode. What
asks a tensor for a number, a data-dependent shape or a copy between devices raises. test_gpu.py repeats the calls on a
real device with torch's own check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import IGNORE, each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedkd
from fusedkd import backends, checks
from fusedkd.kernels.device import rows as triton_rows
from fusedkd.kernels.language import HAS_TRITON
from fusedkd.ops.operator import OPERATORS
from fusedkd.schedules import planner

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
pytestmark = pytest.mark.unpoisoned

N, V, D, K = 20, 300, 8, 12
WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose", "masked_select")
SCALARS = ("add", "sub", "mul", "div")  # whose kernels take a 0-d tensor of the CPU as an argument
IMPLEMENTATIONS = {made.overload: made.implementation for made in OPERATORS.values()}


class Host(TorchDispatchMode):
    """Raises where the host would have to wait; counts everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.count[name] += 1
        if func in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func](*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if (name in WAITS or name.startswith(("unique", "_unique"))) and not all(x.is_cpu for x in tensors):
            raise AssertionError(f"{name} makes the host wait")
        if name in ("mm", "addmm") and "out_dtype" in str(func._schema):
            return kwargs["out"]  # only cuBLAS has it
        if name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:]):
            raise AssertionError(f"{name} with a mask makes the host wait")
        result = func(*args, **kwargs)
        places = {x.device.type for x in (*tensors, *tree_leaves(result)) if isinstance(x, Tensor)}
        if len(places) > 1 and not (name in SCALARS and all(x.is_meta or not x.dim() for x in tensors)):
            staged = name == "_to_copy" and tensors[0].is_cpu and kwargs.get("non_blocking")
            assert staged, f"{name} between {' and '.join(places)} makes the host wait"
        return result


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in these small calls."""
    for name, value in {"_STREAM_LEAST": 128, "_GPU_STREAM": 128, "_GPU_INNER": 8}.items():
        monkeypatch.setattr(planner, name, value)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The mode, with the meta device taken for one of Triton's."""

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: mode.count.update(["launch"])

    monkeypatch.delenv("FUSEDKD_CHECK", raising=False)
    monkeypatch.setattr(backends, "TRITON_DEVICES", ("meta",))
    monkeypatch.setattr(checks, "has_data", lambda value: True)  # as of a GPU's tensors
    monkeypatch.setattr(type(triton_rows._value), "__getitem__", noted, raising=False)
    small_chunks(monkeypatch)
    mode = Host()
    with mode, torch.autograd.set_multithreading_enabled(False):
        yield mode


def sides(kind: str, place: str) -> tuple[tuple[Any, Any], list[Tensor]]:
    """Student and teacher, "logits" or "heads" or one of each; the student's leaves."""
    kinds = kind.split("-") if "-" in kind else [kind, kind]
    made, leaves = [], []
    for each_kind, width in zip(kinds, (D, K), strict=True):
        shapes = [(N, V)] if each_kind == "logits" else [(N, width), (V, width), (V,)]
        tensors = [torch.randn(shape, device=place, dtype=torch.bfloat16) for shape in shapes]
        leaves.append(tensors)
        made.append(tensors[0] if each_kind == "logits" else fusedkd.Head(*tensors))
    return (made[0], made[1]), [x.requires_grad_() for x in leaves[0]]


def top_k(tail: str, place: str) -> fusedkd.TopK:
    """A teacher known by a few tokens."""
    ids = torch.randint(V, (N, 5), device=place)
    return fusedkd.TopK(ids, torch.randn(N, 5, device=place, dtype=torch.bfloat16), tail)


def labels_on(place: str) -> Tensor:
    """Some of them ignored."""
    return torch.randint(V, (N,), device=place).masked_fill(torch.arange(N, device=place) % 3 == 0, IGNORE)


def step(kind: str, place: str, *, labelled: bool = True, **options: Any) -> None:
    """Forward and backward of kd_loss."""
    pair, leaves = sides(kind, place)
    result = fusedkd.kd_loss(*pair, labels_on(place) if labelled else None, **options)
    loss = result[0] if options.get("return_stats") else result
    torch.autograd.grad(loss, leaves, torch.ones_like(loss))


def at_once(place: str, **options: Any) -> None:
    """kd_value_and_grad."""
    (student, teacher), _ = sides("logits", place)
    fusedkd.kd_value_and_grad(student, teacher, labels_on(place), **options)


def logprob(kind: str, place: str) -> None:
    """Forward and backward of token_logprobs."""
    (side, _), leaves = sides(kind, place)
    outs = fusedkd.token_logprobs(side, labels_on(place), 2.0, True)
    torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])


KINDS = ("logits", "heads", "heads-logits", "logits-heads")
# One sweep, two, decoupled, and those that gather first.
DIVERGENCES = ("rkl", "jsd", "drkl", "akl", "amid")
WAYS = [
    (kind, schedule, name)
    for kind in KINDS
    for schedule in (("auto",) if kind == "logits" else ("chunked", "streaming"))
    for name in DIVERGENCES
    if not (schedule == "streaming" and name in ("akl", "amid"))
]
MORE: dict[str, Callable[[str], dict[str, Any]]] = {
    "no labels": lambda place: {"labelled": False, "divergence": "fkl"},
    "per token": lambda place: {"divergence": fusedkd.divergence("skl", lam=torch.rand(N, device=place))},
    "mixed": lambda place: {"divergence": fusedkd.divergence("taid", t=torch.rand(N, device=place), base="drkl")},
    "weights": lambda place: {"token_weights": torch.rand(N, device=place), "ce_weight": 0.5, "temperature": 2.0},
    "num_items": lambda place: {"num_items": torch.ones((), device=place)},
    "num_items on the CPU": lambda place: {"num_items": torch.tensor(7)},
    "statistics": lambda place: {"divergence": "drkl", "return_stats": True, "reduction": "none"},
    "argmax": lambda place: {"divergence": fusedkd.divergence("drkl", target_token="teacher_argmax")},
    "floor": lambda place: {"support": "floor"},
    "vocab_size": lambda place: {"vocab_size": V // 2},
}
WHOLE_ROWS = ("argmax", "floor")  # which schedule="streaming" refuses
OPTIONS = [
    (kind, schedule, more)
    for more in MORE
    for kind, schedule in (("logits", "auto"), ("heads", "chunked"), ("heads", "streaming"))
    if not (schedule == "streaming" and more in WHOLE_ROWS)
]


@pytest.mark.parametrize(("kind", "schedule", "name"), WAYS)
@each("reduction", ["mean", "sum", "none"])
def test_every_way(kind: str, schedule: str, name: str, reduction: str, host: Host) -> None:
    """Sides, schedules, divergences and reductions: kernels are launched, products made, nothing is asked."""
    step(kind, "meta", schedule=schedule, divergence=name, reduction=reduction)
    assert host.count["launch"] >= (2 if kind == "logits" else 3)
    assert (kind != "logits") == (host.count["mm"] > 2)


@pytest.mark.parametrize(("kind", "schedule", "more"), OPTIONS)
def test_options(kind: str, schedule: str, more: str, host: Host) -> None:
    """What adds work between the kernels."""
    step(kind, "meta", schedule=schedule, **MORE[more]("meta"))
    assert host.count["launch"]


@each("more", [None, *(key for key in MORE if key != "no labels")])
def test_value_and_gradient(more: str | None, host: Host) -> None:
    """One call without autograd."""
    at_once("meta", **(MORE[more]("meta") if more else {}))
    assert host.count["launch"]


@each("tail", ["bucket", "renormalize", "truncate"])
@each("labelled", [True, False])
@each("reduction", ["mean", "none"])
def test_top_k(tail: str, labelled: bool, reduction: str, host: Host) -> None:
    """A teacher known by its likeliest tokens, beside logits and heads."""
    options = {"reduction": reduction, "divergence": "jsd", "ce_weight": 0.5 if labelled else 0.0}
    labels = labels_on("meta") if labelled else None
    for kind in ("logits", "heads"):
        (student, _), leaves = sides(kind, "meta")
        loss = fusedkd.kd_loss(student, top_k(tail, "meta"), labels, return_stats=tail != "truncate", **options)
        loss = loss if tail == "truncate" else loss[0]
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    fusedkd.kd_value_and_grad(sides("logits", "meta")[0][0], top_k(tail, "meta"), labels, **options)
    assert host.count["launch"] > 6


@each("kind", ["logits", "heads"])
def test_token_logprobs(kind: str, host: Host) -> None:
    """The policy's side."""
    logprob(kind, "meta")
    assert host.count["launch"] >= 2


@each("kind", ["logits", "heads"])
def test_topk(kind: str, host: Host) -> None:
    """Which token is among the k, and whether it is there at all, is decided on the device."""
    (side, _), _ = sides(kind, "meta")
    found = fusedkd.topk(side, 5, 2.0, V - 1)
    assert found.ids.is_meta
    assert host.count["topk"] == (1 if kind == "logits" else 3)  # in columns of 128


def planted(monkeypatch: pytest.MonkeyPatch, ask: Callable[[Tensor], Any]) -> None:
    """A question put to the loss of every launch of the value."""
    original = triton_rows.value_and_gradient

    def curious(problem: Any, student: Any, *rest: Any) -> None:
        original(problem, student, *rest)
        ask(student.x)

    monkeypatch.setattr(triton_rows, "value_and_gradient", curious)


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x.amax()),
    "tolist": lambda x: x.flatten()[:3].tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.float().numpy(force=True),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x.clone()),
    "unique": lambda x: x.unique(),
    "copy": lambda x: torch.zeros(3).to(x.device),
    "scalar": lambda x: torch.where(x > 0, torch.tensor(0.0), x),
}


@each("question", QUESTIONS)
def test_a_planted_question_is_heard(question: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a registered operator, where most of the work is done."""
    planted(monkeypatch, QUESTIONS[question])
    for work in (lambda: step("heads", "meta", schedule="chunked"), lambda: at_once("meta")):
        with pytest.raises((AssertionError, NotImplementedError), match=r"wait|no data|data-independent"):
            work()


@each("schedule", ["chunked", "streaming"])
def test_what_is_documented_to_wait(schedule: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping ignored rows counts them first; FUSEDKD_CHECK=1 looks at the labels."""
    with pytest.raises(AssertionError, match="wait"):
        step("heads", "meta", schedule=schedule, drop_ignored=True)
    step("heads", "meta", schedule=schedule, drop_ignored=False)
    monkeypatch.setenv("FUSEDKD_CHECK", "1")
    with pytest.raises(AssertionError, match="wait"):
        step("heads", "meta", schedule=schedule)
