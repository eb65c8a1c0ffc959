"""What the ranks of a vocabulary shard tell each other: torch.distributed by the name of its group.

Every rank calls these in the same order with tensors of the same shape, whatever its columns hold. Sums are added in
the order of the ranks, so that every rank has the same bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ..call import LossCall

_c10d: Any = distributed  # whose functions have no types


class Ranks(NamedTuple):
    """The ranks that share a vocabulary, and which of its columns this one has."""

    group: Any  # distributed.ProcessGroup, which not every build of torch has
    first: int  # this rank's first column
    widest: int  # columns of the rank that has most of them

    def gathered(self, x: Tensor) -> Tensor:
        """x (n, c) of every rank: (R, n, c)."""
        out = x.new_empty((self.group.size(), *x.shape))
        _c10d.all_gather(list(out), x.contiguous(), group=self.group)
        return out

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x (n, c)."""
        parts = self.gathered(x).unbind()
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def first_largest(self, x: Tensor, token: Tensor) -> Tensor:
        """Of every rank's largest x (n,), at its columns `token` (n,) of the vocabulary: the first largest one's."""
        every = self.gathered(torch.stack((x, token.to(x.dtype)), -1))
        tops, tokens = every.unbind(-1)  # (R, n)
        return torch.where(tops == tops.amax(0), tokens, torch.inf).amin(0)

    def reduce(self, x: Tensor) -> None:
        """Sum a large x over the ranks in place."""
        _c10d.all_reduce(x, group=self.group)


def ranks_of(call: LossCall) -> Ranks | None:
    """The ranks of a call; None where the vocabulary is whole."""
    if not call.shard_group:
        return None
    return Ranks(_c10d.distributed_c10d._resolve_process_group(call.shard_group), call.shard_start, call.shard_widest)


def reduce_student(call: LossCall, gradient: Tensor, ranks: Ranks | None) -> None:
    """Sum the gradient of the student's hidden states over the ranks, where the call asks for it."""
    if ranks is not None and call.reduce_hidden and call.student_weight is not None and call.needs_student:
        ranks.reduce(gradient)


def local(ids: Tensor, columns: slice) -> Tensor:
    """Ids of the vocabulary as columns of a part of it, −1 outside."""
    return torch.where((ids >= columns.start) & (ids < columns.stop), ids - columns.start, -1)
