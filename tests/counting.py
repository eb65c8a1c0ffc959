"""What launches of the emulator cost: instructions, barriers, sectors of global memory, waves of shared memory.

    with counted() as launches:
        ...                             kernels run as usual
    launches[0].cost()

A warp's access of global memory is one request for sectors of 32 bytes. Shared memory has 32 banks of 4 bytes; a wave
serves a word of each. Accesses of 8 and 16 bytes go in 2 and 4 phases, of a half and a quarter of the warp; a phase
takes as many waves as it has words in one bank, so that beyond one wave a phase all are bank conflicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import emulator
import numpy as np
from emulator.machine import Threads
from emulator.translate import Access

Array = Any
WARP, SECTOR, BANKS, WORD = 32, 32, 32, 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests of one kind, the units (sectors or waves) that they took, and those that they needed at least."""

    requests: int = 0
    taken: int = 0
    least: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.taken + other.taken, self.least + other.least)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What launches took, all blocks together."""

    blocks: int = 0
    instructions: int = 0  # of PTX, by warps
    barriers: int = 0  # by blocks
    loads: Traffic = Traffic()  # of global memory, in sectors
    stores: Traffic = Traffic()
    shared: Traffic = Traffic()  # in waves

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, x.name) + getattr(other, x.name) for x in dataclasses.fields(self)))


def sectors(address: Array, nbytes: int, warps: Array) -> Traffic:
    """Of one access by threads of the given warps. At least: as if the bytes of each warp lay together."""
    touched = np.unique(np.stack((warps, address // SECTOR)), axis=1).shape[1]
    owners = np.unique(np.stack((warps, address)), axis=1)[0]
    asked = np.bincount(owners) * nbytes
    return Traffic(int((asked > 0).sum()), touched, int((-(-asked // SECTOR)).sum()))


def waves(address: Array, nbytes: int, lanes: Array) -> Traffic:
    """The same of shared memory, by threads of a block."""
    words = max(1, nbytes // WORD)
    phase = np.repeat(lanes // (WARP // words), words)
    word = (address // WORD)[:, None] + np.arange(words)
    phase, word = np.unique(np.stack((phase, word.ravel())), axis=1)
    depths = np.zeros((int(phase.max()) + 1, BANKS), np.int64)
    np.add.at(depths, (phase, word % BANKS), 1)
    deepest = depths.max(1)
    return Traffic(len(np.unique(lanes // WARP)), int(deepest.sum()), int((deepest > 0).sum()))


class Turns:
    """In the place of dice: one after the other. Who waits waits once, and the counts come out the same again."""

    def __init__(self) -> None:
        self.turn = 0

    def integers(self, many: int) -> int:
        """A number below `many`."""
        self.turn += 1
        return self.turn % many

    def choice(self, values: Array) -> Any:
        """One of the values."""
        return values[self.integers(len(values))]


class CountedThreads(Threads):
    """Threads whose accesses are counted."""

    def _reached(self, access: Access, address: Array, mask: Array) -> Any:
        who = slice(None) if mask is None else self.full(mask)
        lanes = self.lanes[who]
        if len(lanes):
            launch: Any = self.cta.grid
            launch.count(access, self.full(address)[who].astype(np.int64) + access.offset, lanes)
        return super()._reached(access, address, mask)


class CountedGrid(emulator.Grid):
    """A launch that counts."""

    threads = CountedThreads
    launches: list[CountedGrid]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.dice: Any = Turns()
        self.traffic: dict[str, Traffic] = {"loads": Traffic(), "stores": Traffic(), "shared": Traffic()}
        self.launches.append(self)

    def count(self, access: Access, address: Array, lanes: Array) -> None:
        """One access by some threads. Atomics count as instructions only: they are done where the caches meet."""
        op = self.program.kernel.instructions[access.line].op
        if access.space == "shared":
            self.traffic["shared"] += waves(address, access.nbytes, lanes)
        elif op.startswith(("ld", "st")):
            self.traffic["loads" if op.startswith("ld") else "stores"] += sectors(address, access.nbytes, lanes // WARP)

    def cost(self) -> Cost:
        """What it took."""
        kernel, ends = self.program.kernel, self.program.ends
        instructions = sum(n * len(kernel.blocks[at].code) for at, n in self.counts.items())
        waits = sum(n for at, n in self.counts.items() if ends[at][0] == "bar")
        return Cost(self.size, instructions, waits * WARP // kernel.threads, **self.traffic)


@contextlib.contextmanager
def counted() -> Iterator[list[CountedGrid]]:
    """Within: launches count, in the list given."""
    launches: list[CountedGrid] = []
    usual, emulator.settings.grid = emulator.settings.grid, type("Counted", (CountedGrid,), {"launches": launches})
    try:
        yield launches
    finally:
        emulator.settings.grid = usual
