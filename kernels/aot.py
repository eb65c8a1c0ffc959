"""Compile the row kernels for any target without a GPU, as a launch with contiguous, 16-byte aligned rows would.

`python -m fusedkd.kernels.aot ARCH DTYPE [NAME ...]` compiles every kernel of every divergence in this process and
prints a JSON line for each: registers and stack are read with the cuobjdump that ships in the Triton wheel.
"""

import importlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import rows
from .divergence import TWO_SWEEPS, Definition, Online
from .divergences import ALL
from .language import triton
from .tiles import TABLE, Tile

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block may have
DTYPES = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2), "float16": ("fp16", 2)}
_ALIGNED = [["tt.divisibility", 16]]


class Variant(NamedTuple):
    """One kernel to compile: a divergence in one structure, with one of its sweeps."""

    name: str
    kernel: str  # value, gradient, value_and_gradient
    definition: Definition
    decoupled: bool
    online: Online
    tile: Tile


def variants(width: int) -> Iterator[Variant]:
    """Every kernel × divergence × sweep that a logit of `width` bytes can launch."""
    definitions = [member for member in ALL if isinstance(member, Definition)]
    for definition in definitions:
        for decoupled in (False, True):
            for online in definition.sweeps:
                name = f"{'decoupled_' if decoupled else ''}{definition.name}{'_two' if online is TWO_SWEEPS else ''}"
                for kernel in ("value", "gradient", "value_and_gradient"):
                    yield Variant(name, kernel, definition, decoupled, online, TABLE[online.tile, width])


def source(variant: Variant, dtype: str) -> Any:
    """The ASTSource of a variant: contiguous rows and labels; no statistics, bias, scale, softcap, floor or CE."""
    element = "*" + DTYPES[dtype][0]
    side = (element, "i32", "i32", "i64", "i64", "constexpr", "constexpr", "constexpr", "constexpr", "constexpr")
    constants = {5: 1, 6: None, 7: None, 8: None, 9: None}
    theta = ("fp32",) * len(variant.definition.parameters)
    kernel = getattr(rows, f"_{variant.kernel}")
    types: dict[str, Any] = {
        "student": side,
        "teacher": side,
        "label_ptr": "*i64",
        "loss_ptr": "*fp32",
        "saved_ptr": "*fp32",
        "stats_ptr": "constexpr",
        "upstream_ptr": "*fp32",
        "grad": (element, "i64", "constexpr", "i32"),
        "V": "i32",
        "scales": ("fp32", "fp32"),
        "ce": "constexpr",
        "theta": theta,
        "weights": ("fp32", "fp32"),
    }
    fixed: dict[str, Any] = {
        "ce": None,
        "stats_ptr": None,
        "TERM": variant.definition.term,
        "INIT": variant.online.init,
        "ADVANCE": variant.online.advance,
        "RATIO": variant.online.ratio,
        "SUMS": variant.online.sums,
        "DECOUPLED": variant.decoupled,
        "BLOCK": variant.tile.block,
    }
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in fixed.items() if name in names
    }
    aligned: dict[tuple[int, ...], Any] = {}
    for name in names:
        at = names.index(name)
        if name in ("student", "teacher"):
            constexprs |= {(at, i): value for i, value in constants.items()}
            aligned |= {(at, i): _ALIGNED for i in (0, 1, 3, 4)}
        elif name == "grad":
            constexprs[at, 2] = 1
            aligned |= {(at, i): _ALIGNED for i in (0, 1, 3)}
        elif name == "V" or str(types.get(name)).startswith("*"):
            aligned[at,] = _ALIGNED
    compiler = importlib.import_module("triton.compiler")
    return compiler.ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)


def compile_variant(variant: Variant, dtype: str, architecture: str) -> dict[str, Any]:
    """Compile; returns registers, stack and shared bytes, and the width of the widest global load in bytes."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget(*ARCHITECTURES[architecture])
    built = triton.compile(
        source(variant, dtype),
        target=target,
        options={"num_warps": variant.tile.num_warps},
    )
    report: dict[str, Any] = {
        "name": variant.name,
        "kernel": variant.kernel,
        "dtype": dtype,
        "architecture": architecture,
        "block": variant.tile.block,
        "num_warps": variant.tile.num_warps,
        "shared": built.metadata.shared,
    }
    if "cubin" in built.asm:
        report |= _resources(built.asm["cubin"])
        lanes = re.findall(r"ld\.global[\w.:]*?\.v(\d)\.b(\d+)", built.asm["ptx"])
        report["load_bytes"] = max((int(n) * int(bits) // 8 for n, bits in lanes), default=0)
    else:
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])
        report["stack"] = int(spilled.group(1)) if spilled else 0
    return report


def _resources(cubin: bytes) -> dict[str, int]:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return {"registers": int(registers.group(1)), "stack": int(stack.group(1))}


def main(architecture: str, dtype: str, *names: str) -> None:
    """Compile all variants (or those named) and print a JSON line each."""
    for variant in variants(DTYPES[dtype][1]):
        if not names or variant.name in names:
            print(json.dumps(compile_variant(variant, dtype, architecture)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
