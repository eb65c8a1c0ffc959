"""The one place that knows whether Triton is here, and how one formula serves both backends.

A `formula` is written once, with plain operators, other formulas and `tl.exp`, `tl.log`, `tl.abs`, `tl.where`.
Kernels call it as a Triton function; `formula.torch` is the same code object with every name replaced by its torch
counterpart; `tl.sum` and `tl.max` become those of each row. torch.compile, which makes loops of it, always traces that.
Run eagerly, a formula whose code would make many temporaries may have a version of its own for tensors, given as
`torch=`: the same number, from fewer and cheaper operations.
"""

import contextlib
import importlib
import math
import types
from collections.abc import Callable
from typing import Any

import torch


class _NoTriton:
    """Lets kernels be defined, never launched, where Triton is absent."""

    constexpr = None


triton: Any = None
tl: Any = _NoTriton()
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

HAS_TRITON = triton is not None


def jit(fn: Callable[..., Any]) -> Any:
    """triton.jit; without Triton a kernel stays a plain function that nothing calls."""
    fn.__globals__.setdefault("tl", tl)  # the interpreter wants to see it, also in a file that needs no tl itself
    return fn if triton is None else triton.jit(fn)


def constant(value: Any) -> Any:
    """A number that kernels may name; without Triton it stays what it is."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when fusedkd was imported)."""
    return HAS_TRITON and not isinstance(_probe, triton.JITFunction)


class _Rowwise:
    """torch as a formula sees it: a reduction is over the columns of each row and keeps the axis.

    Functions of Python's numbers are 0-d tensors or Python's numbers: such arithmetic costs torch.compile nothing.
    """

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch, name)

        def of_tensors(*args: Any) -> Any:
            if any(isinstance(x, torch.Tensor) for x in args):
                return function(*args)
            return function(*(torch.tensor(x, dtype=torch.float64) for x in args)).item()

        return of_tensors

    @staticmethod
    def abs(x: Any) -> Any:
        """The absolute value."""
        return abs(x)

    @staticmethod
    def maximum(x: Any, y: Any) -> Any:
        """The larger one; NaN where either is."""
        if isinstance(y, torch.Tensor):
            return torch.maximum(x, y) if isinstance(x, torch.Tensor) else y.clamp(min=x)
        return x.clamp(min=y) if isinstance(x, torch.Tensor) else max(x, y)

    @staticmethod
    def exp(x: Any) -> Any:
        """e^x."""
        if isinstance(x, torch.Tensor):
            return torch.exp(x)
        return math.exp(x) if x < 709.0 else x * math.inf

    @staticmethod
    def exp2(x: Any) -> Any:
        """2^x."""
        if isinstance(x, torch.Tensor):
            return torch.exp2(x)
        return 2.0**x if x < 1024.0 else x * math.inf

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        """One of two."""
        if isinstance(condition, torch.Tensor):
            return torch.where(condition, x, y)
        return x if condition else y

    @staticmethod
    def sum(x: torch.Tensor) -> torch.Tensor:
        """Σ over the last axis. Compiled loops add one by one, and a long row in float32 would lose a digit or two."""
        if torch.compiler.is_compiling():
            return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
        return x.sum(-1, keepdim=True)

    @staticmethod
    def max(x: torch.Tensor) -> torch.Tensor:
        """Maximum over the last axis."""
        return x.amax(-1, keepdim=True)

    @staticmethod
    def static_range(*bounds: int) -> range:
        """A loop that kernels unroll."""
        return range(*bounds)


rowwise: Any = _Rowwise()


def _twin(fn: Callable[..., Any], version: str) -> Callable[..., Any]:
    """The code of `fn` with `tl` replaced by `rowwise`, and every formula that it names by a version of it."""

    def plain(value: Any) -> Any:
        if HAS_TRITON and isinstance(value, tl.constexpr):
            return value.value
        return rowwise if value is tl else getattr(value, version, value)

    names = {name: plain(value) for name, value in fn.__globals__.items() if name in fn.__code__.co_names}
    return types.FunctionType(fn.__code__, {"__builtins__": __builtins__, **names}, fn.__name__, fn.__defaults__)


def _unless_traced(eager: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """`eager` for tensors; the kernels' own code for Python's numbers, and while torch.compile traces it."""

    def version(*args: Any) -> Any:
        at_hand = not torch.compiler.is_compiling() and any(isinstance(x, torch.Tensor) for x in args)
        return eager(*args) if at_hand else twin(*args)

    return version


def formula(fn: Callable[..., Any] | None = None, *, torch: Any = None, summand: bool = False) -> Any:
    """Decorator: a Triton function whose attribute `torch` computes the same in torch.

    torch: a version of its own for tensors at hand, or a formula whose versions are taken. `traced` is the kernels' own
        code in torch, with or without one.
    summand: only a divergence's f is made of it. `slope` is as `torch`, but does not calculate f where nobody asks for
        it, as compilers leave it out: what f alone is made of is 0.
    """

    def define(fn: Callable[..., Any]) -> Any:
        compiled = jit(fn)
        compiled.traced = _twin(fn, "torch")
        compiled.torch = compiled.traced if torch is None else _unless_traced(torch, compiled.traced)
        compiled.slope = compiled.torch if torch is not None else _twin(fn, "slope")
        if isinstance(getattr(torch, "traced", None), types.FunctionType):
            compiled.torch, compiled.slope = (getattr(torch, version) for version in ("torch", "slope"))
        if summand:
            compiled.slope = lambda *_: 0.0
        return compiled

    return define if fn is None else define(fn)


@jit
def _probe():
    pass
