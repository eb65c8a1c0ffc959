"""Seconds of calls, several of them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
Timer = Callable[[Callable[[], object]], float]  # runs something once; seconds

FLUSH = 1 << 29  # bytes that are written before a call is timed: several times any GPU's L2
LEAST_ROUNDS = 3


class Clock:
    """Seconds of one call: device events behind a flushed cache on a GPU, the host's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.flush = None if device == "cpu" else torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Run `work` once; what it returns is kept until the clock has stopped."""
        if self.flush is None:
            start = time.perf_counter()
            kept = work()
            seconds = time.perf_counter() - start
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()  # also keeps the GPU busy while the host queues the first kernels
            begin.record()
            kept = work()
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        del kept
        return seconds


def interleaved(
    work: Mapping[K, Callable[[], object]], clock: Timer, rounds: int, enough: Callable[[], bool]
) -> Iterator[dict[K, float | str]]:
    """Yield round after round the seconds of each item, the first to warm up, the order turned by one every time.

    What fails is left out from then on; its entry of that round is the reason. After three rounds `enough` may end it.
    """
    live = list(work)
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and enough():
            return
        turn = number % max(1, len(live))
        found: dict[K, float | str] = {}
        for name in live[turn:] + live[:turn]:
            try:
                found[name] = clock(work[name])
            except Exception as error:
                found[name] = reason(error)
                live.remove(name)
        yield found


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
