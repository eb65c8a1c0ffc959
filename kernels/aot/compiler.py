"""Compile the row kernels for any target without a GPU, as a launch with contiguous, 16-byte aligned rows would.

`python -m fusedkd.kernels.aot.compiler ARCH DTYPE [NAME ...] [--instructions]` compiles every kernel of every
divergence in this process and prints a JSON line for each: registers, stack and, asked for because they take as long as
that, what the loops take per logit pair are read with the cuobjdump that ships in the Triton wheel.
"""

import argparse
import importlib
import json
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..device import rows, split_rows, token_logprobs, topk, vocab_chunks
from ..device.args import GradArg, LogitsArg, ParametersArg, ScalesArg, ValueArg, WeightsArg, WorkspaceArg
from ..device.tiles import FUSION, Tile, TileKey, table_tile
from ..device.topk import BucketArg
from ..divergences import definitions
from ..language import triton
from ..maths.definition import TWO_SWEEPS, Definition, OnlineForm
from . import sass

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
    """One kernel to compile: a divergence in one structure, with one of its sweeps; or log-probabilities."""

    name: str
    kernel: Any  # a Triton function
    tile: Tile
    definition: Definition | None = None
    decoupled: bool = False
    online: OnlineForm = TWO_SWEEPS
    argmax: bool = False
    mixed: bool = False


class Call(NamedTuple):
    """What a launch gives, as far as it decides what is compiled."""

    # Multiples of 16: "all" addresses, strides and V; of "logits" only; "none", and any strides; CONGRUENT: none, but
    # rows of both sides and of the gradient begin alike.
    aligned: str = "all"
    stats: bool = False
    warp: int = 32  # threads
    saved: bool = True  # whether `value` keeps what `gradient` needs
    gradient: str | None = None  # its dtype, if not that of the logits


CONGRUENT = "congruent"
PLAIN = Call()
ROW_KERNELS = {"value": rows._value, "gradient": rows._gradient, "value_and_gradient": rows._value_and_gradient}
_CHUNK_KERNELS = {
    "absorb": vocab_chunks._absorb,
    "add_sums": vocab_chunks._add_sums,
    "chunk_gradient": vocab_chunks._gradient,
}
_SPLIT_KERNELS = {
    "split_statistics": split_rows._statistics,
    "split_sums": split_rows._sums,
    "split_finalize": split_rows._finalize,
    "split_gradient": split_rows._gradient,
}
_TOPK_KERNELS = {
    "topk_mark": topk._mark,
    "topk_gather": topk._gather,
    "topk_masses": topk._masses,
    "topk_gradient": topk._gradient,
}
_LISTED = 128  # columns: a hundred tokens are the most that is usual
_VOCABULARY = 151_936  # says how many programs share a row


def variants(width: int, architecture: str) -> Iterator[tuple[str, Variant]]:
    """Every kernel × divergence × sweep that a logit of `width` bytes can launch, with the kernel's name."""
    for definition in definitions().values():
        for decoupled in (False, True):
            if decoupled and not definition.separable:
                continue
            for online in definition.sweeps:
                title = definition.variant(online, decoupled)
                tile = table_tile(TileKey(architecture, online.tile, width))
                kernels = dict(ROW_KERNELS)
                if not decoupled:  # the kernels of parts of rows do not know the structure
                    kernels |= _CHUNK_KERNELS | ({} if definition.whole_rows else _SPLIT_KERNELS)
                    if online.sums is not None:
                        kernels = {key: kernel for key, kernel in kernels.items() if not key.endswith("_sums")}
                for key, kernel in kernels.items():
                    best = split_rows.LARGEST[online.tile, width] if key in _SPLIT_KERNELS else tile
                    yield key, Variant(title, kernel, best, definition, decoupled, online)
    for title, name, decoupled, option in (
        ("decoupled_rkl_argmax", "rkl", True, {"argmax": True}),
        ("mixed_fkl", "fkl", False, {"mixed": True}),
    ):
        definition = definitions()[name]
        tile = table_tile(TileKey(architecture, rows.tile_class(definition.online, busy=True), width))
        for key, kernel in ROW_KERNELS.items():
            yield key, Variant(title, kernel, tile, definition, decoupled, definition.online, **option)
    for key, kernel in (("value", token_logprobs._value), ("gradient", token_logprobs._gradient)):
        yield key, Variant("token_logprobs", kernel, table_tile(TileKey(architecture, "light", width)))
    swept = table_tile(TileKey(architecture, "light", width))
    tiles = {"topk_mark": Tile(_LISTED, 1), "topk_gather": Tile(_LISTED, 4)}
    for key, kernel in _TOPK_KERNELS.items():
        yield key, Variant("topk", kernel, tiles.get(key, swept))


def specialization(
    variant: Variant, dtype: str, call: Call = PLAIN
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a variant with labels, and without bias, scale, softcap, floor and CE."""
    element, written = "*" + DTYPES[dtype][0], call.gradient or dtype
    apart = "i64" if call.aligned == "none" else "constexpr"  # columns
    side = LogitsArg(element, "i32", "i32", "i64", "i64", apart, *["constexpr"] * 5)
    definition, online = variant.definition, variant.online
    row_parameters = None if definition is None else definition.row_parameters
    given = 0 if definition is None else len(definition.parameters)
    stats = "*fp32" if call.stats else "constexpr"
    types: dict[str, Any] = {
        **dict.fromkeys(("student", "teacher", "side"), side),
        **dict.fromkeys(("label_ptr", "token_ptr", "ids_ptr"), "*i64"),
        **dict.fromkeys(("loss_ptr", "upstream_ptr", "carry_ptr", "sums_ptr", "dominant_ptr"), "*fp32"),
        **dict.fromkeys(("out_ptr", "masses_ptr", "logits_ptr", "listed_grad_ptr", "bucket_grad_ptr"), "*fp32"),
        "listed_ptr": "*i32",
        "bucket": BucketArg("*i32", "i32", "i32"),
        "saved_ptr": "*fp32" if call.saved else "constexpr",
        "stats_ptr": stats,
        "out": ValueArg("*fp32", stats),
        "grad": GradArg("*" + DTYPES[written][0], "i64", apart, "i32"),
        "workspace": WorkspaceArg("*fp32", "*fp32", "*fp32", "*i32", "i32"),
        **dict.fromkeys(("V", "first", "width", "words", "K", "stride_n", "stride_logits"), "i32"),
        "inv_tau": "fp32",
        "scales": ScalesArg("fp32", "fp32", "constexpr"),
        "numbers": ParametersArg(("fp32",) * given, WeightsArg("fp32", "fp32"), ("fp32",) * variant.mixed),
    }
    fixed: dict[str, Any] = {
        "stats_ptr": None,
        "saved_ptr": None,
        "ce": None,
        "TERM": None if definition is None else definition.summand(online),
        "OUTER": None if definition is None else definition.outer,
        "GRADIENT_TERM": None if definition is None else definition.gradient_summand(online, written != "float32"),
        "INIT": online.init,
        "ADVANCE": online.advance,
        "RATIO": online.ratio,
        "SUMS": online.sums,
        "ROW_PARAMETERS": None if row_parameters is None else row_parameters.kernel,
        "EXTRAS": 0 if definition is None else definition.extras,
        "COUNT": len(online.init.torch()),
        "DECOUPLED": variant.decoupled,
        "ARGMAX": variant.argmax,
        "NUM_SPLITS": triton.next_power_of_2(triton.cdiv(_VOCABULARY, variant.tile.block)),
        "BLOCK": variant.tile.block,
        "LISTED": _LISTED,
        "THREADS": variant.tile.threads(call.warp),
    }
    names = variant.kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs: dict[tuple[int, ...], Any] = {
        (names.index(name),): value
        for name, value in fixed.items()
        if name in names and types.get(name, "constexpr") == "constexpr"
    }
    aligned: dict[tuple[int, ...], Any] = {}
    for name in names:
        at, kind = names.index(name), types.get(name)
        if isinstance(kind, tuple) and hasattr(kind, "_fields"):
            constexprs |= {(at, i): None for i, member in enumerate(kind) if member == "constexpr"}
            if isinstance(kind, BucketArg) and call.aligned == "all":
                aligned[at, kind._fields.index("V")] = _ALIGNED
            if isinstance(kind, ValueArg) and call.aligned == "all":
                aligned |= {(at, i): _ALIGNED for i, member in enumerate(kind) if member != "constexpr"}
        if isinstance(kind, LogitsArg | GradArg):
            column = kind._fields.index("stride_v")
            if apart == "constexpr":
                constexprs[at, column] = 1
            if call.aligned == CONGRUENT and name == "teacher":
                constexprs[at, kind._fields.index("congruent")] = 1
            if apart == "constexpr" and call.aligned != CONGRUENT:
                sixteen = ("ptr", "first", "stride_outer", "stride_n", "width")
                aligned |= {(at, i): _ALIGNED for i, field in enumerate(kind._fields) if field in sixteen}
        elif (name in ("V", "width") and call.aligned in ("all", "logits")) or (
            str(kind)[0] == "*" and call.aligned == "all"
        ):
            aligned[at,] = _ALIGNED
    return signature, constexprs, aligned


def source(variant: Variant, dtype: str, call: Call = PLAIN) -> Any:
    """What Triton compiles."""
    signature, constexprs, aligned = specialization(variant, dtype, call)
    compiler = importlib.import_module("triton.compiler")
    return compiler.ASTSource(variant.kernel, signature=signature, constexprs=constexprs, attrs=aligned)


def build(source: Any, tile: Tile, architecture: str) -> Any:
    """Triton's compiled kernel; no GPU is asked."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget(*ARCHITECTURES[architecture])
    registers = {"maxnreg": tile.registers} if tile.registers and architecture.startswith("sm_") else {}
    return triton.compile(source, target=target, options={"num_warps": tile.num_warps, **FUSION, **registers})


def compile_variant(
    kernel: str,
    variant: Variant,
    dtype: str,
    architecture: str,
    instructions: bool = False,
    gradient: str | None = None,
    aligned: str = "all",
) -> dict[str, Any]:
    """Compile; returns registers, stack and shared bytes, and the width of the widest global load in bytes.

    "instructions", where asked for, are those of each loop over columns, in the order of the machine code, per logit
    pair (sass.py); per logit where there is one side, and where a loop only writes. "special", "fp32" and "bytes" are
    the other counts of sass.LoopCount, "runs" as in `runs`.
    """
    call = Call(aligned, warp=ARCHITECTURES[architecture][2], gradient=gradient)
    built = build(source(variant, dtype, call), variant.tile, architecture)
    report: dict[str, Any] = {
        "name": variant.name,
        "kernel": kernel,
        "dtype": dtype,
        "gradient_dtype": gradient or dtype,
        "architecture": architecture,
        "block": variant.tile.block,
        "num_warps": variant.tile.num_warps,
        "shared": built.metadata.shared,
    }
    if "cubin" in built.asm:
        report |= resources(built.asm["cubin"])
        sides = len({"student", "teacher", "side"} & set(variant.kernel.arg_names))
        if instructions and sides:
            listing = disassembly(built.asm["cubin"])
            elements = variant.tile.block // (32 * variant.tile.num_warps)
            counts = sass.per_element(listing, elements, DTYPES[dtype][1] * sides, DTYPES[gradient or dtype][1])
            report |= {field: [x[i] for x in counts] for i, field in enumerate(sass.LoopCount._fields)}
            report["runs"] = runs(kernel, variant, len(counts))
        loads = re.findall(r"ld\.global[\w.:]*?\.v(\d)\.b(\d+)", built.asm["ptx"])
        widths = [int(n) * int(bits) // 8 for n, bits in loads]
        report["load_bytes"] = max(widths, default=0)
    else:
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])
        report["stack"] = int(spilled.group(1)) if spilled else 0
    return report


def runs(kernel: str, variant: Variant, loops: int) -> list[int]:
    """How often a tile in the middle of a row goes through each loop of a kernel, in the order of the machine code.

    A sweep has two loops, of which the first takes the inner tiles; row parameters have theirs behind the first sweep;
    the last loop of a gradient writes the zeros of an ignored row. A sweep of log-probabilities has one loop.

    Raises:
        ValueError: the kernel has other loops.
    """
    zeros = [0] * ("gradient" in kernel and loops > 0)
    sweeps = loops - len(zeros)
    if variant.definition is None or not loops:
        return [1] * sweeps + zeros
    found = variant.definition.row_parameters
    reads = found.reads if found is not None and kernel.startswith("value") else ()
    after = sweeps - len(reads) - 2
    if after < 0 or after % 2:
        raise ValueError(f"{kernel} of {variant.name} has {loops} loops, which are not those of its sweeps")
    return [1, 0, *reads, *[1, 0] * (after // 2), *zeros]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack: what ptxas spills."""
    text = _cuobjdump(cubin, "-res-usage")
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return {"registers": int(registers.group(1)), "stack": int(stack.group(1))}


def disassembly(cubin: bytes) -> str:
    """What sass.py reads."""
    return _cuobjdump(cubin, "--dump-sass")


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile all variants (or those named) and print a JSON line each."""
    parser = argparse.ArgumentParser(prog="python -m fusedkd.kernels.aot.compiler", description=__doc__)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("names", metavar="NAME", nargs="*", help="of a divergence's variant, such as decoupled_rkl")
    parser.add_argument("--kernels", metavar="KERNEL", nargs="+", help="of those kernels alone, such as value")
    parser.add_argument("--aligned", choices=("all", CONGRUENT), default="all", help="what Triton knows of rows")
    parser.add_argument("--instructions", action="store_true", help="count them in each loop (NVIDIA only)")
    parser.add_argument("--gradient", choices=DTYPES, help="dtype of gradients, if not that of logits")
    args = parser.parse_args()
    about = args.dtype, args.architecture, args.instructions, args.gradient, args.aligned
    for kernel, variant in variants(DTYPES[args.dtype][1], args.architecture):
        if variant.name in (args.names or [variant.name]) and kernel in (args.kernels or [kernel]):
            print(json.dumps(compile_variant(kernel, variant, *about)), flush=True)


if __name__ == "__main__":
    main()
