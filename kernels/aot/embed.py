"""The row kernels as C sources: what CMakeLists.txt builds the C library from. Needs Triton; no GPU, no CUDA toolkit.

    python -m kernels.aot.embed kernels ARCH DTYPE --out DIR [--divergences NAME ...] DIR/kernels_sm_90_float16.c, .json
    python -m kernels.aot.embed names                                                 those that --divergences takes
    python -m kernels.aot.embed tables --out DIR --archs ARCH ... --dtypes DTYPE ...  DIR/tables.c, DIR/manifest.json

`kernels` compiles `value` and `value_and_gradient` of each divergence for one architecture and dtype, each in two
variants, and stops at the first that spills. `tables` writes what c/fusedkd.c must know about divergences: which kernel
serves one, the domain of its parameters and what they become. All of it comes from the registry.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # source lines would be two thirds of every cubin

from ..device.args import GradArg, LogitsArg, ParametersArg, ScalesArg, ValueArg, WeightsArg
from ..device.tiles import REGISTER_FILE
from ..divergences import REGISTRY
from ..language import triton
from ..maths.definition import NONTARGET, TARGET, Definition, Form, Parameter
from .compiler import DTYPES, Call, Variant, build, resources, source, variants

HEADER = Path(__file__).parents[1] / "c" / "fusedkd.h"
KERNELS = ("value", "value_and_gradient")
CALLS = {"aligned": Call("logits", saved=False), "generic": Call("none", stats=True, saved=False)}
SHARED = 48 << 10  # bytes that a launch gets without asking for more
MOST_PARAMETERS, MOST_THETA = 4, 4
# Where each argument of a kernel is found in `struct values` of c/kernels.h.
FIELDS: dict[str, tuple[Any, ...]] = {
    "student": LogitsArg("student", "zero", "rows", "zero_stride", "student_row", "student_column"),
    "teacher": LogitsArg("teacher", "zero", "rows", "zero_stride", "teacher_row", "teacher_column"),
    "label_ptr": ("labels",),
    "out": ValueArg("loss", "stats"),
    "upstream_ptr": ("weights",),
    "grad": GradArg("grad", "grad_row", "grad_column", "width"),
    "V": ("vocab_size",),
    "scales": ScalesArg("inv_temperature", "factor"),
    "numbers": ParametersArg(
        theta=tuple(f"theta[{i}]" for i in range(MOST_THETA)), weights=WeightsArg("target", "nontarget"), mix=("mix",)
    ),
}
_BYTES = {"i32": 4, "fp32": 4, "i64": 8}
_PTX_BYTES = {"u32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}
_STEP = 1 / 64  # by which a parameter is moved to see what it does


# Kernels


def arguments(signature: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What a compiled kernel takes, in its order: the field of `struct values` and its bytes."""

    def leaves(types: Any, fields: Any) -> Iterator[tuple[str, int]]:
        if isinstance(types, tuple):
            for i, kind in enumerate(types):
                yield from leaves(kind, fields[i] if i < len(fields) else ())
        elif types != "constexpr":
            yield fields, 8 if types.startswith("*") else _BYTES[types]

    found = []
    for name, types in signature.items():
        fields = FIELDS.get(name, ("",))
        found += leaves(types, fields if isinstance(types, tuple) else fields[0])
    return found


def unspilled(variant: Variant, dtype: str, architecture: str, call: Call) -> tuple[Variant, Any, Any, dict[str, int]]:
    """The variant at the table's tile or, where strides and statistics make that spill, with more registers or fewer
    columns for a thread; its source, Triton's compiled kernel, and its resources."""
    tile = variant.tile
    most = min(255, REGISTER_FILE // (32 * tile.num_warps))
    tries = [(tile.block, tile.registers), *((tile.block // n, most) for n in (1, 2, 4))]
    while True:
        block, registers = tries.pop(0)
        variant = variant._replace(tile=dataclasses.replace(tile, block=block, registers=registers))
        asked = source(variant, dtype, call)
        built = build(asked, variant.tile, architecture)
        used = resources(built.asm["cubin"])
        if used["stack"] == 0 or not tries:
            return variant, asked, built, used


def compiled(kernel: str, variant: Variant, dtype: str, architecture: str, alignment: str) -> dict[str, Any]:
    """Compile one kernel; its line of the manifest, and under "cubin" its code.

    Raises:
        RuntimeError: it spills, or takes what c/fusedkd.c does not give.
    """
    variant, asked, built, used = unspilled(variant, dtype, architecture, CALLS[alignment])
    symbol = f"fusedkd_{architecture}_{dtype}_{variant.name}_{kernel}_{alignment}"
    given = arguments(asked.signature)
    ptx = built.asm["ptx"]
    taken = [_PTX_BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", ptx[ptx.index(".entry") :].split(")")[0])]
    scratch = taken[len(given) :]  # Triton's own pointers, null where they are not used
    metadata = built.metadata
    for wrong, why in (
        (taken[: len(given)] != [size for _, size in given] or set(scratch) - {8}, f"takes {taken}, is given {given}"),
        (used["stack"] != 0, f"spills {used['stack']} bytes"),
        (metadata.shared > SHARED, f"needs {metadata.shared} bytes of shared memory"),
        (getattr(metadata, "global_scratch_size", 0) > 0, "needs scratch memory"),
    ):
        if wrong:
            raise RuntimeError(f"{symbol} {why}")
    target = re.search(r"\.target sm_(\d+)(a?)", ptx)
    assert target
    return {
        "symbol": symbol,
        "kernel": kernel,
        "divergence": variant.name,
        "dtype": dtype,
        "arch": int(target.group(1)),
        "exact": target.group(2) == "a",  # code of this architecture alone, not of later ones of its generation
        "variant": alignment,
        "entry": metadata.name,
        "block": variant.tile.block,
        "num_warps": metadata.num_warps,
        "registers": used["registers"],
        "shared": metadata.shared,
        "spills": used["stack"],
        "bytes": len(built.asm["cubin"]),
        "arguments": [name for name, _ in given],
        "sizes": [size for _, size in given],
        "scratch": len(scratch),
        "cubin": built.asm["cubin"],
    }


def wanted(names: list[str]) -> set[str]:
    """The kernels' divergences (names of aot.variants) that the C library needs for these of its own; all for none."""
    specs = [spec(name) for name in names or in_c()]
    found = set()
    for one in specs:
        for structure in ("", "decoupled_") if one["separable"] else ("decoupled_" if one["decoupled"] else "",):
            for sweeps in ("", "_two") if one["one_sweep"] else ("",):
                found.add(structure + one["kernel"] + sweeps)
    return found


def write_kernels(architecture: str, dtype: str, out: Path, names: list[str]) -> None:
    """DIR/kernels_ARCH_DTYPE.c and its part of the manifest."""
    needed = wanted(names)
    chosen = [
        (kernel, variant, alignment)
        for kernel, variant in variants(DTYPES[dtype][1], architecture)
        if kernel in KERNELS and not variant.argmax and variant.name in needed
        for alignment in CALLS
    ]
    assert {variant.name for _, variant, _ in chosen} == needed, "a kernel's name is not what `spec` expects"
    lines, table = [], []
    part = f"{architecture}_{dtype}"
    with (out / f"kernels_{part}.c").open("w") as file:
        file.write('#include "kernels.h"\n')
        for i, (kernel, variant, alignment) in enumerate(chosen):
            line = compiled(kernel, variant, dtype, architecture, alignment)
            code = line.pop("cubin")
            file.write(f"\nFUSEDKD_API const unsigned char {line['symbol']}[] __attribute__((aligned(16))) = {{\n")
            file.writelines(",".join(map(str, code[at : at + 64])) + ",\n" for at in range(0, len(code), 64))
            file.write("};\n")
            table.append(_entry(line))
            lines.append(line)
            _progress(part, i + 1, len(chosen))
        file.write(f"\nconst struct fusedkd_kernel fusedkd_kernels_{part}[] = {{\n{''.join(table)}}};\n")
        file.write(f"const int fusedkd_kernels_{part}_count = {len(table)};\n")
    (out / f"kernels_{part}.json").write_text(json.dumps(lines, indent=1) + "\n")


def _entry(line: Mapping[str, Any]) -> str:
    given = ", ".join(f"AT({name}, {size})" for name, size in zip(line["arguments"], line["sizes"], strict=True))
    return (
        f'    {{"{line["divergence"]}", "{line["entry"]}", {line["symbol"]}, FUSEDKD_{line["dtype"].upper()}, '
        f"{line['arch']}, {int(line['exact'])}, {int(line['kernel'] == 'value_and_gradient')}, "
        f"{int(line['variant'] == 'aligned')}, {32 * line['num_warps']}, {line['shared']}, {len(line['arguments'])}, "
        f"{line['scratch']},\n     {{{given}}}}},\n"
    )


def _progress(part: str, done: int, of: int) -> None:
    """One line that is written over on a terminal; in a log one in ten."""
    last = done == of
    if sys.stderr.isatty():
        print(f"\r{part}: {done} of {of} kernels", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last or done % 10 == 0:
        print(f"{part}: {done} of {of} kernels", file=sys.stderr, flush=True)


# Divergences


def in_c() -> list[str]:
    """The divergences that the header has numbers for, in the order of these."""
    numbers = re.findall(r"FUSEDKD_DIVERGENCE_(\w+) = (\d+)", HEADER.read_text())
    assert [int(n) for _, n in numbers] == list(range(len(numbers))), "the header's numbers are not 0, 1, 2 ..."
    return [name.lower() for name, _ in numbers]


def spec(name: str) -> dict[str, Any]:
    """What the C library knows of a divergence: its kernel, its parameters, their domain and where they go.

    Raises:
        KeyError: the registry has no such name.
        ValueError: its parameters reach the kernel in another way than multiplied and added.
    """
    member = REGISTRY[name]
    given = [p for p in member.arguments if not isinstance(p.default, str) and p not in (TARGET, NONTARGET)]
    defaults = {parameter.name: parameter.default for parameter in given}
    form = _form(name, defaults)
    slots = _slots(form)
    maps = {key: _affine(name, key, defaults) for key in slots}
    definition = form.definition
    two = "_two" if definition.online.sums is None else ""
    one_sweep = [(p.one_sweep_from, math.inf) for p in definition.parameters] if len(definition.sweeps) > 1 else []
    if len(defaults) > MOST_PARAMETERS or len(form.theta) > MOST_THETA:
        raise ValueError(f"{name} has more parameters than the C library passes on")
    return {
        "name": name,
        "kernel": ("mixed_" if form.mix is not None else "") + definition.name + two,
        "decoupled": form.decoupled,
        "separable": definition.separable and form.mix is None and not form.decoupled,
        "weighted": TARGET in member.arguments,
        "parameters": [_range(parameter) for parameter in given],
        "theta": [maps[key] for key in slots if key.startswith("theta")],
        "target": maps["target"],
        "nontarget": maps["nontarget"],
        "mix": maps.get("mix", (0.0, [])),
        "one_sweep": one_sweep,
    }


def _range(parameter: Parameter) -> tuple[str, float, float, float, bool]:
    """Name, default, least and greatest value, and whether it is True or False."""
    if isinstance(parameter.default, bool):
        return parameter.name, float(parameter.default), 0.0, 1.0, True
    return parameter.name, parameter.default, parameter.low, parameter.high, False


def _form(name: str, values: Mapping[str, Any]) -> Form:
    member = REGISTRY[name]
    if isinstance(member, Definition):
        return Form(member, tuple(float(value) for value in values.values()))
    given: dict[str, Any] = {parameter.name: parameter.default for parameter in member.arguments} | dict(values)
    if "base" in given:
        base = REGISTRY[given["base"]]
        assert isinstance(base, Definition)
        given["base"] = Form(base, tuple(parameter.default for parameter in base.parameters))
    return member.form(**given)


def _slots(form: Form) -> dict[str, float]:
    """The numbers that a form gives its kernel."""
    slots = {f"theta[{i}]": float(x) for i, x in enumerate(form.theta)}
    slots |= {"target": float(form.target), "nontarget": float(form.nontarget)}
    return slots if form.mix is None else {**slots, "mix": float(form.mix)}


def _affine(name: str, slot: str, defaults: Mapping[str, Any]) -> tuple[float, list[float]]:
    """A slot as offset + Σ slope · parameter, checked at random points."""

    def at(values: Mapping[str, Any]) -> float:
        return _slots(_form(name, values))[slot]

    start = at(defaults)
    slopes = [
        round((at({**defaults, key: float(x) + _STEP}) - start) / _STEP, 6) for key, x in defaults.items()
    ]  # fmt: skip
    offset = round(start - math.fsum(k * float(x) for k, x in zip(slopes, defaults.values(), strict=True)), 6)
    dice = random.Random(0)
    for _ in range(20):
        values = {key: float(x) + dice.uniform(-0.05, 0.05) for key, x in defaults.items()}
        line = offset + math.fsum(k * x for k, x in zip(slopes, values.values(), strict=True))
        if abs(at(values) - line) > 1e-9:
            raise ValueError(f"{slot} of {name} is not offset + slope · parameter: the C library cannot have it")
    return offset, slopes


def write_tables(out: Path, parts: list[str]) -> None:
    """DIR/tables.c and DIR/manifest.json, from the parts that `write_kernels` left in DIR."""
    specs = [spec(name) for name in in_c()]
    code = ['#include "kernels.h"\n\nconst struct fusedkd_divergence_spec fusedkd_specs[] = {\n']
    code += [_spec_entry(one) for one in specs]
    code.append(f"}};\nconst int fusedkd_spec_count = {len(specs)};\n\n")
    for part in parts:
        code.append(f"extern const struct fusedkd_kernel fusedkd_kernels_{part}[];\n")
        code.append(f"extern const int fusedkd_kernels_{part}_count;\n")
    code.append("\nconst struct fusedkd_part fusedkd_parts[] = {\n")
    code += [f"    {{fusedkd_kernels_{part}, &fusedkd_kernels_{part}_count}},\n" for part in parts]
    code.append(f"}};\nconst int fusedkd_part_count = {len(parts)};\n")
    (out / "tables.c").write_text("".join(code))
    manifest = {
        "triton": triton.__version__,
        "kernels": [line for part in parts for line in json.loads((out / f"kernels_{part}.json").read_text())],
        "divergences": specs,
        "not in C": [name for name in REGISTRY if name not in in_c()],
    }
    (out / "manifest.json").write_text(
        json.dumps(manifest, indent=1).replace("-Infinity", "null").replace("Infinity", "null") + "\n"
    )


def _spec_entry(one: Mapping[str, Any]) -> str:
    def number(x: float) -> str:
        return ("-" if x < 0 else "") + "INFINITY" if math.isinf(x) else repr(float(x))

    def affine(slot: Any) -> str:
        offset, slopes = slot
        return f"{{{number(offset)}, {{{', '.join(map(number, slopes)) or '0'}}}}}"

    parameters = ", ".join(
        f'{{"{key}", {number(default)}, {number(low)}, {number(high)}, {int(flag)}}}'
        for key, default, low, high, flag in one["parameters"]
    )
    box = ", ".join(f"{{{number(low)}, {number(high)}}}" for low, high in one["one_sweep"])
    flags = (one["decoupled"], one["separable"], one["weighted"])
    return (
        f'    {{"{one["name"]}", "{one["kernel"]}", {", ".join(str(int(x)) for x in flags)}, '
        f"{len(one['parameters'])}, {len(one['theta'])}, {len(one['one_sweep'])},\n"
        f"     {{{parameters or '{0}'}}},\n     {{{', '.join(map(affine, one['theta'])) or '{0}'}}},\n"
        f"     {affine(one['target'])}, {affine(one['nontarget'])}, {affine(one['mix'])}, {{{box or '{0}'}}}}},\n"
    )


def main() -> None:
    """Write one part, or what ties the parts together."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot.embed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kernels", help="compile for one architecture and dtype")
    one.add_argument("arch", choices=[f"sm_{n}" for n in (80, 90, 100)])
    one.add_argument("dtype", choices=DTYPES)
    one.add_argument("--divergences", nargs="*", default=[], choices=in_c(), metavar="NAME")
    tables = commands.add_parser("tables", help="write the tables over all parts")
    tables.add_argument("--archs", nargs="+", required=True)
    tables.add_argument("--dtypes", nargs="+", required=True, choices=DTYPES)
    for command in (one, tables):
        command.add_argument("--out", type=Path, required=True, metavar="DIR")
    commands.add_parser("names", help="print the divergences that there are")
    args = parser.parse_args()
    if args.command == "names":
        print(";".join(in_c()))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "kernels":
        write_kernels(args.arch, args.dtype, args.out, args.divergences)
    else:
        write_tables(args.out, [f"{arch}_{dtype}" for arch in args.archs for dtype in args.dtypes])


if __name__ == "__main__":
    main()
