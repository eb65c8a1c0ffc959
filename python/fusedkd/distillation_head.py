"""`DistillationHead`: both output layers in one module, for wrappers that gather weights around a module's forward."""

from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checks import positive
from .divergence import Divergence, as_divergence
from .head import Head
from .loss import kd_loss
from .module import check_options

_UNIT = (
    "call fully_shard on the DistillationHead, or on the module whose forward calls it, and not on the lm_head; shard "
    "tied weights as one unit, by that of the module that holds both"
)


class DistillationHead(torch.nn.Module):
    """Two `lm_head`s and the divergence between what they make of hidden states; `kd_loss` of two Heads as a module.

    A Head takes a weight as it is. Where a wrapper shards the weights (`fully_shard`, FSDP2), they are whole only while
    the forward of the wrapped module runs, and their gradients are reduced in its backward pass: the loss has to be
    called there. This module holds the output layers and calls `kd_loss` in its forward:

        head = DistillationHead(student.lm_head, teacher.lm_head, "jsd", student_softcap=30.0)
        fully_shard(root)  # root's forward calls head(student_hidden, teacher_hidden, labels)

    It is as right under DDP and in a single process, where it returns what kd_loss returns, bit for bit.

    Args:
        student_lm_head: an nn.Linear of shape (V, D_student), with or without bias. It is a submodule, and its
            parameters are those objects: a weight tied to an embedding stays tied, and gets both gradients.
        teacher_lm_head: likewise, of shape (V_teacher, D_teacher). No gradient ever flows into it. Its parameters are
            left as they are, since a teacher may learn as another head's student. Freeze one that does not, whole:
            `teacher.requires_grad_(False)`; DDP raises for parameters that get no gradient. In self-distillation it is
            the student's own, which goes on learning.
        divergence: as for `kd_loss`.
        student_softcap: c in c·tanh(logits/c), or None; `teacher_softcap` likewise. `student_scale` and `teacher_scale`
            multiply the logits before it (Cohere's `logit_scale`).
        options: any other option of `kd_loss`. Each can be given again at call time (num_items and token_weights
            usually are, weight_grad must be).

    Shape:
        forward(student_hidden, teacher_hidden, labels=None, **options): (..., D_student) and (..., D_teacher) float,
        (...) int64, already shifted. Hidden states have the dtype of their weight as it is while forward runs: under
        FSDP2 the policy's `param_dtype`. Returns what kd_loss does, in nats.

    Data parallelism:
        FSDP and DDP average gradients over ranks. With `num_items` = (counted tokens of all ranks) / (world size) that
        average is the gradient of the mean over all counted tokens; the default, the mean of each rank's own tokens,
        weighs a token of a rank with few of them more. Give a Python number or an integer tensor, since a mixed
        precision policy rounds float tensors that pass into a unit: 1001 is 1000 in bfloat16.

    Raises:
        TypeError: at construction and at each call, for an lm_head that is not computed as nn.Linear: wrapped by LoRA,
            quantised, with a forward of its own, or with forward hooks, none of which would run. For hidden states of
            another dtype than the weight's, as for `kd_loss`: float32 weights beside bfloat16 hidden states want
            MixedPrecisionPolicy(param_dtype=torch.bfloat16) or autocast.
        RuntimeError: for an lm_head that is a unit of fully_shard by itself; at call, if a weight is still sharded:
            nothing gathers either around this forward.
        NotImplementedError: for weight_grad in a module that is itself sharded, whose gradient has to go to its shards.

    Cost: that of kd_loss. Under FSDP2 each rank holds both weights whole while their unit is gathered: one all-gather
        for forward, one for backward where the unit reshards in between, one reduce-scatter of the student's gradient.
        state_dict has `student_lm_head.*` and `teacher_lm_head.*`.
    """

    def __init__(
        self,
        student_lm_head: torch.nn.Linear,
        teacher_lm_head: torch.nn.Linear,
        divergence: str | Divergence = "fkl",
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_options("DistillationHead", options)
        _check_layer("student_lm_head", student_lm_head)
        _check_layer("teacher_lm_head", teacher_lm_head)
        for name, softcap in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
            if softcap is not None:
                positive(name, softcap)
        positive("student_scale", student_scale)
        positive("teacher_scale", teacher_scale)
        self.student_lm_head, self.teacher_lm_head = student_lm_head, teacher_lm_head
        self.student_softcap, self.teacher_softcap = student_softcap, teacher_softcap
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.divergence = as_divergence(divergence)
        self.options = options

    def forward(
        self,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """kd_loss of the two Heads with this module's options, `options` on top."""
        student, teacher = self.student_lm_head, self.teacher_lm_head
        if not torch.compiler.is_compiling():  # what was looked at once need not be traced
            for name, layer in (("student_lm_head", student), ("teacher_lm_head", teacher)):
                _check_layer(name, layer)
                _check_gathered(name, layer)
            _check_call(self, options)
        chosen: dict[str, Any] = {"divergence": self.divergence, **self.options, **options}
        return kd_loss(
            Head(student_hidden, student.weight, student.bias, self.student_scale, self.student_softcap),
            Head(teacher_hidden, teacher.weight, teacher.bias, self.teacher_scale, self.teacher_softcap),
            labels,
            **chosen,
        )

    def extra_repr(self) -> str:
        """The divergence, and what differs from the defaults."""
        own = {"student_softcap": None, "teacher_softcap": None, "student_scale": 1.0, "teacher_scale": 1.0}
        given = {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        given |= self.options
        return ", ".join([repr(self.divergence), *(f"{key}={value!r}" for key, value in given.items())])


def _check_layer(name: str, layer: Any) -> None:
    """A layer that is known by its weight and bias: what nn.Linear's forward makes of them, and nothing else."""
    if not isinstance(layer, torch.nn.Module):
        kind = type(layer).__name__
        raise TypeError(f"{name} must be a torch.nn.Linear, got {kind}: pass the model's lm_head itself")
    if _is_unit(layer):
        raise RuntimeError(
            f"{name} is a unit of fully_shard by itself, which gathers its weight for its own forward alone, and "
            f"DistillationHead reads the weight without calling that: {_UNIT}"
        )
    if hasattr(layer, "base_layer"):
        _refuse(
            name, layer, "is wrapped by an adapter, and its weight is the base matrix alone",
            "merge it (merge_and_unload() of a LoRA model), or leave lm_head out of the modules it adapts",
        )  # fmt: skip
    # fully_shard and parametrizations swap the class for one that inherits forward.
    if type(layer).forward is not torch.nn.Linear.forward or "forward" in vars(layer):
        _refuse(
            name, layer, "has a forward of its own, of which DistillationHead, which reads weight and bias, sees "
            "nothing (quantised layers, adapters and accelerate's hooks have)",
            "pass a plain torch.nn.Linear, or give kd_loss the logits that the layer makes",
        )  # fmt: skip
    if layer._forward_hooks or layer._forward_pre_hooks:
        _refuse(
            name, layer, "has forward hooks, which would not run: its weight is read, and its forward not called",
            "remove them, or give kd_loss the logits that the layer makes",
        )  # fmt: skip
    weight: Any = layer.weight
    is_sharded = hasattr(weight, "full_tensor")
    wrapped: bool = is_traceable_wrapper_subclass(layer.weight) and not is_sharded
    if wrapped or not weight.is_floating_point():
        kind = type(weight).__name__ if wrapped else str(weight.dtype)
        _refuse(
            name, layer, f"is quantised: its weight is {kind}, no floating-point matrix",
            "leave lm_head out of the quantised modules, or dequantise it into a torch.nn.Linear",
        )  # fmt: skip


def _refuse(name: str, layer: torch.nn.Module, reason: str, instead: str) -> NoReturn:
    raise TypeError(f"{name} ({type(layer).__name__}) {reason}: {instead}")


def _is_unit(module: torch.nn.Module) -> bool:
    """Whether fully_shard was called on a module, told without an import of torch.distributed."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _check_gathered(name: str, layer: torch.nn.Linear) -> None:
    for part, value in (("weight", layer.weight), ("bias", layer.bias)):
        if hasattr(value, "full_tensor"):
            raise RuntimeError(
                f"{name}.{part} is a DTensor inside DistillationHead's forward: the unit of fully_shard that holds it "
                f"has not gathered it for this call: {_UNIT}"
            )


def _check_call(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """What a data-parallel wrapper would make of options of a call."""
    if options.get("weight_grad") is not None and _is_unit(module):
        raise NotImplementedError(
            "weight_grad takes the gradient of a whole weight, and fully_shard keeps that of its shards: leave it at "
            "None and read the parameter's .grad"
        )
    items = options.get("num_items")
    if isinstance(items, torch.Tensor) and items.is_floating_point() and items.dtype.itemsize < 4:
        raise TypeError(
            f"num_items is {items.dtype}, which rounds counts (a mixed-precision policy casts float inputs of a unit): "
            "pass a Python number or an integer tensor"
        )
