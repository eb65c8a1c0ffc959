"""`token_logprobs`: value and gradient of log q and of the entropy, for logits and for heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import (
    DTYPES,
    HEAD,
    IGNORE,
    LARGE_VOCABULARY,
    VALUE,
    cuts,
    device,
    each,
    named,
    opcheck,
    random_labels,
    side,
    unrelated,
)
from compare import assert_close, relative, rounding
from torch import Tensor

import fusedkd
from fusedkd.ops.token_logprobs import TokensCall


def truth(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q of the tokens and the entropy, by float64 log_softmax; 0 where a token is ignored."""
    rows = (logits / temperature).reshape(-1, logits.shape[-1])
    logq = torch.stack([oracle.log_softmax(row) for row in rows]).reshape(logits.shape)
    counted = ids != IGNORE
    picked = logq.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logq.exp() * logq.clamp(min=-1e9)).sum(-1)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.where(counted, picked, zero), torch.where(counted, entropy, zero)


def check(
    logits: Tensor,
    ids: Tensor,
    backend: str,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    prepare: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:
    """Logits: both outputs and the gradient of a random combination."""
    place = device(backend)
    exact = logits.to(dtype).double().requires_grad_()
    ours = exact.detach().to(place, dtype).requires_grad_()
    wanted = truth(exact, ids, temperature)
    found = fusedkd.token_logprobs(prepare(ours), ids.to(place), temperature, return_entropy=True, backend=backend)
    ups = torch.randn(2, *ids.shape, dtype=torch.float64)
    (wanted[0] * ups[0] + wanted[1] * ups[1]).sum().backward()
    up = ups.to(place, found[0].dtype)
    (found[0] * up[0] + found[1] * up[1]).sum().backward()
    bound = VALUE
    assert_close(found[0], wanted[0].detach(), bound, dtype=found[0].dtype, what="log q")
    gap = (found[1].double().cpu() - wanted[1].detach()).abs()
    assert (gap <= bound * (1 + wanted[1].detach())).all()  # near 0 the unit of an entropy is 1 nat
    assert exact.grad is not None
    assert_close(
        ours.grad, exact.grad, bound + rounding(exact.grad, dtype, cut=cuts(backend)), dtype=dtype, what="grad"
    )


@pytest.mark.smoke
@each("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b, ds in DTYPES.items() for d in ds], ids=named)
def test_logits(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """Every dtype, with ignored rows."""
    rows = unrelated(7, 1003)
    assert rows.labels is not None
    check(rows.student, rows.labels, backend, dtype, temperature)


@each("vocabulary", [1, 2, 127, 129, LARGE_VOCABULARY])
def test_vocabularies(vocabulary: int, backend: str) -> None:
    """Around the edges of a tile, and a real one."""
    logits = 5 * torch.randn(3, vocabulary, dtype=torch.float64)
    check(logits, random_labels((3,), vocabulary, ignored=False), backend)


@each("gap", [20.0, 40.0, 60.0])
def test_certain(gap: float, backend: str) -> None:
    """q of the token within 1e-17 of 1, or another token's: nothing is lost to 1 − q."""
    logits = torch.randn(4, 300, dtype=torch.float64)
    ids = torch.tensor([5, 7, 9, 11])
    logits[[0, 1], [5, 7]] += gap
    logits[[2, 3], [4, 6]] += gap
    check(logits, ids, backend)


def test_minus_infinity(backend: str) -> None:
    """A forbidden token has log q = −inf; forbidden others are left out."""
    place = device(backend)
    logits = torch.randn(2, 40)
    logits[:, 1::3] = -torch.inf
    found, entropy = fusedkd.token_logprobs(
        logits.to(place), torch.tensor([1, 2]).to(place), return_entropy=True, backend=backend
    )
    logq = logits.double().log_softmax(-1)
    assert found[0].item() == -torch.inf
    assert found[1].item() == pytest.approx(float(logq[1, 2]), rel=1e-6)
    seen = logq > -torch.inf
    wanted = -(logq.exp() * torch.where(seen, logq, 0.0)).sum(-1)
    assert_close(entropy, wanted, VALUE)


@each("options", [{}, {"bias": True, "scale": 0.5, "softcap": 8.0}])
@each("dtype", [torch.float32, torch.bfloat16])
def test_heads(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Gradients of hidden, weight and bias; several chunks on the CPU."""
    place, lead = device(backend), (3, 70)
    made = side(lead, 131, 16, **options).rounded(dtype)
    ids = random_labels(lead, 131)
    doubles, ours = made.operands(torch.float64, "cpu"), made.operands(dtype, place)
    logits = made.scale * (doubles["hidden"] @ doubles["weight"].T + doubles.get("bias", 0.0))
    logits = logits if made.softcap is None else made.softcap * torch.tanh(logits / made.softcap)
    wanted = truth(logits, ids, 1.0)
    found = fusedkd.token_logprobs(made.head(ours), ids.to(place), return_entropy=True, backend=backend)
    ups = torch.randn(2, *lead, dtype=torch.float64)
    (wanted[0] * ups[0] + wanted[1] * ups[1]).sum().backward()
    (found[0] * ups[0].to(found[0]) + found[1] * ups[1].to(found[1])).sum().backward()
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other.detach(), VALUE + HEAD, what="value")
    for key, exact in doubles.items():
        assert exact.grad is not None
        half = 2 * relative(exact.grad.to(dtype), exact.grad)
        assert_close(ours[key].grad, exact.grad, VALUE + HEAD + half, dtype=dtype, what=key)


@each("frozen", [("weight",), ("hidden",)])
def test_frozen(frozen: tuple[str, ...], backend: str) -> None:
    """What does not require grad gets none."""
    place = device(backend)
    operands = side((6,), 65, 16).operands(torch.float32, place)
    for key in frozen:
        operands[key].requires_grad_(False)
    ids = random_labels((6,), 65).to(place)
    fusedkd.token_logprobs(fusedkd.Head(**operands), ids, backend=backend).sum().backward()
    for key, x in operands.items():
        assert (x.grad is None) == (key in frozen)


def test_all_ignored_and_empty(backend: str) -> None:
    """Nothing counted: zeros, with a graph."""
    place = device(backend)
    for lead in ((4,), (0,)):
        x = torch.full((*lead, 9), torch.nan, device=place, requires_grad=True)
        found = fusedkd.token_logprobs(x, torch.full(lead, IGNORE, device=place), backend=backend)
        found.sum().backward()
        assert not found.any()
        assert x.grad is not None
        assert not x.grad.any()


def test_same_as_cross_entropy() -> None:
    """One step of a policy gradient: −advantage·log q is a weighted cross-entropy."""
    logits, ids, advantage = torch.randn(5, 90, requires_grad=True), torch.randint(90, (5,)), torch.randn(5)
    (mine,) = torch.autograd.grad((-advantage * fusedkd.token_logprobs(logits, ids)).sum(), logits)
    theirs = (torch.nn.functional.cross_entropy(logits, ids, reduction="none") * advantage).sum()
    assert torch.allclose(mine, torch.autograd.grad(theirs, logits)[0], atol=1e-6)


def test_operator(calls: dict[str, tuple[Any, ...]]) -> None:
    """opcheck, torch.compile, and no second derivative."""
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(33, 6, requires_grad=True)
    ids = torch.tensor([1, -1, 5, 32])
    fusedkd.token_logprobs(fusedkd.Head(x, weight), ids.masked_fill(ids < 0, IGNORE))
    opcheck("logprob_rows", TokensCall(*calls["logprob_rows"])._replace(rows=2), differentiable=True)
    run = torch.compile(lambda h: fusedkd.token_logprobs(fusedkd.Head(h, weight), ids.abs()).sum(), fullgraph=True)
    assert torch.allclose(run(x), fusedkd.token_logprobs(fusedkd.Head(x, weight), ids.abs()).sum())
    (grad,) = torch.autograd.grad(fusedkd.token_logprobs(x, torch.zeros(4, dtype=torch.int64)).sum(), x)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(fusedkd.token_logprobs(x, torch.zeros(4, dtype=torch.int64)).sum(), x, create_graph=True)
    assert grad.any()


MISTAKES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "side": ({"side": [1.0]}, TypeError, ("side", "list", "Head")),
    "ids floats": ({"token_ids": torch.zeros(2)}, TypeError, ("token_ids", "float32", "int64")),
    "ids shape": ({"token_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, ("token_ids", "(3,)", "(2,)")),
    "ids range": ({"token_ids": torch.tensor([0, 7])}, ValueError, ("token_ids", "7")),
    "temperature": ({"temperature": 0.0}, ValueError, ("temperature", "> 0")),
    "entropy": ({"return_entropy": 1}, TypeError, ("return_entropy", "True")),
    "budget": ({"memory_budget": 10}, ValueError, ("memory_budget", "head")),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, ("ignore_index", "float")),
}


@each("mistake", MISTAKES)
def test_bad_arguments(mistake: str) -> None:
    """Named before any work."""
    changed, error, words = MISTAKES[mistake]
    options = {"side": torch.randn(2, 7), "token_ids": torch.tensor([0, 1]), **changed}
    with pytest.raises(error) as caught:
        fusedkd.token_logprobs(**options)
    for word in words:
        assert word in str(caught.value)
