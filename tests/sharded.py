"""Calls as the ranks of a vocabulary shard make them, for the checks of cases.py and outcomes.py.

Every rank runs the whole check against float64, with `fusedkd.kd_loss` replaced by `Sharded.loss`: of what the check
passes it takes this rank's columns, and hands back gradients of all columns.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import conftest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusedkd
from fusedkd import Head, TopK, VocabShard
from fusedkd.schedules import planner

LOSS, BOTH = fusedkd.kd_loss, fusedkd.kd_value_and_grad
Check = tuple[str, Callable[..., None], tuple[Any, ...], dict[str, Any]]


class Own(torch.autograd.Function):
    """This rank's part of an axis. Backward: the gradients of all ranks' parts put together, the same on every rank.

    Where the gradient went to a buffer, it is the buffer's parts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """A view."""
        ctx.about = x.shape, axis, start, stop, buffer
        ctx.set_materialize_grads(False)
        return x.narrow(axis, start, stop - start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Gathered by a sum of parts that do not meet."""
        shape, axis, start, stop, buffer = ctx.about
        gradient = gradients[0]
        part = buffer[start:stop] if gradient is None and buffer is not None else gradient
        if part is None:
            return (None,) * 5
        whole = part.new_zeros(shape)
        whole.narrow(axis, start, stop - start).copy_(part)
        dist.all_reduce(whole)
        if buffer is not None:
            buffer.copy_(whole)
        return whole if buffer is None else None, None, None, None, None


@dataclasses.dataclass
class Sharded:
    """Where the ranks cut the vocabulary, as parts of its width: equal ones, or those of `cuts`."""

    cuts: list[float] | None = None
    teacher: str = "parts"  # or "whole", which every rank cuts itself

    def _range(self, width: int) -> tuple[int, int]:
        rank, size = dist.get_rank(), dist.get_world_size()
        if self.cuts is None:
            most = -(-width // size)
            return min(width, rank * most), min(width, (rank + 1) * most)
        bounds = [0, *(round(x * width) for x in self.cuts[: size - 1]), width]
        return bounds[rank], bounds[rank + 1]

    def side(self, x: Any, buffer: Tensor | None = None) -> Any:
        """This rank's columns."""
        if isinstance(x, TopK):
            return x
        if not isinstance(x, Head):
            return Own.apply(x, x.dim() - 1, *self._range(x.shape[-1]))
        columns = self._range(len(x.weight))
        bias = None if x.bias is None else Own.apply(x.bias, 0, *columns)
        return x._replace(weight=Own.apply(x.weight, 0, *columns, buffer), bias=bias)

    def arguments(self, student: Any, teacher: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """Those of a call of this rank."""
        width = len(student.weight) if isinstance(student, Head) else student.shape[-1]
        columns = self._range(width)
        shard = VocabShard(None, *(columns if self.cuts else ()))
        buffer = options.get("weight_grad")
        if buffer is not None:
            options = options | {"weight_grad": buffer[slice(*columns)]}
        part = self.side(teacher) if self.teacher == "parts" else teacher
        return self.side(student, buffer), part, options | {"shard": shard}

    def loss(self, student: Any, teacher: Any, labels: Any = None, **options: Any) -> Any:
        """fusedkd.kd_loss, of whose results every rank has the same bits."""
        student, teacher, options = self.arguments(student, teacher, options)
        found = LOSS(student, teacher, labels, **options)
        for x in found if isinstance(found, tuple) else (found,):
            for bits in x if isinstance(x, tuple) else (x,):
                same_on_every_rank(bits)
        return found

    def both(self, student: Any, teacher: Any, labels: Any = None, **options: Any) -> Any:
        """fusedkd.kd_value_and_grad, with the gradient of all columns."""
        whole = student
        student, teacher, options = self.arguments(student, teacher, options)
        loss, gradient, *stats = BOTH(student, teacher, labels, **options)
        made = torch.zeros_like(whole, memory_format=torch.contiguous_format)
        start, stop = self._range(whole.shape[-1])
        made[..., start:stop] = gradient
        dist.all_reduce(made)
        same_on_every_rank(loss)
        return loss, made, *stats


def same_on_every_rank(x: Tensor) -> None:
    """Bit for bit, NaN included."""
    bits = x.detach().contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    told = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(told, bits)
    assert all(torch.equal(told[0], other) for other in told), "ranks have other bits"


def checked(rank: int, how: Sharded, checks: list[Check]) -> dict[str, str]:
    """Runs every check on this rank, and returns the traceback of each that failed, by its name."""
    failed: dict[str, str] = {}
    conftest.save_repeated_work()
    with pytest.MonkeyPatch.context() as patch:
        conftest.fill_unwritten(patch, conftest.nan_everywhere)
        patch.setattr(fusedkd, "kd_loss", how.loss)
        patch.setattr(fusedkd, "kd_value_and_grad", how.both)
        patch.setattr(planner, "choose", lambda shape, budget: planner.Chunks(4, 2, 0))  # several chunks of each kind
        patch.setattr(planner, "choose_width", lambda shape, budget: 16)
        for name, check, args, options in checks:
            torch.manual_seed(0)
            error = ""
            try:
                check(*args, **options)
            except AssertionError:
                error = traceback.format_exc(limit=-3)
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, error)
            if any(told):
                failed[name] = "\n".join(f"rank {i}: {x}" for i, x in enumerate(told) if x)
    return failed
