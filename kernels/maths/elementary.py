"""Elementary functions that keep their digits near zero, for both backends.

Triton has no expm1, log1p or tanh of its own and libdevice does not run in the interpreter, so they are built here
from exp and log. The `_product` forms take the weight w together with v = w·e^x, which the caller holds anyway: far
from zero the answer is then a difference of two bounded numbers, and nothing overflows.
"""

import math

import torch

from ..language import constant, formula, tl

LOG2E = constant(math.log2(math.e))
_PLAIN = 0.02  # relative size from which a plain difference of weights keeps its digits
_EDGE = 0.5  # |x| below which e^x − 1 − x is a series
_TERMS = {torch.float32: 7, torch.float64: 15}  # of the series at that edge


def loses_nothing(size: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether plain differences of weights keep their digits in every row of a tile (n, V) at hand.

    The one place where eager torch looks at numbers to choose its arithmetic: the form that keeps its digits everywhere
    takes ten times as long, and rows that are apart do not need it. Never on a GPU, which would have to be waited for.

    size, weight: (n,) norms or sums of the difference and of what it is taken of.
    """
    return size.is_cpu and bool((size > _PLAIN * weight).all())


def is_tile(x: torch.Tensor) -> bool:
    """Whether x is columns of rows, so that the rounding of one of them does not matter, and not a number per row."""
    return x.dim() == 2 and x.shape[1] > 1


def outside(x: torch.Tensor, edge: float) -> torch.Tensor:
    """1 where |x| > edge, else 0; NaN where x is. torch.where and comparisons take as long as thirty products."""
    return x.abs().sub_(edge).mul_(1e30).clamp_(0.0, 1.0)


def clear_difference(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """v − w of a tile, unless it loses digits in some row."""
    if not is_tile(v):
        return None
    plain, norm = v - w, torch.linalg.vector_norm
    return plain if loses_nothing(norm(plain, dim=-1), norm(w, dim=-1)) else None


def _careful_expm1_product(w, v, x):
    # w·(e^x − 1) = v·(1 − e^−x): of these the one that cannot overflow.
    return (-x.abs()).expm1_().neg_().mul_(torch.maximum(w, v)).copysign_(x)


def _expm1_product(w, v, x):
    plain = clear_difference(w, v)
    return _careful_expm1_product(w, v, x) if plain is None else plain


def _fall_product(w, v, x):
    plain = clear_difference(w, v)
    return _careful_expm1_product(w, v, -x) if plain is None else plain


def _rem2_product(w, v, x):
    plain = (v - w).addcmul_(w, x, value=-1) if is_tile(x) else v - w - w * x
    if is_tile(x) and loses_nothing(plain.sum(-1), w.sum(-1)):
        return plain
    far = outside(x, _EDGE)
    near = (1 - far).mul_(x)
    series = torch.zeros_like(x)
    for n in range(_TERMS[x.dtype] + 1, 1, -1):
        series.mul_(near).add_(1 / math.factorial(n))
    return plain.mul_(far).addcmul_(series.mul_(near).mul_(near), w)


def _log1p_exp2(x):
    return x.abs().neg_().exp2_().log1p_()


def _softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


@formula(torch=torch.exp)
def exp(x):
    """e^x for the elements of a row: flushing what is below 1e-38 takes two instructions, keeping it five."""
    return tl.exp2(x * LOG2E)


@formula
def negative(x):
    """−x, a sign of what uses it: Triton makes −x itself a subtraction from 0."""
    return x * -1.0


@formula
def horner(coefficients, x):
    """Σ c_n x^n."""
    total = coefficients[len(coefficients) - 1]
    for i in tl.static_range(len(coefficients) - 1):
        total = coefficients[len(coefficients) - 2 - i] + x * total
    return total


@formula
def expm1_ratio(x):
    """(e^x − 1)/x for |x| < 1/2: a polynomial, minimax of the relative error, 3e-9."""
    series = 0.041665319353342056 + x * (0.008333634585142136 + x * (0.0013997324276715517 + x * 0.0001984118134714663))
    return 1.0 + x * (0.5000000596046448 + x * (0.16666662693023682 + x * series))


@formula
def half_expm1_ratio(x):
    """(e^x − 1)/x for |x| < 0.024 to 1e-4: for what is rounded to half precision."""
    return 1.0 + x * 0.5


@formula(torch=_expm1_product)
def expm1_product(w, v, x):
    """w·(e^x − 1), given v = w·e^x. Takes tensors; `expm1` is the form without a weight."""
    return tl.where(tl.abs(x) < 0.5, w * x * expm1_ratio(x), v - w)


@formula(torch=expm1_product)
def close_expm1_product(w, v, x):
    """The same to 4e-7, or to 1e-6 of w where |x| > 1/8: for sums of what may as well be above 0 as below."""
    ratio = 1.0 + x * (0.49999985098838806 + x * (0.16677457094192505 + x * 0.041697368025779724))
    return tl.where(tl.abs(x) < 0.125, w * x * ratio, v - w)


@formula
def half_expm1_product(w, v, x):
    """The same to 1e-4, for what is rounded to half precision."""
    return tl.where(tl.abs(x) < 0.024, w * x * half_expm1_ratio(x), v - w)


@formula
def rem2_ratio(x):
    """(e^x − 1 − x)/x² for |x| < 1/2: a polynomial, minimax of the relative error, 2e-8."""
    series = 0.04166579619050026 + x * (0.008333452045917511 + x * (0.0013981997035443783 + x * 0.00019875619909726083))
    return 0.5 + x * (0.1666666567325592 + x * series)


@formula(torch=_rem2_product, summand=True)
def rem2_product(w, v, x):
    """w·(e^x − 1 − x) ≥ 0, given v = w·e^x."""
    return tl.where(tl.abs(x) < 0.5, w * (x * x) * rem2_ratio(x), v - w - w * x)


@formula(torch=_fall_product)
def fall_product(w, v, x):
    """w·(e^−x − 1), given v = w·e^−x."""
    return expm1_product(w, v, negative(x))


@formula(summand=True)
def fall_rem2_product(w, v, x):
    """w·(e^−x − 1 + x) ≥ 0, given v = w·e^−x."""
    return rem2_product(w, v, negative(x))


@formula(torch=torch.expm1)
def expm1(x):
    """e^x − 1."""
    return expm1_product(1.0, tl.exp(x), x)


@formula(torch=torch.log1p)
def log1p(x):
    """log(1 + x): the rounding of 1 + x is divided out again (Kahan)."""
    u = 1.0 + x
    lost = u == 1.0
    return tl.where(lost, x, tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0)))


@formula(torch=_log1p_exp2)
def log1p_exp2(x):
    """log(1 + 2^−|x|): a polynomial in 2^−|x| ∈ [0, 1], minimax of the relative error, 3e-8."""
    e = tl.exp2(negative(tl.abs(x)))
    series = 0.0782254934310913 + e * (-0.029504956677556038 + e * 0.005232624243944883)
    series = -0.2484297752380371 + e * (0.1910598874092102 + e * (-0.1366320699453354 + e * series))
    return e * (0.9999999403953552 + e * (-0.4999949336051941 + e * (0.3331909477710724 + e * series)))


@formula(torch=_log1p_exp2)
def half_log1p_exp2(x):
    """log(1 + 2^−|x|) to 9e-6, for what is rounded to half precision."""
    e = tl.exp2(negative(tl.abs(x)))
    series = 0.325206458568573 + e * (-0.21004803478717804 + e * (0.10122154653072357 - e * 0.023868856951594353))
    return e * (0.9999915957450867 + e * (-0.4993613362312317 + e * series))


@formula(torch=_softplus)
def softplus(x):
    """log(1 + e^x)."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@formula(torch=torch.tanh)
def tanh(x):
    """Hyperbolic tangent, relatively accurate near 0 (a soft cap must not blur small logits)."""
    e = expm1(tl.where(x < 0, 2.0 * x, -2.0 * x))
    return tl.where(x < 0, e, -e) / (2.0 + e)
