"""The model of the time: by hand from the counts, and what is committed is what the counts say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each

import fusedkd
from fusedkd.__main__ import main
from fusedkd.bench import compiled, instructions, shapes
from fusedkd.bench import model as bench_model
from fusedkd.kernels.maths.definition import Form
from fusedkd.schedules import ceilings, model, planner

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
COUNTED = json.loads((RESULTS / bench_model.COUNTED).read_text())
SIZES: dict[str, Any] = {"N": 8192, "V": 151_936, "D_student": 2048, "D_teacher": 4096}
PAIRS = SIZES["N"] * SIZES["V"]
H200 = ceilings.TABLE["H200"]


def line_of(name: str, kernel: str, dtype: str, gradient_dtype: str, architecture: str = "sm_90") -> dict[str, Any]:
    """The committed counts of a kernel."""
    wanted = {"architecture": architecture, "name": name, "kernel": kernel, "dtype": dtype}
    wanted["gradient_dtype"] = gradient_dtype
    (line,) = (line for line in COUNTED["kernels"] if wanted.items() <= line.items())
    return line


def rows_of(plan: fusedkd.Plan) -> model.KernelTime:
    """Its one row kernel."""
    (found,) = (kernel for kernel in plan.kernels if not kernel.is_product)
    return found


@pytest.mark.smoke
def test_by_hand() -> None:
    """A row kernel of an H200 from the loops of its inner tiles: every second, but the one that writes zeros."""
    line = line_of("jsd_two", "value_and_gradient", "float32", "bfloat16")
    instructions_a_pair, special, moved = (sum(line[key][:-1:2]) for key in ("instructions", "special", "bytes"))
    found = rows_of(fusedkd.plan(**SIZES, divergence="jsd", device="H200"))
    clock = 989.4e12 / (132 * 4096)
    assert found.issue_ms == pytest.approx(1e3 * PAIRS * instructions_a_pair / (132 * 128 * clock), rel=1e-3)
    assert found.special_ms == pytest.approx(1e3 * PAIRS * special / (132 * 16 * clock), rel=1e-3)
    assert found.bytes_ms == pytest.approx(1e3 * PAIRS * moved / (0.9 * 4.8e12), rel=1e-3)
    assert moved == 3 * 8 + 2
    assert found.launches == 16
    assert found.flops_ms == 0


def test_products_by_hand() -> None:
    """FLOPs of four, at what large products reach; the bytes of the hidden gradient."""
    plan = fusedkd.plan(**SIZES, device="H200")
    products = {kernel.name: kernel for kernel in plan.kernels if kernel.is_product}
    assert len(products) == 4
    assert products["teacher logits"].flops_ms == pytest.approx(1e3 * 2 * PAIRS * 4096 / (0.74 * 989.4e12))
    assert plan.products_ms == pytest.approx(1e3 * plan.gemm_flops / (0.74 * 989.4e12))
    dz, weight, hidden = PAIRS * 2, 4 * SIZES["V"] * 2048 * 2, SIZES["N"] * 2048 * 4
    assert products["hidden gradient"].bytes == dz + weight + hidden
    assert plan.expected_ms == pytest.approx(plan.products_ms + plan.rows_ms)
    assert plan.bytes_moved == sum(kernel.bytes for kernel in plan.kernels)


@each("limit", range(4))
def test_the_longest_counts(limit: int) -> None:
    """Whichever of the four it is; it is named."""
    times = [1.0, 1.0, 1.0, 1.0]
    times[limit] = 2.0
    kernel = model.KernelTime("value", 1, 0.0, *times)
    assert (kernel.ms, kernel.limit) == (2.0, model.LIMITS[limit])


@each("what", ["issue", "fp32", "special", "bytes"])
def test_what_limits(what: str) -> None:
    """Instructions, on an A100 also float32 operations of half the lanes, special functions, bytes."""
    counts = {
        "issue": (900.0, 1, 1, 1),
        "fp32": (100.0, 90, 1, 1),
        "special": (1.0, 1, 90, 1),
        "bytes": (1.0, 1, 1, 900),
    }
    instructions_a_pair, fp32, special, moved = counts[what]
    made = model.Counts(instructions_a_pair, special, fp32, moved)
    work = model.RowWork("value", 1, PAIRS, 2, 2)
    hopper, ampere = (model.time_of_counts(work, made, ceilings.TABLE[part]) for part in ("H200", "A100"))
    assert hopper.limit == ampere.limit == ("issue" if what == "fp32" else what)
    clocks = 1e3 * PAIRS / (108 * ceilings.PARTS["A100"].clock)
    if hopper.limit == "issue":
        assert ampere.ms == pytest.approx(clocks * max(instructions_a_pair / 128, fp32 / 64))


@each("part", ceilings.PARTS)
def test_parts(part: str) -> None:
    """The clock is one that such a part has; every peak is above what is reached."""
    found, best = ceilings.PARTS[part], ceilings.TABLE[part]
    assert 1.3e9 < found.clock < 2e9
    assert best.part is found
    assert best.flops < found.flops and best.bandwidth < found.bandwidth


@pytest.mark.smoke
@each("part", ceilings.PARTS)
@each("name", fusedkd.divergences())
def test_every_divergence_has_counts(part: str, name: str) -> None:
    """Its own in any dtype; streamed, decoupled forms take their bases', and so does, without the mixing, taid."""
    form = fusedkd.divergence(name).form
    online = form.definition.sweep(form.theta)
    own = ("mixed_" if form.mix is not None else "") + form.definition.variant(online, form.decoupled)
    for options in ({}, {"logits_dtype": torch.bfloat16}, {"dtype": torch.float32}, {"frozen": ("hidden", "weight")}):
        plan = fusedkd.plan(**SIZES, divergence=name, device=part, **options)
        assert plan.row_counts == f"{own} on {ceilings.PARTS[part].architecture}"
        assert all(min(rows_of(plan).limits[1:]) > 0 for _ in plan.kernels)
    if form.definition.separable:
        plan = fusedkd.plan(**SIZES, divergence=name, device=part, schedule="streaming")
        base = form.definition.variant(online)
        assert plan.row_counts.split(" on ")[0] in (base, f"{base} without mixing")


def test_others_have_the_counts_of_their_class() -> None:
    """A divergence of one's own; one in a sweep that was counted; a mixture with another base than was counted."""
    two = fusedkd.divergence("jsd").form
    own = Form(dataclasses.replace(two.definition, name="mine"), two.theta)
    found = model.counts_of("value_and_gradient", own, "sm_90", 4, 2)
    assert found.of.endswith(", the costliest of the class 'two'")
    heavier = [model.counts_of("value_and_gradient", fusedkd.divergence(x).form, "sm_90", 4, 2) for x in ("jsd", "tvd")]
    assert all(found.counts.instructions > x.counts.instructions for x in heavier)
    negative = fusedkd.divergence("ab", alpha=-0.5, beta=1.0).form
    assert model.counts_of("value", negative, "sm_90", 2, 2).of == "ab_two"
    mixed = fusedkd.divergence("taid", base="rkl").form
    assert model.counts_of("value", mixed, "sm_90", 2, 2).of == "rkl without mixing"
    assert model.counts_of("value", own._replace(decoupled=True), "sm_90", 2, 2).of == found.of


def test_it_says_what_it_is() -> None:
    """For a part: modelled, with each kernel's limits. For a device that is here: what it said before."""
    text = str(fusedkd.plan(**SIZES, divergence="ab", device="H200"))
    for words in (
        "modelled, not measured (H200 by its data sheet)",
        "counted for ab on sm_90",
        "of row kernels",
        "issue",
    ):
        assert words in text
    for kernel in ("teacher logits", "student logits", "hidden gradient", "weight gradient", "value_and_gradient"):
        assert sum(line.startswith(kernel) for line in text.splitlines()) == 1
    here = fusedkd.plan(64, 1000, 16)
    assert "ms at the device's ceilings (measured on this device)" in str(here)
    assert "modelled" not in str(here)
    assert here.row_counts == ""


@each("schedule", ["chunked", "streaming"])
@each("divergence", ["rkl", "jsd"])
def test_bytes_where_nothing_was_counted(schedule: str, divergence: str) -> None:
    """A device that is no part: the same bytes, from the formulas."""
    there, here = (
        fusedkd.plan(**SIZES, dtype=torch.float32, schedule=schedule, divergence=divergence, device=device)
        for device in ("H200", "cpu")
    )
    counted, said = (
        {kernel.name: kernel.bytes for kernel in plan.kernels if not kernel.is_product} for plan in (there, here)
    )
    assert said == counted
    assert all(kernel.issue_ms == kernel.special_ms == 0 for kernel in here.kernels)


def test_float64_has_no_kernels() -> None:
    """Nothing of ours runs it on a GPU, so nothing was counted."""
    assert fusedkd.plan(**SIZES, dtype=torch.float64, device="H200").row_counts == ""


def test_given_chunks() -> None:
    """The plan's own chunks give the plan."""
    plan = fusedkd.plan(**SIZES, device="B200", divergence="ab")
    chunks = plan.rows_per_chunk, plan.rows_per_product
    assert planner.plan_chunks(*SIZES.values(), "ab", "B200", chunks) == plan


# What is committed


@pytest.mark.smoke
def test_the_planner_s_counts_are_the_committed_ones() -> None:
    """Written again by python -m fusedkd bench model --out bench/results."""
    assert model.COUNTS.read_text(encoding="utf-8") == bench_model.text_of(bench_model.counts(COUNTED))


def test_the_page_is_up_to_date() -> None:
    """The same command writes it; no figure stands there without what it is."""
    text = (RESULTS / bench_model.PAGE).read_text(encoding="utf-8")
    assert text == bench_model.page(COUNTED)
    for table in bench_model.tables(COUNTED):
        assert "odelled, not measured" in table.about or "Counted" in table.about or "data sheets" in table.about
    assert (ROOT / "docs" / "model.md").read_text().count(f'--8<-- "bench/results/{bench_model.PAGE}"') == 1


def test_everything_is_counted() -> None:
    """Each variant, architecture and dtype, by the Triton that counted the rest."""
    names = {(x["architecture"], x["name"]) for x in COUNTED["kernels"]}
    assert names == {(where, name) for where in instructions.ARCHITECTURES for name in instructions.DIVERGENCES}
    assert {part.architecture for part in ceilings.PARTS.values()} == set(instructions.ARCHITECTURES)
    assert COUNTED["triton"] == compiled.load(RESULTS)["triton"]


@each("dtype", ["bf16", "fp32"])
@each("name", ["fkl", "rkl", "drkl", "ab", "jsd", "akl", "amid", "taid"])
def test_bytes_are_the_sectors_that_were_executed(dtype: str, name: str) -> None:
    """What the loops ask for, against the emulator's sectors of aligned rows, which a row's ends add a few to."""
    form, width = fusedkd.divergence(name).form, 2 if dtype == "bf16" else 4
    (case,) = (
        case
        for case in compiled.load(RESULTS)["cases"]
        if [case[key] for key in ("way", "divergence", "dtype", "rows")] == ["autograd", name, dtype, "aligned"]
    )
    for kernel in ("value", "gradient"):
        found = case["kernels"][f"rows.py:_{kernel}"]
        executed = 32 * (found["load_sectors"] + found["store_sectors"]) / (case["n"] * case["columns"])
        modelled = model.counts_of(kernel, form, case["architecture"], width, width).counts.bytes
        assert 1 <= executed / modelled < 1.06


@each("name", ["fkl", "rkl", "ab", "jsd"])
def test_little_is_left_to_integers(name: str) -> None:
    """Less than half of the instructions are of other pipes, which have half the lanes: so these never limit."""
    counts = model.counts_of("value_and_gradient", fusedkd.divergence(name).form, "sm_90", 4, 2).counts
    assert counts.fp32 + counts.special > counts.instructions / 2


def test_shapes_are_those_of_the_goals() -> None:
    """Both vocabularies, students of both widths."""
    sizes = {(shape.rows, shape.vocab, shape.dim, shape.teacher_dim) for shape in bench_model.HEADS}
    assert sizes == {(8192, v, d, 4096) for v in (151_936, 128_256) for d in (2048, 4096)}
    assert shapes.QWEN3 in bench_model.HEADS


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Prints the tables, or writes both files; a folder without counts is refused with what writes them."""
    table, results = tmp_path / "counts.json", tmp_path / "results"
    monkeypatch.setattr(model, "COUNTS", table)
    assert main(["bench", "model"]) == 0
    assert capsys.readouterr().out == bench_model.page(COUNTED) + "\n"
    assert not table.exists()
    with pytest.raises(SystemExit):
        main(["bench", "model", "--out", str(results)])
    assert "python -m fusedkd.bench.instructions --out" in capsys.readouterr().err
    (results / bench_model.COUNTED).write_text(json.dumps(COUNTED))
    assert main(["bench", "model", "--out", str(results)]) == 0
    assert (results / bench_model.PAGE).read_text() == (RESULTS / bench_model.PAGE).read_text()
    assert json.loads(table.read_text())["counts"] == bench_model.counts(COUNTED)
