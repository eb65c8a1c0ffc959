"""A shim beside its original: the same call, the original's formula in float64, the value and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import HEAD, VALUE
from compare import assert_close, rounding
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def check(
    shim: Callable[..., Any],
    formula: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    learns: tuple[str, ...],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """`inputs` are float64; `learns` names those that get a gradient, the others must get none."""
    exact = {name: x.to(dtype).double().requires_grad_() for name, x in inputs.items()}
    given = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    wanted, ours = formula(**exact, **options), shim(**given, **options)
    ours = ours[0] if isinstance(ours, tuple) else ours
    assert_close(ours, wanted.detach(), VALUE + HEAD, dtype=torch.float32)
    upstream = torch.randn(wanted.shape)
    gradients = torch.autograd.grad(wanted, [exact[name] for name in learns], upstream.double())
    ours.backward(upstream)
    for name, gradient in zip(learns, gradients, strict=True):
        bound = VALUE + HEAD + rounding(gradient, dtype)
        assert_close(given[name].grad, gradient, bound, dtype=dtype, what=f"gradient of {name}")
    for name in inputs.keys() - set(learns):
        assert given[name].grad is None, f"{name} got a gradient"


def kl_summands(logp: Tensor, logq: Tensor) -> Tensor:
    """F.kl_div(logq, logp, reduction="none", log_target=True), as it is: NaN where p is 0."""
    return logp.exp() * (logp - logq)


def gkd_summands(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """GKD's divergence as TRL and Liger write it, teacher p and student q, before any sum."""
    if beta == 0:
        return kl_summands(logp, logq)
    if beta == 1:
        return kl_summands(logq, logp)
    share = logp.new_tensor([beta, 1 - beta]).log()
    logm = torch.logsumexp(torch.stack([logp + share[0], logq + share[1]]), 0)
    return beta * kl_summands(logp, logm) + (1 - beta) * kl_summands(logq, logm)
