"""The row work of `token_logprobs` in plain torch, with the interface of kernels/logprobs.py."""

from collections.abc import Iterator

import torch

from .cpu import BLOCK, logits
from .kernels.maths import softplus
from .kernels.rows import Side


def value(side: Side, tokens: torch.Tensor, saved: torch.Tensor, temperature: float) -> None:
    """Fills `saved` (N, SAVED), as kernels.logprobs.value."""
    tiny = torch.finfo(saved.dtype).tiny
    for rows, y in _blocks(side, tokens):
        s, _ = logits(side, rows, side.x.shape[2], saved.dtype)
        s = s.clamp(min=-1e30)
        s_y = s.gather(1, y)
        s = s.scatter(1, y, -1e30)
        top = s.amax(-1, keepdim=True)
        alone = top <= -1e30
        top = torch.where(alone, s_y, top)
        z = (s - top).div_(temperature)
        e = z.exp().masked_fill_(s <= -1e30, 0.0)
        total = e.sum(-1, keepdim=True)
        rest = torch.where(alone, -1e30, total.clamp(min=tiny).log())
        zy = (s_y - top) / temperature
        logprob = -softplus.torch(rest - zy)
        lse = torch.logaddexp(rest, zy)
        absent = s_y <= -1e30
        heat = e.mul_(z).sum(-1, keepdim=True) * (-lse).exp() + torch.where(absent, 0.0, logprob.exp() * zy)
        columns = (top, lse, torch.where(absent, -torch.inf, logprob), (lse - heat).clamp(min=0.0))
        found = torch.cat(columns, -1)
        saved[rows] = torch.where(tokens[rows].unsqueeze(-1) >= 0, found, 0.0)


def gradient(
    side: Side,
    tokens: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
    temperature: float,
) -> None:
    """Writes upstream (N, 2) · d(log q_y, H)/dx into `out` (N, V), as kernels.logprobs.gradient."""
    for rows, y in _blocks(side, tokens):
        s, slope = logits(side, rows, side.x.shape[2], saved.dtype)
        top, lse, _, entropy = saved[rows].unsqueeze(-1).unbind(1)
        up_logprob, up_entropy = upstream[rows].unsqueeze(-1).unbind(1)
        log_q = ((s.clamp(min=-1e30) - top) / temperature).sub_(lse)
        q = log_q.exp()
        g = q.mul_(log_q.add_(entropy).mul_(up_entropy).add_(up_logprob)).neg_().scatter_(1, y, 0.0)
        g.masked_fill_(s <= -1e30, 0.0)
        # A row's gradient sums to 0: at the token nothing cancels this way.
        g.scatter_(1, y, torch.where(s.gather(1, y) > -1e30, -g.sum(-1, keepdim=True), 0.0))
        out[rows] = (g * slope).div_(temperature).mul_((tokens[rows] >= 0).unsqueeze(-1))
    ignored = tokens < 0
    out[ignored] = 0


def _blocks(side: Side, tokens: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A block of rows at a time and their tokens (n, 1), 0 where there is none."""
    step = max(2, BLOCK // side.x.shape[2])
    for start in range(0, len(tokens), step):
        rows = slice(start, min(start + step, len(tokens)))
        yield rows, tokens[rows].clamp(min=0).unsqueeze(-1)
