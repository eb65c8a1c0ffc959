"""Shapes with a reason each, nasty rows, parameter settings, and the one way the suite runs and checks a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from compare import assert_close, relative, rounding
from torch import Tensor

import fusedkd

VOCABULARIES = {
    1: "nothing to compare",
    2: "one non-target column",
    127: "one short of a power of two",
    128: "a power of two, aligned rows",
    129: "one column in a second tile of 128",
    1003: "odd: no row but the first is aligned",
}
LARGE_VOCABULARY = 151_936  # Qwen2.5: many tiles, so that partial sums and running maxima meet
SEVERAL_TILES = 24_581  # three tiles of 8192, the widest, and an odd rest
ODD = 1003
IGNORE = -100

VALUE = 2e-5  # float32 against float64, relative L2, at every size of the divergence (docs/numerics.md#how-exact)
ROW = 1e-4  # the same for one token, at a KL of 1e-8 (docs/numerics.md#how-exact)
TYPICAL = 1e-3  # the median entry of a gradient whose rows are far apart: none of the tail is lost
DOUBLE = 2e-8  # float64 logits: below what rounding to float32 alone costs, 3e-8; the kernels' series end at about 1e-8
MIXED = 1e-4  # the gradient of amid where both sides hardly overlap: what a difference of equal numbers leaves
HEAD = 5e-6  # what the float32 GEMM costs a gradient, times the square root of the KL
LSE = 1e-6  # a log-sum-exp is a maximum plus a logarithm: a few roundings of float32
TINY = torch.finfo(torch.float64).tiny  # not 0, so that no exact 0 is asked for
NATS = ("student_lse", "teacher_lse", "student_entropy", "teacher_entropy")  # near 0 their unit is 1 nat

DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}

Case = tuple[str, dict[str, Any]]  # the name and the parameters of a divergence

# Further settings by name; every registered divergence is tested at its defaults without being named here.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "fkl": [{"target": 0.3, "nontarget": 1.7}],
    "rkl": [{"target": 2.0, "nontarget": 0.25}, {"target": 0.0, "nontarget": 1.0}],
    "drkl": [{"gamma": 1.5}],
    "ab": [{"alpha": 0.5, "beta": 0.5}, {"alpha": 0.2, "beta": 0.7, "target": 0.5, "nontarget": 2.0}],
    "decoupled": [
        {"base": "fkl", "target": 1.0, "nontarget": 8.0},
        {"base": "ab", "alpha": 0.3, "beta": 0.9, "target": 0.7, "nontarget": 0.4},
        {"base": "jsd", "nontarget": 2.0},
        {"base": "skl", "target": 0.5},
        {"base": "srkl", "detach_mixture": True},
        {"base": "tvd", "nontarget": 0.5},
        {"base": "renyi", "alpha": 0.4, "nontarget": 2.0},
    ],
    "alpha": [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.8, "nontarget": 2.0}],
    "tsallis": [{"alpha": 1.0}, {"alpha": 0.8, "nontarget": 2.0}],
    "renyi": [{"alpha": 1.0}, {"alpha": 1.5, "target": 0.5}, {"alpha": 0.02}],
    "frkl": [{"w": 0.0}, {"w": 1.0}, {"w": 0.2, "target": 2.0}],
    "jeffreys": [{"target": 2.0, "nontarget": 0.5}],
    "jsd": [{"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1}, {"beta": 0.9, "target": 0.5, "nontarget": 2.0}],
    "skl": [{"lam": 0.0}, {"lam": 0.9}, {"lam": 0.3, "target": 2.0, "nontarget": 0.5}],
    "srkl": [{"lam": 0.0}, {"lam": 0.9, "detach_mixture": True}, {"lam": 0.3, "nontarget": 3.0}],
    "tvd": [{"target": 2.0, "nontarget": 0.5}],
    "hellinger": [{"target": 0.5, "nontarget": 1.5}],
    "triangular": [{"target": 0.5, "nontarget": 1.5}],
    "todi": [{"target": 0.5, "nontarget": 1.5}],
    "dkd": [{"alpha": 0.5, "beta": 2.0}],
    "taid": [{"t": 0.7, "base": "rkl"}, {"t": 0.2, "base": "drkl", "gamma": 0.3}, {"t": 1.0, "base": "ab"}],
    "amid": [
        {"alpha": -1.0, "order": "qr", "base": "ab"},
        {"alpha": 1.0, "lam": 0.3, "order": "rp", "base": "ab"},
        {"alpha": 3.0, "order": "qr"},
        {"alpha": -3.0, "lam": 0.8, "order": "rq", "base": "rkl"},
        {"order": "rq", "lam": 1.0},
        {"order": "rp", "lam": 0.0},
        {"order": "rq", "base": "alpha"},
    ],
    "akl": [{"mu": 0.0}, {"mu": 0.9}, {"mu": 1.0}, {"head": "inclusive"}, {"mu": 0.9, "head": "inclusive"}],
    "eopd": [{"threshold": 0.2}, {"threshold": 2.5}],
}
ARGMAX = {"target_token": "teacher_argmax"}
REGISTERED = tuple(fusedkd.divergences())
ALIASES = ("jeffreys", "tsallis")  # others' kernels with weights: SETTINGS has them, test_identities compares them
DEFAULTS = [(name, {}) for name in REGISTERED if name not in ALIASES]
ALL = [*DEFAULTS, *((name, params) for name, settings in SETTINGS.items() for params in settings)]
# One of each way through the kernels: one sweep and two, both structures, a function of the sum, mixed teacher,
# gathered parameters, argmax.
DISTINCT = [
    ("fkl", {}),
    ("rkl", {}),
    ("drkl", {}),
    ("ab", {}),
    ("ab", {"alpha": 0.2, "beta": 0.7, "target": 0.5}),
    ("jsd", {}),
    ("srkl", {"target": 0.5}),
    ("renyi", {}),
    ("decoupled", {"base": "skl"}),
    ("taid", {"base": "rkl"}),
    ("amid", {"base": "ab", "order": "qr"}),
    ("akl", {}),
    ("drkl", ARGMAX),
]
FEW = [DISTINCT[i] for i in (0, 2, 4, 5, 9)]  # where the path matters more than the formula
SWEEPS = [DISTINCT[i] for i in (0, 1, 2, 3, 5, 9, 12)]  # long rows: one of each kind of sweep


def named(case: Any) -> str | None:
    """A readable test id for a (name, parameters) pair or a dtype."""
    if isinstance(case, torch.dtype):
        return str(case).removeprefix("torch.")
    if isinstance(case, tuple) and len(case) == 2 and isinstance(case[1], dict):
        return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])
    return str(case) if isinstance(case, tuple) else None


def each(name: str, values: Any) -> pytest.MarkDecorator:
    """Parametrise with readable ids."""
    return pytest.mark.parametrize(name, values, ids=named)


def device(backend: str) -> str:
    """Triton runs on the GPU where there is one, else in the interpreter; the torch path is the CPU's."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def cuts(backend: str) -> bool:
    """Triton's interpreter (3.7.1) stores bfloat16 by dropping bits where a GPU rounds to nearest."""
    return backend == "triton" and device(backend) == "cpu"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Logits of one call, float64 but representable in `dtype`, so that the truth sees what the code sees."""

    student: Tensor  # (..., V_s)
    teacher: Tensor  # (..., V_t)
    labels: Tensor | None  # (...)
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, labels: Tensor | None, dtype: torch.dtype = torch.float32) -> Rows:
        """Round to `dtype` first."""
        return cls(student.to(dtype).double(), teacher.to(dtype).double(), labels, dtype)


def random_labels(lead: tuple[int, ...], vocabulary: int, ignored: bool = True) -> Tensor:
    """Labels within the vocabulary; one row in five is ignored, never all of them."""
    labels = torch.randint(vocabulary, lead)
    if ignored:
        labels.view(-1)[2::5] = IGNORE
    return labels


def unrelated(*shape: int, dtype: torch.dtype = torch.float32, std: float = 5.0, ignored: bool = True) -> Rows:
    """Student and teacher with nothing in common, as at the start of training."""
    student, teacher = std * torch.randn(2, *shape, dtype=torch.float64)
    return Rows.of(student, teacher, random_labels(shape[:-1], shape[-1], ignored), dtype)


def near(distance: float, *shape: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Teacher plus `distance` of noise: KL is about distance²/2, as late in training. Some labels are the top token."""
    teacher = (5 * torch.randn(shape, dtype=torch.float64)).to(dtype).double()
    student = teacher + distance * torch.randn(shape, dtype=torch.float64)
    labels = random_labels(shape[:-1], shape[-1])
    labels.view(-1)[::3] = teacher.argmax(-1).view(-1)[::3]
    return Rows.of(student, teacher, labels, dtype)


@dataclasses.dataclass(frozen=True)
class Side:
    """Operands of a Head, float64 but representable in the dtype of the call."""

    hidden: Tensor  # (..., d)
    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def rounded(self, dtype: torch.dtype) -> Side:
        """The same operands as `dtype` holds them."""
        bias = None if self.bias is None else self.bias.to(dtype).double()
        hidden, weight = self.hidden.to(dtype).double(), self.weight.to(dtype).double()
        return dataclasses.replace(self, hidden=hidden, weight=weight, bias=bias)

    def operands(self, dtype: torch.dtype, place: str) -> dict[str, Tensor]:
        """Fresh leaves that require grad."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {
            key: x.detach().to(place, dtype, copy=True).requires_grad_() for key, x in named.items() if x is not None
        }

    def head(self, operands: dict[str, Tensor]) -> fusedkd.Head:
        """A Head over the given operands."""
        return fusedkd.Head(**operands, scale=self.scale, softcap=self.softcap)


def side(lead: tuple[int, ...], vocabulary: int, width: int, *, bias: bool = False, **options: Any) -> Side:
    """A head whose logits have standard deviation 5."""
    hidden = torch.randn(*lead, width, dtype=torch.float64)
    weight = 5 * torch.randn(vocabulary, width, dtype=torch.float64) / width**0.5
    return Side(hidden, weight, torch.randn(vocabulary, dtype=torch.float64) if bias else None, **options)


TRUTH_OPTIONS = ("temperature", "temperature_squared", "ce_weight", "ignore_index", "vocab_size", "support")
REDUCE_OPTIONS = ("reduction", "num_items", "token_weights")


def chosen(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options that the oracle has to know."""
    return {key: options[key] for key in names if key in options}


def check_stats(
    stats: Any, truth: oracle.Truth, *, bound: float = VALUE, lse: float = LSE, skip: tuple[str, ...] = ()
) -> None:
    """Every field of KDStats. The two terms of a split are compared as a pair: one may be 0 up to rounding."""
    assert set(stats._fields) == set(oracle.FIELDS)
    blank = torch.stack([truth.stats[name] == 0 for name in oracle.FIELDS]).all(0)  # ignored rows: exact zeros
    pairs = [("target_loss", "nontarget_loss"), ("target_grad", "nontarget_grad")]
    single = [name for name in oracle.FIELDS if name not in sum(pairs, ())]
    for names in [*pairs, *((name,) for name in single)]:
        if set(names) & set(skip):
            continue
        for name in names:
            assert not getattr(stats, name).requires_grad, f"{name} is not detached"
            assert torch.equal(getattr(stats, name).isnan().cpu(), truth.stats[name].isnan()), f"{name}: NaN"
        ours = torch.stack([getattr(stats, name) for name in names], -1)
        wanted = torch.stack([truth.stats[name] for name in names], -1)
        if wanted.isnan().any():
            continue
        if len(names) == 1:
            ours, wanted = ours[..., 0], wanted[..., 0]
        else:  # beside a term that is not 0, a 0 is a difference that cancels: small is enough
            wanted = wanted.where((wanted != 0) | ~wanted.any(-1, keepdim=True), TINY)
        allowed = lse if names[0].endswith("lse") else bound
        if names[0] in NATS:
            wanted = wanted.where((wanted != 0) | blank, TINY)
            allowed *= float((1 + wanted.abs()).where(~blank, 0).norm() / wanted.norm()) if wanted.any() else 1.0
        assert_close(ours, wanted, allowed, what="/".join(names))


def moved(options: dict[str, Any], place: str) -> dict[str, Any]:
    """Options with their tensors on the device of the call."""
    return {key: value.to(place) if isinstance(value, Tensor) else value for key, value in options.items()}


def expected(
    student: Tensor, teacher: Tensor, labels: Tensor | None, case: Case, options: dict[str, Any]
) -> tuple[oracle.Truth, Tensor, Tensor]:
    """The truth, the reduced loss, and its gradient with respect to the per-token losses."""
    name, params = case
    truth = oracle.distill(student, teacher, labels, oracle.meaning(name, **params), **chosen(options, TRUTH_OPTIONS))
    same = {"ignore_index": options["ignore_index"]} if "ignore_index" in options else {}
    return truth, *oracle.reduce(truth, labels, **chosen(options, REDUCE_OPTIONS), **same)


def check_logits(
    rows: Rows,
    case: Case,
    backend: str,
    *,
    per_row: float | None = None,
    typical: float | None = None,
    prepare: Callable[[Tensor], Tensor] = Tensor.contiguous,
    teacher_dtype: torch.dtype | None = None,
    skip: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Value, statistics and gradient of logits under a random upstream gradient; per token unless told otherwise."""
    name, params = case
    place = device(backend)
    options = {"reduction": "none"} | options
    truth, value, weights = expected(rows.student, rows.teacher, rows.labels, case, options)
    leaf = rows.student.to(place, rows.dtype, copy=True).requires_grad_()
    loss, stats = fusedkd.kd_loss(
        prepare(leaf),
        prepare(rows.teacher.to(place, teacher_dtype or rows.dtype)),
        None if rows.labels is None else rows.labels.to(place),
        divergence=fusedkd.divergence(name, **moved(params, place)),
        return_stats=True,
        backend=backend,
        **moved(options, place),
    )
    upstream = torch.randn(value.shape)
    loss.backward(upstream.to(place))
    wide, bound = (torch.float64, DOUBLE) if rows.dtype == torch.float64 else (torch.float32, VALUE)
    assert_close(loss, value, bound, dtype=wide, per_row=per_row, what="loss")
    wanted = truth.gradient(upstream.double() * weights)
    if rows.dtype != torch.float32:
        per_row = typical = None
    total = (MIXED if name == "amid" else bound) + rounding(wanted, rows.dtype, cut=cuts(backend))
    assert_close(leaf.grad, wanted, total, dtype=rows.dtype, per_row=per_row, typical=typical, what="gradient")
    check_stats(stats, truth, skip=skip)


def check_heads(
    student: Side | Tensor,
    teacher: Side | Tensor,
    labels: Tensor | None,
    case: Case,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
    prepare: Callable[[Tensor], Tensor] = Tensor.contiguous,
    weight_grad: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Value, statistics and gradients where at least one side is a head; the weight's in a buffer of a given dtype."""
    name, params = case
    place = device(backend)
    exact = [x.rounded(dtype) if isinstance(x, Side) else x.to(dtype).double() for x in (student, teacher)]
    leaves, given, products, logits = [], [], [], []
    for x in exact:
        if isinstance(x, Side):
            doubles, operands = x.operands(torch.float64, "cpu"), x.operands(dtype, place)
            product, final = oracle.head_logits(**doubles, scale=x.scale, softcap=x.softcap)
        else:
            doubles, operands = {"logits": x.clone().requires_grad_()}, {"logits": x.to(place, dtype).requires_grad_()}
            product = final = doubles["logits"]
        for key in frozen if x is exact[0] else ():
            operands[key].requires_grad_(False)
        views = {key: value if key == "bias" else prepare(value) for key, value in operands.items()}
        given.append(x.head(views) if isinstance(x, Side) else views["logits"])
        leaves.append((doubles, operands))
        products.append(product)
        logits.append(final)
    truth, value, weights = expected(logits[0].detach(), logits[1].detach(), labels, case, options)
    doubles, operands = leaves[0]
    buffer = None if weight_grad is None else torch.zeros(operands["weight"].shape, dtype=weight_grad, device=place)
    loss, stats = fusedkd.kd_loss(
        *given,
        None if labels is None else labels.to(place),
        divergence=fusedkd.divergence(name, **moved(params, place)),
        return_stats=True,
        backend=backend,
        weight_grad=buffer,
        **moved(options, place),
    )
    upstream = torch.randn(value.shape)

    wide, bound = torch.float32, VALUE + HEAD / kl_of(truth, logits, labels, options) ** 0.5
    check_stats(stats, truth, bound=bound, lse=HEAD)
    if dtype == torch.float64:
        wide, bound = torch.float64, DOUBLE
    assert_close(loss, value, bound, dtype=wide, what="loss")
    slope = truth.gradient(upstream.double() * weights)
    (slope,) = torch.autograd.grad(logits[0], products[0], slope, retain_graph=True)
    wanted = torch.autograd.grad(products[0], list(doubles.values()), slope, retain_graph=True)
    coarse = torch.autograd.grad(products[0], list(doubles.values()), slope.to(dtype).double(), retain_graph=True)
    start = None
    if buffer is not None:  # of the gradient's size, and not what the forward pass saw
        size = wanted[list(doubles).index("weight")].square().mean().sqrt()
        buffer.normal_().mul_(torch.where(size > 0, size, 1.0).item())
        start = buffer.detach().to("cpu", torch.float64, copy=True)
    loss.backward(upstream.to(place))
    for key, exactly, coarsely in zip(doubles, wanted, coarse, strict=True):
        ours = operands[key].grad
        if key in frozen:
            assert ours is None, f"{key} is frozen and got a gradient"
            continue
        if start is not None and key == "weight":
            assert ours is None, "the weight got a gradient beside its buffer"
            ours, exactly, coarsely = buffer, start + exactly, start + coarsely
        stored = weight_grad if weight_grad is not None and key == "weight" else dtype
        half = 1.2 * relative(coarsely.to(stored), exactly)  # what rounding dZ and the output costs by itself
        half += MIXED if name == "amid" else 0.0
        assert_close(ours, exactly, bound + half, dtype=stored, what=f"gradient of {key}")
    for key, operand in leaves[1][1].items():
        assert operand.grad is None, f"{key} of the teacher got a gradient"


def kl_of(truth: oracle.Truth, logits: list[Tensor], labels: Tensor | None, options: dict[str, Any]) -> float:
    """The mean forward KL of the counted rows: how far apart the two sides are."""
    student, teacher = (x.detach() for x in logits)
    same = chosen(options, ("temperature", "ignore_index", "vocab_size"))
    loss = oracle.distill(student, teacher, labels, oracle.meaning("fkl"), **same).loss
    counted = loss[truth.stats["student_lse"] != 0]
    return float(counted.mean()) if counted.numel() else 1.0


def opcheck(name: str, call: tuple[Any, ...], differentiable: bool = False) -> None:
    """torch's check of an operator, on copies of a call's arguments without their history."""

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(x) for x in value]
        if not isinstance(value, torch.Tensor):
            return value
        made = value.detach().clone()
        return made.requires_grad_(differentiable and value.requires_grad)

    torch.library.opcheck(getattr(torch.ops.fusedkd, name).default, tuple(map(leaf, call)))
