"""`fusedkd.plan`: what it says is what a call does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import each

import fusedkd
from fusedkd import loss
from fusedkd.schedules import planner


def test_a_call_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same schedule and chunks, with and without a budget."""
    seen: list[planner.Chosen] = []
    original = planner.choose_schedule

    def noted(*args: Any) -> planner.Chosen:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(loss, "choose_schedule", noted)
    rows, vocabulary = 300, 2000
    student = fusedkd.Head(torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True))
    teacher = fusedkd.Head(torch.randn(rows, 12), torch.randn(vocabulary, 12))
    for options in ({}, {"memory_budget": 70 << 20}, {"schedule": "streaming"}, {"divergence": "jsd"}):
        said = fusedkd.plan(rows, vocabulary, 8, 12, torch.float32, **options)
        fusedkd.kd_loss(student, teacher, **options).backward()
        done = seen[-1]
        assert said.schedule == done.schedule
        assert said.workspace == done.workspace
        if done.chunks is not None:
            assert (said.rows_per_chunk, said.rows_per_product) == (done.chunks.outer, done.chunks.inner)
        else:
            assert said.columns_per_chunk == done.width


def test_products() -> None:
    """Four matrix products, six, eight; fewer where something is frozen."""
    n, v, d = 1024, 32_000, 512
    one = 2.0 * n * v * d
    assert fusedkd.plan(n, v, d).gemm_flops == 4 * one
    assert fusedkd.plan(n, v, d, frozen=("weight",)).gemm_flops == 3 * one
    assert fusedkd.plan(n, v, d, frozen=("weight", "hidden")).gemm_flops == 2 * one
    assert fusedkd.plan(n, v, d, schedule="streaming").gemm_flops == 6 * one
    assert fusedkd.plan(n, v, d, schedule="streaming", divergence="jsd").gemm_flops == 8 * one
    assert fusedkd.plan(n, v, d, reduction="none", device="H200").schedule == "streaming"
    assert fusedkd.plan(n, v, d, reduction="none").schedule == "chunked"


def test_streaming_where_only_it_fits() -> None:
    """A budget below the float32 weight gradient; then one that nothing keeps, and the least that would do."""
    made = fusedkd.plan(8192, 151_936, 2048, 4096, device="H200", memory_budget=1 << 30)
    assert made.schedule == "streaming"
    assert made.workspace <= 1 << 30
    least = r"memory_budget=1000 cannot be kept: .*at least \d+ bytes"
    for schedule in ("auto", "chunked", "streaming"):
        with pytest.raises(ValueError, match=least):
            fusedkd.plan(64, 1000, 16, memory_budget=1000, schedule=schedule)


def test_auto_keeps_a_budget_that_either_schedule_keeps() -> None:
    """Streaming by preference, chunked where only that fits."""
    options: dict[str, Any] = {"device": "H100", "reduction": "none", "frozen": ("weight",)}
    assert fusedkd.plan(8192, 32_000, 512, 1024, **options).schedule == "streaming"
    assert fusedkd.plan(8192, 32_000, 512, 1024, memory_budget=24 << 20, **options).schedule == "chunked"


@each("rows", [1, 16, 128, 2048, 8192])
@each("device", ["cpu", "H200"])
@each("dtype", [torch.float32, torch.bfloat16])
@each("frozen", [(), ("weight",), ("hidden", "weight")])
def test_streaming_never_takes_more(rows: int, device: str, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    """It is asked for to save memory: few tokens do not make its chunks the whole vocabulary, nor many its sums."""
    for vocabulary in (32_000, 151_936):
        chunked, streaming = (
            fusedkd.plan(rows, vocabulary, 256, 512, dtype, device=device, frozen=frozen, schedule=schedule)
            for schedule in ("chunked", "streaming")
        )
        assert streaming.workspace <= chunked.workspace
        assert streaming.columns_per_chunk >= 128, "one tile of a product"


def test_it_reads_well() -> None:
    """Every figure with its unit."""
    text = str(fusedkd.plan(8192, 151_936, 2048, 4096, device="H200"))
    for word in ("chunked", "2048 tokens", "MiB", "TFLOP", "GB", "ms", "not measured"):
        assert word in text
    assert "columns per chunk" in str(fusedkd.plan(64, 1000, 16, schedule="streaming"))


def test_ceilings_scale_the_time() -> None:
    """A faster part takes less time; this machine is measured."""
    slow, fast = (fusedkd.plan(8192, 151_936, 2048, device=part).expected_ms for part in ("A100", "H200"))
    assert slow > 2 * fast
    assert "measured on this device" in fusedkd.plan(8, 100, 16).ceilings


MISTAKES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "N": ({"N": 0}, ValueError, ("N", "> 0")),
    "V": ({"V": 1.5}, TypeError, ("V", "float")),
    "dtype": ({"dtype": torch.int8}, ValueError, ("dtype", "int8")),
    "device": ({"device": "H300"}, ValueError, ("device", "H300", "H200")),
    "frozen": ({"frozen": ("head",)}, ValueError, ("frozen", "head", "weight")),
    "schedule": ({"schedule": "fast"}, ValueError, ("schedule", "fast")),
    "divergence": ({"divergence": "kl"}, ValueError, ("divergence", "kl")),
    "ranks": ({"ranks": 0}, ValueError, ("ranks", "0")),
    "whole rows": ({"divergence": "akl", "schedule": "streaming"}, NotImplementedError, ("akl", "chunked")),
}


@each("mistake", MISTAKES)
def test_bad_arguments(mistake: str) -> None:
    """Named, with what would work."""
    changed, error, words = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        fusedkd.plan(**{"N": 64, "V": 1000, "D_student": 16, **changed})
    for word in words:
        assert word in str(caught.value)


@each("rows", [1, 128, 129, 256, 257, 512, 1000])
def test_chunks_on_a_cpu(rows: int) -> None:
    """At most 256 tokens a product, of equal chunks, and never all of more than 128."""
    made = fusedkd.plan(rows, 32_000, 8, dtype=torch.float32)
    height = made.rows_per_product
    assert made.rows_per_chunk == height <= 256
    assert height <= max(128, -(-rows // 2))
    assert -(-rows // height) * height - rows < -(-rows // height), "the last chunk is shorter than it need be"


@each("vocabulary", [16, 1000, 4096, 8192, 16_384])
def test_few_columns_make_long_chunks_on_a_cpu(vocabulary: int) -> None:
    """Up to 2²¹ logits a side at once, however many tokens that is: what a chunk costs beside them is spread thin."""
    most = (1 << 21) // vocabulary
    for rows in (most, most + 1):
        height = fusedkd.plan(rows, vocabulary, 8, dtype=torch.float32).rows_per_product
        assert height == (rows if rows == most or rows <= 128 else -(-rows // 2))


def test_ranks_take_more_rows_of_fewer_columns() -> None:
    """A chunk of a shard has as many logits as one of the whole vocabulary: collectives are few and large."""
    whole = planner.Shape(1 << 14, 32_000, 32_000, 4096, 4096, 32_000, 4, 2, 2, 4, on_cpu=False, gather=False)
    part = dataclasses.replace(whole, student_width=8000, teacher_width=8000, weight_rows=8000, ranks=4)
    one, shared = (planner.choose(shape, None) for shape in (whole, part))
    assert one.inner * whole.student_width == shared.inner * part.student_width
    assert shared.outer >= shared.inner
