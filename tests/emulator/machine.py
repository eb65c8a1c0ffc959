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
import functools
import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .parse import Kernel
from .translate import SHARED_BASE, SPECIAL, Access, Array, Translator

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
REDUX = {"max": np.fmax, "min": np.fmin, "NaN max": np.maximum, "NaN min": np.minimum, "add": np.add,
         "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
EVERYONE, SHIFT, STEPS = slice(None), {1: 0, 2: 1, 4: 2, 8: 3}, np.arange(32)[:, None]
UNSIGNED = {width: np.dtype(f"u{width}") for width in SHIFT}
_NORESERVE = 0x4000  # of Linux; named in mmap since Python 3.13
# A stamp is who accessed memory, when and how: block, its barriers so far, those of the warp, thread, and instruction,
# each from this bit on.
_BLOCK, _EPOCH, _SYNC, _THREAD = 44, 30, 22, 12


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


class Region:
    """Memory at [base, base + size): a tensor's storage, or the shared memory of a block."""

    def __init__(self, base: int, raw: Array, name: str, *, item: int = 1, whole: bool = True, floating: bool = False):
        self.base, self.size, self.name = base, len(raw), name
        self.views = {width: raw[: len(raw) // width * width].view(f"u{width}") for width in SHIFT}
        self.seen = None if whole else sparse(self.size, "?")  # the bytes of the views that the kernel was given
        self.mark: Array = np.array([UNWRITTEN] * 4, "u2").view(f"u{item}")[0] if floating and item > 1 else None
        self.unit = 1  # bytes that share a stamp: no access of the kernel is smaller
        self.written: Array = None  # units of shared memory
        self.shadow: Array = None  # of each unit who stored, who loaded, who of another warp loaded: stamps

    @classmethod
    def at(cls, base: int, size: int, name: str, **about: Any) -> Region:
        """The process's own memory."""
        return cls(base, np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8), name, **about)

    def describe(self, place: int) -> str:
        """A byte in words."""
        between = self.seen is not None and 0 <= place < self.size and not self.seen[place]
        return f"byte {place} of {self.name} with {self.size} bytes{', between the rows of the views' * between}"

    def units(self, at: Array, nbytes: int) -> Array:
        """Those of accesses: (units, threads)."""
        return (at >> SHIFT[self.unit]) + STEPS[: nbytes // self.unit]

    def unwritten(self, got: Array, units: Array) -> Array:
        """Which threads read what nobody has written; None: none."""
        if self.written is not None:
            bad = ~self.written[units]
        elif self.mark is not None and got.itemsize >= self.mark.itemsize:
            bad = got.view(self.mark.dtype) == self.mark
        else:
            return None
        return bad.reshape(len(bad), got.shape[1], -1).any((0, 2)) if np.count_nonzero(bad) else None


NOWHERE = Region(-(1 << 62), np.zeros(0, np.uint8), "nothing")  # below all memory


def by_base(regions: Sequence[Region], unit: int) -> list[Region]:
    """An address space: accesses in it are of `unit` bytes at least."""
    for region in regions:
        region.unit = unit
    return sorted((NOWHERE, *regions), key=lambda region: region.base)


class Clock:
    """What is known to lie behind: of blocks the epochs before one, and single threads' epochs."""

    def __init__(self) -> None:
        self.bounds: dict[int, int] = {}
        self.threads: set[int] = set()  # stamps without warp barriers and instructions

    def merge(self, other: Clock) -> None:
        """And what `other` knows."""
        self.threads |= other.threads
        for block, bound in other.bounds.items():
            self.bounds[block] = max(bound, self.bounds.get(block, 0))

    def orders(self, stamp: int) -> bool:
        """Whether an access of that stamp is known to be over."""
        known = stamp & (1 << _BLOCK) - 1 < self.bounds.get(stamp >> _BLOCK, 0)
        return known or stamp >> _EPOCH << _EPOCH | _thread(stamp) << _THREAD in self.threads


def _thread(stamp: Array) -> Array:
    return stamp >> _THREAD & 1023


class Threads:
    """Threads that one call of a block's function serves: one warp, or all of a block in lockstep."""

    def __init__(self, cta: Cta, lanes: Array) -> None:
        self.cta, self.lanes, self.size, self.program = cta, lanes, len(lanes), cta.grid.program
        self.registers, self.params = list(self.program.garbage), cta.grid.params
        self.special = {**cta.special, "%tid.x": lanes.astype("u4"), "%laneid": (lanes % 32).astype("u4")}
        self.when = lanes << _THREAD  # the middle of stamps: barriers of the warp, and the thread
        self.state = "run"  # or pause (others may go on), wait (for a barrier), done
        # The block of instructions at which each is: `end` is behind the last, and `behind` more a barrier before it.
        self.end, self.behind = len(self.program.kernel.blocks), len(self.program.kernel.blocks) + 1
        self.together: int | None = 0  # at which all are, or None and
        self.places = np.zeros(self.size, np.int64)

    def full(self, x: Array) -> Array:
        """One number per thread."""
        return x if x.ndim else np.full(self.size, x)

    # Control

    def step(self) -> None:
        """Runs one block of instructions."""
        at, m = (self.together, None) if self.together is not None else self._choose()
        self.cta.grid.counts[at] += self.size // 32 if m is None else int(m.reshape(-1, 32).any(1).sum())
        taken = self.program.functions[at](self.registers, m, self)
        kind, label = self.program.ends[at]
        if kind == "bra":
            target = self.program.kernel.labels[label]
        else:
            target = {"ret": self.end, "bar": at + 1 + self.behind}.get(kind, at + 1)
        if taken is not None:
            count = np.count_nonzero(taken)
            if count == 0:
                target = at + 1
            elif count < taken.size:
                target = np.where(taken, target, at + 1)
        if m is None and isinstance(target, int):
            self.together = first = last = target
        else:
            self.places = np.where(True if m is None else m, target, self.places)
            self.together, first, last = None, self.places.min(), self.places.max()
        if first < self.end:
            self.state = "pause" if kind == "pause" else "run"
        else:
            self.state = "wait" if last > self.end else "done"

    def _choose(self) -> tuple[int, Array | None]:
        """The earliest instructions that can run, and the threads there; where a warp is needed, whole warps only."""
        blocks, live = self.program.kernel.blocks, self.places < self.end
        at = int(self.places[live].min())
        if self.state == "pause":  # those at the earliest may be waiting for the others
            at = int(self.cta.grid.dice.choice(self.places[live]))
        m = self.places == at
        first = blocks[at].whole_warps
        if first is None or m.all():
            return at, None if m.all() else m
        for at in np.unique(self.places[live]).tolist():
            m = self.places == at
            if blocks[at].whole_warps:
                m &= np.repeat(m.reshape(-1, 32).all(1), 32)
            if m.any():
                return at, m
        what = f"{first.op} without all threads of the warp"
        raise Fault(self.cta.note("diverged warp", what, first.line, live.nonzero()[0]))

    def each(self) -> Array:
        """The block of instructions at which each thread is."""
        return self.places if self.together is None else np.full(self.size, self.together)

    def line(self) -> int:
        """The line of PTX at which the first of them is."""
        return self.program.kernel.blocks[min(int(self.each().min()), self.end - 1)].code[0].line

    def release(self) -> bool:
        """Past the barrier; whether some of the threads have left the kernel."""
        self.state, self.places, self.together = "run", self.each() % self.behind, None
        return bool((self.places == self.end).any())

    # Warps

    def all_meant(self, mask: Array, line: int) -> None:
        """Refuses an instruction for some threads of a warp."""
        if (mask != -1).any():
            raise NotImplementedError(f"{self.program.kernel.instructions[line].text} for a part of a warp")

    def shfl(self, how: str, x: Array, b: Array, clamp: Array) -> Array:
        """Of each thread the number of another."""
        given = how, self.size, b, clamp
        return self.full(x)[_sources(*given) if b.ndim == clamp.ndim == 0 else _sources.__wrapped__(*given)]

    def redux(self, how: str, x: Array) -> Array:
        """Of all threads of a warp one number."""
        x = self.full(x).reshape(-1, 32)
        return np.repeat(REDUX[how].reduce(x, axis=1, dtype=x.dtype), 32)

    def vote(self, how: str, p: Array) -> Array:
        """Of all their conditions one, or a bit each."""
        rows = self.full(p).reshape(-1, 32)
        if how == "ballot":
            return np.repeat(np.packbits(rows, axis=1, bitorder="little").view(np.uint32), 32)
        return np.repeat(rows.any(1) if how == "any" else rows.all(1), 32)

    def warp_barrier(self, m: Array) -> None:
        """bar.warp.sync; in a block of one warp it is a barrier of the block."""
        if self.cta.size == 32:
            self.cta.next_epoch()
        later = self.when + (1 << _SYNC) & (1 << _EPOCH) - 1
        self.when = later if m is None else np.where(m, later, self.when)

    # Memory

    def _reached(self, access: Access, address: Array, mask: Array) -> list[tuple[Region, Any, Array]]:
        """The regions that an access touches, its threads (an index within the group), and bytes within the region."""
        who: Any = EVERYONE if mask is None else self.full(mask).nonzero()[0]
        address = self.full(address)[who].astype(np.int64) + access.offset
        what = f"{access.space} access of {access.nbytes} bytes at"
        if np.bitwise_or.reduce(address) & (access.nbytes - 1):
            wrong = address & (access.nbytes - 1) != 0
            what = f"{what} {int(address[wrong][0]):#x}"
            raise Fault(self.cta.note("misaligned access", what, access.line, self.lanes[who][wrong]))
        regions, found = self.cta.memory[access.space], []
        while len(address):
            first = int(address[0])  # that region's are all, most likely
            region = regions[bisect_right(regions, first, key=lambda region: region.base) - 1]
            at, last = address - region.base, region.size - access.nbytes
            if region.seen is None and int(at.view(np.uint64).max()) <= last:
                return [*found, (region, who, at)]
            inside = (at >= 0) & (at <= last)
            if region.seen is not None:
                inside[inside] = region.seen[at[inside] + STEPS[: access.nbytes]].all(0)
            who = np.arange(self.size)[who]
            if not inside[0]:
                near = min(regions, key=lambda r: min(abs(first - r.base), abs(first - r.base - r.size)))
                what = f"{what} {near.describe(first - near.base)}"
                raise Fault(self.cta.note("out of bounds", what, access.line, self.lanes[who[:1]]))
            found.append((region, who[inside], at[inside]))
            address, who = address[~inside], who[~inside]
        return found

    def load(self, access: Access, address: Array, mask: Array) -> Array:
        """Some numbers from each address: (numbers, threads)."""
        out = np.zeros((access.count, self.size), UNSIGNED[access.size])
        for region, who, at in self._reached(access, address, mask):
            got = region.views[access.size][(at >> SHIFT[access.size]) + STEPS[: access.count]]
            units = region.units(at, access.nbytes)
            if (unwritten := region.unwritten(got, units)) is not None:
                what = region.describe(at[unwritten][0])
                self.cta.note("read of unwritten memory", what, access.line, self.lanes[who][unwritten])
            self._order(access, region, who, at, units, None)
            if who is EVERYONE:
                return got
            out[:, who] = got
        return out

    def store(self, access: Access, address: Array, mask: Array, values: Sequence[Array]) -> None:
        """Some numbers to each address."""
        rows = np.array([self.full(x) for x in values])
        for region, who, at in self._reached(access, address, mask):
            view, new = region.views[access.size], rows[:, who]
            index, units = (at >> SHIFT[access.size]) + STEPS[: access.count], region.units(at, access.nbytes)
            same = (view[index] == new).all(0)
            self._order(access, region, who, at, units, same & (region.written is None))
            self.cta.grid.changes += np.count_nonzero(same) < same.size
            view[index] = new
            if region.written is not None:
                region.written[units] = True
            if np.count_nonzero(lost := view[index] != new):
                self._replicas(new, view[index], lost.any(0), access.line, self.lanes[who], at)

    def atomic(
        self, access: Access, address: Array, mask: Array, kind: Any, how: str, values: Sequence[Array]
    ) -> Array:
        """One thread after the other; what was there before."""
        out, given = np.zeros(self.size, kind), [self.full(x) for x in values]
        for region, who, at in self._reached(access, address, mask):
            view = region.views[access.size].view(kind)
            self.cta.synchronise(access, self.lanes[who], at + region.base)
            for i, place in zip(np.arange(self.size)[who].tolist(), (at // access.size).tolist(), strict=True):
                old = out[i] = view[place]
                new = view[place] = ATOMIC[how](old, *(x[i] for x in given))
                self.cta.grid.changes += bool(new != old)
        return out

    def load_matrices(self, access: Access, address: Array, mask: Array, transposed: bool) -> Array:
        """ldmatrix: thread 8i + r of a warp gives the address of row r (16 bytes) of its i-th matrix of 8 x 8 halves;
        thread l gets elements 2(l % 4) and the next of row l / 4, or those of the transposed matrix."""
        words = _turned(self.load(access, address, mask).T, transposed)
        return words.reshape(-1, 4, 32).swapaxes(0, 1).reshape(4, -1)

    def store_matrices(
        self, access: Access, address: Array, mask: Array, values: Sequence[Array], transposed: bool
    ) -> None:
        """stmatrix: the other way round."""
        words = np.stack([self.full(x).reshape(-1, 32) for x in values], 1)
        self.store(access, address, mask, _turned(words, transposed).reshape(-1, 4).T)

    # Sanitizer

    def _order(self, access: Access, region: Region, who: Any, at: Array, units: Array, same: Array | None) -> None:
        """Enters an access, and notes the worst that is not ordered before it. Of a store `same` says where it changes
        nothing: another store of the same is no race."""
        if access.mode != "weak":
            self.cta.synchronise(access, self.lanes[who], at + region.base)
        if access.mode != "weak" or not self.cta.grid.races:
            return
        if region.shadow is None:
            region.shadow = sparse((region.size // region.unit + 1) * 3, "i8").reshape(-1, 3)
        rows, stamps = region.shadow[units], (self.when + (self.cta.base + self.cta.epoch + access.number))[who]
        if np.count_nonzero(rows):
            self._judge(access, region, rows, stamps, same)
            if same is None:
                apart = (rows[..., 1] ^ stamps) >> _THREAD + 5 != 0  # another warp, or another time
                rows[..., 2] = np.where(apart, rows[..., 1], rows[..., 2])
            else:
                rows[...] = 0
        rows[..., int(same is None)] = stamps
        region.shadow[units] = rows

    def _judge(self, access: Access, region: Region, rows: Array, stamps: Array, same: Array | None) -> None:
        past = rows[..., :1] if same is None else rows  # two loads do not race
        # not before this block's last barrier
        late = (past ^ self.cta.base >= self.cta.epoch) & (past != 0)
        if same is not None:
            late[..., 0] &= ~same
        if not np.count_nonzero(late):
            return
        past, stamps = past[late], stamps[late.nonzero()[1]]
        bad = self.cta.unordered(past, stamps)
        worst = int(bad.argmax())
        if bad[worst]:
            stamp = int(past[worst])
            before = self.program.kernel.instructions[self.program.accesses[stamp & (1 << _THREAD) - 1].line]
            them = f"{before.op} of {before.source} by thread {_thread(stamp)} of block {stamp >> _BLOCK}"
            what = f"{'load' if same is None else 'store'} in {region.name} after {them}"
            self.cta.note(RACES[bad[worst]], what, access.line, _thread(stamps))

    def _replicas(self, ours: Array, kept: Array, lost: Array, line: int, threads: Array, at: Array) -> None:
        """Threads of one instruction stored different bits to one address: rounding, or more than that.

        Rounding is 1e-4 of the number at most. A sum that cancels has the rounding of its terms, several 2^-23 of them;
        they are taken to be as large as the largest number that the instruction stores from the same register.
        """
        kind, what = REPLICAS, "not numbers"
        if ours.itemsize == 4:
            one, two = (np.ascontiguousarray(x).view("f4").astype("f8") for x in (ours, kept))
            gap, size = np.abs(one - two), np.maximum(np.abs(one), np.abs(two))
            terms = np.where(np.isfinite(one), np.abs(one), 0).max(1, keepdims=True)
            rounding = (one == two) | (gap <= np.maximum(1e-4 * size, 2.0**-20 * terms))
            kind = ROUNDING if rounding.all() else REPLICAS
            what = f"by {gap.max():.1e}: numbers up to {size[:, lost].max():.1e}, beside {terms.max():.1e}"
        self.cta.note(kind, what, line, threads[lost])
        winners = dict(zip(at.tolist(), (threads >> 5).tolist(), strict=True))
        if self.cta.grid.races and any(winners[at[i]] != threads[i] >> 5 for i in lost.nonzero()[0]):
            self.cta.note(WARP_RACE, "two warps store at once", line, threads[lost])


@functools.cache
def _sources(how: str, size: int, b: Array, clamp: Array) -> Array:
    """Whose number each of `size` threads gets by a shfl."""
    thread = np.arange(size)
    lane, segment = thread & 31, (clamp >> 8) & 31
    top, low = (lane & segment) | (clamp & 31 & ~segment), lane & segment
    source = {"bfly": lane ^ b, "idx": low | (b & ~segment & 31), "up": lane - b, "down": lane + b}[how]
    return np.where(source >= top if how == "up" else source <= top, thread - lane + source, thread)


def _turned(words: Array, transposed: bool) -> Array:
    """Matrices of 8 x 8 halves, two in a word, perhaps each transposed."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.swapaxes(1, 2) if transposed else halves).view(np.uint32)


class Cta:
    """One block of threads."""

    def __init__(self, grid: Grid, number: int) -> None:
        program = grid.program
        self.grid, self.number, self.size = grid, number, program.kernel.threads
        # the upper part of stamps; barriers are counted from 1 so that no stamp is 0
        self.base, self.epoch = number << _BLOCK, 1 << _EPOCH
        self.clock, self.acquired = Clock(), dict[int, Clock]()  # of all threads; of single ones until the next barrier
        shared = Region(SHARED_BASE, np.zeros(program.shared, np.uint8), "shared memory")
        shared.written = np.zeros(program.shared, bool)
        self.memory = {"global": grid.memory, "shared": by_base([shared], program.unit["shared"])}
        numbers = {"%ntid.x": self.size, "%ctaid.x": number, "%nctaid.x": grid.size}
        self.special = {name: np.uint32(numbers.get(name, name[1] == "n")) for name in SPECIAL}  # ntid.y ... are 1
        width = self.size if grid.order == "lockstep" else 32
        self.groups = [grid.threads(self, np.arange(i, i + width)) for i in range(0, self.size, width)]

    def note(self, kind: str, what: str, line: int, threads: Array) -> Finding:
        """Keeps the first finding of each kind and source line; returns it."""
        kernel = self.grid.program.kernel
        some = ", ".join(map(str, list(dict.fromkeys(threads.tolist()))[:4]))
        where = f"{what}; thread {some} of block {self.number}; PTX line {line}: {kernel.lines[line - 1].strip()}"
        finding = Finding(kind, kernel.name, kernel.instructions[line].source, where)
        self.grid.findings.setdefault(finding[:3], finding)
        return finding

    # What is ordered before what

    def unordered(self, past: Array, stamps: Array) -> Array:
        """For each access since this block's last barrier, or of another block, its place in RACES."""
        apart = (past ^ stamps) >> _THREAD  # where the stamps are not the same
        same_warp = (apart >> _SYNC - _THREAD == 0) & (apart != 0)
        bad = np.where(apart >> _BLOCK - _THREAD, 3, np.where(apart & 1023 - 31, 2, same_warp))
        for i in (bad > 1).nonzero()[0].tolist():
            seen = self.acquired.get(int(_thread(stamps[i])), self.clock)
            if self.clock.orders(int(past[i])) or seen.orders(int(past[i])):
                bad[i] = 0
        return bad

    def synchronise(self, access: Access, threads: Array, addresses: Array) -> None:
        """A release at an address covers what its thread has done and, of all others, what lay before the last barrier;
        an acquire of it knows that."""
        if access.mode not in ("acquire", "release", "acq_rel"):
            return
        among = self.number if access.scope == "cta" else -1  # an acquire elsewhere does not see what is for one block
        for thread, address in zip(threads.tolist(), addresses.tolist(), strict=True):
            released = self.grid.released.setdefault((address, among), Clock())
            acquired = self.acquired.setdefault(thread, Clock())
            if access.mode != "release":
                acquired.merge(released)
            if access.mode != "acquire":
                released.merge(self.clock)
                released.merge(acquired)
                released.bounds[self.number] = max(self.epoch, released.bounds.get(self.number, 0))
                released.threads.add(self.base | self.epoch | thread << _THREAD)

    def next_epoch(self) -> None:
        """All threads know what each of them knew."""
        self.epoch += 1 << _EPOCH
        if self.epoch >= 1 << _BLOCK:
            raise NotImplementedError(f"{self.epoch >> _EPOCH} barriers in a block")
        for clock in self.acquired.values():
            self.clock.merge(clock)
        self.acquired.clear()

    # Execution

    def _barrier(self) -> None:
        waiting = [group for group in self.groups if group.state == "wait"]
        places, first = np.concatenate([group.each() for group in waiting]), waiting[0]
        blocks = self.grid.program.kernel.blocks
        code = [blocks[at - first.behind - 1].code[-1] for at in np.unique(places[places > first.end])]
        if len(code) > 1:
            what = f"threads wait at {' and '.join(f'{i.source} (PTX line {i.line})' for i in code)}"
            raise Fault(self.note("divergent barrier", what, code[0].line, first.lanes[:1]))
        if any([group.release() for group in waiting]) or len(waiting) < len(self.groups):
            self.note("barrier after threads have left", "others wait", code[0].line, first.lanes[:1])
        self.next_epoch()
        self.grid.changes += 1

    def run(self) -> Iterator[None]:
        """Yields where another block may go on."""
        grid, steps = self.grid, 0
        while any(group.state != "done" for group in self.groups):
            ready = [group for group in self.groups if group.state in ("run", "pause")]
            if not ready:
                self._barrier()
                yield
                continue
            group = ready[int(grid.dice.integers(len(ready)))] if len(ready) > 1 else ready[0]
            going = True
            while going:
                group.step()
                steps += 1
                if steps > grid.step_limit:
                    raise Fault(self.note("no end", f"{steps} basic blocks were run", group.line(), group.lanes[:1]))
                going = group.state == "run" and grid.order != "warps"
            if group.state == "pause":
                grid.paused(self, group)
                yield


class Grid:
    """One launch."""

    threads = Threads  # what a block's threads are: a subclass may look on

    def __init__(
        self, program: Program, size: int, params: dict[str, Any], regions: Sequence[Region],
        findings: dict[Any, Finding], *, order: str = "greedy", races: bool = True, resident: int = 132,
        seed: int = 0, step_limit: int = 2_000_000,
    ) -> None:  # fmt: skip
        if size >= 1 << 63 - _BLOCK or program.kernel.threads > 1024 or program.kernel.threads % 32:
            raise NotImplementedError(f"{size} blocks of {program.kernel.threads} threads")
        self.program, self.size, self.params, self.findings = program, size, params, findings
        self.memory = by_base(regions, program.unit["global"])
        self.order, self.races, self.resident, self.step_limit = order, races, resident, step_limit
        self.dice = np.random.default_rng(seed)
        self.released: dict[tuple[int, int], Clock] = {}  # by address, and the block that may acquire it (-1: all)
        self.counts = Counter[int]()  # by basic block: warps that ran it
        self.changes = self.fruitless = self._seen = 0
        self.active: list[Iterator[None]] = []

    def paused(self, cta: Cta, group: Threads) -> None:
        """Where threads may wait for others: whether anything has changed since, for all who run."""
        self.fruitless = self.fruitless + 1 if self.changes == self._seen else 0
        self._seen = self.changes
        if self.fruitless > 1000 + 100 * len(self.active) * len(cta.groups):
            what = f"all wait, nothing changes, {len(self.active)} blocks"
            raise Fault(cta.note("no end", what, group.line(), group.lanes[:1]))

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
        made = Translator(self.kernel, ulps=ulps, fuse=fuse)
        self.functions, self.ends, self.fused, self.unit = made.functions, made.ends, made.fused, made.unit
        self.accesses = made.accesses
        if len(self.accesses) > 1 << _THREAD:
            raise NotImplementedError(f"{len(self.accesses)} instructions that access memory")
        kinds = map(made.own, made.places)
        self.garbage = [np.bool_(False) if x == "b1" else np.array([UNWRITTEN] * 4, "u2").view(x)[0] for x in kinds]
