"""`jsd_loss` of ms-swift (signature of 4.6.0).

swift.rlhf_trainers.gkd_loss.jsd_loss = fusedkd.compat.swift.jsd_loss
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from ..divergence import divergence
from ..head import Side
from ..loss import kd_loss

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
        return _original()(s_logits, t_logits, beta, chunk_size=chunk_size, **given)
    return kd_loss(s_logits, t_logits, divergence=divergence("jsd", beta=beta), reduction="sum")


def _is_default(hook: Any, name: str) -> bool:
    return hook is None or (getattr(hook, "__module__", None), getattr(hook, "__name__", None)) == (ORIGINAL, name)


@functools.cache
def _original() -> Callable[..., torch.Tensor]:
    """ms-swift's jsd_loss from a copy of its module, since the name in the module itself may be this one."""
    try:
        spec = importlib.util.find_spec(ORIGINAL)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise ImportError(
            f"log_softmax_fn or kl_div_fn is not ms-swift's default, and {ORIGINAL}, which computes that, cannot be "
            "found: install ms-swift, or leave both hooks out"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.jsd_loss
