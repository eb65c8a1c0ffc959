"""A model of a call's time on a GPU that is not here: no measurement, and none has been compared with it.

A row kernel takes the longest of three: all instructions at the rate at which multiprocessors issue them (float32 ones
at that of their lanes, where these are fewer), special functions at their rate, and bytes at the bandwidth. What it
takes for a pair of logits is counted in its machine code, in the loops of the inner tiles (kernels/aot/sass.py);
counts.json has the sums of a kernel's sweeps, and `python -m fusedkd bench model --out bench/results` writes it. A
matrix product takes the longer of FLOPs and bytes. Latency, caches, launches, the last wave of blocks, and what a row
costs once are left out (docs/model.md).
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from ..kernels.divergences import definitions
from ..kernels.maths.definition import Form
from .ceilings import ISSUED, SPECIAL, Ceiling, Part

COUNTS = Path(__file__).with_name("counts.json")
LIMITS = ("FLOPs", "issue", "special", "bytes")


class Counts(NamedTuple):
    """What a kernel takes for a pair of logits: instructions, and of them special functions and float32 operations."""

    instructions: float
    special: float
    fp32: float
    bytes: float


class Counted(NamedTuple):
    """Counts, and whose they are: a variant's name, with what sets it apart from what was asked for."""

    counts: Counts
    of: str


class Product(NamedTuple):
    """A matrix product in some launches, with the FLOPs and bytes of all of them."""

    name: str
    launches: int
    flops: float
    bytes: float


class RowWork(NamedTuple):
    """A row kernel in some launches, with the pairs of all of them, and the bytes of a logit and of a gradient."""

    kernel: str
    launches: int
    pairs: int
    logit_bytes: int
    gradient_bytes: int


class KernelTime(NamedTuple):
    """Modelled milliseconds of one kernel's launches, by each limit; 0 for a limit that it does not have.

    bytes: what it moves, nothing assumed to stay in cache. `ms` is the largest of the four, which `limit` names.
    """

    name: str
    launches: int
    bytes: float
    flops_ms: float
    issue_ms: float
    special_ms: float
    bytes_ms: float

    @property
    def limits(self) -> tuple[float, ...]:
        """Milliseconds in the order of LIMITS."""
        return self.flops_ms, self.issue_ms, self.special_ms, self.bytes_ms

    @property
    def ms(self) -> float:
        """The time."""
        return max(self.limits)

    @property
    def limit(self) -> str:
        """What the time is that of."""
        return LIMITS[self.limits.index(self.ms)]

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.flops_ms > 0


def table(kernels: tuple[KernelTime, ...]) -> str:
    """Return kernels line by line as columns of text."""
    lines: list[tuple[str, ...]] = [("ms, modelled", "launches", *LIMITS, "limit")]
    for kernel in kernels:
        numbers = (f"{ms:,.2f}" if ms else "" for ms in kernel.limits)
        lines.append((kernel.name, f"{kernel.launches}", *numbers, kernel.limit))
    return "\n".join(f"{name:<20}" + "".join(f"{x:>9}" for x in rest) for name, *rest in lines)


@functools.cache
def counted() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return counts by architecture, variant, and kernel with the bytes of a logit and of a gradient."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))["counts"]


def counts_of(kernel: str, form: Form, architecture: str, logit_bytes: int, gradient_bytes: int) -> Counted:
    """Return what a row kernel takes for a divergence.

    A divergence that was not counted takes what the costliest of its tile class takes (kernels/device/tiles.py).
    """
    read = 2 if logit_bytes == 2 else 4
    written = gradient_bytes if "gradient" in kernel else read
    read = max(read, written)  # no gradient wider than its logits was counted
    key = f"{kernel} {read} {written}"
    variants = {name: Counts(*kernels[key]) for name, kernels in counted()[architecture].items() if key in kernels}
    online = form.definition.sweep(form.theta)
    plain, mixed = form.definition.variant(online), form.mix is not None
    exact = ("mixed_" if mixed else "") + form.definition.variant(online, form.decoupled)
    if exact in variants:
        return Counted(variants[exact], exact)
    if plain in variants:  # a structure adds numbers to a row, and nothing to a pair
        return Counted(variants[plain], f"{plain} without mixing" if mixed else plain)
    tiles = {known.variant(sweep): sweep.tile for known in definitions().values() for sweep in known.sweeps}
    alike = [name for name in variants if tiles.get(name) == online.tile] or list(variants)
    costliest = max(alike, key=lambda name: variants[name].instructions)
    return Counted(variants[costliest], f"{costliest}, the costliest of the class {online.tile!r}")


def counted_as(work: RowWork, form: Form, best: Ceiling) -> str:
    """Return whose machine code `time_of_rows` has the counts of, in words; nothing if it has none."""
    if best.part is None:
        return ""
    return f"{_counts(work, form, best.part).of} on {best.part.architecture}"


def time_of_product(product: Product, best: Ceiling) -> KernelTime:
    """Return the time of a matrix product."""
    name, launches, flops, moved = product
    return KernelTime(name, launches, moved, 1e3 * flops / best.flops, 0.0, 0.0, 1e3 * moved / best.bandwidth)


def time_of_rows(work: RowWork, form: Form, best: Ceiling) -> KernelTime:
    """Return the time of a row kernel; without a part by name that of its bytes, as the kernel's formulas have them."""
    if best.part is None:
        return time_of_counts(work, Counts(0.0, 0.0, 0.0, _least_bytes(work, form)), best)
    return time_of_counts(work, _counts(work, form, best.part).counts, best)


def _counts(work: RowWork, form: Form, part: Part) -> Counted:
    return counts_of(work.kernel, form, part.architecture, work.logit_bytes, work.gradient_bytes)


def time_of_counts(work: RowWork, counts: Counts, best: Ceiling) -> KernelTime:
    """Return the time of a row kernel that takes so much for a pair."""
    issue = special = 0.0
    if best.part is not None:
        clocks = 1e3 * work.pairs / (best.part.multiprocessors * best.part.clock)  # in ms, of a pair a clock each
        issue = clocks * max(counts.instructions / ISSUED, counts.fp32 / best.part.fp32_lanes)
        special = clocks * counts.special / SPECIAL
    moved = work.pairs * counts.bytes
    return KernelTime(work.kernel, work.launches, moved, 0.0, issue, special, 1e3 * moved / best.bandwidth)


def _least_bytes(work: RowWork, form: Form) -> float:
    """Of a pair: both logits in each sweep, and the gradient."""
    sweeps = {
        "value": 1 + (form.definition.sweep(form.theta).sums is None),
        "absorb": 1,
        "add_sums": 1,
        "chunk_gradient": 1,
    }
    reads = sweeps.get(work.kernel) or sweeps["value"] + 1
    return 2.0 * reads * work.logit_bytes + (work.gradient_bytes if "gradient" in work.kernel else 0)
