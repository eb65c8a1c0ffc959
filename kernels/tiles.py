"""Which tile each row kernel runs with: one table, looked up by architecture class, divergence class and dtype.

Every line is compiled by the tests without spilling on sm_80, sm_90, sm_100 and gfx942. None has been timed on a GPU:
"not measured" holds until a result row is named beside it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Columns per program step, the warps that share them, and the registers that a thread may take.

    Left to itself ptxas spills a few bytes for the sake of one more block per multiprocessor; `registers` says not to.
    """

    block: int
    num_warps: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What a launch takes beside BLOCK."""
        chosen = {"num_warps": self.num_warps}
        if self.registers is not None and torch.version.hip is None:  # AMD's compiler has no such option
            chosen["maxnreg"] = self.registers
        return chosen


# (class, bytes per logit) -> tile. "light" and "heavy": one-sweep statistics with few or many sums; "two": normalisers,
# then sums; "gathered": further sweeps with a heavy term.
TABLE: dict[tuple[str, int], Tile] = {
    ("light", 2): Tile(4096, 8),
    ("light", 4): Tile(2048, 8, 128),
    ("heavy", 2): Tile(2048, 8, 128),
    ("heavy", 4): Tile(1024, 8, 128),
    ("two", 2): Tile(1024, 4, 128),
    ("two", 4): Tile(1024, 8, 128),
    ("gathered", 2): Tile(2048, 8, 255),
    ("gathered", 4): Tile(1024, 8, 255),
}

SMALLEST = 128  # a vocabulary below one tile gets the next power of two, not less than this


def fitting(kind: str, element_size: int, vocabulary: int) -> Tile:
    """The table's tile, cut down for a vocabulary that one smaller tile covers."""
    chosen = TABLE[kind, element_size]
    covering = max(SMALLEST, 1 << (max(vocabulary, 1) - 1).bit_length())
    if covering >= chosen.block:
        return chosen
    return Tile(covering, min(chosen.num_warps, max(1, covering // 256)), chosen.registers)
