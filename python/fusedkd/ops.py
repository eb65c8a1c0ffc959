"""The operators of the losses and their autograd, registered with torch.library.

Those of schedule="streaming" are in streaming.py, those of `token_logprobs` in logprobs.py; no other file has any.

fusedkd::rows               logits on both sides -> per-row loss; its backward is one gradient sweep
fusedkd::rows_gradient      that sweep, for any upstream weight per row
fusedkd::rows_both          per-row loss and weighted gradient in one call, no autograd
fusedkd::heads              a Head on at least one side -> Σ weight·loss with the gradient formed beside it; its
                            backward multiplies by the upstream scalar
fusedkd::heads_rows         the same sides -> per-row loss; its backward runs `heads` with the upstream as row weights
fusedkd::scaled             a gradient of `heads` times the upstream scalar, in the operand's dtype
fusedkd::add_scaled         the same product added to a buffer that the caller owns

All are opaque to torch.compile, so a call crosses the boundary as plain values:
    x, weight, bias   the student: hidden states (N, D) and its head, or logits (outer, inner, V) alone
    others     teacher x, weight, bias; labels; row weights; then one per divergence parameter, for the two term weights
               and for the teacher's weight in a mixed one: a (N,) tensor where it is per row, else None
    names      `Names` with spaces between
    numbers    (P,) float64 on the host (`packed`): vocab_size, temperature, factor, ce_weight; scale and softcap (0:
               none) of student and teacher; then the divergence parameters, the two term weights and the teacher's
               weight. A tensor, because torch.compile would make a graph for each value of a Python number
    flags      statistics wanted, ignored rows dropped, gradients wanted of x, weight, bias
    weight_grad   where the backward pass adds the weight's gradient, which it then does not return; or None. It is kept
               beside the saved tensors, not among them: others may add to it before the backward pass does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from . import chunked
from .backends import logit_functions, row_functions
from .dtypes import accumulation_dtype, size_of
from .kernels.divergences import definitions
from .kernels.rows import SAVED, STATS, Problem, Side
from .planner import Chunks

Operands = Sequence[Optional[Tensor]]  # [x, weight, bias, *others]
PER_ROW = 8  # where the per-row parameters start in operands, and the parameters in `numbers`


class Names(NamedTuple):
    """The words of a call."""

    definition: str
    structure: str  # joint, decoupled
    backend: str
    support: str
    target: str  # label, teacher_argmax
    teacher: str  # own, mixed

    @classmethod
    def of(cls, words: str) -> "Names":
        """From the string that crosses the boundary."""
        return cls(*words.split())


def outside_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has been applied to the operands already; inside an op it would undo the float32 arithmetic."""

    @functools.wraps(fn)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        with torch.autocast("cpu", enabled=False), torch.autocast(place, enabled=False):
            return fn(x, *args, **kwargs)

    return run


def packed(numbers: Sequence[float]) -> Tensor:
    """Numbers as an operator takes them: (P,) float64 on the host.

    While torch.compile traces, each is a product with a tensor: so a number that changes from step to step becomes an
    input of the graph, where `torch.tensor` would compile its value in.
    """
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * number for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def save(ctx: Any, *tensors: Optional[Tensor]) -> None:
    """`ctx.save_for_backward`, which refuses tensors made under torch.inference_mode(): the context holds those itself.

    A teacher often is one. Nothing can have changed it in place: that, too, is refused outside of inference mode.
    """
    ctx.inference = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else x for i, x in enumerate(tensors)))


def saved_of(ctx: Any) -> list[Optional[Tensor]]:
    """What `save` was given."""
    found = list(ctx.saved_tensors)
    for i, x in ctx.inference.items():
        found[i] = x
    return found


def counted_upstream(upstream: Tensor, labels: Optional[Tensor]) -> Tensor:
    """An upstream gradient (N, ...) that is 0 in rows that do not count, whatever it holds there."""
    if labels is None:
        return upstream
    counted = (labels >= 0).view(-1, *(1,) * (upstream.dim() - 1))
    return torch.where(counted, upstream, 0.0)


def problem_of(operands: Operands, names: str, numbers: Tensor) -> Problem:
    """What the row kernels compute."""
    vocab_size, temperature, factor, ce_weight = numbers[:4].tolist()
    values: tuple[Any, ...] = tuple(
        number if tensor is None else tensor
        for number, tensor in zip(numbers[PER_ROW:].tolist(), operands[PER_ROW:], strict=True)
    )
    words = Names.of(names)
    return Problem(
        definitions()[words.definition],
        words.structure == "decoupled",
        values[:-3],
        (values[-3], values[-2]),
        int(vocab_size),
        temperature,
        factor,
        ce_weight,
        mix=values[-1] if words.teacher == "mixed" else None,
        argmax=words.target == "teacher_argmax",
    )


def refuse_double_backward(upstream: Optional[Tensor]) -> None:
    """Raises where a backward pass is itself being recorded, or runs for a batch of upstream gradients at once."""
    if upstream is not None and (is_batchedtensor(upstream) or is_legacy_batchedtensor(upstream)):
        raise RuntimeError(
            "fusedkd cannot run backward for a batch of upstream gradients (is_grads_batched=True, vectorize=True, "
            "torch.func.vmap): call torch.autograd.grad once for each of them"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fusedkd has no second derivative: its gradient is formed by the kernel. Call backward or autograd.grad "
            "with create_graph=False, or use a plain torch loss where you need double backward"
        )


def given(tensor: Optional[Tensor]) -> Tensor:
    """An operand that every call has."""
    assert tensor is not None
    return tensor


def _wide(operands: Operands) -> torch.dtype:
    return accumulation_dtype(given(operands[0]), given(operands[3]))


def _row_count(operands: Operands) -> Any:
    x = given(operands[0])
    return x.shape[0] if operands[1] is not None else x.shape[0] * x.shape[1]


def _outputs(operands: Operands, with_stats: bool) -> tuple[Tensor, Tensor]:
    """Empty loss (N,) and statistics (N, STATS) or (0, STATS)."""
    x, n = given(operands[0]), _row_count(operands)
    return (
        x.new_empty(n, dtype=_wide(operands)),
        x.new_empty((n if with_stats else 0, STATS), dtype=_wide(operands)),
    )


def _like_contiguous(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# Logits on both sides ------------------------------------------------------------------------------------------------


def _empty_floors(operands: Operands, names: str) -> Tensor:
    n = _row_count(operands) if Names.of(names).support == "floor" else 0
    return given(operands[0]).new_empty(n, dtype=_wide(operands))


def _teacher(operands: Operands, floors: Tensor) -> Side:
    return Side(given(operands[3]), floor=floors if floors.numel() else None)


def _floors(operands: Operands, names: str, problem: Problem) -> Tensor:
    """Where support="floor" raises the teacher's logits to, per row; empty otherwise."""
    floors = _empty_floors(operands, names)
    if floors.numel():
        row_functions(Names.of(names).backend).floor_rows(
            problem, Side(given(operands[3])), operands[6], floors, chunked.FLOOR_DEPTH
        )
    return floors


@torch.library.custom_op("fusedkd::rows", mutates_args=())
@outside_autocast
def rows(
    x: Tensor, others: Operands, names: str, numbers: Tensor, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N,), statistics, saved row scalars (N, SAVED), floors."""
    operands = [x, None, None, *others]
    problem = problem_of(operands, names, numbers)
    loss, stats = _outputs(operands, flags[0])
    saved = loss.new_empty((loss.shape[0], SAVED))
    floors = _floors(operands, names, problem)
    logit_functions(Names.of(names).backend, problem, x).value(
        problem, Side(x), _teacher(operands, floors), operands[6], loss, saved,
        stats if flags[0] else None,
    )  # fmt: skip
    return loss, stats, saved, floors


@rows.register_fake
def _(
    x: Tensor, others: Operands, names: str, numbers: Tensor, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = [x, None, None, *others]
    loss, stats = _outputs(operands, flags[0])
    return loss, stats, loss.new_empty((loss.shape[0], SAVED)), _empty_floors(operands, names)


@torch.library.custom_op("fusedkd::rows_gradient", mutates_args=())
@outside_autocast
def rows_gradient(
    x: Tensor,
    others: Operands,
    saved: Tensor,
    floors: Tensor,
    upstream: Tensor,
    names: str,
    numbers: Tensor,
) -> Tensor:
    """upstream_n · dloss_n/dstudent, contiguous, in the student's shape and dtype."""
    operands = [x, None, None, *others]
    problem = problem_of(operands, names, numbers)
    grad = _like_contiguous(x)
    logit_functions(Names.of(names).backend, problem, x).gradient(
        problem, Side(x), _teacher(operands, floors), operands[6], saved,
        upstream, grad.view(-1, grad.shape[2]),
    )  # fmt: skip
    return grad


@rows_gradient.register_fake
def _(
    x: Tensor,
    others: Operands,
    saved: Tensor,
    floors: Tensor,
    upstream: Tensor,
    names: str,
    numbers: Tensor,
) -> Tensor:
    return _like_contiguous(x)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, others, ctx.names, numbers, _ = inputs
    _, stats, saved, floors = output
    ctx.mark_non_differentiable(stats, saved, floors)
    ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be as large as they
    save(ctx, saved, floors, numbers, x, *others)


def no_gradients(others: Operands) -> Optional[list[None]]:
    """What torch.library wants back for the list: one None each if it took it for a list of tensors."""
    return None if any(tensor is None for tensor in others) else [None] * len(others)


def _rows_backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> tuple[Any, ...]:
    refuse_double_backward(upstream)
    saved, floors, numbers, x, *others = saved_of(ctx)
    grad = None
    if upstream is not None:
        grad = rows_gradient(x, others, saved, floors, upstream.contiguous(), ctx.names, numbers)
    return grad, no_gradients(others), None, None, None


rows.register_autograd(_rows_backward, setup_context=_rows_setup)


@torch.library.custom_op("fusedkd::rows_both", mutates_args=())
@outside_autocast
def rows_both(
    x: Tensor, others: Operands, names: str, numbers: Tensor, flags: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), statistics, weight_n · dloss_n/dstudent."""
    operands = [x, None, None, *others]
    problem = problem_of(operands, names, numbers)
    loss, stats = _outputs(operands, flags[0])
    grad = _like_contiguous(x)
    logit_functions(Names.of(names).backend, problem, x).value_and_gradient(
        problem, Side(x), _teacher(operands, _floors(operands, names, problem)), operands[6],
        operands[7], grad.view(-1, grad.shape[2]), loss, stats if flags[0] else None,
    )  # fmt: skip
    return loss, stats, grad


@rows_both.register_fake
def _(x: Tensor, others: Operands, names: str, numbers: Tensor, flags: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return *_outputs([x, None, None, *others], flags[0]), _like_contiguous(x)


# A Head on at least one side -----------------------------------------------------------------------------------------


def source_of(side: Operands, numbers: Tensor) -> chunked.Source:
    """A side, from (x, weight, bias) and (scale, softcap)."""
    x, weight, bias = side
    scale, softcap = numbers.tolist()
    return chunked.Source(given(x), weight, bias, None if scale == 1.0 else scale, softcap or None)


def sources_of(operands: Operands, numbers: Tensor) -> tuple[chunked.Source, chunked.Source]:
    """Student and teacher."""
    return source_of(operands[:3], numbers[4:6]), source_of(operands[3:6], numbers[6:8])


def _run(
    operands: Operands,
    names: str,
    numbers: Tensor,
    chunks: Sequence[int],
    flags: Sequence[bool],
    logits_dtype: Optional[torch.dtype],
) -> chunked.Result:
    return chunked.run(
        problem_of(operands, names, numbers),
        *sources_of(operands, numbers),
        operands[6],
        operands[7],
        (flags[2], flags[3], flags[4]),
        Chunks(chunks[0], chunks[1], 0),
        backend=Names.of(names).backend,
        floor=Names.of(names).support == "floor",
        with_stats=flags[0],
        drop_ignored=flags[1],
        logits_dtype=logits_dtype,
    )


@torch.library.custom_op("fusedkd::heads", mutates_args=())
@outside_autocast
def heads(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    others: Operands,
    names: str,
    numbers: Tensor,
    chunks: Sequence[int],
    flags: Sequence[bool],
    logits_dtype: Optional[torch.dtype],
    weight_grad: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σ weight·loss, loss (N,), statistics, gradients of the sum: x, weight, bias, empty where not wanted."""
    result = _run([x, weight, bias, *others], names, numbers, chunks, flags, logits_dtype)
    weights = others[4]
    total = result.rows.sum() if weights is None else torch.where(weights == 0, 0.0, weights * result.rows).sum()
    return total, result.rows, result.stats, result.x, result.weight, result.bias


@heads.register_fake
def _(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    others: Operands,
    names: str,
    numbers: Tensor,
    chunks: Sequence[int],
    flags: Sequence[bool],
    logits_dtype: Optional[torch.dtype],
    weight_grad: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = [x, weight, bias, *others]
    loss, stats = _outputs(operands, flags[0])
    grads = [x.new_empty(0), x.new_empty(0), x.new_empty(0)]
    if weight is None and flags[2]:
        grads[0] = x.new_empty((_row_count(operands), x.shape[2]))
    elif weight is not None:
        shapes = (x.shape, weight.shape, weight.shape[:1])
        grads = [
            x.new_empty(shape, dtype=accumulation_dtype(x)) if wanted else x.new_empty(0)
            for shape, wanted in zip(shapes, flags[2:], strict=True)
        ]
    return loss.new_empty(()), loss, stats, grads[0], grads[1], grads[2]


@torch.library.custom_op("fusedkd::scaled", mutates_args=())
def scaled(grad: Tensor, by: Tensor, like: Tensor) -> Tensor:
    """grad · by in the shape and dtype of `like`: one rounding, no temporary, and `grad` stays for another backward."""
    out = _like_contiguous(like)
    grad = grad.view(like.shape)
    if out.dtype == grad.dtype or not out.is_cpu:
        torch.mul(grad, by, out=out)
    else:  # a CPU multiplies into a whole copy of the wider dtype first
        for source, target in zip(grad.split(512), out.split(512), strict=True):
            torch.mul(source, by, out=target)
    return out


@scaled.register_fake
def _(grad: Tensor, by: Tensor, like: Tensor) -> Tensor:
    return _like_contiguous(like)


@torch.library.custom_op("fusedkd::add_scaled", mutates_args=("out",))
@outside_autocast
def add_scaled(out: Tensor, grad: Tensor, by: Tensor) -> None:
    """out += grad · by: one pass, one rounding, no temporary."""
    if out.dtype == grad.dtype or not out.is_cpu:
        out.addcmul_(grad, by)
    else:  # a CPU converts whole operands first
        for target, source in zip(out.split(512), grad.split(512), strict=True):
            target.addcmul_(source, by)


@add_scaled.register_fake
def _(out: Tensor, grad: Tensor, by: Tensor) -> None:
    return None


def _is_last(by: Tensor) -> bool:
    """Whether nobody can ask for the saved gradients again: the backward pass runs, and its graph is not retained."""
    return type(by) is Tensor and not _get_current_graph_task_keep_graph()


def _delivered(
    grads: Sequence[Tensor],
    by: Tensor,
    likes: Sequence[Optional[Tensor]],
    wanted: Sequence[bool],
    weight_grad: Optional[Tensor],
) -> list[Optional[Tensor]]:
    """Gradients of x, weight and bias times `by`; None where not wanted or, of the weight, added to `weight_grad`.

    In the memory of `grads` where that has the right dtype and is not needed again.
    """
    returned = (wanted[0], wanted[1] and weight_grad is None, wanted[2])
    last = _is_last(by)

    def deliver(grad: Tensor, like: Tensor) -> Tensor:
        return grad.mul_(by).view(like.shape) if last and grad.dtype == like.dtype else scaled(grad, by, like)

    found = [
        deliver(grad, given(like)) if wanted else None
        for like, grad, wanted in zip(likes, grads, returned, strict=True)
    ]
    if weight_grad is not None:
        add_scaled(weight_grad, grads[1], by)
    return found


def _heads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, others, _, _, _, flags, _, ctx.weight_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.wanted = list(flags[2:])
    ctx.no_gradients = no_gradients(others)
    save(ctx, x, weight, bias, *output[3:])


def _heads_backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> tuple[Any, ...]:
    refuse_double_backward(upstream)
    saved = saved_of(ctx)
    found: list[Optional[Tensor]] = [None, None, None]
    if upstream is not None:
        grads = [given(grad) for grad in saved[3:]]
        found = _delivered(grads, upstream, saved[:3], ctx.wanted, ctx.weight_grad)
    return *found, ctx.no_gradients, None, None, None, None, None, None


heads.register_autograd(_heads_backward, setup_context=_heads_setup)


@torch.library.custom_op("fusedkd::heads_rows", mutates_args=())
@outside_autocast
def heads_rows(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    others: Operands,
    names: str,
    numbers: Tensor,
    chunks: Sequence[int],
    flags: Sequence[bool],
    logits_dtype: Optional[torch.dtype],
    weight_grad: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Loss (N,) and statistics; the gradients that `flags` want are formed in the backward pass."""
    result = _run([x, weight, bias, *others], names, numbers, chunks, [*flags[:2], False, False, False], logits_dtype)
    return result.rows, result.stats


@heads_rows.register_fake
def _(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    others: Operands,
    names: str,
    numbers: Tensor,
    chunks: Sequence[int],
    flags: Sequence[bool],
    logits_dtype: Optional[torch.dtype],
    weight_grad: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    return _outputs([x, weight, bias, *others], flags[0])


def _heads_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, others, ctx.names, numbers, ctx.chunks, flags, ctx.logits_dtype, ctx.weight_grad = inputs
    ctx.flags = [False, *flags[1:]]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, numbers, x, weight, bias, *others)


def _heads_rows_backward(ctx: Any, upstream: Optional[Tensor], *_: Any) -> tuple[Any, ...]:
    refuse_double_backward(upstream)
    numbers, x, weight, bias, *others = saved_of(ctx)
    nothing = no_gradients(others)
    if upstream is None:
        return None, None, None, nothing, None, None, None, None, None, None
    upstream = counted_upstream(upstream, others[3])
    size = size_of(upstream)
    others[4] = upstream / size
    _, _, _, *grads = heads(x, weight, bias, others, ctx.names, numbers, ctx.chunks, ctx.flags, ctx.logits_dtype, None)
    found = _delivered(grads, size, (x, weight, bias), ctx.flags[2:], ctx.weight_grad)
    return *found, nothing, None, None, None, None, None, None


heads_rows.register_autograd(_heads_rows_backward, setup_context=_heads_rows_setup)
