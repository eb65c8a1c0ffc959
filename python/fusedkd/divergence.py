"""Divergences by name: the public factory over the definitions in kernels/divergences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .kernels.divergence import Decoupled, Definition
from .kernels.divergences import REGISTRY

Parameter = float | torch.Tensor


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters: what `fusedkd.divergence(name, ...)` returns and `kd_loss` takes.

    name: as asked for. definition: the mathematics (kernels/divergences). decoupled: which of the two target/non-target
    structures of kernels/split.py. parameters: the definition's, in its order. target, nontarget: the two weights.
    Parameters and weights are floats, or tensors broadcastable to the leading shape (one value per token).
    """

    name: str
    definition: Definition
    decoupled: bool = False
    parameters: tuple[Parameter, ...] = ()
    target: Parameter = 1.0
    nontarget: Parameter = 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the definition's name: kernels are not stored."""
        return _restore, (self.name, self.definition.name, self.decoupled, self.parameters, self.target, self.nontarget)

    def __repr__(self) -> str:
        values = (*self.parameters, self.target, self.nontarget)
        given = ", ".join(f"{key}={value!r}" for key, value in zip(self.parameter_names, values, strict=True))
        return f"{self.name}({given})"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """What the values of (*parameters, target, nontarget) were given as."""
        member = REGISTRY.get(self.name)
        weights = (member.target, member.nontarget) if isinstance(member, Decoupled) else ("target", "nontarget")
        named = (weight if isinstance(weight, str) else "weight" for weight in weights)
        return (*self.definition.parameters, *named)

    @property
    def needs_target(self) -> bool:
        """Whether the value depends on which token is the target."""
        return self.decoupled or not _same(self.target, self.nontarget)


def _restore(name: str, definition: str, *rest: Any) -> Divergence:
    member = REGISTRY[definition]
    assert isinstance(member, Definition)
    return Divergence(name, member, *rest)


def _same(left: Parameter, right: Parameter) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return left is right
    return left == right


def divergences() -> dict[str, dict[str, Any]]:
    """Every divergence name with its parameters and their defaults."""
    return {name: _signature(member) for name, member in REGISTRY.items()}


def divergence(name: str, **parameters: Any) -> Divergence:
    """The divergence `name` with its parameters, the rest at their defaults (see `divergences()`).

    A parameter is a float, or a tensor broadcastable to the leading shape of the call: one value per token, read on the
    device and never checked. Separable divergences also take `target=1, nontarget=1`, the weights of the two terms of
    their exact decomposition; `decoupled(base=...)` takes the base's parameters beside its own.

    Raises ValueError or TypeError for an unknown name or parameter and for a float outside its domain.
    """
    if not isinstance(name, str):
        raise TypeError(f"divergence must be a name or a fusedkd.Divergence, got {type(name).__name__}")
    member = REGISTRY.get(name)
    if member is None:
        raise ValueError(f"divergence {name!r} is unknown; known names: {', '.join(REGISTRY)}")
    known = _signature(member)
    base = parameters.get("base", known.get("base"))
    definition = _definition(name, member, base)
    if isinstance(base, Divergence):
        known |= dict(zip(definition.parameters, base.parameters, strict=True))
    elif base is not None:
        known |= definition.parameters
    for key in parameters:
        if key not in known:
            raise ValueError(f"divergence {name!r} has no parameter {key!r}; it takes: {', '.join(known) or 'none'}")
    values = {key: _parameter(name, key, parameters.get(key, known[key])) for key in known if key != "base"}
    _check(member, values)
    if definition is not member and "base" in known:
        _check(definition, values)
    theta = tuple(values[key] for key in definition.parameters)
    if isinstance(member, Decoupled):
        target, nontarget = _weight(member.target, values), _weight(member.nontarget, values)
        return Divergence(name, definition, True, theta, target, nontarget)
    return Divergence(name, definition, False, theta, values["target"], values["nontarget"])


def _definition(name: str, member: Definition | Decoupled, base: Any) -> Definition:
    """The definition behind a member; `base` chooses it where the member leaves that open."""
    if isinstance(member, Definition):
        return member
    if member.base is not None:
        return member.base
    if isinstance(base, Divergence) and not base.decoupled and _same(base.target, 1.0) and _same(base.nontarget, 1.0):
        return base.definition
    chosen = REGISTRY.get(base) if isinstance(base, str) else None
    if not isinstance(chosen, Definition):
        bases = ", ".join(key for key, value in REGISTRY.items() if isinstance(value, Definition))
        shown = base.name if isinstance(base, Divergence) else base
        raise ValueError(
            f"base of {name!r} must be one of {bases}, or such a Divergence without weights, got {shown!r}"
        )
    return chosen


def as_divergence(value: "str | Divergence") -> Divergence:
    """A name at its defaults, or the object itself."""
    return value if isinstance(value, Divergence) else divergence(value)


def _signature(member: Definition | Decoupled) -> dict[str, Any]:
    if isinstance(member, Decoupled):
        return {**({"base": "rkl"} if member.base is None else {}), **member.parameters}
    return {**member.parameters, "target": 1.0, "nontarget": 1.0}


def _weight(weight: float | str, values: Mapping[str, Parameter]) -> Parameter:
    return values[weight] if isinstance(weight, str) else weight


def _parameter(name: str, key: str, value: Any) -> Parameter:
    if isinstance(value, torch.Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{key} of {name!r} must be a float or a floating-point tensor, got {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{key} of {name!r} requires grad; no gradient flows to parameters, pass {key}.detach()")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} of {name!r} must be a float or a tensor, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{key} of {name!r} must be finite, got {value}")
    if key in ("target", "nontarget") and value < 0:
        raise ValueError(f"{key} of {name!r} is a weight and must be >= 0, got {value}")
    return float(value)


def _check(member: Definition | Decoupled, values: Mapping[str, Parameter]) -> None:
    """The domain check of a member, on the parameters that are floats (a tensor's default stands in for it)."""
    own = {key: values[key] for key in member.parameters}
    member.check(**{key: member.parameters[key] if isinstance(v, torch.Tensor) else v for key, v in own.items()})
