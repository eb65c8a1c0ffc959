"""`jsd_loss` and `gkd_loss` of ms-swift (signatures of 4.6.0).

swift.rlhf_trainers.gkd_loss.jsd_loss = fusedkd.compat.swift.jsd_loss
swift.rlhf_trainers.gkd_trainer.gkd_loss = fusedkd.compat.swift.gkd_loss
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..divergence import divergence
from ..head import Side
from ..loss import kd_loss
from . import _listed
from ._shared import IGNORED, as_labels

ORIGINAL = "swift.rlhf_trainers.gkd_loss"


def jsd_loss(
    s_logits: Side,
    t_logits: Side,
    beta: float,
    log_softmax_fn: Callable[..., torch.Tensor] | None = None,
    kl_div_fn: Callable[..., torch.Tensor] | None = None,
    chunk_size: int = 512,
) -> torch.Tensor:
    """Sum over rows of the generalised Jensen-Shannon divergence, in nats.

    β·KL(p‖M) + (1 − β)·KL(q‖M) with M = βp + (1 − β)q; β = 0 is KL(p‖q) and β = 1 is KL(q‖p). No T².

    Args:
        s_logits, t_logits: (N, V) logits of student and teacher, already divided by the temperature, or Heads.
        beta: in [0, 1].
        log_softmax_fn, kl_div_fn: hooks. None, or ms-swift's own defaults, is this function; anything else (Megatron's
            vocabulary-parallel pair) is left to ms-swift's own jsd_loss, with all arguments.
        chunk_size: for ms-swift's own; here nothing of N·V elements is made beside the gradient.

    Returns: float32 scalar, a sum: the caller divides. N = 0 gives 0 with a gradient graph.

    Raises: ValueError for a beta outside [0, 1]; ImportError for other hooks where ms-swift is not installed.

    Differences: float32, where the original computes and sums in the dtype of the logits; a column where the teacher's
    logit is −inf is removed from both sides, where the original's value is NaN.
    """
    if not (_is_default(log_softmax_fn, "default_log_softmax") and _is_default(kl_div_fn, "default_kl_div")):
        hooks = {"log_softmax_fn": log_softmax_fn, "kl_div_fn": kl_div_fn}
        given = {name: hook for name, hook in hooks.items() if hook is not None}
        return _original().jsd_loss(s_logits, t_logits, beta, chunk_size=chunk_size, **given)
    return kd_loss(s_logits, t_logits, divergence=divergence("jsd", beta=beta), reduction="sum")


def gkd_loss(
    student_logits: Side,
    teacher_output: Any,
    labels: torch.Tensor,
    beta: float,
    temperature: float,
    gather_fn: Callable[..., torch.Tensor] | None = None,
    log_softmax_fn: Callable[..., torch.Tensor] | None = None,
    kl_div_fn: Callable[..., torch.Tensor] | None = None,
    chunk_size: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over counted tokens of `jsd_loss` beside a teacher's K likeliest tokens, and their number.

    Both sides are renormalised on the K tokens, at the temperature. No T².

    Args:
        student_logits: (B, S, V), or a Head of hidden states (B, S, D).
        teacher_output: ms-swift's TeacherOutput: topk_logprobs, which may be raw logits too, and topk_indices,
            (B, S, K), or full_logits (B, S, V), which are compared as they are; labels, or None for the student's.
        labels: (B, S), already shifted, -100 where a token does not count. As many count in teacher_output.labels, but
            maybe elsewhere: the first is compared with the first. A token whose log-probabilities are all −inf does not
            count.
        beta: in [0, 1], as for `jsd_loss`.
        temperature: divides both.
        gather_fn, log_softmax_fn, kl_div_fn: hooks. None, or ms-swift's own defaults, is this function; anything else
            (Megatron's vocabulary-parallel ones), and full logits of another vocabulary, which ms-swift fills up with
            the other side's, are left to ms-swift's own gkd_loss, with all arguments.
        chunk_size: for ms-swift's own.

    Returns: float32 scalar; 0-d int64.

    Raises: ValueError for labels that count differently; ImportError for other hooks where ms-swift is not installed.

    Differences: float32; a token of which some log-probabilities are −inf has the others, where the original's value is
    NaN. No copy of the counted rows of the logits is made.
    """
    hooks = {"gather_fn": gather_fn, "log_softmax_fn": log_softmax_fn, "kl_div_fn": kl_div_fn}
    defaults = {"gather_fn": "default_gather", "log_softmax_fn": "default_log_softmax", "kl_div_fn": "default_kl_div"}
    values, ids, full = (getattr(teacher_output, name) for name in ("topk_logprobs", "topk_indices", "full_logits"))
    listed = values is not None and ids is not None
    checks.side("student_logits", student_logits)
    plain = all(_is_default(hooks[name], default) for name, default in defaults.items())
    if not listed and full is None:
        raise ValueError("teacher_output must have topk_logprobs and topk_indices, or full_logits, got neither")
    if not plain or not (listed or full.shape[-1] == checks.width(student_logits)):
        given = {name: hook for name, hook in hooks.items() if hook is not None}
        return _original().gkd_loss(
            student_logits, teacher_output, labels, beta, temperature, chunk_size=chunk_size, **given
        )
    checks.positive("temperature", temperature)
    shape, chosen = checks.leading(student_logits), divergence("jsd", beta=beta)
    checks.labels(labels, shape, checks.device(student_logits), IGNORED, 2**62)
    counted = labels != IGNORED
    of_teacher = counted if teacher_output.labels is None else teacher_output.labels != IGNORED
    if values is None or ids is None:
        teacher = _aligned(full, counted, of_teacher, 0)
        loss = kd_loss(
            student_logits, teacher, as_labels(counted), divergence=chosen, temperature=temperature, reduction="sum"
        )
        return loss, counted.sum()
    values = _aligned(values.detach().float(), counted, of_teacher, -torch.inf)
    ids = _aligned(ids, counted, of_teacher, -1)
    names = "teacher_output.topk_indices", "teacher_output.topk_logprobs"
    _listed.check_pair(names[0], ids, names[1], values, shape)
    ids = _listed.present(ids.long(), values)
    counted = counted & (ids >= 0).any(-1)
    tokens = as_labels(counted)
    loss = _listed.renormalized(student_logits, ids, values / temperature, chosen, temperature, tokens)
    return loss.sum(), counted.sum()


def _aligned(x: torch.Tensor, counted: torch.Tensor, of_teacher: torch.Tensor, padding: float) -> torch.Tensor:
    """The teacher's counted rows where the student's are, in order; `padding` elsewhere."""
    if of_teacher is counted or (of_teacher.shape == counted.shape and torch.equal(of_teacher, counted)):
        return x
    ours, theirs = int(counted.sum()), int(of_teacher.sum())
    if ours != theirs:
        raise ValueError(f"teacher_output.labels must count as many tokens as labels, {ours}, got {theirs}")
    moved = x.new_full((*counted.shape, x.shape[-1]), padding)
    moved[counted] = x[of_teacher]
    return moved


def _is_default(hook: Any, name: str) -> bool:
    return hook is None or (getattr(hook, "__module__", None), getattr(hook, "__name__", None)) == (ORIGINAL, name)


@functools.cache
def _original() -> Any:
    """A copy of ms-swift's module, since a name in the module itself may be one of those here."""
    try:
        spec = importlib.util.find_spec(ORIGINAL)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise ImportError(
            "log_softmax_fn or kl_div_fn is not ms-swift's default (or gather_fn, or vocabularies differ), and "
            f"{ORIGINAL}, which computes that, cannot be found: install ms-swift, or leave the hooks out"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
