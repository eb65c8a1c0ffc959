"""Losses of full logits beside the ones that they replace, as released on PyPI, each file of which runs alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from beside import B, T, V, rows, same
from torch import Tensor

from fusedkd.compat import automodel, megatron, modelopt, swift, torchtune

pytest_plugins = ["alone"]


def labels() -> Tensor:
    return torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"])
def test_torchtune(name: str, normalize: bool, original: Callable[..., Any]) -> None:
    """The mean and the sum over counted tokens."""
    theirs = original("torchtune", "torchtune.modules.loss.kd_losses")
    student, teacher, _, _ = rows()
    given = labels()
    losses = [getattr(module, name)() for module in (theirs, torchtune)]
    same([lambda s, f=f: f(s.flatten(0, 1), teacher.flatten(0, 1), given, normalize) for f in losses], [student])


@pytest.mark.parametrize("name", ["ForwardKL", "ReverseKL", "SymmetricKL"])
def test_torchtune_in_chunks(name: str, original: Callable[..., Any]) -> None:
    theirs = original("torchtune", "torchtune.modules.loss.kd_losses")
    student, teacher, _, _ = rows()
    given = labels()
    losses = [getattr(module, f"{name}WithChunkedOutputLoss")(num_output_chunks=T) for module in (theirs, torchtune)]
    same([lambda s, f=f: f(s.split(1, 1), teacher.split(1, 1), given) for f in losses], [student])


@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("chunk_size", [0, 5])
def test_automodel(chunk_size: int, items: int | None, original: Callable[..., Any]) -> None:
    """With its T², over the tokens that count or over a given number."""
    theirs = original("nemo-automodel", "nemo_automodel.components.loss.kd_loss")
    student, teacher, _, _ = rows()
    given = labels()
    losses = [module.KDLoss(temperature=1.7, chunk_size=chunk_size) for module in (theirs, automodel)]
    same([lambda s, f=f: f(s, teacher, given, items) for f in losses], [student])


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt(reduction: str, original: Callable[..., Any]) -> None:
    theirs = original("nvidia-modelopt", "modelopt.torch.distill.losses")
    student, teacher, _, _ = rows()
    losses = [module.LogitsDistillationLoss(1.7, reduction) for module in (theirs, modelopt)]
    same([lambda s, f=f: f(s, teacher) for f in losses], [student])


@pytest.mark.parametrize("reverse", [False, True])
def test_modelopt_with_megatron(reverse: bool, original: Callable[..., Any]) -> None:
    """The loss per token, and what Megatron is told with it."""
    names = ("megatron.core", "megatron.core.pipeline_parallel.schedules", "megatron.core.transformer",
             "megatron.core.utils", "modelopt.torch.distill", "modelopt.torch.distill.config",
             "modelopt.torch.quantization.nn")  # fmt: skip
    theirs = original("nvidia-modelopt", "modelopt.torch.distill.plugins.megatron", {name: {} for name in names})
    config = SimpleNamespace(tensor_model_parallel_size=1, hidden_size=16)
    losses = [module.LogitsKLLoss(config, 1.7, reverse) for module in (theirs, megatron)]
    student, teacher, _, _ = rows()
    assert losses[0](student, teacher)[1:] == losses[1](student, teacher)[1:]
    same([lambda s, f=f: f(s, teacher)[0] for f in losses], [student])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_swift(beta: float, original: Callable[..., Any]) -> None:
    theirs = original("ms-swift", "swift.rlhf_trainers.gkd_loss")
    student, teacher, _, _ = rows()
    losses = [module.jsd_loss for module in (theirs, swift)]
    same([lambda s, f=f: f(s.flatten(0, 1), teacher.flatten(0, 1), beta) for f in losses], [student])
