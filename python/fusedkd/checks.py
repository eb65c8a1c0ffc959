"""Arguments of the public functions: every wrong one is named before any work starts."""

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .divergence import Divergence
from .dtypes import accumulation_dtype
from .head import Head, Side, autocast_dtype
from .schedules.operands import Operand, is_operand
from .schedules.topk import TAILS, TRUNCATED
from .sparse import TopK

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_LISTED = 4096  # K of a TopK
Teacher = Side | TopK | Operand


def side(name: str, value: Any, least: int = 1) -> None:
    """A side is a floating-point tensor of logits or a Head of consistent shapes and dtypes, of V >= `least`."""
    if isinstance(value, Head):
        _head(name, value, least)
        return
    tensor(name, value)
    if value.dim() < 1 or value.shape[-1] < least:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(value.shape)}")


def _head(name: str, head: Head, least: int) -> None:
    tensor(f"{name}.hidden", head.hidden)
    tensor(f"{name}.weight", head.weight)
    if head.weight.dim() != 2 or head.weight.shape[0] < least or head.weight.shape[1] < 1:
        raise ValueError(f"{name}.weight must have shape (V, D) with V, D >= 1, got {tuple(head.weight.shape)}")
    if head.hidden.dim() < 1 or head.hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name}.hidden must have shape (..., D) with D = {head.weight.shape[1]} as in {name}.weight, "
            f"got {tuple(head.hidden.shape)}"
        )
    _together(f"{name}.weight", head.weight.device, f"{name}.hidden", head.hidden.device)
    if head.weight.dtype != head.hidden.dtype:
        cast = autocast_dtype(head.hidden.device)
        if cast is None or torch.float64 in (head.weight.dtype, head.hidden.dtype):
            way = "cast one" if cast is not None else "cast one, or call under torch.autocast"
            if cast is None and head.weight.dtype == torch.float32 and head.hidden.dtype in _HALVES:
                way += f" (under fully_shard: MixedPrecisionPolicy(param_dtype={head.hidden.dtype}))"
            raise TypeError(f"{name}.weight is {head.weight.dtype} and {name}.hidden {head.hidden.dtype}: {way}")
    if head.bias is not None:
        tensor(f"{name}.bias", head.bias)
        if head.bias.shape != head.weight.shape[:1]:
            raise ValueError(
                f"{name}.bias must have shape ({head.weight.shape[0]},) like the rows of {name}.weight, "
                f"got {tuple(head.bias.shape)}"
            )
        _together(f"{name}.bias", head.bias.device, f"{name}.hidden", head.hidden.device)
        _bias_dtype(name, head.bias.dtype, head.hidden)
    positive(f"{name}.scale", head.scale)
    if head.softcap is not None:
        positive(f"{name}.softcap", head.softcap)


def _bias_dtype(name: str, bias: torch.dtype, hidden: torch.Tensor) -> None:
    """A bias is added to the logits, which have more digits than half-precision operands: it may be float32 there."""
    allowed: tuple[torch.dtype, ...] = (hidden.dtype,)
    if hidden.dtype in _HALVES:
        allowed = (hidden.dtype, torch.float32)
    if hidden.dtype != torch.float64 and autocast_dtype(hidden.device) is not None:
        allowed = (torch.float32, *_HALVES)
    if bias not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{name}.bias is {bias} and {name}.hidden {hidden.dtype}: the bias must be {names}, cast it")


def _together(name: str, where: torch.device, other: str, elsewhere: torch.device) -> None:
    if where != elsewhere:
        raise ValueError(f"{name} is on {where} and {other} on {elsewhere}: move one")


def has_data(value: torch.Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: not on the meta device, in FakeTensorMode or under torch.compile."""
    return not (torch.compiler.is_compiling() or value.is_meta or isinstance(value, FakeTensor))


def _untransformed(name: str, value: torch.Tensor) -> None:
    """Refuses what torch.func and forward-mode AD wrap: they would see a loss without derivatives."""
    if torch.compiler.is_compiling():
        return
    if is_functorch_wrapped_tensor(value):
        raise NotImplementedError(
            f"{name} is inside a transform of torch.func (grad, vjp, jvp, jacrev, vmap, ...), which cannot follow an "
            "operator with a backward of its own: use backward() or torch.autograd.grad, leading dimensions instead of "
            "vmap, or a plain torch loss"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a forward-mode tangent, and there is no forward-mode derivative: take the inner product "
            "of the tangent with the gradient that torch.autograd.grad gives, or use a plain torch loss"
        )


def tensor(name: str, value: Any) -> None:
    """A plain floating-point tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or (for a side) a fusedkd.Head, got {type(value).__name__}")
    _untransformed(name, value)
    if is_dtensor(value):
        raise TypeError(
            f"{name} is a DTensor, which kd_loss takes for logits and Heads alone: pass {name}.full_tensor(), or "
            f"{name}.to_local() of one that every rank has whole"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}: pass {name}.to_dense()")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor: also while torch.compile traces, which shows less of it."""
    return isinstance(value, torch.Tensor) and type(value).__name__ == "DTensor"


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def number(name: str, value: Any) -> None:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < float(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """A number in [low, high]."""
    number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def integer(name: str, value: Any) -> None:
    """An int that is no bool."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def budget(value: Any) -> None:
    """A memory budget."""
    if value is not None:
        if not _is_integer(value):
            raise TypeError(f"memory_budget must be an int (bytes) or None, got {type(value).__name__}")
        positive("memory_budget", value)


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """One of a few values."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def teacher(value: Any, name: str = "teacher", least: int = 1) -> None:
    """A teacher is a side, a TopK, or an Operand as its class made it."""
    if isinstance(value, TopK):
        top_k(name, value)
    elif not is_operand(value):
        side(name, value, least)


def teachers(value: Any, teacher_ids: Any) -> dict[str, Teacher]:
    """One teacher, or several with the ids that choose among them, by the names that errors give them, unchecked.

    A NamedTuple is a tuple: a Head or TopK is one teacher.
    """
    if not _is_list(value):
        if teacher_ids is not None:
            raise ValueError(
                f"teacher_ids choose among several teachers, and teacher is one {type(value).__name__}: pass a list of "
                "teachers, or leave teacher_ids at None"
            )
        return {"teacher": value}
    if teacher_ids is None:
        raise ValueError("teacher is a list, and teacher_ids says which of them a token has: pass int64 ids (...)")
    named: dict[str, Any] = {f"teacher[{i}]": x for i, x in enumerate(value)}
    if not named:
        raise ValueError("teacher must have at least one member, got an empty list")
    return named


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list) or type(value) is tuple


def teacher_ids(value: Any, count: int, shape: torch.Size, where: torch.device) -> None:
    """int64 in [−1, count), of the leading shape; looked at where labels are."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"teacher_ids must be a torch.Tensor, got {type(value).__name__}")
    _untransformed("teacher_ids", value)
    if value.dtype != torch.int64:
        raise TypeError(f"teacher_ids must be int64, got {value.dtype}: pass teacher_ids.long()")
    if value.shape != shape:
        raise ValueError(f"teacher_ids must have the leading shape {tuple(shape)} of student, got {tuple(value.shape)}")
    _together("teacher_ids", value.device, "student", where)
    if not (has_data(value) and _looks(where)):
        return
    wrong = (value < -1) | (value >= count)
    if bool(wrong.any()):
        raise ValueError(
            f"teacher_ids must lie in [0, {count}), or be -1 for a token without a teacher, got {int(value[wrong][0])}"
        )


def top_k(name: str, value: TopK) -> None:
    """Ids and log-probabilities of one shape, and numbers that they can be, where those can be seen."""
    ids, logprobs = value.ids, value.logprobs
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name}.ids must be a torch.Tensor, got {type(ids).__name__}")
    _untransformed(f"{name}.ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.ids must be int32 or int64, got {ids.dtype}: pass {name}.ids.long()")
    tensor(f"{name}.logprobs", logprobs)
    if logprobs.dtype == torch.float64:
        raise TypeError(f"{name}.logprobs must be float32, bfloat16 or float16, got {logprobs.dtype}: pass .float()")
    if ids.dim() < 1 or not 1 <= ids.shape[-1] <= MOST_LISTED:
        raise ValueError(f"{name}.ids must have shape (..., K) with K from 1 to {MOST_LISTED}, got {tuple(ids.shape)}")
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"{name}.logprobs must have the shape {tuple(ids.shape)} of {name}.ids, got {tuple(logprobs.shape)}"
        )
    _together(f"{name}.ids", ids.device, f"{name}.logprobs", logprobs.device)
    one_of(f"{name}.tail", value.tail, tuple(TAILS))
    positive(f"{name}.temperature", value.temperature)
    if value.vocab_size is not None:
        integer(f"{name}.vocab_size", value.vocab_size)
        positive(f"{name}.vocab_size", value.vocab_size)


def listed(value: TopK, columns: int, name: str = "teacher") -> None:
    """The numbers of a TopK beside a student of which `columns` are compared: looked at where labels are."""
    ids, logprobs = value.ids, value.logprobs
    if not (has_data(ids) and has_data(logprobs) and _looks(ids.device)):
        return
    wrong = (ids < -1) | (ids >= columns)
    if bool(wrong.any()):
        raise ValueError(
            f"{name}.ids must lie in [0, {columns}), or be -1 where a token is absent, got {int(ids[wrong][0])}"
        )
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(
            f"{name}.ids must be distinct in each row, got {int(ordered[..., 1:][twice][0])} twice: leave one out "
            "(id -1), or see fusedkd.TopK.from_vllm, which merges the token that vLLM adds"
        )
    logp = torch.where(ids >= 0, logprobs, -torch.inf).double()
    if bool((logp.isnan() | (logp == torch.inf)).any()):
        raise ValueError(f"{name}.logprobs must be numbers, got NaN or infinity")
    # What rounding to the dtype can have added: half a unit in the last place of each log-probability.
    p, unit = logp.exp(), torch.finfo(logprobs.dtype).eps
    allowed = 1 + (p * logp.clamp(min=-1e4).abs()).sum(-1) * unit + 1e-5
    total = p.sum(-1)
    if bool((total > allowed).any()):
        raise ValueError(
            f"{name}.logprobs must be log-probabilities of one softmax, whose sum is at most 1, got a row of sum "
            f"{float(total.max()):.4g}: pass log_softmax over the full vocabulary, in nats"
        )


def listed_with(
    value: TopK, chosen: Divergence, temperature: float, support: str, return_stats: bool, name: str
) -> None:
    """What a TopK can be compared by."""
    if support != "teacher":
        raise ValueError(
            f"support={support!r} raises small teacher logits, and a TopK has only its largest: leave it at 'teacher'"
        )
    if value.tail != "renormalize" and float(value.temperature) != float(temperature):
        raise ValueError(
            f"temperature must be {value.temperature}, that of the log-probabilities in {name}, got {temperature}: "
            "make them at the temperature of the loss, or use tail='renormalize', from which it can be taken out"
        )
    if value.tail != "truncate":
        return
    form = chosen.form
    if form.definition.name not in TRUNCATED or form.decoupled or form.mix is not None or not _plain(form):
        raise NotImplementedError(
            f"tail='truncate' sums the published integrand of {', '.join(TRUNCATED)} as they are, and divergence is "
            f"{chosen!r}: use tail='bucket', which is a divergence for all of them"
        )
    if return_stats:
        raise NotImplementedError(
            "return_stats=True describes distributions, and tail='truncate' compares none: use tail='bucket'"
        )


def _plain(form: Any) -> bool:
    return not any(isinstance(x, torch.Tensor) or x != 1 for x in (form.target, form.nontarget))


def _looks(where: torch.device) -> bool:
    """Whether numbers are looked at: on a CPU, and elsewhere under FUSEDKD_CHECK=1, which waits for the device."""
    return where.type == "cpu" or os.environ.get("FUSEDKD_CHECK") == "1"


def leading(side_value: Teacher) -> torch.Size:
    """(...) of a side; an Operand's rows are flat."""
    if isinstance(side_value, TopK):
        return side_value.ids.shape[:-1]
    if isinstance(side_value, Head):
        return side_value.hidden.shape[:-1]
    return side_value.shape[:-1] if isinstance(side_value, torch.Tensor) else torch.Size((side_value.rows,))


def width(side_value: Side | Operand) -> int:
    """V of a side."""
    if isinstance(side_value, Head):
        return side_value.weight.shape[0]
    return side_value.shape[-1] if isinstance(side_value, torch.Tensor) else side_value.width


def device(side_value: Teacher) -> torch.device:
    """Where a side lives."""
    if isinstance(side_value, TopK):
        return side_value.ids.device
    if isinstance(side_value, Head):
        return side_value.hidden.device
    return side_value.device if isinstance(side_value, torch.Tensor) else side_value.tensors[0].device


def pair(student: Side, teacher: Teacher, name: str = "teacher") -> None:
    """Both sides describe the same tokens, in the same place."""
    if leading(student) != leading(teacher):
        raise ValueError(
            f"{name} must have the leading shape of student, {tuple(leading(student))}, got {tuple(leading(teacher))}"
        )
    _together("student", device(student), name, device(teacher))


def vocab_size(value: Any, student: Side, *teachers: Teacher) -> int:
    """The number of compared columns."""
    return compared(
        value, width(student), *(given.vocab_size if isinstance(given, TopK) else width(given) for given in teachers)
    )


def compared(value: Any, common: int, *widths: int | None) -> int:
    """The number of compared columns of vocabularies of these widths, of which None says nothing."""
    common = min([common, *(x for x in widths if x)])
    if value is None:
        return common
    if not _is_integer(value):
        raise TypeError(f"vocab_size must be an int or None, got {type(value).__name__}")
    if not 1 <= int(value) <= common:
        raise ValueError(f"vocab_size must be between 1 and {common}, the smaller of the two vocabularies, got {value}")
    return int(value)


def labels(
    value: Any, shape: torch.Size, where: torch.device, ignore_index: int, columns: int, name: str = "labels"
) -> None:
    """int64 labels of the leading shape, in range where that can be seen without a synchronisation."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    _untransformed(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}: pass {name}.long()")
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the leading shape {tuple(shape)} of student (already shifted), got {tuple(value.shape)}"
        )
    _together(name, value.device, "student", where)
    if not has_data(value):
        return
    if _looks(where):
        wrong = (value != ignore_index) & ((value < 0) | (value >= columns))
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must lie in [0, {columns}) or equal ignore_index={ignore_index}, "
                f"got {int(value[wrong][0])} (vocab_size={columns})"
            )


def per_token(name: str, value: Any, shape: torch.Size, where: torch.device) -> None:
    """A floating-point tensor, or a mask, that broadcasts to the leading shape and needs no gradient."""
    if not (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
        tensor(name, value)
    if value.requires_grad:
        raise ValueError(f"{name} requires grad; gradients flow to the student only: pass {name}.detach()")
    _together(name, value.device, "student", where)
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to the leading shape {tuple(shape)} of student, got {tuple(value.shape)}"
        )


def weight_grad(value: Any, student: Side, teachers: Mapping[str, Teacher]) -> None:
    """A buffer that can take the gradient of the student Head's weight, in memory that the call does not read."""
    if value is None:
        return
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "weight_grad cannot be used inside torch.compile, which would hold the buffer constant from the forward to "
            "the backward pass: call kd_loss outside the compiled function, or leave it at None"
        )
    tensor("weight_grad", value)
    if not isinstance(student, Head):
        raise ValueError(
            "weight_grad takes the gradient of the student Head's weight, and student is logits: leave it at None"
        )
    weight = student.weight
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            "weight_grad takes the gradient of student.weight, which does not require grad: leave it at None"
        )
    if value.shape != weight.shape:
        raise ValueError(
            f"weight_grad must have the shape {tuple(weight.shape)} of student.weight, got {tuple(value.shape)}"
        )
    allowed = dict.fromkeys((accumulation_dtype(weight), weight.dtype))
    if value.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"weight_grad must be {names} for a {weight.dtype} student.weight, got {value.dtype}")
    _together("weight_grad", value.device, "student.weight", weight.device)
    if not value.is_contiguous():
        raise ValueError(f"weight_grad must be contiguous, got strides {value.stride()}")
    if value.requires_grad:
        raise ValueError("weight_grad requires grad, and is added to in place: pass weight_grad.detach()")
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "weight_grad was made under torch.inference_mode() and cannot be added to: pass weight_grad.clone()"
        )
    if not has_data(value):
        return
    for name, given in {"student": student, **teachers}.items():
        for part, operand in parts(given).items():
            if isinstance(operand, torch.Tensor) and _overlap(value, operand):
                raise ValueError(f"weight_grad shares memory with {part} of {name}: pass a buffer of its own")


def parts(side_value: Any) -> dict[str, Any]:
    """What a side is made of, by name."""
    if isinstance(side_value, Head | TopK):
        return side_value._asdict()
    if isinstance(side_value, torch.Tensor):
        return {"logits": side_value}
    return {f"tensors[{i}]": x for i, x in enumerate(side_value.tensors)} if is_operand(side_value) else {}


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the spans of two tensors in memory meet."""
    if one.numel() == 0 or other.numel() == 0:
        return False
    spans = []
    for x in (one, other):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    return max(start for start, _ in spans) < min(stop for _, stop in spans)


def targets(chosen: Divergence, given_labels: Any, ce_weight: float) -> None:
    """What needs labels has them."""
    if given_labels is None and chosen.needs_target and chosen.target_token == "label":
        raise ValueError(
            f"divergence {chosen.name!r} with these weights splits off a target token: pass labels, "
            'or target_token="teacher_argmax" in the divergence (or target == nontarget for one without a target)'
        )
    if given_labels is None and ce_weight:
        raise ValueError("ce_weight adds a cross-entropy with the labels: pass labels, or ce_weight=0")
