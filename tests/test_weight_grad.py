"""weight_grad: the backward pass adds the head's weight gradient to a buffer that the caller owns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from cases import IGNORE, VALUE, check_heads, each, opcheck, random_labels, side
from compare import assert_close
from torch import Tensor

import fusedkd
from fusedkd.schedules import gemm, planner, vocab_chunks

LEAD, VOCABULARY = (2, 4), 130
SCHEDULES = ("chunked", "streaming")
FLOAT32 = {"weight_grad": torch.float32}
N, V, D = 6, 65, 8


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed chunks of 48 columns, so that a few dozen columns are several chunks and a rest."""
    monkeypatch.setattr(planner, "_STREAM_LEAST", 48)
    monkeypatch.setattr(planner, "_CPU_STREAM", 48)


def check(backend: str, schedule: str, lead: tuple[int, ...] = LEAD, **options: Any) -> None:
    """Loss, gradients and buffer against the float64 oracle, under a random upstream gradient."""
    options = FLOAT32 | options
    labels = options.pop("labels", random_labels(lead, options.get("vocab_size", VOCABULARY)))
    student, teacher = side(lead, VOCABULARY, 16, bias=True), side(lead, options.pop("theirs", VOCABULARY), 24)
    check_heads(student, teacher, labels, ("drkl", {}), backend, schedule=schedule, **options)


@each("schedule", SCHEDULES)
@each("reduction", ["mean", "sum", "none"])
def test_every_reduction(schedule: str, reduction: str, backend: str) -> None:
    """Both schedules and, for "none", the gradient that is formed in the backward pass."""
    check(backend, schedule, reduction=reduction)


@each("schedule", SCHEDULES)
@each("own", [False, True])
@each("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(schedule: str, own: bool, dtype: torch.dtype) -> None:
    """A float32 buffer, and one of the weight's own dtype."""
    backend = "triton" if torch.cuda.is_available() else "torch"  # the kernels have no part in it, the products have
    check(backend, schedule, dtype=dtype, weight_grad=dtype if own else torch.float32)


@each("schedule", SCHEDULES)
def test_float64(schedule: str) -> None:
    """A float64 weight has a float64 buffer."""
    check("torch", schedule, dtype=torch.float64, weight_grad=torch.float64)


OPTIONS: dict[str, dict[str, Any]] = {
    "frozen hidden": {"frozen": ("hidden",)},
    "frozen hidden, per token": {"frozen": ("hidden",), "reduction": "none"},
    "frozen bias": {"frozen": ("bias",)},
    "all rows": {"drop_ignored": False},
    "all rows, per token": {"drop_ignored": False, "reduction": "none"},
    "rows dropped, per token": {"drop_ignored": True, "reduction": "none"},
    "weights": {"token_weights": torch.rand(LEAD), "num_items": 3.0},
    "fewer columns": {"vocab_size": 100},
    "a smaller teacher": {"theirs": 100, "labels": random_labels(LEAD, 100), "ce_weight": 0.5},
    "no token counts": {"labels": torch.full(LEAD, IGNORE)},
    "no token": {"lead": (0,)},
}


@each("schedule", SCHEDULES)
@each("options", OPTIONS)
def test_options(schedule: str, options: str) -> None:
    """What changes which rows and columns there are; untouched rows of the buffer keep what they held."""
    check("torch", schedule, **OPTIONS[options])


class Training:
    """A step that uses a head's weight, and what the plain call gives."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
        self.teacher = 3 * torch.randn(N, V)
        self.labels = random_labels((N,), V)
        self.options: dict[str, Any] = {"divergence": "rkl", **options}

    def loss(self, buffer: Tensor | None = None) -> Tensor:
        """The summed loss, with a gradient of the weight in `buffer`."""
        return self.of(fusedkd.Head(self.hidden, self.weight), buffer)

    def of(self, head: fusedkd.Head, buffer: Tensor | None = None) -> Tensor:
        """The loss of another head."""
        return fusedkd.kd_loss(head, self.teacher, self.labels, weight_grad=buffer, **self.options).sum()

    def truth(self) -> Tensor:
        """The weight's gradient by float64 logits and plain autograd."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double().requires_grad_()
        loss = fusedkd.kd_loss(hidden @ weight.T, self.teacher.double(), self.labels, **self.options)
        return torch.autograd.grad(loss.sum(), weight)[0]


WAYS = [{"schedule": "chunked"}, {"schedule": "streaming"}, {"schedule": "chunked", "reduction": "none"}]
ways = pytest.mark.parametrize("options", WAYS, ids=lambda options: "-".join(options.values()))


def logits_options(options: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to heads."""
    return {key: value for key, value in options.items() if key != "schedule"}


def training(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Training, Tensor]:
    """A step and the weight's true gradient."""
    step = Training(dtype, **logits_options(options))
    truth = step.truth()
    step.options |= options
    return step, truth


@ways
def test_half_precision_is_not_rounded_on_the_way(options: dict[str, Any]) -> None:
    """A bfloat16 head adds to a float32 buffer what a CPU computed in float32, with all its digits."""
    step, truth = training(options, torch.bfloat16)
    start = torch.randn(V, D) * truth.std().float()
    buffer = start.clone()
    step.loss(buffer).backward()
    assert_close(buffer, start.double() + truth, VALUE)
    assert step.weight.grad is None
    assert step.hidden.grad is not None


@ways
def test_every_backward_adds(options: dict[str, Any]) -> None:
    """retain_graph=True twice, and a second loss before the first one's backward: like .grad."""
    step, truth = training(options)
    flat = torch.randn(2 * V * D)
    start = flat.clone()
    buffer = flat[V * D :].view(V, D)
    first, second = step.loss(buffer), step.loss(buffer)
    flat += 1.0  # another layer's gradient, in the same memory: no saved tensor notices
    first.backward(retain_graph=True)
    first.backward()
    (2 * second).backward()
    assert_close(buffer, start[V * D :].view(V, D).double() + 1.0 + 4 * truth, VALUE)
    assert torch.equal(flat[: V * D], start[: V * D] + 1.0)
    assert_close(step.hidden.grad, 4 * torch.autograd.grad(step.loss(), step.hidden)[0].double(), VALUE)


@ways
def test_untouched_without_a_backward(options: dict[str, Any]) -> None:
    """Neither the forward pass, nor no_grad, nor a refused second derivative adds anything."""
    step, _ = training(options)
    buffer = torch.randn(V, D)
    start = buffer.clone()
    with torch.no_grad():
        plain = step.loss(buffer)
        step.of(fusedkd.Head(step.hidden, step.weight[:V]), buffer)  # a view that records nothing
    loss = step.loss(buffer)
    assert torch.equal(loss, plain)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, step.hidden, create_graph=True)
    assert torch.equal(buffer, start)


@each("parameters", [torch.float32, torch.float64])
@ways
def test_autocast(options: dict[str, Any], parameters: torch.dtype) -> None:
    """The bfloat16 head of autocast, which leaves float64 alone, adds to a buffer of the parameters' dtype."""
    step, truth = training(options, parameters)
    rounded = Training(torch.bfloat16, **logits_options(options))
    rounded.teacher, rounded.labels = step.teacher, step.labels
    for x in ("hidden", "weight"):
        getattr(rounded, x).data.copy_(getattr(step, x).data)
    buffer = torch.randn(V, D, dtype=parameters)
    wanted = buffer.double() + (truth if parameters == torch.float64 else rounded.truth())
    with torch.autocast("cpu", torch.bfloat16):
        loss = step.loss(buffer)
        loss.backward()
    assert step.weight.grad is None
    assert_close(buffer, wanted, VALUE, dtype=parameters)


@each("reentrant", [False, True])
@ways
def test_activation_checkpointing(options: dict[str, Any], reentrant: bool) -> None:
    """The forward runs twice, the gradient is added once."""
    step, truth = training(options)
    buffer = torch.zeros(V, D)

    def loss(hidden: Tensor) -> Tensor:
        return step.of(fusedkd.Head(hidden, step.weight), buffer)

    torch.utils.checkpoint.checkpoint(loss, step.hidden, use_reentrant=reentrant).backward()
    assert_close(buffer, truth, VALUE)


@ways
def test_part_of_a_padded_vocabulary(options: dict[str, Any]) -> None:
    """The first rows of a longer weight with the first rows of its buffer; nothing flows into the rest."""
    step, truth = training(options)
    padded = torch.cat((step.weight.detach(), torch.randn(7, D))).requires_grad_()
    buffer = torch.zeros(V + 7, D)
    step.of(fusedkd.Head(step.hidden, padded[:V]), buffer[:V]).backward()
    assert padded.grad is None
    assert_close(buffer, torch.cat((truth, torch.zeros(7, D, dtype=torch.float64))), VALUE)


@ways
def test_a_wrapper_that_owns_main_grad(options: dict[str, Any]) -> None:
    """Megatron's way: a hook behind each parameter's accumulation adds .grad to main_grad and drops it.

    The weight is tied to the embedding, whose part of the gradient arrives as .grad and is added by the hook.
    """
    step, _ = training(options)
    tokens = torch.randint(V, (N,))

    def loss(weight: Tensor, buffer: Tensor | None) -> Tensor:
        hidden = step.hidden.to(weight.dtype) + torch.nn.functional.embedding(tokens, weight)
        if weight.dtype == torch.float32:
            return step.of(fusedkd.Head(hidden, weight), buffer)
        return fusedkd.kd_loss(hidden @ weight.T, step.teacher, step.labels, **logits_options(step.options)).sum()

    exact = step.weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(loss(exact, None), exact)
    weight, main_grad, ready = step.weight, torch.zeros(V, D), []

    def hook(*_: Any) -> None:
        if weight.grad is not None:
            main_grad.add_(weight.grad)
        weight.grad = None
        ready.append(weight)

    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulate.register_hook(hook)
    loss(weight, main_grad).backward()
    assert len(ready) == 1
    assert_close(main_grad, truth, VALUE)


def test_the_hook_runs_without_a_gradient() -> None:
    """A weight that is used by the head alone has no .grad, and a wrapper still learns that it is done."""
    step, truth = training(WAYS[0])
    buffer, ready = torch.zeros(V, D), []
    accumulate = step.weight.expand_as(step.weight).grad_fn.next_functions[0][0]
    accumulate.register_hook(lambda *_: ready.append(step.weight.grad))
    step.loss(buffer).backward()
    assert ready == [None]
    assert_close(buffer, truth, VALUE)


def test_cald() -> None:
    """Both halves of cald_loss add to the buffer."""
    step = Training()
    hidden, labels = step.hidden.detach().view(2, 3, D), step.labels.view(2, 3)
    halves = [(fusedkd.Head(x * hidden, step.weight), step.teacher.view(2, 3, V), labels) for x in (1.0, 0.5)]
    (plain,) = torch.autograd.grad(fusedkd.cald_loss(*halves[0], *halves[1]), step.weight)
    buffer = torch.zeros(V, D)
    fusedkd.cald_loss(*halves[0], *halves[1], weight_grad=buffer).backward()
    assert plain.any()
    assert_close(buffer, plain.double(), VALUE)


def test_module() -> None:
    """Given at call time; at construction it would be copied and stored with the module."""
    step, truth = training(WAYS[0])
    buffer = torch.zeros(V, D)
    module = fusedkd.DistillationLoss(**step.options)
    module(fusedkd.Head(step.hidden, step.weight), step.teacher, step.labels, weight_grad=buffer).backward()
    assert_close(buffer, truth, VALUE)
    with pytest.raises(TypeError, match=r"weight_grad .* call time"):
        fusedkd.DistillationLoss(weight_grad=buffer)


@pytest.mark.unpoisoned
def test_compile() -> None:
    """A whole graph is refused by name; where the graph may break, the call runs eagerly between its parts."""
    step, truth = training(WAYS[0])
    buffer = torch.zeros(V, D)

    def work(hidden: Tensor) -> Tensor:
        return step.of(fusedkd.Head(2 * hidden, step.weight), buffer) * 3

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"weight_grad cannot be used inside torch\.compile"):
        torch.compile(work, fullgraph=True, backend="aot_eager")(step.hidden)
    assert not buffer.any()
    torch._dynamo.reset()
    torch.compile(work, backend="aot_eager")(step.hidden / 2).backward()
    assert_close(buffer, 3 * truth, VALUE)


@pytest.mark.unpoisoned
@each("given", [False, True])
def test_operator(given: bool, calls: dict[str, tuple[Any, ...]]) -> None:
    """opcheck of the streamed backward, which writes to the buffer: schema, mutation, fake tensors."""
    buffer = torch.randn(V, D) if given else None
    student = fusedkd.Head(torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True))
    fusedkd.kd_loss(student, torch.randn(N, V), schedule="streaming", weight_grad=buffer).backward()
    opcheck("streamed_gradient", calls["streamed_gradient"])


def test_product_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's float16 dZ has the largest weight taken out: it is put back before anything is added."""

    def product(dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        out.copy_(dz.float().T @ hidden.float() + (out if accumulate else 0.0))

    monkeypatch.setattr(gemm, "weight_gradient", product)
    dz, hidden, size = torch.randn(N, V).half(), torch.randn(N, D).half(), torch.tensor(8.0)
    start = torch.randn(V, D)
    buffer = start.clone()
    vocab_chunks._add_product(dz, hidden, size, buffer)
    assert_close(buffer, start.double() + 8.0 * dz.double().T @ hidden.double(), VALUE)


def overlapping() -> dict[str, Any]:
    """A buffer whose last row is the weight's first."""
    flat = torch.randn(2 * V - 1, D)
    return {"weight": flat[V - 1 :], "weight_grad": flat[:V]}


MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], Any, tuple[str, ...]]] = {
    "a list": (lambda: {"weight_grad": [0.0]}, TypeError, ("list",)),
    "logits": (lambda: {"student": torch.randn(N, V), "weight_grad": torch.zeros(V, D)}, ValueError, ("Head", "None")),
    "frozen": (lambda: {"frozen": True, "weight_grad": torch.zeros(V, D)}, ValueError, ("require grad", "None")),
    "shape": (lambda: {"weight_grad": torch.zeros(V + 1, D)}, ValueError, ("(66, 8)", "(65, 8)")),
    "dtype": (lambda: {"weight_grad": torch.zeros(V, D).bfloat16()}, TypeError, ("bfloat16", "float32")),
    "integers": (lambda: {"weight_grad": torch.zeros(V, D, dtype=torch.int32)}, TypeError, ("int32",)),
    "too narrow": (
        lambda: {"weight": torch.randn(V, D).double(), "weight_grad": torch.zeros(V, D)},
        TypeError,
        ("float64", "float32"),
    ),
    "device": (lambda: {"weight_grad": torch.zeros(V, D, device="meta")}, ValueError, ("meta", "cpu")),
    "strides": (lambda: {"weight_grad": torch.zeros(D, V).T}, ValueError, ("contiguous", "(1, 65)")),
    "padded rows": (lambda: {"weight_grad": torch.zeros(V, 2 * D)[:, :D]}, ValueError, ("contiguous", "(16, 1)")),
    "grad": (lambda: {"weight_grad": torch.zeros(V, D, requires_grad=True)}, ValueError, ("detach",)),
    "the weight": (lambda: {"weight": (w := torch.randn(V, D)), "weight_grad": w}, ValueError, ("weight", "memory")),
    "overlapping": (overlapping, ValueError, ("weight of student", "memory")),
    "teacher": (lambda: {"theirs": (w := torch.randn(V, D)), "weight_grad": w}, ValueError, ("weight of teacher",)),
}


@each("mistake", MISTAKES)
def test_refused(mistake: str) -> None:
    """Named, with what would work."""
    make, error, words = MISTAKES[mistake]
    given = make()
    weight = given.get("weight", torch.randn(V, D)).detach()
    hidden = torch.randn(N, D, dtype=weight.dtype)
    weight.requires_grad_("frozen" not in given)
    student = given.get("student", fusedkd.Head(hidden, weight))
    teacher = fusedkd.Head(torch.randn(N, D), given.get("theirs", torch.randn(V, D)))
    with pytest.raises(error) as caught:
        fusedkd.kd_loss(student, teacher, weight_grad=given["weight_grad"])
    for word in ("weight_grad", *words):
        assert word in str(caught.value)
