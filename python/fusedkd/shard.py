"""A vocabulary that the ranks of a process group share: which columns are whose, and DTensors that say so."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .head import Head, Side
from .schedules.operands import is_operand
from .sparse import TopK


class VocabShard:
    """This rank's columns [start, stop) of a vocabulary that the ranks of `group` share.

    Made on every rank of the group at the same time: where start and stop are given, the ranks compare them at once,
    else at the first loss, whose widths decide them: equal parts in the order of the ranks, of which the last may be
    shorter or empty (those of `torch.chunk`, DTensor and torchtitan). From then on they are fixed: another vocabulary
    takes another VocabShard.

    Args:
        group: a torch.distributed process group of which this rank is a member; None: the default group. The library
            makes none.
        start, stop: ints, 0 <= start <= stop, or None. The shards of all ranks have to cover a vocabulary without gap
            or overlap, in any order; one may be empty.

    Raises:
        ValueError: on every rank where the shards do not fit together; where there is no process group, or this rank is
            not in it.
    """

    start: int | None
    stop: int | None

    def __init__(self, group: Any = None, start: int | None = None, stop: int | None = None) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "group: there is no process group yet: call torch.distributed.init_process_group first, or leave out "
                "`shard` where the vocabulary is whole"
            )
        found = distributed.group.WORLD if group is None else group
        if not isinstance(found, distributed.ProcessGroup):
            raise TypeError(f"group must be a process group of torch.distributed or None, got {_kind(group)}")
        self.group = found
        if distributed.get_rank(self.group) < 0:
            raise ValueError("group has no place for this rank: make a VocabShard on its members alone")
        if (start is None) != (stop is None):
            raise ValueError(f"start and stop are given together or not at all, got {start!r} and {stop!r}")
        for name, value in (("start", start), ("stop", stop)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        self.rank, self.size = self.group.rank(), self.group.size()
        self.start, self.stop, self.width = start, stop, 0
        self.vocab_size = 0  # columns of all ranks, once known
        self.widest = 0  # columns of the rank that has most of them
        if start is not None and stop is not None:
            if self.size == 1:
                self._fit([(start, stop)])
            else:
                self._fit(self._told((start, stop)))

    def __repr__(self) -> str:
        return f"VocabShard(rank {self.rank} of {self.size}, start={self.start}, stop={self.stop})"

    def _told(self, value: Any) -> list[Any]:
        """What every rank says, in their order."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "shard: where its columns are the ranks have yet to tell each other, which torch.compile cannot trace: "
                "give start and stop, or call kd_loss once outside of it"
            )
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, value, group=self.group)
        return told

    def _fit(self, ranges: list[tuple[int, int]]) -> None:
        """Raises where the ranges of all ranks are not those of one vocabulary."""
        stop = 0
        for rank, (first, last) in sorted(enumerate(ranges), key=lambda x: x[1]):
            if first != stop or last < first:
                what = "overlap" if first < stop else "leave columns out"
                raise ValueError(
                    f"start and stop of the ranks must cover the vocabulary once, and they {what} at rank {rank}: "
                    f"[start, stop) of all ranks are {ranges}"
                )
            stop = last
        self.start, self.stop = ranges[self.rank]
        self.width = self.stop - self.start
        self.vocab_size, self.widest = stop, max(last - first for first, last in ranges)

    @property
    def first(self) -> int:
        """`start`, once it is known."""
        assert self.start is not None
        return self.start

    def here(self, columns: int) -> int:
        """How many of the vocabulary's first `columns` are this rank's."""
        return min(max(columns - self.first, 0), self.width)

    def fit(self, name: str, width: int) -> None:
        """Columns [start, stop) for a side that has `width` of them here, or an error that says what does not fit."""
        if self.start is None:
            widths = [width] if self.size == 1 else self._told(width)
            total, most = sum(widths), widths[0]
            equal = [max(0, min(most, total - i * most)) for i in range(self.size)]
            if widths != equal:
                raise ValueError(
                    f"shard: the ranks have {widths} columns of {name}, which are no equal parts (the last may be "
                    "shorter): give start and stop in VocabShard"
                )
            starts = [sum(widths[:i]) for i in range(self.size)]
            self._fit([(first, first + own) for first, own in zip(starts, widths, strict=True)])
        elif width != self.width:
            raise ValueError(
                f"shard has the columns [{self.start}, {self.stop}), {self.width} of them, and {name} has {width} on "
                "this rank: they must be the same (another vocabulary takes another VocabShard)"
            )


class Sides(NamedTuple):
    """Both sides of a call on this rank, as plain tensors."""

    student: Side
    teachers: dict[str, Any]
    labels: Any
    shard: VocabShard | None


def _kind(value: Any) -> str:
    return type(value).__name__


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def _tensors(value: Any) -> list[Any]:
    """The tensors of a side."""
    if isinstance(value, Head | TopK):
        return list(value)
    return list(value.tensors) if is_operand(value) else [value]


def local_sides(
    student: Any, teachers: Mapping[str, Any], labels: Any, shard: VocabShard | None, hidden_grad: str
) -> Sides:
    """Both sides as plain tensors, and the shard that DTensors name.

    Logits sharded on the last axis and a Head's weight and bias sharded on axis 0 of a one-dimensional mesh are this
    rank's part; replicated DTensors are what they hold.

    Raises:
        ValueError: naming the argument, for other placements, and for a sharded weight beside plain hidden states
            without a `shard`: FSDP2 stores weights in the same way, and there hidden states differ from rank to rank.
    """
    every = {"student": student, **teachers}
    if not any(_is_dtensor(x) for side in (*every.values(), labels) for x in _tensors(side)):
        return Sides(student, dict(teachers), labels, shard)
    meshes: dict[str, Any] = {}
    partial = hidden_grad == "partial"
    plain = {name: _local_side(name, side, meshes, shard, partial) for name, side in every.items()}
    labels = _replicated("labels", labels, False)
    for name, mesh in meshes.items():
        if mesh != next(iter(meshes.values())):
            raise ValueError(f"{name} is sharded over another device mesh than {next(iter(meshes))}: use one mesh")
    if shard is None and meshes:
        mesh, (first, last, total, widest) = next(iter(meshes.values())), _columns_of(student, every)
        shard = _shard_of(mesh.get_group(), first, last, total, widest)
    return Sides(plain.pop("student"), plain, labels, shard)


def _local_side(name: str, side: Any, meshes: dict[str, Any], shard: VocabShard | None, partial: bool) -> Any:
    if isinstance(side, Head):
        weight = _vocabulary(f"{name}.weight", side.weight, 0, meshes)
        bias = None if side.bias is None else _vocabulary(f"{name}.bias", side.bias, 0, meshes)
        if f"{name}.weight" in meshes and not _is_dtensor(side.hidden) and shard is None:
            raise ValueError(
                f"{name}.weight is a DTensor sharded on axis 0 and {name}.hidden a plain tensor, which may be tensor "
                "parallelism or a weight that FSDP2 stores in parts. If every rank has the same hidden states, say so: "
                "pass shard=fusedkd.VocabShard(group), or hidden states as a replicated DTensor. If each rank has rows "
                "of its own, use fusedkd.DistillationHead, whose forward FSDP2 gathers the weight for"
            )
        hidden = _replicated(f"{name}.hidden", side.hidden, partial and f"{name}.weight" in meshes)
        return side._replace(hidden=hidden, weight=weight, bias=bias)
    if isinstance(side, TopK):
        return side._replace(
            ids=_replicated(f"{name}.ids", side.ids, False),
            logprobs=_replicated(f"{name}.logprobs", side.logprobs, False),
        )
    return _vocabulary(name, side, -1, meshes) if isinstance(side, Tensor) else side


def _vocabulary(name: str, value: Any, axis: int, meshes: dict[str, Any]) -> Any:
    """What this rank has of a tensor whose vocabulary, on an axis, may be sharded."""
    if not _is_dtensor(value):
        return value
    mesh, placements = _one_dimensional(name, value)
    if placements[0].is_replicate():
        return value.to_local()
    if not placements[0].is_shard(axis % value.dim()):
        where = "the last axis" if axis == -1 else "axis 0"
        raise ValueError(
            f"{name} is a DTensor with placement {placements[0]}: its vocabulary may be sharded ({where}) or not, and "
            f"no other axis: {name}.redistribute(placements=[Shard({axis % value.dim()})]) would work"
        )
    meshes[name] = mesh
    return value.to_local()


def _replicated(name: str, value: Any, partial: bool) -> Any:
    """A tensor that every rank has whole."""
    if not _is_dtensor(value):
        return value
    from torch.distributed.tensor import Partial

    _, placements = _one_dimensional(name, value)
    if not placements[0].is_replicate():
        raise ValueError(
            f"{name} is a DTensor with placement {placements[0]}, and every rank of a vocabulary shard needs all of "
            f"it: {name}.redistribute(placements=[Replicate()]) would work"
        )
    return value.to_local(grad_placements=[Partial()]) if partial else value.to_local()


def _one_dimensional(name: str, value: Any) -> tuple[Any, Any]:
    if value.device_mesh.ndim != 1:
        raise ValueError(
            f"{name} is a DTensor on a mesh of {value.device_mesh.ndim} dimensions, and the vocabulary is sharded over "
            f'one: pass {name}.to_local() with shard=fusedkd.VocabShard(mesh["tp"].get_group(), start, stop)'
        )
    return value.device_mesh, value.placements


def _columns_of(student: Any, sides: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """This rank's columns, those of the vocabulary, and those of the first rank, of the side that is sharded."""
    for side in (student, *sides.values()):
        whole: Any = side.weight if isinstance(side, Head) else side
        if _is_dtensor(whole) and not whole.placements[0].is_replicate():
            total, mesh = whole.shape[0 if isinstance(side, Head) else -1], whole.device_mesh
            widest = -(-total // mesh.size())
            first = min(total, mesh.get_local_rank() * widest)
            return first, min(total, first + widest), total, widest
    raise AssertionError("a mesh without a sharded side")


def _shard_of(group: Any, first: int, last: int, total: int, widest: int) -> VocabShard:
    """A shard whose columns need not be told: DTensors of one shape are cut alike on every rank."""
    shard = VocabShard(group)
    shard.start, shard.stop, shard.width, shard.vocab_size, shard.widest = first, last, last - first, total, widest
    return shard


def cut(name: str, side: Any, shard: VocabShard, vocab_size: int | None) -> Any:
    """This rank's columns of a teacher that is its part already, or whole: a TopK stays as it is."""
    if isinstance(side, TopK):
        return side
    width = _width(side)
    if width == shard.width:
        return side
    if width < (shard.vocab_size if vocab_size is None else min(vocab_size, shard.vocab_size)):
        raise ValueError(
            f"{name} has {width} columns, and the student {shard.width} of {shard.vocab_size} on this rank: pass the "
            f"same {shard.width} columns of the teacher, or the whole teacher, of which this rank takes its part"
        )
    columns = slice(shard.first, shard.first + shard.width)
    if isinstance(side, Head):
        bias = None if side.bias is None else side.bias[columns]
        return side._replace(weight=side.weight[columns], bias=bias)
    if isinstance(side, Tensor):
        return side[..., columns]
    raise ValueError(f"{name} is a {_kind(side)}, which cannot be cut: pass logits, a Head or a TopK beside a shard")


def _width(side: Any) -> int:
    if isinstance(side, Head):
        return side.weight.shape[0]
    return side.shape[-1] if isinstance(side, Tensor) else side.width


def agree(shard: VocabShard, facts: Mapping[str, Any]) -> None:
    """Under FUSEDKD_CHECK=1: raises on every rank where the ranks do not call with the same `facts`, by name.

    One small collective.
    """
    if os.environ.get("FUSEDKD_CHECK") != "1" or shard.size == 1 or torch.compiler.is_compiling():
        return
    told: list[Any] = [None] * shard.size
    distributed.all_gather_object(told, dict(facts), group=shard.group)
    for name in facts:
        values = [x.get(name) for x in told]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on every rank of shard, and the ranks have {values}")
