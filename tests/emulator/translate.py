"""A basic block of PTX as one Python function over all threads that run together: a register is a numpy array.

`block(R, m, c)`: R are the registers, m the mask of threads that run (None: all), c the threads, which reach memory and
each other (machine.Threads). It returns the condition of the branch, return or exit that the block ends in, else None.

Where fidelity ends. `fma` is computed in float64 and rounded twice (wrong by one bit once in 2^29). Approximations
(ex2, lg2, rcp.approx, div.full ...) are correctly rounded, or off by up to `ulps` units; as on a GPU their error is a
function of the argument. `fuse` makes one fma of a product and the sum behind it in the same block, as ptxas may.
Registers that nobody wrote hold garbage. Machine code (SASS), caches and timing are not modelled.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .parse import Block, Instruction, Kernel

Array = Any  # numpy arrays over threads, or a scalar that all of them share

NUMPY = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2", "f16x2": "u4",
    "bf16x2": "u4", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8",
    "f64": "f8", "f32x2": "u8", "pred": "?",
}  # fmt: skip
BITS_ONLY = {"bf16", "bf16x2", "f16x2"}  # held as their bits: arithmetic on these would be integer arithmetic
ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ORDERED |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true for NaN: the negation of these
SHARED_BASE = 1024  # where global_smem lies: an address below is an error
SPECIAL = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%laneid"}
_CACHE = "cg ca cs cv nc weak relaxed acquire release volatile cta gpu sys v2 v4 v8 global shared"
# The modifiers beside types that each instruction may carry. Anything else is refused.
MODIFIERS = {
    **dict.fromkeys(("add", "sub", "fma"), "rn ftz"),
    **dict.fromkeys(("neg", "abs"), "ftz"),
    **dict.fromkeys(("ex2", "lg2", "rsqrt"), "approx ftz"),
    **dict.fromkeys(("rcp", "sqrt"), "rn approx ftz"),
    **dict.fromkeys(("max", "min"), "ftz NaN"),
    **dict.fromkeys(("and", "or", "xor", "not", "shl", "shr", "bfe", "prmt", "rem", "selp", "mov"), ""),
    **dict.fromkeys(("bra", "ret", "exit"), "uni"),
    **dict.fromkeys(("atom", "red"), "global gpu sys cta relaxed acquire release acq_rel add exch max min or and cas"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), "sync aligned m8n8 x1 x2 x4 trans shared"),
    "mul": "lo hi wide rn ftz", "mad": "lo wide", "div": "rn full approx ftz",
    "setp": " ".join([*ORDERED, *UNORDERED, "neu", "equ", "nan", "num", "and", "or", "xor", "ftz"]),
    "cvt": "rn rni rzi rmi rpi ftz", "cvta": "to global shared",
    "shfl": "sync bfly idx up down", "redux": "sync max min add and or xor NaN", "vote": "sync any all ballot",
    "ld": f"param {_CACHE} L1::evict_first L1::evict_last", "st": _CACHE, "bar": "sync warp",
}  # fmt: skip


def flush(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def from_bf16(x: Array) -> Array:
    """bfloat16 bits as float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 to bfloat16 bits, to nearest even; NaN is 0x7FFF as on a GPU."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_integer(x: Array, dtype: Any, rounding: str) -> Array:
    """A float as an integer: rounded as told, clipped to the type's range, NaN to 0."""
    info = np.iinfo(dtype)
    if info.bits == 64:
        raise NotImplementedError("a float as a 64-bit integer")
    whole = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}[rounding](x.astype(np.float64))
    return np.where(np.isnan(whole), 0.0, np.clip(whole, info.min, info.max)).astype(dtype)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c; the product is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def divide(x: Array, y: Array) -> Array:
    """Integers, towards zero. By zero a GPU gives all bits set."""
    zero = y == 0
    q = x // np.where(zero, y.dtype.type(1), y)
    if x.dtype.kind == "i":
        q = q + ((x - q * y != 0) & ((x < 0) != (y < 0)))
    return np.where(zero, np.invert(x.dtype.type(0)), q).astype(x.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of b:a, or its sign eight times."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        which = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (which & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(which & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return out


def approximation(ulps: int) -> Callable[[Array], Array]:
    """Rounds to float32, off by up to `ulps` units in the last place: the same for the same number."""

    def rounded(x: Array) -> Array:
        x = x.astype(np.float32)
        if not ulps:
            return x
        off = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(13)) % np.uint32(2 * ulps + 1)
        moved = (x.view(np.int32) + off.astype(np.int32) - np.int32(ulps)).view(np.float32)
        return np.where(np.isfinite(x) & (x != 0) & np.isfinite(moved) & (np.sign(moved) == np.sign(x)), moved, x)

    return rounded


class Translator:
    """The functions of a kernel's blocks, what each ends in, and the kinds of its registers."""

    def __init__(self, kernel: Kernel, *, ulps: int = 0, fuse: bool = False) -> None:
        self.kernel, self.fuse = kernel, fuse
        self.names: dict[str, Any] = {
            "np": np, "flush": flush, "from_bf": from_bf16, "to_bf": to_bf16, "to_int": to_integer, "fma": fma,
            "permute": permute, "divide": divide, "approx": approximation(ulps), "where": np.where,
            **{kind: np.dtype(kind) for kind in NUMPY.values()},
        }  # fmt: skip
        self.constants: dict[tuple[str, Any, float], str] = {}
        self.places: dict[str, int] = {}  # of registers in R
        self.fused = 0  # sums that became part of an fma
        self.kinds = self._register_kinds()
        self.ends: list[tuple[str, str]] = []  # fall, bra, ret, bar or pause, and the label
        self.functions = [self._block(number, block) for number, block in enumerate(kernel.blocks)]

    # Registers and operands

    def _register_kinds(self) -> dict[str, str]:
        """PTX's 32-bit registers have no type: float or signed where most instructions that name one say so."""
        votes: dict[str, list[str]] = {}
        for instruction in (instruction for block in self.kernel.blocks for instruction in block.code):
            for register in re.findall(r"%[a-z]+\d+\b", " ".join((*instruction.operands, instruction.guard or ""))):
                votes.setdefault(register, []).append(instruction.op.split(".")[-1])
        out = {}
        for register, kinds in votes.items():
            declared = self.kernel.registers.get(register.rstrip("0123456789"))
            if declared is None:
                raise NotImplementedError(f"{self.kernel.name}: register {register} is not declared")
            out[register] = NUMPY[declared]
            if declared in ("b32", "f32"):
                floats, signed = kinds.count("f32"), kinds.count("s32")
                out[register] = "f4" if floats > signed else "i4" if signed else "u4"
        return out

    def _place(self, register: str) -> int:
        return self.places.setdefault(register, len(self.places))

    def _local(self, register: str) -> str:
        """The local variable of a register, read from R where the block has not written it."""
        if register not in self.local:
            self.local.add(register)
            self.head.append(f"{register[1:]} = R[{self._place(register)}]")
        return register[1:]

    def _constant(self, value: float, kind: str) -> str:
        key = (kind, value if value == value else "nan", math.copysign(1, value) if kind[0] == "f" else 0)
        if key not in self.constants:
            name = self.constants[key] = f"K{len(self.constants)}"
            if kind[0] == "f":
                self.names[name] = np.dtype(kind).type(value)
            else:
                bits = 8 * int(kind[1])
                self.names[name] = np.array(int(value) & ((1 << bits) - 1), f"u{kind[1]}").view(kind)[()]
        return self.constants[key]

    def value(self, operand: str, kind: str) -> str:
        """An operand as numpy `kind`: of a wider register the low bits."""
        if operand in self.kinds:
            have, name = self.kinds[operand], self._local(operand)
            if have == kind:
                return name
            if have[1:] == kind[1:]:
                return f"{name}.view({kind})"
            return f"{name}.view(u{have[1]}).astype(u{kind[1]}).view({kind})"
        if operand.startswith(("0f", "0F")):
            bits = int(operand[2:], 16)
            number = struct.unpack("<f", struct.pack("<I", bits))[0]
            return self._constant(number if kind == "f4" else bits, kind)
        if operand.startswith(("0d", "0D")):
            return self._constant(struct.unpack("<d", struct.pack("<Q", int(operand[2:], 16)))[0], "f8")
        if operand in SPECIAL:
            return f"c.special['{operand}'].astype({kind})"
        if symbol := re.fullmatch(r"global_smem(?:\+(\d+))?", operand):
            return self._constant(SHARED_BASE + int(symbol.group(1) or 0), kind)
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", operand):
            raise NotImplementedError(operand)
        number = int(operand, 0)
        if kind[0] == "f":  # an integer that spells the bits of a float
            number = np.array(number & ((1 << 8 * int(kind[1])) - 1), f"u{kind[1]}").view(kind)[()]
        return self._constant(number, kind)

    def _predicate(self, operand: str) -> str:
        if operand.startswith("!"):
            return f"(~{self._local(operand[1:])})"
        return self._local(operand) if operand.startswith("%") else f"np.full(c.size, {bool(int(operand, 0))})"

    def assign(self, register: str, expression: str, kind: str) -> None:
        """register = expression, an array of `kind`, where the guard holds."""
        if register == "_":
            self.body.append(expression)
            return
        want = self.kinds[register]
        if want[1:] == kind[1:] and want != kind:
            expression = f"({expression}).view({want})"
        elif want != kind:  # zero- or sign-extended, as its own kind says
            expression = f"({expression}).astype({'i' if kind[0] == 'i' else 'u'}{want[1]}).view({want})"
        if self.guard is not None:
            expression = f"where({self.guard}, {expression}, {self._local(register)})"
        self.local.add(register)
        self.written.add(register)
        self.version[register] = self.version.get(register, 0) + 1
        self.body.append(f"{register[1:]} = {expression}")

    # Blocks

    def _block(self, number: int, block: Block) -> Callable[..., Any]:
        self.local, self.written, self.version = set[str](), set[str](), dict[str, int]()
        self.head, self.body = list[str](), list[str]()
        self.products: dict[str, tuple[Any, ...]] = {}
        self.end, self.result = ("fall", ""), "None"
        for instruction in block.code:
            try:
                self._instruction(instruction)
            except Exception as error:
                what = f"{self.kernel.name}, PTX line {instruction.line}: {instruction.text} ({error})"
                raise NotImplementedError(what) from error
        self.ends.append(self.end)
        lines = self.head + self.body
        if self.written:
            names = sorted(self.written)
            lines += ["if m is None:", *(f"    R[{self._place(r)}] = c.full({r[1:]})" for r in names), "else:"]
            lines += [f"    R[{self._place(r)}] = where(m, {r[1:]}, R[{self._place(r)}])" for r in names]
        text = "\n    ".join(["def block(R, m, c):", *lines, f"return {self.result}"])
        scope = dict(self.names)
        exec(compile(text, f"<{self.kernel.name} block {number}>", "exec"), scope)
        return scope["block"]

    def _instruction(self, ins: Instruction) -> None:
        head, *self.mods = ins.op.replace("shared::cta", "shared").split(".")  # two names of the same, as PTX has it
        if head not in MODIFIERS:
            raise NotImplementedError("unknown instruction")
        self.types = [x for x in self.mods if x in NUMPY]
        if unknown := set(self.mods) - set(self.types) - set(MODIFIERS[head].split()):
            raise NotImplementedError(f"unknown modifier: {', '.join(sorted(unknown))}")
        self.line, self.ftz, self.guard = ins.line, "ftz" in self.mods, None
        if ins.guard is not None:
            self.guard = self._predicate(ins.guard)
        getattr(self, f"op_{head}")(*ins.operands)

    def _kind(self) -> str:
        """numpy's kind of the type that the instruction calculates in."""
        if self.types[-1] in BITS_ONLY:
            raise NotImplementedError(f"arithmetic in {self.types[-1]}")
        return NUMPY[self.types[-1]]

    def _mask(self) -> str:
        """The threads of an access."""
        return "m" if self.guard is None else f"({self.guard} if m is None else {self.guard} & m)"

    def _everyone(self) -> None:
        if self.guard is not None:
            raise NotImplementedError("a guarded instruction of the whole warp")

    def _flushed(self, text: str) -> str:
        return f"flush({text})" if self.ftz else text

    # Control

    def op_bra(self, label: str) -> None:
        self.end, self.result = ("bra", label), self.guard or "None"

    def op_ret(self) -> None:
        self.end, self.result = ("ret", ""), self.guard or "None"

    op_exit = op_ret

    def op_bar(self, number: str) -> None:
        self._everyone()
        if "warp" in self.mods:
            self.body.append(f"c.warp_barrier({self.value(number, 'i4')}, m, {self.line})")
        elif number != "0":
            raise NotImplementedError("a barrier other than 0, or of some of the threads")
        else:
            self.end = ("bar", "")

    # Arithmetic

    def _binary(self, symbol: str, d: str, a: str, b: str) -> None:
        if self.types == ["f32", "bf16"]:  # the first operand is widened, the second is a float
            self.assign(d, f"from_bf({self.value(a, 'u2')}) {symbol} {self.value(b, 'f4')}", "f4")
            return
        kind = self._kind()
        if self.types[-1] == "f32x2":
            x, y = (self._flushed(f"c.pairs({self.value(o, 'u8')})") for o in (a, b))
            self.assign(d, f"({self._flushed(f'{x} {symbol} {y}')}).view(u8)", "u8")
            return
        x, y = self.value(a, kind), self.value(b, kind)
        text = f"{x} {symbol} {y}"
        plain = kind == "f4" and "rn" not in self.mods and not self.ftz
        if self.ftz:
            text = f"flush(flush({x}) {symbol} flush({y}))"
        elif plain and self.fuse and symbol in "+-":
            text = self._contracted(a, b, symbol) or text
        self.assign(d, text, kind)
        if plain and symbol == "*" and self.guard is None:
            self.products[d] = (a, b, *(self.version.get(r, 0) for r in (a, b, d)))

    def _contracted(self, a: str, b: str, symbol: str) -> str | None:
        """a ± b where one of them is a product, as one fma."""
        for one, other, swapped in ((a, b, False), (b, a, True)):
            found = self.products.get(one)
            if found is None or found[2:] != tuple(self.version.get(r, 0) for r in (*found[:2], one)):
                continue
            x, y, z = (self.value(r, "f4") for r in (*found[:2], other))
            self.fused += 1
            if symbol == "+":
                return f"fma({x}, {y}, {z})"
            return f"fma(-{x}, {y}, {z})" if swapped else f"fma({x}, {y}, -{z})"
        return None

    def op_add(self, d: str, a: str, b: str) -> None:
        self._binary("+", d, a, b)

    def op_sub(self, d: str, a: str, b: str) -> None:
        self._binary("-", d, a, b)

    def op_mul(self, d: str, a: str, b: str) -> None:
        kind = self._kind()
        if not {"wide", "hi"} & set(self.mods):
            self._binary("*", d, a, b)
            return
        if kind[1] == "8":
            raise NotImplementedError("128 bits")
        wide = f"{kind[0]}{2 * int(kind[1])}"
        text = f"({self.value(a, kind)}).astype({wide}) * ({self.value(b, kind)}).astype({wide})"
        if "hi" in self.mods:
            text, wide = f"(({text}) >> {self._constant(8 * int(kind[1]), wide)}).astype({kind})", kind
        self.assign(d, text, wide)

    def op_mad(self, d: str, a: str, b: str, c: str) -> None:
        kind = self._kind()
        wide = f"{kind[0]}{2 * int(kind[1])}" if "wide" in self.mods else kind
        x, y = (f"({self.value(o, kind)}).astype({wide})" for o in (a, b))
        self.assign(d, f"{x} * {y} + {self.value(c, wide)}", wide)

    def op_fma(self, d: str, *operands: str) -> None:
        if self.types[-1] not in ("f32", "f32x2"):
            raise NotImplementedError(self.types[-1])
        if self.types[-1] == "f32x2":
            a, b, c = (self._flushed(f"c.pairs({self.value(o, 'u8')})") for o in operands)
            self.assign(d, f"({self._flushed(f'fma({a}, {b}, {c})')}).view(u8)", "u8")
            return
        a, b, c = (self._flushed(self.value(o, "f4")) for o in operands)
        self.assign(d, self._flushed(f"fma({a}, {b}, {c})"), "f4")

    def op_div(self, d: str, a: str, b: str) -> None:
        kind = self._kind()
        x, y = self.value(a, kind), self.value(b, kind)
        if kind[0] != "f":
            self.assign(d, f"divide({x}, {y})", kind)
        else:
            text = f"{self._flushed(x)} / {self._flushed(y)}"
            self.assign(d, self._flushed(text if "rn" in self.mods else f"approx({text})"), kind)

    def op_rem(self, d: str, a: str, b: str) -> None:
        kind = self._kind()
        x, y = self.value(a, kind), self.value(b, kind)
        self.assign(d, f"{x} - divide({x}, {y}) * {y}", kind)

    def _unary(self, form: str, d: str, a: str) -> None:
        kind = self._kind()
        self.assign(d, self._flushed(form.format(self._flushed(self.value(a, kind)))), kind)

    def op_neg(self, d: str, a: str) -> None:
        self._unary("(-{})", d, a)

    def op_abs(self, d: str, a: str) -> None:
        self._unary("np.abs({})", d, a)

    def _approximate(self, form: str, d: str, a: str) -> None:
        if self.types != ["f32"]:
            raise NotImplementedError(self.types[-1])
        self._unary(f"({form}).astype(f4)" if "rn" in self.mods else f"approx({form})", d, a)

    def op_ex2(self, d: str, a: str) -> None:
        self._approximate("np.exp2(({}).astype(f8))", d, a)

    def op_lg2(self, d: str, a: str) -> None:
        self._approximate("np.log2(({}).astype(f8))", d, a)

    def op_rcp(self, d: str, a: str) -> None:
        self._approximate("1 / ({}).astype(f8)", d, a)

    def op_sqrt(self, d: str, a: str) -> None:
        self._approximate("np.sqrt(({}).astype(f8))", d, a)

    def op_rsqrt(self, d: str, a: str) -> None:
        self._approximate("1 / np.sqrt(({}).astype(f8))", d, a)

    def _extreme(self, name: str, d: str, *operands: str) -> None:
        """Of a NaN and a number the number, unless the instruction says NaN."""
        kind = self._kind()
        function = f"f{name[:3]}" if kind[0] == "f" and "NaN" not in self.mods else name
        text, *rest = (self._flushed(self.value(o, kind)) for o in operands)
        for other in rest:
            text = f"np.{function}({text}, {other})"
        self.assign(d, text, kind)

    def op_max(self, d: str, *operands: str) -> None:
        self._extreme("maximum", d, *operands)

    def op_min(self, d: str, *operands: str) -> None:
        self._extreme("minimum", d, *operands)

    # Bits

    def _logic(self, symbol: str, d: str, a: str, b: str) -> None:
        kind = NUMPY[self.types[-1]]
        x, y = (self._predicate(o) if kind == "?" else self.value(o, kind) for o in (a, b))
        self.assign(d, f"{x} {symbol} {y}", kind)

    def op_and(self, d: str, a: str, b: str) -> None:
        self._logic("&", d, a, b)

    def op_or(self, d: str, a: str, b: str) -> None:
        self._logic("|", d, a, b)

    def op_xor(self, d: str, a: str, b: str) -> None:
        self._logic("^", d, a, b)

    def op_not(self, d: str, a: str) -> None:
        kind = NUMPY[self.types[-1]]
        self.assign(d, f"(~{self._predicate(a) if kind == '?' else self.value(a, kind)})", kind)

    def _shift(self, symbol: str, d: str, a: str, b: str) -> None:
        """By as many bits as there are, or more: all are shifted out (of a signed number all but the sign)."""
        kind = NUMPY[self.types[-1]]
        bits, by = 8 * int(kind[1]), self.value(b, "u4")
        if not b.startswith("%") and int(b, 0) < bits:
            self.assign(d, f"{self.value(a, kind)} {symbol} {self._constant(int(b, 0), kind)}", kind)
            return
        text = f"({self.value(a, kind)} {symbol} np.minimum({by}, {self._constant(bits - 1, 'u4')}).astype({kind}))"
        if kind[0] == "u" or symbol == "<<":
            text = f"where({by} < {self._constant(bits, 'u4')}, {text}, {self._constant(0, kind)})"
        self.assign(d, text, kind)

    def op_shl(self, d: str, a: str, b: str) -> None:
        self._shift("<<", d, a, b)

    def op_shr(self, d: str, a: str, b: str) -> None:
        self._shift(">>", d, a, b)

    def op_bfe(self, d: str, a: str, start: str, length: str) -> None:
        if self.types != ["u32"] or "%" in start + length:
            raise NotImplementedError("bfe but of unsigned numbers at a given place")
        x, by = self.value(a, "u4"), self._constant(int(start, 0), "u4")
        self.assign(d, f"({x} >> {by}) & {self._constant((1 << int(length, 0)) - 1, 'u4')}", "u4")

    def op_prmt(self, d: str, a: str, b: str, selector: str) -> None:
        self.assign(d, f"permute({', '.join(self.value(o, 'u4') for o in (a, b, selector))})", "u4")

    # Comparisons and selection

    def op_setp(self, d: str, a: str, b: str, *other: str) -> None:
        how, kind = self.mods[0], self.types[-1]
        if how == "ne" and kind[0] in "bus" and kind not in BITS_ONLY:
            how = "neu"  # integers are never NaN
        if kind in ("bf16x2", "f16x2"):
            halves = d.split("|")
            x, y = (
                [f"({self.value(o, 'u4')} >> {self._constant(16 * i, 'u4')}).astype(u2)" for i in (0, 1)]
                for o in (a, b)
            )
            for name, one, two in zip(halves, x, y, strict=True):
                form = "from_bf({})" if kind == "bf16x2" else "{}.view(f2)"
                self.assign(name, self._compare(how, form.format(one), form.format(two)), "?")
            return
        if kind == "bf16":
            x, y = (f"from_bf({self.value(o, 'u2')})" for o in (a, b))
        else:
            x, y = (self._flushed(self.value(o, NUMPY[kind])) for o in (a, b))
        text = self._compare(how, x, y)
        if other:
            symbol = {"and": "&", "or": "|", "xor": "^"}[self.mods[1]]
            text = f"{text} {symbol} {self._predicate(other[0])}"
        if "|" in d:
            raise NotImplementedError("setp with two results")
        self.assign(d, text, "?")

    @staticmethod
    def _compare(how: str, x: str, y: str) -> str:
        if how in UNORDERED:
            return f"(~({x} {UNORDERED[how]} {y}))"
        if how in ("nan", "num"):
            return f"({'~' if how == 'num' else ''}(np.isnan({x}) | np.isnan({y})))"
        if how == "equ":
            return f"(~(({x} < {y}) | ({x} > {y})))"
        if how == "ne":  # false for NaN
            return f"(({x} < {y}) | ({x} > {y}))"
        return f"({x} {'!=' if how == 'neu' else ORDERED[how]} {y})"

    def op_selp(self, d: str, a: str, b: str, predicate: str) -> None:
        kind = NUMPY[self.types[-1]]
        if self.kinds.get(d, kind)[1:] == kind[1:]:
            kind = self.kinds.get(d, kind)
        self.assign(d, f"where({self._predicate(predicate)}, {self.value(a, kind)}, {self.value(b, kind)})", kind)

    # Moves and conversions

    def op_mov(self, d: str, a: str) -> None:
        kind = NUMPY[self.types[-1]]
        if kind == "?":
            self.assign(d, self._predicate(a), "?")
        elif d.startswith("{"):  # a register's parts, the lowest first
            parts = _listed(d)
            size = int(kind[1]) // len(parts)
            for i, part in enumerate(parts):
                if part != "_":
                    shift = self._constant(8 * size * i, kind)
                    self.assign(part, f"({self.value(a, kind)} >> {shift}).astype(u{size})", f"u{size}")
        elif a.startswith("{"):
            parts = _listed(a)
            size = int(kind[1]) // len(parts)
            shifted = (
                f"(({self.value(part, f'u{size}')}).astype({kind}) << {self._constant(8 * size * i, kind)})"
                for i, part in enumerate(parts)
            )
            self.assign(d, " | ".join(shifted), kind)
        else:
            want = self.kinds[d]
            kind = want if want[1:] == kind[1:] else kind
            self.assign(d, self.value(a, kind), kind)

    def op_cvt(self, d: str, a: str, *low: str) -> None:
        to, of = self.types
        rounding = next((x for x in self.mods if x in ("rn", "rni", "rzi", "rmi", "rpi")), None)
        narrow = {"bf16": "to_bf({})", "f16": "({}).astype(f2).view(u2)"}
        if to in ("bf16x2", "f16x2"):
            high, lower = (f"({narrow[to[:-2]].format(self.value(x, 'f4'))}).astype(u4)" for x in (a, *low))
            self.assign(d, f"({high} << {self._constant(16, 'u4')}) | {lower}", "u4")
        elif to == "bf16" and of == "f32":
            self.assign(d, f"to_bf({self.value(a, 'f4')})", "u2")
        elif of == "bf16" and to == "f32":
            self.assign(d, f"from_bf({self.value(a, 'u2')})", "f4")
        elif "bf16" in (to, of):
            raise NotImplementedError("from or to bf16 but of f32")
        elif of[0] == "f" and to[0] == "f":
            text = self._flushed(self.value(a, NUMPY[of]))
            if rounding not in ("rn", None):
                function = {"rmi": "floor", "rni": "rint", "rzi": "trunc", "rpi": "ceil"}[rounding]
                text = f"np.{function}({text})"
            self.assign(d, f"({text}).astype({NUMPY[to]})", NUMPY[to])
        elif of[0] == "f":
            self.assign(d, f"to_int({self._flushed(self.value(a, NUMPY[of]))}, {NUMPY[to]}, '{rounding}')", NUMPY[to])
        else:  # integers: truncated, or extended as the source's kind says; to floats to nearest
            self.assign(d, f"({self.value(a, NUMPY[of])}).astype({NUMPY[to]})", NUMPY[to])

    def op_cvta(self, d: str, a: str) -> None:
        self.assign(d, self.value(a, "u8"), "u8")

    # Warps

    def op_shfl(self, d: str, a: str, b: str, clamp: str, mask: str) -> None:
        self._everyone()
        kind = self.kinds[d]  # KeyError for the form with a predicate, which nothing here uses
        given = ", ".join((self.value(a, kind), *(self.value(x, "i4") for x in (b, clamp, mask))))
        self.assign(d, f"c.shuffle('{self.mods[1]}', {given}, m, {self.line})", kind)

    def op_redux(self, d: str, a: str, mask: str) -> None:
        self._everyone()
        kind = self._kind()
        how = "nan" * ("NaN" in self.mods) + self.mods[1]
        self.assign(d, f"c.reduce('{how}', {self.value(a, kind)}, {self.value(mask, 'i4')}, m, {self.line})", kind)

    def op_vote(self, d: str, a: str, mask: str) -> None:
        self._everyone()
        kind = "u4" if self.mods[1] == "ballot" else "?"
        given = f"{self._predicate(a)}, {self.value(mask, 'i4')}"
        self.assign(d, f"c.vote('{self.mods[1]}', {given}, m, {self.line})", kind)

    # Memory

    def _address(self, operand: str) -> str:
        """base, offset: of the memory that the instruction names."""
        inside = operand.strip("[] ").replace(" ", "")
        base, offset = inside, "0"
        if found := re.fullmatch(r"(%?\w+)(?:\+(?=[\d-])|(?=-))(-?\d+)", inside):
            base, offset = found.groups()
        wide = "global" in self.mods or self.kinds.get(base) == "u8"
        if not {"global", "shared"} & set(self.mods):
            raise NotImplementedError("memory that is neither global nor shared")
        return (
            f"'{'global' if 'global' in self.mods else 'shared'}', {self.value(base, 'u8' if wide else 'u4')}, {offset}"
        )

    def _mode(self) -> str:
        """What the access says about others'. Inside a launch `volatile` is `relaxed`."""
        return next((x for x in self.mods if x in ("acquire", "release", "acq_rel", "relaxed", "volatile")), "weak")

    def _scope(self) -> str:
        return next((x for x in self.mods if x in ("cta", "gpu", "sys")), "gpu")

    def op_ld(self, d: str, place: str) -> None:
        registers, raw = _listed(d), NUMPY[self.types[-1]]
        if "param" in self.mods:
            self.assign(registers[0], f"c.params['{place.strip('[] ')}'].view({raw})", raw)
            return
        if self._mode() != "weak":
            self.end = ("pause", "")
        given = f"{self._address(place)}, {raw[1]}, {len(registers)}, {self._mask()}, {self.line}"
        self.body.append(f"_x = c.load({given}, '{self._mode()}', '{self._scope()}')")
        for i, register in enumerate(registers):
            if register != "_":
                self.assign(register, f"_x[{i}].view({raw})", raw)

    def op_st(self, place: str, operand: str) -> None:
        raw, registers = NUMPY[self.types[-1]], _listed(operand)
        values = ", ".join(f"c.full({self.value(x, f'u{raw[1]}')})" for x in registers)
        given = f"{self._address(place)}, {raw[1]}, ({values},), {self._mask()}, {self.line}"
        self.body.append(f"c.store({given}, '{self._mode()}', '{self._scope()}')")

    def _matrices(self) -> None:
        self._everyone()
        if "m8n8" not in self.mods or self.types[-1] != "b16":
            raise NotImplementedError("matrices other than 8 x 8 of 16 bits")

    def op_ldmatrix(self, d: str, place: str) -> None:
        self._matrices()
        given = f"{self._address(place)}, {len(_listed(d))}, {'trans' in self.mods}, m, {self.line}"
        self.body.append(f"_x = c.load_matrices({given})")
        for i, register in enumerate(_listed(d)):
            self.assign(register, f"_x[{i}]", "u4")

    def op_stmatrix(self, place: str, operand: str) -> None:
        self._matrices()
        values = ", ".join(f"c.full({self.value(x, 'u4')})" for x in _listed(operand))
        self.body.append(
            f"c.store_matrices({self._address(place)}, ({values},), {'trans' in self.mods}, m, {self.line})"
        )

    def op_atom(self, d: str, place: str, *given: str) -> None:
        how = next(x for x in self.mods if x in ("add", "exch", "max", "min", "or", "and", "cas"))
        if self.types[-1] in BITS_ONLY | {"f16"}:
            raise NotImplementedError("atomics in half precision")
        raw = NUMPY[self.types[-1]]
        values = ", ".join(f"c.full({self.value(x, raw)})" for x in given)
        about = f"{self._mask()}, {self.line}, '{self._mode()}', '{self._scope()}'"
        self.assign(d, f"c.atomic({self._address(place)}, {raw}, '{how}', ({values},), {about})", raw)
        self.end = ("pause", "")

    def op_red(self, place: str, *given: str) -> None:
        self.op_atom("_", place, *given)


def _listed(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]
