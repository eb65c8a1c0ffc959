"""Which implementation does the row work: `get` has it by name, `choose_backend` finds the name."""

import torch

from ..kernels.device import rows, token_logprobs, topk, vocab_chunks
from ..kernels.device.rows import Problem
from ..kernels.language import HAS_TRITON, interpreted
from . import torch_chunks, torch_compiled, torch_logprobs, torch_rows, torch_topk, triton
from .protocol import Backend, RowBackend

TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices call themselves cuda


def _torch(row_backend: RowBackend) -> Backend:
    """Row work by `row_backend`, and the rest by torch's own operations; no row is shared by several programs."""

    def logits(problem: Problem, x: torch.Tensor) -> RowBackend:
        return row_backend

    return Backend(row_backend, logits, torch_chunks, torch_logprobs, torch_topk)


_BACKENDS = {
    "triton": Backend(rows, triton.kernels, vocab_chunks, token_logprobs, topk),
    "torch": _torch(torch_rows),
    "compiled": _torch(torch_compiled),
}


def get(name: str) -> Backend:
    """The backend of a name that `choose_backend` returned."""
    return _BACKENDS[name]


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
