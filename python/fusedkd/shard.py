"""A vocabulary that the ranks of a process group share: which columns are whose, and DTensors that say so."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from . import checks
from .checks import is_dtensor
from .head import Head, Side
from .schedules.ranks import Ranks
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
    ranges: list[tuple[int, int]]  # [start, stop) of every rank, once known

    def __init__(self, group: Any = None, start: int | None = None, stop: int | None = None) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "group: there is no process group yet: call torch.distributed.init_process_group first, or leave out "
                "`shard` where the vocabulary is whole"
            )
        found = distributed.group.WORLD if group is None else group
        outside = distributed.GroupMember.NON_GROUP_MEMBER  # what new_group returns there: an int
        if found == outside or (isinstance(found, distributed.ProcessGroup) and distributed.get_rank(found) < 0):
            raise ValueError("group has no place for this rank: make a VocabShard on its members alone")
        if not isinstance(found, distributed.ProcessGroup):
            raise TypeError(f"group must be a process group of torch.distributed or None, got {_kind(group)}")
        self.group = found
        if (start is None) != (stop is None):
            raise ValueError(f"start and stop are given together or not at all, got {start!r} and {stop!r}")
        for name, value in (("start", start), ("stop", stop)):
            if value is not None:
                checks.integer(name, value)
        self.rank, self.size = self.group.rank(), self.group.size()
        self.start, self.stop, self.width, self.ranges = start, stop, 0, []
        self.vocab_size = 0  # columns of all ranks, once known
        self.widest = 0  # columns of the rank that has most of them
        if start is not None and stop is not None:
            if self.size == 1:
                self.fit_ranges([(int(start), int(stop))])
            else:
                self.fit_ranges(self.told((int(start), int(stop))))

    def __deepcopy__(self, memo: Any) -> "VocabShard":
        return self  # a process group cannot be copied, and nothing of a shard changes once it is known

    def __reduce__(self) -> Any:
        raise TypeError(
            "a VocabShard belongs to a process group of this process and cannot be pickled: make one on each rank"
        )

    def __repr__(self) -> str:
        return f"VocabShard(rank {self.rank} of {self.size}, start={self.start}, stop={self.stop})"

    def told(self, value: Any) -> list[Any]:
        """What every rank says, in their order."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "shard: where its columns are the ranks have yet to tell each other, which torch.compile cannot trace: "
                "give start and stop, or call kd_loss once outside of it"
            )
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, value, group=self.group)
        return told

    def fit_ranges(self, ranges: list[tuple[int, int]]) -> None:
        """Take [start, stop) of all ranks; raises where they are not those of one vocabulary."""
        stop = 0
        for rank, (first, last) in sorted(enumerate(ranges), key=lambda x: x[1]):
            if first != stop or last < first:
                what = "overlap" if 0 <= first < stop and first <= last else "leave columns out"
                what = "are no ranges of columns" if first < 0 or last < first else what
                raise ValueError(
                    f"start and stop of the ranks must cover the vocabulary once, and they {what} at rank {rank}: "
                    f"[start, stop) of all ranks are {ranges}"
                )
            stop = last
        if not stop:
            raise ValueError(f"the ranks of shard have no column at all: [start, stop) of all of them are {ranges}")
        self.ranges = ranges
        self.start, self.stop = ranges[self.rank]
        self.width = self.stop - self.start
        self.vocab_size, self.widest = stop, max(last - first for first, last in ranges)

    @property
    def first(self) -> int:
        """`start`, once it is known."""
        assert self.start is not None
        return self.start

    @property
    def ranks(self) -> Ranks:
        """Those of the group, as schedules have them."""
        return Ranks(self.group, self.first, self.widest)

    def here(self, columns: int) -> int:
        """How many of the vocabulary's first `columns` are this rank's."""
        return min(max(columns - self.first, 0), self.width)

    def fit(self, name: str, width: int) -> None:
        """Columns [start, stop) for a side that has `width` of them here, or an error that says what does not fit."""
        if self.start is None:
            widths = [width] if self.size == 1 else self.told(width)
            ranges = _equal_parts(sum(widths), widths[0], self.size)
            if widths != [stop - start for start, stop in ranges]:
                raise ValueError(
                    f"shard: the ranks have {widths} columns of {name}, which are no equal parts (the last may be "
                    "shorter): give start and stop in VocabShard"
                )
            self.fit_ranges(ranges)
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
    if not any(is_dtensor(x) for side in (*every.values(), labels) for x in checks.parts(side).values()):
        return Sides(student, dict(teachers), labels, shard)
    if torch.compiler.is_compiling():
        raise ValueError(
            "student, teacher or labels are DTensors, which kd_loss cannot take apart while torch.compile traces: pass "
            "x.to_local() of each with shard=fusedkd.VocabShard(group, start, stop)"
        )
    sharded: dict[str, Any] = {}
    partial = hidden_grad == "partial"
    plain = {name: _local_side(name, side, sharded, shard, partial) for name, side in every.items()}
    labels = _replicated("labels", labels, False)
    if not sharded:
        return Sides(plain.pop("student"), plain, labels, shard)
    first, like = next(iter(sharded.items()))
    ranges = _ranges_of(like)
    for name, x in sharded.items():
        if x.device_mesh != like.device_mesh:
            raise ValueError(f"{name} is sharded over another device mesh than {first}: use one mesh")
        if (own := _ranges_of(x)) != ranges:
            raise ValueError(
                f"{name} is a DTensor of {own[-1][1]} columns and {first} one of {ranges[-1][1]}, which are not "
                "cut alike: pad one of them to the other's width and compare the first vocab_size columns"
            )
    group = like.device_mesh.get_group()
    if shard is None:
        shard = _shard_of(group, ranges)
    elif shard.group != group or (shard.start is not None and (shard.start, shard.stop) != ranges[shard.rank]):
        raise ValueError(
            f"shard is {shard!r}, and {first} a DTensor whose columns the ranks of its mesh have as {ranges}, "
            "maybe in another group: leave `shard` out where a DTensor says it"
        )
    return Sides(plain.pop("student"), plain, labels, shard)


def _local_side(name: str, side: Any, sharded: dict[str, Any], shard: VocabShard | None, partial: bool) -> Any:
    if isinstance(side, Head):
        weight = _vocabulary(f"{name}.weight", side.weight, 0, sharded)
        bias = None if side.bias is None else _vocabulary(f"{name}.bias", side.bias, 0, sharded)
        if bias is not None and f"{name}.weight" in sharded and f"{name}.bias" not in sharded:
            raise ValueError(
                f"{name}.bias is whole beside a sharded {name}.weight: "
                f"distribute_tensor({name}.bias, {name}.weight.device_mesh, [Shard(0)]) would work"
            )
        if f"{name}.weight" in sharded and not is_dtensor(side.hidden) and shard is None:
            raise ValueError(
                f"{name}.weight is a DTensor sharded on axis 0 and {name}.hidden a plain tensor, which may be tensor "
                "parallelism or a weight that FSDP2 stores in parts. If every rank has the same hidden states, say so: "
                "pass shard=fusedkd.VocabShard(group), or hidden states as a replicated DTensor. If each rank has rows "
                "of its own, use fusedkd.DistillationHead, whose forward FSDP2 gathers the weight for"
            )
        hidden = _replicated(f"{name}.hidden", side.hidden, partial and name == "student")
        return side._replace(hidden=hidden, weight=weight, bias=bias)
    if isinstance(side, TopK):
        return side._replace(
            ids=_replicated(f"{name}.ids", side.ids, False),
            logprobs=_replicated(f"{name}.logprobs", side.logprobs, False),
        )
    return _vocabulary(name, side, -1, sharded) if isinstance(side, Tensor) else side


def _vocabulary(name: str, value: Any, axis: int, sharded: dict[str, Any]) -> Any:
    """What this rank has of a tensor whose vocabulary, on an axis, may be sharded."""
    if not is_dtensor(value):
        return value
    placement = _placement(name, value)
    if placement.is_replicate():
        return value.to_local()
    if not placement.is_shard(axis % value.dim()):
        where = "the last axis" if axis == -1 else "axis 0"
        raise ValueError(
            f"{name} is a DTensor with placement {placement}: its vocabulary may be sharded ({where}) or not, and "
            f"no other axis: {name}.redistribute(placements=[Shard({axis % value.dim()})]) would work"
        )
    sharded[name] = value
    return value.to_local()


def _replicated(name: str, value: Any, partial: bool) -> Any:
    """A tensor that every rank has whole."""
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Partial

    placement = _placement(name, value)
    if not placement.is_replicate():
        raise ValueError(
            f"{name} is a DTensor with placement {placement}, and every rank of a vocabulary shard needs all of "
            f"it: {name}.redistribute(placements=[Replicate()]) would work"
        )
    return value.to_local(grad_placements=[Partial()]) if partial else value.to_local()


def _placement(name: str, value: Any) -> Any:
    """How a DTensor lies on the one dimension of its mesh."""
    if value.device_mesh.ndim != 1:
        raise ValueError(
            f"{name} is a DTensor on a mesh of {value.device_mesh.ndim} dimensions, and the vocabulary is sharded over "
            f'one: pass {name}.to_local() with shard=fusedkd.VocabShard(mesh["tp"].get_group(), start, stop)'
        )
    return value.placements[0]


def _equal_parts(total: int, most: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of every rank: each has `most` columns, the last ones what is left, as torch.chunk cuts."""
    return [(min(total, i * most), min(total, (i + 1) * most)) for i in range(size)]


def _ranges_of(x: Any) -> list[tuple[int, int]]:
    """Those of a DTensor sharded over the vocabulary."""
    total, size = x.shape[x.placements[0].dim], x.device_mesh.size()
    return _equal_parts(total, -(-total // size), size)


def _shard_of(group: Any, ranges: list[tuple[int, int]]) -> VocabShard:
    """A shard whose columns need not be told: DTensors of one shape are cut alike on every rank."""
    shard = VocabShard(group)
    shard.fit_ranges(ranges)
    return shard


def cut(name: str, side: Any, shard: VocabShard, vocab_size: int | None) -> Any:
    """This rank's columns of a teacher that is its part already, or whole: a TopK stays as it is."""
    if isinstance(side, TopK):
        return side
    width, compared = checks.width(side), shard.vocab_size if vocab_size is None else min(vocab_size, shard.vocab_size)
    part = width == shard.width
    if any(0 < start < compared <= stop - start for start, stop in shard.ranges):
        # A whole teacher of so few columns may be as wide as a rank's part of it, and the others have to know.
        widths = shard.told(width)
        part = widths == [stop - start for start, stop in shard.ranges]
        if not part and len(set(widths)) > 1:
            raise ValueError(
                f"{name} has {widths} columns on the ranks of shard, which are neither its parts {shard.ranges} nor "
                "the same whole teacher everywhere"
            )
    if part:
        return side
    if width < compared:
        raise ValueError(
            f"{name} has {width} columns, and the student {shard.width} of {shard.vocab_size} on this rank: pass the "
            f"same {shard.width} columns of the teacher, or the whole teacher, of which this rank takes its part (with "
            "vocab_size=... where it has fewer than the student)"
        )
    columns = slice(shard.first, shard.first + shard.width)
    if isinstance(side, Head):
        bias = None if side.bias is None else side.bias[columns]
        return side._replace(weight=side.weight[columns], bias=bias)
    if isinstance(side, Tensor):
        return side[..., columns]
    raise ValueError(f"{name} is a {_kind(side)}, which cannot be cut: pass logits, a Head or a TopK beside a shard")


def agree(shard: VocabShard, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Under FUSEDKD_CHECK=1: raises on every rank where the ranks do not call with the same facts, by name.

    One small collective.
    """
    if os.environ.get("FUSEDKD_CHECK") != "1" or shard.size == 1 or torch.compiler.is_compiling():
        return
    told = shard.told(dict(facts()))
    for name in dict.fromkeys(name for x in told for name in x):
        values = [x.get(name) for x in told]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on every rank of shard, and the ranks have {values}")
