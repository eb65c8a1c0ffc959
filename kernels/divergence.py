"""The mathematical object: what one file in `divergences/` says about one divergence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from .online import moments_advance, moments_init, moments_ratio


class Online(NamedTuple):
    """How a divergence gathers its sums in one sweep (see online.py). `sums=None`: a second sweep evaluates `term`.

    tile: the class of tiles.py that its register need puts it in.
    """

    init: Any = moments_init
    advance: Any = moments_advance
    ratio: Any = moments_ratio
    sums: Any = None
    tile: str = "light"


TWO_SWEEPS = Online(tile="two")


def _anything(**parameters: float) -> None:
    """Every parameter value is allowed."""


def _always(**parameters: float) -> bool:
    return True


@dataclass(frozen=True)
class Definition:
    """One divergence D(p, q) = Σ f, p teacher, q student, in nats.

    term(q, p, logq, logp, delta, theta) -> (f, phi): the non-negative summand f and phi = ∂f/∂log q at fixed p, with
        delta = log p − log q known far better than the two logs apart. A `formula`. An absent column has q = p = 0 and
        logs of about −1e30, a column with p > 0 = q has delta of about 1e30; nothing is infinite.
    reference(logp, logq, *parameters) -> (...): the published definition on (..., V) log-probabilities, written in
        another way than `term`; tests differentiate it in float64.
    parameters: names, in the order of theta, and defaults.
    check(**parameters): raises ValueError, with the domain in the text, for floats outside it.
    reads_logs: whether `term` uses logq and logp; the CPU path makes them only then (else they are None).
    online: the one-sweep form where there is one; `one_sweep(**parameters)` says for which floats it is accurate.
    """

    name: str
    term: Any
    reference: Callable[..., Any]
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    check: Callable[..., None] = _anything
    online: Online = TWO_SWEEPS
    reads_logs: bool = True
    one_sweep: Callable[..., bool] = _always

    @property
    def sweeps(self) -> tuple[Online, ...]:
        """Every sweep that some parameters lead to."""
        if self.one_sweep is _always:
            return (self.online,)
        return (self.online, TWO_SWEEPS)

    def sweep(self, parameters: tuple[Any, ...]) -> Online:
        """The statistics sweep for these parameters; values on the device cannot choose, so they take two sweeps."""
        known = all(isinstance(value, (int, float)) for value in parameters)
        if self.one_sweep is _always or (known and self.one_sweep(*parameters)):
            return self.online
        return TWO_SWEEPS


@dataclass(frozen=True)
class Decoupled:
    """A name for the decoupled form (split.py) of another definition, with its weights under their own names.

    `target` and `nontarget` are a fixed number or the name of a parameter; `base=None` leaves the base to the caller.
    """

    name: str
    base: Definition | None
    target: float | str
    nontarget: float | str
    parameters: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    check: Callable[..., None] = _anything
