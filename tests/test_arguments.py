"""What a call must not look like: each mistake is refused by name, with what would work, before any work is done."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import each
from torch.utils._python_dispatch import TorchDispatchMode

import fusedkd
from fusedkd.kernels.divergences import REGISTRY
from fusedkd.kernels.maths.definition import Parameter

N, V, WIDTH = 3, 7, 5
SIZE = N * V


class NoWork(TorchDispatchMode):
    """Fails when an operation produces anything as large as the logits; views are free."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returned."""
        made = func(*args, **(kwargs or {}))
        view = any(returned.alias_info is not None for returned in func._schema.returns)
        assert view or not isinstance(made, torch.Tensor) or made.numel() < SIZE, f"{func} ran before the checks"
        return made


LOGITS, OTHERS = torch.randn(2, N, V).unbind()
HIDDEN, WEIGHT = torch.randn(N, WIDTH), torch.randn(V, WIDTH)
LABELS = torch.tensor([0, 6, -100])


def head(**changed: Any) -> fusedkd.Head:
    """A valid head, or one with something changed."""
    return fusedkd.Head(**{"hidden": HIDDEN, "weight": WEIGHT, **changed})


def call(**changed: Any) -> Any:
    """A valid call, or one with something changed."""
    options = {"student": LOGITS, "teacher": OTHERS, "labels": LABELS} | changed
    inputs = [options.pop(name) for name in ("student", "teacher", "labels")]
    return fusedkd.kd_loss(*inputs, **options)


def refused(
    words: tuple[str, ...], error: type[Exception] | tuple[type[Exception], ...], run: Callable[[], Any]
) -> None:
    """`run` raises, early, and the text has every word."""
    with pytest.raises(error) as caught, NoWork():
        run()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# id -> (what is changed, exception, words the message must have: the argument, its value, what would work)
ARGUMENTS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "student a list": ({"student": [[1.0]]}, TypeError, ("student", "list", "Head")),
    "student missing": ({"student": None}, TypeError, ("student", "NoneType", "Head")),
    "teacher an array": ({"teacher": OTHERS.numpy()}, TypeError, ("teacher", "ndarray", "Head")),
    "student integers": ({"student": torch.ones(N, V, dtype=torch.int64)}, TypeError, ("student", "int64", "float")),
    "teacher integers": ({"teacher": torch.ones(N, V, dtype=torch.int32)}, TypeError, ("teacher", "int32", "float")),
    "student a number": ({"student": torch.tensor(1.0)}, ValueError, ("student",)),
    "tokens differ": ({"teacher": torch.randn(N + 1, V)}, ValueError, ("teacher", "(4,", "(3,")),
    "dimensions differ": ({"teacher": torch.randn(1, N, V)}, ValueError, ("teacher", "(1, 3", "(3,")),
    "tokens of a head": ({"teacher": head(hidden=torch.randn(2, WIDTH))}, ValueError, ("teacher", "(2,", "(3,")),
    "devices differ": ({"teacher": torch.randn(N, V, device="meta")}, ValueError, ("teacher", "meta", "cpu")),
    "labels on another device": ({"labels": torch.zeros(N, dtype=torch.int64, device="meta")}, ValueError, ("labels",)),
    "labels a list": ({"labels": [0, 1, 2]}, TypeError, ("labels", "list")),
    "labels floats": ({"labels": torch.zeros(N)}, TypeError, ("labels", "float32", "int64")),
    "labels one-hot": ({"labels": torch.zeros(N, V, dtype=torch.int64)}, ValueError, ("labels", "(3, 7)", "(3,)")),
    "label too large": ({"labels": torch.tensor([0, 7, 1])}, ValueError, ("labels", "7")),
    "label negative": ({"labels": torch.tensor([0, -5, 1])}, ValueError, ("labels", "-5", "-100")),
    "divergence unknown": ({"divergence": "kl"}, ValueError, ("divergence", "'kl'", "fkl", "rkl", "drkl", "ab")),
    "divergence a number": ({"divergence": 3}, TypeError, ("divergence", "int", "name")),
    "temperature zero": ({"temperature": 0.0}, ValueError, ("temperature", "0", "> 0")),
    "temperature negative": ({"temperature": -1.0}, ValueError, ("temperature", "-1", "> 0")),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, ("temperature", "nan")),
    "temperature infinite": ({"temperature": float("inf")}, ValueError, ("temperature", "inf")),
    "temperature text": ({"temperature": "hot"}, TypeError, ("temperature", "str")),
    "reduction unknown": ({"reduction": "batchmean"}, ValueError, ("reduction", "batchmean", "mean", "sum", "none")),
    "num_items of a sum": ({"num_items": 3, "reduction": "sum"}, ValueError, ("num_items", "mean", "sum")),
    "num_items of none": ({"num_items": 3, "reduction": "none"}, ValueError, ("num_items", "mean", "none")),
    "num_items a vector": ({"num_items": torch.ones(1)}, ValueError, ("num_items", "(1,)", "0-d")),
    "num_items text": ({"num_items": "3"}, TypeError, ("num_items", "str")),
    "num_items with grad": ({"num_items": torch.tensor(3.0, requires_grad=True)}, ValueError, ("num_items", "grad")),
    "weights of a batch": ({"token_weights": torch.ones(N, V)}, ValueError, ("token_weights", "(3, 7)", "(3,)")),
    "weights a list": ({"token_weights": [1.0, 1.0, 1.0]}, TypeError, ("token_weights", "list")),
    "weights with grad": (
        {"token_weights": torch.ones(N, requires_grad=True)},
        ValueError,
        ("token_weights", "grad", "detach"),
    ),
    "cross-entropy without labels": ({"ce_weight": 0.5, "labels": None}, ValueError, ("ce_weight", "labels")),
    "cross-entropy text": ({"ce_weight": "0.5"}, TypeError, ("ce_weight", "str")),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, ("ignore_index", "float")),
    "vocab_size zero": ({"vocab_size": 0}, ValueError, ("vocab_size", "0")),
    "vocab_size too large": ({"vocab_size": V + 1}, ValueError, ("vocab_size", "8", "7")),
    "vocab_size a float": ({"vocab_size": 7.0}, TypeError, ("vocab_size", "float")),
    "support unknown": ({"support": "drop"}, ValueError, ("support", "drop", "teacher", "floor")),
    "schedule unknown": ({"schedule": "fast"}, ValueError, ("schedule", "fast", "chunked")),
    "schedule of logits": ({"schedule": "chunked"}, ValueError, ("schedule", "chunked", "head")),
    "budget of logits": ({"memory_budget": 2**30}, ValueError, ("memory_budget", "head")),
    "budget negative": ({"student": head(), "memory_budget": -1}, ValueError, ("memory_budget", "-1")),
    "budget text": ({"student": head(), "memory_budget": "1GB"}, TypeError, ("memory_budget", "str")),
    "drop_ignored text": ({"student": head(), "drop_ignored": "yes"}, (TypeError, ValueError), ("drop_ignored", "yes")),
    "logits_dtype": (
        {"student": head(), "logits_dtype": torch.float16},
        ValueError,
        ("logits_dtype", "float16", "float32", "bfloat16"),
    ),
    "backend unknown": ({"backend": "cuda"}, ValueError, ("backend", "cuda", "triton", "torch")),
    "float64 kernels": ({"student": LOGITS.double(), "backend": "triton"}, TypeError, ("float64", "Triton", "torch")),
    "drkl without labels": ({"divergence": "drkl", "labels": None}, ValueError, ("drkl", "labels")),
    "decoupled without labels": ({"divergence": "decoupled", "labels": None}, ValueError, ("decoupled", "labels")),
}


@pytest.mark.smoke
@each("mistake", ARGUMENTS)
def test_arguments(mistake: str) -> None:
    """Each argument of kd_loss."""
    changed, error, words = ARGUMENTS[mistake]
    refused(words, error, lambda: call(**changed))


def test_the_plain_call_is_fine() -> None:
    """What the table changes is a valid call to begin with, for logits and for heads."""
    assert call().isfinite()
    assert call(student=head(), teacher=head(), labels=None).isfinite()


DIVERGENCES: dict[str, tuple[tuple[str, dict[str, Any]], Any, tuple[str, ...]]] = {
    "unknown name": (("kl", {}), ValueError, ("'kl'", "fkl", "rkl", "drkl", "ab", "decoupled")),
    "unknown parameter": (("fkl", {"gamma": 0.5}), (TypeError, ValueError), ("gamma", "fkl", "target", "nontarget")),
    "parameter of another base": (
        ("decoupled", {"base": "rkl", "alpha": 1.0}),
        (TypeError, ValueError),
        ("alpha", "target"),
    ),
    "unknown base": (("decoupled", {"base": "kl"}), ValueError, ("base", "'kl'", "fkl", "rkl")),
    "base decoupled already": (("decoupled", {"base": "drkl"}), ValueError, ("base", "drkl")),
    "base a number": (("decoupled", {"base": 1}), (TypeError, ValueError), ("base", "1", "rkl")),
    "parameter text": (("ab", {"alpha": "0.2"}), TypeError, ("alpha", "str")),
    "alpha of ab": (("ab", {"alpha": 17.0}), ValueError, ("alpha", "16", "17")),
    "beta of ab": (("ab", {"beta": -17.0}), ValueError, ("beta", "-16", "-17")),
    "parameter NaN": (("ab", {"alpha": float("nan")}), ValueError, ("alpha", "nan")),
    "parameter with grad": (("drkl", {"gamma": torch.tensor(0.5, requires_grad=True)}), ValueError, ("gamma", "grad")),
    "beta of jsd": (("jsd", {"beta": 1.5}), ValueError, ("beta", "[0, 1]", "1.5")),
    "lam of skl": (("skl", {"lam": -0.1}), ValueError, ("lam", "[0, 1]", "-0.1")),
    "lam of srkl": (("srkl", {"lam": 2.0}), ValueError, ("lam", "[0, 1]", "2.0")),
    "detach_mixture a number": (("srkl", {"detach_mixture": 1}), TypeError, ("detach_mixture", "True", "False")),
    "w of frkl": (("frkl", {"w": 7}), ValueError, ("w", "[0, 1]", "7")),
    "alpha too large": (("alpha", {"alpha": 99}), ValueError, ("alpha", "99", "16")),
    "weights of dkd": (("dkd", {"beta": -1.0}), ValueError, ("beta", ">= 0", "-1")),
    "t of taid": (("taid", {"t": 1.1}), ValueError, ("t", "[0, 1]", "1.1")),
    "taid of taid": (("taid", {"base": fusedkd.divergence("taid")}), ValueError, ("base", "taid", "fkl")),
    "taid of amid": (("taid", {"base": "amid"}), ValueError, ("base", "taid", "amid")),
    "order of amid": (("amid", {"order": "pp"}), ValueError, ("order", "pr", "'pp'")),
    "order a number": (("amid", {"order": 1}), TypeError, ("order", "str", "int")),
    "base of amid": (("amid", {"base": "jsd"}), ValueError, ("base", "amid", "fkl", "ab", "jsd")),
    "alpha of amid": (("amid", {"alpha": -99}), ValueError, ("alpha", "-16", "-99")),
    "lam of amid": (("amid", {"lam": 1.01}), ValueError, ("lam", "[0, 1]", "1.01")),
    "mu of akl": (("akl", {"mu": -0.5}), ValueError, ("mu", "[0, 1]", "-0.5")),
    "weights of akl": (("akl", {"target": 2.0}), ValueError, ("akl", "target", "mu")),
    "head of akl": (("akl", {"head": "both"}), ValueError, ("head", "exclusive", "inclusive", "'both'")),
    "decoupled akl": (("decoupled", {"base": "akl"}), ValueError, ("base", "akl", "sum over tokens")),
    "order 0 of renyi": (("renyi", {"alpha": 0.0}), ValueError, ("alpha", "(0, 16]", "0")),
    "threshold of eopd": (("eopd", {"threshold": -1.0}), ValueError, ("threshold", ">= 0", "-1")),
    "taid of eopd": (("taid", {"base": "eopd"}), ValueError, ("base", "eopd", "fkl")),
    "target_token": (("drkl", {"target_token": "argmax"}), ValueError, ("target_token", "teacher_argmax", "'argmax'")),
    "gamma negative": (("drkl", {"gamma": -0.5}), ValueError, ("gamma", "-0.5", "> 0")),
}


@pytest.mark.smoke
@each("mistake", DIVERGENCES)
def test_divergences(mistake: str) -> None:
    """Each argument of the factory."""
    (name, params), error, words = DIVERGENCES[mistake]
    refused(words, error, lambda: call(divergence=fusedkd.divergence(name, **params)))


RANGED = [
    (name, parameter)
    for name, member in REGISTRY.items()
    for parameter in member.arguments
    if isinstance(parameter.default, float) and not parameter.low == -math.inf == -parameter.high
]


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "parameter"), RANGED, ids=[f"{name}-{parameter.name}" for name, parameter in RANGED])
def test_ranges(name: str, parameter: Parameter) -> None:
    """Both ends of a parameter's range are accepted, the next float behind either is refused with the range."""
    for end, beyond in ((parameter.low, -math.inf), (parameter.high, math.inf)):
        if end != beyond:
            made = fusedkd.divergence(name, **{parameter.name: end})
            assert made.parameters[parameter.name] == end
            outside = {parameter.name: math.nextafter(end, beyond)}
            words = (parameter.name, repr(name), parameter.domain, parameter.meaning, str(outside[parameter.name]))
            refused(words, ValueError, lambda outside=outside: fusedkd.divergence(name, **outside))


def test_parameter_of_the_wrong_shape() -> None:
    """A parameter per token must fit the tokens."""
    made = fusedkd.divergence("ab", alpha=torch.rand(N + 1))
    refused(("alpha", "(4,)", "(3,)"), ValueError, lambda: call(divergence=made))


@each("name", [name for name, given in fusedkd.divergences().items() if "target" in given and name != "decoupled"])
def test_weights_without_labels(name: str) -> None:
    """Two different weights need a target; equal ones do not."""
    made = fusedkd.divergence(name, target=1.0, nontarget=0.5)
    refused(("labels", "target"), ValueError, lambda: call(divergence=made, labels=None))
    per_token = fusedkd.divergence(name, target=torch.ones(N), nontarget=torch.ones(N))
    refused(("labels", "target"), ValueError, lambda: call(divergence=per_token, labels=None))
    assert call(divergence=fusedkd.divergence(name, target=2.0, nontarget=2.0), labels=None).isfinite()


def test_listing() -> None:
    """Names and parameters with their defaults, enough to build every divergence."""
    listed = fusedkd.divergences()
    assert listed["drkl"]["gamma"] == 0.5
    assert (listed["ab"]["alpha"], listed["ab"]["beta"]) == (0.2, 0.7)
    assert {"base": "rkl", "target": 1, "nontarget": 1}.items() <= listed["decoupled"].items()
    for name, parameters in listed.items():
        assert fusedkd.divergence(name, **parameters) == fusedkd.divergence(name)
        assert fusedkd.divergence(name).name == name
        with pytest.raises((AttributeError, TypeError)):
            fusedkd.divergence(name).name = "other"


HEADS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "widths differ": ({"weight": torch.randn(V, WIDTH + 1)}, ValueError, ("weight", "hidden", "6", "5")),
    "weight a vector": ({"weight": torch.randn(WIDTH)}, ValueError, ("weight", "(5,)")),
    "weight of three dimensions": ({"weight": torch.randn(1, V, WIDTH)}, ValueError, ("weight", "(1, 7, 5)")),
    "weight a list": ({"weight": [[1.0]]}, TypeError, ("weight", "list")),
    "hidden a list": ({"hidden": [[1.0]]}, TypeError, ("hidden", "list")),
    "hidden integers": ({"hidden": torch.ones(N, WIDTH, dtype=torch.int64)}, TypeError, ("hidden", "int64")),
    "dtypes differ": (
        {"weight": torch.randn(V, WIDTH).bfloat16()},
        (TypeError, ValueError),
        ("weight", "bfloat16", "float32"),
    ),
    "bias of hidden": ({"bias": torch.randn(WIDTH)}, ValueError, ("bias", "(5,)", "(7,)")),
    "bias a number": ({"bias": 0.5}, TypeError, ("bias", "float")),
    "softcap zero": ({"softcap": 0.0}, ValueError, ("softcap", "0", "> 0")),
    "softcap negative": ({"softcap": -30.0}, ValueError, ("softcap", "-30", "> 0")),
    "scale text": ({"scale": "1"}, TypeError, ("scale", "str")),
    "scale NaN": ({"scale": float("nan")}, ValueError, ("scale", "nan")),
}


@pytest.mark.smoke
@each("mistake", HEADS)
@each("role", ["student", "teacher"])
def test_heads(mistake: str, role: str) -> None:
    """Each operand of a Head, when it is made or when it is used."""
    changed, error, words = HEADS[mistake]
    refused(words, error, lambda: call(**{role: head(**changed)}))


@each("entry", ["student_logits", "teacher_logits"])
def test_value_and_grad_takes_logits(entry: str) -> None:
    """kd_value_and_grad gives a gradient of logits: a Head has none to give."""
    sides = {"student_logits": LOGITS, "teacher_logits": OTHERS, entry: head()}
    refused((entry, "Head", "kd_loss"), (TypeError, ValueError), lambda: fusedkd.kd_value_and_grad(**sides))


def test_unknown_option() -> None:
    """A misspelt option is not swallowed, by the function or by the module."""
    for run in (lambda: call(temprature=2.0), lambda: fusedkd.DistillationLoss(temprature=2.0)):
        with pytest.raises(TypeError, match="temprature"):
            run()


def test_kernels_without_gpu_or_interpreter() -> None:
    """Without either, backend="triton" says what is missing instead of crashing, and "auto" takes the torch path."""
    program = """
import torch, fusedkd
x = torch.randn(2, 5)
print(float(fusedkd.kd_loss(x, x)))
try:
    fusedkd.kd_loss(x, x, backend="triton")
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    value, message = made.stdout.strip().split("\n", 1)
    assert float(value) == 0
    for word in ("Error", "backend", "triton", "cpu", "torch"):
        assert word in message


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A device mesh of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@each("where", ["token_weights", "student_logits", "side"])
def test_dtensor(where: str, mesh: Any) -> None:
    """A distributed tensor is refused, naming the way to a plain one, but for the sides of kd_loss."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    logits = distribute_tensor(torch.randn(N, V), mesh, [Replicate()])
    weights = distribute_tensor(torch.ones(N), mesh, [Replicate()])
    calls: dict[str, Callable[[], Any]] = {
        "token_weights": lambda: call(token_weights=weights),
        "student_logits": lambda: fusedkd.kd_value_and_grad(logits, torch.randn(N, V)),
        "side": lambda: fusedkd.token_logprobs(logits, torch.zeros(N, dtype=torch.int64)),
    }
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=r"full_tensor\(\)") as caught:
        calls[where]()
    assert where in str(caught.value)
