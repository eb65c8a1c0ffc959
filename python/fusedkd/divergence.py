"""Divergences by name: the public factory over the definitions in kernels/divergences."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .kernels.divergences import REGISTRY
from .kernels.maths.definition import Definition, Derived, Form, Parameter

TARGETS = ("label", "teacher_argmax")


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence with its parameters: what `fusedkd.divergence(name, ...)` returns and `kd_loss` takes.

    name: as asked for. parameters: every one of them, as given or by default: floats, tensors broadcastable to the
    leading shape (one value per token), a base. target_token: what the target/non-target split holds out, the label or
    the teacher's likeliest token. form: what the kernels run (kernels/maths/definition.py).
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    target_token: str = "label"
    form: Form = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", _form(self.name, self.parameters))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name and parameters: kernels are not stored."""
        return Divergence, (self.name, self.parameters, self.target_token)

    def __eq__(self, other: object) -> bool:
        """Same name, target and parameters; a tensor equals one of its dtype, device and values."""
        if not isinstance(other, Divergence):
            return NotImplemented
        ours, theirs = ((x.name, x.target_token, tuple(x.parameters)) for x in (self, other))
        return ours == theirs and all(map(_equal, self.parameters.values(), other.parameters.values()))

    def __hash__(self) -> int:
        return hash((self.name, self.target_token, *self.parameters))

    def __repr__(self) -> str:
        given = [f"{key}={value!r}" for key, value in self.parameters.items()]
        if self.target_token != "label":
            given.append(f"target_token={self.target_token!r}")
        return f"{self.name}({', '.join(given)})"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters that are given per token, a base's too."""
        found = {key: value for key, value in self.parameters.items() if isinstance(value, torch.Tensor)}
        base = self.parameters.get("base")
        return {**base.tensors(), **found} if isinstance(base, Divergence) else found

    @property
    def needs_target(self) -> bool:
        """Whether the value depends on which token is the target."""
        return self.form.decoupled or not _same(self.form.target, self.form.nontarget)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        alike = (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
        return left is right or (alike and torch.equal(left, right))
    return not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor) and left == right


def _same(left: float | torch.Tensor, right: float | torch.Tensor) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return left is right
    return left == right


def divergences() -> dict[str, dict[str, Any]]:
    """Every divergence name with its parameters and their defaults."""
    return {name: _defaults(member) for name, member in REGISTRY.items()}


def divergence(name: str, *, target_token: str = "label", **parameters: Any) -> Divergence:
    """The divergence `name` with its parameters, the rest at their defaults (see `divergences()`).

    A parameter is a float, or a tensor broadcastable to the leading shape of the call: one value per token, read on the
    device and never checked. Separable divergences also take `target=1, nontarget=1`, the weights of the two terms of
    their exact decomposition. A `base` is a name or a Divergence; a base by name takes its own parameters beside.
    target_token="teacher_argmax" holds out the teacher's likeliest token (the first of equals) instead of the label, in
    the same sweep, and needs no labels.

    Raises ValueError or TypeError for an unknown name or parameter and for a float outside its domain.
    """
    if not isinstance(name, str):
        raise TypeError(f"divergence must be a name or a fusedkd.Divergence, got {type(name).__name__}")
    member = REGISTRY.get(name)
    if member is None:
        raise ValueError(f"divergence {name!r} is unknown; known names: {', '.join(REGISTRY)}")
    if target_token not in TARGETS:
        raise ValueError(f"target_token must be one of {', '.join(map(repr, TARGETS))}, got {target_token!r}")
    own = {parameter.name: parameter for parameter in member.arguments}
    known = list(own)
    base: Any = None
    if "base" in own:
        base = parameters.get("base", own["base"].default)
        if not isinstance(base, (str, Divergence)):
            raise TypeError(f"base of {name!r} must be a name such as 'rkl' or a fusedkd.Divergence, got {base!r}")
        if isinstance(base, str):
            of_base = [parameter.name for parameter in _base_member(name, base).arguments]
            known = [*(key for key in of_base if key not in own), *known]
    for key in parameters:
        if key not in known:
            raise ValueError(f"divergence {name!r} has no parameter {key!r}; it takes: {', '.join(known) or 'none'}")
    values = {
        key: _checked(name, parameter, parameters.get(key, parameter.default))
        for key, parameter in own.items()
        if key != "base"
    }
    if "base" in own:
        further = {key: value for key, value in parameters.items() if key not in own}
        values["base"] = base if isinstance(base, Divergence) else divergence(base, **further)
    return Divergence(name, values, target_token)


def _base_member(name: str, base: str) -> Definition | Derived:
    member = REGISTRY.get(base)
    if member is None or base == name:
        others = [key for key in REGISTRY if key != name]
        raise ValueError(
            f"base of {name!r} must be another divergence, by name ({', '.join(others)}) "
            f"or made by fusedkd.divergence, got {base!r}"
        )
    return member


def _form(name: str, values: Mapping[str, Any]) -> Form:
    """What a member runs with these parameters."""
    member = REGISTRY[name]
    if isinstance(member, Derived):
        forms = {key: value.form if isinstance(value, Divergence) else value for key, value in values.items()}
        try:
            return member.form(**forms)
        except ValueError as error:  # only a base can be wrong here: the numbers have been checked
            raise ValueError(f"{error}, got {values['base'].name!r}") from None
    theta = tuple(values[parameter.name] for parameter in member.parameters)
    return Form(member, theta, target=values["target"], nontarget=values["nontarget"])


def as_divergence(value: "str | Divergence") -> Divergence:
    """A name at its defaults, or the object itself."""
    return value if isinstance(value, Divergence) else divergence(value)


def _defaults(member: Definition | Derived) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in member.arguments}


def _checked(name: str, parameter: Parameter, value: Any) -> Any:
    """A parameter of divergence `name` as the forms take it: a float, a tensor, or the word it is."""
    key, default = f"{parameter.name} of {name!r}", parameter.default
    if isinstance(default, str):
        if not isinstance(value, str):
            raise TypeError(f"{key} must be a str, got {type(value).__name__}")
        if parameter.words and value not in parameter.words:
            raise ValueError(f"{key} must be {parameter.domain} ({parameter.meaning}), got {value!r}")
        return value
    if isinstance(value, torch.Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{key} must be a float or a floating-point tensor, got {value.dtype}")
        if value.requires_grad:
            detached = f"{parameter.name}.detach()"
            raise ValueError(f"{key} requires grad; no gradient flows to parameters, pass {detached}")
        return value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{key} must be {parameter.domain}, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{key} must be a float or a tensor, got {type(value).__name__}")
    value = float(value)
    if not -math.inf < value < math.inf:  # torch.compile traces no math.isfinite of a number that changes
        raise ValueError(f"{key} must be finite, got {value}")
    if not parameter.low <= value <= parameter.high:
        raise ValueError(f"{key} must be {parameter.domain} ({parameter.meaning}), got {value}")
    return value
