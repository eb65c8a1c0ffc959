"""`TAIDSchedule`: how far the mixed teacher of `taid` has moved, adapted to the loss as the authors do."""

import math
from typing import Any

import torch

from .. import checks


class TAIDSchedule:
    """The interpolation parameter t of TAID, from `t_start` to `t_end`.

    Once per optimizer step:

        schedule = fusedkd.TAIDSchedule(total_steps=1000)
        loss = fusedkd.kd_loss(student, teacher, labels, divergence=fusedkd.divergence("taid", t=schedule.t))
        schedule.update(loss)

    With L the loss of this step and the last, and step s of S:

        rc = (L_prev − L)/(L_prev + 1e-15)    m ← β m + (1−β) rc    Δ = α σ(m) (1 − t)
        t ← min(t_end, max(t_start + (t_end − t_start)·s/S, t + Δ))

    The first call only stores the loss. `update` reads the loss on the host, one synchronisation per step.

    Args:
        total_steps: S > 0, after which t has reached t_end.
        t_start, t_end: 0 ≤ t_start ≤ t_end ≤ 1. alpha: step size > 0. beta: momentum in [0, 1).

    Source: Shing et al., TAID, ICLR 2025, eq. 5-8 and the authors' code (t_start 0.4, or 0.2 for larger teachers).
    """

    def __init__(
        self,
        total_steps: int,
        *,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
    ) -> None:
        checks.integer("total_steps", total_steps)
        checks.positive("total_steps", total_steps)
        checks.within("t_start", t_start, 0, 1)
        checks.within("t_end", t_end, 0, 1)
        if t_end < t_start:
            raise ValueError(f"t_end must not be below t_start={t_start}, got {t_end}")
        checks.positive("alpha", alpha)
        checks.number("beta", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}")
        self.total_steps, self.t_start, self.t_end, self.alpha, self.beta = total_steps, t_start, t_end, alpha, beta
        self.t = float(t_start)
        self.step = 0
        self.pushed: float | None = None  # Δ of the last update, None before there is one
        self._momentum = 0.0
        self._previous: float | None = None

    def update(self, loss: float | torch.Tensor) -> float:
        """Count a step with this loss and return the new t.

        A loss that is not finite, or 0 as of a batch in which nothing counts, moves t by the line alone: relative to it
        every later change would be without bound.
        """
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        self.step += 1
        if not math.isfinite(value) or value == 0:
            self.t = min(self.t_end, max(self.t, self.line()))
            return self.t
        if self._previous is None:
            self._previous = value
            return self.t
        change = (self._previous - value) / (self._previous + 1e-15)
        self._momentum = self.beta * self._momentum + (1 - self.beta) * change
        self._previous = value
        push = min(max(self._momentum, -700.0), 700.0)
        self.pushed = self.alpha / (1 + math.exp(-push)) * (1 - self.t)
        self.t = min(self.t_end, max(self.line(), self.t + self.pushed))
        return self.t

    def line(self) -> float:
        """t_start + (t_end − t_start)·s/S: below it t never is."""
        return self.t_start + (self.t_end - self.t_start) * min(self.step / self.total_steps, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "t": self.t,
            "step": self.step,
            "pushed": self.pushed,
            "momentum": self._momentum,
            "previous": self._previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; without "pushed" in it, as if nothing had been pushed yet."""
        missing = {"t", "step", "momentum", "previous"} - state.keys()
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}: pass what TAIDSchedule.state_dict() returned")
        self.t, self.step = float(state["t"]), int(state["step"])
        self.pushed = state.get("pushed")
        self._momentum, self._previous = float(state["momentum"]), state["previous"]
