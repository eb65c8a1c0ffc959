"""DistillationHead: kd_loss of two Heads in a forward; the same training sharded (FSDP2) or replicated (DDP)."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import ranks
import torch
from compare import relative
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedkd

B, T, V, D, K = 4, 10, 97, 16, 24  # V is odd: shards of different sizes
STEPS, WORLD = 5, 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Model(nn.Module):
    """Two layers between an embedding and an output layer; hidden states, not logits."""

    def __init__(self, width: int, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.layers = nn.Sequential(Block(width), Block(width))
        self.lm_head = nn.Linear(width, V, bias=bias)
        if tied:
            nn.init.normal_(self.embed.weight, std=width**-0.5)
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embed(ids))


class Root(nn.Module):
    """Student, teacher and loss: what a wrapper wraps."""

    def __init__(self, student: Model, teacher: Model, **options: Any) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.head = fusedkd.DistillationHead(student.lm_head, teacher.lm_head, **options)
        self.seen: set[torch.dtype] = set()

    def forward(self, ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            teacher_hidden = self.teacher(ids)
        self.seen.add(self.student.lm_head.weight.dtype)
        return self.head(self.student(ids), teacher_hidden, labels, **options)


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and labels; the second half of the rows has half as many tokens that count."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(V, (2, B, T), generator=generator)
    labels[B // 2 :, : T // 2] = -100
    return ids, labels


# One process ----------------------------------------------------------------------------------------------------------


def hidden_states(grad: bool = True) -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D).requires_grad_(grad), torch.randn(B, T, K)


CASES: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "plain": (False, {}, {}),
    "bias": (True, {}, {"divergence": "jsd"}),
    "softcap": (False, {"student_softcap": 3.0, "teacher_softcap": 5.0}, {"divergence": "drkl", "temperature": 2.0}),
    "scale": (True, {"student_scale": 0.5, "teacher_scale": 2.0}, {"divergence": "rkl", "ce_weight": 0.5}),
    "streaming": (True, {"student_softcap": 3.0}, {"schedule": "streaming", "reduction": "sum"}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_is_kd_loss(case: str) -> None:
    """Bit for bit: the loss, the gradients of hidden states, weight and bias; nothing reaches the teacher."""
    bias, own, options = CASES[case]
    ours, theirs = nn.Linear(D, V, bias=bias), nn.Linear(K, V, bias=bias)
    _, labels = batch()
    hidden, teacher_hidden = hidden_states()
    loss = fusedkd.DistillationHead(ours, theirs, **own, **options)(hidden, teacher_hidden, labels)
    loss.backward()
    found = [loss.detach(), hidden.grad, *(p.grad for p in ours.parameters())]
    assert all(p.grad is None and p.requires_grad for p in theirs.parameters())

    hidden = hidden.detach().requires_grad_()
    again = copy.deepcopy(ours).requires_grad_()
    student, teacher = (
        fusedkd.Head(x, layer.weight, layer.bias, own.get(f"{side}_scale", 1.0), own.get(f"{side}_softcap"))
        for side, x, layer in (("student", hidden, again), ("teacher", teacher_hidden, theirs))
    )
    again.zero_grad()
    loss = fusedkd.kd_loss(student, teacher, labels, **options)
    loss.backward()
    expected = [loss.detach(), hidden.grad, *(p.grad for p in again.parameters())]
    for x, y in zip(found, expected, strict=True):
        assert x is not None and y is not None
        assert torch.equal(x, y)


def test_options_at_call() -> None:
    """They replace those of construction, and statistics come through."""
    _, labels = batch()
    given = hidden_states()
    head = fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(K, V), "jsd", temperature=2.0)
    same = fusedkd.DistillationHead(head.student_lm_head, head.teacher_lm_head, "rkl", num_items=7)
    loss, stats = head(*given, labels, divergence="rkl", temperature=1.0, num_items=7, return_stats=True)
    assert torch.equal(loss, same(*given, labels))
    assert stats.loss.shape == labels.shape
    buffer = torch.zeros(V, D)
    same(*given, labels, weight_grad=buffer).backward()
    assert same.student_lm_head.weight.grad is None
    assert bool(buffer.any())


def test_tied_weights() -> None:
    """The weight is the embedding's own, and its gradient the sum of both uses."""
    ids, labels = batch()
    student, teacher = Model(D, tied=True), Model(K)
    root = Root(student, teacher)
    assert root.head.student_lm_head.weight is student.embed.weight
    root(ids, labels).backward()
    found = student.embed.weight.grad

    weight = student.embed.weight
    table, matrix = (weight.detach().clone().requires_grad_() for _ in range(2))
    hidden = student.layers(nn.functional.embedding(ids, table))
    theirs = fusedkd.Head(teacher(ids), teacher.lm_head.weight)
    fusedkd.kd_loss(fusedkd.Head(hidden, matrix), theirs, labels).backward()
    assert found is not None and table.grad is not None and matrix.grad is not None
    assert bool(table.grad.any()) and bool(matrix.grad.any())
    assert torch.equal(found, table.grad + matrix.grad)


def test_self_distillation() -> None:
    """One layer on both sides goes on learning, from the student's use of it alone."""
    _, labels = batch()
    hidden, teacher_hidden = torch.randn(B, T, D), torch.randn(B, T, D)
    layer = nn.Linear(D, V)
    fusedkd.DistillationHead(layer, layer)(hidden, teacher_hidden, labels).backward()
    assert len(list(fusedkd.DistillationHead(layer, layer).parameters())) == 2
    weight = layer.weight.detach().clone().requires_grad_()
    theirs = fusedkd.Head(teacher_hidden, layer.weight.detach(), layer.bias.detach())
    fusedkd.kd_loss(fusedkd.Head(hidden, weight, layer.bias.detach()), theirs, labels).backward()
    assert weight.grad is not None and layer.weight.grad is not None
    assert relative(layer.weight.grad, weight.grad.double()) < 1e-6


def test_state_dict() -> None:
    """Names are an interface: checkpoints have them."""
    head = fusedkd.DistillationHead(nn.Linear(D, V, bias=False), nn.Linear(K, V), "jsd")
    assert list(head.state_dict()) == ["student_lm_head.weight", "teacher_lm_head.weight", "teacher_lm_head.bias"]
    other = fusedkd.DistillationHead(nn.Linear(D, V, bias=False), nn.Linear(K, V), "jsd")
    other.load_state_dict(head.state_dict())
    given = hidden_states(grad=False)
    assert torch.equal(other(*given), head(*given))


def test_repr() -> None:
    """The divergence and what was given."""
    text = repr(fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(K, V), "jsd", student_softcap=30.0, ce_weight=0.5))
    for part in ("DistillationHead", "jsd", "student_softcap=30.0", "ce_weight=0.5", "(teacher_lm_head)"):
        assert part in text
    assert "scale" not in text


def test_compiled() -> None:
    """One graph, with the loss and gradients of an eager call."""
    _, labels = batch()
    head = fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(K, V))
    given = hidden_states(grad=False)
    losses, grads = [], []
    for call in (head, torch.compile(head, backend="aot_eager", fullgraph=True)):
        head.zero_grad()
        (loss := call(*given, labels)).backward()
        losses.append(loss.detach())
        grads.append(head.student_lm_head.weight.grad)
    assert torch.equal(*losses)
    assert torch.equal(*grads)


def test_parametrized() -> None:
    """A weight that is computed as it is read, by a class that inherits forward."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(D, V, bias=False))
    given = hidden_states(grad=False)
    teacher = nn.Linear(K, V)
    loss = fusedkd.DistillationHead(layer, teacher)(*given)
    loss.backward()
    assert relative(loss.detach(), fusedkd.kd_loss(layer(given[0]), teacher(given[1])).detach().double()) < 1e-5
    assert layer.parametrizations.weight.original.grad is not None


# What is refused ------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """What an adapter makes of a layer, as peft does: `weight` is the base matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(D, V)
        self.update = nn.Linear(D, V, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.update(x)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def changed(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(D, V)
        change(layer)
        return layer

    return make


def set_weight(weight: Tensor) -> Callable[[nn.Linear], None]:
    return lambda layer: setattr(layer, "weight", nn.Parameter(weight, requires_grad=False))


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * x


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a tensor": (lambda: torch.randn(V, D), "got Tensor", "lm_head itself"),
    "no layer": (lambda: nn.Embedding(V, D), "forward of its own", "torch.nn.Linear"),
    "adapter": (Lora, "base matrix alone", "merge_and_unload"),
    "subclass": (lambda: Scaled(D, V), "forward of its own", "give kd_loss the logits"),
    "instance": (changed(replace_forward), "forward of its own", "accelerate"),
    "integers": (changed(set_weight(torch.ones(V, D, dtype=torch.int8))), "int8", "dequantise"),
    "wrapper": (changed(set_weight(TwoTensor(torch.ones(V, D), torch.ones(V, D)))), "TwoTensor", "dequantise"),
    "hook": (changed(lambda x: x.register_forward_hook(lambda *_: None)), "forward hooks", "remove them"),
    "pre-hook": (changed(lambda x: x.register_forward_pre_hook(lambda *_: None)), "forward hooks", "remove them"),
}


@pytest.mark.parametrize("side", ["student_lm_head", "teacher_lm_head"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_layers(what: str, side: str) -> None:
    """At construction, with the argument, the reason and what would work."""
    make, reason, instead = REFUSED[what]
    layers = {"student_lm_head": nn.Linear(D, V), "teacher_lm_head": nn.Linear(D, V), side: make()}
    with pytest.raises(TypeError, match=f"^{side} ") as caught:
        fusedkd.DistillationHead(**layers)
    assert reason in str(caught.value)
    assert instead in str(caught.value)


def test_what_becomes_of_a_layer_later() -> None:
    """An adapter put on after construction is seen at the next call."""
    head = fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(D, V))
    head.student_lm_head = Lora()
    with pytest.raises(TypeError, match=r"student_lm_head .* base matrix alone"):
        head(torch.randn(3, D), torch.randn(3, D))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "DistillationHead has no option 'temprature'"),
        ({"weight_grad": torch.zeros(V, D)}, TypeError, "weight_grad belongs to one weight"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be > 0"),
        ({"teacher_softcap": "no"}, TypeError, "teacher_softcap must be a number"),
        ({"student_scale": -1.0}, ValueError, "student_scale must be > 0"),
        ({"divergence": "nothing"}, ValueError, "nothing"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """At construction."""
    with pytest.raises(error, match=message):
        fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(K, V), **options)


def test_refused_calls() -> None:
    """Dtypes that would round a count or make a float32 product in silence, and widths that do not fit."""
    head = fusedkd.DistillationHead(nn.Linear(D, V), nn.Linear(K, V))
    hidden, teacher_hidden = hidden_states(grad=False)
    with pytest.raises(TypeError, match=re.escape("fully_shard: MixedPrecisionPolicy(param_dtype=torch.bfloat16)")):
        head(hidden.bfloat16(), teacher_hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden.bfloat16(), teacher_hidden.bfloat16()).isfinite()
    with pytest.raises(TypeError, match=r"num_items is torch\.bfloat16, which rounds counts"):
        head(hidden, teacher_hidden, num_items=torch.tensor(1001.0).bfloat16())
    with pytest.raises(ValueError, match=r"teacher\.hidden must have shape"):
        head(hidden, hidden)


# Two ranks ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """How a root module is made, wrapped, and called on each rank."""

    wrap: str = "fsdp"
    tied: bool = False
    bias: bool = False
    shared: bool = False  # one output layer for both sides
    half: bool = False  # compute in bfloat16, master weights in float32
    frozen: bool = True  # whether the teacher is
    streaming: bool = False  # the backward pass reads the weights, which have been gathered again
    own_mean: bool = False  # each rank divides by its own number of tokens: wrong


TRAINED = {
    "fsdp": Case(),
    "fsdp tied": Case(tied=True),
    "fsdp bias softcap": Case(bias=True),
    "fsdp shared": Case(shared=True),
    "fsdp unfrozen": Case(frozen=False),
    "fsdp own unit": Case(wrap="fsdp, the head by itself"),
    "fsdp own unit streaming": Case(wrap="fsdp, the head by itself", streaming=True),
    "fsdp bfloat16": Case(half=True),
    "fsdp bfloat16 tied": Case(half=True, tied=True),
    "ddp": Case(wrap="ddp"),
    "ddp tied": Case(wrap="ddp", tied=True),
    "ddp shared": Case(wrap="ddp", shared=True),
    "fsdp own mean": Case(own_mean=True),
    "ddp own mean": Case(wrap="ddp", own_mean=True),
}
REFERENCES = {name: case._replace(wrap="", frozen=True, own_mean=False) for name, case in TRAINED.items()}


class Outcome(NamedTuple):
    """What a training leaves: parameters by name, whole, and the loss of each step."""

    parameters: dict[str, Tensor]
    losses: Tensor
    dtypes: set[torch.dtype]


def make_root(case: Case) -> Root:
    """The same one on every rank, and without ranks."""
    torch.manual_seed(0)
    student, teacher = Model(D, case.bias, case.tied), Model(D if case.shared else K, case.bias)
    if case.shared:
        teacher.lm_head = student.lm_head
    if case.frozen:
        teacher.embed.requires_grad_(False)
        teacher.layers.requires_grad_(False)
        teacher.lm_head.requires_grad_(case.shared)
    softcaps = {"student_softcap": 4.0, "teacher_softcap": 3.0} if case.bias else {}
    schedule = "streaming" if case.streaming else "auto"
    return Root(student, teacher, divergence="jsd", schedule=schedule, **softcaps)


def train(root: Root, call: Callable[..., Tensor], ids: Tensor, labels: Tensor, num_items: float | None) -> Outcome:
    optimizer = torch.optim.SGD(root.parameters(), 2.0, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = call(ids, labels, num_items=num_items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in root.named_parameters()}
    return Outcome(whole, torch.stack(losses), root.seen)


def train_alone(case: Case) -> Outcome:
    """All rows in one process without a wrapper. Half: each step computes with a copy in bfloat16."""
    root = make_root(case)
    ids, labels = batch()

    def call(*args: Any, **options: Any) -> Tensor:
        if not case.half:
            return root(*args, **options)
        copies = {p: p.bfloat16() for p in root.parameters()}  # of a tied weight one
        slots = [(m._parameters, name, p) for m in root.modules() for name, p in m._parameters.items() if p is not None]
        for where, name, p in slots:
            where[name] = copies[p]
        loss = root(*args, **options)
        for where, name, p in slots:
            where[name] = p
        return loss

    return train(root, call, ids, labels, num_items=float((labels != -100).sum()))


def wrapped(root: Root, case: Case) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if case.wrap == "ddp":
        return nn.parallel.DistributedDataParallel(root)
    mesh = init_device_mesh("cpu", (WORLD,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, **({"mp_policy": half} if case.half else {})}
    for layer in (*root.student.layers, *root.teacher.layers):
        fully_shard(layer, **options)
    if case.wrap != "fsdp":
        fully_shard(root.head, **options)  # the student and the teacher reach the same layers by other names
        options["ignored_params"] = set(root.head.parameters())
    return fully_shard(root, **options)


def train_on_rank(rank: int, case: Case) -> Outcome:
    root = make_root(case)
    ids, labels = batch()
    mine = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    num_items = None if case.own_mean else float((labels != -100).sum()) / WORLD
    return train(root, wrapped(root, case), ids[mine], labels[mine], num_items)


def refused_on_rank(rank: int) -> dict[str, str]:
    """The errors of modules that are wrapped where nothing gathers the weights, or otherwise wrong, by case."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, (ids, labels) = init_device_mesh("cpu", (WORLD,)), batch()

    def lm_head(root: Root) -> None:
        fully_shard(root.student.lm_head, mesh=mesh)
        fully_shard(root, mesh=mesh)(ids, labels)

    def lm_head_before(root: Root) -> None:
        fully_shard(root.student.lm_head, mesh=mesh)
        fusedkd.DistillationHead(root.student.lm_head, root.teacher.lm_head)

    def outside(root: Root) -> None:
        fully_shard(root.student, mesh=mesh, reshard_after_forward=True)
        root(ids, labels)

    def tied_apart(root: Root) -> None:
        fully_shard(root.student.embed, mesh=mesh)
        fully_shard(root, mesh=mesh)(ids, labels)

    def weight_grad(root: Root) -> None:
        fully_shard(root.head, mesh=mesh)(*hidden_states(), weight_grad=torch.zeros(V, D))

    def float32_master(root: Root) -> None:
        fully_shard(root.head, mesh=mesh)(*(x.bfloat16() for x in hidden_states()))

    def ddp_unfrozen(root: Root) -> None:
        train(root.requires_grad_(), wrapped(root, Case(wrap="ddp")), ids, labels, None)

    errors = {}
    for attempt in (lm_head, lm_head_before, outside, tied_apart, weight_grad, float32_master, ddp_unfrozen):
        try:
            attempt(make_root(Case(tied=attempt is tied_apart)))
        except Exception as error:
            errors[attempt.__name__] = f"{type(error).__name__}: {error}"
    return errors


def all_on_rank(rank: int) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Everything in one group: most of a rank's time is the import of torch."""
    return {name: train_on_rank(rank, case) for name, case in TRAINED.items()}, refused_on_rank(rank)


together = pytest.mark.xdist_group("ranks")  # in one process, which makes them once


@pytest.fixture(scope="module")
def results() -> list[tuple[dict[str, Outcome], dict[str, str]]]:
    return ranks.run(WORLD, all_on_rank)


def distance(found: Outcome, expected: Outcome, start: dict[str, Tensor]) -> float:
    """How far apart two trainings ended, relative to the way that the expected one went from where both began."""
    names = [name for name in start if name.startswith("student")]
    ours, theirs = (torch.cat([(x.parameters[n] - start[n]).flatten() for n in names]) for x in (found, expected))
    return relative(ours.detach(), theirs.detach().double())


def bound(case: Case) -> float:
    """float32: sums in another order, some units of rounding (2^-24) in each step's gradients. bfloat16: a rank's
    gradient is rounded before ranks are summed, the reference's after: 2^-9 for either.
    """
    return 2**-8 if case.half else 32 * 2**-24


@together
@pytest.mark.parametrize("name", [name for name, case in TRAINED.items() if not case.own_mean])
def test_training_on_two_ranks(name: str, results: list[tuple[dict[str, Outcome], dict[str, str]]]) -> None:
    """Other rows on each rank: after five steps the parameters of one process with all rows, the same on both ranks."""
    case, (first, second) = TRAINED[name], (outcomes[name] for outcomes, _ in results)
    expected, start = train_alone(REFERENCES[name]), dict(make_root(case).named_parameters())
    assert first.dtypes == second.dtypes == expected.dtypes == {torch.bfloat16 if case.half else torch.float32}
    assert first.parameters.keys() == start.keys()
    for key, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[key]), key
        if key.startswith("teacher"):
            assert torch.equal(parameter, start[key]), key
    assert distance(first, expected, start) < bound(case)
    assert relative((first.losses + second.losses) / WORLD, expected.losses.double()) < bound(case)
    assert expected.losses[-1] < 0.9 * expected.losses[0]


@together
@pytest.mark.parametrize("name", [name for name, case in TRAINED.items() if case.own_mean])
def test_wrong_counts_are_seen(name: str, results: list[tuple[dict[str, Outcome], dict[str, str]]]) -> None:
    """The comparison can fail: means of each rank's own tokens go another way."""
    case, found = TRAINED[name], results[0][0][name]
    start = dict(make_root(case).named_parameters())
    assert distance(found, train_alone(REFERENCES[name]), start) > 1000 * bound(case)


@together
@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("lm_head", ("RuntimeError: student_lm_head is a unit of fully_shard by itself", "call fully_shard on")),
        ("lm_head_before", ("RuntimeError: student_lm_head is a unit of fully_shard by itself",)),
        ("outside", ("RuntimeError: student_lm_head.weight is a DTensor", "call fully_shard on", "tied weights")),
        ("tied_apart", ("Error: ", "weight")),
        ("weight_grad", ("NotImplementedError: weight_grad",)),
        ("float32_master", ("TypeError: student.weight is torch.float32", "MixedPrecisionPolicy(param_dtype=")),
        ("ddp_unfrozen", ("RuntimeError: ", "find_unused_parameters")),
    ],
)
def test_refused_on_ranks(
    attempt: str, words: tuple[str, ...], results: list[tuple[dict[str, Outcome], dict[str, str]]]
) -> None:
    """A weight that nothing gathers, and what else a wrapper makes impossible."""
    for _, errors in results:
        for word in words:
            assert word in errors[attempt]


# The example ----------------------------------------------------------------------------------------------------------


@together
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_example() -> None:
    """As its first lines say, for a few steps: only the first rank prints, and the held-out loss falls."""
    (line,) = ranks.torchrun(WORLD, "examples/fsdp.py", "--steps", "8").splitlines()
    before, after = map(float, re.findall(r"\d+\.\d+", line))
    assert line.startswith("2 ranks, 8 steps")
    assert after < 0.9 * before
