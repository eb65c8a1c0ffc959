"""Registration with torch.library: a NamedTuple's fields are an operator's schema, and another's its results.

@operator("name")
def name(call: Call, more: Tensor) -> Results: ...

name.register_fake(shapes)  # Call, Tensor -> Results
name.register_autograd(keep, backward)
results = name(call, more)
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeGuard, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=tuple[Any, ...])  # a NamedTuple

OPERATORS: dict[str, "Operator[..., Any]"] = {}
BESIDE = "weight_grad"  # not among the saved tensors: others may add to it before the backward pass does


class Operator(Generic[P, R]):
    """A registered operator that takes and returns what its implementation does, every argument by position."""

    def __init__(self, name: str, implementation: Callable[P, R], mutates_args: Sequence[str]) -> None:
        kinds = get_type_hints(implementation)
        self.name, self.returns = name, kinds.pop("return")
        self.kinds = list(kinds.values())
        schema: dict[str, Any] = {}
        for parameter, kind in kinds.items():
            schema.update(get_type_hints(kind) if _is_named(kind) else {parameter: kind})
        self.parameters = list(schema)
        self.lists = {name for name, kind in schema.items() if kind == Sequence[Tensor]}
        self.results = list(self.returns._fields) if _is_named(self.returns) else ["result"]
        work: Callable[..., Any] = implementation

        def run(*args: Any) -> Any:
            # Autocast has been applied to the operands already; in here it would undo the float32 arithmetic.
            kind = args[0].device.type
            place = kind if torch.amp.is_autocast_available(kind) else "cpu"
            with torch.autocast("cpu", enabled=False), torch.autocast(place, enabled=False):
                return _plain(work(*self.nested(args)))

        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        returned = tuple[(Tensor,) * len(self.results)] if _is_named(self.returns) else self.returns
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, by_position, annotation=kind) for name, kind in schema.items()],
            return_annotation=None if returned is type(None) else returned,
        )
        self.implementation = run
        self.definition: Any = torch.library.custom_op(f"fusedkd::{name}", run, mutates_args=mutates_args)
        self.overload = getattr(torch.ops.fusedkd, name).default
        OPERATORS[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it by way of torch's dispatcher."""
        found = self.overload(*_flat(*args))
        return self.returns(*found) if _is_named(self.returns) else found

    def nested(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the implementation, from those of the schema."""
        return _nested(self.kinds, args)

    def register_fake(self, fake: Callable[P, R]) -> None:
        """Shapes and dtypes of the results."""
        work: Callable[..., Any] = fake

        def run(*args: Any) -> Any:
            return _plain(work(*self.nested(args)))

        self.definition.register_fake(run)

    def register_autograd(self, keep: Callable[[C, R], tuple[C, R]], backward: Callable[[C, R, Tensor], C]) -> None:
        """Make the first result differentiable: backward(*keep(call, results), upstream) has the gradients by name.

        `keep` says what of a call and its results the backward pass needs, with None in the place of the rest.
        """
        names, kinds = [*self.parameters, *self.results], [*self.kinds, self.returns]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = _flat(output)
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be as large as they
            # torch wants a list of gradients, of None here, for a list of tensors.
            ctx.lists = {
                name: [None] * len(x) for name, x in zip(self.parameters, inputs, strict=True) if name in self.lists
            }
            kept: Any = keep
            save(ctx, names, _flat(*kept(*_nested(kinds, (*inputs, *outputs)))))

        def run(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
            refuse_double_backward(upstream)
            gradients: Sequence[Any] = [None] * len(self.parameters)
            if upstream is not None:
                call, results = _nested(kinds, saved_of(ctx))
                gradients = backward(call, results, upstream)
            return tuple(ctx.lists.get(name, x) for name, x in zip(self.parameters, gradients, strict=True))

        self.definition.register_autograd(run, setup_context=setup)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Register a function as fusedkd::name."""
    return lambda implementation: Operator(name, implementation, mutates_args)


def _is_named(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _plain(found: Any) -> Any:
    return _flat(found) if isinstance(found, tuple) else found


def _flat(*values: Any) -> tuple[Any, ...]:
    """Values, NamedTuples among them as their fields."""
    members: list[Any] = []
    for value in values:
        members += value if isinstance(value, tuple) else (value,)
    return tuple(members)


def _nested(kinds: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The reverse."""
    rest = iter(values)
    return tuple(kind._make(islice(rest, len(kind._fields))) if _is_named(kind) else next(rest) for kind in kinds)


def no_gradients(kind: type[C]) -> C:
    """A NamedTuple of None, in which a backward pass replaces what has a gradient."""
    return _nested([kind], [None] * _leaves(kind))[0]


@functools.cache
def _leaves(kind: type[tuple[Any, ...]]) -> int:
    """How many fields a NamedTuple has; to resolve its annotations takes a millisecond."""
    return len(get_type_hints(kind))


def save(ctx: Any, names: Sequence[str], values: Sequence[Any]) -> None:
    """Keep values, lists among them, for the backward pass.

    `ctx.save_for_backward` refuses tensors made under torch.inference_mode(), as a teacher often is: the context holds
    those itself. Nothing can have changed them in place: that, too, is refused outside of inference mode.
    """
    tensors: list[Tensor | None] = []
    ctx.beside = [_set_apart(value, name != BESIDE, tensors) for name, value in zip(names, values, strict=True)]
    ctx.save_for_backward(*tensors)


def _set_apart(value: Any, saved: bool, tensors: list[Tensor | None]) -> Any:
    """What is left of a value, None where its tensors went to `tensors`: a place there for each of its members."""
    if _is_list(value):
        return [_set_apart(x, saved, tensors) for x in value]
    saved = saved and isinstance(value, Tensor) and not value.is_inference()
    tensors.append(value if saved else None)
    return None if saved else value


def saved_of(ctx: Any) -> list[Any]:
    """What `save` was given."""
    tensors = iter(ctx.saved_tensors)
    return [_put_together(rest, tensors) for rest in ctx.beside]


def _put_together(rest: Any, tensors: Iterator[Tensor | None]) -> Any:
    """The reverse of `_set_apart`."""
    if _is_list(rest):
        return [_put_together(x, tensors) for x in rest]
    saved = next(tensors)
    return rest if saved is None else saved


def refuse_double_backward(upstream: Tensor | None) -> None:
    """Raises where a backward pass is itself being recorded, or runs for a batch of upstream gradients at once."""
    if upstream is not None and (is_batchedtensor(upstream) or is_legacy_batchedtensor(upstream)):
        raise RuntimeError(
            "fusedkd cannot run backward for a batch of upstream gradients (is_grads_batched=True, vectorize=True, "
            "torch.func.vmap): call torch.autograd.grad once for each of them"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fusedkd has no second derivative: its gradient is formed by the kernel. Call backward or autograd.grad "
            "with create_graph=False, or use a plain torch loss where you need double backward"
        )
