"""What a device can do at best: matrix products and memory traffic, for the planner's expected time.

The table holds data-sheet peaks and what share of them large products and copies usually reach. A device that is not in
it is measured once, with a product and a copy of a few milliseconds.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ceiling(NamedTuple):
    """Floating-point operations and bytes per second."""

    flops: float  # half-precision products accumulated in float32 (on a CPU float32)
    bandwidth: float
    source: str


_REACHED = (0.74, 0.9)  # of peak FLOP/s by a large product, of peak bandwidth by a copy: the H200's; not measured here
_PEAKS = {  # dense bfloat16 FLOP/s and bytes/s of the SXM parts, from their data sheets
    "A100": (312e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}
TABLE = {
    name: Ceiling(flops * _REACHED[0], bandwidth * _REACHED[1], "data sheet, not measured")
    for name, (flops, bandwidth) in _PEAKS.items()
}


def ceiling(device: str | torch.device) -> Ceiling:
    """The ceiling of a device: a part's name from the table, or a torch device that is there.

    Raises ValueError for a name that is neither.
    """
    if isinstance(device, str) and device.upper() in TABLE:
        return TABLE[device.upper()]
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one of {', '.join(TABLE)} or a torch device, got {device!r}") from None
    if where.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(where)
        for key, value in TABLE.items():
            if key in name:
                return value
    if where.type not in ("cpu", "cuda", "xpu") or (where.type != "cpu" and not torch.cuda.is_available()):
        raise ValueError(
            f"device {str(device)!r} is not here; for a plan without it name a part: {', '.join(TABLE)}, or 'cpu'"
        )
    return _measured(str(where))


@functools.cache
def _measured(device: str) -> Ceiling:
    """The best of a few runs of a product and of a copy."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = min(_seconds(lambda: a @ b, device) for _ in range(4))
    x = torch.empty((32 if device == "cpu" else 512) << 18, device=device)
    y = torch.empty_like(x)
    copy = min(_seconds(lambda: y.copy_(x), device) for _ in range(4))
    return Ceiling(2 * size**3 / product, 2 * 4 * x.numel() / copy, "measured on this device")


def _seconds(run: Callable[[], Any], device: str) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
