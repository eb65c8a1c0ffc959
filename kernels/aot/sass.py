"""What the loops in a kernel's machine code take per element, counted in what cuobjdump --dump-sass prints.

A loop is a strongly connected part of the control-flow graph: a block that ptxas moved out of line belongs to it, one
that is entered in its middle counts whole. An instruction counts once, on whichever path it lies and whatever its
predicate: reductions, barriers, both arms of a branch. Padding (NOP) does not count, and of a slow path that is called
only the call. What ptxas peeled lies outside; what it unrolled shows in the bytes that one turn moves. Beside all
instructions two kinds of them count by themselves: special functions, and float32 sums and products.

Each instruction of 128 bits also says which of six scoreboards it waits for, and which one its result releases.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
)
_LOADS, _STORES = {"LDG", "LDGSTS", "LD"}, {"STG", "ST"}  # of global memory
_ENDS = {"BRA", "EXIT", "RET"}
_SPECIAL = "MUFU"  # exp2, log2, 1/x, tanh ...
_FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}  # operations of each, two if packed
_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_Graph = dict[int, list[int]]  # an instruction's address -> those that may follow it


class LoopCount(NamedTuple):
    """What one loop takes per element: instructions to 0.1, the others to 0.01."""

    instructions: float
    special: float  # of them special functions
    fp32: float  # float32 operations: sums, products, and both at once
    bytes: float  # of global memory that the loads and stores of a tile ask for


class Instruction(NamedTuple):
    """A line of the listing."""

    address: int
    predicate: str | None
    opcode: tuple[str, ...]  # with its modifiers: LDG.E.128 is ("LDG", "E", "128")
    operands: str
    control: int  # bits of the encoding from 105: stall cycles, yield, two scoreboards (7: none), those awaited

    @property
    def sets(self) -> int:
        """The scoreboard that its result releases, as a mask; none of the six if it sets none."""
        return 1 << (self.control >> 5 & 7)

    @property
    def awaits(self) -> int:
        """The scoreboards that it waits for, as a mask."""
        return self.control >> 11 & 63

    @property
    def falls_through(self) -> bool:
        """Whether the instruction behind it may follow."""
        return self.opcode[0] not in _ENDS or self.predicate is not None or _condition(self) is not None

    def bytes_of(self, kinds: set[str]) -> int:
        """How much of global memory a thread touches here, 0 if this is none of `kinds`."""
        if self.opcode[0] not in kinds:
            return 0
        return next((_BYTES[x] for x in self.opcode if x in _BYTES), 4)


def parse(listing: str) -> dict[int, Instruction]:
    """The instructions of a listing with one kernel, by address."""
    return {int(found[0], 16): _instruction(*found) for found in _LINE.findall(listing)}


def _instruction(address: str, predicate: str, opcode: str, operands: str, high: str) -> Instruction:
    control = int(high, 16) >> 41
    return Instruction(int(address, 16), predicate or None, tuple(opcode.split(".")), operands.strip(), control)


def loops(code: dict[int, Instruction]) -> list[list[Instruction]]:
    """The loops that touch global memory and have no such loop inside, in program order."""
    touching = {x.address for x in code.values() if x.bytes_of(_LOADS | _STORES)}
    found = sorted(sorted(loop) for loop in _innermost(_graph(code), touching))
    return [[code[address] for address in loop] for loop in found]


def per_element(listing: str, elements: int, read: int, written: int) -> list[LoopCount]:
    """Counts per element, of every loop in program order.

    Args:
        listing: what `cuobjdump --dump-sass` prints of a cubin with one kernel.
        elements: the elements (pairs, for two sides) of a tile that one thread holds.
        read, written: bytes of an element that the kernel reads, of all sides together, and writes.
    """
    return [_per_element(loop, elements, read, written) for loop in loops(parse(listing))]


def _per_element(loop: list[Instruction], elements: int, read: int, written: int) -> LoopCount:
    loads, stores = _moved(loop, _LOADS), _moved(loop, _STORES)
    tiles = max(1.0, loads / (elements * read) or stores / (elements * written))
    if tiles != int(tiles):
        raise ValueError(f"the loop at {loop[0].address:#x} moves {tiles} tiles of {elements} elements at a time")
    opcodes, turns = [x.opcode[0] for x in loop], elements * tiles
    return LoopCount(
        round(sum(opcode != "NOP" for opcode in opcodes) / turns, 1),
        round(opcodes.count(_SPECIAL) / turns, 2),
        round(sum(_FP32.get(opcode, 0) for opcode in opcodes) / turns, 2),
        round((loads + stores) / turns, 2),
    )


def loaded_ahead(listing: str) -> int:
    """Bytes of global memory that a thread has asked for before it waits for any of them, at most.

    In the order of the code, past branches that may be taken and instructions that a predicate may switch off.
    """
    most = asked = pending = 0
    for x in parse(listing).values():
        if x.awaits & pending:
            asked = pending = 0
        if size := x.bytes_of(_LOADS):
            asked, pending = asked + size, pending | x.sets
            most = max(most, asked)
        if not x.falls_through:
            asked = pending = 0
    return most


def _moved(loop: list[Instruction], kinds: set[str]) -> int:
    """Bytes of the tiles that a thread moves each time round: of its widest accesses, as rows are aligned."""
    sizes = [x.bytes_of(kinds) for x in loop]
    return sum(size for size in sizes if size == max(sizes))


def _graph(code: dict[int, Instruction]) -> _Graph:
    following = dict(zip(code, list(code)[1:], strict=False))
    graph: _Graph = {}
    for address, x in code.items():
        after = [following[address]] if x.falls_through and address in following else []
        if x.opcode[0] == "BRA" and (target := re.search(r"0x([0-9a-f]+)$", x.operands)):
            after.append(int(target.group(1), 16))
        graph[address] = after
    return graph


def _condition(x: Instruction) -> re.Match[str] | None:
    """A branch may name its condition as an operand: BRA.U UP0, 0x120, BRA P2, 0x120."""
    return re.match(r"!?U?P\w+,", x.operands)


def _innermost(graph: _Graph, touching: set[int]) -> Iterator[set[int]]:
    for part in _components(graph):
        if part & touching:
            entries = {after for at in graph.keys() - part for after in graph[at]} & part
            head = min(entries or part)
            rest = {at: [x for x in graph[at] if x in part and x != head] for at in part - {head}}
            yield from list(_innermost(rest, touching)) or [part]


def _components(graph: _Graph) -> Iterator[set[int]]:
    """The strongly connected parts with a cycle (Kosaraju)."""
    back: _Graph = {at: [] for at in graph}
    for at, after in graph.items():
        for x in after:
            back[x].append(at)
    seen: set[int] = set()
    for at in reversed(list(_finished(graph, graph, seen))):
        if at in back:
            part = set(_finished(back, [at], set()))
            for x in part:
                del back[x]
            if len(part) > 1 or at in graph[at]:
                yield part


def _finished(graph: _Graph, starts: Iterable[int], seen: set[int]) -> Iterator[int]:
    """What is reached from `starts` inside the graph, each after all that is reached from it."""
    for start in starts:
        stack = [(start, iter(graph.get(start, ())))] if start not in seen else []
        seen.add(start)
        while stack:
            at, after = stack[-1]
            new = next((x for x in after if x in graph and x not in seen), None)
            if new is None:
                stack.pop()
                yield at
            else:
                seen.add(new)
                stack.append((new, iter(graph[new])))
