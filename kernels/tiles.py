"""Which tile each row kernel runs with: one table, looked up by architecture class, divergence class and dtype.

Every line is compiled by the tests without spilling on sm_80, sm_90, sm_100 and gfx942. None has been timed on a GPU:
"not measured" holds until a result row is named beside it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Columns per program step and the warps that share them."""

    block: int
    num_warps: int


# (class, bytes per logit) -> tile. "light" and "heavy": one-sweep statistics with few or many sums; "two": normalisers,
# then sums; "gathered": further sweeps with a heavy term.
TABLE: dict[tuple[str, int], Tile] = {
    ("light", 2): Tile(4096, 8),
    ("light", 4): Tile(4096, 8),
    ("heavy", 2): Tile(2048, 8),
    ("heavy", 4): Tile(2048, 8),
    ("two", 2): Tile(1024, 4),
    ("two", 4): Tile(1024, 8),
    ("gathered", 2): Tile(2048, 8),
    ("gathered", 4): Tile(1024, 8),
}

SMALLEST = 128  # a vocabulary below one tile gets the next power of two, not less than this


def fitting(kind: str, element_size: int, vocabulary: int) -> Tile:
    """The table's tile, cut down for a vocabulary that one smaller tile covers."""
    chosen = TABLE[kind, element_size]
    covering = max(SMALLEST, 1 << (max(vocabulary, 1) - 1).bit_length())
    return chosen if covering >= chosen.block else Tile(covering, min(chosen.num_warps, max(1, covering // 256)))
