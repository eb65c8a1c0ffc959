"""`kd_loss` and `kd_value_and_grad`: checks, flattening, choice of path, reduction."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import checks
from .backends import choose_backend, torch_compiled
from .call import LossCall, Numbers, at_rows, packed
from .divergence import Divergence, as_divergence
from .dtypes import accumulation_dtype, gradient_dtype, logit_dtype
from .head import Head, Side
from .kernels.device.rows import STATS
from .kernels.maths.definition import Form
from .ops import heads, logits, streamed
from .schedules import partial_rows
from .schedules.operands import Operand, Operands, RoutedTeachers, is_operand, operands_of, part_of
from .schedules.planner import Shape, choose_schedule, sweeps_of, whole_rows
from .schedules.topk import TopKOutcomes, is_topk, outcomes_of
from .shard import VocabShard, agree, cut, local_sides
from .sparse import TopK


class KDStats(NamedTuple):
    """Detached per-token float32 numbers in the leading shape, nats, 0 on ignored rows.

    Taken before token weights, τ² and cross-entropy, of softmax(s/τ) and softmax(t/τ) on the compared columns. `loss` =
    target·target_loss + nontarget·nontarget_loss; `target_grad`, `nontarget_grad` are dL_T/dz_y and dL_N/dz_y of the
    raw terms (z = s/τ). These four and the two log-probabilities are about the target: the label, or the teacher's
    likeliest token with `target_token="teacher_argmax"`; NaN without either, the four also for `amid`, which has no
    such terms; for `jeffreys` and `tsallis` they are those of `frkl` and `alpha`, whose weights hold the 2 and the α.
    Log-probabilities are −inf for a label outside the teacher's support. `teacher_*` are of the teacher itself, also
    where `taid` mixes it.
    """

    loss: torch.Tensor
    target_loss: torch.Tensor
    nontarget_loss: torch.Tensor
    target_grad: torch.Tensor
    nontarget_grad: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_logprob: torch.Tensor
    teacher_logprob: torch.Tensor
    student_lse: torch.Tensor
    teacher_lse: torch.Tensor


class _Checked(NamedTuple):
    """A checked call with what its operators need not know."""

    call: LossCall
    operands: Operands
    numbers: Numbers
    form: Form
    shape: torch.Size  # the leading one
    counted: torch.Tensor | None  # (N,) bool
    targeted: bool  # whether there is a token that statistics can be about
    reduction: str
    num_items: float | torch.Tensor | None
    ranks: int = 1  # that share the vocabulary


def kd_loss(
    student: Side,
    teacher: Side | TopK | Sequence[Side | TopK],
    labels: torch.Tensor | None = None,
    *,
    divergence: str | Divergence = "fkl",
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    support: str = "teacher",
    schedule: str = "auto",
    memory_budget: int | None = None,
    drop_ignored: bool | str = "auto",
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_stats: bool = False,
    weight_grad: torch.Tensor | None = None,
    teacher_ids: torch.Tensor | None = None,
    shard: VocabShard | None = None,
    hidden_grad: str = "reduce",
) -> Any:
    """The divergence between a teacher's and a student's next-token distributions, in nats.

        loss = Σ_n w_n [c·D(softmax(t_n/τ), softmax(s_n/τ)) + ce_weight·CE_n] / (number of counted tokens)

    with c = τ² if `temperature_squared`, else 1. D is the true divergence: never negative, exactly 0 at p == q and
    accurate when tiny. Nothing of N·V elements is made for a side given as a `Head`.

    Args:
        student: (..., V) logits, float32, bfloat16, float16 (float64 with backend="torch"), any strides; or a `Head`.
            Gradients flow here, to the logits or to hidden, weight and bias. A row that counts and holds NaN has the
            loss NaN.
        teacher: likewise, with its own V and width, or a `TopK`: its likeliest tokens alone. No gradient ever flows
            into it; it may come from torch.inference_mode() (inside torch.compile, which keeps what backward needs
            itself and refuses such logits: pass a clone). A weight or hidden states that both Heads share
            (self-distillation) are held once, also as autocast's copy (but for a list of teachers); the four products
            remain, because sides that differ in either have different logits, and sides that differ in neither have the
            loss 0.
        labels: (...) int64, already shifted. Rows equal to `ignore_index` do not count: loss, statistics and gradient
            are 0 there, and nothing that they hold reaches another number, NaN and infinity in logits, hidden states,
            token weights, per-token parameters and upstream gradients included. Other labels must lie in
            [0, vocab_size): an error on the CPU; on a GPU (and inside torch.compile), where looking would synchronise,
            such a row is masked like an ignored one, unless FUSEDKD_CHECK=1 asks for the error.
        divergence: a name from `fusedkd.divergences()` or a `fusedkd.divergence(...)`.
        temperature: τ > 0, divides both logits. The gradient is that of the returned value.
        temperature_squared: multiply D by τ².
        reduction: "mean" over counted tokens (0 if there is none), "sum", or "none" -> (...).
        num_items: number or 0-d tensor that replaces the denominator of "mean" (a global token count). 0 is read as 1:
            where nothing counts, the loss is 0 with a zero gradient.
        token_weights: broadcastable to (...), floating-point or a bool mask, multiplies each token's loss. A token of
            weight 0 adds 0 to loss and gradient whatever its logits are, and still counts in the mean's denominator.
        ce_weight: adds ce_weight times the cross-entropy of the student's full vocabulary at temperature 1.
        ignore_index: the label of rows that do not count.
        vocab_size: compare the first `vocab_size` columns; default the smaller vocabulary. Columns beyond are masked.
        support: what a teacher logit of −inf means. "teacher": the column is removed from both sides. "floor": teacher
            log-probabilities below −50 are raised to −50, so that mass there is punished. Both −inf: removed.
        schedule: for Heads: "chunked" takes some tokens at a time over the whole vocabulary: four matrix products, a
            float32 weight gradient. "streaming" takes some of the vocabulary at a time over all tokens: six products
            (eight without a one-sweep form), the least memory, independent of V. "auto" is "chunked"; "streaming" where
            only that keeps `memory_budget`, and on a GPU for reduction="none" with a one-sweep divergence.
            `fusedkd.plan` tells.
        memory_budget: for Heads: bytes the call may hold beyond inputs, loss and gradients, the float32 weight gradient
            included; chunks shrink to keep it.
        drop_ignored: for Heads: leave ignored rows out of the matrix products. "auto": on the CPU; True costs a GPU one
            synchronisation.
        logits_dtype: for Heads: what the matrix products write, float32 by default; torch.bfloat16 halves them and
            makes the gradient several per cent wrong where teacher and student are close (bfloat16 operands only).
        backend: "auto": Triton for GPU tensors, torch for CPU tensors. "triton" on CPU tensors needs
            TRITON_INTERPRET=1; "torch" runs anywhere; "compiled" has torch.compile make loops of the row work of a CPU,
            which takes a C++ compiler and, when each kind of call is first seen, a while: the same bounds, much less
            time with jsd. Not for float64, amid, akl and schedule="streaming".
        return_stats: also return `KDStats`.
        teacher_ids: (...) int64, where `teacher` is a list of Heads, logits and TopKs in any mix, each of the student's
            leading shape: which of them a token has, −1 for none (the row does not count). One call, one normaliser,
            one weight gradient; a teacher that no token has costs nothing. The rows of a teacher are copied together, a
            chunk at a time, which a GPU waits for once.
        shard: where the ranks of a process group share the vocabulary: which columns are this rank's (`VocabShard`).
            The student's logits, or its Head's weight and bias, are then those columns, the teacher's too, or whole
            (this rank takes its columns; a TopK stays as it is). Hidden states, labels, token weights and per-token
            parameters are the same on every rank, `labels` and `vocab_size` the whole vocabulary's; loss and statistics
            come out the same on every rank, bit for bit. Logits and Heads that are DTensors sharded over the
            vocabulary, on a mesh of one dimension, need none; their hidden states are DTensors too.
        hidden_grad: with a shard: "reduce" sums the gradient of the student's hidden states over the ranks, once per
            call; "partial" leaves that to the caller (Megatron's copy to the tensor-parallel region, sequence
            parallelism). The gradients of weight and bias are of this rank's columns.
        weight_grad: (V, D), contiguous, float32 or of the weight's dtype (float64 for a float64 weight): a buffer to
            which the backward pass adds the gradient of the student Head's weight, as Megatron's `weight.main_grad`.
            The weight gets no gradient from this call (None), nor does anything it was computed from. Every backward
            pass through the loss adds once more, one for other inputs alone included; without one, as under
            torch.no_grad, the buffer stays as it is. Not inside torch.compile, which would hold the buffer constant
            from the forward to the backward pass.

    Returns:
        A float32 scalar, or (...) for reduction="none" (float64 for float64 inputs); with `return_stats`,
        (loss, KDStats).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what would work.
        NotImplementedError: for schedule="streaming" with amid, akl, target_token="teacher_argmax", support="floor",
            backend="compiled" or a list of teachers, which need whole rows (those of a TopK are); for what
            tail="truncate" of a TopK cannot do; for backend="compiled" with a shard, and for its
            target_token="teacher_argmax" beside ce_weight; for weight_grad inside torch.compile; inside torch.func's
            transforms and forward-mode AD, for which there are no derivatives.
        RuntimeError: on double backward, and on backward for a batch of upstream gradients (is_grads_batched).

    Cost: logits: one read of each logit forward for divergences with a one-sweep form, two for the others and for
        exponents of `ab` and `alpha` per token, more for `amid` and `akl`; one more and one write backward. Heads: four
        matrix products, six or eight with schedule="streaming"; reduction="none" repeats the forward products in its
        backward. At most `memory_budget` bytes. With `weight_grad` the backward makes no weight gradient: "chunked"
        adds the float32 one of the forward in one pass, "streaming" has each chunk's product added where it belongs and
        makes none at all. With a shard the ranks gather 10 to 20 floats per row for the value (K + 4 of a TopK,
        hundreds for akl), one more for the gradient, and add up the gradient of hidden states (docs/sharding.md).
    """
    _check_options(
        num_items=num_items, schedule=schedule, memory_budget=memory_budget, drop_ignored=drop_ignored,
        reduction=reduction, logits_dtype=logits_dtype, return_stats=return_stats,
    )  # fmt: skip
    checked = _check(
        student, teacher, labels, divergence=divergence, temperature=temperature,
        temperature_squared=temperature_squared, reduction=reduction, num_items=num_items, token_weights=token_weights,
        ce_weight=ce_weight, ignore_index=ignore_index, vocab_size=vocab_size, support=support,
        logits_dtype=logits_dtype, backend=backend, return_stats=return_stats, weight_grad=weight_grad,
        teacher_ids=teacher_ids, shard=shard, hidden_grad=hidden_grad,
        about={"schedule": schedule, "memory_budget": memory_budget, "drop_ignored": drop_ignored},
    )  # fmt: skip
    if not all(side.stored for side in checked.operands):
        loss, stats = _from_heads(checked, schedule, memory_budget, drop_ignored)
    else:
        _no_head_options(schedule, memory_budget, logits_dtype)
        found = logits.rows(checked.call._replace(token_weights=None))
        loss, stats = _weighted(found.loss, checked), found.stats
    loss = _reduced(loss, checked)
    return (loss, _stats(stats, checked)) if return_stats else loss


def kd_value_and_grad(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | TopK,
    labels: torch.Tensor | None = None,
    *,
    divergence: str | Divergence = "fkl",
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    support: str = "teacher",
    schedule: str = "auto",
    memory_budget: int | None = None,
    drop_ignored: bool | str = "auto",
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_stats: bool = False,
    shard: VocabShard | None = None,
) -> Any:
    """Loss and its gradient with respect to the student's logits in one call, without autograd.

    The value sweep and the gradient sweep of a row run back to back, so the second one meets the tiles still in cache:
    less memory traffic than two calls. Arguments and errors as `kd_loss`, logits only, no DTensors.

    Returns:
        (loss, grad): grad has the student's shape and dtype and is the gradient of the reduced loss, or of each token's
        own loss for reduction="none". With `return_stats`, (loss, grad, KDStats). Rows of grad are as far apart as the
        student's, modulo 16 elements: it is contiguous where the student is.
    """
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if isinstance(value, Head) or (is_operand(value) and not value.stored):
            kind = type(value).__name__
            raise TypeError(f"{name} must be logits, got a {kind}: use kd_loss and backward for hidden states")
        if not is_operand(value) and not (name == "teacher_logits" and isinstance(value, TopK)):
            checks.side(name, value, 1 if shard is None else 0)
    _check_options(
        num_items=num_items, schedule=schedule, memory_budget=memory_budget, drop_ignored=drop_ignored,
        reduction=reduction, logits_dtype=logits_dtype, return_stats=return_stats,
    )  # fmt: skip
    _no_head_options(schedule, memory_budget, logits_dtype)
    checked = _check(
        student_logits.detach(), teacher_logits, labels, divergence=divergence, temperature=temperature,
        temperature_squared=temperature_squared, reduction=reduction, num_items=num_items, token_weights=token_weights,
        ce_weight=ce_weight, ignore_index=ignore_index, vocab_size=vocab_size, support=support,
        logits_dtype=logits_dtype, backend=backend, return_stats=return_stats, shard=shard,
    )  # fmt: skip
    weights = checked.call.token_weights
    if reduction == "mean":
        scale = 1.0 / _denominator(checked)
        weights = scale.expand(checked.shape.numel()).contiguous() if weights is None else weights * scale
    found = logits.rows_both(checked.call._replace(token_weights=weights))
    loss = _reduced(_weighted(found.loss, checked), checked)
    grad = found.gradient.view(student_logits.shape)
    return (loss, grad, _stats(found.stats, checked)) if return_stats else (loss, grad)


def _check_options(
    *,
    reduction: str,
    num_items: float | torch.Tensor | None,
    schedule: str,
    memory_budget: int | None,
    drop_ignored: bool | str,
    logits_dtype: torch.dtype | None,
    return_stats: bool,
) -> None:
    """Checks what does not depend on the tensors."""
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f'num_items replaces the denominator of reduction="mean", got reduction={reduction!r}')
        if isinstance(num_items, torch.Tensor):
            if num_items.dim():
                raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
            if num_items.requires_grad:
                raise ValueError("num_items requires grad; gradients flow to the student only: pass num_items.detach()")
        else:
            checks.number("num_items", num_items)
            if num_items < 0:
                raise ValueError(f"num_items must be >= 0, got {num_items}")
    checks.one_of("schedule", schedule, ("auto", "chunked", "streaming"))
    checks.budget(memory_budget)
    checks.one_of("drop_ignored", drop_ignored, ("auto", True, False))
    checks.one_of("logits_dtype", logits_dtype, (None, torch.float32, torch.bfloat16))
    checks.flag("return_stats", return_stats)


def _no_head_options(schedule: str, memory_budget: int | None, logits_dtype: torch.dtype | None) -> None:
    for name, value, default in (
        ("schedule", schedule, "auto"),
        ("memory_budget", memory_budget, None),
        ("logits_dtype", logits_dtype, None),
    ):
        if value != default:
            raise ValueError(f"{name}={value!r} is about heads, and both sides are logits: leave it at {default!r}")


def _check(
    student: Side,
    teacher: checks.Teacher | Sequence[checks.Teacher],
    labels: torch.Tensor | None,
    *,
    divergence: str | Divergence,
    temperature: float,
    temperature_squared: bool,
    reduction: str,
    num_items: float | torch.Tensor | None,
    token_weights: torch.Tensor | None,
    ce_weight: float,
    ignore_index: int,
    vocab_size: int | None,
    support: str,
    logits_dtype: torch.dtype | None,
    backend: str,
    return_stats: bool,
    weight_grad: torch.Tensor | None = None,
    teacher_ids: torch.Tensor | None = None,
    shard: VocabShard | None = None,
    hidden_grad: str = "reduce",
    about: Mapping[str, Any] | None = None,
) -> _Checked:
    """Checks what depends on the tensors, and flattens them to rows."""
    checks.one_of("hidden_grad", hidden_grad, ("reduce", "partial"))
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a fusedkd.VocabShard or None, got {type(shard).__name__}")
    teachers = checks.teachers(teacher, teacher_ids)
    student, teachers, labels, shard = local_sides(student, teachers, labels, shard, hidden_grad)
    least = 1 if shard is None else 0  # a rank may have no column
    checks.side("student", student, least)
    for name, given in teachers.items():
        checks.teacher(given, name, least)
        checks.pair(student, given, name)
    if hidden_grad == "partial" and (shard is None or not isinstance(student, Head)):
        raise ValueError(
            'hidden_grad="partial" leaves the sum over the ranks of a shard to you, and there is no such sum without a '
            'shard and hidden states: leave it at "reduce"'
        )
    checks.weight_grad(weight_grad, student, teachers)
    chosen = as_divergence(divergence)
    checks.positive("temperature", temperature)
    checks.flag("temperature_squared", temperature_squared)
    checks.number("ce_weight", ce_weight)
    checks.integer("ignore_index", ignore_index)
    checks.one_of("support", support, ("teacher", "floor"))
    if shard is None:
        columns = checks.vocab_size(vocab_size, student, *teachers.values())
    else:
        shard.fit("student", checks.width(student))
        options = {
            "temperature": temperature, "reduction": reduction, "ce_weight": ce_weight, "support": support,
            "hidden_grad": hidden_grad, "return_stats": return_stats, "vocab_size": vocab_size,
            "ignore_index": ignore_index, "backend": backend, "logits_dtype": logits_dtype, **(about or {}),
        }  # fmt: skip
        agree(shard, lambda: {**_facts(student, teachers, labels, token_weights, chosen), **options})
        columns, teachers = _shared_columns(vocab_size, teachers, shard)
    here = columns if shard is None else shard.here(columns)
    shape, where = checks.leading(student), checks.device(student)
    checks.targets(chosen, labels, ce_weight)
    if labels is not None:
        checks.labels(labels, shape, where, ignore_index, columns)
    if token_weights is not None:
        checks.per_token("token_weights", token_weights, shape, where)
    resolved = choose_backend(backend, where)
    y = None if labels is None else _flat_labels(labels, ignore_index, columns)
    counted = None if y is None else y >= 0
    if teacher_ids is not None:
        checks.teacher_ids(teacher_ids, len(teachers), shape, where)
    floats = (x.hidden if isinstance(x, Head) else x for x in (student, *teachers.values()))
    wide = accumulation_dtype(*(x for x in floats if isinstance(x, torch.Tensor)))
    for name, given in teachers.items():
        if isinstance(given, TopK):
            checks.listed_with(given, chosen, temperature, support, return_stats, name)
            checks.listed(given, columns, name)
            teachers[name] = _outcomes(given, y, chosen, columns, temperature, wide)
    operands = operands_of(student, _one_of(teachers, teacher_ids))
    ours, theirs = operands.student.parts, operands.teacher
    if isinstance(theirs, TopKOutcomes | RoutedTeachers):  # rows of which no teacher says anything do not count either
        has_teacher = (theirs.targets if isinstance(theirs, TopKOutcomes) else theirs.ids) >= 0
        counted = has_teacher if counted is None else counted & has_teacher
        if y is not None or isinstance(
            theirs, TopKOutcomes
        ):  # has targets of its own: any label says that a row counts
            y = torch.where(counted, 0 if y is None else y, -1)
    wide = accumulation_dtype(ours.x, *theirs.tensors)
    if wide == torch.float64 and resolved == "triton":
        raise TypeError('float64 inputs need backend="torch": the Triton kernels compute in float32')
    if shard is not None:
        _check_sharded(chosen, resolved, ce_weight)
    if resolved == "compiled":
        torch_compiled.check_rows(chosen.form.definition, wide)

    weights = None if token_weights is None else _rows_of(token_weights, shape).to(wide)
    if weights is not None and counted is not None:
        weights = torch.where(counted, weights, 0.0)  # padding may hold anything
    for key, value in chosen.tensors().items():
        checks.per_token(f"{key} of divergence {chosen.name!r}", value, shape, where)
    form = chosen.form
    parameters = (form.target, form.nontarget, 0.0 if form.mix is None else form.mix, *form.theta)
    tensors = [_rows_of(value, shape).to(wide) for value in parameters if isinstance(value, torch.Tensor)]
    numbers = Numbers(
        temperature=float(temperature),
        factor=float(temperature * temperature if temperature_squared else 1.0),
        ce_weight=float(ce_weight),
        student_scale=ours.scale,
        student_softcap=ours.softcap,
        parameters=tuple(0.0 if isinstance(value, torch.Tensor) else float(value) for value in parameters),
        teacher=theirs.numbers,
    )
    call = LossCall(
        student=ours.x,
        student_weight=ours.weight,
        student_bias=ours.bias,
        teacher=theirs.tensors,
        teacher_kind=theirs.kind,
        labels=y,
        token_weights=weights,
        token_parameters=torch.stack(tensors) if tensors else None,
        per_token=[isinstance(value, torch.Tensor) for value in parameters],
        numbers=packed(numbers),
        vocab_size=here,
        definition=form.definition.name,
        decoupled=form.decoupled,
        mixed=form.mix is not None,
        target_token=chosen.target_token,
        support=support,
        backend=resolved,
        return_stats=return_stats,
        logits_dtype=logits_dtype,
        weight_grad=weight_grad,
        shard_group="" if shard is None else shard.group.group_name,
        shard_start=0 if shard is None else shard.first,
        shard_widest=0 if shard is None else shard.widest,
        reduce_hidden=shard is not None and hidden_grad == "reduce",
    )
    targeted = labels is not None or chosen.target_token != "label"
    ranks = 1 if shard is None else shard.size
    return _Checked(call, operands, numbers, form, shape, counted, targeted, reduction, num_items, ranks)


def _facts(
    student: Side, teachers: dict[str, Any], labels: Any, token_weights: Any, chosen: Divergence
) -> dict[str, Any]:
    """What every rank of a shard has to call with, by the names that errors give it: for some of it a GPU waits."""
    parts = student[:3] if isinstance(student, Head) else (student,)
    seen = isinstance(labels, torch.Tensor) and checks.has_data(labels)
    return {
        "the leading shape of student": tuple(checks.leading(student)),
        "the kind of student": type(student).__name__,
        "the kinds of teachers": [type(x).__name__ for x in teachers.values()],
        "K of the teachers": [x.ids.shape[-1] for x in teachers.values() if isinstance(x, TopK)],
        "labels (None or not)": labels is None,
        "the sum of labels": int(labels.sum()) if seen else None,
        "token_weights (None or not)": token_weights is None,
        "what of student requires grad": [x is not None and x.requires_grad for x in parts],
        "divergence": repr(chosen),
    }


def _shared_columns(vocab_size: int | None, teachers: dict[str, Any], shard: VocabShard) -> tuple[int, dict[str, Any]]:
    """How many of the vocabulary's columns are compared, and this rank's part of every teacher."""
    listed = [given.vocab_size for given in teachers.values() if isinstance(given, TopK)]
    parts = {name: cut(name, given, shard, vocab_size) for name, given in teachers.items()}
    return checks.compared(vocab_size, shard.vocab_size, *listed), parts


def _check_sharded(chosen: Divergence, backend: str, ce_weight: float) -> None:
    """What a shard cannot do."""
    if backend == "compiled":
        raise NotImplementedError(
            'backend="compiled" makes loops of whole rows, and a shard has parts of them: leave it at "auto"'
        )
    if ce_weight and chosen.target_token == "teacher_argmax":
        raise NotImplementedError(
            'target_token="teacher_argmax" beside ce_weight needs two tokens of a row, and the ranks of a shard tell '
            "each other about one: add the cross-entropy with a call of its own, or take the label as target"
        )


def _flat_labels(labels: torch.Tensor, ignore_index: int, columns: int) -> torch.Tensor:
    """(N,), −1 in rows that do not count."""
    flat = labels.reshape(-1)
    return torch.where((flat != ignore_index) & (flat >= 0) & (flat < columns), flat, -1)


def _outcomes(
    teacher: TopK,
    y: torch.Tensor | None,
    chosen: Divergence,
    columns: int,
    temperature: float,
    wide: torch.dtype,
) -> TopKOutcomes:
    """The teacher as an Operand."""
    k = teacher.ids.shape[-1]
    logprobs = teacher.logprobs.detach().reshape(-1, k)
    if teacher.temperature != temperature:  # renormalised: log p is the logit at that temperature but for a constant
        logprobs = logprobs.float() * (teacher.temperature / temperature)
    argmax = chosen.target_token == "teacher_argmax"
    return outcomes_of(teacher.tail, teacher.ids.reshape(-1, k), logprobs, y, argmax, columns, wide)


def _one_of(teachers: dict[str, Any], teacher_ids: torch.Tensor | None) -> Side | Operand:
    """The teacher, or the several of which `teacher_ids` (...) names one for each row."""
    if teacher_ids is None:
        return teachers["teacher"]
    ids, parts = teacher_ids.reshape(-1), [part_of(x) for x in teachers.values()]
    ids = torch.where((ids >= 0) & (ids < len(parts)), ids, -1)
    for i, part in enumerate(parts):
        if isinstance(part, TopKOutcomes):
            ids = torch.where((ids == i) & (part.targets < 0), -1, ids)
    return RoutedTeachers(ids, tuple(parts))


def _from_heads(
    checked: _Checked, schedule: str, memory_budget: int | None, drop_ignored: bool | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight·loss per row, or its sum where the reduction takes one, and the statistics."""
    call, counted, student, teacher = checked.call, checked.counted, *checked.operands
    _check_logits_dtype(call.logits_dtype, checked.operands)
    live = torch.is_grad_enabled()
    drop = call.student.device.type == "cpu" if drop_ignored == "auto" else bool(drop_ignored)
    drop = drop and counted is not None
    if counted is not None and not torch.compiler.is_compiling():
        drop = drop and checks.has_data(counted)  # how many rows are left is not known without
    needs_rows = whole_rows(checked.form, call.target_token == "teacher_argmax", call.support == "floor")
    if call.backend == "compiled":
        needs_rows = needs_rows or 'backend="compiled"'
    if isinstance(teacher, RoutedTeachers):
        needs_rows = needs_rows or "a list of teachers"
    if is_topk(call.teacher_kind):  # its outcomes are whole rows
        needs_rows = None
    beside_logits = drop and (student.stored or teacher.stored)
    if beside_logits and drop_ignored is True:
        if schedule == "streaming":
            raise ValueError(
                'drop_ignored=True with schedule="streaming" needs a Head on both sides, and one is logits, whose kept '
                'rows would be copied whole: leave it at "auto", or use schedule="chunked"'
            )
        needs_rows = needs_rows or "drop_ignored=True beside logits"
    call = call._replace(
        drop_ignored=drop and not (beside_logits and schedule == "streaming"),
        needs_student=live and call.student.requires_grad,
        needs_weight=live and call.student_weight is not None and call.student_weight.requires_grad,
        needs_bias=live and call.student_bias is not None and call.student_bias.requires_grad,
    )
    shape, sweeps = _shape(call, checked), sweeps_of(checked.form)
    chosen = choose_schedule(shape, memory_budget, schedule, checked.reduction, needs_rows, sweeps)
    if chosen.chunks is None:
        found = _streamed(call._replace(columns=chosen.width), teacher, counted)
    else:
        call = call._replace(outer_rows=chosen.chunks.outer, inner_rows=chosen.chunks.inner)
        if checked.reduction != "none":
            found = heads.heads(call)
            return found.total, found.stats
        found = heads.heads_rows(call._replace(token_weights=None))
    return _weighted(found.loss, checked), found.stats


def _streamed(call: LossCall, teacher: Operand, counted: torch.Tensor | None) -> partial_rows.Rows:
    """Loss of each row, and the statistics, by the streaming schedule."""
    kept = None
    if call.drop_ignored and counted is not None and call.student_weight is not None and not teacher.stored:
        kept = counted.nonzero().squeeze(-1)
        call = at_rows(call, kept)._replace(student=call.student[kept], teacher=teacher.at(kept).tensors)
    found = streamed.streamed(call._replace(token_weights=None, drop_ignored=False))
    if kept is None or counted is None:
        return found
    n = counted.shape[0]
    found = found._replace(loss=found.loss.new_zeros(n).index_copy(0, kept, found.loss))
    if call.return_stats:
        found = found._replace(stats=found.stats.new_zeros((n, STATS)).index_copy(0, kept, found.stats))
    return found


def _shape(call: LossCall, checked: _Checked) -> Shape:
    student, teacher = checked.operands
    x, theirs = call.student, teacher.tensors[0]
    made = theirs if student.stored else x
    # Ranks of a shard plan for the one that has most columns: all have to take as many rows at a time.
    width, compared = (call.shard_widest,) * 2 if call.shard_group else (student.width, call.vocab_size)
    columns = width if checked.numbers.ce_weight else compared
    return Shape(
        rows=student.rows,
        student_width=0 if student.stored else columns,
        teacher_width=0 if teacher.stored else compared,
        student_dim=student.dim,
        teacher_dim=teacher.dim,
        weight_rows=0 if student.stored else width,
        logit_bytes=logit_dtype(made.dtype, call.logits_dtype).itemsize,
        dz_bytes=gradient_dtype(x).itemsize,
        hidden_bytes=made.element_size(),
        accumulator_bytes=accumulation_dtype(x, *teacher.tensors).itemsize,
        on_cpu=x.device.type == "cpu",
        gather=call.drop_ignored or isinstance(teacher, RoutedTeachers),
        masked=call.token_weights is not None or (call.labels is not None and not call.drop_ignored),
        student_logit_bytes=x.element_size() if student.stored else theirs.element_size(),
        student_logits=width if student.stored else 0,
        needs_hidden=call.needs_student,
        needs_weight=call.needs_weight or call.needs_bias,
        outcomes=_most_outcomes(teacher),
        parameters=checked.ranks > 1 and checked.form.definition.whole_rows,
        ranks=checked.ranks,
    )


def _most_outcomes(teacher: Operand) -> int:
    return max(x.width if isinstance(x, TopKOutcomes) else 0 for x in _named_teachers(teacher).values())


def _check_logits_dtype(logits_dtype: torch.dtype | None, operands: Operands) -> None:
    sides = {"student": operands.student, **_named_teachers(operands.teacher)}
    for name, operand in sides.items():
        if logits_dtype is None or operand.stored:
            continue
        dtype = operand.tensors[0].dtype
        if logits_dtype == torch.bfloat16 and dtype != torch.bfloat16:
            raise ValueError(f"logits_dtype=torch.bfloat16 needs a bfloat16 {name} Head, got {dtype}")
        if dtype == torch.float64:
            raise ValueError(f"logits_dtype must be None for a float64 {name} Head")


def _named_teachers(teacher: Operand) -> dict[str, Operand]:
    """The teacher, or each of several, by the name that errors give it."""
    if isinstance(teacher, RoutedTeachers):
        return {f"teacher[{i}]": x for i, x in enumerate(teacher.parts)}
    return {"teacher": teacher}


def _rows_of(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(N,) contiguous values of a tensor broadcast to the leading shape."""
    return value.detach().expand(shape).reshape(-1).contiguous()


def _weighted(loss: torch.Tensor, checked: _Checked) -> torch.Tensor:
    """weight·loss of each row (N,), or its sum where the reduction takes one."""
    weights = checked.call.token_weights
    if checked.call.labels is None and checked.counted is not None:
        loss = torch.where(checked.counted, loss, 0.0)  # nor does the upstream gradient of the others count
    loss = loss if weights is None else torch.where(weights == 0, 0.0, loss * weights)
    return loss if checked.reduction == "none" else loss.sum()


def _denominator(checked: _Checked) -> torch.Tensor:
    """What "mean" divides by, 0-d. 0 becomes 1: where nothing counts the sum is 0, and so is its mean."""
    x, num_items = checked.call.student, checked.num_items
    if isinstance(num_items, torch.Tensor):
        # From a CPU the host goes on once the number is staged; to a CPU it must wait, or would read too early.
        items = num_items.detach().to(x.device, torch.float32, non_blocking=not x.is_cpu)
    elif num_items is not None:
        items = x.new_ones((), dtype=torch.float32) * float(num_items)
    elif checked.counted is None:
        items = x.new_full((), float(checked.shape.numel()), dtype=torch.float32)
    else:
        items = checked.counted.sum().float()
    return torch.where(items == 0, 1.0, items)


def _reduced(loss: torch.Tensor, checked: _Checked) -> torch.Tensor:
    """From `_weighted` to what the caller asked for."""
    if checked.reduction == "none":
        return loss.view(checked.shape)
    return loss / _denominator(checked) if checked.reduction == "mean" else loss


def _stats(stats: torch.Tensor, checked: _Checked) -> KDStats:
    found = KDStats(*stats.float().t().contiguous())
    counted = checked.counted
    unknown = stats.new_full((), torch.nan) if counted is None else torch.where(counted, torch.nan, 0.0)
    unknown = unknown.expand(len(stats))
    if not checked.targeted:
        found = found._replace(student_logprob=unknown, teacher_logprob=unknown)
    if not checked.targeted or not checked.form.definition.splits:
        found = found._replace(target_loss=unknown, nontarget_loss=unknown, target_grad=unknown, nontarget_grad=unknown)
    return KDStats(*(column.view(checked.shape) for column in found))
