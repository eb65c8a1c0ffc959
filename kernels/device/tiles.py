"""Which tile each row kernel runs with: one table, looked up by architecture, divergence class and bytes per logit.

Every line that an architecture uses is compiled, for aligned rows, without spilling on sm_80, sm_90, sm_100 and gfx942,
by the tests in one dtype per architecture and by `make compile-all` in all.
A line for one architecture goes beside the "any" line of its class and wins there; `python -m fusedkd bench tune`
prints such lines. The vocabulary is not in the key: a short one gets a smaller tile (`tile_for`), and a row of many
tiles is the same loop whatever their number.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# Products and sums become one operation (FMA): what the instruction counts and the tiles below were found with, and no
# longer Triton's default from 3.10 on. Every launch and compilation takes it.
FUSION = {"enable_fp_fusion": True}

ANY = "any"
REGISTER_FILE = 65_536  # registers that a block may have


class TileKey(NamedTuple):
    """What decides which tile of the table a launch takes."""

    architecture: str  # "sm_90", "gfx942" ..., or ANY
    tile_class: str  # of the divergence: "light", "heavy", "two" or "many"
    logit_bytes: int  # of the wider side


@dataclass(frozen=True)
class Tile:
    """Columns per program step, the warps that share them, and the registers that a thread may take.

    Left to itself ptxas spills a few bytes for the sake of one more block per multiprocessor; `registers` says not to.
    `source` names the result that speaks for the tile: device, rows × vocabulary.
    """

    block: int
    num_warps: int
    registers: int | None = None
    source: str = field(default="not measured", compare=False)

    def launch(self) -> dict[str, Any]:
        """What a launch of a kernel of rows takes."""
        return {"BLOCK": self.block, "THREADS": self.threads(), **self.options()}

    def threads(self, warp: int = 64 if torch.version.hip else 32) -> int:
        """How many threads share a tile's columns."""
        return self.num_warps * warp

    def options(self) -> dict[str, Any]:
        """What any launch takes beside BLOCK."""
        chosen = {"num_warps": self.num_warps, **FUSION}
        if self.registers is not None and torch.version.hip is None:  # AMD's compiler has no such option
            chosen["maxnreg"] = self.registers
        return chosen


# "light" and "heavy": one-sweep statistics with few or many sums; "two": normalisers, then sums; "many": further
# sweeps with a heavy term.
TABLE: dict[TileKey, Tile] = {
    TileKey(ANY, "light", 2): Tile(4096, 8, 128),
    TileKey(ANY, "light", 4): Tile(2048, 8, 128),
    TileKey(ANY, "heavy", 2): Tile(2048, 4, 168),
    TileKey(ANY, "heavy", 4): Tile(2048, 8, 128),
    TileKey(ANY, "two", 2): Tile(2048, 4, 168),
    TileKey(ANY, "two", 4): Tile(1024, 4, 168),
    TileKey(ANY, "many", 2): Tile(2048, 8, 128),
    TileKey(ANY, "many", 4): Tile(2048, 8, 128),
    TileKey("sm_100", "many", 4): Tile(1024, 4, 168),  # where eight warps leave too few registers for Triton 3.9
}

SMALLEST = 128  # a vocabulary below one tile gets the next power of two, not less than this


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942 ...; "any" where kernels do not run on a CUDA or ROCm device."""
    if device.type != "cuda":
        return ANY
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def table_tile(key: TileKey) -> Tile:
    """The table's tile: the architecture's own, or else that for any."""
    return TABLE.get(key) or TABLE[key._replace(architecture=ANY)]


def tile_for(key: TileKey, vocabulary: int) -> Tile:
    """The table's tile, cut down for a vocabulary that one smaller tile covers."""
    best = table_tile(key)
    covering = max(SMALLEST, 1 << (max(vocabulary, 1) - 1).bit_length())
    if covering >= best.block:
        return best
    return Tile(covering, min(best.num_warps, max(1, covering // 256)), best.registers)
