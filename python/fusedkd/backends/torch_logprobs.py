"""The row work of `token_logprobs` in plain torch, with the interface of kernels/device/token_logprobs.py."""

import torch

from ..kernels.device.rows import Logits
from ..kernels.maths.decomposition import side_stats
from ..kernels.maths.elementary import exp
from .torch_rows import logits, or_unknown, row_blocks


def value(side: Logits, tokens: torch.Tensor, saved: torch.Tensor, temperature: float) -> None:
    """Fills `saved` (N, SAVED), as device.token_logprobs.value."""
    tiny = torch.finfo(saved.dtype).tiny
    saved.zero_()
    for rows in row_blocks(side.x.shape[2], tokens, len(saved), saved.device):
        y = tokens[rows].unsqueeze(-1)
        s, _ = logits(side, rows, side.x.shape[2], saved.dtype)
        s = s.clamp(min=-1e30)
        s_y = or_unknown(s.gather(1, y))
        s = s.scatter(1, y, -1e30)
        top = s.amax(-1, keepdim=True)
        only_target = top <= -1e30
        top = torch.where(only_target, s_y, top)
        z = (s - top).div_(temperature)
        e = exp.torch(z).masked_fill_(s <= -1e30, 0.0)
        total = e.sum(-1, keepdim=True)
        rest = torch.where(only_target, -1e30, total.clamp(min=tiny).log())
        entropy_sum = e.mul_(z).sum(-1, keepdim=True)
        zy, never = (s_y - top) / temperature, torch.zeros_like(only_target)
        entropy, logprob, lse = side_stats.torch(rest, entropy_sum, zy, 0.0, zy, ~(s_y <= -1e30), never)
        saved[rows] = torch.cat((top, lse, logprob, entropy.clamp(min=0.0)), -1)


def gradient(
    side: Logits,
    tokens: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
    temperature: float,
) -> None:
    """Writes upstream (N, 2) · d(log q_y, H)/dx into `out` (N, V), as device.token_logprobs.gradient."""
    for rows in row_blocks(side.x.shape[2], tokens, len(out), out.device, out):
        y = tokens[rows].unsqueeze(-1)
        s, slope = logits(side, rows, side.x.shape[2], saved.dtype)
        top, lse, _, entropy = saved[rows].unsqueeze(-1).unbind(1)
        up_logprob, up_entropy = upstream[rows].unsqueeze(-1).unbind(1)
        log_q = ((s.clamp(min=-1e30) - top) / temperature).sub_(lse)
        q = exp.torch(log_q)
        g = q.mul_(log_q.add_(entropy).mul_(up_entropy).add_(up_logprob)).neg_().scatter_(1, y, 0.0)
        g.masked_fill_(s <= -1e30, 0.0)
        # A row's gradient sums to 0: at the token nothing cancels this way. It is NaN also without other tokens.
        rest = 0.0 * lse - g.sum(-1, keepdim=True)
        g.scatter_(1, y, torch.where(s.gather(1, y) <= -1e30, 0.0, rest))
        idle = (up_logprob == 0) & (up_entropy == 0)  # whatever the row holds
        out[rows] = (g * slope).div_(temperature).masked_fill_(idle, 0.0).to(out.dtype)
