"""What is measured: a case, its inputs, the plain loss on them, and what comes out of that in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Head, TopK
from ..cli.eager import EAGER
from ..topk import topk
from .shapes import Shape

STD = 5.0  # of logits, as a trained model's
STUDENT_PEAK, TEACHER_PEAK = 0.7, 0.9  # probability of the label in peaked rows
DISTRIBUTIONS = ("random", "peaked")
CHUNK = 1 << 24  # logits that are held in float64 at once


class HeadInputs(NamedTuple):
    """Hidden states and output layers of student and teacher, and labels; gradients go to the student's two."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, K)
    teacher_weight: Tensor  # (V, K)
    labels: Tensor  # (N,)
    softcap: float | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {"hidden": self.hidden, "weight": self.weight}

    def logits(self) -> tuple[Tensor, Tensor]:
        """All logits of student and teacher, at least float32."""
        with torch.no_grad():
            teacher = self._capped(self.teacher_hidden @ self.teacher_weight.t())
        return self.student_logits(), teacher

    def student_logits(self) -> Tensor:
        """The student's alone."""
        return self._capped(self.hidden @ self.weight.t())

    def likeliest(self, k: int) -> TopK:
        """The teacher's likeliest tokens."""
        return topk(Head(self.teacher_hidden, self.teacher_weight, softcap=self.softcap), k)

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    def _capped(self, product: Tensor) -> Tensor:
        logits = _wide(product)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def split(self, rows: int) -> Iterator[tuple[dict[str, Tensor], HeadInputs]]:
        """Parts of a few rows in float64, and the leaves of each; the weight is one leaf for all."""
        weight = _leaf(self.weight)
        teacher_weight = self.teacher_weight.double()
        parts = (x.split(rows) for x in (self.hidden, self.teacher_hidden, self.labels))
        for hidden, teacher_hidden, labels in zip(*parts, strict=True):
            part = HeadInputs(_leaf(hidden), weight, teacher_hidden.double(), teacher_weight, labels, self.softcap)
            yield part.leaves, part


class RowInputs(NamedTuple):
    """Logits of student and teacher, and labels; the gradient goes to the student's logits."""

    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    labels: Tensor  # (N,)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {"logits": self.student}

    def logits(self) -> tuple[Tensor, Tensor]:
        """The logits, at least float32."""
        return self.student_logits(), _wide(self.teacher)

    def student_logits(self) -> Tensor:
        """The student's alone."""
        return _wide(self.student)

    def likeliest(self, k: int) -> TopK:
        """The teacher's likeliest tokens."""
        return topk(self.teacher, k)

    @property
    def vocab(self) -> int:
        """V."""
        return self.student.shape[1]

    def split(self, rows: int) -> Iterator[tuple[dict[str, Tensor], RowInputs]]:
        """Parts of a few rows in float64, and the leaf of each."""
        for student, teacher, labels in zip(*(x.split(rows) for x in self), strict=True):
            part = RowInputs(_leaf(student), teacher.double(), labels)
            yield part.leaves, part


class ListedInputs(NamedTuple):
    """A student's side as in `sides`, beside the log-probabilities of a teacher's K likeliest tokens."""

    sides: HeadInputs | RowInputs
    ids: Tensor  # (N, K) int32
    logprobs: Tensor  # (N, K)
    tail: str  # "bucket" or "truncate"

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return self.sides.leaves

    @property
    def labels(self) -> Tensor:
        """(N,)."""
        return self.sides.labels

    @property
    def vocab(self) -> int:
        """V."""
        return self.sides.vocab

    def logits(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the listed tokens, and of all others together where that is a tail."""
        logq = self.sides.student_logits().log_softmax(-1).gather(-1, self.ids.long())
        logp = self.logprobs
        if self.tail == "truncate":
            return logq, logp
        s, t = (torch.cat([x, (-torch.expm1(x.logsumexp(-1, keepdim=True))).log()], -1) for x in (logq, logp))
        return s, t

    def split(self, rows: int) -> Iterator[tuple[dict[str, Tensor], ListedInputs]]:
        """Parts of a few rows in float64, and the leaves of each."""
        parts = zip(self.sides.split(rows), self.ids.split(rows), self.logprobs.split(rows), strict=True)
        for (leaves, sides), ids, logprobs in parts:
            yield leaves, ListedInputs(sides, ids, logprobs.double(), self.tail)


Inputs = HeadInputs | RowInputs | ListedInputs
Loss = Callable[[Any], Any]  # inputs -> the mean loss, or (loss, gradients) where the gradient comes with it


class Answer(NamedTuple):
    """A loss and its gradients, by the names of the inputs' leaves."""

    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to measure. `path` is "heads" (hidden states in) or "rows" (logits in).

    distance: how far the student's hidden states or logits are from the teacher's; None: they have nothing in common.
    distribution: "random" logits are normal and no token stands out; in "peaked" rows the label has most of the
        probability, 0.7 of the student's and 0.9 of the teacher's, as with trained models. A distance is noise on
        rows of either kind; a large one may bury the peak of the side that it is added to.
    families: the rivals to set beside it; None: all that were asked for.
    listed: how many of the teacher's likeliest tokens are known; None: all. tail: what becomes of the others, as in
        `TopK`.
    """

    path: str
    shape: Shape
    dtype: str
    divergence: str
    distance: float | None = None
    families: tuple[str, ...] | None = None
    distribution: str = "random"
    listed: int | None = None
    tail: str = "bucket"

    @property
    def kind(self) -> str:
        """What the implementations of a case are found by."""
        return self.path if self.listed is None else f"top-k {self.path}"

    def small(self) -> Case:
        """The same with so few tokens and words that it costs nothing."""
        return replace(self, shape=self.shape.resized(rows=8, vocab=min(1024, self.shape.vocab)))

    def facts(self) -> dict[str, Any]:
        """The case as a result file holds it."""
        return {key: value for key, value in asdict(self).items() if key != "families"}

    def __str__(self) -> str:
        s = self.shape
        path = self.kind if self.listed is None else f"top-{self.listed} {self.tail} {self.path}"
        return f"{self.distribution} {path} {self.divergence} {s.rows}x{s.vocab} {self.dtype}"


def make_inputs(case: Case, device: str) -> Inputs:
    """Return random inputs whose logits have a standard deviation of 5, but for the labels of peaked rows."""
    sides = _sides(case, device)
    if case.listed is None:
        return sides
    ids, logprobs, *_ = sides.likeliest(case.listed)
    return ListedInputs(sides, ids, logprobs, case.tail)


def _sides(case: Case, device: str) -> HeadInputs | RowInputs:
    torch.manual_seed(0)
    shape, dtype = case.shape, getattr(torch, case.dtype)
    peaked = case.distribution == "peaked"

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device).mul_(std)

    def random_labels() -> Tensor:  # (N,), each another token where every one gets an output vector of its own
        if peaked:
            return torch.randperm(shape.vocab, device=device)[: shape.rows]
        return torch.randint(shape.vocab, (shape.rows,), device=device)

    if case.path == "rows":
        teacher = normal(shape.rows, shape.vocab, std=STD)
        student = normal(shape.rows, shape.vocab, std=case.distance or STD)
        labels = random_labels()
        if peaked:
            _raise_label(teacher, labels, TEACHER_PEAK)
        if case.distance:
            student += teacher
        elif peaked:
            _raise_label(student, labels, STUDENT_PEAK)
        return RowInputs(student.to(dtype).requires_grad_(), teacher.to(dtype), labels)
    d, k = shape.dim, shape.teacher_dim
    hidden, teacher_hidden = normal(shape.rows, d), normal(shape.rows, k)
    weight, teacher_weight = (normal(shape.vocab, width, std=STD / math.sqrt(width)) for width in (d, k))
    distance = case.distance * normal(*hidden.shape) if case.distance else None
    labels = random_labels()
    if peaked:
        _turn_to_label(hidden, weight, labels, STUDENT_PEAK)
    if distance is not None:
        teacher_hidden, teacher_weight = hidden + distance, weight.clone()
    elif peaked:
        _turn_to_label(teacher_hidden, teacher_weight, labels, TEACHER_PEAK)
    h, w, teacher_h, teacher_w = (x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight))
    return HeadInputs(h.requires_grad_(), w.requires_grad_(), teacher_h, teacher_w, labels, shape.softcap)


def _raise_label(logits: Tensor, labels: Tensor, probability: float) -> None:
    """Set each row's logit at its label so that softmax gives the label this probability."""
    at = labels[:, None]
    others = logits.scatter_(1, at, -torch.inf).logsumexp(1, keepdim=True)
    logits.scatter_(1, at, others + math.log(probability / (1 - probability)))


def _turn_to_label(hidden: Tensor, weight: Tensor, labels: Tensor, probability: float) -> None:
    """Turn the labels' output vectors (V, D) to the hidden states (N, D) until each has about this probability."""
    rows = max(1, CHUNK // len(weight))
    missing = []  # of the label's logit
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = h @ weight.t()
        before = logits.gather(1, y[:, None])
        _raise_label(logits, y, probability)
        missing.append(logits.gather(1, y[:, None]) - before)
    weight[labels] += torch.cat(missing) * hidden / hidden.square().sum(1, keepdim=True)


def eager_loss(divergence: str) -> Loss:
    """Return the loss as one writes it in torch, with all logits in memory."""
    per_token = EAGER[divergence]

    def loss(inputs: Inputs) -> Tensor:
        student, teacher = inputs.logits()
        if isinstance(inputs, ListedInputs) and inputs.tail == "truncate":
            return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()  # of fkl
        return per_token(student, teacher, inputs.labels).mean()

    return loss


def answer(inputs: Inputs, loss: Loss) -> Answer:
    """Return the loss and its gradients."""
    found = loss(inputs)
    if isinstance(found, tuple):
        value, *gradients = found
    else:
        value, gradients = found, torch.autograd.grad(found, list(inputs.leaves.values()))
    return Answer(value.detach(), dict(zip(inputs.leaves, gradients, strict=True)))


def truth(inputs: Inputs, divergence: str) -> Answer:
    """Return the answer of the plain loss in float64, a few rows at a time."""
    loss = eager_loss(divergence)
    values: list[Tensor] = []
    pieces: dict[str, list[Tensor]] = {name: [] for name in inputs.leaves}
    rows = len(inputs.labels)
    for leaves, part in inputs.split(max(1, CHUNK // inputs.vocab)):
        value = loss(part) * (len(part.labels) / rows)
        value.backward()
        values.append(value.detach())
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            if name == "weight":
                pieces[name] = [leaf.grad]  # accumulated over the parts
            else:
                pieces[name].append(leaf.grad)
    return Answer(torch.stack(values).sum(), {name: torch.cat(parts) for name, parts in pieces.items()})


def errors(found: Answer, exact: Answer) -> dict[str, float]:
    """Return the relative L2 errors of the loss and of each gradient; infinite where something is not finite."""
    gradients = {name: relative(found.gradients[name], x) for name, x in exact.gradients.items()}
    return {"loss": relative(found.loss, exact.loss), **gradients}


def relative(ours: Tensor, exact: Tensor) -> float:
    """Return ‖ours − exact‖ / ‖exact‖, without a second copy of the whole."""
    gap = size = 0.0
    for a, b in zip(_slabs(ours.detach()), _slabs(exact), strict=True):
        gap += float((a.double() - b).square().sum())
        size += float(b.square().sum())
    error = math.sqrt(gap / size) if size else math.sqrt(gap)
    return error if math.isfinite(error) else math.inf


def mean_kl(inputs: Inputs) -> float:
    """Return KL(teacher || student) per token, in float64: how far apart the two sides are."""
    loss = eager_loss("fkl")
    rows = len(inputs.labels)
    with torch.no_grad():
        return float(sum(loss(part) * len(part.labels) for _, part in inputs.split(16)) / rows)


def _slabs(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1).split(CHUNK)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
