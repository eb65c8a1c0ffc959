"""The losses of KDFlow (songmzhang/KDFlow): seven of `kdflow/loss`, and `chunked_loss` on hidden states.

    from fusedkd.compat.kdflow import LOSS_DICT, chunked_loss
    kdflow.loss.LOSS_DICT.update(LOSS_DICT)                     # kl, rkl, jsd, skl, srkl, akl, tvd
    kdflow.algorithms.vanilla_kd.chunked_loss = chunked_loss    # likewise in sft and simple_ctkd

Each loss takes (student_logits, teacher_logits, temperature, its parameter, reduction) as there: (..., V) logits, or a
`fusedkd.Head` on either side. p is the teacher and q the student at the temperature T, without a factor T². The result
is (...) for "none", else a scalar, float32, in nats. "mean" is over the tokens, but over tokens · V for `kl`, as there.

Further keyword arguments: `labels` (...) int64, of which only −100 is read: such a token is 0 and not counted in the
mean; the options of `fusedkd.kd_loss` such as backend, memory_budget or vocab_size. The hyper-parameters of the other
losses change nothing, as there; NotImplementedError names any other argument.

Differences:
- float32 inside for bfloat16 logits, where KDFlow divides by the temperature and rounds first;
- vocabularies of different size are compared on the common columns; there a shape error outside `chunked_loss`;
- a teacher logit of −inf: jsd and skl have the limit, there NaN; rkl and akl leave the column out on both sides, there
  +inf and NaN. The other losses agree. For that kl, jsd, skl, srkl and tvd raise teacher log-probabilities below −50 to
  −50 (support="floor"), of which no digit of theirs shows anything;
- `chunked_loss` reads where its label is −100 beside a teacher, and takes it as ignored beside none;
- akl of a token with p = q is 0, there 0/0; an empty batch is 0 with a graph, there NaN or an error;
- akl has tokens of equal probability in the head together or not at all; there a sort, which need not be stable, may
  part them. It needs whole rows: no schedule="streaming", no backend="compiled";
- a parameter outside its domain raises ValueError, there an AssertionError or, in akl, nothing.

`akl` is `fusedkd.divergence("akl", mu=1 - alpha, head="inclusive")`: KDFlow adds the teacher's probabilities up from
the least and takes as tail what stays within alpha, so that the token which crosses it belongs to the head
(docs/mathematics.md#akl).

Source: the losses of commit 3a7a21a, `chunked_loss` and the metrics' interface of 7f82825. Of KDFlow's other losses,
top1_ce, hrl and masked_rkl are not here: hrl ranks tokens, and is no sum over columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..divergence import Divergence, divergence
from ..head import Head, Side
from ..loss import kd_loss
from ..token_logprobs import token_logprobs
from . import _shared

__all__ = [
    "LOSS_DICT",
    "chunked_loss",
    "compute_adaptive_kl_div",
    "compute_cross_entropy",
    "compute_js_div",
    "compute_kl_div",
    "compute_reverse_kl_div",
    "compute_skewed_kl_div",
    "compute_skewed_rkl_div",
    "compute_tvd",
]

Metric = Callable[..., dict[str, Any]]

_PARAMETERS = ("adaptive_kl_alpha", "jsd_beta", "skew_lambda")  # each loss is given its own, and may be given all
_REDUCTIONS = ("none", "mean", "sum")


def compute_kl_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """KL(p‖q), `kl`. "mean" divides by the number of tokens and by V, that of the compared columns."""
    options = _options("kl", kwargs, "floor")
    loss = _loss(student_logits, teacher_logits, divergence("fkl"), temperature, reduction, labels, options)
    if reduction != "mean":
        return loss
    return loss / checks.vocab_size(options.get("vocab_size"), student_logits, teacher_logits)


def compute_reverse_kl_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """KL(q‖p), `rkl`."""
    options = _options("rkl", kwargs)
    return _loss(student_logits, teacher_logits, divergence("rkl"), temperature, reduction, labels, options)


def compute_js_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """β KL(q‖M) + (1 − β) KL(p‖M), M = βq + (1 − β)p, `jsd`; 0 < β < 1 is the student's weight: GKD's β is 1 − it."""
    _inside("jsd_beta", jsd_beta)
    chosen = divergence("jsd", beta=1 - jsd_beta)
    options = _options("jsd", kwargs, "floor")
    return _loss(student_logits, teacher_logits, chosen, temperature, reduction, labels, options)


def compute_skewed_kl_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    skew_lambda: float = 0.1,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """KL(p‖λp + (1 − λ)q), 0 < λ < 1, `skl`."""
    _inside("skew_lambda", skew_lambda)
    chosen = divergence("skl", lam=skew_lambda)
    options = _options("skl", kwargs, "floor")
    return _loss(student_logits, teacher_logits, chosen, temperature, reduction, labels, options)


def compute_skewed_rkl_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    skew_lambda: float = 0.1,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """KL(q‖λq + (1 − λ)p), 0 < λ < 1, `srkl`, with the gradient of the student inside the mixture."""
    _inside("skew_lambda", skew_lambda)
    chosen = divergence("srkl", lam=skew_lambda)
    options = _options("srkl", kwargs, "floor")
    return _loss(student_logits, teacher_logits, chosen, temperature, reduction, labels, options)


def compute_adaptive_kl_div(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    adaptive_kl_alpha: float = 0.5,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """a·KL(p‖q) + (1 − a)·KL(q‖p), `akl`; a is the head's share of Σ|p − q|, a constant for the gradient.

    The tail are the tokens whose probability, summed from the teacher's least likely up to and including them, is at
    most `adaptive_kl_alpha`, in [0, 1]; the head are the others. At 1 everything is tail.
    """
    checks.within("adaptive_kl_alpha", adaptive_kl_alpha, 0, 1)
    options = _options("akl", kwargs)
    chosen = divergence("akl", mu=1 - adaptive_kl_alpha, head="inclusive")
    chosen = chosen if adaptive_kl_alpha < 1 else divergence("rkl")
    return _loss(student_logits, teacher_logits, chosen, temperature, reduction, labels, options)


def compute_tvd(
    student_logits: Side,
    teacher_logits: Side,
    temperature: float = 1.0,
    reduction: str = "none",
    *,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """½ Σ |p − q|, `tvd`."""
    options = _options("tvd", kwargs, "floor")
    return _loss(student_logits, teacher_logits, divergence("tvd"), temperature, reduction, labels, options)


def compute_cross_entropy(logits: Side, labels: Tensor, reduction: str = "none", **kwargs: Any) -> Tensor:
    """−log q of the labels (...) at temperature 1, over all of the student's columns, for `chunked_loss` with a label.

    A label of −100 has no loss and is not counted in the mean; there it is an error. kwargs: backend, memory_budget.
    """
    checks.one_of("reduction", reduction, _REDUCTIONS)
    taken = ("backend", "memory_budget")
    _shared.refuse("compute_cross_entropy", {key: value for key, value in kwargs.items() if key not in taken})
    checks.side("logits", logits)
    checks.labels(labels, checks.leading(logits), checks.device(logits), _shared.IGNORED, checks.width(logits))
    loss = -token_logprobs(logits, labels, ignore_index=_shared.IGNORED, **kwargs)
    return _reduced(loss, reduction, labels)


LOSS_DICT: dict[str, Callable[..., Tensor]] = {
    "kl": compute_kl_div,
    "rkl": compute_reverse_kl_div,
    "jsd": compute_js_div,
    "skl": compute_skewed_kl_div,
    "srkl": compute_skewed_rkl_div,
    "akl": compute_adaptive_kl_div,
    "tvd": compute_tvd,
}
_KNOWN = {loss.__name__: loss for loss in (*LOSS_DICT.values(), compute_cross_entropy)}


def chunked_loss(
    student_hidden: Tensor,
    student_head: Any,
    loss_fn: Callable[..., Tensor],
    student_logits_fn: Callable[..., Tensor] | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Any = None,
    teacher_logits_fn: Callable[[int, int], Tensor] | None = None,
    label: Tensor | None = None,
    chunk_size: int = 2048,
    reduction: str = "none",
    metric_fns: Metric | list[Metric] | None = None,
    return_metrics: bool = False,
    **kwargs: Any,
) -> Any:
    """A loss of hidden states and output layers, in one call and without the logits that KDFlow keeps for backward.

    Args:
        student_hidden: (n, H). Gradients flow here and to the weight and the bias of student_head.
        student_head: a Linear, of which weight (V, H) and bias are read: its forward, KDFlow's `skip` and hooks play no
            part. Weights that FSDP2 has sharded must be gathered, as those of the root unit are after its forward.
        loss_fn: a loss of this module or of `kdflow.loss` under the same name, or a functools.partial of one, as
            KDFlow's build_loss_fn makes it: one of the seven beside a teacher, compute_cross_entropy beside a label.
        student_logits_fn: called as student_logits_fn(student_hidden, skip=False) in place of student_head: all logits
            (n, V) are made at once then.
        teacher_hidden, teacher_head: (n, K) and its Linear. Both vocabularies are cut to the smaller one.
        teacher_logits_fn: called as teacher_logits_fn(0, n) in their place, without a gradient; likewise.
        label: (n,) int64, what cross-entropy compares with. Beside a teacher only −100 is read: such a token is 0 and
            not counted (there it is not read).
        chunk_size: tokens that metric_fns see at a time. The chunks of the loss are `kd_loss`'s: see memory_budget.
        reduction: "none" (n,), "sum", or "mean" over the tokens, of `kl` too.
        metric_fns: called beside a teacher, chunk by chunk and without a gradient, as fn(student_logits=,
            teacher_logits=, chunk_loss=, start=, end=), with logits of the common columns as KDFlow's layers make them;
            each returns {name: (sum, count)}.
        return_metrics: also return {name: (sum, count)} over all chunks.
        kwargs: of loss_fn, and the options of `fusedkd.kd_loss`.

    Raises NotImplementedError for another loss_fn, and for a layer with an adapter, whose weight is not all of it.

    Cost: that of `kd_loss`: nothing of n·V elements, unless a logits_fn makes it. KDFlow's chunks stay in the graph
    until backward, so that its memory grows by n·V however small they are. metric_fns cost one product a side, and
    chunk_size logits of each at a time.
    """
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.flag("return_metrics", return_metrics)
    checks.integer("chunk_size", chunk_size)
    if teacher_logits_fn is None and teacher_hidden is None and label is None:
        raise ValueError("teacher_hidden, teacher_logits_fn and label are all None: pass what to compare with")
    loss_of, bound = _known(loss_fn)
    checks.tensor("student_hidden", student_hidden)
    tokens = student_hidden.shape[0] if student_hidden.dim() else 0
    if tokens:
        checks.positive("chunk_size", chunk_size)
    if student_logits_fn is None:
        student: Side = _head("student", student_hidden, student_head)
    else:
        student = student_logits_fn(student_hidden, skip=False)
        checks.side("the result of student_logits_fn", student)
    given = {**bound, **kwargs}
    if teacher_logits_fn is None and teacher_hidden is None:
        if loss_of is not compute_cross_entropy:
            raise ValueError(
                f"loss_fn {loss_of.__name__} compares with a teacher, got only label: pass teacher_hidden and "
                "teacher_head, or teacher_logits_fn"
            )
        loss = loss_of(student, label, reduction=reduction, **given)
        return (loss, {}) if return_metrics else loss
    if loss_of is compute_cross_entropy:
        raise ValueError("loss_fn compute_cross_entropy compares with label, got a teacher too: leave the teacher out")
    if teacher_logits_fn is not None:
        with torch.no_grad():
            teacher: Side = teacher_logits_fn(0, tokens)
        checks.side("the result of teacher_logits_fn", teacher)
    else:
        teacher = _head("teacher", teacher_hidden, teacher_head)
    if label is not None:
        given["labels"] = label
    metrics = [] if metric_fns is None else metric_fns if isinstance(metric_fns, list) else [metric_fns]
    rows = loss_of(student, teacher, reduction="none" if metrics or reduction == "none" else "sum", **given)
    found = _metrics(metrics, student, teacher, rows.detach(), chunk_size, tokens) if metrics else {}
    loss = rows
    if reduction != "none":
        # kl's own mean has V in it, and this one has not.
        loss = _reduced(rows, reduction, label, checks.leading(student).numel())
    return (loss, found) if return_metrics else loss


def _options(name: str, kwargs: dict[str, Any], support: str = "teacher") -> dict[str, Any]:
    """The options of kd_loss; `support` is what a teacher logit of −inf means, unless they say."""
    options = {key: value for key, value in kwargs.items() if key not in _PARAMETERS}
    _shared.check_options(name, options)
    return {"support": support, **options}


def _inside(name: str, value: Any) -> None:
    checks.number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value}")


def _check_sides(student: Side, teacher: Side) -> None:
    """Refuse sides of different tokens."""
    checks.side("student_logits", student)
    checks.side("teacher_logits", teacher)
    if checks.leading(student) != checks.leading(teacher):
        ours, theirs = tuple(checks.leading(student)), tuple(checks.leading(teacher))
        raise ValueError(f"teacher_logits must have the leading shape of student_logits, {ours}, got {theirs}")


def _loss(
    student: Side,
    teacher: Side,
    chosen: Divergence,
    temperature: float,
    reduction: str,
    labels: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    checks.one_of("reduction", reduction, _REDUCTIONS)
    _check_sides(student, teacher)
    if labels is not None:
        # Which tokens they name plays no part: a label beyond a smaller teacher's vocabulary is none here.
        checks.labels(labels, checks.leading(student), checks.device(student), _shared.IGNORED, 2**62)
        labels = _shared.as_labels(labels != _shared.IGNORED)
    return kd_loss(student, teacher, labels, divergence=chosen, temperature=temperature, reduction=reduction, **options)


def _reduced(loss: Tensor, reduction: str, labels: Tensor | None, tokens: int = 0) -> Tensor:
    """Of one number per token, or of their sum; the mean is over the labels that count, or over `tokens` of them."""
    if reduction == "none":
        return loss
    count = tokens if labels is None else (labels != _shared.IGNORED).sum()
    return loss.sum() if reduction == "sum" else _shared.over(loss.sum(), count)


def _known(loss_fn: Any) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The function here that a loss_fn stands for, and the arguments bound to it."""
    bound: dict[str, Any] = {}
    while isinstance(loss_fn, functools.partial):
        if loss_fn.args:
            raise NotImplementedError("loss_fn is a functools.partial with positional arguments: bind them by name")
        bound = {**loss_fn.keywords, **bound}
        loss_fn = loss_fn.func
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    known = _KNOWN.get(name)
    if known is None or not (loss_fn is known or str(loss_fn.__module__).startswith("kdflow.loss")):
        raise NotImplementedError(
            f"loss_fn {name} is none of {', '.join(_KNOWN)}, of this module or of kdflow.loss, and no other is known "
            "without its logits: use KDFlow's chunked_loss for it"
        )
    return known, {key: value for key, value in bound.items() if key != "reduction"}


def _head(side: str, hidden: Any, layer: Any) -> Head:
    """A Head of hidden states and a Linear, refused by the names that a caller knows."""
    hidden_name, name = f"{side}_hidden", f"{side}_head"
    checks.tensor(hidden_name, hidden)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.nn.Linear, whose weight is read, got {type(layer).__name__}")
    if hasattr(layer, "base_layer"):
        raise NotImplementedError(
            f"{name} has an adapter, and its weight is the base matrix alone: merge it, or leave the layer out of what "
            "is adapted"
        )
    if checks.is_dtensor(weight):
        raise TypeError(
            f"{name}.weight is a DTensor, sharded by its unit of fully_shard: call while the unit is gathered, as "
            "fusedkd.DistillationHead does, or leave the layer to the root unit and call after its forward"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} must have shape (n, H) and {name}.weight (V, H), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    return Head(hidden, weight, bias)


@torch.no_grad()
def _metrics(
    fns: list[Metric], student: Side, teacher: Side, rows: Tensor, chunk_size: int, tokens: int
) -> dict[str, tuple[Any, Any]]:
    """Sums and counts of the metrics over all chunks."""
    columns = checks.vocab_size(None, student, teacher)
    found: dict[str, tuple[Any, Any]] = {}
    for start in range(0, tokens, chunk_size):
        end = min(start + chunk_size, tokens)
        ours, theirs = (_chunk(side, start, end)[..., :columns] for side in (student, teacher))
        for fn in fns:
            stats = fn(student_logits=ours, teacher_logits=theirs, chunk_loss=rows[start:end], start=start, end=end)
            for key, value in stats.items():
                if not isinstance(value, tuple) or len(value) != 2:
                    kind = type(value).__name__
                    raise TypeError(f"metric_fns must return {{name: (sum, count)}}, got {kind} for {key!r}")
                total, count = found.get(key, (0, 0))
                found[key] = total + value[0], count + value[1]
    return found


def _chunk(side: Side, start: int, end: int) -> Tensor:
    """Logits as a Linear makes them, in its dtype."""
    if isinstance(side, Head):
        return functional.linear(side.hidden[start:end], side.weight, side.bias)
    return side.detach()[start:end]
