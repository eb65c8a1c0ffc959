"""Row work where the ranks of a group share the vocabulary: each has some neighbouring columns of every row.

    value        the rank's statistics, gathered and merged (partial_rows.py); the same loss on every rank, bit for bit
    gradient     of the rank's columns, from row scalars that every rank has; the dominant token's entry, at its owner,
                 is minus the sum of all others, for which the ranks' sums are gathered

Collectives, each of a few floats per row: one for the value (two without a one-sweep form), one for the gradient. What
needs more of whole rows costs more: a target that is the teacher's argmax one, support="floor" one, amid two and akl
six (ten in float64) for some rows at a time.
"""

import torch
from torch import Tensor

from ..backends import torch_chunks
from ..backends.protocol import Backend
from ..backends.torch_rows import Held, Reach, dominant_entry
from ..kernels.device.args import DOMINANT, SAVED, Dominant, RowScalars, columns_of, target_of
from ..kernels.device.rows import Logits, Problem
from ..kernels.divergences import definitions
from ..kernels.maths.quantities import RowNorms
from .partial_rows import Part, PartialRows
from .ranks import Ranks


class ShardedRows:
    """RowBackend (backends/protocol.py) of one rank. Labels are the vocabulary's, `problem.vocab_size` the rank's."""

    def __init__(self, backend: Backend, ranks: Ranks) -> None:
        self.backend, self.ranks = backend, ranks

    def value(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        loss: Tensor,
        saved: Tensor | None,
        stats: Tensor | None,
    ) -> None:
        """As RowBackend.value."""
        targets = self._argmax(problem, teacher, labels, loss) if problem.argmax else labels
        part = self._part(problem, student, teacher)

        def here(rows: slice) -> list[Part]:
            return [part] if part.student.x.shape[2] else []

        def extras(state: tuple[Tensor, ...], norms: RowNorms) -> tuple[Tensor, ...]:
            sides = part.problem, part.student, part.teacher, targets
            return torch_chunks.row_parameters(*sides, part.first, state, norms, self._reach(part), self.ranks.widest)

        found = PartialRows(
            part.problem,
            targets,
            loss,
            self.backend.chunks,
            [slice(0, len(loss))],
            here,
            self.ranks,
            extras if problem.definition.whole_rows else None,
        ).value(len(loss), stats is not None)
        loss.copy_(found.loss)
        if stats is not None:
            stats.copy_(found.stats)
        if saved is not None:
            saved.copy_(found.saved)
            if problem.argmax and targets is not None:
                target_of(saved)[:, 0] = targets

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor | None,
        out: Tensor,
    ) -> None:
        """As RowBackend.gradient."""
        part, targets = self._part(problem, student, teacher), labels
        if problem.argmax:
            targets = target_of(saved)[:, 0].long()
            targets = targets if labels is None else torch.where(labels >= 0, targets, -1)
        upstream = saved.new_ones(len(saved)) if upstream is None else upstream.to(saved.dtype)
        seen = out.shape[1] if problem.ce_weight else problem.vocab_size
        out[:, seen:] = 0
        dominant = saved.new_zeros((len(saved), DOMINANT))
        found = columns_of(Dominant, dominant, keepdim=True)
        found.token.fill_(-1)
        if seen:
            self.backend.chunks.gradient(
                part.problem, part.student, part.teacher, targets, saved, upstream, dominant, out[:, :seen], part.first
            )
        found.rest.copy_(self.ranks.total(found.rest))
        if seen:
            self._write_dominant(problem, found, saved, upstream, targets, out)

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
    ) -> None:
        """As RowBackend.value_and_gradient."""
        saved = loss.new_empty((len(loss), SAVED))
        self.value(problem, student, teacher, labels, loss, saved, stats)
        self.gradient(problem, student, teacher, labels, saved, upstream, out)

    def floor_rows(self, problem: Problem, teacher: Logits, labels: Tensor | None, out: Tensor, depth: float) -> None:
        """As RowBackend.floor_rows."""
        here = torch.full_like(out, -torch.inf)
        if problem.vocab_size:
            self.backend.rows.floor_rows(problem, teacher, labels, here, 0.0)
        every = self.ranks.gathered(here.unsqueeze(-1))[..., 0]
        out.copy_((torch.logsumexp(every / problem.temperature, 0) - depth) * problem.temperature)

    def _part(self, problem: Problem, student: Logits, teacher: Logits) -> Part:
        """The columns of this rank. Where none is compared the teacher still has to be something to point at."""
        teacher = teacher if problem.vocab_size else student
        return Part(self.ranks.first, problem._replace(argmax=False), student, teacher)

    def _argmax(self, problem: Problem, teacher: Logits, labels: Tensor | None, like: Tensor) -> Tensor:
        """The teacher's likeliest token of every row, the first of several, (N,); −1 in rows that do not count."""
        logit, column = like.new_full((len(like), 1), -torch.inf), torch.zeros_like(like, dtype=torch.int64)[:, None]
        if problem.vocab_size:
            saved, loss = like.new_zeros((len(like), SAVED)), torch.empty_like(like)
            alone = Problem(
                definitions()["fkl"], False, (), (1.0, 1.0), problem.vocab_size, problem.temperature, argmax=True
            )
            self.backend.rows.value(alone, teacher, teacher, labels, loss, saved, None)
            column = target_of(saved).long().clamp(min=0).contiguous()
            self.backend.topk.gather(teacher, column, labels, logit)
        token = self.ranks.first_largest(logit[:, 0], column[:, 0] + self.ranks.first)
        targets = torch.where(token.isfinite(), token, 0.0).long()
        return targets if labels is None else torch.where(labels >= 0, targets, -1)

    def _reach(self, part: Part) -> Reach:
        def largest(x: Tensor) -> Held:
            top, at = x.max(-1, keepdim=True)
            # A rank without a column has made one up, which is no token.
            own = at + part.first if part.problem.vocab_size else torch.full_like(at, 1 << 24)
            token = self.ranks.first_largest(top[:, 0], own[:, 0]).unsqueeze(-1)
            return Held(at, own == token)

        return Reach(self.ranks.total, largest)

    def _write_dominant(
        self, problem: Problem, found: Dominant, saved: Tensor, upstream: Tensor, targets: Tensor | None, out: Tensor
    ) -> None:
        scale = upstream.unsqueeze(-1)
        has = found.token >= 0
        if targets is not None:
            has = has & (targets >= 0).unsqueeze(-1)
        entry = dominant_entry(
            found,
            scale * (problem.factor / problem.temperature),
            scale * problem.ce_weight if problem.ce_weight else None,
            columns_of(RowScalars, saved, keepdim=True).ce_lse,
            None if targets is None else targets.unsqueeze(-1),
        )
        at = (found.token - self.ranks.first).clamp(min=0).long()
        out.scatter_(1, at, torch.where(has, entry.to(out.dtype), out.gather(1, at)))
