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

CAPABILITY = 90
ALIGNED, STRIDED = "aligned", "strided"
# More than one tile of most classes; multiples of 16 columns, or rows that begin anywhere with columns apart.
COLUMNS = {ALIGNED: 5008, STRIDED: 1003}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDE = [("bf16", ALIGNED), ("bf16", STRIDED), ("fp32", ALIGNED), ("fp32", STRIDED)]
CROSSED = [("bf16", ALIGNED), ("fp32", STRIDED)]
# ways through the kernels: divergences, each with the classes of dtype and layout that it is run with
WAYS: dict[str, list[tuple[str, dict[str, Any], list[tuple[str, str]]]]] = {
    "autograd": [
        ("rkl", {}, WIDE),  # one sweep, few sums
        ("ab", {}, CROSSED),  # one sweep, many sums
        ("jsd", {}, CROSSED),  # two sweeps
        ("akl", {}, CROSSED),  # a search over the row
        ("amid", {}, CROSSED),  # gathered parameters
        ("taid", {}, CROSSED),  # a mixed teacher
        ("drkl", {"target_token": "teacher_argmax"}, CROSSED),
    ],
    "fused": [("rkl", {}, WIDE), ("jsd", {}, CROSSED), ("drkl", {}, CROSSED)],
    "over logits": [("rkl", {}, CROSSED), ("jsd", {}, CROSSED)],  # the gradient takes their place
    "parts": [("rkl", {}, WIDE), ("jsd", {}, CROSSED)],
    "one read": [("rkl", {}, WIDE), ("jsd", {}, CROSSED), ("drkl", {}, CROSSED)],
    "streaming": [("rkl", {}, CROSSED), ("jsd", {}, CROSSED)],
    "log-probabilities": [("", {}, WIDE)],
    "floor": [("rkl", {}, CROSSED)],
}
CASES = {
    "-".join(filter(None, (way, name, *params.values(), dtype, layout))): (way, (name, params), dtype, layout)
    for way, cases in WAYS.items()
    for name, params, classes in cases
    for dtype, layout in classes
}


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Columns apart, in rows that no multiple of 16 bytes separates."""
    return torch.cat((torch.stack((x, -x), -1).flatten(-2), x[..., :1]), -1)[..., : 2 * x.shape[-1] : 2]


def problem_rows(dtype: torch.dtype, layout: str) -> Any:
    """Three rows, the first of which is ignored: so the last element of every tensor is in use."""
    from cases import unrelated

    data = unrelated(3, COLUMNS[layout], dtype=dtype)
    return dataclasses.replace(data, labels=data.labels.roll(1))


def problem_of(case: Any, columns: int) -> Any:
    """What the launchers of kernels are given of a divergence and its parameters."""
    import fusedkd
    from fusedkd.kernels import rows

    form = fusedkd.divergence(case[0], **case[1]).form
    weights = (float(form.target), float(form.nontarget))
    return rows.Problem(form.definition, form.decoupled, tuple(map(float, form.theta)), weights, columns, mix=form.mix)


def split_rows(wanted: bool) -> None:
    """Whether several programs share a row, where they can: nothing but GPUs with few rows asks for it."""
    from fusedkd import backends
    from fusedkd.kernels import parts

    backends.splits_rows = lambda problem, x: wanted and parts.serves(problem)


def _whole(way: Callable[..., None], case: Any, dtype: torch.dtype, layout: str, over: bool) -> None:
    """A launcher of kernels on its own: value and gradient at once, over the logits if asked."""
    from cases import VALUE, expected
    from close import assert_close, rounding

    from fusedkd.kernels import rows

    data = problem_rows(dtype, layout)
    problem = problem_of(case, COLUMNS[layout])._replace(ce_weight=0.25)
    student, teacher = data.student.to(dtype), data.teacher.to(dtype)
    if layout == STRIDED:
        student, teacher = every_second(student), every_second(teacher)
    labels = data.labels.where(data.labels >= 0, -1)
    out = student if over else emulator.unwritten(torch.empty_like(student))
    loss, upstream = emulator.unwritten(torch.empty(3)), torch.tensor([1.0, 2.0, -0.5])
    way(problem, rows.Side(student[None]), rows.Side(teacher[None]), labels, upstream, out, loss, None)
    truth, value, _ = expected(data.student, data.teacher, data.labels, case, {"reduction": "none", "ce_weight": 0.25})
    wanted = truth.gradient(upstream.double())
    assert_close(loss, value, VALUE, what="loss")
    assert_close(out, wanted, VALUE + rounding(wanted, dtype), dtype=dtype, what="gradient")


def _fused(case: Any, dtype: torch.dtype, layout: str) -> None:
    """kd_value_and_grad."""
    from cases import VALUE, expected
    from close import assert_close, rounding

    import fusedkd

    data = problem_rows(dtype, layout)
    student, teacher = data.student.to(dtype), data.teacher.to(dtype)
    if layout == STRIDED:
        student, teacher = every_second(student), every_second(teacher)
    divergence = fusedkd.divergence(case[0], **case[1])
    options = {"reduction": "none", "temperature": 2.0}
    given = {"divergence": divergence, "backend": "triton", **options}
    loss, gradient = fusedkd.kd_value_and_grad(student, teacher, data.labels, **given)
    truth, value, weights = expected(data.student, data.teacher, data.labels, case, options)
    wanted = truth.gradient(torch.ones_like(value) * weights)
    assert_close(loss, value, VALUE, what="loss")
    assert_close(gradient, wanted, VALUE + rounding(wanted, dtype), dtype=dtype, what="gradient")


def run(way: str, case: Any, dtype: torch.dtype, layout: str) -> None:
    """Raises where a number is wrong."""
    import test_token_logprobs
    from cases import check_heads, check_logits, random_labels, side, unrelated

    from fusedkd.kernels import parts, rows

    prepare = every_second if layout == STRIDED else torch.Tensor.contiguous
    split_rows(way == "parts")
    torch.manual_seed(0)
    if way in ("autograd", "parts", "floor"):
        options = {"support": "floor"} if way == "floor" else {"ce_weight": 0.5} if layout == STRIDED else {}
        check_logits(problem_rows(dtype, layout), case, "triton", prepare=prepare, **options)
    elif way == "fused":
        _fused(case, dtype, layout)
    elif way == "over logits":
        _whole(rows.value_and_gradient, case, dtype, layout, over=True)
    elif way == "one read":
        _whole(parts.one_read, case, dtype, layout, over=layout == STRIDED)
    elif way == "streaming":
        heads = (side((3,), COLUMNS[layout] // 4, width) for width in (16, 24))
        labels = random_labels((3,), COLUMNS[layout] // 4).roll(1)
        check_heads(*heads, labels, case, "triton", dtype=dtype, schedule="streaming", reduction="mean")
    else:
        test_token_logprobs.check(
            unrelated(3, COLUMNS[layout], dtype=dtype).student, random_labels((3,), 900).roll(1), "triton", dtype
        )


def main(names: list[str]) -> None:
    """All cases, or those whose name has one of the words."""
    emulator.install(CAPABILITY)
    import cases

    cases.cuts = lambda backend: False  # compiled kernels round to bfloat16, the interpreter cuts
    for name, (way, case, dtype, layout) in CASES.items():
        if names and not any(word in name for word in names):
            continue
        emulator.clear()
        emulator.launched.clear()
        start, error = time.process_time(), None
        try:
            run(way, case, DTYPES[dtype], layout)
        except Exception:
            error = traceback.format_exc(limit=-3)
        found = [finding for finding in emulator.findings() if finding.kind not in emulator.BENIGN]
        seconds = round(time.process_time() - start, 1)
        report = {
            "case": name,
            "error": error,
            "findings": found,
            "kernels": dict(emulator.launched),
            "seconds": seconds,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
