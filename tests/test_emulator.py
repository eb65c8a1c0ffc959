"""The emulator of compiled kernels on small kernels in PTX: what each instruction gives, and what each fault says."""

from __future__ import annotations

import itertools
import math
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

import emulator
import numpy as np
import pytest
import torch
from emulator import driver, machine, plugin, translate

NAN, INF = math.nan, math.inf
TINY = 2.0**-127  # subnormal
TYPES = {"s4": "i4", "u4": "u4", "f4": "f4", "s8": "i8", "u8": "u8", "f8": "f8", "u2": "u2", "s2": "i2", "f2": "f2"}
TORCH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def no_findings() -> Iterator[None]:
    """Each test sees its own."""
    emulator.clear()
    yield
    emulator.clear()


def program(body: str, params: int, *, threads: int = 32, shared: int = 0, **options: Any) -> emulator.Program:
    """A kernel k of pointers and numbers of 64 bits; %rd0, %rd1 ... hold them when the body begins, %r0 the thread."""
    names = [f"k_param_{i}" for i in range(params)]
    body = re.sub(r"(;|\$\w+:)\s*", r"\1\n", body)  # a statement a line, as Triton writes it
    loads = "\n".join(f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names))
    text = f""".version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({", ".join(f".param .u64 {name}" for name in names)})
.reqntid {threads}
{{
.reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<60>; .reg .b64 %rd<60>; .reg .f64 %fd<9>;
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r59, %ctaid.x;
{body}
ret;
}}
"""
    return emulator.Program(text, shared, **options)


def run(body: str, *given: Any, blocks: int = 1, threads: int = 32, shared: int = 0, **options: Any) -> list[str]:
    """Runs it on tensors and integers; the kinds of what was found."""
    made = program(body, len(given), threads=threads, shared=shared)
    arguments = [("*fp32" if isinstance(x, torch.Tensor) else "i64", x) for x in given]
    emulator.launch(made, blocks, arguments, **options)
    return [finding.kind for finding in emulator.findings()]


def tensor(values: Any, kind: str) -> torch.Tensor:
    """The bits of numbers, as integers."""
    array = np.ascontiguousarray(np.asarray(values, "O" if kind[0] in "us" else None).astype(TYPES[kind]))
    return torch.from_numpy(array.view(f"i{array.itemsize}").copy())


def indexed(pointer: str, size: int, scratch: int) -> str:
    """%rd{scratch} = pointer + thread * size."""
    return f"mad.wide.u32 %rd{scratch}, %r0, {size}, {pointer};"


def calculate(instruction: str, out: str, *inputs: tuple[str, Sequence[Any]], **options: Any) -> np.ndarray:
    """Every thread does the instruction on its own numbers: {a}, {b}, {c} in, {d} out."""
    register = {"1": "%rs", "2": "%rs", "4": "%r", "8": "%rd"}
    tensors = [tensor(list(values) + [values[-1]] * (32 - len(values)), kind) for kind, values in inputs]
    made = torch.zeros(32, dtype=TORCH[int(out[1])])
    names = {"d": register[out[1]] + "10"}
    lines = []
    for i, (kind, _) in enumerate(inputs):
        name = names["abc"[i]] = f"{register[kind[1]]}{11 + i}"
        lines += [indexed(f"%rd{i}", int(kind[1]), 30 + i), f"ld.global.b{8 * int(kind[1])} {name}, [%rd{30 + i}];"]
    lines += [instruction.format(**names), indexed(f"%rd{len(inputs)}", int(out[1]), 40)]
    lines.append(f"st.global.b{8 * int(out[1])} [%rd40], {names['d']};")
    assert run("\n".join(lines), *tensors, made, **options) == []
    return made.numpy().view(TYPES[out])[: max(len(values) for _, values in inputs)]


M = 2**32 - 1
ULP = 1 + 2.0**-23
CALCULATIONS: dict[str, tuple[Any, ...]] = {
    # integers: wrapping, signs, widths
    "add.s32 {d}, {a}, {b};": ("s4", [-(2**31), 2], ("s4", [2**31 - 1, 5]), ("s4", [1, -3])),
    "add.s64 {d}, {a}, {b};": ("s8", [-(2**63)], ("s8", [2**63 - 1]), ("s8", [1])),
    "sub.s32 {d}, {a}, {b};": ("s4", [-8], ("s4", [-5]), ("s4", [3])),
    "sub.s64 {d}, {a}, {b};": ("s8", [2**40 - 7], ("s8", [2**40]), ("s8", [7])),
    "mul.lo.s32 {d}, {a}, {b};": ("s4", [-6, 0], ("s4", [2, 2**16]), ("s4", [-3, 2**16])),
    "mul.lo.s64 {d}, {a}, {b};": ("s8", [-(2**33)], ("s8", [2**32]), ("s8", [-2])),
    "mul.hi.s32 {d}, {a}, {b};": ("s4", [-1, 1], ("s4", [-1, 2**30]), ("s4", [1, 4])),
    "mul.hi.u32 {d}, {a}, {b};": ("u4", [M - 1], ("u4", [M]), ("u4", [M])),
    "mul.wide.s32 {d}, {a}, {b};": ("s8", [-(2**32)], ("s4", [-(2**31)]), ("s4", [2])),
    "mul.wide.u32 {d}, {a}, {b};": ("s8", [2**33 - 2], ("u4", [M]), ("u4", [2])),
    "mad.lo.s32 {d}, {a}, {b}, {c};": ("s4", [7], ("s4", [-2]), ("s4", [3]), ("s4", [13])),
    "mad.lo.s64 {d}, {a}, {b}, {c};": ("s8", [2**40 + 1], ("s8", [2**20]), ("s8", [2**20]), ("s8", [1])),
    "mad.wide.s32 {d}, {a}, {b}, {c};": ("s8", [-(2**33) + 5], ("s4", [-(2**31)]), ("s4", [4]), ("s8", [5])),
    "mad.wide.u32 {d}, {a}, {b}, {c};": ("s8", [4 * M + 5], ("u4", [M]), ("u4", [4]), ("s8", [5])),
    "div.s32 {d}, {a}, {b};": ("s4", [-3, -3, 3], ("s4", [-7, 7, -7]), ("s4", [2, -2, -2])),
    "div.u32 {d}, {a}, {b};": ("u4", [M // 3, M], ("u4", [M, 5]), ("u4", [3, 0])),
    "div.s64 {d}, {a}, {b};": ("s8", [-(2**39)], ("s8", [-(2**40) - 1]), ("s8", [2])),
    "rem.s32 {d}, {a}, {b};": ("s4", [-1, 1], ("s4", [-7, 7]), ("s4", [2, -2])),
    "rem.u32 {d}, {a}, {b};": ("u4", [3], ("u4", [M]), ("u4", [4])),
    "neg.s32 {d}, {a};": ("s4", [-5, -(2**31)], ("s4", [5, -(2**31)])),
    "abs.s32 {d}, {a};": ("s4", [5], ("s4", [-5])),
    "max.s32 {d}, {a}, {b};": ("s4", [3], ("s4", [-7]), ("s4", [3])),
    "max.u32 {d}, {a}, {b};": ("u4", [M - 6], ("u4", [M - 6]), ("u4", [3])),
    "min.s32 {d}, {a}, {b};": ("s4", [-7], ("s4", [-7]), ("s4", [3])),
    # what comes next reads the sum with its sign
    "add.s32 %r13, {a}, {b}; max.s32 {d}, %r13, 3;": ("s4", [3, 7], ("s4", [-5, 5]), ("s4", [-3, 2])),
    "sub.s32 %r13, {a}, {b}; shr.s32 {d}, %r13, 1;": ("s4", [-4], ("s4", [-5]), ("s4", [3])),
    "neg.s32 %r13, {a}; cvt.s64.s32 {d}, %r13;": ("s8", [-5], ("s4", [5])),
    "mul.lo.s32 %r13, {a}, {b}; cvt.rn.f32.s32 {d}, %r13;": ("f4", [-6.0], ("s4", [2]), ("s4", [-3])),
    "mad.lo.s32 %r13, {a}, {b}, {c}; div.s32 {d}, %r13, 2;": ("s4", [-2], ("s4", [2]), ("s4", [-3]), ("s4", [1])),
    # bits
    "and.b32 {d}, {a}, {b};": ("u4", [0b1000], ("u4", [0b1100]), ("u4", [0b1010])),
    "or.b32 {d}, {a}, {b};": ("u4", [0b1110], ("u4", [0b1100]), ("u4", [0b1010])),
    "xor.b32 {d}, {a}, {b};": ("u4", [0b0110], ("u4", [0b1100]), ("u4", [0b1010])),
    "xor.b64 {d}, {a}, {b};": ("u8", [2**40 + 1], ("u8", [2**40]), ("u8", [1])),
    "not.b32 {d}, {a};": ("u4", [M - 5], ("u4", [5])),
    "shl.b32 {d}, {a}, {b};": ("u4", [2**31, 0, 0], ("u4", [1, 1, 1]), ("u4", [31, 32, 99])),
    "shl.b32 {d}, {a}, 4;": ("u4", [0xFFFFFFF0], ("u4", [M])),
    "shl.b64 {d}, {a}, {b};": ("u8", [2**40], ("u8", [1]), ("u4", [40])),
    "shr.u32 {d}, {a}, {b};": ("u4", [1, 0], ("u4", [M, M]), ("u4", [31, 32])),
    "shr.s32 {d}, {a}, {b};": ("s4", [-2, -1], ("s4", [-8, -8]), ("u4", [2, 77])),
    "shr.s64 {d}, {a}, 2;": ("s8", [-2], ("s8", [-8])),
    "bfe.u32 {d}, {a}, 4, 8;": ("u4", [0x67], ("u4", [0x12345678])),
    "prmt.b32 {d}, {a}, {b}, 21520;": ("u4", [0xEEFF3344], ("u4", [0x11223344]), ("u4", [0xCCDDEEFF])),
    "prmt.b32 {d}, {a}, {b}, 37008;": ("u4", [0xFF44FF44], ("u4", [0x11228044]), ("u4", [0])),
    # floats: rounding, flushing, NaN
    "add.f32 {d}, {a}, {b};": ("f4", [1.0, 1 + 2.0**-22], ("f4", [1.0, ULP]), ("f4", [2.0**-24] * 2)),
    "add.ftz.f32 {d}, {a}, {b};": ("f4", [0.0, -0.0], ("f4", [TINY, 2.0**-126]), ("f4", [0.0, -(2.0**-126) * ULP])),
    "sub.f32 {d}, {a}, {b};": ("f4", [-INF, 2.0**-23], ("f4", [1.0, ULP]), ("f4", [INF, 1.0])),
    "sub.rn.f32.bf16 {d}, {a}, {b};": ("f4", [-0.5], ("u2", [0x3F80]), ("f4", [1.5])),
    "mul.f32 {d}, {a}, {b};": ("f4", [ULP ** 2 - 2.0**-46, NAN], ("f4", [ULP, 0.0]), ("f4", [ULP, INF])),
    "fma.rn.f32 {d}, {a}, {b}, {c};": ("f4", [2.0**-46], ("f4", [ULP]), ("f4", [ULP]), ("f4", [-1 - 2.0**-22])),
    "fma.rn.ftz.f32 {d}, {a}, {b}, {c};": (
        "f4", [1.0, -0.0], ("f4", [TINY, -TINY]), ("f4", [4.0, 1.0]), ("f4", [1.0, -TINY]),
    ),
    "div.rn.f32 {d}, {a}, {b};": ("f4", [np.float32(1) / np.float32(3), INF], ("f4", [1.0, 1.0]), ("f4", [3.0, 0.0])),
    "div.full.f32 {d}, {a}, {b};": ("f4", [2.5], ("f4", [5.0]), ("f4", [2.0])),
    "neg.f32 {d}, {a};": ("f4", [-0.0, 2.0], ("f4", [0.0, -2.0])),
    "abs.f32 {d}, {a};": ("f4", [0.0, 2.0], ("f4", [-0.0, -2.0])),
    "max.f32 {d}, {a}, {b};": ("f4", [3.0, 3.0], ("f4", [NAN, 3.0]), ("f4", [3.0, -INF])),
    "min.f32 {d}, {a}, {b};": ("f4", [3.0, -INF], ("f4", [NAN, 3.0]), ("f4", [3.0, -INF])),
    "max.NaN.f32 {d}, {a}, {b};": ("f4", [NAN], ("f4", [NAN]), ("f4", [3.0])),
    "min.NaN.f32 {d}, {a}, {b};": ("f4", [NAN], ("f4", [NAN]), ("f4", [3.0])),
    "max.f32 {d}, {a}, {b}, {c};": ("f4", [3.0, 4.0], ("f4", [1.0, NAN]), ("f4", [3.0, 2.0]), ("f4", [2.0, 4.0])),
    "min.s32 {d}, {a}, {b}, {c};": ("s4", [-3], ("s4", [1]), ("s4", [3]), ("s4", [-3])),
    "ex2.approx.f32 {d}, {a};": ("f4", [8.0, TINY, 0.0, 1.0], ("f4", [3.0, -127.0, -INF, TINY])),
    "ex2.approx.ftz.f32 {d}, {a};": ("f4", [8.0, 0.0], ("f4", [3.0, -127.0])),
    "lg2.approx.f32 {d}, {a};": ("f4", [-3.0, -INF, NAN], ("f4", [0.125, 0.0, -1.0])),
    "lg2.approx.ftz.f32 {d}, {a};": ("f4", [-INF], ("f4", [TINY])),
    "rcp.approx.ftz.f32 {d}, {a};": ("f4", [0.25, INF], ("f4", [4.0, TINY])),
    "rcp.rn.f32 {d}, {a};": ("f4", [np.float32(1) / np.float32(3)], ("f4", [3.0])),
    "sqrt.rn.f32 {d}, {a};": ("f4", [np.sqrt(np.float32(2)), NAN], ("f4", [2.0, -1.0])),
    "rsqrt.approx.ftz.f32 {d}, {a};": ("f4", [0.5], ("f4", [4.0])),
    "add.f64 {d}, {a}, {b};": ("f8", [1 + 2.0**-50], ("f8", [1.0]), ("f8", [2.0**-50])),
    # conversions
    "cvt.rn.bf16.f32 {d}, {a};": (
        "u2", [0x3F80, 0x3F82, 0x7FFF, 0x7F80], ("f4", [1 + 2.0**-8, 1 + 3 * 2.0**-8, NAN, 3.4e38]),
    ),
    "cvt.rn.bf16x2.f32 {d}, {a}, {b};": ("u4", [0x40003F80], ("f4", [2.0]), ("f4", [1.0])),
    "cvt.f32.bf16 {d}, {a};": ("f4", [1.0], ("u2", [0x3F80])),
    "cvt.rn.f16.f32 {d}, {a};": ("f2", [1.0, INF, 2.0**-24], ("f4", [1 + 2.0**-11, 70000.0, 2.0**-24])),
    "cvt.rn.f16x2.f32 {d}, {a}, {b};": ("u4", [0x40003C00], ("f4", [2.0]), ("f4", [1.0])),
    "cvt.f32.f16 {d}, {a};": ("f4", [2.0**-24], ("f2", [2.0**-24])),
    "cvt.rn.f32.s32 {d}, {a};": ("f4", [-1.0, 2.0**24], ("s4", [-1, 2**24 + 1])),
    "cvt.rn.f32.u32 {d}, {a};": ("f4", [2.0**32], ("u4", [M])),
    "cvt.rzi.s32.f32 {d}, {a};": ("s4", [-2, 2, 0, 2**31 - 1], ("f4", [-2.9, 2.9, NAN, 1e20])),
    "cvt.rni.s32.f32 {d}, {a};": ("s4", [2, 4], ("f4", [2.5, 3.5])),
    "cvt.rmi.f32.f32 {d}, {a};": ("f4", [-3.0, 2.0], ("f4", [-2.1, 2.9])),
    "cvt.rpi.f32.f32 {d}, {a};": ("f4", [-2.0, 3.0], ("f4", [-2.1, 2.1])),
    "cvt.rzi.f32.f32 {d}, {a};": ("f4", [-2.0, 2.0], ("f4", [-2.9, 2.9])),
    "cvt.rmi.ftz.f32.f32 {d}, {a};": ("f4", [-0.0], ("f4", [-TINY])),
    "cvt.s64.s32 {d}, {a};": ("s8", [-1], ("s4", [-1])),
    "cvt.u64.u32 {d}, {a};": ("s8", [M], ("u4", [M])),
    "cvt.u32.u64 {d}, {a};": ("u4", [5], ("u8", [2**32 + 5])),
    "mov.b32 {d}, 0f40490FDB;": ("f4", [np.float32(math.pi)], ("f4", [0.0])),
    "mov.b64 {d}, 0dBFF8000000000000;": ("f8", [-1.5], ("f8", [0.0])),
    "mov.b64 {d}, {{{a}, {b}}};": ("u8", [2**32 + 7], ("u4", [7]), ("u4", [1])),
    "mov.b64 {{_, {d}}}, {a};": ("u4", [1], ("u8", [2**32 + 7])),
    "mov.b32 {{{d}, _}}, {a};": ("u2", [0x5678], ("u4", [0x12345678])),
}  # fmt: skip


@pytest.mark.parametrize("instruction", CALCULATIONS)
def test_instructions(instruction: str) -> None:
    """Each family by its edge cases: wrapping, signs, rounding, flushing, infinities and NaN."""
    out, wanted, *inputs = CALCULATIONS[instruction]
    found = calculate(instruction, out, *inputs)
    np.testing.assert_array_equal(found, np.asarray(wanted, "O" if out[0] in "us" else None).astype(TYPES[out]))
    if out[0] == "f":
        assert (np.signbit(found) == np.signbit(np.asarray(wanted)))[~np.isnan(found)].all()


@pytest.mark.parametrize("instruction", CALCULATIONS)
def test_what_a_register_holds(instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that is made of an instruction gives numbers of the kind that later code takes them for."""
    assign = translate.Translator.assign

    def checked(self: translate.Translator, register: str, text: str, kind: str) -> None:
        assign(self, register, text, kind)
        if register != "_":
            variable, said = self.current[register]
            self.lines.append(f"assert {variable}.dtype == {said}")

    monkeypatch.setattr(translate.Translator, "assign", checked)
    test_instructions(instruction)


@pytest.mark.parametrize(("symbol", "wanted"), [("add", (4.0, -1.0)), ("sub", (-2.0, 3.0)), ("mul", (3.0, -2.0))])
def test_packed_floats(symbol: str, wanted: tuple[float, float]) -> None:
    """Two floats in a 64-bit register, as sm_100 calculates."""
    a, b = ([np.array(pair, "f4").view("u8")[0]] for pair in ((1.0, 1.0), (3.0, -2.0)))
    assert calculate(f"{symbol}.f32x2 {{d}}, {{a}}, {{b}};", "u8", ("u8", a), ("u8", b)).view("f4").tolist() == [
        *wanted
    ]
    both = calculate("fma.rn.f32x2 {d}, {a}, {b}, {a};", "u8", ("u8", a), ("u8", b)).view("f4")
    assert both.tolist() == [4.0, -1.0]


@pytest.mark.parametrize(
    ("comparison", "wanted"),  # of (1, 2), (2, 2), (NaN, 2)
    {"eq": "010", "ne": "100", "lt": "100", "le": "110", "gt": "000", "ge": "010", "equ": "011", "neu": "101",
     "ltu": "101", "leu": "111", "gtu": "001", "geu": "011", "num": "110", "nan": "001"}.items(),
)  # fmt: skip
def test_comparisons(comparison: str, wanted: str) -> None:
    """Ordered ones are false for NaN, unordered ones true; in float32, and packed halves one by one."""
    a, b = [1.0, 2.0, NAN], [2.0, 2.0, 2.0]
    choose = f"setp.{comparison}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
    assert calculate(choose, "u4", ("f4", a), ("f4", b)).tolist() == [int(x) for x in wanted]
    if comparison in ("num", "nan"):
        return
    x, y = (np.array([[v, 2.0] for v in column], "f4").view("u4") >> 16 for column in (a, b))
    x, y = ((z[:, 0] | z[:, 1] << 16).tolist() for z in (x, y))
    choose = f"setp.{comparison}.bf16x2 %p1|%p2, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
    assert calculate(choose, "u4", ("u4", x), ("u4", y)).tolist() == [int(x) for x in wanted]


def test_signed_and_unsigned_comparisons() -> None:
    """−1 is below 1 as a signed number and above as an unsigned one; two conditions in one instruction."""
    for kind, wanted in (("s32", 1), ("u32", 0), ("lo.u32", 0)):
        how = kind if "." in kind else f"lt.{kind}"
        choose = f"setp.{how} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
        assert calculate(choose, "u4", ("s4", [-1]), ("s4", [1])).tolist() == [wanted]
    choose = "setp.gt.s32 %p2, {b}, 5; setp.lt.and.s32 %p1, {a}, {b}, !%p2; selp.b32 {d}, 1, 0, %p1;"
    assert calculate(choose, "u4", ("s4", [1, 1]), ("s4", [2, 9])).tolist() == [1, 0]


def test_noise_of_approximations() -> None:
    """A number is off by the same amount each time, by no more than asked."""
    x = np.linspace(0.1, 5, 32).astype("f4")
    out = {}
    for ulps in (0, 2):
        made = program("mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 %r1, [%rd9]; ex2.approx.f32 %r2, %r1;"
                       "st.global.b32 [%rd9], %r2;", 1, ulps=ulps)  # fmt: skip
        values = torch.from_numpy(x.copy())
        emulator.launch(made, 1, [("*fp32", values)])
        out[ulps] = values.numpy().view("i4")
    gaps = np.abs(out[2] - out[0])
    assert gaps.max() == 2
    assert (gaps > 0).sum() > 8


@pytest.mark.parametrize(
    ("instructions", "fused"),
    [
        ("mul.f32 %r2, %r1, %r1; add.f32 %r3, %r2, 0fBF800002;", 2.0**-46),
        ("mul.f32 %r2, %r1, %r1; add.f32 %r3, 0fBF800002, %r2;", 2.0**-46),
        ("mul.f32 %r2, %r1, %r1; sub.f32 %r3, %r2, 0f3F800002;", 2.0**-46),
        ("mul.f32 %r2, %r1, %r1; sub.f32 %r3, 0f3F800002, %r2;", -(2.0**-46)),
        ("mul.rn.f32 %r2, %r1, %r1; add.f32 %r3, %r2, 0fBF800002;", 0.0),
        ("mul.f32 %r2, %r1, %r1; add.rn.f32 %r3, %r2, 0fBF800002;", 0.0),
        ("setp.eq.s32 %p1, 0, 0; @%p1 mul.f32 %r2, %r1, %r1; add.f32 %r3, %r2, 0fBF800002;", 0.0),
        ("mul.f32 %r2, %r1, %r1; mov.b32 %r2, 0f3F800002; add.f32 %r3, %r2, 0fBF800002;", 0.0),
        ("mul.f32 %r2, %r1, %r1; mov.b32 %r1, 0f00000000; add.f32 %r3, %r2, 0fBF800002;", 2.0**-46),
    ],
)
def test_contraction(instructions: str, fused: float) -> None:
    """A product and the sum behind it become one fma where they may, and only where that is asked."""
    for fuse in (False, True):
        values = torch.full((32,), 1 + 2.0**-23)
        body = f"ld.global.b32 %r1, [%rd0]; {instructions} st.global.b32 [%rd0], %r3;"
        made = program(body, 1, fuse=fuse)
        emulator.launch(made, 1, [("*fp32", values)])
        assert values[0] == (fused if fuse else 0.0)
        assert made.fused == (fuse and fused != 0)


# Threads: predicates, branches, warps

FIND = indexed("%rd0", 4, 9)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_divergence_and_loops(order: str) -> None:
    """Each thread below 40 adds 1 as often as its number says, the others go elsewhere, and a guard picks one."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""{FIND} mov.b32 %r1, 0; mov.b32 %r2, 0;
    setp.lt.u32 %p1, %r0, 40;
    @!%p1 bra $ELSE;
    $LOOP:
    setp.ge.u32 %p2, %r2, %r0;
    @%p2 bra $DONE;
    add.s32 %r1, %r1, 1; add.s32 %r2, %r2, 1;
    bra.uni $LOOP;
    $DONE:
    bra.uni $END;
    $ELSE:
    mov.b32 %r1, 1000;
    $END:
    setp.eq.s32 %p3, %r0, 5;
    @%p3 mov.b32 %r1, 555;
    st.global.b32 [%rd9], %r1;
    """
    assert run(body, out, threads=64, order=order) == []
    assert out.tolist() == [555 if i == 5 else i if i < 40 else 1000 for i in range(64)]


def test_guards_where_threads_have_parted() -> None:
    """A guarded access is by the threads that are there."""
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""{FIND} setp.ge.u32 %p1, %r0, 8;
    @%p1 bra $END;
    setp.gt.u32 %p2, %r0, 3;
    @%p2 st.global.b32 [%rd9], %r0;
    $END:
    """
    assert run(body, out) == []
    assert out.tolist() == [i if 3 < i < 8 else 0 for i in range(32)]


def test_registers_change_places() -> None:
    """Round a loop two registers take each other's number."""
    out = torch.zeros(2, dtype=torch.int32)
    body = """mov.b32 %r1, 1; mov.b32 %r2, 2; mov.b32 %r3, 0;
    $LOOP:
    mov.b32 %r4, %r1; mov.b32 %r1, %r2; mov.b32 %r2, %r4;
    add.s32 %r3, %r3, 1;
    setp.lt.s32 %p1, %r3, 3;
    @%p1 bra $LOOP;
    st.global.v2.b32 [%rd0], {%r1, %r2};
    """
    assert run(body, out) == []
    assert out.tolist() == [2, 1]


def test_special_registers() -> None:
    """Where a thread is, and how many there are."""
    names = ("tid.x", "tid.y", "laneid", "ntid.x", "ntid.y", "ctaid.x", "ctaid.z", "nctaid.x", "nctaid.z")
    out = torch.zeros(len(names), dtype=torch.int32)
    body = "setp.eq.s32 %p1, %r59, 2; setp.eq.and.s32 %p2, %r0, 37, %p1;"
    for i, name in enumerate(names):
        body += f"mov.u32 %r1, %{name}; @%p2 st.global.b32 [%rd0+{4 * i}], %r1;"
    assert run(body, out, blocks=3, threads=64) == []
    assert out.tolist() == [37, 0, 5, 64, 1, 2, 0, 3, 1]


def test_numbers_of_a_launch() -> None:
    """Negative ones too."""
    out = torch.zeros(1, dtype=torch.int64)
    assert run("st.global.b64 [%rd0], %rd1;", out, -5) == []
    assert out.item() == -5


def test_counts() -> None:
    """How many warps ran each block of instructions: the second warp goes round once more."""
    body = """mov.b32 %r1, 0; shr.u32 %r2, %r0, 5;
    $LOOP:
    add.s32 %r1, %r1, 1;
    setp.le.s32 %p1, %r1, %r2;
    @%p1 bra $LOOP;
    """
    for order in emulator.ORDERS:
        grid = emulator.launch(program(body, 0, threads=64), 3, [], order=order)
        assert grid.counts == {0: 6, 1: 9, 2: 6}


@pytest.mark.parametrize(
    ("how", "operands", "wanted"),
    [
        ("bfly", "1, 31", lambda i: i ^ 1),
        ("bfly", "8, 6175", lambda i: i ^ 8 if i & 8 else i),  # segments of 8: those behind one's own are out of reach
        ("up", "1, 0", lambda i: max(i - 1, 0)),
        ("down", "2, 31", lambda i: i + 2 if i < 30 else i),
        ("idx", "3, 31", lambda i: 3),
        ("idx", "3, 6175", lambda i: i // 8 * 8 + 3),
    ],
)
def test_shuffles(how: str, operands: str, wanted: Any) -> None:
    """Lanes read one another within their warp, or a part of it."""
    out = torch.zeros(64, dtype=torch.int32)
    run(f"{FIND} shfl.sync.{how}.b32 %r1, %r0, {operands}, -1; st.global.b32 [%rd9], %r1;", out, threads=64)
    assert out.tolist() == [32 * w + wanted(i) for w in range(2) for i in range(32)]


@pytest.mark.parametrize(("how", "wanted"), [("max", 31.0), ("min", 0.0), ("max.NaN", NAN), ("min.NaN", NAN)])
def test_reductions_of_a_warp_with_nan(how: str, wanted: float) -> None:
    """Of the numbers, unless the instruction says NaN."""
    out = torch.zeros(32)
    body = f"""{FIND} setp.eq.s32 %p1, %r0, 3; cvt.rn.f32.u32 %r1, %r0; selp.f32 %r2, 0f7FC00000, %r1, %p1;
    redux.sync.{how}.f32 %r3, %r2, -1; st.global.b32 [%rd9], %r3;"""
    assert run(body, out) == []
    np.testing.assert_array_equal(out.numpy(), np.full(32, wanted, "f4"))


def test_reductions_and_votes_of_a_warp() -> None:
    """redux of integers and floats, ballot, any and all, of each warp for itself."""
    for instruction, wanted in {
        "redux.sync.max.s32 %r1, %r0, -1": lambda w: 32 * w + 31,
        "redux.sync.min.s32 %r1, %r0, -1": lambda w: 32 * w,
        "redux.sync.add.s32 %r1, %r0, -1": lambda w: sum(range(32 * w, 32 * w + 32)),
        "redux.sync.or.b32 %r1, %r0, -1": lambda w: 31 + 32 * w,
        "redux.sync.and.b32 %r1, %r0, -1": lambda w: 32 * w,
        "redux.sync.xor.b32 %r1, %r0, -1": lambda w: 0,
        "cvt.rn.f32.u32 %r3, %r0; redux.sync.max.f32 %r2, %r3, -1; cvt.rzi.s32.f32 %r1, %r2": lambda w: 32 * w + 31,
        "setp.lt.u32 %p1, %r0, 34; vote.sync.ballot.b32 %r1, %p1, -1": lambda w: -1 if w == 0 else 3,
        "setp.lt.u32 %p1, %r0, 34; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2": lambda w: int(w == 0),
        "setp.lt.u32 %p1, %r0, 34; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2": lambda w: 1,
    }.items():
        out = torch.zeros(64, dtype=torch.int32)
        run(f"{FIND} {instruction}; st.global.b32 [%rd9], %r1;", out, threads=64)
        assert out.tolist() == [wanted(i // 32) for i in range(64)], instruction


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_warp_meets_again(order: str) -> None:
    """Where the way round of half a warp lies behind the meeting point, the other half waits for it there."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""{FIND} mov.b32 %r1, 1;
    and.b32 %r2, %r0, 1;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra $BEHIND;
    $MEET:
    redux.sync.add.s32 %r3, %r1, -1;
    st.global.b32 [%rd9], %r3;
    bra.uni $END;
    $BEHIND:
    mov.b32 %r1, 2;
    bra.uni $MEET;
    $END:
    """
    assert run(body, out, threads=64, order=order) == []
    assert out.tolist() == [48] * 64


# Memory


def test_vectors_and_extension() -> None:
    """Four numbers at once, two of 64 bits, signed and unsigned bytes of a byte and half words."""
    given = torch.arange(8, dtype=torch.int32) - 4
    out = torch.zeros(8, dtype=torch.int32)
    body = """setp.eq.s32 %p1, %r0, 0;
    @!%p1 bra $END;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];
    ld.global.v2.b64 {%rd10, %rd11}, [%rd0+16];
    st.global.v4.b32 [%rd1], {%r4, %r3, %r2, %r1};
    ld.global.s8 %r5, [%rd0+4]; ld.global.u8 %r6, [%rd0+4]; ld.global.s16 %r7, [%rd0];
    cvt.u32.u64 %r8, %rd11;
    st.global.v2.b32 [%rd1+16], {%r5, %r6};
    st.global.v2.b32 [%rd1+24], {%r7, %r8};
    $END:
    """
    assert run(body, given, out) == []
    assert out.tolist() == [-1, -2, -3, -4, -3, 253, -4, 2]


def test_a_float_s_lower_half() -> None:
    """A store of fewer bits than the register has is of the lower ones, whatever it holds."""
    out = torch.zeros(32, dtype=torch.int16)
    body = "mov.b32 %r1, 0f3F801234; add.f32 %r2, %r1, 0f00000000; st.global.b16 [%rd9], %r2;"
    assert run(indexed("%rd0", 2, 9) + body, out) == []
    assert out.tolist() == [0x1234] * 32


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_shared_memory_and_barriers(order: str) -> None:
    """A block turns its numbers round through shared memory; no race with a barrier, one without."""
    body = (
        """shl.b32 %r1, %r0, 2; mov.b32 %r2, global_smem; add.s32 %r2, %r2, %r1;
    st.shared.b32 [%r2], %r0;
    {barrier}
    sub.s32 %r3, 508, %r1; mov.b32 %r4, global_smem; add.s32 %r4, %r4, %r3;
    ld.shared.b32 %r5, [%r4];
    """
        + f"{FIND} st.global.b32 [%rd9], %r5;"
    )
    out = torch.zeros(128, dtype=torch.int32)
    assert run(body.replace("{barrier}", "bar.sync 0;"), out, threads=128, shared=512, order=order) == []
    assert out.tolist() == list(range(127, -1, -1))
    kinds = set(run(body.replace("{barrier}", ""), out, threads=128, shared=512, order=order))
    assert "race between warps" in kinds or "read of unwritten memory" in kinds
    if order != "lockstep":
        assert out.tolist() != list(range(127, -1, -1))


def test_matrices() -> None:
    """ldmatrix gives each lane its part of 8 x 8 halves, transposed if asked; stmatrix puts it back."""
    given = torch.arange(256, dtype=torch.int16)
    wanted = given.view(4, 8, 8)
    for transposed in ("", ".trans"):
        out = torch.zeros(256, dtype=torch.int16)
        body = f"""shl.b32 %r1, %r0, 4; mov.b32 %r2, global_smem; add.s32 %r2, %r2, %r1;
        mad.wide.u32 %rd8, %r0, 16, %rd0; mad.wide.u32 %rd9, %r0, 16, %rd1;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd8];
        st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r2];
        bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {{%r7, %r8, %r9, %r10}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2];
        st.global.v4.b32 [%rd9], {{%r3, %r4, %r5, %r6}};
        """
        assert run(body, given, out, shared=512) == []
        assert torch.equal(out.view(4, 8, 8), wanted.mT if transposed else wanted)


def test_atomics() -> None:
    """All threads of all blocks add, take the maximum, exchange where they find what they look for."""
    out = torch.zeros(3, dtype=torch.int32)
    body = """atom.global.gpu.relaxed.add.u32 %r1, [%rd0], 1;
    mad.lo.s32 %r2, %r59, 32, %r0;
    red.global.gpu.relaxed.max.s32 [%rd0+4], %r2;
    atom.global.gpu.relaxed.cas.b32 %r3, [%rd0+8], 0, 7;
    """
    assert run(body, out, blocks=5) == []
    assert out.tolist() == [160, 159, 7]


@pytest.mark.parametrize(
    ("how", "new"),
    {"add.u32": lambda old, i: old + i, "exch.b32": lambda old, i: i, "max.s32": max, "min.s32": min,
     "or.b32": lambda old, i: old | i, "and.b32": lambda old, i: old & i}.items(),
)  # fmt: skip
def test_atomics_give_what_was_there(how: str, new: Any) -> None:
    """One thread after the other, each with its number; cas for those that find what they look for."""
    place, old = torch.full((1,), 12, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = "mad.wide.u32 %rd9, %r0, 4, %rd1; add.s32 %r2, %r0, 9; {} st.global.b32 [%rd9], %r1;"
    assert run(body.format(f"atom.global.gpu.relaxed.{how} %r1, [%rd0], %r2;"), place, old) == []
    assert [*old.tolist(), int(place)] == [*itertools.accumulate(range(9, 41), new, initial=12)]
    place.fill_(12)
    assert run(body.format("atom.global.gpu.relaxed.cas.b32 %r1, [%rd0], %r2, 15;"), place, old) == []
    assert [*old.tolist(), int(place)] == [12] * 4 + [15] * 29


@pytest.mark.parametrize(("order", "alone"), [("greedy", True), ("warps", False), ("lockstep", False)])
def test_orders(order: str, alone: bool) -> None:
    """Greedy: a warp runs as far as it gets. Each warp writes down eight times that it is its turn."""
    count, turns = torch.zeros(1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    body = """mov.b32 %r1, 0; shr.u32 %r2, %r0, 5; and.b32 %r3, %r0, 31; setp.eq.s32 %p1, %r3, 0;
    $LOOP:
    ld.global.b32 %r4, [%rd0]; mad.wide.u32 %rd9, %r4, 4, %rd1;
    @%p1 st.global.b32 [%rd9], %r2;
    add.s32 %r5, %r4, 1;
    @%p1 st.global.b32 [%rd0], %r5;
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p2, %r1, 8;
    @%p2 bra $LOOP;
    """
    run(body, count, turns, threads=64, order=order, races=False, seed=0)
    assert bool(count == 16 and (turns.diff() != 0).sum() == 1) == alone


MESSAGE = """setp.ne.s32 %p1, %r0, 0;
@%p1 bra $END;
setp.eq.s32 %p2, %r59, 1;
@%p2 bra $READ;
mov.b32 %r1, 42;
st.global.b32 [%rd0], %r1;
atom.global.{scope}.{release}.exch.b32 %r2, [%rd1], 1;
bra.uni $END;
$READ:
{wait} %r3, [%rd1]{operand};
setp.ne.s32 %p3, %r3, 1;
@%p3 bra $READ;
ld.global.b32 %r4, [%rd0];
st.global.b32 [%rd0+4], %r4;
$END:
"""
ACQUIRE = ("ld.global.gpu.acquire.b32", "")
ATOMIC = ("atom.global.gpu.acquire.add.u32", ", 0")


@pytest.mark.parametrize(
    ("scope", "release", "wait", "race"),
    [
        ("gpu", "release", ACQUIRE, False),
        ("gpu", "acq_rel", ATOMIC, False),
        ("gpu", "relaxed", ACQUIRE, True),
        ("gpu", "acquire", ACQUIRE, True),
        ("gpu", "release", ("atom.global.gpu.release.add.u32", ", 0"), True),
        ("gpu", "release", ("ld.relaxed.gpu.global.b32", ""), True),
        ("cta", "release", ACQUIRE, True),
    ],
)
def test_messages_between_blocks(scope: str, release: str, wait: tuple[str, str], race: bool) -> None:
    """A block waits for another's flag and reads what it left: without release and acquire it is a race."""
    data, flag = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    found = run(MESSAGE.format(scope=scope, release=release, wait=wait[0], operand=wait[1]), data, flag, blocks=2)
    assert data.tolist() == [42, 42]
    assert found == (["race between blocks"] if race else [])


def test_a_release_covers_the_block_behind_a_barrier() -> None:
    """All threads write, one releases; one acquires, all read. Without a barrier on either side: races."""
    body = """setp.eq.s32 %p2, %r59, 1;
    mad.wide.u32 %rd9, %r0, 4, %rd0;
    setp.ne.s32 %p1, %r0, 0;
    @%p2 bra $READ;
    st.global.b32 [%rd9], %r0;
    {one}
    @%p1 bra $END;
    atom.global.gpu.acq_rel.add.u32 %r2, [%rd1], 1;
    bra.uni $END;
    $READ:
    @%p1 bra $SEEN;
    ld.global.gpu.acquire.b32 %r3, [%rd1];
    setp.ne.s32 %p3, %r3, 1;
    @%p3 bra $READ;
    $SEEN:
    {two}
    ld.global.b32 %r4, [%rd9];
    st.global.b32 [%rd9+256], %r4;
    $END:
    """
    for one, two, kinds in (("bar.sync 0;", "bar.sync 0;", []), ("", "bar.sync 0;", ["race between blocks"]),
                            ("bar.sync 0;", "", ["race between blocks"])):  # fmt: skip
        emulator.clear()
        data, flag = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        found = run(body.replace("{one}", one).replace("{two}", two), data, flag, blocks=2, threads=64)
        assert sorted(set(found)) == kinds  # the order of blocks decides which accesses a race is seen at, and wins
        if not kinds:
            assert data[64:].tolist() == list(range(64))


@pytest.mark.parametrize("between", ["", "bar.sync 0; setp.ne.s32 %p1, %r0, 32;"])
def test_messages_are_passed_on(between: str) -> None:
    """Of three blocks the second releases what it has acquired: the same thread, or another behind a barrier."""
    body = f"""setp.ne.s32 %p1, %r0, 0;
    setp.ne.s32 %p2, %r59, 0;
    @%p2 bra $SECOND;
    @%p1 bra $END;
    st.global.b32 [%rd0], 42;
    atom.global.gpu.release.exch.b32 %r2, [%rd1], 1;
    bra.uni $END;
    $SECOND:
    setp.ne.s32 %p2, %r59, 1;
    @%p2 bra $THIRD;
    @%p1 bra $SEEN;
    $WAIT:
    ld.global.gpu.acquire.b32 %r3, [%rd1];
    setp.ne.s32 %p3, %r3, 1;
    @%p3 bra $WAIT;
    $SEEN:
    {between}
    @%p1 bra $END;
    atom.global.gpu.release.exch.b32 %r2, [%rd1+4], 1;
    bra.uni $END;
    $THIRD:
    @%p1 bra $END;
    $AGAIN:
    ld.global.gpu.acquire.b32 %r3, [%rd1+4];
    setp.ne.s32 %p3, %r3, 1;
    @%p3 bra $AGAIN;
    ld.global.b32 %r4, [%rd0];
    st.global.b32 [%rd0+4], %r4;
    $END:
    """
    data, flags = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert run(body, data, flags, blocks=3, threads=64) == []
    assert data.tolist() == [42, 42]


@pytest.mark.parametrize("change", ["red.global.gpu.relaxed.add.u32 [%rd0+4], 1;", "@%p3 st.global.b32 [%rd0+4], %r1;"])
def test_waiting_while_others_work(change: str) -> None:
    """However often a block asks for its flag, there is an end to it while the other block changes something."""
    body = f"""mov.b32 %r1, 0;
    setp.eq.s32 %p3, %r0, 0;
    setp.eq.s32 %p1, %r59, 0;
    @%p1 bra $WAIT;
    $WORK:
    {change}
    ld.global.gpu.acquire.b32 %r2, [%rd0+8];
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p2, %r1, 1500;
    @%p2 bra $WORK;
    atom.global.gpu.release.exch.b32 %r3, [%rd0], 1;
    bra.uni $END;
    $WAIT:
    ld.global.gpu.acquire.b32 %r2, [%rd0];
    setp.ne.s32 %p2, %r2, 1;
    @%p2 bra $WAIT;
    $END:
    """
    memory = torch.zeros(3, dtype=torch.int32)
    assert run(body, memory, blocks=2) == []
    assert memory[0] == 1


@pytest.mark.parametrize("load", ["ld.global.gpu.acquire.b32", "ld.volatile.global.b32"])
def test_spinning_within_a_block(load: str) -> None:
    """One warp waits for a flag of another; in greedy order too it comes to an end."""
    flag = torch.zeros(2, dtype=torch.int32)
    body = f"""setp.ge.u32 %p1, %r0, 32;
    @%p1 bra $SET;
    $WAIT:
    {load} %r1, [%rd0];
    setp.ne.s32 %p2, %r1, 1;
    @%p2 bra $WAIT;
    bra.uni $END;
    $SET:
    setp.ne.s32 %p3, %r0, 32;
    @%p3 bra $END;
    atom.global.gpu.release.exch.b32 %r2, [%rd0], 1;
    $END:
    """
    for order in emulator.ORDERS:
        flag.zero_()
        assert run(body, flag, threads=64, order=order) == []


# Faults


def fault(body: str, *given: Any, **options: Any) -> emulator.Finding:
    """What ends the launch; it is among the findings too."""
    emulator.clear()
    with pytest.raises(emulator.Fault) as caught:
        run(body, *given, **options)
    assert caught.value.finding in emulator.findings()
    assert caught.value.finding.kernel == "k"
    return caught.value.finding


def test_out_of_bounds() -> None:
    """Behind a tensor, between the rows of a view, and in shared memory; the bytes that were asked for are named."""
    whole = torch.zeros(64)
    found = fault(f"{FIND} ld.global.b32 %r1, [%rd9+4];", whole[:32].clone())
    assert found.kind == "out of bounds"
    assert "byte 128" in found.where and "thread 31" in found.where
    found = fault(f"{FIND} ld.global.b32 %r1, [%rd9];", whole[:31])  # memory there, but not of the view
    assert found.kind == "out of bounds"
    found = fault(f"{FIND} st.global.b32 [%rd9], %r0;", whole.view(4, 16)[:, :8])
    assert found.kind == "out of bounds" and "between the rows" in found.where
    assert whole.any() == 0
    found = fault("st.shared.b32 [global_smem+64], %r0;", shared=64)
    assert found.kind == "out of bounds" and "shared memory" in found.where
    assert (
        fault(f"mov.b32 %r1, {translate.SHARED_BASE - 4}; ld.shared.b32 %r2, [%r1];", shared=64).kind == "out of bounds"
    )
    for place in (64, -64):
        assert fault(f"mov.b64 %rd1, {place}; ld.global.b32 %r1, [%rd1];", whole).kind == "out of bounds"


def test_misaligned() -> None:
    """Four bytes at an odd address, sixteen at one of eight."""
    x = torch.zeros(64)
    for body in ("ld.global.b32 %r1, [%rd0+2];", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];"):
        assert fault(body, x).kind == "misaligned access"
    assert fault("ld.shared.b32 %r1, [global_smem+2];", shared=64).kind == "misaligned access"


def test_unwritten_memory() -> None:
    """Shared memory before a store, and outputs marked as not written; what was written since is none."""
    out = torch.zeros(32)
    assert run(f"{FIND} ld.shared.b32 %r1, [global_smem]; st.global.b32 [%rd9], %r0;", out, shared=64) == [
        "read of unwritten memory"
    ]
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)):
        emulator.clear()
        x = emulator.unwritten(torch.ones(32, dtype=dtype))
        assert x.isnan().all()
        register = "%r1" if bits == 32 else "%rs1"
        place = indexed("%rd0", bits // 8, 9)
        assert run(f"{place} ld.global.b{bits} {register}, [%rd9];", x) == ["read of unwritten memory"]
        emulator.clear()
        store = f"cvt.u16.u32 %rs1, %r0; {place} st.global.b{bits} [%rd9], {register.replace('r1', 'r0')};"
        assert run(f"{store} ld.global.b{bits} {register}, [%rd9];", x) == []
    emulator.clear()
    assert run(f"{FIND} ld.global.b32 %r1, [%rd9];", torch.full((32,), NAN)) == []  # a NaN of one's own


def test_divergent_barriers() -> None:
    """Threads of a block at two barriers; and at one that others have left behind."""
    body = """setp.lt.u32 %p1, %r0, {n};
    @%p1 bra $A;
    bar.sync 0;
    bra.uni $END;
    $A:
    {other}
    $END:
    """
    for n, order in ((32, "greedy"), (32, "lockstep"), (7, "greedy")):
        text = body.replace("{n}", str(n))
        assert fault(text.replace("{other}", "bar.sync 0;"), threads=64, order=order).kind == "divergent barrier"
        emulator.clear()
        assert run(text.replace("{other}", "ret;"), threads=64, order=order) == ["barrier after threads have left"]
        emulator.clear()


def test_parted_warps() -> None:
    """An instruction of the whole warp that some of its threads never reach."""
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 bra $END; {sync} $END:"
    for sync in ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "redux.sync.max.s32 %r1, %r0, -1;", "bar.warp.sync -1;"):
        assert (
            fault(body.replace("{sync}", sync + " st.shared.b32 [global_smem], %r0;"), shared=4).kind == "diverged warp"
        )


RACES = {
    "two warps write": ("st.global.b32 [%rd0], %r0;", 1, 64, "race between warps"),
    "one warp reads, one writes": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 ld.global.b32 %r1, [%rd0]; @!%p1 st.global.b32 [%rd0], %r0;",
        1, 64, "race between warps",
    ),
    "two blocks write": ("st.global.b32 [%rd0], %r59;", 2, 32, "race between blocks"),
    "lanes": (
        "setp.eq.s32 %p1, %r0, 3; @%p1 st.global.b32 [%rd0], %r0; setp.eq.s32 %p2, %r0, 0;"
        "@%p2 ld.global.b32 %r1, [%rd0];",
        1, 32, "unsynchronised lanes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_races(race: str, order: str) -> None:
    """By threads of two warps, of two blocks, and of one warp; none is looked for where that is asked."""
    body, blocks, threads, wanted = RACES[race]
    x = torch.full((1,), 77, dtype=torch.int32)
    assert wanted in run(body, x, blocks=blocks, threads=threads, order=order)
    found = next(finding for finding in emulator.findings() if finding.kind == wanted)
    assert found.kernel == "k" and "block" in found.where and "PTX line" in found.source
    emulator.clear()
    assert not set(run(body, x, blocks=blocks, threads=threads, order=order, races=False)) & {wanted}


def test_what_is_no_race() -> None:
    """The same value from all, one thread's own accesses, both sides of a barrier, lanes behind a warp's barrier."""
    x = torch.zeros(64, dtype=torch.int32)
    for body in (
        "mov.b32 %r1, 5; st.global.b32 [%rd0], %r1;",
        "ld.global.b32 %r1, [%rd0];",
        "mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r0; ld.global.b32 %r1, [%rd9];",
        "setp.eq.s32 %p1, %r0, 40; @%p1 st.global.b32 [%rd0], %r0; bar.sync 0; ld.global.b32 %r1, [%rd0];",
        "setp.eq.s32 %p1, %r0, 40; @%p1 st.global.b32 [%rd0], %r0; bar.warp.sync -1; setp.eq.s32 %p2, %r0, 41;"
        "@%p2 ld.global.b32 %r1, [%rd0];",
    ):
        assert run(body, x, threads=64) == [], body


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_before_the_last(seed: int) -> None:
    """Both warps read, one of them writes: it races with the other's load, whichever was the last."""
    body = "ld.global.b32 %r1, [%rd0]; setp.eq.s32 %p1, %r0, 32; @%p1 st.global.b32 [%rd0], %r0;"
    assert "race between warps" in run(body, torch.zeros(1, dtype=torch.int32), threads=64, seed=seed)


def test_the_same_value_in_shared_memory() -> None:
    """It may be there from before: two warps that store it race."""
    body = "mov.b32 %r1, 5; st.shared.b32 [global_smem], %r1;"
    assert run(body, torch.zeros(1), threads=64, shared=4) == ["race between warps"]


def test_a_barrier_of_the_only_warp() -> None:
    """bar.warp.sync is one of the block then: what all have written is released, what one acquires all may read."""
    body = """mad.wide.u32 %rd9, %r0, 4, %rd0;
    setp.ne.s32 %p1, %r0, 0;
    setp.eq.s32 %p2, %r59, 1;
    @%p2 bra $READ;
    st.global.b32 [%rd9], %r0;
    bar.warp.sync -1;
    @!%p1 atom.global.gpu.release.exch.b32 %r2, [%rd1], 1;
    bra.uni $END;
    $READ:
    @%p1 bra $SEEN;
    ld.global.gpu.acquire.b32 %r3, [%rd1];
    setp.ne.s32 %p3, %r3, 1;
    @%p3 bra $READ;
    $SEEN:
    bar.warp.sync -1;
    ld.global.b32 %r4, [%rd9];
    $END:
    """
    assert run(body, torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), blocks=2) == []


def test_replicas() -> None:
    """Threads of one instruction store what should be one number: last bits apart, or another number."""
    x = torch.zeros(1)
    rounded = "mad.lo.s32 %r1, %r0, 1, 1065353216; st.global.b32 [%rd0], %r1;"
    assert run(rounded, x) == ["replicas differ by rounding"]
    emulator.clear()
    assert run("cvt.rn.f32.u32 %r1, %r0; st.global.b32 [%rd0], %r1;", x) == ["replicas differ"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((1.0, 1.0 + 2.0**-12, 1.0), "replicas differ"),
        ((1.0, NAN, 1.0), "replicas differ"),
        ((2.80e-5, 2.79e-5, 2.7), "replicas differ by rounding"),  # a sum of terms like the other, that cancels
        ((2.80e-5, 2.79e-5, 2.7e-5), "replicas differ"),
        ((2.80e-5, 2.79e-5, INF), "replicas differ"),
        ((2.80e-5, 2.80e-3, 2.7), "replicas differ"),
    ],
)
def test_replicas_of_sums_that_cancel(values: tuple[float, float, float], kind: str) -> None:
    """Two copies of one number, and another: the rounding of a sum is that of its terms."""
    given, out = torch.tensor(values), torch.zeros(2)
    body = """setp.lt.u32 %p1, %r0, 3;
    mad.wide.u32 %rd8, %r0, 4, %rd0; shr.u32 %r2, %r0, 1; mad.wide.u32 %rd9, %r2, 4, %rd1;
    @%p1 ld.global.b32 %r1, [%rd8]; @%p1 st.global.b32 [%rd9], %r1;"""
    assert run(body, given, out) == [kind]


def test_what_does_not_end() -> None:
    """A flag that nobody sets, soon; and a loop, after as many steps as are allowed."""
    spin = "$W: ld.global.gpu.acquire.b32 %r1, [%rd0]; setp.ne.s32 %p1, %r1, 1; @%p1 bra $W;"
    found = fault(spin, torch.zeros(1, dtype=torch.int32), blocks=3)
    assert found.kind == "no end" and "nothing changes" in found.where
    assert fault("$W: add.s32 %r1, %r1, 1; bra.uni $W;", step_limit=1000).kind == "no end"


@pytest.mark.parametrize(
    "instruction",
    ["tanh.approx.f32 %r1, %r2;", "add.sat.s32 %r1, %r2, %r3;", "add.bf16 %rs1, %rs2, %rs3;", "bar.sync 1, 64;",
     "mov.u32 %r1, %clock;", "st.local.b32 [%r1], %r2;", "fence.acq_rel.gpu;", "cvt.rn.satfinite.bf16.f32 %rs1, %r1;",
     "cp.async.cg.shared.global [%r1], [%rd1], 16;", "add.f32 %r1, %x2, %r3;", "call.uni f, (%r1);",
     "@%p1 bar.sync 0;", "@%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "@!%p1 bar.warp.sync -1;", "bar.sync 1;",
     "add.ftz.f16 %rs1, %rs2, %rs3;", "cvt.rzi.s64.f32 %rd1, %r1;", "cvt.s32.f32 %r1, %r2;", "cvt.f64.bf16 %fd1, %rs2;",
     "ex2.approx.f64 %fd1, %fd2;", "setp.lt.f32 %p1|%p2, %r1, %r2;", "mov.u16 %rs1, %tid.x;", "mov.b32 %r1, symbol;",
     "mul.wide.s64 %rd1, %rd2, %rd3;", "mad.f32 %r1, %r2, %r3, %r4;", "div.f32 %r1, %r2, %r3;", "ld.b32 %r1, [%rd1];",
     "atom.global.gpu.relaxed.add.f16 %rs1, [%rd1], %rs2;", "mov.b32 %r1, 0d3FF0000000000000;",
     "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%r3];", "ld.global.b32 %r1, [%rd1+%r2];"],
)  # fmt: skip
def test_unknown_instructions(instruction: str) -> None:
    """Refused when the kernel is read, with the instruction's text."""
    with pytest.raises(NotImplementedError) as caught:
        program(instruction, 0)
    assert instruction.removesuffix(";") in str(caught.value) or "%x2" in str(caught.value)


def test_part_of_a_warp_is_refused() -> None:
    """Masks other than all threads are unknown, not ignored."""
    with pytest.raises(NotImplementedError, match=r"shfl\.sync\.bfly\.b32 .* for a part of a warp"):
        run("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 255;")
    assert run("mov.b32 %r2, -1; redux.sync.max.s32 %r1, %r0, %r2;") == []
    with pytest.raises(NotImplementedError, match=r"redux\.sync\.max\.s32 .* for a part of a warp"):
        run("mov.b32 %r2, 255; redux.sync.max.s32 %r1, %r0, %r2;")


def test_more_than_can_be_counted() -> None:
    """Barriers, memory instructions and blocks beyond what a stamp has room for are refused."""
    grid = emulator.launch(program("", 0), 1, [])
    block = machine.Cta(grid, 0)
    block.epoch = (1 << machine._BLOCK) - (1 << machine._EPOCH)
    with pytest.raises(NotImplementedError, match="16384 barriers"):
        block.next_epoch()
    with pytest.raises(NotImplementedError, match="4097 instructions"):
        program("st.global.b32 [%rd0], %r0;" * 4097, 1)
    with pytest.raises(NotImplementedError, match="524288 blocks"):
        emulator.launch(program("", 0), 1 << 19, [])


def test_a_launch_by_triton() -> None:
    """What Triton hands over: its types, tuples in tuples, constants; and a kernel is translated as is asked now."""
    body = "ld.global.b32 %r1, [%rd0]; mul.f32 %r2, %r1, %r1; sub.f32 %r3, %r2, 0f3F800002; st.global.b32 [%rd1], %r3;"
    text = "\n".join(program(body, 2).kernel.lines)
    source = types.SimpleNamespace(signature={"x": ("*fp32", ("constexpr", "*fp32"))})
    metadata = types.SimpleNamespace(shared=0, global_scratch_size=0, profile_scratch_size=0)
    launcher = driver._launcher(source, metadata)
    given, out, seen = torch.full((1,), 1 + 2.0**-23), torch.zeros(1), []
    try:
        for driver.settings.fuse in (False, True):
            launcher(1, 1, 1, 0, text, None, None, None, None, (given, (7, out)))
            seen.append(out.item())
    finally:
        driver.settings.fuse = False
    assert seen == [0.0, 2.0**-46]
    with pytest.raises(NotImplementedError, match="more than one dimension"):
        launcher(1, 2, 1, 0, text, None, None, None, None, (given, (7, out)))


def test_lines_of_the_source() -> None:
    """A finding names the kernel's own line where the PTX says it."""
    body = "\n.loc 1 3 7 // here.py:3:7\nst.global.b32 [%rd0], %r0;"
    found = fault(body + "\n.loc 1 4 7\nld.global.b32 %r1, [%rd0+2];", torch.zeros(1, dtype=torch.int32))
    assert found.source == ".loc 1 4 7"
    assert emulator.findings()[0].source == "here.py:3:7"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"capability": 75}, ("capability", "80, 90, 100", "75")),
        ({"capability": "sm_90"}, ("capability", "80, 90, 100", "sm_90")),
        ({"order": "random"}, ("order", "'greedy', 'lockstep', 'warps'", "random")),
        ({"ulps": -1}, ("ulps", "positive", "-1")),
        ({"races": 2}, ("races", "True", "2")),
        ({"fuse": "yes"}, ("fuse", "True", "yes")),
    ],
)
def test_unknown_options(given: dict[str, Any], words: tuple[str, ...]) -> None:
    """An architecture or option that it does not know, before anything is changed."""
    before = driver.settings.order
    with pytest.raises(ValueError) as caught:
        emulator.install(**{"capability": 90, **given})
    assert all(word in str(caught.value) for word in words)
    assert driver.settings.order == before


def test_large_memory_costs_what_is_touched() -> None:
    """Offsets beyond 2^31 elements and 2^32 bytes: a late row of a tensor of 16 GiB that is mostly not there."""
    rows, width = 2, 2**31 + 64
    storage = torch.from_numpy(machine.sparse(rows * width, "f4")).view(rows, width)
    late = storage[1, 64:96]
    late.copy_(torch.arange(32.0))
    out = torch.zeros(32)
    body = f"""mov.b64 %rd5, {4 * (width + 64)}; add.s64 %rd6, %rd0, %rd5; mad.wide.u32 %rd7, %r0, 4, %rd6;
    ld.global.b32 %r1, [%rd7]; st.global.b32 [%rd7], %r1; mad.wide.u32 %rd8, %r0, 4, %rd1; st.global.b32 [%rd8], %r1;"""
    assert run(body, storage, out) == []
    assert out.tolist() == list(range(32))
    assert fault(body.replace(str(4 * (width + 64)), str(4 * rows * width - 64)), storage, out).kind == "out of bounds"


def test_a_finding_fails_a_test() -> None:
    """Under --emulate: a race does, copies of a sum that differ by rounding do not; a failing test says it too."""
    said: list[str] = []

    class Item:
        """What the plugin tells."""

        def add_report_section(self, when: str, key: str, content: str) -> None:
            said.append(content)

    hooks = plugin.Plugin.__new__(plugin.Plugin)
    x = torch.zeros(1)
    hook = hooks.pytest_runtest_call(Item())  # type: ignore[arg-type]
    next(hook)
    run("mad.lo.s32 %r1, %r0, 1, 1065353216; st.global.b32 [%rd0], %r1;", x)
    with pytest.raises(StopIteration):
        hook.send(None)
    assert not said
    hook = hooks.pytest_runtest_call(Item())  # type: ignore[arg-type]
    next(hook)
    run("st.global.b32 [%rd0], %r59;", x, blocks=2)
    with pytest.raises(pytest.fail.Exception):
        hook.send(None)
    assert "race between blocks: k" in said[0]
    hook = hooks.pytest_runtest_call(Item())  # type: ignore[arg-type]
    next(hook)
    run("st.global.b32 [%rd0], %r59;", x, blocks=2)
    with pytest.raises(AssertionError, match="of its own"):
        hook.throw(AssertionError("of its own"))
    assert len(said) == 2
