"""verl's engine-side distillation loss (signature of 0.9.1), which fusedkd cannot compute yet."""

from typing import Any, NoReturn

import torch


def compute_forward_kl_topk(
    student_logits: torch.Tensor,
    teacher_topk_log_probs: torch.Tensor,
    teacher_topk_ids: torch.Tensor,
    config: Any,
    data_format: str,
) -> NoReturn:
    """Not there yet: raises NotImplementedError.

    It compares full student rows with the teacher's k likeliest tokens only, teacher_topk_log_probs and
    teacher_topk_ids; fusedkd's teachers are full rows of logits or a `fusedkd.Head`.
    """
    raise NotImplementedError(
        "compute_forward_kl_topk needs a sparse teacher (teacher_topk_log_probs, teacher_topk_ids), which fusedkd does "
        "not have yet: keep verl's own; with full teacher logits use fusedkd.kd_loss"
    )
