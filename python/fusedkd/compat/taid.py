"""The losses of TAID (SakanaAI/TAID, `src/distil_losses/`): modules with the original's names, arguments and buffers.

Each is called as there, `loss(lightning_module=…, logits=…, teacher_logits=…, mask=…, batch=…)`: logits (B, T, V),
already shifted; mask (B, T), 1 where a token counts (other numbers are weights, as there). The result is Σ mask·loss /
Σ mask, a float32 scalar. What a loss does not read of the keywords (`lightning_module`, `batch`) it does not need. The
differences listed in `fusedkd.compat.distillm` hold here too, and either side may be a `fusedkd.Head`, in TAID apart.

Not here: AdaptiveKL, whose original lays the head mask of the sorted vocabulary over the unsorted one
(`fusedkd.compat.abkd.AKL` is the loss as its authors wrote it), and CTKD, whose temperature is learned (kd_loss gives
no gradient to a temperature).
"""

from typing import Any

import torch

from .. import checks
from ..divergence import Divergence, divergence
from ..head import Head, Side
from ..loss import kd_loss
from ..recipes.taid import TAIDSchedule
from ..token_logprobs import token_logprobs
from . import _shared


class _Masked(torch.nn.Module):
    """One divergence and what of the teacher's entropy its value contains."""

    def __init__(self, chosen: Divergence, entropy: float | None = None) -> None:
        super().__init__()
        self.chosen, self.entropy = chosen, entropy

    def forward(self, logits: Side, teacher_logits: Side, mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Σ mask·loss / Σ mask; kwargs: the trainer's context, which the original does not read either."""
        return _shared.mean_loss(logits, teacher_logits, mask, self.chosen, {}, entropy=self.entropy)


class ForwardKL(_Masked):
    """KL(p‖q) + H(p)."""

    def __init__(self) -> None:
        super().__init__(divergence("fkl"), 1.0)


class ReverseKL(_Masked):
    """KL(q‖p)."""

    def __init__(self) -> None:
        super().__init__(divergence("rkl"))


class JS(_Masked):
    """w KL(p‖m) + (1 − w) KL(q‖m), m = w·p + (1 − w)q, w the teacher's weight: GKD's β. 0 at w = 0 and 1."""

    def __init__(self, teacher_weight: float = 0.1) -> None:
        checks.within("teacher_weight", teacher_weight, 0, 1)
        super().__init__(_shared.jsd(teacher_weight))
        self.teacher_weight = teacher_weight


class TVD(_Masked):
    """½ Σ |p − q|."""

    def __init__(self) -> None:
        super().__init__(divergence("tvd"))


class SkewForwardKL(_Masked):
    """KL(p‖w·p + (1 − w)q) + H(p)."""

    def __init__(self, skew_beta: float = 0.1) -> None:
        checks.within("skew_beta", skew_beta, 0, 1)
        super().__init__(divergence("skl", lam=skew_beta), 1.0)
        self.skew_beta = skew_beta


class SkewReverseKL(_Masked):
    """KL(q‖(1 − w)p + w·q), with the gradient of the student inside the mixture."""

    def __init__(self, target_weight: float = 0.1) -> None:
        checks.within("target_weight", target_weight, 0, 1)
        super().__init__(divergence("srkl", lam=target_weight))
        self.target_weight = target_weight


class DKD(torch.nn.Module):
    """Decoupled KD at the labels: T²·Σ mask·(alpha·TCKD + beta·NCKD) / (number of all positions, counted or not).

    The target is `batch["model_inputs"]["labels"][..., 1:]`, with -100 replaced by the tokenizer's pad token as there.
    Better: no NaN where the target takes all of the student's probability (log 0 there), and the target is excluded
    from NCKD instead of receiving a logit of -1000.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(
        self, lightning_module: Any, logits: Side, teacher_logits: Side, mask: torch.Tensor, batch: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The loss; `lightning_module.tokenizer.pad_token_id` is read."""
        target = batch["model_inputs"]["labels"][..., 1:]
        target = torch.where(target == _shared.IGNORED, lightning_module.tokenizer.pad_token_id, target)
        return kd_loss(
            logits, teacher_logits, torch.where(mask != 0, target, _shared.IGNORED),
            divergence=divergence("dkd", alpha=self.alpha, beta=self.beta), temperature=self.temperature,
            temperature_squared=True, token_weights=mask.float(), num_items=max(target.numel(), 1),
        )  # fmt: skip


class TAID(torch.nn.Module):
    """Forward KL from an interpolated teacher m = softmax((1 − t)·stop(logits) + t·teacher_logits): −Σ m log q.

    Buffers t, prev_loss and momentum as there, so that checkpoints go either way (on the CPU until moved; there on
    "cuda" from the start). `fusedkd.TAIDSchedule` moves t, in double precision; a loss that is not finite moves it by
    the line alone (there t is NaN from then on). disable_adaptive: t follows the line.
    The mixture is formed in float32 (there in the logits' dtype) and is exact at t = 0 and 1 also beside −inf (NaN
    there). Logits only: for Heads, `fusedkd.kd_loss` with `fusedkd.divergence("taid", t=schedule.t)` has the same
    gradient and the value KL(m‖q), which lacks the entropy of m.
    Cost: beside the loss, one float32 copy of a sequence's logits at a time.
    Source: Shing et al., TAID, ICLR 2025, eq. 3-8.
    """

    t: torch.Tensor
    prev_loss: torch.Tensor
    momentum: torch.Tensor

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        disable_adaptive: bool = False,
    ) -> None:
        super().__init__()
        TAIDSchedule(1, t_start=t_start, t_end=t_end, alpha=alpha, beta=beta)  # its checks
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.disable_adaptive = disable_adaptive
        self.register_buffer("t", torch.tensor(t_start, dtype=torch.float32))
        self.register_buffer("prev_loss", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("momentum", torch.tensor(0.0, dtype=torch.float32))

    def update_t(self, loss: torch.Tensor, global_step: int, num_train_steps: int) -> torch.Tensor | None:
        """Move t for this loss and return α σ(momentum)(1 − t); the first call stores the loss and returns None."""
        t, previous, momentum, now = torch.stack([self.t, self.prev_loss, self.momentum, loss.float()]).tolist()
        schedule = TAIDSchedule(
            num_train_steps, t_start=self.t_start, t_end=self.t_end, alpha=self.alpha, beta=self.beta
        )
        first = previous == torch.inf
        schedule.load_state_dict(
            {"t": t, "step": global_step - 1, "momentum": momentum, "previous": None if first else previous}
        )
        schedule.update(now)
        state = schedule.state_dict()
        if not first:
            self.t.fill_(schedule.line() if self.disable_adaptive else state["t"])
        self.momentum.fill_(state["momentum"])
        self.prev_loss.fill_(torch.inf if state["previous"] is None else state["previous"])
        return None if schedule.pushed is None else torch.full_like(self.t, schedule.pushed)

    def compute_loss(self, logits: torch.Tensor, teacher_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """−Σ m log q at the present t, Σ mask·loss / Σ mask."""
        for name, side in (("logits", logits), ("teacher_logits", teacher_logits)):
            if isinstance(side, Head):
                raise NotImplementedError(
                    f'TAID needs {name} as logits, got a Head: kd_loss with divergence("taid", t=…) takes Heads'
                )
        t, mask = float(self.t), _shared.summable(mask)
        loss = _shared.mean_loss(logits, teacher_logits, mask, divergence("taid", t=t), {})
        entropy = (_entropies(logits.detach(), teacher_logits.detach(), t) * mask).sum()
        return loss + _shared.over(entropy, mask.sum())

    def forward(
        self,
        lightning_module: Any,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        mask: torch.Tensor,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:
        """{"distil_loss", "tiki_t", "delta_t"}, and t moved; `lightning_module.trainer` tells the step."""
        loss = self.compute_loss(logits, teacher_logits, mask)
        trainer = lightning_module.trainer
        delta = self.update_t(loss.detach(), trainer.global_step, trainer.estimated_stepping_batches)
        return {"distil_loss": loss, "tiki_t": self.t.clone(), "delta_t": delta}


def _entropies(logits: torch.Tensor, teacher_logits: torch.Tensor, t: float) -> torch.Tensor:
    """(B, T) entropies of the interpolated teacher on the common vocabulary."""
    columns = min(logits.shape[-1], teacher_logits.shape[-1])
    ids = torch.zeros(logits.shape[1:-1], dtype=torch.int64, device=logits.device)
    rows = []
    for z, u in zip(logits[..., :columns], teacher_logits[..., :columns], strict=True):
        mixed = u if t == 1 else z if t == 0 else (1 - t) * z.float() + t * u.float()
        rows.append(token_logprobs(mixed, ids, return_entropy=True)[1])
    return torch.stack(rows) if rows else torch.zeros(logits.shape[:-1], device=logits.device, dtype=torch.float32)
