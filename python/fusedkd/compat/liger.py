"""Liger-Kernel 0.8.5: its distillation losses under their own names.

    from fusedkd.compat.liger import LigerFusedLinearJSD  # was: from liger_kernel.transformers import ...

Values and gradients are Liger's. What differs: any leading shape, (B, T, ...) as well as (B·T, ...), and hidden states
of every shape are taken in chunks (Liger's chunked loss cuts the first axis only); results are float32 and so is the
accumulator of the weight's gradient; a batch without a counted row is 0 with a zero gradient; two vocabularies of
different sizes are compared on the columns they share (Liger's chunked loss pads the student with zeros, which are
probable tokens). No T² anywhere, as in Liger. Nothing needs a GPU, Triton or Liger.

Log-probabilities and probabilities are taken as they are: rows that do not sum to 1 (some columns gathered from a
log_softmax, rounded bfloat16) have Liger's value and gradient, summand by summand, and a Kullback-Leibler divergence of
such rows can be negative, as there.

Arguments that mean the same in all of them:

- shift_labels: (...) or None; rows whose label is `ignore_index` do not count. Other values are not looked at.
- beta, jsd_beta: β; 0 is KL(teacher‖student), 1 is KL(student‖teacher).
- reduction: "batchmean": Σ / counted rows; "mean": Σ / (counted rows · V); "sum"; where it is allowed "none": every
  summand, (..., V), 0 in rows that do not count. ValueError for another.
- accum_dtype: None or torch.float32, NotImplementedError for another: the weight's gradient is summed in float32.
"""

from typing import Any

import torch

from .. import checks
from ..head import Head
from ..loss import KDStats, kd_loss
from ..token_logprobs import token_logprobs
from . import _pointwise
from ._shared import IGNORED, as_labels, bias_of, generalized_jsd, over, refuse

REDUCTIONS = ("batchmean", "sum", "mean", "none")
SUMMED = ("batchmean", "mean", "sum")
TINY = torch.finfo(torch.float32).tiny  # stands for a probability of 0: its logarithm is finite, its share is not seen


class LigerFusedLinearJSD(torch.nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: `liger_fused_linear_jsd` with its options held."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_accumulator(accum_dtype)
        self.jsd_beta, self.temperature = jsd_beta, temperature
        self.ignore_index, self.accum_dtype = ignore_index, accum_dtype

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss, a scalar."""
        return liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels,
            self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype,
        )  # fmt: skip


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: hard·CE + soft·JSD_β, each over the counted rows.

    The cross-entropy is at temperature 1, over the student's whole vocabulary. `compiled` and `chunk_size` change no
    value and are held only: the chunks are those of `kd_loss`. With return_soft_hard_loss the unweighted soft and hard
    losses follow the loss, without gradient as in Liger; they cost one more projection of the student.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        true_labels: torch.Tensor,
        student_bias: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, or (loss, soft, hard).

        Inputs (..., D), weights (V, D), labels (...), biases (V,). Labels that count must lie in the shared vocabulary
        if the hard loss is used; otherwise only `ignore_index` is looked for.
        """
        student = Head(student_input, student_weight, bias_of(student_input, student_bias))
        teacher = Head(teacher_input, teacher_weight, bias_of(teacher_input, teacher_bias))
        labels = _leading(true_labels, student_input)
        counted = labels != self.ignore_index
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            labels = as_labels(counted)
        else:
            labels = torch.where(counted, labels, -100)
        items = counted.sum().clamp(min=1)
        hard, soft = self.weight_hard_loss, self.weight_soft_loss

        def divergence(ce_weight: float) -> tuple[torch.Tensor, KDStats]:
            return kd_loss(
                student, teacher, labels, divergence=generalized_jsd(self.beta), temperature=self.temperature,
                reduction="sum", ce_weight=ce_weight, return_stats=True,
            )  # fmt: skip

        if soft:
            total, stats = divergence(hard / soft)
            loss = soft * total / items
        else:
            loss, stats = -hard * token_logprobs(student, labels).sum() / items, None
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            stats = divergence(0.0)[1] if stats is None else stats
            return loss, stats.loss.sum() / items, -token_logprobs(student, labels).sum() / items


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearKLDivLoss`: `liger_fused_linear_kl_div` with its options held."""

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("reduction", reduction, SUMMED)
        _check_accumulator(accum_dtype)
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature
        self.eps, self.accum_dtype = eps, accum_dtype

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        target: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, a scalar."""
        return liger_fused_linear_kl_div(
            student_input, student_weight, target, shift_labels,
            self.reduction, self.ignore_index, self.temperature, self.eps, self.accum_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, temperature={self.temperature}, "
            f"eps={self.eps}, accum_dtype={self.accum_dtype}"
        )


class LigerJSD(torch.nn.Module):
    """`liger_kernel.transformers.LigerJSD`: `liger_jsd` with its options held."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(
        self, log_q: torch.Tensor, log_p: torch.Tensor, shift_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of log-probabilities, student first, a scalar."""
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """`liger_kernel.transformers.LigerKLDIVLoss`: `liger_kl_div` with its options held, those of nn.KLDivLoss."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # Liger's own names
        self, y_pred: torch.Tensor, y_true: torch.Tensor
    ) -> torch.Tensor:
        """The loss of log-probabilities against a target; (..., V) for reduction="none"."""
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps)


class LigerTVDLoss(torch.nn.Module):
    """`liger_kernel.transformers.LigerTVDLoss`: `liger_tvd` with its options held, "batchmean" by default."""

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        checks.one_of("reduction", reduction, REDUCTIONS)
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: torch.Tensor, q: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of probabilities, student first; (..., V) for reduction="none"."""
        return liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)


def liger_fused_linear_jsd(
    student_input: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_input: torch.Tensor,
    teacher_weight: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`liger_kernel.transformers.functional.liger_fused_linear_jsd`: JSD_β from hidden states, mean over counted rows.

    Args:
        student_input: (..., D). The gradient flows here and to the weight.
        student_weight: (V, D).
        teacher_input: (..., its own D). teacher_weight: (its own V, its own D).
        temperature: divides both logits.

    Cost: that of `kd_loss` with two Heads.
    """
    _check_accumulator(accum_dtype)
    labels = _counted(shift_labels, student_input, ignore_index)
    student, teacher = Head(student_input, student_weight), Head(teacher_input, teacher_weight)
    return kd_loss(student, teacher, labels, divergence=generalized_jsd(jsd_beta), temperature=temperature)


def liger_fused_linear_kl_div(
    student_input: torch.Tensor,
    student_weight: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`liger_kernel.transformers.functional.liger_fused_linear_kl_div`: KL(target‖softmax(logits/τ)), target as given.

    Args:
        student_input: (..., D). The gradient flows here and to the weight.
        student_weight: (V, D).
        target: (..., V) probabilities; rows need not sum to 1 and 0·log 0 = 0. Not touched by the temperature.
        temperature: divides the student's logits.
        eps: log max(target, eps) stands for log target.

    Cost: that of `kd_loss` with a Head and logits, and a float32 (..., V).
    """
    checks.one_of("reduction", reduction, SUMMED)
    _check_accumulator(accum_dtype)
    _check_alike(target, (*student_input.shape[:-1], len(student_weight)))
    labels = _counted(shift_labels, student_input, ignore_index)
    total = _kl_to(Head(student_input, student_weight), target, eps, labels, temperature)
    return _divided(total, _rows(labels, student_input), target.shape[-1], reduction)


def liger_jsd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> torch.Tensor:
    """`liger_kernel.transformers.functional.liger_jsd`: JSD_β of log-probabilities, mean over counted rows.

    Args:
        input: (..., V) log-probabilities of the student. The gradient flows here.
        target: (..., V) log-probabilities of the teacher.

    Nothing is normalised: value and gradient are those of Σ β p log(p/m) + (1 − β) q log(q/m), m = βp + (1 − β)q, also
    for rows that do not sum to 1. A column where the teacher has −inf is left out (Liger gives NaN).
    Cost: in plain torch, some reads of float32 temporaries of bounded size.
    """
    columns = min(input.shape[-1], target.shape[-1])
    labels = _counted(shift_labels, input, ignore_index)
    rows = _pointwise.row_sums(_pointwise.generalized_jsd(beta), input[..., :columns], target[..., :columns])
    return _divided(_kept(rows, labels).sum(), _rows(labels, input), 1, "batchmean")


def liger_kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> torch.Tensor:
    """`liger_kernel.transformers.functional.liger_kl_div`: Σ target·(log max(target, eps) − input).

    Args:
        input: (..., V) log-probabilities of the student. The gradient flows here.
        target: (..., V) probabilities whose rows need not sum to 1, or log-probabilities with `log_target`.
        size_average: not supported, as in Liger. reduce: likewise.
        log_target: whether target is in logarithms, where eps is not used.
        eps: log max(target, eps) stands for log target.

    Nothing is normalised, whatever the reduction: input and target may be some columns of a distribution, such as the
    teacher's likeliest tokens. The gradient to input is −target. A summand is 0 where target is a probability of 0.

    Raises: NotImplementedError for size_average or reduce other than True.
    """
    legacy = {"size_average": size_average, "reduce": reduce}
    refuse("liger_kl_div", {name: value for name, value in legacy.items() if value is not True})
    checks.one_of("reduction", reduction, REDUCTIONS)
    _check_alike(target, input.shape)
    kind = _pointwise.generalized_jsd(0) if log_target else _pointwise.kl_to_probabilities(eps)
    return _reduced(kind, input, target, None, reduction)


def liger_tvd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """`liger_kernel.transformers.functional.liger_tvd`: ½ Σ |input − target| of probabilities.

    Args:
        input: (..., V) probabilities of the student. The gradient flows here.
        target: (..., V) probabilities of the teacher.

    Nothing is normalised and `kd_loss` has no part in it: rows need not sum to 1.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    _check_alike(target, input.shape)
    labels = _counted(shift_labels, input, ignore_index)
    if labels is not None:
        checks.labels(labels, input.shape[:-1], input.device, IGNORED, 1, name="shift_labels")
    return _reduced(_pointwise.TVD, input, target, labels, reduction)


def _reduced(
    kind: _pointwise.Pointwise,
    input: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    if reduction == "none":
        return _kept(_pointwise.summands(kind, input, target), labels)
    total = _kept(_pointwise.row_sums(kind, input, target), labels).sum()
    return _divided(total, _rows(labels, input), input.shape[-1], reduction)


def _kept(values: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Values (...) or (..., V), 0 in rows that do not count."""
    if labels is None:
        return values
    return values.masked_fill((labels < 0).view(*labels.shape, *(1,) * (values.dim() - labels.dim())), 0.0)


def _kl_to(
    student: Head, target: torch.Tensor, eps: float, labels: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Σ target·(log max(target, eps) − log q) over the counted rows.

    A row of mass c is c·KL(target/c‖q) + c log c; the floor eps adds to that what no gradient sees.
    """
    target = target.detach()
    mass, constant = _constants(target, eps)
    if labels is not None:
        mass, constant = (x.masked_fill(labels < 0, 0.0) for x in (mass, constant))
    logits = target.float().clamp_min(TINY).log() * temperature
    total = kd_loss(student, logits, labels, temperature=temperature, token_weights=mass, reduction="sum")
    return total + constant.sum()


def _constants(target: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass of every row, and what its loss has beyond mass·KL."""
    rows = target.reshape(target.shape[:-1].numel(), target.shape[-1])
    mass = target.new_zeros(len(rows), dtype=torch.float32)
    floor = torch.zeros_like(mass)
    for at in _pointwise.slices(rows):
        p = rows[at].float()
        mass[at] = p.sum(-1)
        floor[at] = (p * (p.clamp_min(max(eps, TINY)).log() - p.clamp_min(TINY).log())).sum(-1)
    constant = torch.xlogy(mass, mass) + floor
    return mass.view(target.shape[:-1]), constant.view(target.shape[:-1])


def _leading(labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Labels in the leading shape; flat ones of as many rows will do."""
    if labels.shape != rows.shape[:-1] and labels.shape == (rows.shape[:-1].numel(),):
        return labels.view(rows.shape[:-1])
    return labels


def _counted(labels: torch.Tensor | None, rows: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    return None if labels is None else as_labels(_leading(labels, rows) != ignore_index)


def _rows(labels: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | int:
    """How many count."""
    return rows.shape[:-1].numel() if labels is None else (labels >= 0).sum()


def _divided(total: torch.Tensor, rows: torch.Tensor | int, columns: int, reduction: str) -> torch.Tensor:
    if reduction == "sum":
        return total
    return over(total, rows * (columns if reduction == "mean" else 1))


def _check_alike(target: torch.Tensor, shape: tuple[int, ...]) -> None:
    if target.shape != shape:
        raise ValueError(f"target must have the shape {tuple(shape)}, got {tuple(target.shape)}")


def _check_accumulator(accum_dtype: torch.dtype | None) -> None:
    if accum_dtype not in (None, torch.float32):
        refuse("fusedkd.compat.liger", {"accum_dtype": accum_dtype})
