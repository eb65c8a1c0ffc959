"""PTX text into basic blocks: the subset that Triton (LLVM's NVPTX back end) writes.

Not read: `.local` memory, calls, tables of branch targets, static `.shared` arrays. `translate` refuses what uses them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMA = re.compile(r",(?![^{\[]*[}\]])")  # not those within {} or []
_LEAVING = {"bra", "ret", "exit", "bar", "barrier", "atom", "red"}  # another thread may run behind these
_SHARED_STATE = (".acquire", ".relaxed", ".volatile")  # a load that may be waiting for another thread


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
        self.whole_warps: Instruction | None = None  # the first that all threads of a warp do together


class Kernel:
    """A parsed entry: parameters as (type, name), threads of a block, basic blocks in program order."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        entry = re.search(r"\.entry\s+([\w$]+)", text)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
        if entry is None or threads is None:
            raise NotImplementedError("PTX without an .entry, or without .reqntid: how many threads has a block?")
        self.name, self.threads = entry.group(1), int(threads.group(1))
        body = text.index("{", threads.end())
        self.params: list[tuple[str, str]] = re.findall(
            r"\.param\s+\.(\w+)[^,\n]*?\b([\w$]+_param_\d+)", text[entry.start() : body]
        )
        # types by prefix
        self.registers = {prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>", text)}
        self.blocks, self.labels = [Block()], dict[str, int]()
        self.instructions: dict[int, Instruction] = {}
        self._read(text.count("\n", 0, body) + 1, set(re.findall(r"\bbra(?:\.uni)?\s+(\$?\w+)", text)))

    @property
    def title(self) -> str:
        """file:kernel."""
        return f"{self.blocks[0].code[0].source.split(':')[0]}:{self.name}"

    def _read(self, start: int, targets: set[str]) -> None:
        source = None
        for number, raw in enumerate(self.lines[start:], start + 1):
            line, _, comment = (part.strip() for part in raw.partition("//"))
            if line.startswith("}"):
                return
            if line.startswith(".loc"):
                source = comment or line
            elif label := re.fullmatch(r"(\$?\w+):", line):
                if label.group(1) in targets:
                    self._open()
                    self.labels[label.group(1)] = len(self.blocks) - 1
            elif not line.startswith((".reg", ".pragma")):
                for statement in filter(None, map(str.strip, line.split(";"))):
                    self._add(statement, number, source or f"PTX line {number}")

    def _open(self) -> None:
        if self.blocks[-1].code:
            self.blocks.append(Block())

    def _add(self, statement: str, line: int, source: str) -> None:
        guard = None
        if statement.startswith("@"):
            guard, statement = statement[1:].split(None, 1)
        op, *rest = statement.split(None, 1)
        operands = tuple(map(str.strip, _COMMA.split(rest[0]))) if rest else ()
        block, instruction = self.blocks[-1], Instruction(op, operands, guard, line, source)
        self.instructions[line] = instruction
        block.code.append(instruction)
        if block.whole_warps is None and op != "bar.sync" and (".sync" in op or ".warp" in op):
            block.whole_warps = instruction
        if op.split(".")[0] in _LEAVING or any(part in op for part in _SHARED_STATE):
            self._open()
