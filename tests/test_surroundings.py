"""What surrounds a call: inference mode, default dtypes and devices, autocast, tensors without data, FLOP counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from cases import HEAD, IGNORE, VALUE, device, each, expected
from compare import assert_close, relative
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusedkd

N, V, D, K = 6, 70, 8, 12
SCHEDULES = ("chunked", "streaming")


def labels_on(place: str = "cpu") -> Tensor:
    """One row is ignored."""
    labels = torch.arange(N, device=place) * 7 % V
    labels[2] = IGNORE
    return labels


def head(width: int, place: str = "cpu", **options: Any) -> fusedkd.Head:
    """Hidden states, a weight and a bias."""
    shapes = ((N, width), (V, width), (V,))
    return fusedkd.Head(*(torch.randn(shape, device=place, **options) for shape in shapes))


def leaves_of(side: Any) -> list[Tensor]:
    """The tensors of a side."""
    return [x for x in side if isinstance(x, Tensor)] if isinstance(side, fusedkd.Head) else [side]


# Inference mode -------------------------------------------------------------------------------------------------------


def taken(side: Any, mode: bool) -> Any:
    """Copies of a side's tensors, made under inference mode or not."""
    with torch.inference_mode(mode):
        copies = [x.clone() for x in leaves_of(side)]
    assert all(x.is_inference() == mode for x in copies)
    return fusedkd.Head(*copies) if isinstance(side, fusedkd.Head) else copies[0]


WAYS = [
    ("logits", "logits", {}),
    ("logits", "logits", {"reduction": "none"}),
    *(
        (student, teacher, {"schedule": schedule, "reduction": reduction})
        for student, teacher in (("heads", "heads"), ("heads", "logits"), ("logits", "heads"))
        for schedule in SCHEDULES
        for reduction in ("mean", "none")
    ),
]


@pytest.mark.parametrize(("student_kind", "teacher_kind", "options"), WAYS)
def test_what_inference_mode_made(student_kind: str, teacher_kind: str, options: dict[str, Any], backend: str) -> None:
    """Teacher, labels, weights and parameters from inference mode: the same loss and gradients, bit for bit."""
    place = device(backend)
    student = torch.randn(N, V, device=place) if student_kind == "logits" else head(D, place)
    teacher = torch.randn(N, V, device=place) if teacher_kind == "logits" else head(K, place)
    labels, weights, gamma, num_items = labels_on(place), torch.rand(N, device=place), torch.rand(N, device=place), 5.0
    outs = []
    for mode in (False, True):
        theirs, y, w, g = (taken(x, mode) for x in (teacher, labels, weights, gamma))
        with torch.inference_mode(mode):
            given: dict[str, Any] = {"token_weights": w, "divergence": fusedkd.divergence("drkl", gamma=g)}
            if options.get("reduction", "mean") == "mean":
                given["num_items"] = torch.tensor(num_items)
        ours = [x.clone().requires_grad_() for x in leaves_of(student)]
        side = ours[0] if student_kind == "logits" else fusedkd.Head(*ours)
        loss, stats = fusedkd.kd_loss(side, theirs, y, return_stats=True, backend=backend, **given, **options)
        outs.append([loss.detach(), *stats, *torch.autograd.grad(loss.sum(), ours)])
    assert all(map(torch.equal, *outs))
    assert outs[0][-1].any()


@each("schedule", SCHEDULES)
@each("frozen", ["hidden", "weight"])
def test_a_frozen_part_from_inference_mode(schedule: str, frozen: str, backend: str) -> None:
    """A student's head, or its hidden states, that nothing is to learn."""
    place = device(backend)
    outs = []
    student, teacher = head(D, place), head(K, place)
    for mode in (False, True):
        fixed = taken(getattr(student, frozen), mode)
        learns = getattr(student, "weight" if frozen == "hidden" else "hidden").clone().requires_grad_()
        parts = (fixed, learns) if frozen == "hidden" else (learns, fixed)
        loss = fusedkd.kd_loss(fusedkd.Head(*parts), teacher, labels_on(place), schedule=schedule, backend=backend)
        outs.append((loss.detach(), torch.autograd.grad(loss, learns)[0]))
    assert all(map(torch.equal, *outs))


@each("kind", ["logits", "heads"])
def test_token_ids_from_inference_mode(kind: str, backend: str) -> None:
    """token_logprobs of sampled tokens."""
    place = device(backend)
    side = torch.randn(N, V, device=place) if kind == "logits" else head(D, place)
    outs = []
    for mode in (False, True):
        ours = [x.clone().requires_grad_() for x in leaves_of(side)]
        given = ours[0] if kind == "logits" else fusedkd.Head(*ours)
        values = fusedkd.token_logprobs(given, taken(labels_on(place), mode), return_entropy=True, backend=backend)
        outs.append([*(x.detach() for x in values), *torch.autograd.grad(values[0].sum() + values[1].sum(), ours)])
    assert all(map(torch.equal, *outs))


@each("anchor", [None, 0.1])
def test_cald_of_inference_mode(anchor: float | None) -> None:
    """Both teachers, and the adapted weights."""
    student = torch.randn(2, 3, V, requires_grad=True)
    teacher, labels = torch.randn(2, 3, V), labels_on().view(2, 3)
    outs = []
    for mode in (False, True):
        pair = (student, taken(teacher, mode), taken(labels, mode))
        loss = fusedkd.cald_loss(*pair, *pair, anchor1=anchor, anchor2=anchor)
        outs.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    assert all(map(torch.equal, *outs))


def test_value_and_grad_of_inference_mode(backend: str) -> None:
    """No graph at all."""
    place = device(backend)
    student, teacher = torch.randn(2, N, V, device=place)
    outs = [fusedkd.kd_value_and_grad(taken(student, m), taken(teacher, m), backend=backend) for m in (False, True)]
    assert all(map(torch.equal, *outs))


@pytest.mark.unpoisoned
def test_a_compiled_call_with_a_teacher_from_inference_mode() -> None:
    """Heads, whose backward needs nothing of the teacher; torch.compile itself refuses to save such logits."""
    student, teacher = head(D), head(K)
    ours = [x.requires_grad_() for x in leaves_of(student)]
    torch._dynamo.reset()

    def work(theirs: Any) -> Tensor:
        return fusedkd.kd_loss(fusedkd.Head(*ours), theirs, labels_on())

    run = torch.compile(work, backend="aot_eager")
    wanted = work(teacher)
    loss = run(taken(teacher, True))
    assert torch.equal(loss, wanted)
    for one, other in zip(*(torch.autograd.grad(x, ours) for x in (loss, wanted)), strict=True):
        assert torch.equal(one, other)


def test_weight_grad_from_inference_mode() -> None:
    """A buffer that cannot be added to."""
    student = fusedkd.Head(torch.randn(N, D), torch.randn(V, D).requires_grad_())
    buffer = taken(torch.zeros(V, D), True)
    with pytest.raises(ValueError, match=r"weight_grad was made under torch.inference_mode.*clone"):
        fusedkd.kd_loss(student, head(K), weight_grad=buffer)


# Defaults -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Torch's default dtype, put back afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def every_call(backend: str) -> list[Tensor]:
    """All public functions on fixed float32 inputs, large counts included."""
    place = device(backend)
    torch.manual_seed(0)
    make = {"device": place, "dtype": torch.float32}
    student, teacher = (torch.randn(N, V, **make).requires_grad_() for _ in range(2))
    ours, theirs = (head(width, place, dtype=torch.float32) for width in (D, K))
    leaves = [x.requires_grad_() for x in leaves_of(ours)]
    labels, outs = labels_on(place), []
    divergence = fusedkd.divergence("drkl", gamma=torch.rand(N, **make))
    count = torch.tensor(100_000, device=place)
    for options in ({"num_items": 100_000}, {"num_items": count}, {"reduction": "none"}, {}):
        loss = fusedkd.kd_loss(student, teacher, labels, backend=backend, divergence=divergence, **options)
        outs += [loss, *torch.autograd.grad(loss.sum(), student)]
        for schedule in SCHEDULES:
            given = {"schedule": schedule, "backend": backend, "ce_weight": 0.5, "temperature": 2.0, **options}
            loss, stats = fusedkd.kd_loss(ours, theirs, labels, return_stats=True, **given)
            outs += [loss, *stats, *torch.autograd.grad(loss.sum(), leaves)]
    outs += fusedkd.kd_value_and_grad(student, teacher, num_items=100_000, backend=backend)
    for side, parts in ((student, [student]), (ours, leaves)):
        values = fusedkd.token_logprobs(side, labels, 0.9, True, backend=backend)
        outs += [*values, *torch.autograd.grad(values[0].sum() + values[1].sum(), parts)]
    pair = (student[None], teacher[None], labels[None])
    loss = fusedkd.cald_loss(*pair, *pair, anchor1=0.1, anchor2=0.1, backend=backend)
    return [x.detach() for x in [*outs, loss, *torch.autograd.grad(loss, student)]]


@pytest.mark.parametrize("default_dtype", [torch.float16, torch.bfloat16, torch.float64], indirect=True)
def test_the_default_dtype_changes_nothing(default_dtype: torch.dtype, backend: str) -> None:
    """Every dtype comes from the operands."""
    ours = every_call(backend)
    torch.set_default_dtype(torch.float32)
    theirs = every_call(backend)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("default_dtype", [torch.float16], indirect=True)
def test_many_tokens_without_labels(default_dtype: torch.dtype) -> None:
    """A count that float16 does not hold."""
    rows = 70_000
    student, teacher = torch.randn(2, rows, 2, dtype=torch.float32)
    logp, logq = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    assert_close(fusedkd.kd_loss(student, teacher), (logp.exp() * (logp - logq)).sum(-1).mean(), VALUE)


def test_the_default_device_changes_nothing() -> None:
    """Nothing is made where the operands are not."""
    theirs = every_call("torch")
    with torch.device("meta"):
        ours = every_call("torch")
    assert all(map(torch.equal, ours, theirs))


# Autocast and dtypes --------------------------------------------------------------------------------------------------


@each("schedule", SCHEDULES)
def test_autocast_keeps_float64(schedule: str) -> None:
    """As nn.functional.linear does."""
    student, teacher = head(D, dtype=torch.float64), head(K, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in leaves_of(student)]
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fusedkd.kd_loss(student, teacher, labels_on(), schedule=schedule)
            logprob = fusedkd.token_logprobs(student, labels_on())
        outs.append([loss, logprob, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*outs, strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)


def test_autocast_of_mixed_float64() -> None:
    """Operands that nn.functional.linear would refuse."""
    mixed = fusedkd.Head(torch.randn(N, D, dtype=torch.float64), torch.randn(V, D))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"student\.weight is torch\.float32"):
        fusedkd.kd_loss(mixed, head(K))


@each("autocast", [False, True])
@each("schedule", SCHEDULES)
@each("reduction", ["mean", "none"])
def test_a_bias_of_float32(autocast: bool, schedule: str, reduction: str, backend: str) -> None:
    """A bias of std 3 beside bfloat16 hidden states is added in float32, and its gradient has its dtype."""
    place = device(backend)
    sides = []
    for width in (D, K):
        hidden, weight = torch.randn(N, width).bfloat16(), torch.randn(V, width).bfloat16()
        sides.append(fusedkd.Head(hidden, weight, 3 * torch.randn(V)))
    doubles = [[x.double().requires_grad_() for x in leaves_of(side)] for side in sides]
    logits = [h @ w.T + b for h, w, b in doubles]
    labels = labels_on()
    case, options = ("jsd", {}), {"reduction": reduction}
    truth, value, weights = expected(logits[0].detach(), logits[1].detach(), labels, case, options)
    upstream = torch.randn(value.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(logits[0], doubles[0], truth.gradient(upstream * weights))
    given = []
    for side in sides:
        wide = [x.float() if autocast else x for x in leaves_of(side)]
        given.append(fusedkd.Head(*(x.to(place).requires_grad_() for x in wide)))
    with torch.autocast(place, torch.bfloat16, enabled=autocast):
        loss = fusedkd.kd_loss(
            *given, labels.to(place), divergence="jsd", schedule=schedule, backend=backend, **options
        )
    assert_close(loss, value, VALUE + HEAD)
    ours = torch.autograd.grad(loss, leaves_of(given[0]), upstream.float().to(place))
    assert ours[2].dtype == torch.float32
    half = 2**-8 if place == "cuda" else 0.0  # a GPU's dZ has the operands' dtype
    assert relative(ours[2].cpu(), wanted[2]) < VALUE + HEAD + half
    for one, exact in zip(ours[:2], wanted[:2], strict=True):
        assert relative(one.cpu(), exact) < 2**-8
    logprob = fusedkd.token_logprobs(sides[0], labels)
    seen = labels >= 0
    exact = logits[0].log_softmax(-1)[torch.arange(N), labels.clamp(min=0)].where(seen, 0)
    assert_close(logprob, exact.detach(), VALUE)


def test_a_bias_of_another_dtype_is_refused() -> None:
    """Named, with what would work."""
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    for operands, allowed in (
        ((hidden, weight, torch.randn(V).half()), "torch.float32, cast"),
        ((hidden.half(), weight.half(), torch.randn(V).bfloat16()), "torch.float16 or torch.float32, cast"),
        ((hidden.half(), weight.half(), torch.randn(V).double()), "torch.float16 or torch.float32, cast"),
    ):
        with pytest.raises(TypeError, match=rf"student\.bias is .* must be {allowed}"):
            fusedkd.kd_loss(fusedkd.Head(*operands), head(K))


# Tensors without data -------------------------------------------------------------------------------------------------


def shapes_of(place: str | None, **options: Any) -> list[tuple[Any, ...]]:
    """Shapes and dtypes of every function's results on tensors of a device."""
    make = {} if place is None else {"device": place}
    student, teacher = (torch.randn(N, V, **make).requires_grad_() for _ in range(2))
    ours = fusedkd.Head(*(torch.randn(s, **make).requires_grad_() for s in ((N, D), (V, D), (V,))))
    theirs = fusedkd.Head(torch.randn(N, K, **make), torch.randn(V, K, **make))
    labels = torch.randint(V, (N,), **make)
    outs: list[Tensor] = []
    for reduction in ("mean", "none"):
        loss, stats = fusedkd.kd_loss(student, teacher, labels, reduction=reduction, return_stats=True, **options)
        outs += [loss, *stats, *torch.autograd.grad(loss.sum(), student)]
        for schedule in SCHEDULES:
            loss = fusedkd.kd_loss(ours, theirs, labels, reduction=reduction, schedule=schedule, **options)
            outs += [loss, *torch.autograd.grad(loss.sum(), leaves_of(ours))]
    outs += fusedkd.kd_value_and_grad(student, teacher, labels, **options)
    for side, leaves in ((student, [student]), (ours, leaves_of(ours))):
        values = fusedkd.token_logprobs(side, labels, return_entropy=True, **options)
        outs += [*values, *torch.autograd.grad(values[0].sum(), leaves)]
    pair = (student[None], teacher[None], labels[None])
    outs.append(fusedkd.cald_loss(*pair, *pair, **options))
    buffer = torch.zeros(V, D, **make)
    outs.append(fusedkd.kd_loss(ours, theirs, labels, weight_grad=buffer, **options))
    return [(tuple(x.shape), x.dtype) for x in outs]


@pytest.mark.unpoisoned
def test_fake_tensors() -> None:
    """Shapes under FakeTensorMode, as torch's own losses give them."""
    wanted = shapes_of(None)
    with FakeTensorMode():
        assert shapes_of(None) == wanted


@pytest.mark.unpoisoned
@each("chosen", ["auto", "torch", "triton"])
def test_meta_tensors(chosen: str) -> None:
    """The same on the meta device, under autocast too."""
    wanted = shapes_of(None)
    assert shapes_of("meta", backend=chosen) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert shapes_of("meta", backend=chosen) == wanted


FLOPS: list[tuple[dict[str, Any], tuple[bool, bool], float, float]] = [  # options, frozen, forwards, backwards
    ({}, (False, False), 1, 2),
    ({"reduction": "none"}, (False, False), 2, 2),
    ({"schedule": "streaming"}, (False, False), 2, 2),
    ({"schedule": "streaming", "divergence": "jsd"}, (False, False), 3, 2),
    ({}, (True, False), 1, 1),
    ({"schedule": "streaming"}, (False, True), 2, 1),
    ({"vocab_size": V // 2, "ce_weight": 0.5}, (False, False), 1, 2),
]


@pytest.mark.parametrize(("options", "frozen", "forwards", "backwards"), FLOPS)
def test_flops_of_a_head(options: dict[str, Any], frozen: tuple[bool, bool], forwards: int, backwards: int) -> None:
    """FlopCounterMode sees the products of an operator: those of rows that count."""
    student, teacher, labels = head(D), head(K), labels_on().fmod(V // 2).where(labels_on() >= 0, IGNORE)
    leaves = [x.requires_grad_() for x, fixed in zip(student[:2], frozen, strict=True) if not fixed]
    with FlopCounterMode(display=False) as counter:
        loss = fusedkd.kd_loss(student, teacher, labels, **options)
        torch.autograd.grad(loss.sum(), leaves)
    rows = int((labels >= 0).sum())
    compared = options.get("vocab_size", V)
    ours, theirs = 2 * rows * V * D, 2 * rows * compared * K
    assert counter.get_total_flops() == forwards * (ours + theirs) + backwards * ours


def test_flops_of_token_logprobs() -> None:
    """One product forward; again, with the two of the gradient, backward."""
    side = head(D)
    leaves = [x.requires_grad_() for x in leaves_of(side)]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(fusedkd.token_logprobs(side, labels_on()).sum(), leaves)
    assert counter.get_total_flops() == 4 * 2 * N * V * D


# Numbers and masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "numpy"),
    [
        ({"num_items": 7}, {"num_items": np.int64(7)}),
        ({"num_items": 7}, {"num_items": np.float32(7)}),
        ({"temperature": 2.0}, {"temperature": np.float32(2)}),
        ({"temperature": 2}, {"temperature": np.int32(2)}),
        ({"ce_weight": 0.5}, {"ce_weight": np.float16(0.5)}),
        ({"vocab_size": 40}, {"vocab_size": np.int64(40)}),
        *(
            ({"divergence": fusedkd.divergence("skl", lam=0.25)}, {"divergence": fusedkd.divergence("skl", lam=lam)})
            for lam in (np.float32(0.25), np.float64(0.25))
        ),
    ],
)
def test_numbers_of_numpy(plain: dict[str, Any], numpy: dict[str, Any], backend: str) -> None:
    """As Python's."""
    place = device(backend)
    student, teacher = torch.randn(2, N, V, device=place)
    labels = labels_on(place).where(labels_on(place) < 40, 3)
    losses = [fusedkd.kd_loss(student, teacher, labels, backend=backend, **given) for given in (plain, numpy)]
    assert torch.equal(*losses)


def test_ignore_index_and_budget_of_numpy() -> None:
    """Integers of a config."""
    student, teacher = head(D), head(K)
    given = [{"ignore_index": kind(IGNORE), "memory_budget": kind(10**8)} for kind in (int, np.int64)]
    assert torch.equal(*(fusedkd.kd_loss(student, teacher, labels_on(), **options) for options in given))


@each("kind", ["logits", "heads"])
def test_a_mask_as_token_weights(kind: str, backend: str) -> None:
    """True is 1, False 0."""
    place = device(backend)
    student, teacher = (torch.randn(2, N, V, device=place)) if kind == "logits" else (head(D, place), head(K, place))
    mask = torch.tensor([True, False] * (N // 2), device=place)
    losses = [fusedkd.kd_loss(student, teacher, token_weights=w, backend=backend) for w in (mask, mask.float())]
    assert torch.equal(*losses)
    with pytest.raises(TypeError, match="token_weights must be float32"):
        fusedkd.kd_loss(student, teacher, token_weights=mask.long(), backend=backend)


def test_divergences_with_tensors_compare() -> None:
    """By value, dtype and shape; what compares equal hashes equal."""
    lam = torch.rand(N)
    one = fusedkd.divergence("skl", lam=lam)
    for other, same in (
        (fusedkd.divergence("skl", lam=lam), True),
        (fusedkd.divergence("skl", lam=lam.clone()), True),
        (fusedkd.divergence("skl", lam=lam + 1e-3), False),
        (fusedkd.divergence("skl", lam=lam[:3]), False),
        (fusedkd.divergence("skl", lam=lam.double()), False),
        (fusedkd.divergence("skl", lam=0.5), False),
        (fusedkd.divergence("srkl", lam=lam), False),
        (fusedkd.divergence("decoupled", base=fusedkd.divergence("skl", lam=lam)), False),
        ("skl", False),
    ):
        assert (one == other) is same
        if same:
            assert hash(one) == hash(other)
    nested = [fusedkd.divergence("decoupled", base=fusedkd.divergence("skl", lam=lam.clone())) for _ in range(2)]
    assert nested[0] == nested[1]


def test_a_head_of_width_zero() -> None:
    """Refused by name."""
    empty = fusedkd.Head(torch.randn(N, 0), torch.randn(V, 0))
    with pytest.raises(ValueError, match=r"student\.weight must have shape \(V, D\) with V, D >= 1, got \(70, 0\)"):
        fusedkd.kd_loss(empty, head(K))


RESULTS: dict[str, Callable[[], float | Tensor]] = {
    "nothing counted": lambda: fusedkd.kd_loss(torch.randn(1, V), torch.randn(1, V), torch.tensor([IGNORE])),
    "equal models": lambda: fusedkd.kd_loss(torch.ones(1, V), torch.ones(1, V)),
    "nan": lambda: torch.nan,
}


@each("result", RESULTS)
@each("first", [True, False])
def test_a_schedule_ignores_a_loss_of_zero(result: str, first: bool) -> None:
    """As one that is not finite: the step counts, and the change of the next step is that between real losses."""
    schedules = [fusedkd.TAIDSchedule(total_steps=10**6) for _ in range(2)]
    for i, loss in enumerate((2.0, 1.5, 1.4, 1.35)):
        for schedule in schedules:
            if i == (0 if first else 2) and schedule is schedules[0]:
                schedule.update(RESULTS[result]())
            schedule.update(loss)
    ours, theirs = schedules
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert ours_state.pop("step") == theirs_state.pop("step") + 1
    assert ours_state == pytest.approx(theirs_state, rel=1e-5)  # t is further by one step of a million


def test_a_schedule_goes_on_where_it_was_saved() -> None:
    """Every attribute; a state of before "pushed" was in it is taken too."""
    one = fusedkd.TAIDSchedule(total_steps=100)
    for loss in (2.0, 1.5, 1.4):
        one.update(loss)
    other = fusedkd.TAIDSchedule(total_steps=100)
    other.load_state_dict(one.state_dict())
    assert vars(other) == vars(one)
    assert one.pushed is not None
    old = {key: value for key, value in one.state_dict().items() if key != "pushed"}
    other.load_state_dict(old)
    assert other.pushed is None
    assert other.update(1.3) == one.update(1.3)
