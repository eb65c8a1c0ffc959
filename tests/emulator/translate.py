"""A basic block of PTX as one Python function over all threads that run together.

`block(R, m, c)`: R are the registers that live from block to block, m the mask of threads that run (None: all), c the
threads, which reach memory and each other (machine.Threads). A register is a numpy array, or one number where all
threads surely hold the same. Returned is the condition of the branch, return or exit that the block ends in, else None.

Where fidelity ends. `fma` is computed in float64 and rounded twice (wrong by one bit once in 2^29). Approximations
(ex2, lg2, rcp.approx, div.full ...) are correctly rounded, or off by up to `ulps` units; as on a GPU their error is a
function of the argument. `fuse` makes one fma of a product and the sum behind it in the same block, as ptxas may.
Registers that nobody wrote hold garbage. Machine code (SASS), caches and timing are not modelled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .parse import Block, Instruction, Kernel

Array = Any  # numpy arrays over threads, or a scalar that all of them share

NUMPY = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2", "f16x2": "u4",
    "bf16x2": "u4", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8",
    "f64": "f8", "f32x2": "u8", "pred": "b1",
}  # fmt: skip
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "f32": "f64", "f32x2": "f64"}
BITS_ONLY = {"bf16", "bf16x2", "f16x2"}  # held as their bits: arithmetic on these would be integer arithmetic
SHARED_BASE = 1024  # where global_smem lies: an address below is an error
SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid"}

# Subnormal numbers become zeros of their sign (.ftz); NaN times 0 is NaN. bfloat16 is the upper half of float32.
FLUSHED, FROM_BF16 = "{0} * (np.abs({0}) >= np.float32(2.0**-126))", "({0}.astype(u4) << np.uint32(16)).view(f4)"
# What an instruction, or one with such modifiers, gives: of its operands as numbers of its type, or {w0} ... twice as
# wide. With .ftz these are flushed, and what it gives.
FORMULAS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mul.wide": "{w0} * {w1}",
    "mul.hi": "({w0} * {w1} >> 8 * {0}.itemsize).astype({0}.dtype)", "mad": "{0} * {1} + {2}",
    "mad.wide": "{w0} * {w1} + {2}", "neg": "-{0}", "abs": "np.abs({0})", "div": "divide({0}, {1})",
    "rem": "{0} - divide({0}, {1}) * {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "shl": "shift({0}, {1}, True)",
    "shr": "shift({0}, {1}, False)", "bfe": "({0} >> ({1} & 255)) & ((np.uint32(1) << ({2} & 255)) - np.uint32(1))",
    "prmt": "permute({0}, {1}, {2})", "selp": "where({2}, {0}, {1})",
    # of a NaN and a number the number, unless the instruction says NaN
    "max": "np.fmax({0}, {1})", "min": "np.fmin({0}, {1})",
    "max.NaN": "np.maximum({0}, {1})", "min.NaN": "np.minimum({0}, {1})",
    "fma": "({w0} * {w1} + {w2}).astype(f4)", "ex2": "approximate(np.exp2({w0}))", "lg2": "approximate(np.log2({w0}))",
    "rcp": "approximate(1 / {w0})", "rcp.rn": "(1 / {w0}).astype(f4)", "sqrt": "approximate(np.sqrt({w0}))",
    "sqrt.rn": "np.sqrt({w0}).astype(f4)", "rsqrt": "approximate(1 / np.sqrt({w0}))",
    "div.full": "approximate({0} / {1})", "div.approx": "approximate({0} / {1})", "div.rn": "{0} / {1}",
}  # fmt: skip
WRAPPING = ("add", "sub", "mul", "mad", "neg", "shl")  # which give the same bits with and without a sign
# Types that some are restricted to, and those of single operands
ONLY = {
    **dict.fromkeys(("ex2", "lg2", "rcp", "rcp.rn", "sqrt", "sqrt.rn", "rsqrt", "div.full", "div.approx"), ("f32",)),
    **dict.fromkeys(("mul.wide", "mul.hi", "mad.wide"), ("u16", "s16", "u32", "s32")),
    "fma": ("f32", "f32x2"), "bfe": ("u32",),
    **dict.fromkeys(("div", "rem", "mad"), ("u16", "s16", "u32", "s32", "u64", "s64")),
}  # fmt: skip
OPERANDS = {("shl", 1): "u32", ("shr", 1): "u32", ("selp", 2): "pred"}
COMPARISONS = {
    "eq": "{0} == {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "lo": "{0} < {1}", "ls": "{0} <= {1}", "hi": "{0} > {1}", "hs": "{0} >= {1}",
    "ne": "({0} < {1}) | ({0} > {1})", "num": "~(np.isnan({0}) | np.isnan({1}))",
    # true for NaN
    "neu": "{0} != {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "nan": "np.isnan({0}) | np.isnan({1})",
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
}  # fmt: skip
ROUNDINGS = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}  # to a whole number
ORDERINGS = ("acquire", "release", "acq_rel", "relaxed", "volatile")
SCOPES = ("cta", "gpu", "sys")
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
    **dict.fromkeys(("ldmatrix", "stmatrix"), "sync aligned m8n8 x4 trans shared"),
    "mul": "lo hi wide rn ftz", "mad": "lo wide", "div": "rn full approx ftz",
    "setp": " ".join([*COMPARISONS, "and or xor ftz"]), "cvt": " ".join([*ROUNDINGS, "rn ftz"]),
    "cvta": "to global shared", "shfl": "sync bfly idx up down", "redux": "sync max min add and or xor NaN",
    "vote": "sync any all ballot", "ld": f"param {_CACHE} L1::evict_first L1::evict_last", "st": _CACHE,
    "bar": "sync warp",
}  # fmt: skip


def to_bf16(x: Array) -> Array:
    """float32 to bfloat16 bits, to nearest even; NaN is 0x7FFF as on a GPU."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def divide(x: Array, y: Array) -> Array:
    """Integers, towards zero. By zero a GPU gives all bits set."""
    zero = y == 0
    q = x // np.where(zero, y.dtype.type(1), y)
    if x.dtype.kind == "i":
        q = q + ((x - q * y != 0) & ((x < 0) != (y < 0)))
    return np.where(zero, np.invert(x.dtype.type(0)), q).astype(x.dtype)


def shift(x: Array, by: Array, left: bool) -> Array:
    """By as many bits as there are, or more: all are shifted out (of a signed number all but the sign)."""
    bits = 8 * x.dtype.itemsize
    some = (by if by.ndim == 0 and by < bits else np.minimum(by, bits - 1)).astype(x.dtype)
    moved = x << some if left else x >> some
    if (some.ndim == 0 and by < bits) or (x.dtype.kind == "i" and not left):
        return moved
    return np.where(by < bits, moved, x.dtype.type(0))


def split(x: Array, kind: Any) -> Array:
    """A register's parts in a last axis, the lowest first."""
    return np.asarray(x)[..., None].view(kind)


def join(kind: Any, *parts: Array) -> Array:
    """The register of such parts."""
    return np.stack(np.broadcast_arrays(*parts), -1).view(kind)[..., 0]


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of b:a, or its sign eight times."""
    out = []
    for i in range(4):
        which = selector >> np.uint32(4 * i) & 15
        byte = np.choose(which & 7, [split(x, np.uint8)[..., j] for x in (a, b) for j in range(4)])
        out.append(np.where(which & 8, (byte >> 7) * np.uint8(255), byte))
    return join(np.uint32, *out)


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


class Access(NamedTuple):
    """What an instruction does to memory, as far as it says so itself."""

    space: str  # global or shared
    offset: int  # from the register's address
    size: int  # bytes of each number
    count: int  # numbers, one behind the other
    nbytes: int  # of all of them
    number: int  # among the kernel's accesses
    line: int  # of the PTX
    mode: str  # weak, or how others may see it: acquire, release, acq_rel, relaxed (as volatile is within a launch)
    scope: str  # cta, gpu or sys: which others


class Translator:
    """The functions of a kernel's blocks, what each ends in, and where its registers lie."""

    def __init__(self, kernel: Kernel, *, ulps: int = 0, fuse: bool = False) -> None:
        self.kernel, self.fuse = kernel, fuse
        self.names: dict[str, Any] = {kind: np.dtype(kind) for kind in NUMPY.values()}
        self.names |= {f.__name__: f for f in (np, np.where, to_bf16, divide, shift, split, join, permute)}
        self.names |= {"np": np, "approximate": approximation(ulps)}
        self.fused = 0  # sums that became part of an fma
        self.unit = {"global": 8, "shared": 8}  # bytes: no access is smaller
        self.accesses: list[Access] = []
        self.places: dict[str, int] = {}  # in R, of the registers that a block begins with
        self.ends: list[tuple[str, str]] = []  # fall, bra, ret, bar or pause, and the label
        self.drafts: list[tuple[list[str], dict[str, tuple[str, str]], str]] = []
        for block in kernel.blocks:
            self._draft(block)
        self.functions = [self._function(number) for number in range(len(self.drafts))]

    # Registers and operands

    def own(self, register: str) -> str:
        """The numpy kind in which a register goes from block to block."""
        kind = NUMPY[self.kernel.registers[register.rstrip("0123456789")]]
        return kind if kind == "b1" else f"u{kind[1]}"

    def let(self, text: str) -> str:
        """A variable with the value of an expression, which is computed once: here, if it is a constant."""
        if text.isidentifier():
            return text
        if text not in self.made:
            varies = re.search(r"\b([rvx]\d+|c)\b", text)
            name = self.made[text] = f"v{len(self.made)}" if varies else f"k{len(self.names)}"
            if varies:
                self.lines.append(f"{name} = {text}")
            else:
                with np.errstate(all="ignore"):
                    self.names[name] = eval(text, self.names)
        return self.made[text]

    def recast(self, text: str, have: str, want: str) -> str:
        """Bits of one numpy kind as another: zero- or sign-extended as the first says, or the lower ones."""
        if have[0] == "f" and have[1:] != want[1:]:
            text, have = self.recast(text, have, f"u{have[1]}"), f"u{have[1]}"
        if have[1:] != want[1:]:
            have = f"{have[0]}{want[1]}"
            text = self.let(f"({text}).astype({have})")
        return text if have == want else self.let(f"({text}).view({want})")

    def value(self, operand: str, kind: str) -> str:
        """An operand as numpy `kind`; of a wider register the low bits."""
        if operand.startswith("!"):
            return self.let(f"~{self.value(operand[1:], kind)}")
        if operand in SPECIAL and kind[1] == "4":
            return self.let(f"c.special['{operand}'].view({kind})")
        if operand.startswith("%"):
            if operand not in self.current:
                place = self.places.setdefault(operand, len(self.places))
                self.lines.append(f"r{place} = R[{place}]")
                self.current[operand] = f"r{place}", self.own(operand)
            return self.recast(*self.current[operand], kind)
        if symbol := re.fullmatch(r"global_smem(?:\+(\d+))?", operand):
            bits = SHARED_BASE + int(symbol.group(1) or 0)
        elif re.fullmatch(f"0[fFdD][0-9a-fA-F]{{{2 * int(kind[1])}}}", operand):
            bits = int(operand[2:], 16)
        else:
            bits = int(operand, 0)  # of a float too
        return self.let(f"np.array({bits & (1 << 8 * int(kind[1])) - 1}, 'u{kind[1]}').view({kind})[()]")

    def natural(self, operand: str, kind: str) -> str:
        """The kind that a register is in, if it is as wide: bits that are only moved need no other."""
        have = self.current.get(operand, ("", kind))[1]
        return have if have[1:] == kind[1:] else kind

    def read(self, operand: str, of: str) -> str:
        """An operand as a number of a PTX type."""
        text = self.value(operand, NUMPY[of])
        if of in ("bf16", "f32x2"):
            text = self.let(FROM_BF16.format(text) if of == "bf16" else f"split({text}, f4)")
        return self._flushed(text, of)

    def _flushed(self, text: str, of: str) -> str:
        if not self.ftz or of not in ("f32", "f32x2", "bf16") or text in self.flushed:
            return text
        name = self.let(FLUSHED.format(self.let(text)))
        self.flushed.add(name)
        return name

    def _wide(self, variable: str, of: str) -> str:
        return self.let(f"{variable}.astype({NUMPY[WIDER[of]]})")

    def write(self, register: str, text: str, of: str) -> None:
        """register = a number of a PTX type."""
        text = self._flushed(text, of)
        self.assign(register, f"({text}).view(u8)[..., 0]" if of == "f32x2" else text, NUMPY[of])

    def assign(self, register: str, text: str, kind: str) -> None:
        """register = an array of `kind`, where the guard holds."""
        if register == "_":
            self.lines.append(text)
            return
        own = self.own(register)
        if own[1:] != kind[1:]:
            text, kind = self.recast(text, kind, own), own
        if self.guard is not None:
            text = f"where({self.guard}, {text}, {self.value(register, kind)})"
        self.current[register] = self.let(text), kind

    # Blocks

    def _draft(self, block: Block) -> None:
        self.lines, self.made, self.flushed = list[str](), dict[str, str](), set[str]()  # variables by their expression
        self.current: dict[str, tuple[str, str]] = {}  # the variable that a register is in, and its kind
        self.products: dict[str, list[str]] = {}  # variables that are a product, and its factors
        self.end, self.result = ("fall", ""), "None"
        for instruction in block.code:
            try:
                self._instruction(instruction)
            except Exception as error:
                what = f"{self.kernel.name}, PTX line {instruction.line}: {instruction.text} ({error})"
                raise NotImplementedError(what) from error
        self.ends.append(self.end)
        self.drafts.append((self.lines, self.current, self.result))

    def _function(self, number: int) -> Callable[..., Any]:
        lines, current, result = self.drafts[number]
        kept = []
        for register, i in self.places.items():
            variable, kind = current.get(register, (f"r{i}", ""))
            if variable != f"r{i}":
                kept.append((f"R[{i}]", variable if kind[0] in "bu" else f"{variable}.view(u{kind[1]})"))
        if kept:
            lines += ["if m is None:", *(f"    {place} = {text}" for place, text in kept)]
            lines += ["else:", *(f"    {place} = where(m, {text}, {place})" for place, text in kept)]
        text = "\n    ".join([f"def block{number}(R, m, c):", *lines, f"return {result}"])

        def compiled(*given: Any) -> Any:  # by the first call: not every block runs
            exec(compile(text, f"<{self.kernel.name} block {number}>", "exec"), self.names)
            self.functions[number] = self.names[f"block{number}"]
            return self.functions[number](*given)

        return compiled

    def _instruction(self, ins: Instruction) -> None:
        # .shared and .shared::cta are two names of the same
        self.head, *self.mods = ins.op.replace("shared::cta", "shared").split(".")
        if self.head not in MODIFIERS:
            raise NotImplementedError("unknown instruction")
        self.types = [x for x in self.mods if x in NUMPY]
        if unknown := set(self.mods) - set(self.types) - set(MODIFIERS[self.head].split()):
            raise NotImplementedError(f"unknown modifier: {', '.join(sorted(unknown))}")
        self.line, self.ftz, self.guard = ins.line, "ftz" in self.mods, None
        if ins.guard is not None:
            self.guard = self.value(ins.guard, "b1")
        getattr(self, "_calculate" if self.head in FORMULAS else f"_{self.head}")(*ins.operands)

    def _bra(self, label: str = "") -> None:
        self.end, self.result = ("bra" if label else "ret", label), self.guard or "None"

    _ret = _exit = _bra

    def _bar(self, number: str) -> None:
        if "warp" in self.mods:
            self._whole_warps(number)
            self.lines.append("c.warp_barrier(m)")
        elif self.guard is not None or number != "0":
            raise NotImplementedError("a barrier other than 0, or of some of the threads")
        else:
            self.end = ("bar", "")

    # Arithmetic

    def _calculate(self, d: str, *operands: str) -> None:
        name = next((f"{self.head}.{x}" for x in self.mods if f"{self.head}.{x}" in FORMULAS), self.head)
        of = self.types[-1]
        if self.types == ["f32", "bf16"] and name in ("add", "sub") and not self.ftz:
            types, result = ["bf16", "f32"], "f32"  # the first operand is widened
        elif len(self.types) != 1 or of in BITS_ONLY or of not in ONLY.get(name, NUMPY) or (self.ftz and of == "f16"):
            raise NotImplementedError(f"in {of}")
        else:
            of = result = f"u{of[1:]}" if of[0] == "s" and name in WRAPPING else of
            types = [OPERANDS.get((name, i), of) for i in range(len(operands))]
        if "wide" in self.mods:
            result, types[2:] = WIDER[of], [WIDER[of]] * len(types[2:])
        given = [self.read(x, kind) for x, kind in zip(operands, types, strict=True)]
        formula = FORMULAS[name]
        wide = {f"w{i}": self._wide(x, of) for i, x in enumerate(given) if f"{{w{i}}}" in formula}
        text = formula.format(*given, **wide)
        for more in given[2:] if self.head in ("max", "min") else ():
            text = formula.format(text, more)
        plain = self.mods == ["f32"] and self.fuse  # with .rn or .ftz ptxas leaves it alone
        if plain and name in ("add", "sub"):
            text = self._contracted(*given) or text
        self.write(d, text, result)
        if plain and name == "mul" and self.guard is None:
            self.products[self.value(d, "f4")] = given

    def _contracted(self, a: str, b: str) -> str | None:
        """a ± b where one of them is a product, as one fma."""
        product, other = (a, b) if a in self.products else (b, a)
        if product not in self.products:
            return None
        self.fused += 1
        x, y, z = (self._wide(x, "f32") for x in (*self.products[product], other))
        if self.head == "sub":
            x, z = (x, f"-{z}") if product == a else (f"-{x}", z)
        return FORMULAS["fma"].format(w0=x, w1=y, w2=z)

    # Comparisons, moves and conversions

    def _setp(self, d: str, a: str, b: str, *other: str) -> None:
        how, of = self.mods[0], self.types[-1]
        if how == "ne" and of[0] in "bus" and of not in BITS_ONLY:
            how = "neu"  # integers are never NaN
        if of.endswith("x2"):  # two comparisons, of the lower halves first
            halves = [[self.let(f"split({self.value(x, 'u4')}, u2)[..., {i}]") for x in (a, b)] for i in (0, 1)]
            form = FROM_BF16 if of == "bf16x2" else "{0}.view(f2)"
            pairs = [[form.format(x) for x in pair] for pair in halves]
        else:
            pairs = [[self.read(x, of) for x in (a, b)]]
        for register, pair in zip(d.split("|"), pairs, strict=True):
            text = COMPARISONS[how].format(*pair)
            if other:
                symbol = {"and": "&", "or": "|", "xor": "^"}[self.mods[1]]
                text = f"({text}) {symbol} {self.value(other[0], 'b1')}"
            self.assign(register, text, "b1")

    def _mov(self, d: str, a: str) -> None:
        kind = NUMPY[self.types[-1]]
        parts = _listed(d if "{" in d else a)
        half = f"u{int(kind[1]) // len(parts)}"
        if "{" in d:
            for i, register in enumerate(parts):
                self.assign(register, f"split({self.value(a, kind)}, {half})[..., {i}]", half)
        elif "{" in a:
            self.assign(d, f"join({kind}, {', '.join(self.value(x, half) for x in parts)})", kind)
        else:
            kind = self.natural(a, kind)
            self.assign(d, self.value(a, kind), kind)

    _cvta = _mov

    def _cvt(self, d: str, *given: str) -> None:
        to, of = self.types
        single, kind = to.removesuffix("x2"), NUMPY[to]
        if ((single == "bf16" or to != single) and of != "f32") or (of == "bf16" and to != "f32"):
            raise NotImplementedError(f"{of} as {to}")
        texts = [self.read(x, of) for x in given]
        if rounding := next((x for x in self.mods if x in ROUNDINGS), None):
            texts = [f"np.{ROUNDINGS[rounding]}({x})" for x in texts]
        if single == "bf16":
            texts = [f"to_bf16({x})" for x in texts]
        elif of[0] != "f" or to[0] == "f":  # integers are cut, or extended as the source's kind says
            texts = [x if of == "bf16" else f"({x}).astype({NUMPY[single]})" for x in texts]
        elif rounding and kind[1] != "8":  # a float as an integer: what it cannot be is cut, NaN is 0
            limits = np.iinfo(kind)
            texts = [
                f"np.clip(np.nan_to_num({x}.astype(f8)), {limits.min}, {limits.max}).astype({kind})" for x in texts
            ]
        else:
            raise NotImplementedError(f"{of} as {to}")
        if to != single:
            self.assign(d, f"join({kind}, {', '.join(reversed(texts))})", kind)
        elif to == "bf16":
            self.assign(d, texts[0], kind)
        else:
            self.write(d, texts[0], to)

    # Warps

    def _whole_warps(self, mask: str = "-1") -> None:
        """Of an instruction for all threads of a warp. That they are all here, the machine sees to."""
        if self.guard is not None:
            raise NotImplementedError("a guarded instruction of the whole warp")
        if mask.startswith("%"):
            self.lines.append(f"c.all_meant({self.value(mask, 'i4')}, {self.line})")
        elif int(mask, 0) not in (-1, 0xFFFFFFFF):
            raise NotImplementedError("an instruction for a part of a warp")

    def _shfl(self, d: str, a: str, *given: str) -> None:
        *numbers, mask = given
        self._whole_warps(mask)
        how = f"NaN {self.mods[1]}" if "NaN" in self.mods else self.mods[1]
        kind = NUMPY[self.types[-1]]
        if self.head == "shfl":
            kind = self.natural(a, kind)
        x = self.value(a, "b1" if self.head == "vote" else kind)
        arguments = ", ".join((f"'{how}'", x, *(self.value(number, "i4") for number in numbers)))
        self.assign(d, f"c.{self.head}({arguments})", kind)

    _redux = _vote = _shfl

    # Memory

    def _access(self, place: str, kind: str, count: int = 1) -> str:
        """An access of some numbers: what it is, its addresses and its threads."""
        space = next((x for x in ("global", "shared") if x in self.mods), None)
        found = re.fullmatch(r"\[([%\w]+)\+?(-?\d+)?\]", place.replace(" ", ""))
        if space is None or found is None:
            raise NotImplementedError("memory that is neither global nor shared")
        base, offset = found.groups("0")
        wide = space == "global" or (base.startswith("%") and self.own(base) == "u8")
        mode = next((x for x in self.mods if x in ORDERINGS), "weak")
        scope = next((x for x in self.mods if x in SCOPES), "gpu")
        number, size = len(self.accesses), int(kind[1])
        self.accesses.append(Access(space, int(offset), size, count, size * count, number, self.line, mode, scope))
        self.names[f"A{number}"] = self.accesses[number]
        self.unit[space] = min(self.unit[space], size)
        mask = "m" if self.guard is None else f"({self.guard} if m is None else {self.guard} & m)"
        return f"A{number}, {self.value(base, 'u8' if wide else 'u4')}, {mask}"

    def _ld(self, d: str, place: str) -> None:
        kind, registers = NUMPY[self.types[-1]], _listed(d)
        if "param" in self.mods:
            self.assign(d, f"c.params['{place.strip('[] ')}'].view({kind})", kind)
            return
        if set(ORDERINGS) & set(self.mods):
            self.end = ("pause", "")
        self._spread(registers, kind, f"c.load({self._access(place, kind, len(registers))})")

    def _ldmatrix(self, d: str, place: str) -> None:
        self._whole_warps()
        call = f"c.load_matrices({self._access(place, 'u4', 4)}, {'trans' in self.mods})"
        self._spread(_listed(d), "u4", call)

    def _spread(self, registers: list[str], kind: str, call: str) -> None:
        """A row of what was loaded in each."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {call}.view({kind})")
        for i, register in enumerate(registers):
            self.assign(register, f"{name}[{i}]", kind)

    def _st(self, place: str, operand: str) -> None:
        kind, numbers = f"u{NUMPY[self.types[-1]][1]}", _listed(operand)
        access = self._access(place, kind, len(numbers))
        self.lines.append(f"c.store({access}, ({', '.join(self.value(x, kind) for x in numbers)},))")

    def _stmatrix(self, place: str, operand: str) -> None:
        self._whole_warps()
        given = f"{self._access(place, 'u4', 4)}, ({', '.join(self.value(x, 'u4') for x in _listed(operand))},)"
        self.lines.append(f"c.store_matrices({given}, {'trans' in self.mods})")

    def _atom(self, d: str, place: str, *given: str) -> None:
        if self.types[-1] in (*BITS_ONLY, "f16"):
            raise NotImplementedError("atomics in half precision")
        how = next(x for x in self.mods if x in ("add", "exch", "max", "min", "or", "and", "cas"))
        kind = NUMPY[self.types[-1]]
        values = ", ".join(self.value(x, kind) for x in given)
        self.assign(d, f"c.atomic({self._access(place, kind)}, {kind}, '{how}', ({values},))", kind)
        self.end = ("pause", "")

    def _red(self, *given: str) -> None:
        self._atom("_", *given)


def _listed(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]
