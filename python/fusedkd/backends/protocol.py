"""What a backend is: the functions that schedules and operators call, each written once.

Modules of functions implement these. Arguments are given by position: N rows, V compared columns, `Logits` those of one
side. Rows whose label (or token) is negative do not count: nothing of theirs is read, and zeros are written for them.
What a launcher of Triton kernels returns, the compiled kernel, is of no interest here.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.device.rows import Logits, Problem
from ..kernels.device.topk import ListedGradient


class Sweeps(Protocol):
    """Value and gradient of whole rows of logits."""

    def value(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        loss: Tensor,
        saved: Tensor | None,
        stats: Tensor | None,
        /,
    ) -> object:
        """Fills `loss` (N,), the row scalars `saved` (N, SAVED) for `gradient`, and `stats` (N, STATS)."""
        ...

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        out: Tensor,
        /,
    ) -> object:
        """Writes upstream_n · dloss_n/dx into `out` (N, student width)."""
        ...

    def value_and_gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        upstream: Tensor | None,
        out: Tensor,
        loss: Tensor,
        stats: Tensor | None,
        /,
    ) -> object:
        """Fills `loss` and `stats`, and `out` (may lie over the student's logits) as `gradient`; no upstream is 1."""
        ...


class RowBackend(Sweeps, Protocol):
    """The row work of logits and of the chunked schedule."""

    def floor_rows(
        self, problem: Problem, teacher: Logits, labels: Tensor | None, out: Tensor, depth: float, /
    ) -> object:
        """Fills `out` (N,) with the logits `depth` nats below the teacher's log-sum-exp."""
        ...


class ChunkBackend(Protocol):
    """The row work of the streaming schedule: all rows, the columns from `first` on, V of which are compared."""

    def shares(self, rows: int, device: torch.device, /) -> list[slice]:
        """Parts of N rows, each for a thread of its own: `labels` and what is (N, ...) is then that of a part."""
        ...

    def absorb(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        carry: Tensor,
        first: int,
        with_stats: bool,
        /,
    ) -> object:
        """Adds a chunk to `carry` (N, CARRY + online state)."""
        ...

    def add_sums(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        sums: Tensor,
        first: int,
        /,
    ) -> object:
        """Adds a chunk's Σ f and Σ phi to `sums` (N, TERM_SUMS), beside the largest d."""
        ...

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        dominant: Tensor,
        out: Tensor,
        first: int,
        /,
    ) -> object:
        """Writes a chunk's dZ into `out` (N, chunk), without the dominant token, kept in `dominant` (N, DOMINANT)."""
        ...


class TokenBackend(Protocol):
    """Log-probability of one token and entropy, per row of logits."""

    def value(self, side: Logits, tokens: Tensor, saved: Tensor, temperature: float, /) -> object:
        """Fills `saved` (N, TOKEN_SAVED)."""
        ...

    def gradient(
        self, side: Logits, tokens: Tensor, saved: Tensor, upstream: Tensor, out: Tensor, temperature: float, /
    ) -> object:
        """Writes upstream (N, 2) · d(log q_y, H)/dx into `out` (N, V), which may lie over the logits."""
        ...


class TopKBackend(Protocol):
    """What a top-k teacher needs of the student's rows. K listed columns, ids (N, K)."""

    def gather(self, side: Logits, ids: Tensor, labels: Tensor | None, out: Tensor, /) -> object:
        """Writes the logits at the columns `ids` into `out` (N, K), −inf where one is negative."""
        ...

    def masses(self, problem: Problem, student: Logits, ids: Tensor, labels: Tensor | None, out: Tensor, /) -> object:
        """Fills `out` (N, MASSES) from one sweep."""
        ...

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        ids: Tensor,
        labels: Tensor | None,
        logits: Tensor,
        kept: Tensor,
        found: ListedGradient,
        upstream: Tensor | None,
        out: Tensor,
        /,
    ) -> object:
        """Writes the gradient by the student's stored logits into `out` (N, width), which may lie over them."""
        ...


class Backend(NamedTuple):
    """Who does the row work."""

    rows: RowBackend  # some rows, a chunk of a schedule
    # (problem, student's logits (outer, inner, V)) -> what serves all rows of logits that a caller gave.
    logits: Callable[[Problem, Tensor], Sweeps]
    chunks: ChunkBackend
    tokens: TokenBackend
    topk: TopKBackend
