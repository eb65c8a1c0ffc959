"""Elementary functions that keep their digits near zero, for both backends.

Triton has no expm1, log1p or tanh of its own and libdevice does not run in the interpreter, so they are built here
from exp and log. The `_product` forms take the weight w together with v = w·e^x, which the caller holds anyway: far
from zero the answer is then a difference of two bounded numbers, and nothing overflows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..language import NUMBERS, formula, tl

_SERIES = 0.125  # |x| up to which the torch forms use their (shorter) series
_FAR = 80.0  # e^x overflows float32 beyond 88
LOG2E = math.log2(math.e)
_PLAIN = 0.02  # relative size from which a plain difference of weights keeps its digits


class Summand:
    """Columns of rows that a torch formula makes only when they are looked at: their sums may not need them.

    Anything that is done to it is done to the tensor (n, V), but for `row_sums`, which is (n,). `make` makes the
    columns; `plain` gives their sums from other sums, and what these must exceed in order not to have cancelled.
    """

    def __init__(
        self, make: Callable[[], torch.Tensor], plain: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._make, self._plain = make, plain

    def row_sums(self) -> torch.Tensor:
        """Σ over the columns."""
        sums, least = self._plain()
        return sums if bool((sums > least).all()) else self._make().sum(-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    @classmethod
    def __torch_function__(cls, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any torch function: on what is made."""
        return fn(*map(_made, args), **(kwargs or {}))


def _made(x: Any) -> Any:
    return x._make() if isinstance(x, Summand) else x


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(self._make(), name)(*map(_made, others))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "lt", "gt", "le", "ge"):
    setattr(Summand, f"__{_name}__", _operator(f"__{_name}__"))


def row_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Σ x·y of each row, summed in pairs: what BLAS libraries add one by one loses two digits of a sorted row."""
    return (x * y).sum(-1)


def _clearly(size: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether in every row the norm of a difference is no small part of the norm of w."""
    norm = torch.linalg.vector_norm
    return bool((norm(size, dim=-1) > _PLAIN * norm(w, dim=-1)).all())


def _eager_expm1_product(w, v, x):
    # v − w is off by rounding of w: fine for a row's gradient unless all of it is that small.
    plain = v - w
    if x.dim() == 2 and _clearly(plain, w):
        return plain
    precise = torch.expm1(x.clamp(max=_FAR)).mul_(w)
    return torch.where(x > _FAR, plain, precise) if x.dim() < 2 or (x > _FAR).any() else precise


def _eager_rem2_product(w, v, x):
    if x.dim() == 2 and w.shape == v.shape == x.shape:
        return Summand(lambda: _precise_rem2_product(w, v, x), lambda: _plain_rem2_sums(w, v, x))
    return _precise_rem2_product(w, v, x)


def _plain_rem2_sums(w, v, x):
    weight = w.sum(-1)
    return v.sum(-1) - weight - row_dots(w, x), _PLAIN * weight


def _precise_rem2_product(w, v, x):
    plain = (v - w).addcmul_(w, x, value=-1) if x.dim() == 2 and w.shape == x.shape else v - w - w * x
    if x.dim() == 2 and (plain.sum(-1) > _PLAIN * w.sum(-1)).all():
        return plain
    # S(c) + [(e^x − e^c) − (x − c)] with c = clamp(x): the bracket is exactly 0 in the series' range, so nothing is
    # selected (torch.where costs more on a CPU than all the arithmetic here).
    near = x.clamp(-_SERIES, _SERIES)
    series = near * (1 / 120) if x.dtype == torch.float32 else near * (1 / 120) * (1 + near / 6 * (1 + near / 7))
    series.add_(1 / 24).mul_(near).add_(1 / 6).mul_(near).add_(0.5).mul_(near).mul_(near)
    bracket = exp.torch(x.clamp(max=_FAR)).sub_(exp.torch(near)).sub_(x).add_(near)
    precise = series.add_(bracket).mul_(w)
    return torch.where(x > _FAR, plain, precise) if x.dim() < 2 or (x > _FAR).any() else precise


def _torch_exp(x, out=None):
    # exp2 is a loop of torch's own and takes less time than exp, which may be that of a library; a compiler has both.
    if torch.compiler.is_compiling() or not x.is_cpu:
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2E, out=out).exp2_()


def _scalar_expm1_product(w, v, x):
    return w * math.expm1(x) if x < _FAR else v - w


def _scalar_rem2_product(w, v, x):
    if abs(x) >= 0.5:
        return v - w - w * x
    series = 0.0
    for n in range(16, 1, -1):
        series = (1.0 + series) * x / n
    return w * series * x


def _torch_softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


@formula(torch=_torch_exp, scalar=NUMBERS.exp)
def exp(x):
    """e^x for the elements of a row: flushing what is below 1e-38 takes two instructions, keeping it five."""
    return tl.exp2(x * 1.4426950408889634)


@formula
def expm1_ratio(x):
    """(e^x − 1)/x for |x| < 1/2, by its series."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    return 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))


@formula(eager=_eager_expm1_product, scalar=_scalar_expm1_product)
def expm1_product(w, v, x):
    """w·(e^x − 1), given v = w·e^x. Takes tensors; `expm1` is the form without a weight."""
    return tl.where(tl.abs(x) < 0.5, w * x * expm1_ratio(x), v - w)


@formula(eager=_eager_rem2_product, scalar=_scalar_rem2_product)
def rem2_product(w, v, x):
    """w·(e^x − 1 − x) ≥ 0, given v = w·e^x."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    series = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))
    return tl.where(tl.abs(x) < 0.5, w * (x * x) * series, v - w - w * x)


@formula(torch=torch.expm1)
def expm1(x):
    """e^x − 1."""
    return expm1_product(1.0, tl.exp(x), x)


@formula(torch=torch.log1p, scalar=NUMBERS.log1p)
def log1p(x):
    """log(1 + x): the rounding of 1 + x is divided out again (Kahan)."""
    u = 1.0 + x
    lost = u == 1.0
    return tl.where(lost, x, tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0)))


@formula(torch=_torch_softplus)
def softplus(x):
    """log(1 + e^x)."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@formula(torch=torch.tanh, scalar=math.tanh)
def tanh(x):
    """Hyperbolic tangent, relatively accurate near 0 (a soft cap must not blur small logits)."""
    e = expm1(tl.where(x < 0, 2.0 * x, -2.0 * x))
    return tl.where(x < 0, e, -e) / (2.0 + e)
