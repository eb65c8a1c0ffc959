"""One case of each kernel and way, run as compiled code: `python tests/compiled_cases.py` prints a JSON line for each.

Each is compared with float64 by the bounds of the suite, in production tiles; the emulator says what else it saw. A
program of its own, because Triton's interpreter and its compiler exclude each other in one process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import emulator
import torch
from emulator.machine import sparse

import fusedkd

CAPABILITY = 90
ALIGNED, STRIDED, FAR_ROWS, FAR_COLUMNS = "aligned", "strided", "far rows", "far columns"
# More than one tile of most classes; multiples of 16 columns, or rows that begin anywhere with columns apart.
COLUMNS = {ALIGNED: 5008, STRIDED: 1003, FAR_ROWS: 5008, FAR_COLUMNS: 1003}
GAP = 8192  # columns, of more than the widest tile
# Elements between rows and between columns where offsets need 64 bits: the second row begins beyond 2³¹ elements, the
# third beyond 2³²; the last column lies beyond 2³¹ elements from its row, and any row's bytes pass 2³².
FAR = {FAR_ROWS: ((1 << 31) + 16, 1), FAR_COLUMNS: ((1 << 32) + 1, (1 << 22) + 1)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDE = [("bf16", ALIGNED), ("bf16", STRIDED), ("fp32", ALIGNED), ("fp32", STRIDED)]
CROSSED = [("bf16", ALIGNED), ("fp32", STRIDED)]
APART = [("bf16", FAR_ROWS), ("fp32", FAR_COLUMNS)]
# ways through the kernels: divergences, each with the classes of dtype and layout that it is run with
WAYS: dict[str, list[tuple[str, dict[str, Any], list[tuple[str, str]]]]] = {
    "autograd": [
        ("rkl", {}, WIDE + APART),  # one sweep, few sums
        ("ab", {}, CROSSED),  # one sweep, many sums
        ("jsd", {}, CROSSED),  # two sweeps
        ("renyi", {}, [("fp32", STRIDED)]),  # a function of the sum
        ("akl", {}, CROSSED),  # a search over the row
        ("akl", {"head": "inclusive"}, [("bf16", ALIGNED)]),
        ("amid", {}, CROSSED),  # gathered parameters
        ("taid", {}, CROSSED),  # a mixed teacher
        ("drkl", {"target_token": "teacher_argmax"}, CROSSED + APART),
    ],
    "defaults": [(name, {}, [("bf16", ALIGNED)]) for name in fusedkd.divergences()],
    "fused": [("rkl", {}, WIDE), ("jsd", {}, CROSSED), ("drkl", {}, CROSSED)],
    "over logits": [("rkl", {}, CROSSED + APART), ("jsd", {}, CROSSED + APART)],  # the gradient takes their place
    "split rows": [("rkl", {}, WIDE + APART), ("jsd", {}, CROSSED), ("renyi", {}, [("bf16", ALIGNED)])],
    "streaming": [("rkl", {}, CROSSED), ("jsd", {}, CROSSED), ("eopd", {}, [("fp32", STRIDED)])],
    "sharded": [  # parts of rows, of what streaming refuses, too
        ("rkl", {}, CROSSED),
        ("jsd", {}, [("fp32", STRIDED)]),
        ("akl", {}, CROSSED),
        ("amid", {}, CROSSED),
        ("drkl", {"target_token": "teacher_argmax"}, [("bf16", ALIGNED)]),
    ],
    "log-probabilities": [("", {}, WIDE + APART)],
    "floor": [("rkl", {}, CROSSED + APART)],
    "top-k": [("rkl", {}, CROSSED + APART)],
    "top-k of heads": [("rkl", {}, [("fp32", STRIDED)]), ("drkl", {}, [("bf16", ALIGNED)])],  # in place, and not
}
CASES = {
    "-".join(filter(None, (way, name, *params.values(), dtype, layout))): (way, (name, params), dtype, layout)
    for way, cases in WAYS.items()
    for name, params, classes in cases
    for dtype, layout in classes
}
SLOW = {"many rows-rkl-bf16": ("many rows", ("rkl", {}), "bf16", ALIGNED)}  # minutes: run by name


class Far(torch.autograd.Function):
    """A copy in memory that is taken only where it is touched, its rows and columns far apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
        (rows, columns), (by_row, by_column) = x.shape, strides
        span = (rows - 1) * by_row + (columns - 1) * by_column + 1
        memory = torch.from_numpy(sparse(span * x.element_size(), "u1")).view(x.dtype)
        return memory.as_strided(x.shape, strides).copy_(x)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None


def apart(x: torch.Tensor) -> torch.Tensor:
    """Rows with a gap of more than a tile that is not the kernel's to touch; each begins at a multiple of 16 bytes."""
    return torch.nn.functional.pad(x, (0, GAP))[..., : x.shape[-1]]


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Columns apart, in rows that no multiple of 16 bytes separates, and gaps that are not the kernel's to touch."""
    pairs = torch.stack((x, -x), -1).flatten(-2)
    return torch.nn.functional.pad(pairs, (0, GAP + 1))[..., : 2 * x.shape[-1] : 2]


def laid_out(layout: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a layout's logits are made of rows that lie side by side."""
    if layout in FAR:
        return lambda x: Far.apply(x, FAR[layout])
    return {ALIGNED: apart, STRIDED: every_second}[layout]


def problem_rows(dtype: torch.dtype, layout: str) -> Any:
    """Three rows, the first of which is ignored: so the last element of every tensor is in use."""
    from cases import unrelated

    data = unrelated(3, COLUMNS[layout], dtype=dtype)
    return dataclasses.replace(data, labels=data.labels.roll(1))


def problem_of(case: Any, columns: int) -> Any:
    """What the launchers of kernels are given of a divergence and its parameters."""
    from fusedkd.kernels.device import rows

    form = fusedkd.divergence(case[0], **case[1]).form
    weights = (float(form.target), float(form.nontarget))
    return rows.Problem(form.definition, form.decoupled, tuple(map(float, form.theta)), weights, columns, mix=form.mix)


def share_rows(wanted: bool) -> None:
    """Whether several programs share a row, where they can: nothing but GPUs with few rows asks for it."""
    from fusedkd.backends import triton
    from fusedkd.kernels.device import split_rows

    triton.shares_rows = lambda problem, x: wanted and split_rows.serves(problem)


def _whole(way: Callable[..., None], case: Any, dtype: torch.dtype, layout: str, over: bool) -> None:
    """A launcher of kernels on its own: value and gradient at once, over the logits if asked."""
    from cases import VALUE, expected
    from compare import assert_close, rounding

    from fusedkd.kernels.device import rows

    data = problem_rows(dtype, layout)
    problem = problem_of(case, COLUMNS[layout])._replace(ce_weight=0.25)
    student, teacher = (laid_out(layout)(x.to(dtype)) for x in (data.student, data.teacher))
    labels = data.labels.where(data.labels >= 0, -1)
    out = student if over else laid_out(layout)(emulator.unwritten(torch.empty(student.shape, dtype=dtype)))
    loss, upstream = emulator.unwritten(torch.empty(3)), torch.tensor([1.0, 2.0, -0.5])
    way(problem, rows.Logits(student[None]), rows.Logits(teacher[None]), labels, upstream, out, loss, None)
    truth, value, _ = expected(data.student, data.teacher, data.labels, case, {"reduction": "none", "ce_weight": 0.25})
    wanted = truth.gradient(upstream.double())
    assert_close(loss, value, VALUE, what="loss")
    assert_close(out, wanted, VALUE + rounding(wanted, dtype), dtype=dtype, what="gradient")


def _fused(case: Any, dtype: torch.dtype, layout: str) -> None:
    """kd_value_and_grad."""
    from cases import VALUE, expected
    from compare import assert_close, rounding

    data = problem_rows(dtype, layout)
    student, teacher = (laid_out(layout)(x.to(dtype)) for x in (data.student, data.teacher))
    divergence = fusedkd.divergence(case[0], **case[1])
    options = {"reduction": "none", "temperature": 2.0}
    given = {"divergence": divergence, "backend": "triton", **options}
    loss, gradient = fusedkd.kd_value_and_grad(student, teacher, data.labels, **given)
    truth, value, weights = expected(data.student, data.teacher, data.labels, case, options)
    wanted = truth.gradient(torch.ones_like(value) * weights)
    assert_close(loss, value, VALUE, what="loss")
    assert_close(gradient, wanted, VALUE + rounding(wanted, dtype), dtype=dtype, what="gradient")


def _many_rows(case: Any, dtype: torch.dtype) -> None:
    """More than a grid's second dimension could count, of which the last three are not ignored."""
    from cases import IGNORE, VALUE, expected, unrelated
    from compare import assert_close, rounding

    few, count = unrelated(3, 129, dtype=dtype), (1 << 16) + 3
    student, teacher = (x.to(dtype).repeat(count // 3 + 1, 1)[-count:] for x in (few.student, few.teacher))
    labels = torch.full((count,), IGNORE)
    few = dataclasses.replace(few, labels=torch.tensor([5, 128, 64]))
    labels[-3:] = few.labels
    options = {"reduction": "none"}
    loss, gradient = fusedkd.kd_value_and_grad(
        student, teacher, labels, divergence=fusedkd.divergence(case[0], **case[1]), backend="triton", **options
    )
    truth, value, weights = expected(few.student, few.teacher, few.labels, case, options)
    wanted = truth.gradient(torch.ones_like(value) * weights)
    assert not loss[:-3].any() and not gradient[:-3].any()
    assert_close(loss[-3:], value, VALUE, what="loss")
    assert_close(gradient[-3:], wanted, VALUE + rounding(wanted, dtype), dtype=dtype, what="gradient")


def _listed(logits: torch.Tensor, k: int = 40) -> Any:
    """A top-k teacher of rows, of which the second lacks some tokens."""
    from outcomes import likeliest

    listed = likeliest(logits, k, 2.0)
    listed.ids[1, ::3] = -1
    return listed


def _top_k(case: Any, dtype: torch.dtype, layout: str) -> None:
    """Through autograd and at once."""
    from outcomes import check

    data, more = problem_rows(dtype, layout), {"ce_weight": 0.5} if layout == STRIDED else {}
    listed = _listed(data.teacher)
    labels = torch.where(data.labels >= 0, listed.ids[:, 1], data.labels)
    check(data.student, listed, labels, case, "triton", dtype=dtype, prepare=laid_out(layout), **more)


def _top_k_of_heads(case: Any, dtype: torch.dtype, layout: str) -> None:
    """The gradient takes the place of float32 logits."""
    from cases import side
    from outcomes import check_head

    columns = COLUMNS[layout]
    student = side((3,), columns, 16, softcap=20.0, scale=1.5, bias=True)
    listed = _listed(5 * torch.randn(3, columns, dtype=torch.float64))
    labels = torch.tensor([-100, *listed.ids[1:, 1].tolist()])
    more = {"ce_weight": 0.5} if layout == STRIDED else {}
    check_head(student, listed, labels, case, "triton", dtype=dtype, drop_ignored=False, **more)


def _sharded(case: Any, dtype: torch.dtype, layout: str) -> None:
    """On the one rank of a group: the kernels of a shard, whose columns are all there are."""
    import pytest
    import torch.distributed as dist
    from cases import check_logits
    from sharded import Sharded

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedkd, "kd_loss", Sharded().loss)
        check_logits(problem_rows(dtype, layout), case, "triton", prepare=laid_out(layout))


def run(way: str, case: Any, dtype: torch.dtype, layout: str) -> None:
    """Raises where a number is wrong."""
    import test_token_logprobs
    from cases import check_heads, check_logits, random_labels, side, unrelated

    from fusedkd.kernels.device import rows

    prepare = laid_out(layout)
    share_rows(way == "split rows")
    torch.manual_seed(0)
    if way in ("autograd", "defaults", "split rows", "floor"):
        options = {"support": "floor"} if way == "floor" else {"ce_weight": 0.5} if layout == STRIDED else {}
        check_logits(problem_rows(dtype, layout), case, "triton", prepare=prepare, **options)
    elif way == "fused":
        _fused(case, dtype, layout)
    elif way == "over logits":
        _whole(rows.value_and_gradient, case, dtype, layout, over=True)
    elif way == "streaming":
        heads = (side((3,), COLUMNS[layout] // 4, width) for width in (16, 24))
        labels = random_labels((3,), COLUMNS[layout] // 4).roll(1)
        check_heads(*heads, labels, case, "triton", dtype=dtype, schedule="streaming", reduction="mean")
    elif way == "sharded":
        _sharded(case, dtype, layout)
    elif way == "top-k":
        _top_k(case, dtype, layout)
    elif way == "top-k of heads":
        _top_k_of_heads(case, dtype, layout)
    elif way == "many rows":
        _many_rows(case, dtype)
    else:
        logits = unrelated(3, COLUMNS[layout], dtype=dtype).student
        test_token_logprobs.check(logits, random_labels((3,), 900).roll(1), "triton", dtype, prepare=prepare)


def main(names: list[str]) -> int:
    """All cases that are not slow, or those whose name has one of the words; whether anything is wrong."""
    emulator.install(CAPABILITY)
    import cases

    cases.cuts = lambda backend: False  # compiled kernels round to bfloat16, the interpreter cuts
    wrong = 0
    for name, (way, case, dtype, layout) in (CASES | SLOW).items():
        if not any(word in name for word in names) and (names or name in SLOW):
            continue
        emulator.clear()
        emulator.launched.clear()
        start, error = time.process_time(), None
        try:
            run(way, case, DTYPES[dtype], layout)
        except Exception:
            error = traceback.format_exc(limit=-3)
        found = [finding for finding in emulator.findings() if finding.kind not in emulator.BENIGN]
        wrong |= error is not None or bool(found)
        seconds = round(time.process_time() - start, 1)
        report = {
            "case": name,
            "error": error,
            "findings": found,
            "kernels": dict(emulator.launched),
            "seconds": seconds,
        }
        print(json.dumps(report), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
