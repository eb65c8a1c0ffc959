"""Which implementation does the row work."""

from typing import Any

import torch

from ..kernels.device import rows as triton_rows
from ..kernels.device import split_rows as triton_split_rows
from ..kernels.device.rows import Problem
from ..kernels.language import HAS_TRITON, interpreted
from . import torch_compiled, torch_rows

TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices call themselves cuda
FEW_ROWS = 64  # half the multiprocessors of a large GPU: a guess, "not measured"


def row_functions(backend: str) -> Any:
    """The module whose value, gradient, value_and_gradient and floor_rows serve a resolved backend."""
    if backend == "triton":
        return triton_rows
    return torch_compiled if backend == "compiled" else torch_rows


def logit_functions(backend: str, problem: Problem, x: torch.Tensor) -> Any:
    """The module whose value, gradient and value_and_gradient serve logits (outer, inner, V) of one call."""
    if backend == "triton" and shares_rows(problem, x):
        return triton_split_rows
    return row_functions(backend)


def shares_rows(problem: Problem, x: torch.Tensor) -> bool:
    """Whether several programs share a row: where one program per row would leave most of a GPU idle."""
    few = x.is_cuda and x.shape[0] * x.shape[1] <= FEW_ROWS
    return few and triton_split_rows.serves(problem)


def choose_backend(asked: str, device: torch.device) -> str:
    """ "triton", "torch" or "compiled" for a request.

    Raises where the request cannot be met: nothing falls back silently.
    """
    if asked not in ("auto", "triton", "torch", "compiled"):
        raise ValueError(f'backend must be "auto", "triton", "torch" or "compiled", got {asked!r}')
    if asked == "compiled":
        if device.type != "cpu":
            raise ValueError(
                f'backend="compiled" makes loops of the row work of a CPU, and the tensors are on {device.type}: '
                'leave it at "auto"'
            )
        if not torch.compiler.is_compiling():  # which looks for the compiler itself, and cannot trace the search
            torch_compiled.check()
    if asked in ("torch", "compiled"):
        return asked
    if device.type in TRITON_DEVICES:
        if not HAS_TRITON:
            raise ValueError(
                f"backend={asked!r} on {device.type} tensors needs Triton, which is not installed: "
                'pip install triton, or pass backend="torch" for the slow path'
            )
        return "triton"
    if device.type == "meta":  # shapes alone: no implementation runs
        return "torch"
    if asked == "auto":
        if device.type != "cpu":
            raise ValueError(f'backend="auto" knows cuda, xpu and cpu tensors, got {device.type}; pass backend="torch"')
        return "torch"
    if not (HAS_TRITON and interpreted()):
        raise ValueError(
            f'backend="triton" on {device.type} tensors runs only in Triton\'s interpreter: install triton and set '
            'TRITON_INTERPRET=1 before importing fusedkd, or pass backend="torch"'
        )
    return "triton"
