"""A teacher known by its K likeliest tokens: a comparison of K + 1 outcomes, of which the vocabulary learns afterwards.

    outcomes     the K listed tokens and, as one more, the bucket of all others: log p of each, log(1 − Σ p)
    student      its logits at the listed tokens, and the log-sum-exp of all its other logits, (N, K + 1)
    row work     of any divergence, on these rows as on any other logits
    gradient     the listed tokens' entries go to their columns; the bucket's is shared out by softmax over the others

With h_k = phi(p_k, q_k), H = Σ h and the bucket r: dL/dz_k = h_k − q_k H at a listed token, and at another one
q_j/Q_r · (h_r − Q_r H) = q_j (h_r/Q_r − H), which is the derivative of D over the K + 1 outcomes by its logit.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.protocol import Backend, RowBackend, Sweeps
from ..kernels.device.args import TokenStats, columns_of
from ..kernels.device.rows import SAVED, Logits, Outcomes, Problem
from ..kernels.device.topk import MASSES, ListedGradient, Masses
from .partial_rows import GATHERED, Part
from .ranks import Ranks, local

EMPTY = -50.0  # log-probability of a bucket that the teacher leaves empty, as that of support="floor"
TRUNCATED = ("fkl", "rkl", "frkl", "jsd")  # divergences with a published integrand for raw probabilities
_PADDED = 4  # floats that rows of outcomes are a multiple of: 16 bytes


class TopKOutcomes(NamedTuple):
    """N rows of W outcomes as an Operand: K listed, the bucket if there is one, and a column of no probability."""

    x: Tensor  # (N, W) log-probabilities, −inf where a token is absent
    ids: Tensor  # (N, K) int64, −1 where a token is absent
    targets: Tensor  # (N,) int64 as Outcomes.targets

    kind = "top-k bucket"
    bucket = True
    stored = True
    dim = 0

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0]

    @property
    def width(self) -> int:
        """W."""
        return self.x.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return list(self)

    @property
    def numbers(self) -> tuple[float, ...]:
        """None."""
        return ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor], numbers: Sequence[float]) -> "TopKOutcomes":
        """From `tensors`."""
        return cls(*tensors)

    def at(self, rows: Tensor) -> "TopKOutcomes":
        """A copy of some rows, which are short."""
        return self._make(x[rows] for x in self)

    def buffer(self, rows: int, columns: int, logits_dtype: torch.dtype | None) -> None:
        """Needs none."""

    def logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Logits:
        """The outcomes of some rows; `columns` are the vocabulary's, which no outcome is cut by."""
        return Logits(self.x[None, rows], outcomes=Outcomes(self.ids[rows], self.targets[rows], self.bucket))


class RenormalizedOutcomes(TopKOutcomes):
    """Both sides renormalised on the listed tokens: no bucket."""

    kind = "top-k renormalize"
    bucket = False


class TruncatedOutcomes(TopKOutcomes):
    """Raw probabilities of the listed tokens; the bucket is there for the student's, and adds nothing itself."""

    kind = "top-k truncate"


TAILS: dict[str, type[TopKOutcomes]] = {
    "bucket": TopKOutcomes,
    "renormalize": RenormalizedOutcomes,
    "truncate": TruncatedOutcomes,
}


def outcomes_of(
    tail: str,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    argmax: bool,
    columns: int,
    dtype: torch.dtype,
) -> TopKOutcomes:
    """The Operand of a top-k teacher, ids and logprobs (N, K), beside a student of which `columns` are compared.

    The target is the label (N,), or with `argmax` the likeliest listed token. A token that is absent, of probability 0
    or beyond the columns is left to the bucket. The bucket's log-probability is that of 1 − Σ p in float64, EMPTY where
    the listed tokens have all.
    """
    kind = TAILS[tail]
    # Kernels read rows of K neighbours, and torch.where would keep the order of a transposed cache.
    (n, k), ids, logprobs = ids.shape, ids.long().contiguous(), logprobs.contiguous()
    listed = (ids >= 0) & (ids < columns) & (logprobs != -torch.inf)  # NaN has to pass
    ids = torch.where(listed, ids, -1)
    logp = torch.where(listed, logprobs.to(dtype), -torch.inf)
    width = k + 1 + kind.bucket
    x = logp.new_full((n, -(-width // _PADDED) * _PADDED), -torch.inf)[:, :width]
    x[:, :k] = logp
    if kind.bucket:
        total = torch.logsumexp(logp.double(), -1)
        rest = torch.where(total >= 0, EMPTY, torch.log(-torch.expm1(total.clamp(max=-1e-300))))
        x[:, k] = torch.where(listed.sum(-1) == columns, -torch.inf, rest).to(dtype)
    targets = torch.full((n,), width - 1, dtype=torch.int64, device=ids.device)
    if argmax:
        targets = logp.argmax(-1)
    elif labels is not None:
        mine = ids == labels.unsqueeze(-1)
        targets = torch.where(mine.any(-1), mine.int().argmax(-1), targets)
    counted = listed.any(-1)
    if labels is not None:
        counted = counted & (labels >= 0)
    return kind(x, ids, torch.where(counted, targets, -1))


def is_topk(kind: str) -> bool:
    """Whether an operand of this kind is a top-k teacher."""
    return kind in {tail.kind for tail in TAILS.values()}


def saved_width(kind: str, teacher: Sequence[Tensor]) -> int:
    """How many floats the value of a row leaves to its gradient, beside a teacher of this kind and these tensors."""
    return _saved_width(TopKOutcomes(*teacher).ids) if is_topk(kind) else SAVED


def _saved_width(ids: Tensor) -> int:
    return SAVED + MASSES + ids.shape[1]


def _topk_rows(kind: str, backend: Backend) -> "TopKRows":
    return TopKRows(backend, _Truncated() if kind == TruncatedOutcomes.kind else backend.rows)


def rows_beside(kind: str, backend: Backend, ranks: Ranks | None) -> RowBackend:
    """What does the row work beside a top-k teacher of this kind."""
    return _topk_rows(kind, backend) if ranks is None else ShardedTopKRows(kind, backend, ranks)


class Saved(NamedTuple):
    """What the value of N rows leaves to their gradient, each contiguous."""

    scalars: Tensor | None  # (N, SAVED), of the outcomes
    masses: Tensor  # (N, MASSES)
    logits: Tensor  # (N, K) of the student at the listed tokens


def saved_of(saved: Tensor | None, like: Tensor, k: int) -> Saved:
    """Saved in the memory of `saved` (N, saved_width), or without one in its own, of N rows as `like`."""
    n = len(like)
    if saved is None:
        return Saved(None, like.new_empty((n, MASSES)), like.new_empty((n, k)))
    flat, of_masses, of_logits = saved.view(-1), n * SAVED, n * (SAVED + MASSES)
    masses, logits = flat[of_masses:of_logits].view(n, MASSES), flat[of_logits:].view(n, k)
    return Saved(flat[:of_masses].view(n, SAVED), masses, logits)


class Compared(NamedTuple):
    """Rows of outcomes on both sides, and what the vocabulary's gradient needs of them."""

    problem: Problem
    student: Logits  # (1, n, W)
    teacher: Logits
    targets: Tensor
    labels: Tensor  # negative in rows that do not count
    ids: Tensor
    logits: Tensor  # (n, K) of the student at the listed tokens
    top: Tensor  # (n,) logit that is 0 among the student's outcomes
    kept: Tensor  # (n, MASSES)


def compared(problem: Problem, teacher: Logits, labels: Tensor | None, memory: Saved) -> Compared:
    """Both sides' outcomes, the student's from its logits at the listed tokens and from its masses."""
    outcomes, t = _outcomes(teacher), teacher.x[0]
    masses, k = columns_of(Masses, memory.masses, keepdim=True), outcomes.ids.shape[1]
    s = t.new_zeros((len(t), t.shape[1] + -t.shape[1] % _PADDED))[:, : t.shape[1]]
    top = torch.zeros_like(masses.centre)
    if outcomes.bucket:
        # Logits above the largest are small where q is large: there the difference costs no digit.
        of_bucket = torch.where(masses.log_bucket == -torch.inf, -torch.inf, masses.centre)
        top = torch.maximum(memory.logits.amax(-1, keepdim=True), of_bucket)
        top = torch.where(top == -torch.inf, 0.0, torch.where(top == torch.inf, torch.nan, top))
        s[:, k] = (masses.log_bucket + (masses.centre - top) / problem.temperature)[:, 0]
    s[:, :k] = (memory.logits - top) / problem.temperature
    if outcomes.bucket:
        # A bucket that both sides leave empty is no outcome.
        t = torch.cat((t[:, :k], _nonempty(t[:, k : k + 1], masses.log_bucket), t[:, k + 1 :]), 1)
    of_outcomes = problem._replace(vocab_size=t.shape[1], temperature=1.0, ce_weight=0.0, argmax=False)
    return Compared(
        of_outcomes,
        Logits(s[None]),
        Logits(t[None]),
        outcomes.targets,
        _counting(labels, outcomes),
        outcomes.ids,
        memory.logits,
        top[:, 0],
        memory.masses,
    )


def listed_gradient(both: Compared, of_outcomes: Tensor) -> ListedGradient:
    """The gradient by the logits of outcomes (N, W), as the vocabulary's takes it."""
    k = both.ids.shape[1]
    bucket = of_outcomes[:, k] if of_outcomes.shape[1] > k + 1 else torch.zeros_like(of_outcomes[:, 0])
    return ListedGradient(of_outcomes[:, :k].contiguous(), bucket.contiguous())


class TopKRows:
    """Row work (backends.protocol.RowBackend) beside a top-k teacher, by `rows`, that of the outcomes."""

    def __init__(self, backend: Backend, rows: Sweeps) -> None:
        self.backend, self.rows = backend.topk, rows

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
        """As RowBackend.value, with `saved` (N, saved_width)."""
        memory = saved_of(saved, loss, _outcomes(teacher).ids.shape[1])
        both = self._swept(problem, student, teacher, labels, memory)
        self.outcomes_value(both, memory, loss, stats)
        self._finish(problem, student, both, loss, stats)

    def outcomes_value(self, both: Compared, memory: Saved, loss: Tensor, stats: Tensor | None) -> None:
        """The divergence of the outcomes."""
        self.rows.value(both.problem, both.student, both.teacher, both.targets, loss, memory.scalars, stats)

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        out: Tensor,
    ) -> None:
        """As RowBackend.gradient."""
        memory = saved_of(saved, saved, _outcomes(teacher).ids.shape[1])
        both = compared(problem, teacher, labels, memory)
        self._spread(problem, student, both, self.outcomes_gradient(both, memory, upstream), upstream, out)

    def outcomes_gradient(self, both: Compared, memory: Saved, upstream: Tensor) -> Tensor:
        """The gradient by the student's logits of outcomes, (N, W)."""
        out = torch.empty_like(both.student.x[0])
        assert memory.scalars is not None
        self.rows.gradient(both.problem, both.student, both.teacher, both.targets, memory.scalars, upstream, out)
        return out

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
        both = self._swept(problem, student, teacher, labels, saved_of(None, loss, _outcomes(teacher).ids.shape[1]))
        of_outcomes = torch.empty_like(both.student.x[0])
        self.rows.value_and_gradient(
            both.problem, both.student, both.teacher, both.targets, upstream, of_outcomes, loss, stats
        )
        self._finish(problem, student, both, loss, stats)
        self._spread(problem, student, both, of_outcomes, upstream, out)

    def floor_rows(self, problem: Problem, teacher: Logits, labels: Tensor | None, out: Tensor, depth: float) -> None:
        """Refused where calls are checked: nobody comes here."""
        raise NotImplementedError('support="floor" beside a top-k teacher')

    def _swept(
        self, problem: Problem, student: Logits, teacher: Logits, labels: Tensor | None, memory: Saved
    ) -> Compared:
        """`compared`, with logits and masses filled in: from a sweep over the student's rows where one is needed."""
        outcomes = _outcomes(teacher)
        counting = _counting(labels, outcomes)
        self.backend.gather(student, outcomes.ids, counting, memory.logits)
        if outcomes.bucket or problem.ce_weight:
            self.backend.masses(problem, student, outcomes.ids, counting, memory.masses)
        else:
            memory.masses.zero_()
        return compared(problem, teacher, labels, memory)

    def _finish(self, problem: Problem, student: Logits, both: Compared, loss: Tensor, stats: Tensor | None) -> None:
        of_label = None
        if problem.ce_weight:
            of_label = loss.new_empty((len(loss), 1))
            self.backend.gather(student, both.labels.unsqueeze(-1), both.labels, of_label)
        finish(problem, both, None if of_label is None else of_label[:, 0], loss, stats)

    def _spread(
        self,
        problem: Problem,
        student: Logits,
        both: Compared,
        of_outcomes: Tensor,
        upstream: Tensor | None,
        out: Tensor,
    ) -> None:
        """From the gradient by the logits of outcomes (n, W) to that by the student's stored logits, in `out`."""
        found = listed_gradient(both, of_outcomes)
        self.backend.gradient(problem, student, both.ids, both.labels, both.logits, both.kept, found, upstream, out)


def finish(problem: Problem, both: Compared, of_label: Tensor | None, loss: Tensor, stats: Tensor | None) -> None:
    """Add the cross-entropy to the loss, and the top to the student's log-sum-exp in the statistics.

    of_label: (n,) the student's logits at the labels, where there is a cross-entropy.
    """
    counted = both.targets >= 0
    if of_label is not None:
        ce_lse = columns_of(Masses, both.kept).ce_lse
        loss += torch.where(counted, problem.ce_weight * (ce_lse - of_label), 0.0)
    if stats is not None:
        at = TokenStats._fields.index("student_lse")
        stats[:, at] += torch.where(counted, both.top / problem.temperature, 0.0)


def _outcomes(teacher: Logits) -> Outcomes:
    assert teacher.outcomes is not None  # TopKOutcomes.logits
    return teacher.outcomes


def _counting(labels: Tensor | None, outcomes: Outcomes) -> Tensor:
    """Labels, or what else says which rows count."""
    return outcomes.targets if labels is None else labels


def _nonempty(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where((log_q == -torch.inf) & (log_p <= EMPTY), -torch.inf, log_p)


class TopKParts:
    """A top-k teacher's part of rows that are never whole: some of the vocabulary's columns at a time."""

    def __init__(
        self,
        problem: Problem,
        backend: Backend,
        kind: str,
        teacher: Logits,
        labels: Tensor | None,
        ranks: Ranks | None,
    ) -> None:
        self.problem, self.backend, self.rows = problem, backend.topk, _topk_rows(kind, backend)
        self.teacher, self.labels, self.outcomes, self.ranks = teacher, labels, _outcomes(teacher), ranks
        self.counting = _counting(labels, self.outcomes)

    def value(self, parts: Iterable[Part], saved: Tensor, loss: Tensor, stats: Tensor | None) -> None:
        """Fills `saved` (N, saved_width), `loss` (N,) and `stats` (N, STATS) from all parts of the student."""
        memory = saved_of(saved, saved, self.outcomes.ids.shape[1])
        memory.logits.fill_(-torch.inf)
        masses = columns_of(Masses, memory.masses)
        masses.centre.zero_()
        masses.log_bucket.fill_(-torch.inf if self.outcomes.bucket else 0.0)
        masses.ce_lse.fill_(-torch.inf if self.problem.ce_weight else 0.0)
        of_label = loss.new_full((len(loss), 1), -torch.inf) if self.problem.ce_weight else None
        for part in parts:
            self._gather(part, self.outcomes.ids, memory.logits)
            if of_label is not None:
                self._gather(part, self.counting.unsqueeze(-1), of_label)
            if self.outcomes.bucket or self.problem.ce_weight:
                found = torch.empty_like(memory.masses)
                ids = local(self.outcomes.ids, _columns(part))
                self.backend.masses(part.problem, part.student, ids, self.counting, found)
                _merge(masses, columns_of(Masses, found), self.problem.temperature, self.outcomes.bucket)
        if self.ranks is not None:
            self._merge_ranks(self.ranks, memory, of_label)
        both = compared(self.problem, self.teacher, self.labels, memory)
        self.rows.outcomes_value(both, memory, loss, stats)
        finish(self.problem, both, None if of_label is None else of_label[:, 0], loss, stats)

    def _gather(self, part: Part, ids: Tensor, out: Tensor) -> None:
        inside, here = local(ids, _columns(part)), torch.empty_like(out)
        self.backend.gather(part.student, inside, self.counting, here)
        out.copy_(torch.where(inside >= 0, here, out))

    def _merge_ranks(self, ranks: Ranks, memory: Saved, of_label: Tensor | None) -> None:
        """What all ranks have found. A listed logit is its owner's, and −inf elsewhere: the largest of them, or NaN."""
        k, masses = memory.logits.shape[1], columns_of(Masses, memory.masses)
        found = torch.cat((memory.masses, memory.logits, *(() if of_label is None else (of_label,))), -1)
        for start in range(0, len(found), GATHERED):
            rows = slice(start, start + GATHERED)
            every = ranks.gathered(found[rows])
            memory.logits[rows] = every[..., MASSES : MASSES + k].amax(0)
            if of_label is not None:
                of_label[rows] = every[..., MASSES + k :].amax(0)
            memory.masses[rows] = every[0, :, :MASSES]
            merged = Masses(*(x[rows] for x in masses))
            for other in every[1:]:
                _merge(merged, columns_of(Masses, other), self.problem.temperature, self.outcomes.bucket)

    def prepare(self, saved: Tensor, upstream: Tensor) -> None:
        """Before the gradient of any part."""
        memory = saved_of(saved, saved, self.outcomes.ids.shape[1])
        self.both, self.upstream = compared(self.problem, self.teacher, self.labels, memory), upstream
        self.listed = listed_gradient(self.both, self.rows.outcomes_gradient(self.both, memory, upstream))

    def gradient(self, part: Part, out: Tensor) -> None:
        """Writes a part's dZ into `out` (N, its columns)."""
        both, columns = self.both, _columns(part)
        labels = both.labels
        if self.problem.ce_weight:  # a label of another part is no column here, and its row counts
            inside = local(labels, columns)
            labels = torch.where((labels >= 0) & (inside < 0), columns.stop - columns.start, inside)
        ids = local(both.ids, columns)
        self.backend.gradient(
            part.problem, part.student, ids, labels, both.logits, both.kept, self.listed, self.upstream, out
        )


def _columns(part: Part) -> slice:
    """The vocabulary's columns of a part."""
    return slice(part.first, part.first + part.student.x.shape[2])


class ShardedTopKRows:
    """Row work (backends.protocol.RowBackend) beside a top-k teacher where the ranks share the vocabulary."""

    def __init__(self, kind: str, backend: Backend, ranks: Ranks) -> None:
        self.kind, self.backend, self.ranks = kind, backend, ranks

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
        """As RowBackend.value, with `saved` (N, saved_width)."""
        saved = self._room(teacher, loss) if saved is None else saved
        self._parts(problem, teacher, labels).value(self._here(problem, student, teacher), saved, loss, stats)

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        out: Tensor,
    ) -> None:
        """As RowBackend.gradient."""
        parts = self._parts(problem, teacher, labels)
        parts.prepare(saved, upstream)
        self._write(parts, self._here(problem, student, teacher), out)

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
        parts, here = self._parts(problem, teacher, labels), self._here(problem, student, teacher)
        saved = self._room(teacher, loss)
        parts.value(here, saved, loss, stats)
        parts.prepare(saved, torch.ones_like(loss) if upstream is None else upstream)
        self._write(parts, here, out)

    def floor_rows(self, problem: Problem, teacher: Logits, labels: Tensor | None, out: Tensor, depth: float) -> None:
        """As TopKRows.floor_rows."""
        raise NotImplementedError('support="floor" beside a top-k teacher')

    def _parts(self, problem: Problem, teacher: Logits, labels: Tensor | None) -> TopKParts:
        return TopKParts(problem, self.backend, self.kind, teacher, labels, self.ranks)

    def _here(self, problem: Problem, student: Logits, teacher: Logits) -> list[Part]:
        """The one part of this rank; none of no columns."""
        return [Part(self.ranks.first, problem, student, teacher)] if student.x.shape[2] else []

    def _room(self, teacher: Logits, loss: Tensor) -> Tensor:
        """For what the value of rows leaves to their gradient."""
        return loss.new_empty((len(loss), _saved_width(_outcomes(teacher).ids)))

    def _write(self, parts: TopKParts, here: list[Part], out: Tensor) -> None:
        for part in here:
            parts.gradient(part, out)


def _merge(masses: Masses, more: Masses, temperature: float, bucket: bool) -> None:
    """Add a chunk's Masses (N,) to those so far; without a bucket only the log-sum-exp of all columns."""
    masses.ce_lse.copy_(torch.logaddexp(masses.ce_lse, more.ce_lse))
    if not bucket:
        return
    has, adds = masses.log_bucket > -torch.inf, more.log_bucket > -torch.inf
    larger = torch.where(has, torch.maximum(masses.centre, more.centre), more.centre)
    centre = torch.where(adds, larger, masses.centre)
    ours, theirs = (x.log_bucket + (x.centre - centre) / temperature for x in (masses, more))
    known = torch.logaddexp(ours, theirs)
    unknown = masses.log_bucket.isnan() | more.log_bucket.isnan()
    masses.log_bucket.copy_(torch.where(unknown, torch.nan, torch.where(has | adds, known, -torch.inf)))
    masses.centre.copy_(centre)


class _Truncated:
    """Row work of the published, signed integrands on raw probabilities: K + 1 outcomes in, the listed ones summed.

    With f and h = q·∂f/∂q of each listed token and H = Σ h, dL/dz_k = h_k − q_k H there, −Q_r H in the bucket.
    """

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
        """As Sweeps.value; statistics are refused where calls are checked, and the gradient needs no scalars."""
        if saved is not None:
            saved.zero_()
        f, _ = _integrand(problem, student, teacher)
        loss.copy_(_where_counted(labels, problem.factor * f.sum(-1)))

    def gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        out: Tensor,
    ) -> None:
        """As Sweeps.gradient."""
        self._gradient(problem, student, teacher, labels, upstream, out)

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
        """As Sweeps.value_and_gradient."""
        self.value(problem, student, teacher, labels, loss, None, stats)
        self._gradient(problem, student, teacher, labels, upstream, out)

    def _gradient(
        self,
        problem: Problem,
        student: Logits,
        teacher: Logits,
        labels: Tensor | None,
        upstream: Tensor | None,
        out: Tensor,
    ) -> None:
        _, h = _integrand(problem, student, teacher)
        q = _log_softmax(student.x[0]).exp()
        g = problem.factor * (h - q * h.sum(-1, keepdim=True))
        if upstream is not None:
            g = torch.where(upstream.unsqueeze(-1) == 0, 0.0, g * upstream.unsqueeze(-1))
        g[:, -1] = 0  # the column of no probability
        out.copy_(_where_counted(labels, g))


def _log_softmax(x: Tensor) -> Tensor:
    """log q of all outcomes (n, W); the last column is of no probability."""
    return x - torch.logsumexp(x[:, :-1], -1, keepdim=True)


def _where_counted(labels: Tensor | None, values: Tensor) -> Tensor:
    assert labels is not None  # targets
    return torch.where((labels >= 0).view(-1, *(1,) * (values.dim() - 1)), values, 0.0)


def _integrand(problem: Problem, student: Logits, teacher: Logits) -> tuple[Tensor, Tensor]:
    """f and h of each outcome (n, W), 0 at the bucket, at absent tokens and at the column of no probability.

    fkl: p log(p/q); rkl: q log(q/p); frkl: their mixture; jsd: β p log(p/m) + (1−β) q log(q/m), m = βp + (1−β)q.
    """
    logq, logp = _log_softmax(student.x[0]), teacher.x[0]
    q, p = logq.exp(), logp.exp()
    listed = (logp > -torch.inf) & (torch.arange(logp.shape[1], device=logp.device) < logp.shape[1] - 2)
    d = torch.where(listed, logp - logq, 0.0)
    some = q > 0  # 0·log 0 is 0
    forward = p * d, -p
    reverse = torch.where(some, -q * d, 0.0), torch.where(some, q * (1.0 - d), 0.0)
    name, parameter = problem.definition.name, _column(problem.parameters, p)
    if name == "fkl":
        found = forward
    elif name == "rkl":
        found = reverse
    elif name == "frkl":
        between = tuple((1.0 - parameter) * x + parameter * y for x, y in zip(forward, reverse, strict=True))
        found = _with_ends(between, forward, reverse, parameter)
    else:
        m = parameter * p + (1.0 - parameter) * q
        log_m, close = torch.where(listed, m.log(), 0.0), d.abs() < 1.0
        near = torch.where(close, d, 0.0)  # where m/p and m/q are near 1, and so is what their logarithms would lose
        of_p = torch.where(close, -torch.log1p((1.0 - parameter) * torch.expm1(-near)), logp - log_m)
        of_q = torch.where(close, -torch.log1p(parameter * torch.expm1(near)), logq - log_m)
        of_p, of_q = (torch.where(listed & (x > 0), x * of_x, 0.0) for x, of_x in ((p, of_p), (q, of_q)))
        between = (parameter * of_p + (1.0 - parameter) * of_q, (1.0 - parameter) * of_q)
        found = _with_ends(between, forward, reverse, parameter)
    f, h = (torch.where(listed, x, 0.0) for x in found)
    return f, h


def _with_ends(between: Sequence[Tensor], zero: Sequence[Tensor], one: Sequence[Tensor], parameter: Tensor) -> Any:
    """`between`, but `zero` and `one` where the parameter is 0 and 1: there the other's infinity would not drop out."""
    members = zip(between, zero, one, strict=True)
    return tuple(torch.where(parameter == 0, x, torch.where(parameter == 1, y, mid)) for mid, x, y in members)


def _column(parameters: tuple[Any, ...], like: Tensor) -> Tensor:
    """The first parameter beside outcomes: (n, 1) where it is per token, else a 0-d tensor; 0 without parameters."""
    value = parameters[0] if parameters else 0.0
    return value.unsqueeze(-1) if isinstance(value, Tensor) else like.new_full((), float(value))
