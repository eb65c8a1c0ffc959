"""Blocks, warps, barriers and memory of a GPU, with what a sanitizer checks.

A launch's blocks take turns at random; within one, threads run in one of three orders:

    lockstep    all warps together, those behind first: fast
    warps       warps in random turns
    greedy      one warp as far as it gets, until a barrier or an access that may wait for others: makes races show in
                the numbers

Threads of a warp that part run the earliest instruction first, and wait for each other where an instruction needs the
whole warp (reconvergence).

Two accesses of one address race unless both read, both write the same, or one is ordered before the other: by the order
of one thread, by a barrier, or by a release that an acquire has seen. Of an address the last store and the last two
readers of different warps are kept, so that a race with an earlier one may go unseen. What a release covers is the
thread's own accesses and, for all others of its block, those before the last barrier; an acquire holds for its thread,
and for its block from the next barrier on. A fence without an atomic orders nothing here (and is refused). Atomics do
not race with plain accesses. Stores are seen at once by all: what weak memory might delay shows as a race only.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .parse import Kernel
from .translate import SHARED_BASE, Translator

Array = Any
ORDERS = ("greedy", "lockstep", "warps")
UNWRITTEN = 0x7FED  # twice a NaN that no instruction makes: what unwritten() fills memory with
LANES, WARP_RACE, BLOCK_RACE = "unsynchronised lanes", "race between warps", "race between blocks"
RACES = ("", LANES, WARP_RACE, BLOCK_RACE)
ROUNDING, REPLICAS = "replicas differ by rounding", "replicas differ"
BENIGN = (LANES, ROUNDING)
ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x, "exch": lambda old, x: x, "max": max, "min": min, "or": lambda old, x: old | x,
    "and": lambda old, x: old & x, "cas": lambda old, wanted, x: x if old == wanted else old,
}  # fmt: skip
_NORESERVE = 0x4000  # of Linux; named in mmap since Python 3.13
_NUMBER, _EPOCH, _SYNC = 44, 24, 10  # where a stamp holds block, barriers so far, warp barriers; below them the thread


class Finding(NamedTuple):
    """What a sanitizer would report."""

    kind: str
    kernel: str
    source: str  # file:line:column
    where: str  # threads or addresses, of the first time


class Fault(Exception):
    """What ends a launch; `finding` says the same."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.kind}: {finding.kernel}, {finding.source}: {finding.where}")
        self.finding = finding


def sparse(units: int, dtype: str) -> Array:
    """Zeros that take memory only where they are touched, however many they are."""
    size = max(units, 1) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)


class Shadow:
    """Who wrote and read each unit of memory last, as stamps (block, epoch, warp barriers, thread; 0: nobody)."""

    def __init__(self, units: int) -> None:
        self.writer, self.reader, self.other = (
            sparse(units, "i8") for _ in range(3)
        )  # other: a reader of another warp
        self.lines = tuple(sparse(units, "i4") for _ in range(3))  # of the PTX, of these three

    def load(self, c: Threads, units: Array, threads: Array, line: int) -> tuple[int, int, int]:
        """The worst access that is not ordered before this one: place in RACES, its PTX line and stamp."""
        found = self._worst(c, units, threads, (0,))
        new, old = c.stamp(threads), self.reader[units]
        apart = old >> 5 != new >> 5
        self.other[units] = np.where(apart, old, self.other[units])
        self.lines[2][units] = np.where(apart, self.lines[1][units], self.lines[2][units])
        self.reader[units], self.lines[1][units] = new, line
        return found

    def store(self, c: Threads, units: Array, threads: Array, same: Array, line: int) -> tuple[int, int, int]:
        """The same; `same`: where memory already holds what is stored, another store of it is no race."""
        found = self._worst(c, units, threads, (0, 1, 2), same)
        self.writer[units], self.lines[0][units] = c.stamp(threads), line
        self.reader[units] = 0
        self.other[units] = 0
        return found

    def _worst(
        self, c: Threads, units: Array, threads: Array, which: Sequence[int], same: Array | None = None
    ) -> tuple[int, int, int]:
        best = (0, 0, 0)
        for i in which:
            past = (self.writer, self.reader, self.other)[i][units]
            bad = c.cta.unordered(c, past, threads)
            if same is not None and i == 0:
                bad[same] = 0
            at = int(bad.argmax()) if len(bad) else 0
            if len(bad) and bad[at] > best[0]:
                best = (int(bad[at]), int(self.lines[i][units[at]]), int(past[at]))
        return best


class Region:
    """Memory at [base, base + size): a tensor's storage, or the shared memory of a block."""

    def __init__(self, base: int, raw: Array, name: str, *, item: int = 1, whole: bool = True, floating: bool = False):
        self.base, self.size, self.name, self.item, self.floating = base, len(raw), name, item, floating
        self.views = {width: raw[: len(raw) // width * width].view(f"u{width}") for width in (1, 2, 4, 8)}
        self.unit = min(item, 2)  # bytes that share a stamp
        self.shadow: Shadow | None = None
        self.seen = None if whole else sparse(self.size, "?")  # the bytes of the views that the kernel was given
        self.written: Array = None  # of shared memory

    @classmethod
    def at(cls, base: int, size: int, name: str, **about: Any) -> Region:
        """The process's own memory."""
        return cls(base, np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8), name, **about)

    def describe(self, address: int) -> str:
        """An address in words."""
        return f"byte {address - self.base} of {self.name} with {self.size} bytes"


class Clock:
    """What has been ordered before something: per block the epochs below a bound, and single threads' epochs."""

    def __init__(self) -> None:
        self.bounds: dict[int, int] = {}
        self.threads: set[int] = set()  # stamps without warp barriers

    def merge(self, other: Clock | None) -> None:
        """And what `other` knows."""
        if other is not None:
            self.threads |= other.threads
            for block, bound in other.bounds.items():
                self.bounds[block] = max(bound, self.bounds.get(block, 0))

    def orders(self, stamp: int) -> bool:
        """Whether an access of that stamp is known to be over."""
        epoch = stamp >> _EPOCH & (1 << _NUMBER - _EPOCH) - 1
        return epoch < self.bounds.get(stamp >> _NUMBER, 0) or _without_warp_barriers(stamp) in self.threads


def _without_warp_barriers(stamp: int) -> int:
    return stamp & ~((1 << _EPOCH) - (1 << _SYNC))


class Threads:
    """Threads that one call of a block's function serves: one warp, or all of a block in lockstep."""

    def __init__(self, cta: Cta, lanes: Array) -> None:
        program, grid = cta.grid.program, cta.grid
        self.cta, self.lanes, self.size = cta, lanes, len(lanes)
        self.registers = [np.full(self.size, garbage) for garbage in program.garbage]
        self.params = {name: np.full(self.size, value) for name, value in grid.params.items()}
        number = {
            "%tid.x": lanes,
            "%laneid": lanes % 32,
            "%ntid.x": cta.size,
            "%ctaid.x": cta.number,
            "%nctaid.x": grid.size,
        }
        zeros = dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0)
        self.special = {k: np.broadcast_to(np.asarray(v, "u4"), (self.size,)) for k, v in (number | zeros).items()}
        self.warp_barriers = np.zeros(cta.size // 32, np.int64)
        self.paused = False
        self.together: int | None = 0  # the block of instructions at which all are, or None and each thread's own
        self.places, self.parked = np.zeros(self.size, np.int64), np.zeros(self.size, bool)
        self.end = len(program.kernel.blocks)

    def full(self, x: Array) -> Array:
        """One number per thread."""
        return x if np.ndim(x) else np.full(self.size, x)

    def pairs(self, x: Array) -> Array:
        """64-bit registers as two floats each."""
        return np.ascontiguousarray(self.full(x)).view("f4")

    # Control

    def step(self) -> str:
        """Runs one block of instructions; says how it ended: run, pause (others may go on), wait (barrier) or done."""
        grid = self.cta.grid
        program = grid.program
        at, m = (self.together, None) if self.together is not None else self._choose()
        grid.counts[at] += self.size // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
        taken = program.functions[at](self.registers, m, self)
        kind, label = program.ends[at]
        target = program.kernel.labels[label] if kind == "bra" else self.end if kind == "ret" else at + 1
        if taken is not None and self.together is not None:
            if taken.all():
                taken = None
            elif not taken.any():
                taken, target = None, at + 1
        if self.together is not None and taken is None:
            self.together = target
        else:
            self._scatter()
            here = slice(None) if m is None else m
            self.places[here] = target if taken is None else np.where(taken, target, at + 1)[here]
        if kind == "bar":
            self.parked[slice(None) if m is None else m] = True
        return self._state(kind)

    def _scatter(self) -> None:
        if self.together is not None:
            self.places[:], self.together = self.together, None

    def _state(self, kind: str) -> str:
        self.paused = kind == "pause"
        going = "pause" if self.paused else "run"
        if self.together is not None:
            return "wait" if kind == "bar" else "done" if self.together >= self.end else going
        if ((self.places < self.end) & ~self.parked).any():
            return going
        return "wait" if self.parked.any() else "done"

    def _choose(self) -> tuple[int, Array | None]:
        """The earliest instructions that can run, and the threads there; where a warp is needed, whole warps only."""
        blocks = self.cta.grid.program.kernel.blocks
        live = (self.places < self.end) & ~self.parked
        at = int(self.places[live].min())
        if self.paused:  # those at the earliest may be waiting for the others
            at = int(self.cta.grid.dice.choice(self.places[live]))
        m = live & (self.places == at)
        if m.all():
            self.together = at
            return at, None
        if blocks[at].whole_warps:
            for at in np.unique(self.places[live]).tolist():
                m = live & (self.places == at)
                if blocks[at].whole_warps:
                    m &= np.repeat(m.reshape(-1, 32).all(1), 32)
                if m.any():
                    return at, m
            at = int(self.places[live].min())
            first = next(i for i in blocks[at].code if i.op != "bar.sync" and (".sync" in i.op or ".warp" in i.op))
            self.cta.fault(
                "diverged warp", f"{first.op} without all threads of the warp", first.line, live.nonzero()[0]
            )
        return at, m

    def waiting_at(self) -> set[int]:
        """The blocks of instructions behind the barriers at which threads are."""
        return {self.together} if self.together is not None else set(self.places[self.parked].tolist())

    def release(self) -> bool:
        """Past the barrier; whether some of the threads have left the kernel."""
        left = self.together is None and bool((~self.parked).any())
        self.parked[:] = False
        return left

    # Warps

    def _converged(self, m: Array, mask: Array, line: int) -> None:
        if m is not None:
            warps = m.reshape(-1, 32)
            if (partly := warps.any(1) & ~warps.all(1)).any():
                self.cta.fault(
                    "diverged warp", "some threads of the warp are elsewhere", line, [int(partly.argmax()) * 32]
                )
        if not (np.asarray(mask) == -1).all():
            raise NotImplementedError(f"{self.cta.grid.program.kernel.instructions[line].text} for a part of a warp")

    def shuffle(self, how: str, x: Array, b: Array, clamp: Array, mask: Array, m: Array, line: int) -> Array:
        """shfl.sync."""
        self._converged(m, mask, line)
        lane = self.lanes % 32
        segment = (clamp >> 8) & 31
        top, low = (lane & segment) | (clamp & 31 & ~segment), lane & segment
        if how == "bfly":
            source = lane ^ b
        elif how == "idx":
            source = low | (b & ~segment & 31)
        else:
            source = lane - b if how == "up" else lane + b
        fits = source >= top if how == "up" else source <= top
        return self.full(x)[(np.arange(self.size) & ~31) + np.where(fits, source, lane)]

    def reduce(self, how: str, x: Array, mask: Array, m: Array, line: int) -> Array:
        """redux.sync."""
        self._converged(m, mask, line)
        x = self.full(x)
        floating = {"max": np.fmax, "min": np.fmin, "nanmax": np.maximum, "nanmin": np.minimum}
        integer = {"max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or,
                   "xor": np.bitwise_xor}  # fmt: skip
        function = (floating if x.dtype.kind == "f" else integer)[how]
        return np.repeat(function.reduce(x.reshape(-1, 32), axis=1), 32).astype(x.dtype)

    def vote(self, how: str, p: Array, mask: Array, m: Array, line: int) -> Array:
        """vote.sync."""
        self._converged(m, mask, line)
        rows = self.full(p).reshape(-1, 32)
        if how == "ballot":
            return np.repeat((rows * (np.uint32(1) << np.arange(32, dtype=np.uint32))).sum(1).astype(np.uint32), 32)
        return np.repeat(rows.any(1) if how == "any" else rows.all(1), 32)

    def warp_barrier(self, mask: Array, m: Array, line: int) -> None:
        """bar.warp.sync; in a block of one warp it is a barrier of the block."""
        self._converged(m, mask, line)
        if self.cta.size == 32:
            self.cta.next_epoch()
        self.warp_barriers[np.unique((self.lanes if m is None else self.lanes[m]) >> 5)] += 1

    # Memory

    def stamp(self, threads: Array) -> Array:
        """Who and when, as one number."""
        warps = (self.warp_barriers[threads >> 5] & (1 << _EPOCH - _SYNC) - 1) << _SYNC
        return (self.cta.number << _NUMBER | self.cta.epoch << _EPOCH) + (warps | threads)

    def _access(
        self, space: str, address: Array, offset: int, nbytes: int, mask: Array, line: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        """The regions that an access touches: region, places within the group, addresses."""
        places = np.arange(self.size) if mask is None else self.full(mask).nonzero()[0]
        if not len(places):
            return
        address = self.full(address)[places].astype(np.int64) + offset
        if (wrong := address & (nbytes - 1) != 0).any():
            what = f"{space} access of {nbytes} bytes at {int(address[wrong][0]):#x}"
            self.cta.fault("misaligned access", what, line, self.lanes[places[wrong]])
        for region, mine in self.cta.find(space, address, nbytes, line, self.lanes[places]):
            some, who = (address, places) if mine is None else (address[mine], places[mine])
            if region.seen is not None:
                inside = region.seen[(some - region.base)[:, None] + np.arange(nbytes)].all(1)
                if not inside.all():
                    at = region.describe(int(some[~inside][0]))
                    self.cta.fault(
                        "out of bounds", f"{at}, between the rows of the views", line, self.lanes[who[~inside]]
                    )
            yield region, who, some

    def load(
        self, space: str, address: Array, offset: int, size: int, n: int, mask: Array, line: int, mode: str, scope: str
    ) -> Array:
        """n numbers of `size` bytes from each address: (n, threads)."""
        out = np.zeros((n, self.size), f"u{size}")
        for region, who, some in self._access(space, address, offset, size * n, mask, line):
            index = (some - region.base) // size
            for j in range(n):
                out[j, who] = region.views[size][index + j]
            self._check_written(region, out, who, some, size, line)
            if mode == "acquire":
                for thread, place in zip(self.lanes[who].tolist(), some.tolist(), strict=True):
                    self.cta.acquire(thread, place, scope)
            elif mode == "weak" and self.cta.grid.races:
                self._race(region, some, who, size * n, line, None)
        return out

    def _check_written(self, region: Region, out: Array, who: Array, some: Array, size: int, line: int) -> None:
        if region.written is not None:
            unwritten = ~region.written[(some - region.base)[:, None] + np.arange(size * len(out))].all(1)
        elif region.floating and size >= region.item:
            numbers = np.ascontiguousarray(out[:, who]).view(f"u{region.item}")
            mark = int.from_bytes(UNWRITTEN.to_bytes(2, "little") * (region.item // 2), "little")
            unwritten = (numbers == numbers.dtype.type(mark)).reshape(len(out), len(who), -1).any((0, 2))
        else:
            return
        if unwritten.any():
            at = region.describe(int(some[unwritten][0]))
            self.cta.note("read of unwritten memory", at, line, self.lanes[who[unwritten]])

    def store(
        self, space: str, address: Array, offset: int, size: int, values: tuple[Array, ...], mask: Array, line: int,
        mode: str, scope: str,
    ) -> None:  # fmt: skip
        """Some numbers of `size` bytes to each address."""
        n = len(values)
        for region, who, some in self._access(space, address, offset, size * n, mask, line):
            view, index = region.views[size], (some - region.base) // size
            same = np.ones(len(who), bool)
            for j in range(n):
                same &= view[index + j] == values[j][who]
            if mode == "release":
                for thread, place in zip(self.lanes[who].tolist(), some.tolist(), strict=True):
                    self.cta.publish(thread, place, scope)
            elif mode == "weak" and self.cta.grid.races:
                self._race(region, some, who, size * n, line, same & (region.written is None))
            if not same.all():
                self.cta.grid.changes += 1
            for j in range(n):
                view[index + j] = values[j][who]
            if region.written is not None:
                region.written[(some - region.base)[:, None] + np.arange(size * n)] = True
            for j in range(n):
                if (view[index + j] != values[j][who]).any():
                    self._replicas(values[j][who], view[index + j], line, who, some)

    def _replicas(self, ours: Array, kept: Array, line: int, who: Array, some: Array) -> None:
        """Threads of one instruction stored different bits to one address: rounding, or more than that."""
        kind, what = REPLICAS, "not numbers"
        if ours.dtype.itemsize == 4:
            one, two = (np.ascontiguousarray(x).view("f4").astype("f8") for x in (ours, kept))
            gap = np.abs(one - two) / np.maximum(np.maximum(np.abs(one), np.abs(two)), 1e-30)
            worst = float(np.where(np.isfinite(gap), gap, np.where(one == two, 0, np.inf)).max())
            kind, what = (ROUNDING if worst < 1e-4 else REPLICAS), f"by {worst:.1e} of their size"
        self.cta.note(kind, what, line, self.lanes[who[ours != kept]])
        winners = dict(zip(some.tolist(), (self.lanes[who] >> 5).tolist(), strict=True))
        lost = (ours != kept).nonzero()[0]
        if self.cta.grid.races and any(winners[int(some[i])] != self.lanes[who[i]] >> 5 for i in lost):
            self.cta.note(WARP_RACE, "two warps store at once", line, self.lanes[who[lost]])

    def _race(self, region: Region, some: Array, who: Array, nbytes: int, line: int, same: Array | None) -> None:
        if region.shadow is None:
            region.shadow = Shadow(region.size // region.unit + 1)
        per = max(1, nbytes // region.unit)
        units = (((some - region.base) // region.unit)[:, None] + np.arange(per)).ravel()
        threads = np.repeat(self.lanes[who], per)
        if same is None:
            worst, other, past = region.shadow.load(self, units, threads, line)
        else:
            worst, other, past = region.shadow.store(self, units, threads, np.repeat(same, per), line)
        if worst:
            before = self.cta.grid.program.kernel.instructions[other]
            what = "load" if same is None else "store"
            them = f"{before.op} of {before.source} by thread {past & 1023} of block {past >> _NUMBER}"
            self.cta.note(RACES[worst], f"{what} in {region.name} after {them}", line, threads)

    def _rows(self, count: int, m: Array) -> Array:
        mask = np.arange(self.size) % 32 < 8 * count
        return mask if m is None else mask & m

    @staticmethod
    def _elements(transposed: bool) -> tuple[tuple[Array, Array], ...]:
        lane = np.arange(32)
        pairs = (lane // 4, 2 * (lane % 4)), (lane // 4, 2 * (lane % 4) + 1)
        return tuple((b, a) if transposed else (a, b) for a, b in pairs)

    def load_matrices(
        self, space: str, address: Array, offset: int, count: int, transposed: bool, m: Array, line: int
    ) -> list[Array]:
        """ldmatrix: thread 8i + r of a warp gives the address of row r (16 bytes) of its i-th matrix of 8 x 8 halves;
        thread l gets elements 2(l % 4) and the next of row l / 4, or those of the transposed matrix."""
        self._converged(m, np.int32(-1), line)
        raw = self.load(space, address, offset, 4, 4, self._rows(count, m), line, "weak", "gpu")
        data = np.ascontiguousarray(raw.T).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        (a, b), (d, e) = self._elements(transposed)
        both = (data[:, i, a, b].astype("u4") | data[:, i, d, e].astype("u4") << np.uint32(16) for i in range(count))
        return [x.reshape(-1) for x in both]

    def store_matrices(
        self, space: str, address: Array, offset: int, values: tuple[Array, ...], transposed: bool, m: Array, line: int
    ) -> None:
        """stmatrix: the other way round."""
        self._converged(m, np.int32(-1), line)
        data = np.zeros((self.size // 32, 4, 8, 8), np.uint16)
        (a, b), (d, e) = self._elements(transposed)
        for i, x in enumerate(values):
            data[:, i, a, b] = (x & np.uint32(0xFFFF)).astype("u2").reshape(-1, 32)
            data[:, i, d, e] = (x >> np.uint32(16)).astype("u2").reshape(-1, 32)
        raw = data.reshape(self.size, 8).view(np.uint32)
        rows = tuple(np.ascontiguousarray(raw[:, j]) for j in range(4))
        self.store(space, address, offset, 4, rows, self._rows(len(values), m), line, "weak", "gpu")

    def atomic(
        self, space: str, address: Array, offset: int, kind: Any, how: str, values: tuple[Array, ...], mask: Array,
        line: int, order: str, scope: str,
    ) -> Array:  # fmt: skip
        """One thread after the other; what was there before."""
        out = np.zeros(self.size, kind)
        for region, who, some in self._access(space, address, offset, kind.itemsize, mask, line):
            view = region.views[kind.itemsize].view(kind)
            for thread, place in zip(who.tolist(), some.tolist(), strict=True):
                i = (place - region.base) // kind.itemsize
                if order in ("acq_rel", "acquire"):
                    self.cta.acquire(int(self.lanes[thread]), place, scope)
                if order in ("acq_rel", "release"):
                    self.cta.publish(int(self.lanes[thread]), place, scope)
                old = view[i]
                new = ATOMIC[how](old, *(v[thread] for v in values))
                self.cta.grid.changes += bool(new != old)
                view[i], out[thread] = new, old
        return out


class Cta:
    """One block of threads."""

    def __init__(self, grid: Grid, number: int) -> None:
        self.grid, self.number, self.size = grid, number, grid.program.kernel.threads
        self.epoch = 1  # barriers so far, from 1 so that no stamp is 0
        self.clock, self.acquired = Clock(), dict[int, Clock]()  # of all threads; of single ones until the next barrier
        self.shared = Region(
            SHARED_BASE, np.zeros(grid.program.shared + 15, np.uint8)[: grid.program.shared], "shared memory"
        )
        self.shared.written = np.zeros(grid.program.shared, bool)
        width = self.size if grid.order == "lockstep" else 32
        self.groups = [grid.threads(self, np.arange(i, i + width)) for i in range(0, self.size, width)]

    # Reports

    def note(self, kind: str, what: str, line: int, threads: Sequence[int]) -> Finding:
        """A finding."""
        return self.grid.note(kind, what, line, threads, self.number)

    def fault(self, kind: str, what: str, line: int, threads: Sequence[int]) -> NoReturn:
        """A finding that ends the launch."""
        raise Fault(self.note(kind, what, line, threads))

    # Memory

    def find(
        self, space: str, address: Array, nbytes: int, line: int, lanes: Array
    ) -> list[tuple[Region, Array | None]]:
        """The regions of addresses, with a mask where they are several."""
        regions, bases = ([self.shared], [SHARED_BASE]) if space == "shared" else (self.grid.regions, self.grid.bases)
        low, high = int(address.min()), int(address.max())
        i = bisect_right(bases, low) - 1
        if i >= 0 and high + nbytes <= bases[i] + regions[i].size:
            return [(regions[i], None)]
        at = np.searchsorted(bases, address, side="right") - 1
        stops = np.array([base + region.size for base, region in zip(bases, regions, strict=True)] + [0])
        outside = address + nbytes > stops[at]  # at = -1: below all, compared with 0
        if outside.any():
            place = int(address[outside][0])
            near = min(regions, key=lambda r: min(abs(place - r.base), abs(place - r.base - r.size)), default=None)
            what = f"{place:#x}" if near is None else near.describe(place)
            self.fault("out of bounds", f"{space} access of {nbytes} bytes at {what}", line, lanes[outside])
        return [(regions[i], at == i) for i in np.unique(at).tolist()]

    def unordered(self, c: Threads, past: Array, threads: Array) -> Array:
        """For each earlier access its place in RACES."""
        number, epoch, thread = past >> _NUMBER, past >> _EPOCH & (1 << _NUMBER - _EPOCH) - 1, past & (1 << _SYNC) - 1
        mine = number == self.number
        warp = past >> _SYNC & (1 << _EPOCH - _SYNC) - 1 == (c.warp_barriers[threads >> 5] & (1 << _EPOCH - _SYNC) - 1)
        level = np.where(thread >> 5 == threads >> 5, warp & (thread != threads), 2)
        bad = np.where(mine, (epoch == self.epoch) * level, 3) * (past > 0)
        for i in (bad > 1).nonzero()[0].tolist():
            stamp = int(past[i])
            seen = self.acquired.get(int(threads[i]))
            if self.clock.orders(stamp) or (seen is not None and seen.orders(stamp)):
                bad[i] = 0
        return bad

    def _key(self, address: int, scope: str) -> tuple[int, int]:
        return address, self.number if scope == "cta" else -1  # of one block an acquire elsewhere sees nothing

    def acquire(self, thread: int, address: int, scope: str) -> None:
        """A thread has seen what was released at the address."""
        self.acquired.setdefault(thread, Clock()).merge(self.grid.released.get(self._key(address, scope)))

    def publish(self, thread: int, address: int, scope: str) -> None:
        """A release: whoever acquires knows what the thread has done, and all others before the last barrier."""
        clock = self.grid.released.setdefault(self._key(address, scope), Clock())
        clock.merge(self.clock)
        clock.merge(self.acquired.get(thread))
        clock.bounds[self.number] = max(self.epoch, clock.bounds.get(self.number, 0))
        clock.threads.add(self.number << _NUMBER | self.epoch << _EPOCH | thread)

    # Execution

    def next_epoch(self) -> None:
        """All threads know what each of them knew."""
        self.epoch += 1
        for clock in self.acquired.values():
            self.clock.merge(clock)
        self.acquired.clear()

    def _barrier(self, waiting: list[Threads], others: bool) -> None:
        code = [
            self.grid.program.kernel.blocks[at - 1].code[-1]
            for at in sorted(set().union(*(g.waiting_at() for g in waiting)))
        ]
        if len(code) > 1:
            places = " and ".join(f"{i.source} (PTX line {i.line})" for i in code)
            self.fault("divergent barrier", f"threads wait at {places}", code[0].line, [int(waiting[0].lanes[0])])
        if any([group.release() for group in waiting]) or others:
            self.note("barrier after threads have left", "others wait", code[0].line, [int(waiting[0].lanes[0])])
        self.next_epoch()
        self.grid.changes += 1

    def run(self) -> Iterator[None]:
        """Yields where another block may go on."""
        grid, states = self.grid, dict.fromkeys(range(len(self.groups)), "run")
        turn: int | None = None
        steps = 0
        while True:
            ready = [i for i, state in states.items() if state == "run"]
            if not ready:
                waiting = [self.groups[i] for i, state in states.items() if state == "wait"]
                if not waiting:
                    return
                self._barrier(waiting, len(waiting) < len(states))
                states.update({i: "run" for i, state in states.items() if state == "wait"})
                yield
                continue
            turn = ready[int(grid.dice.integers(len(ready)))] if len(ready) > 1 else ready[0]
            state = "run"
            while state == "run":
                state = self.groups[turn].step()
                steps += 1
                if steps > grid.step_limit:
                    last = self.groups[turn]
                    at = last.together if last.together is not None else int(last.places.min())
                    line = grid.program.kernel.blocks[min(at, last.end - 1)].code[0].line
                    self.fault("no end", f"{steps} basic blocks were run", line, last.lanes[:1].tolist())
                if grid.order == "warps":
                    break
            states[turn] = "run" if state == "pause" else state
            if state == "pause":
                grid.paused(self, turn)
                yield


class Grid:
    """One launch."""

    threads = Threads  # what a block's threads are: a subclass may look on

    def __init__(
        self, program: Program, size: int, params: dict[str, Any], regions: Sequence[Region],
        findings: dict[Any, Finding], *, order: str = "greedy", races: bool = True, resident: int = 132,
        seed: int = 0, step_limit: int = 2_000_000,
    ) -> None:  # fmt: skip
        if size >= 1 << 63 - _NUMBER or program.kernel.threads > 1 << _SYNC or program.kernel.threads % 32:
            raise NotImplementedError(f"{size} blocks of {program.kernel.threads} threads")
        self.program, self.size, self.params, self.findings = program, size, params, findings
        self.regions = sorted(regions, key=lambda region: region.base)
        self.bases = [region.base for region in self.regions]
        self.order, self.races, self.resident, self.step_limit = order, races, resident, step_limit
        self.dice = np.random.default_rng(seed)
        self.released: dict[tuple[int, int], Clock] = {}
        self.counts = Counter[int]()  # by basic block: warps that ran it
        self.changes = self.fruitless = self._seen = 0
        self.active: list[Iterator[None]] = []

    def note(self, kind: str, what: str, line: int, threads: Sequence[int], block: int) -> Finding:
        """Keeps the first finding of each kind and source line; returns it."""
        kernel = self.program.kernel
        some = ", ".join(str(int(thread)) for thread in list(dict.fromkeys(int(x) for x in threads))[:4])
        where = f"{what}; thread {some} of block {block}; PTX line {line}: {kernel.lines[line - 1].strip()}"
        finding = Finding(kind, kernel.name, kernel.instructions[line].source, where)
        self.findings.setdefault(finding[:3], finding)
        return finding

    def paused(self, cta: Cta, turn: int) -> None:
        """Where threads may wait for others: whether anything has changed since, for all who run."""
        self.fruitless = self.fruitless + 1 if self.changes == self._seen else 0
        self._seen = self.changes
        if self.fruitless > 1000 + 100 * len(self.active) * len(cta.groups):
            group = cta.groups[turn]
            at = group.together if group.together is not None else int(group.places.min())
            line = self.program.kernel.blocks[min(at, group.end - 1)].code[0].line
            cta.fault("no end", f"all wait, nothing changes, {len(self.active)} blocks", line, group.lanes[:1].tolist())

    def run(self) -> None:
        """To the end of every block, or a Fault."""
        waiting = iter(range(self.size))
        with np.errstate(all="ignore"):
            while True:
                while len(self.active) < self.resident and (number := next(waiting, None)) is not None:
                    self.active.append(Cta(self, number).run())
                if not self.active:
                    return
                i = int(self.dice.integers(len(self.active))) if len(self.active) > 1 else 0
                if next(self.active[i], "done") == "done":
                    self.active.pop(i)
                    self.changes += 1


class Program:
    """A kernel, translated; `shared`: bytes of global_smem."""

    def __init__(self, text: str, shared: int = 0, *, ulps: int = 0, fuse: bool = False) -> None:
        self.kernel, self.shared = Kernel(text), shared
        translator = Translator(self.kernel, ulps=ulps, fuse=fuse)
        self.functions, self.ends, self.fused = translator.functions, translator.ends, translator.fused
        kinds = {"?": False, "u2": np.uint16(UNWRITTEN), "u8": np.uint64(0x7FEDDEAD7FEDDEAD)}
        bits = np.uint32(0x7FEDDEAD)
        kinds |= {"u4": bits, "i4": bits.view("i4"), "f4": bits.view("f4"), "f8": kinds["u8"].view("f8")}
        self.garbage = [kinds[translator.kinds[register]] for register in translator.places]
