"""Registration with torch.library: a NamedTuple's fields are an operator's schema, and another's its results.

@operator("name")
def name(call: Call, more: Tensor) -> Results: ...

name.register_fake(shapes)  # Call, Tensor -> Results
name.register_autograd(keep, backward)
results = name(call, more)
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

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
        self.definition = torch.library.custom_op(f"fusedkd::{name}", run, mutates_args=mutates_args)
        self.overload = self.definition._opoverload
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
        self.definition.register_fake(lambda *args: _plain(work(*self.nested(args))))

    def register_autograd(self, keep: Callable[[C, R], tuple[C, R]], backward: Callable[[C, R, Tensor], C]) -> None:
        """Make the first result differentiable: backward(*keep(call, results), upstream) has the gradients by name.

        `keep` says what of a call and its results the backward pass needs, with None in the place of the rest.
        """
        names, kinds = [*self.parameters, *self.results], [*self.kinds, self.returns]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be as large as they
            kept: Any = keep
            save(ctx, names, _flat(*kept(*_nested(kinds, (*inputs, *outputs)))))

        def run(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
            refuse_double_backward(upstream)
            if upstream is None:
                return (None,) * len(self.parameters)
            call, results = _nested(kinds, saved_of(ctx))
            return tuple(backward(call, results, upstream))

        self.definition.register_autograd(run, setup_context=setup)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Register a function as fusedkd::name."""
    return lambda implementation: Operator(name, implementation, mutates_args)


def _is_named(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _plain(found: Any) -> Any:
    return tuple(found) if isinstance(found, tuple) else found


def _flat(*values: Any) -> tuple[Any, ...]:
    """Values, NamedTuples among them as their fields."""
    return tuple(x for value in values for x in (value if isinstance(value, tuple) else (value,)))


def _nested(kinds: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The reverse."""
    rest = iter(values)
    return tuple(kind._make(islice(rest, len(kind._fields))) if _is_named(kind) else next(rest) for kind in kinds)


def no_gradients(kind: type[C]) -> C:
    """A NamedTuple of None, in which a backward pass replaces what has a gradient."""
    return _nested([kind], [None] * len(get_type_hints(kind)))[0]


def save(ctx: Any, names: Sequence[str], values: Sequence[Any]) -> None:
    """Keep values for the backward pass.

    `ctx.save_for_backward` refuses tensors made under torch.inference_mode(), as a teacher often is: the context holds
    those itself. Nothing can have changed them in place: that, too, is refused outside of inference mode.
    """
    saved = [
        x if isinstance(x, Tensor) and not x.is_inference() and name != BESIDE else None
        for name, x in zip(names, values, strict=True)
    ]
    ctx.beside = [x if kept is None else None for kept, x in zip(saved, values, strict=True)]
    ctx.save_for_backward(*saved)


def saved_of(ctx: Any) -> list[Any]:
    """What `save` was given."""
    return [x if kept is None else kept for kept, x in zip(ctx.saved_tensors, ctx.beside, strict=True)]


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
