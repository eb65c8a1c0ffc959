"""The operators as torch sees them: opcheck, torch.compile, double backward, autocast, and who gets a gradient."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from cases import DEFAULTS, IGNORE, VALUE, Case, each, expected, opcheck
from compare import assert_close, relative
from torch import Tensor

import fusedkd
from fusedkd.backends import interpreted
from fusedkd.ops.operator import OPERATORS

N, V, D, K = 4, 12, 4, 3
KINDS = ("logits", "heads", "rows of heads")
DIFFERENTIABLE = ("rows", "heads", "heads_rows", "streamed", "logprob_rows")
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own
triton = pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="Triton's interpreter"))


def labels_of(rows: int = N) -> Tensor:
    """One row is ignored."""
    labels = torch.arange(rows) * 3 % V
    labels[1] = IGNORE
    return labels


class Problem:
    """Leaves of a student, a teacher and a call that uses them."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> None:
        make = {"dtype": dtype, "requires_grad": True}
        self.labels: Tensor | None = labels_of()
        self.options: dict[str, Any] = {"divergence": "rkl", **options}
        if kind == "rows of heads":
            self.options["reduction"] = "none"
        self.student: tuple[Tensor, ...] = (torch.randn(N, V, **make),)
        self.teacher: tuple[Tensor, ...] = (torch.randn(N, V, **make),)
        if kind != "logits":
            self.student = torch.randn(N, D, **make), torch.randn(V, D, **make)
            self.teacher = torch.randn(N, K, **make), torch.randn(V, K, **make)
            if bias:
                self.student += (torch.randn(V, **make),)
                self.teacher += (torch.randn(V, **make),)
        self.extra: dict[str, Any] = {}

    def sides(self, student: tuple[Tensor, ...] | None = None) -> tuple[Any, Any]:
        """The two sides, with other student operands if asked."""
        made = [
            operands[0] if len(operands) == 1 else fusedkd.Head(*operands, **self.extra)
            for operands in (self.student if student is None else student, self.teacher)
        ]
        return made[0], made[1]

    def loss(self, *student: Tensor) -> Tensor:
        """kd_loss, as a function of the student's operands for gradcheck."""
        return fusedkd.kd_loss(*self.sides(student or None), self.labels, **self.options)

    def gradients(self, **options: Any) -> tuple[Tensor, ...]:
        """Of the sum of the loss."""
        return torch.autograd.grad(self.loss().sum(), self.student, **options)


OPCHECK: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "everything": {
        "divergence": fusedkd.divergence("ab", alpha=torch.rand(N), target=0.5),
        "support": "floor",
        "ce_weight": 0.5,
        "return_stats": True,
        "token_weights": torch.rand(N),
    },
    "triton": {"backend": "triton"},
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("options", [*list(OPCHECK)[:-1], triton])
@each("name", OPERATORS)
def test_opcheck(name: str, options: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """Schema, fake tensors, autograd registration and compilation, on the arguments of real calls."""
    for kind in (*KINDS, "streamed"):
        problem = Problem(kind, **OPCHECK[options])
        if kind == "streamed":
            problem.options |= {"schedule": "streaming", "support": "teacher"}
        if name == "add_scaled" and kind != "logits":
            problem.options["weight_grad"] = torch.randn(V, D)
        result = fusedkd.kd_loss(*problem.sides(), problem.labels, **problem.options)
        loss = (result[0] if isinstance(result, tuple) else result).sum()
        loss.backward(retain_graph=True)  # a last one has less to do
        backend = problem.options.get("backend", "auto")
        fusedkd.token_logprobs(problem.sides()[0], problem.labels, backend=backend).sum().backward()
        if kind == "logits":
            logits = [x.detach() for x in problem.sides()]
            fusedkd.kd_value_and_grad(*logits, problem.labels, **problem.options)
    opcheck(name, calls[name], differentiable=name in DIFFERENTIABLE)


@pytest.mark.unpoisoned
@each("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)])
@each("kind", ["heads", "rows of heads", "streamed"])
def test_opcheck_of_frozen_parts(frozen: tuple[int, ...], kind: str, calls: dict[str, tuple[Any, ...]]) -> None:
    """Outputs that nobody wants are empty, in the fake version too, and never share memory."""
    problem = Problem(kind, schedule="streaming" if kind == "streamed" else "chunked")
    for i in frozen:
        problem.student[i].requires_grad_(False)
    problem.loss()
    (name,) = calls
    opcheck(name, calls[name], differentiable=True)


DIVERGENCES = {"name": "drkl", "object": fusedkd.divergence("ab", alpha=0.3, beta=0.6)}
BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") or shutil.which("clang++") else [])]


def compiled_agrees(problem: Problem, backend: str) -> None:
    """Value and gradients of a compiled function equal those of the eager one, bit for bit."""

    def work(*student: Tensor) -> Tensor:
        return problem.loss(*(2 * x for x in student)).sum() * 3

    torch._dynamo.reset()
    results = []
    for run in (work, torch.compile(work, fullgraph=True, backend=backend)):
        loss = run(*problem.student)
        results.append([loss.detach(), *torch.autograd.grad(loss, problem.student)])
    for eager, compiled in zip(*results, strict=True):
        assert eager.any()
        assert_close(compiled, eager.double(), 1e-6)


@pytest.mark.unpoisoned
@each("kind", KINDS)
@each("divergence", DIVERGENCES)
def test_compile(kind: str, divergence: str) -> None:
    """fullgraph=True: no graph break anywhere in kd_loss."""
    compiled_agrees(Problem(kind, divergence=DIVERGENCES[divergence], ce_weight=0.5), "aot_eager")


@pytest.mark.unpoisoned
@each("options", [
    {"reduction": "none"},
    {"reduction": "sum", "temperature": 2.0, "temperature_squared": True},
    {"token_weights": torch.rand(N), "num_items": torch.tensor(7.0)},
    {"support": "floor", "divergence": "fkl"},
    {"divergence": fusedkd.divergence("ab", alpha=torch.rand(N), beta=torch.rand(N))},
])  # fmt: skip
def test_compile_of_options(options: dict[str, Any]) -> None:
    """Everything that changes the graph."""
    compiled_agrees(Problem("logits", **options), "aot_eager")


@pytest.mark.unpoisoned
def test_compile_without_labels() -> None:
    """Nothing is held out."""
    problem = Problem("heads")
    problem.labels = None
    compiled_agrees(problem, "aot_eager")


@pytest.mark.unpoisoned
@pytest.mark.skipif("inductor" not in BACKENDS, reason="inductor wants a C++ compiler")
def test_compile_with_inductor() -> None:
    """The compiler that people use, once for each kind of side."""
    compiled_agrees(Problem("logits"), "inductor")
    compiled_agrees(Problem("heads"), "inductor")


@pytest.mark.unpoisoned
def test_compile_of_picked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows there are is known when the graph runs."""
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    teacher, picked = torch.randn(6, 4, 33), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)

    def work(logits: Tensor, picked: Tensor) -> Tensor:
        return fusedkd.kd_loss(logits[picked], teacher[picked], divergence="rkl", backend="torch")

    torch._dynamo.reset()
    logits = torch.randn(6, 4, 33, requires_grad=True)
    pairs = [
        torch.autograd.grad(run(logits, picked), logits)[0]
        for run in (work, torch.compile(work, fullgraph=True, backend="aot_eager"))
    ]
    assert pairs[0].any()
    assert torch.equal(*pairs)


@pytest.mark.unpoisoned
def test_compile_with_stats() -> None:
    """KDStats crosses the boundary."""
    problem = Problem("logits", return_stats=True)
    torch._dynamo.reset()
    run = torch.compile(lambda x: fusedkd.kd_loss(x, problem.teacher[0], problem.labels, **problem.options),
                        fullgraph=True, backend="aot_eager")  # fmt: skip
    loss, stats = run(problem.student[0])
    wanted, expected_stats = fusedkd.kd_loss(*problem.sides(), problem.labels, **problem.options)
    assert torch.equal(loss, wanted)
    for field in stats._fields:
        assert torch.equal(getattr(stats, field), getattr(expected_stats, field))
    loss.backward()
    assert problem.student[0].grad.any()


MOVING: dict[str, Callable[[float], dict[str, Any]]] = {
    "divergence": lambda value: {"divergence": fusedkd.divergence("drkl", gamma=value)},
    "target": lambda value: {"divergence": fusedkd.divergence("fkl", target=value)},
    "temperature": lambda value: {"temperature": value},
    "ce_weight": lambda value: {"ce_weight": value},
    "num_items": lambda value: {"num_items": value},
    "squared temperature": lambda value: {"temperature": value, "temperature_squared": True},
    "ab": lambda value: {"divergence": fusedkd.divergence("ab", alpha=value, beta=0.3)},
    "taid": lambda value: {"divergence": fusedkd.divergence("taid", t=value)},
}


def follows(work: Callable[[float], Tensor], leaf: Tensor, values: list[float]) -> None:
    """A compiled function of a number agrees with the eager one at every value, in two graphs at most."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(work, fullgraph=True, backend=counter)
    seen = []
    for value in values:
        loss, wanted = run(value), work(value)
        assert torch.equal(loss, wanted)
        assert torch.equal(*(torch.autograd.grad(x, leaf)[0] for x in (loss, wanted)))
        seen.append(float(loss.detach()))
    assert len(set(seen)) == len(values)
    assert counter.frame_count <= 2, "a graph for each value"


@pytest.mark.unpoisoned
@each("kind", KINDS)
@each("name", MOVING)
def test_compile_with_a_moving_number(name: str, kind: str) -> None:
    """A number that changes from step to step (a schedule) is an input of the graph."""
    problem = Problem(kind)

    def work(value: float) -> Tensor:
        options = problem.options | MOVING[name](value)
        return fusedkd.kd_loss(*problem.sides(), problem.labels, **options).sum()

    if name == "num_items" and kind == "rows of heads":
        pytest.skip('num_items is of reduction="mean"')
    follows(work, problem.student[0], [0.5, 0.6, 0.7, 0.8])


@pytest.mark.unpoisoned
def test_compile_streaming_with_a_moving_number() -> None:
    """The other schedule."""
    problem = Problem("heads", schedule="streaming")

    def work(value: float) -> Tensor:
        return fusedkd.kd_loss(*problem.sides(), problem.labels, temperature=value, **problem.options)

    follows(work, problem.student[0], [0.5, 0.6, 0.7, 0.8])


@pytest.mark.unpoisoned
@each("kind", ["logits", "heads"])
def test_compile_token_logprobs_with_a_moving_temperature(kind: str) -> None:
    """The policy's side."""
    problem = Problem(kind)

    def work(value: float) -> Tensor:
        return fusedkd.token_logprobs(problem.sides()[0], problem.labels, value).sum()

    follows(work, problem.student[0], [0.5, 0.6, 0.7, 0.8])


@pytest.mark.unpoisoned
def test_compile_with_a_schedule() -> None:
    """TAID's recipe: the schedule's attribute moves by itself."""
    problem, schedule = Problem("logits"), fusedkd.TAIDSchedule(total_steps=20)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def work(student: Tensor) -> Tensor:
        moved = fusedkd.divergence("taid", t=schedule.t)
        return fusedkd.kd_loss(student, problem.teacher[0], problem.labels, divergence=moved)

    run = torch.compile(work, fullgraph=True, backend=counter)
    (student,) = problem.student
    for _ in range(12):
        loss = run(student)
        assert torch.equal(loss, work(student))
        schedule.update(loss)
    assert schedule.t > 0.7
    assert counter.frame_count <= 2, "a graph for each value"


@pytest.mark.unpoisoned
def test_compile_with_a_moving_tensor() -> None:
    """The same without recompiling: a 0-d tensor is read on the device."""
    problem = Problem("logits")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def work(student: Tensor, gamma: Tensor) -> Tensor:
        made = fusedkd.divergence("drkl", gamma=gamma)
        return fusedkd.kd_loss(student, problem.teacher[0], problem.labels, divergence=made)

    run = torch.compile(work, fullgraph=True, backend=counter)
    (student,) = problem.student
    for gamma in (0.5, 0.6, 0.7):
        moving = torch.tensor(gamma)
        assert torch.equal(run(student, moving), work(student, moving))
    assert counter.frame_count == 1


@pytest.mark.unpoisoned
@each("kind", KINDS)
@each("dynamic", [None, True])
def test_compile_with_moving_shapes(kind: str, dynamic: bool | None) -> None:
    """Batches of different size, with sizes known to the compiler and without."""
    problem = Problem(kind)
    torch._dynamo.reset()

    def work(student: Any, teacher: Any, labels: Tensor, *rest: Tensor) -> Tensor:
        sides = [x if kind == "logits" else fusedkd.Head(x, *rest[i::2]) for i, x in enumerate((student, teacher))]
        return fusedkd.kd_loss(*sides, labels, **problem.options).sum()

    run = torch.compile(work, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    rest = [x for pair in zip(problem.student[1:], problem.teacher[1:], strict=True) for x in pair]
    for rows in (4, 6, 9):
        student = torch.randn(rows, problem.student[0].shape[1], requires_grad=True)
        teacher = torch.randn(rows, problem.teacher[0].shape[1])
        losses = [call(student, teacher, labels_of(rows), *rest) for call in (run, work)]
        assert_close(losses[0], losses[1].detach().double(), 1e-6)
        slopes = [torch.autograd.grad(loss, student)[0] for loss in losses]
        assert slopes[1].any()
        assert_close(slopes[0], slopes[1].double(), 1e-6)


@pytest.mark.unpoisoned
def test_compile_of_value_and_grad() -> None:
    """The form without autograd compiles as well."""
    problem = Problem("logits")
    student, teacher = (x.detach() for x in problem.sides())
    torch._dynamo.reset()
    run = torch.compile(fusedkd.kd_value_and_grad, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        run(student, teacher, problem.labels), fusedkd.kd_value_and_grad(student, teacher, problem.labels), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.unpoisoned
def test_compile_under_autocast() -> None:
    """The casts of a Head's operands are part of the graph."""
    problem = Problem("heads")

    def work() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.loss()

    torch._dynamo.reset()
    losses = [call() for call in (torch.compile(work, fullgraph=True, backend="aot_eager"), work)]
    assert torch.equal(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, problem.student) for loss in losses), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@each("kind", KINDS)
def test_activation_checkpointing(kind: str) -> None:
    """A loss inside torch.utils.checkpoint runs twice and gives the same gradient."""
    problem = Problem(kind)
    loss = torch.utils.checkpoint.checkpoint(lambda *x: problem.loss(*x).sum(), *problem.student, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(loss, problem.student), problem.gradients(), strict=True):
        assert theirs.any()
        assert torch.equal(ours, theirs)


@each("kind", KINDS)
def test_double_backward_is_refused(kind: str, backend: str) -> None:
    """An error that says so, never a silent zero."""
    problem = Problem(kind, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        problem.gradients(create_graph=True)
    assert all(grad.any() for grad in problem.gradients())


@each("kind", KINDS)
def test_transforms_are_refused(kind: str, backend: str) -> None:
    """torch.func and forward mode see no derivative of an operator: said with the argument's name and a way."""
    problem = Problem(kind, backend=backend)
    inputs = tuple(x.detach() for x in problem.student)
    ones = tuple(torch.ones_like(x) for x in inputs)

    def loss(*student: Tensor) -> Tensor:
        return problem.loss(*student).sum()

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level():
            loss(*map(torch.autograd.forward_ad.make_dual, inputs, ones))

    def forward_mode_of_the_teacher() -> None:
        with torch.autograd.forward_ad.dual_level():
            made = [torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in problem.teacher]
            problem.teacher = tuple(made)
            loss(*inputs)

    works: list[tuple[str, Callable[[], Any]]] = [
        ("student", lambda: torch.func.grad(loss)(*inputs)),
        ("student", lambda: torch.func.vjp(loss, *inputs)),
        ("student", lambda: torch.func.jvp(loss, inputs, ones)),
        ("student", lambda: torch.func.jacrev(loss)(*inputs)),
        ("student", lambda: torch.func.vmap(loss)(*(torch.stack((x, x)) for x in inputs))),
        ("student", forward_mode),
        ("teacher", forward_mode_of_the_teacher),
    ]
    for name, work in works:
        with pytest.raises(NotImplementedError, match=rf"{name}.*(torch\.func|forward-mode).*plain torch loss"):
            work()


def test_transforms_of_other_functions_are_refused() -> None:
    """Every public entry, each argument that is a tensor."""
    x, ids = torch.randn(N, V), torch.arange(N)

    def differentiated(work: Callable[[Tensor], Any], name: str) -> None:
        with pytest.raises(NotImplementedError, match=rf"{name} is inside a transform"):
            torch.func.grad(lambda value: work(value).sum())(x)

    differentiated(lambda value: fusedkd.token_logprobs(value, ids), "side")
    differentiated(lambda value: fusedkd.kd_value_and_grad(value, x)[0], "student_logits")
    differentiated(lambda value: fusedkd.kd_loss(x, x, token_weights=value[:, 0]), "token_weights")
    pair = (x[None], x[None], ids[None])
    differentiated(lambda value: fusedkd.cald_loss(value[None], *pair[1:], *pair), "student_chosen")


@each("kind", KINDS)
@each("schedule", ["auto", "streaming"])
def test_batches_of_upstream_gradients_are_refused(kind: str, schedule: str, backend: str) -> None:
    """is_grads_batched=True runs the backward pass under vmap."""
    if kind == "logits" and schedule == "streaming":
        pytest.skip("a schedule of heads")
    loss = (problem := Problem(kind, backend=backend, schedule=schedule)).loss()
    with pytest.raises(RuntimeError, match="once for each"):
        torch.autograd.grad(loss, problem.student, torch.ones(2, *loss.shape), is_grads_batched=True)
    logprobs = fusedkd.token_logprobs(problem.sides()[0], problem.labels, backend=backend)
    with pytest.raises(RuntimeError, match="once for each"):
        torch.autograd.grad(logprobs, problem.student, torch.ones(2, N), is_grads_batched=True)


@each("kind", KINDS)
def test_gradients_are_constants(kind: str) -> None:
    """What comes out of backward has no graph that a penalty could be built on."""
    for grad in Problem(kind).gradients():
        assert not grad.requires_grad


@each("kind", KINDS)
def test_backward_twice(kind: str, backend: str) -> None:
    """retain_graph=True: the second gradient is the first, and with another upstream a multiple of it."""
    problem = Problem(kind, backend=backend)
    total = problem.loss().sum()
    first = torch.autograd.grad(total, problem.student, retain_graph=True)
    second = torch.autograd.grad(total, problem.student, retain_graph=True)
    third = torch.autograd.grad(total, problem.student, torch.tensor(-4.0))
    for one, other, scaled in zip(first, second, third, strict=True):
        assert one.any()
        assert torch.equal(one, other)
        assert torch.equal(-4.0 * one, scaled)


@each("kind", ["heads", "rows of heads"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_of_heads(kind: str, backward_inside: bool, backend: str) -> None:
    """float32 parameters under autocast: bfloat16 products, float32 arithmetic after them, float32 gradients."""
    problem = Problem(kind, backend=backend)
    rounded = Problem(kind, backend=backend)

    def as_cast(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, weight, bias = (x.detach() for x in operands)
        return hidden.bfloat16(), weight.bfloat16(), bias

    rounded.student = tuple(x.requires_grad_() for x in as_cast(problem.student))
    rounded.teacher = as_cast(problem.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = problem.loss()
        if backward_inside:
            loss.sum().backward()
    if not backward_inside:
        loss.sum().backward()
    plain = rounded.loss()
    assert loss.dtype == torch.float32
    assert_close(loss, plain.detach().double(), 1e-6)
    for parameter, grad in zip(problem.student, rounded.gradients(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert relative(parameter.grad, grad.double()) < 2**-8


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_of_logits(backward_inside: bool, backend: str) -> None:
    """Logits are what they are: the same bits with and without autocast."""
    problem = Problem("logits", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        loss = problem.loss()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert torch.equal(loss, problem.loss())
    assert torch.equal(problem.student[0].grad, problem.gradients()[0])


@each("kind", KINDS)
def test_only_the_student_learns(kind: str, backend: str) -> None:
    """Teacher tensors that require grad get None."""
    problem = Problem(kind, backend=backend)
    problem.loss().sum().backward()
    assert all(x.grad is None for x in problem.teacher)
    assert all(x.grad.any() for x in problem.student)


@each("kind", ["heads", "rows of heads"])
@each("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_parts(kind: str, frozen: tuple[int, ...], backend: str) -> None:
    """A frozen part gets None, and the others what they get without it."""
    problem = Problem(kind, backend=backend)
    free = problem.gradients()
    for i in frozen:
        problem.student[i].requires_grad_(False)
    problem.loss().sum().backward()
    for i, (x, grad) in enumerate(zip(problem.student, free, strict=True)):
        if i in frozen:
            assert x.grad is None
        else:
            assert_close(x.grad, grad.double(), 1e-6)


def test_nothing_to_learn(backend: str) -> None:
    """A student without gradients gives a plain number."""
    for kind in KINDS:
        problem = Problem(kind, backend=backend)
        for x in problem.student:
            x.requires_grad_(False)
        assert not problem.loss().requires_grad


@each("kind", ["logits", "heads"])
@each("reduction", ["mean", "none"])
def test_loss_scaler(kind: str, reduction: str) -> None:
    """A float16 student under a scale of 65536, the largest float16 nearly: finite, and right after unscaling."""
    scale, rows = 65536.0, 64
    labels = torch.arange(rows) % V
    make = {"dtype": torch.float64}
    student = [torch.randn(rows, D, **make), 3 * torch.randn(V, D, **make)]
    teacher = [torch.randn(rows, K, **make), 3 * torch.randn(V, K, **make)]
    if kind == "logits":
        student, teacher = [student[0] @ student[1].T], [teacher[0] @ teacher[1].T]
    student, teacher = ([x.half() for x in side] for side in (student, teacher))
    leaves = [x.clone().requires_grad_() for x in student]
    sides = [x[0] if kind == "logits" else fusedkd.Head(*x) for x in (leaves, teacher)]
    loss = fusedkd.kd_loss(*sides, labels, divergence="rkl", reduction=reduction)
    (loss.mean() * scale).backward()
    exact = [x.double().requires_grad_() for x in student]
    logits = exact[0] if kind == "logits" else exact[0] @ exact[1].T
    theirs = teacher[0].double() if kind == "logits" else teacher[0].double() @ teacher[1].double().T
    truth, _, weights = expected(logits.detach(), theirs, labels, ("rkl", {}), {})
    wanted = torch.autograd.grad(logits, exact, truth.gradient(weights))
    for x, slope in zip(leaves, wanted, strict=True):
        assert x.grad.dtype == torch.float16
        assert x.grad.isfinite().all()
        assert relative(x.grad.double() / scale, slope) < 1e-3


GRADCHECK = [
    {},
    {"temperature": 1.7, "temperature_squared": True, "ce_weight": 0.4},
    {"token_weights": torch.rand(N, dtype=torch.float64)},
]


HELD = ("taid", "akl", "todi")  # these hold a part of the value constant


@each("case", [case for case in DEFAULTS if case[0] not in HELD])
@each("kind", KINDS)
@pytest.mark.parametrize("options", GRADCHECK, ids=["plain", "temperature", "weights"])
def test_gradcheck(case: Case, kind: str, options: dict[str, Any]) -> None:
    """The gradient is the derivative of the value, by central differences in float64."""
    made = fusedkd.divergence(case[0], **case[1])
    problem = Problem(kind, torch.float64, divergence=made, backend="torch", **options)
    if kind != "logits":
        problem.extra = {"scale": 0.8, "softcap": 4.0}
    if kind == "logits" and options:
        problem.options["reduction"] = "none"
    assert torch.autograd.gradcheck(problem.loss, problem.student, atol=1e-6, rtol=1e-4)


def test_gradcheck_notices() -> None:
    """A gradient that is 1 % off does not pass."""
    problem = Problem("logits", torch.float64, backend="torch")

    def loss(x: Tensor) -> Tensor:
        return problem.loss(x + 0.01 * (x - x.detach()))

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(loss, problem.student, atol=1e-6, rtol=1e-4)


def test_module() -> None:
    """An nn.Module: its repr tells the loss, and it can be copied and stored."""
    module = fusedkd.DistillationLoss("drkl", temperature=2.0, ce_weight=0.5)
    assert isinstance(module, torch.nn.Module)
    for part in ("DistillationLoss", "drkl", "temperature=2.0", "ce_weight=0.5"):
        assert part in repr(module)
    assert "gamma=0.25" in repr(fusedkd.DistillationLoss(fusedkd.divergence("drkl", gamma=0.25)))
    problem = Problem("logits")
    wanted = module(*problem.sides(), problem.labels)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.nn.Sequential(module)[0]):
        assert torch.equal(twin(*problem.sides(), problem.labels), wanted)
    assert not torch.equal(module(*problem.sides(), problem.labels, temperature=1.0), wanted)


@each("case", DEFAULTS)
def test_module_of_every_divergence_is_stored(case: Case) -> None:
    """Kernels and all: what is stored is a name, not code."""
    module = fusedkd.DistillationLoss(fusedkd.divergence(case[0], **case[1]))
    problem = Problem("logits")
    twin = pickle.loads(pickle.dumps(module))
    assert_close(twin(*problem.sides(), problem.labels), module(*problem.sides(), problem.labels).double(), VALUE)
