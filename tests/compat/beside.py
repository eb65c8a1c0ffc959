"""Values and gradients of an original and of its drop-in, for the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compare import relative
from torch import Tensor

B, T, V, K = 2, 7, 301, 6
FLOAT32 = 2e-5  # relative: the originals round a sum over the vocabulary and 1 minus a sum


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the student and the teacher, the teacher's likeliest tokens and their log-probabilities."""
    student, teacher = 3 * torch.randn(2, B, T, V)
    logp, ids = teacher.log_softmax(-1).topk(K)
    return student, teacher, ids, logp


def same(functions: list[Callable[..., Any]], leaves: list[Tensor], scale: tuple[float, ...] = ()) -> None:
    """Values, and gradients for one upstream gradient: theirs first. `scale` is what the gradients differ by."""
    found, upstream = [], None
    for function in functions:
        given = [x.clone().requires_grad_() for x in leaves]
        value = function(*given)
        upstream = torch.randn(value.shape) if upstream is None else upstream
        value.backward(upstream.to(value.dtype))
        found.append((value.detach(), [x.grad for x in given]))
    theirs, ours = found
    assert ours[0].shape == theirs[0].shape
    assert relative(ours[0], theirs[0].double()) < FLOAT32
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert relative(one, (scale[0] if scale else 1.0) * other.double()) < FLOAT32
