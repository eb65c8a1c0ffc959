"""Liger's chunked loss, which is plain torch and runs on a CPU, side by side with `fusedkd.compat.liger`."""

from __future__ import annotations

import inspect

import pytest
import torch
from compare import relative
from liger_kernel import chunked_loss, transformers
from liger_kernel.transformers import functional

import fusedkd.compat.liger as shim

FLOAT32 = 1e-5  # relative: some hundred roundings of 6e-8
CLASSES = (
    "LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss", "LigerJSD", "LigerKLDIVLoss", "LigerTVDLoss",
)  # fmt: skip
FUNCTIONS = ("liger_fused_linear_jsd", "liger_fused_linear_kl_div", "liger_jsd", "liger_kl_div", "liger_tvd")


def arguments(function: object) -> list[tuple[str, object]]:
    """Names and defaults, in order."""
    assert callable(function)
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", CLASSES)
def test_the_arguments_of_the_classes(name: str) -> None:
    ours, theirs = getattr(shim, name), getattr(transformers, name)
    assert arguments(ours) == arguments(theirs)
    assert arguments(ours.forward) == arguments(theirs.forward)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_of_the_functions(name: str) -> None:
    assert arguments(getattr(shim, name)) == arguments(getattr(functional, name))


def test_the_arguments_of_the_chunked_loss() -> None:
    ours, theirs = shim.LigerFusedLinearJSDLoss, chunked_loss.LigerFusedLinearJSDLoss
    assert arguments(ours) == arguments(theirs)
    assert arguments(ours.forward) == arguments(theirs.forward)


@pytest.mark.parametrize("lead", [(40,), (4, 10)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mix", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_chunked_loss(beta: float, mix: tuple[float, float], bias: bool, lead: tuple[int, ...]) -> None:
    """All three losses and every gradient; Liger takes flat rows, ours the shape they come in."""
    rows = torch.Size(lead).numel()
    operands = [torch.randn(rows, 16), torch.randn(301, 16), torch.randn(rows, 24), torch.randn(301, 24)]
    biases = list(torch.randn(2, 301)) if bias else [None, None]
    labels = torch.randint(301, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    found = []
    for original in (True, False):
        given = [x.clone().requires_grad_() for x in operands]
        given_biases = [None if x is None else x.clone().requires_grad_() for x in biases]
        kind = chunked_loss.LigerFusedLinearJSDLoss if original else shim.LigerFusedLinearJSDLoss
        module = kind(*mix, beta, temperature=1.7, compiled=False, chunk_size=16, return_soft_hard_loss=True)
        h, w, th, tw = given
        if original:
            losses = module(h, w, th, tw, labels, *given_biases)
        else:
            losses = module(h.view(*lead, -1), w, th.view(*lead, -1), tw, labels.view(lead), *given_biases)
        losses[0].backward()
        grads = [h.grad, w.grad, *([given_biases[0].grad] if bias else [])]
        found.append([x.detach() for x in (*losses, *grads)])
    for theirs, ours in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs.double()) < FLOAT32
