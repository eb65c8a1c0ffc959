"""The mathematical object: what one file in `divergences/` says about one divergence."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .moments import moments_advance, moments_init, moments_ratio, ratio_advance
from .reductions import reduction_over_threads


class OnlineForm(NamedTuple):
    """How a divergence gathers its sums in one sweep (see moments.py). `sums=None`: a second sweep evaluates `term`.

    tile: the class of tiles.py that its register need puts it in.
    """

    init: Any = moments_init
    advance: Any = moments_advance
    ratio: Any = moments_ratio
    sums: Any = None
    tile: str = "light"
    term: Any = None  # the summand, where parameters that lead here make it cheaper than the Definition's
    half_term: Any = None  # the same for a gradient that is rounded to half precision


TWO_SWEEPS = OnlineForm(advance=ratio_advance, tile="two")


class RowParameters(NamedTuple):
    """How the last `extras` parameters of a definition are found on each row, on both backends.

    kernel(student, teacher, ctx, state, log_norms, label, theta, BLOCK, THREADS) -> (extras, sums): from the online
        state and log_norms, or by further sweeps (device/column_sweep.py); sums is (F, Φ) without the label's column if
        these sweeps found them, else ().
    torch(whole, theta) -> extras: the same (backends/torch_rows.py, `Whole`).
    reads: how often a tile in the middle of a row goes through each loop of `kernel`, in their order: a sweep has one
        for inner tiles, and one for masked ones that it misses. Without further sweeps rows need not be whole, and
        `kernel` is given None for all but the state, log_norms and theta.
    """

    kernel: Any
    torch: Callable[..., tuple[Any, ...]]
    extras: int
    reads: tuple[int, ...] = ()


POSITIVE = math.ulp(0.0)  # the least float above 0


@dataclass(frozen=True)
class Parameter:
    """One parameter of a divergence: its name, its default, what it means, and which values are allowed.

    The default gives the type: a float, True or False, or a word. A float lies in [low, high]; low=POSITIVE says > 0.
    A word is one of `words`; the one called `base` names another divergence. A tensor of values is never checked.
    one_sweep_from: the least float at which the one-sweep form of a Definition keeps its digits.
    """

    name: str
    default: Any
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()
    one_sweep_from: float = -math.inf

    @property
    def domain(self) -> str:
        """The allowed values, as an error message and the documentation say them."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        if isinstance(self.default, str):
            return "the name of a divergence"
        if isinstance(self.default, bool):
            return "True or False"
        if self.high < math.inf:
            return f"in (0, {self.high:g}]" if self.low == POSITIVE else f"in [{self.low:g}, {self.high:g}]"
        if self.low == -math.inf:
            return "any finite number"
        return "> 0" if self.low == POSITIVE else f">= {self.low:g}"


TARGET = Parameter("target", 1.0, "weight of the term of the target token", low=0.0)
NONTARGET = Parameter("nontarget", 1.0, "weight of the term of all other tokens", low=0.0)


@dataclass(frozen=True)
class Definition:
    """One divergence D(p, q) = Σ f, or a function of that sum, p teacher, q student, in nats.

    Registered under its name it also takes `target` and `nontarget`, the weights of the two terms of its decomposition.

    term(q, p, logq, logp, delta, theta) -> (f, phi): the non-negative summand f and phi = ∂f/∂log q at fixed p, with
        delta = log p − log q known far better than the two logs apart. A `formula`. An absent column has q = p = 0 and
        logs of about −1e30, a column with p > 0 = q has delta of about 1e30; nothing is infinite.
        Detached weights: where the definition takes a part of its summand for a constant, a weight of each token (todi)
        or a mixture (srkl, detach_mixture), phi is the derivative at that constant, so not that of f.
    reference(logp, logq, *parameters) -> (...): the published definition on (..., V) log-probabilities, written in
        another way than `term`; tests differentiate it in float64, so it detaches what the definition detaches.
    parameters: theta, in its order.
    reads_logs: whether `term` uses logq and logp, or `online.advance` z and u; torch makes them only then (else they
        are None).
    row_parameters: those that each row finds for itself (amid.py, akl.py), and how; they follow the others in theta.
    half_term: `term` with phi to 1e-4 or better, for gradients that are rounded to half precision; its f is not used.
    outer(total, mass, theta) -> (D, slope): D = g(Σ f) and g′(Σ f), from Σ f and Σ phi over all tokens, where D is an
        increasing function g of its sum with g(0) = 0 (renyi.py); a `formula`. None: D is the sum.
    separable: whether D is a sum over tokens with nothing but p and q in it, or a function of one, so that it has a
        decoupled form.
    splits: whether L = L_T + L_N means anything, at least at the parameters that the row found.
    online: the one-sweep form where there is one, accurate where every parameter is at least its `one_sweep_from`. Its
        `advance` sums with `thread_sum`; one that reduces with `tl.sum`, itself or in what it calls, raises ValueError.
    """

    name: str
    term: Any
    reference: Callable[..., Any]
    parameters: tuple[Parameter, ...] = ()
    online: OnlineForm = TWO_SWEEPS
    reads_logs: bool = True
    half_term: Any = None
    outer: Any = None
    row_parameters: "RowParameters | None" = None
    separable: bool = True
    splits: bool = True

    def __post_init__(self) -> None:
        if reduction := reduction_over_threads(self.online.advance):
            raise ValueError(
                f"the one-sweep form of {self.name!r} reduces a tile by {reduction}; a row's sums are kept per thread, "
                "so `advance` must use fusedkd.kernels.maths.reductions.thread_sum and thread_max instead"
            )

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        """What the registered name takes."""
        return (*self.parameters, TARGET, NONTARGET)

    @property
    def extras(self) -> int:
        """How many numbers each row adds to theta."""
        return 0 if self.row_parameters is None else self.row_parameters.extras

    @property
    def whole_rows(self) -> bool:
        """Whether a row finds parameters by sweeps of its own, for which all of its columns have to be there."""
        return self.row_parameters is not None and bool(self.row_parameters.reads)

    def variant(self, online: OnlineForm, decoupled: bool = False) -> str:
        """What kernels compiled for a sweep and a structure are called."""
        return f"{'decoupled_' if decoupled else ''}{self.name}{'_two' if online.sums is None else ''}"

    def summand(self, online: OnlineForm) -> Any:
        """`term` as it is where a sweep is used."""
        return online.term or self.term

    def gradient_summand(self, online: OnlineForm, half: bool) -> Any:
        """The same for a gradient, maybe one in half precision."""
        short = online.half_term if online.term else self.half_term
        return short if half and short else self.summand(online)

    @property
    def sweeps(self) -> tuple[OnlineForm, ...]:
        """Every sweep that some parameters lead to."""
        always = all(parameter.one_sweep_from == -math.inf for parameter in self.parameters)
        return (self.online,) if always else (self.online, TWO_SWEEPS)

    def sweep(self, theta: tuple[Any, ...]) -> OnlineForm:
        """The statistics sweep for these parameters; values on the device cannot choose, so they take two sweeps."""
        for parameter, value in zip(self.parameters, theta, strict=True):
            known = isinstance(value, (int, float))
            if parameter.one_sweep_from > -math.inf and not (known and value >= parameter.one_sweep_from):
                return TWO_SWEEPS
        return self.online


class Form(NamedTuple):
    """What the kernels run: a definition with its parameters, in one of the two structures of decomposition.py.

    theta, target, nontarget and mix are floats, or tensors with one value per token. mix: weight of the teacher in a
    teacher that is mixed with the student on load (taid.py), None for the teacher itself.
    """

    definition: Definition
    theta: tuple[Any, ...] = ()
    decoupled: bool = False
    target: Any = 1.0
    nontarget: Any = 1.0
    mix: Any = None

    @property
    def plain(self) -> bool:
        """Whether it is D(p, q) itself: no structure, no weights, no mixing."""
        one = all(isinstance(weight, float) and weight == 1.0 for weight in (self.target, self.nontarget))
        return not self.decoupled and self.mix is None and one


@dataclass(frozen=True)
class Derived:
    """A name for a use of other definitions: no kernel of its own, `form(**arguments)` says what runs.

    arguments: what the name takes. One called `base` is a name or a Divergence outside, a Form here, and the base's own
    arguments may be given beside it; `form` raises ValueError for a base it cannot use.
    definitions: those that nothing else registers.
    """

    name: str
    form: Callable[..., Form]
    arguments: tuple[Parameter, ...] = ()
    definitions: tuple[Definition, ...] = ()
