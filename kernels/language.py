"""The one place that knows whether Triton is here, and how one formula serves both backends.

A `formula` is written once, with plain operators, other formulas and `tl.exp`, `tl.log`, `tl.abs`, `tl.where`.
Kernels call it as a Triton function; `formula.torch` is the same code object with every name replaced by its torch
counterpart, which is what the CPU path runs; `tl.sum` and `tl.max` become those of each row. `formula.scalar` is the
same on Python's numbers, for a row or two, where calling torch would take longer than calculating.
Where the backends need different arithmetic for the same number, that version is given explicitly. One for torch that
looks at values is called `eager`: torch.compile, which has none to show, traces the kernels' code instead. It must not
look at numbers per row (fewer than two axes), which would synchronise with a GPU.
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


class _Numbers:
    """Python's numbers as a formula sees them: what has no value is infinite or NaN, as it is in a tensor."""

    abs = staticmethod(abs)
    floor = staticmethod(math.floor)
    maximum = staticmethod(max)
    minimum = staticmethod(min)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        """One of two."""
        return x if condition else y

    @staticmethod
    def exp(x: float) -> float:
        """e^x."""
        return math.exp(x) if x < 709.0 else x * math.inf

    @staticmethod
    def exp2(x: float) -> float:
        """2^x."""
        return 2.0**x if x < 1023.0 else x * math.inf

    @staticmethod
    def log(x: float) -> float:
        """The natural logarithm."""
        return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan

    @staticmethod
    def log1p(x: float) -> float:
        """log(1 + x)."""
        return math.log1p(x) if x > -1 else -math.inf if x == -1 else math.nan

    @staticmethod
    def sqrt(x: float) -> float:
        """The square root."""
        return math.sqrt(x) if x >= 0 else math.nan


class _Rowwise:
    """torch as a formula sees it: a reduction is over the columns of each row and keeps the axis.

    What comes in as Python's numbers is calculated in Python's: such arithmetic costs torch.compile nothing.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def abs(x: Any) -> Any:
        """The absolute value."""
        return torch.abs(x) if isinstance(x, torch.Tensor) else abs(x)

    @staticmethod
    def exp(x: Any) -> Any:
        """e^x."""
        return torch.exp(x) if isinstance(x, torch.Tensor) else _Numbers.exp(x)

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        """One of two."""
        if isinstance(condition, torch.Tensor):
            return torch.where(condition, x, y)
        return x if condition else y

    @staticmethod
    def sum(x: torch.Tensor) -> torch.Tensor:
        """Σ over the last axis."""
        return x.sum(-1, keepdim=True)

    @staticmethod
    def max(x: torch.Tensor) -> torch.Tensor:
        """Maximum over the last axis."""
        return x.amax(-1, keepdim=True)


def _twin(fn: Callable[..., Any], namespace: Any, version: str) -> Callable[..., Any]:
    """The code of `fn` with `tl` replaced by `namespace`, and every formula that it names by its `version`."""
    names = {
        name: namespace if value is tl else getattr(value, version, value)
        for name, value in fn.__globals__.items()
        if name in fn.__code__.co_names
    }
    return types.FunctionType(fn.__code__, {"__builtins__": __builtins__, **names}, fn.__name__, fn.__defaults__)


def torch_twin(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The code of `fn` with `tl` and every formula it names replaced by torch and the formula's torch version."""
    return _twin(fn, _ROWWISE, "torch")


def _unless_traced(eager: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """The given version, but the kernels' own code while torch.compile traces it and there is nothing to see."""

    def version(*args: Any) -> Any:
        return twin(*args) if torch.compiler.is_compiling() else eager(*args)

    return version


def formula(
    fn: Callable[..., Any] | None = None,
    *,
    torch: Callable[..., Any] | None = None,
    eager: Callable[..., Any] | None = None,
    scalar: Callable[..., Any] | None = None,
) -> Any:
    """Decorator: a Triton function whose attributes `torch` and `scalar` compute the same in torch and in Python.

    torch, scalar: versions of their own; `eager`: one for torch that decides by what it sees in the tensors.
    """

    def define(fn: Callable[..., Any]) -> Any:
        compiled = jit(fn)
        compiled.torch = torch_twin(fn) if torch is None else torch
        if eager is not None:
            compiled.torch = _unless_traced(eager, torch_twin(fn))
        compiled.scalar = scalar if scalar is not None else _twin(fn, NUMBERS, "scalar")
        return compiled

    return define if fn is None else define(fn)


_ROWWISE = _Rowwise()
NUMBERS = _Numbers()


@jit
def _probe():
    pass
