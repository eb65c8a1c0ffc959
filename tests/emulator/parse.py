"""PTX text into basic blocks: the subset that Triton (LLVM's NVPTX back end) writes.

Not read: `.local` memory, calls, tables of branch targets, static `.shared` arrays. `translate` refuses what uses them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LOCATION = re.compile(r"//\s*(.*)")
_COMMA = re.compile(r",(?![^{\[]*[}\]])")  # not those within {} or []
_LEAVING = {"bra", "ret", "exit", "bar", "barrier", "atom", "red"}  # another thread may run behind these
_SHARED_STATE = (".acquire", ".relaxed", ".volatile")  # a load that may be waiting for another thread
_TOGETHER = (".sync", ".warp")  # instructions of a whole warp; barriers of a block (bar.sync) are not meant


class Instruction(NamedTuple):
    """One statement: `@guard op operands;`."""

    op: str
    operands: tuple[str, ...]
    guard: str | None  # %p3 or !%p3
    line: int  # of the PTX text, from 1
    source: str  # of the kernel, file:line:column; of the PTX where nothing is said

    @property
    def text(self) -> str:
        """The statement again."""
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.op} {', '.join(self.operands)};".replace(" ;", ";")


class Block:
    """Instructions that run one after the other. Only the last of them may jump, wait or let others go first."""

    def __init__(self) -> None:
        self.code: list[Instruction] = []
        self.whole_warps = False  # whether it has an instruction that all threads of a warp do together


class Kernel:
    """A parsed entry: parameters as (type, name), threads of a block, basic blocks in program order."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        entry = re.search(r"\.entry\s+([\w$]+)", text)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
        if entry is None or threads is None:
            raise NotImplementedError("PTX without an .entry, or without .reqntid: how many threads has a block?")
        self.name, self.threads = entry.group(1), int(threads.group(1))
        start = text.count("\n", 0, text.index("{", threads.end()))
        header = text[entry.start() : text.index("{", threads.end())]
        self.params: list[tuple[str, str]] = re.findall(r"\.param\s+\.(\w+)[^,\n]*?\b([\w$]+_param_\d+)", header)
        # types by prefix
        self.registers = {prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>", text)}
        self.blocks, self.labels = [Block()], {}
        self.instructions: dict[int, Instruction] = {}
        self._read(start, set(re.findall(r"\bbra(?:\.uni)?\s+(\$?\w+)", text)))

    @property
    def title(self) -> str:
        """file:kernel."""
        return f"{self.blocks[0].code[0].source.split(':')[0]}:{self.name}"

    def _read(self, start: int, targets: set[str]) -> None:
        source = None
        for number, raw in enumerate(self.lines[start + 1 :], start + 2):
            line = raw.strip()
            if line.startswith("}"):
                break
            if line.startswith(".loc"):
                found = _LOCATION.search(line)
                source = found.group(1) if found else line
                continue
            line = line.split("//")[0].strip()
            if not line or line.startswith((".reg", ".pragma")):
                continue
            if label := re.fullmatch(r"(\$?\w+):", line):
                if label.group(1) in targets:
                    self._open()
                    self.labels[label.group(1)] = len(self.blocks) - 1
                continue
            for statement in filter(None, (part.strip() for part in line.split(";"))):
                self._add(statement, number, source or f"PTX line {number}")

    def _open(self) -> None:
        if self.blocks[-1].code:
            self.blocks.append(Block())

    def _add(self, statement: str, line: int, source: str) -> None:
        guard = None
        if statement.startswith("@"):
            guard, statement = statement[1:].split(None, 1)
        op, *rest = statement.split(None, 1)
        operands = tuple(part.strip() for part in _COMMA.split(rest[0])) if rest else ()
        instruction = Instruction(op, operands, guard, line, source)
        self.instructions[line] = instruction
        block, head = self.blocks[-1], op.split(".")[0]
        block.code.append(instruction)
        block.whole_warps |= op != "bar.sync" and any(part in op for part in _TOGETHER)
        if head in _LEAVING or any(part in op for part in _SHARED_STATE):
            self._open()
