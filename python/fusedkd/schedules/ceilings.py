"""What a device can do at best: matrix products, memory traffic and instructions, for the model of the time (model.py).

The table holds data-sheet peaks and what share of them large products and copies usually reach. A device that is not in
it is measured once, with a product and a copy of a few milliseconds; of its instructions nothing is known.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """A GPU (SXM) by its data sheet. Peaks are per second, `flops_per_clock` and lanes those of a multiprocessor."""

    architecture: str  # whose machine code was counted
    multiprocessors: int
    flops_per_clock: int  # dense, bfloat16
    fp32_lanes: int
    flops: float  # dense, bfloat16
    bandwidth: float  # bytes

    @property
    def clock(self) -> float:
        """Hz at which the data sheet counts `flops`: lower than the highest clock without tensor cores."""
        return self.flops / (self.multiprocessors * self.flops_per_clock)


class Ceiling(NamedTuple):
    """Floating-point operations and bytes per second; the part, for a device that is in the table."""

    flops: float  # half-precision products accumulated in float32 (on a CPU float32)
    bandwidth: float
    source: str
    part: Part | None = None


# A100: NVIDIA's white paper of the Ampere architecture (108 SMs of 1024 FMA and 64 FP32 lanes), data sheet of the 80 GB
# part. H100: white paper of the Hopper architecture (132 SMs of 2048 FMA and 128 FP32 lanes). H200: its data sheet, the
# same chip with other memory. B200: data sheet of HGX B200 (eight of them); 148 SMs are what the CUDA runtime reports.
PARTS = {
    "A100": Part("sm_80", 108, 2048, 64, 312e12, 2.039e12),
    "H100": Part("sm_90", 132, 4096, 128, 989.4e12, 3.35e12),
    "H200": Part("sm_90", 132, 4096, 128, 989.4e12, 4.8e12),
    "B200": Part("sm_100", 148, 8192, 128, 2250e12, 8.0e12),
}
# What a multiprocessor does in a clock cycle on all of them: its four schedulers issue an instruction of a warp each
# (CUDA C++ Programming Guide, compute capabilities 8.0, 9.0 and 10.0); exp2, log2, 1/x and tanh in float32 give 16
# results (the same, table of the throughput of native arithmetic instructions).
ISSUED, SPECIAL = 4 * 32, 16
# Shares of the peaks, on every part alike; none of it was measured here. Products: on an H200 others measured 661 to
# 768 TFLOP/s in those of a head, 0.67 to 0.78 of its 989.4 (linkedin/Liger-Kernel#1422). Memory: what a long copy is
# assumed to reach; a row kernel of others reached 0.84 on an H100 (2.8 TB/s, huggingface/trl#7244).
REACHED_FLOPS, REACHED_BANDWIDTH = 0.74, 0.9
TABLE = {
    name: Ceiling(part.flops * REACHED_FLOPS, part.bandwidth * REACHED_BANDWIDTH, f"{name} by its data sheet", part)
    for name, part in PARTS.items()
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
