"""On a GPU: every kernel against float64, at tiles, sizes and strides that the interpreter is too slow for.

`make gpu` runs this file in three parts: the tests named large alone, because of their memory, memcheck alone, because
it is slow, and the rest on several processes, because most of their time goes into compiling.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ALL,
    DEFAULTS,
    DISTINCT,
    IGNORE,
    LARGE_VOCABULARY,
    TYPICAL,
    VALUE,
    Case,
    check_heads,
    check_logits,
    each,
    expected,
    random_labels,
    side,
    unrelated,
)
from compare import assert_close, relative, rounding
from test_logits import LAYOUTS
from test_sync import MORE, OPTIONS, WAYS, at_once, logprob, small_chunks, step
from torch import Tensor

import fusedkd
from fusedkd.bench.cases import HeadInputs, RowInputs, answer, errors, truth
from fusedkd.bench.measure import peak_bytes
from fusedkd.kernels.device import rows, split_rows

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; `make gpu` runs this file on a machine that has one", allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
V = 5003  # odd, and longer than the widest tile
SIZES = {32_000: "aligned", 50_257: "odd", 128_256: "Llama 3", LARGE_VOCABULARY: "Qwen3", 262_144: "a power of two"}
HALF = 5e-3  # of bfloat16 gradients of heads: dZ and the result are rounded, nothing else is


@each("case", ALL)
def test_logits(case: Case) -> None:
    """Every divergence in every setting, value and gradient through autograd."""
    check_logits(unrelated(7, V), case, "triton", typical=TYPICAL)


@each("case", DEFAULTS)
@each("dtype", HALVES)
def test_half_logits(case: Case, dtype: torch.dtype) -> None:
    """Half precision in and out costs the rounding of the gradient."""
    check_logits(unrelated(7, V, dtype=dtype), case, "triton")


@each("case", [case for case in DEFAULTS if case[0] not in ("amid", "akl")])
@each("rows_", [3, 300])
def test_shared_rows(case: Case, rows_: int) -> None:
    """Several programs per row: as one program per row, and the same bits twice."""
    name, params = case
    form = fusedkd.divergence(name, **params).form
    problem = rows.Problem(form.definition, form.decoupled, form.theta, (form.target, form.nontarget), V, mix=form.mix)
    student, teacher = (5 * torch.randn(1, rows_, 4 * V, device="cuda") for _ in range(2))
    labels = random_labels((rows_,), V).cuda()
    labels[labels == IGNORE] = -1
    upstream = torch.rand(rows_, device="cuda")

    def run(way: Any) -> tuple[Tensor, Tensor]:
        gradient, loss = student[0].new_full((rows_, 4 * V), torch.nan), upstream.new_full((rows_,), torch.nan)
        way(problem, rows.Logits(student), rows.Logits(teacher), labels, upstream, gradient, loss, None)
        return gradient, loss

    usual = run(rows.value_and_gradient)
    first, second = run(split_rows.value_and_gradient), run(split_rows.value_and_gradient)
    for ours, again, theirs in zip(first, second, usual, strict=True):
        assert torch.equal(ours, again)
        assert_close(ours, theirs.double().cpu(), VALUE)


@each("case", DEFAULTS)
@each("dtype", DTYPES)
def test_value_and_gradient(case: Case, dtype: torch.dtype) -> None:
    """The kernel that does both in one launch."""
    name, params = case
    rows = unrelated(7, V, dtype=dtype)
    exact, value, weights = expected(rows.student, rows.teacher, rows.labels, case, {})
    sides = (x.to("cuda", dtype) for x in (rows.student, rows.teacher))
    made = fusedkd.divergence(name, **params)
    assert rows.labels is not None
    loss, grad = fusedkd.kd_value_and_grad(*sides, rows.labels.cuda(), divergence=made)
    assert_close(loss, value, VALUE)
    wanted = exact.gradient(weights)
    assert_close(grad, wanted, VALUE + rounding(wanted, dtype), dtype=dtype)


@each("case", DEFAULTS)
@each("dtype", DTYPES)
@each("reduction", ["mean", "none"])
def test_heads(case: Case, dtype: torch.dtype, reduction: str) -> None:
    """Matrix products of cuBLAS with float32 results around the row kernels; the second reduction recomputes."""
    sides = side((3, 5), V, 64, bias=True, softcap=20.0), side((3, 5), V, 96)
    check_heads(*sides, random_labels((3, 5), V), case, "triton", dtype=dtype, reduction=reduction)


@each("case", [("rkl", {}), ("drkl", {}), ("jsd", {})])
@each("layout", LAYOUTS)
@each("dtype", [torch.float32, torch.bfloat16])
def test_layouts(case: Case, layout: str, dtype: torch.dtype) -> None:
    """Views of larger memory, aligned to nothing."""
    check_logits(unrelated(2, 3, V, dtype=dtype), case, "triton", prepare=LAYOUTS[layout])


@each("case", DISTINCT)
@each("vocabulary", SIZES)
def test_vocabularies(case: Case, vocabulary: int) -> None:
    """Real vocabularies: many tiles, ends that are not a tile's."""
    check_logits(unrelated(2, vocabulary, ignored=False), case, "triton", typical=TYPICAL)


@each("case", [("fkl", {}), ("drkl", {}), ("jsd", {})])
@each("rows", [1, 2, 63, 64, 65, 1000])
def test_few_and_many_rows(case: Case, rows: int) -> None:
    """A launch that fills one multiprocessor, or all of them several times."""
    inputs = random_logits(rows, 4099, torch.float32)
    assert max(found(inputs, case[0]).values()) < VALUE


def random_logits(rows: int, columns: int, dtype: torch.dtype) -> RowInputs:
    """Logits of standard deviation 5, made on the device."""
    student, teacher = (torch.randn(rows, columns, device="cuda", dtype=dtype).mul_(5) for _ in range(2))
    return RowInputs(student.requires_grad_(), teacher, torch.randint(columns, (rows,), device="cuda"))


def random_heads(rows: int, columns: int, width: int, dtype: torch.dtype) -> HeadInputs:
    """Heads whose logits have standard deviation 5, made on the device."""
    hidden, teacher_hidden = (torch.randn(rows, width, device="cuda", dtype=dtype) for _ in range(2))
    weights = (torch.randn(columns, width, device="cuda", dtype=dtype).mul_(5 / width**0.5) for _ in range(2))
    weight, teacher_weight = weights
    labels = torch.randint(columns, (rows,), device="cuda")
    return HeadInputs(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels)


def loss_of(divergence: str | fusedkd.Divergence, **options: Any) -> Callable[[RowInputs | HeadInputs], Tensor]:
    """kd_loss on either kind of inputs."""

    def loss(x: RowInputs | HeadInputs) -> Tensor:
        heads = isinstance(x, HeadInputs)
        student = fusedkd.Head(x.hidden, x.weight) if heads else x.student
        teacher = fusedkd.Head(x.teacher_hidden, x.teacher_weight) if heads else x.teacher
        return fusedkd.kd_loss(student, teacher, x.labels, divergence=divergence, **options)

    return loss


def found(inputs: RowInputs | HeadInputs, name: str) -> dict[str, float]:
    """Errors of loss and gradients against float64 on the device."""
    return errors(answer(inputs, loss_of(name)), truth(inputs, name))


def room(gigabytes: float) -> None:
    """Skip where the device is too small."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of device memory, {free:.0f} are free")


@each("name", ["rkl", "drkl", "jsd"])
def test_large_row_count(name: str) -> None:
    """More rows than a grid has in its second dimension."""
    inputs = random_logits(70_001, 257, torch.float32)
    assert max(found(inputs, name).values()) < VALUE


@pytest.mark.unpoisoned
@each("at_once", [True, False])
def test_large_logits(at_once: bool) -> None:
    """N·V beyond 2³¹: the last rows, whose offsets need 64 bits, are as exact as the first."""
    room(30)
    rows = 14_300
    inputs = random_logits(rows, LARGE_VOCABULARY, torch.bfloat16)
    assert inputs.student.numel() > 2**31
    options = {"divergence": "drkl", "reduction": "none"}
    if at_once:
        loss, grad = fusedkd.kd_value_and_grad(inputs.student, inputs.teacher, inputs.labels, **options)
    else:
        loss = fusedkd.kd_loss(inputs.student, inputs.teacher, inputs.labels, **options)
        (grad,) = torch.autograd.grad(loss.sum(), inputs.student)
    for start in (0, rows // 2, rows - 8):
        part = RowInputs(*(x[start : start + 8] for x in inputs))
        exact = truth(part, "drkl")
        assert relative(loss.detach()[start : start + 8].mean().cpu(), exact.loss.cpu()) < VALUE
        wanted = 8 * exact.gradients["logits"].cpu()
        assert relative(grad[start : start + 8].cpu(), wanted) < VALUE + rounding(wanted, torch.bfloat16)


@pytest.mark.unpoisoned
def test_large_heads() -> None:
    """The same through heads: 70,000 tokens times 151,936 words, which only pass by in chunks."""
    room(40)
    inputs = random_heads(70_000, LARGE_VOCABULARY, 64, torch.bfloat16)
    assert max(found(inputs, "rkl").values()) < HALF


@each("case", DISTINCT)
@each("dtype", [torch.float32, torch.bfloat16])
@each("kind", ["logits", "heads"])
def test_deterministic(case: Case, dtype: torch.dtype, kind: str) -> None:
    """Two runs give the same bits."""
    name, params = case
    inputs = random_logits(130, V, dtype) if kind == "logits" else random_heads(1300, V, 64, dtype)
    loss = loss_of(fusedkd.divergence(name, **params))
    first, second = (answer(inputs, loss) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), f"gradient of {key}"


@pytest.mark.unpoisoned
@each("slack", [1.0, 1.5])
def test_memory_budget(slack: float) -> None:
    """The allocator's own peak keeps a budget, down to the least that is accepted."""
    inputs = random_heads(3000, 50_257, 128, torch.bfloat16)
    answer(inputs, loss_of("rkl"))  # cuBLAS makes its workspace once
    with pytest.raises(ValueError, match="memory_budget") as refusal:
        loss_of("rkl", memory_budget=1)(inputs)
    least = max(int(number) for number in re.findall(r"\d+", str(refusal.value)))
    budget = int(least * slack)
    peak = peak_bytes(lambda: answer(inputs, loss_of("rkl", memory_budget=budget)).gradients, "cuda")
    assert peak <= budget


def never_waits(work: Callable[[], None]) -> None:
    """The second time, with all kernels compiled, nothing makes the host wait."""
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kind", "schedule", "name"), WAYS)
@each("reduction", ["mean", "none"])
def test_no_synchronisation(
    kind: str, schedule: str, name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of test_sync.py on a device that would be waited for."""
    small_chunks(monkeypatch)
    never_waits(lambda: step(kind, "cuda", schedule=schedule, divergence=name, reduction=reduction))


@pytest.mark.parametrize(("kind", "schedule", "more"), OPTIONS)
def test_no_synchronisation_for_options(kind: str, schedule: str, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adds work between the kernels."""
    small_chunks(monkeypatch)
    never_waits(lambda: step(kind, "cuda", schedule=schedule, **MORE[more]("cuda")))


def test_no_synchronisation_elsewhere() -> None:
    """kd_value_and_grad and token_logprobs; torch's check hears what is documented to wait."""
    never_waits(lambda: at_once("cuda"))
    for kind in ("logits", "heads"):
        never_waits(lambda kind=kind: logprob(kind, "cuda"))
    with pytest.raises(RuntimeError, match="synchroniz"):
        never_waits(lambda: step("heads", "cuda", drop_ignored=True))


@each("dtype", DTYPES)
@each("k", [1, 100, 4096])
def test_topk(dtype: torch.dtype, k: int) -> None:
    """The tokens that a CPU lists, without a wait; equal logits, of which half precision is full, by id."""
    logits = torch.randn(40, 50_257, device="cuda").to(dtype)
    found, exact = fusedkd.topk(logits, k, 1.5), fusedkd.topk(logits.cpu(), k, 1.5)
    assert torch.equal(found.ids.cpu(), exact.ids)
    assert (found.logprobs.cpu() - exact.logprobs).abs().max() < 4e-6
    head = fusedkd.Head(*(torch.randn(n, 64, device="cuda").to(dtype) for n in (300, 50_257)))
    found, dense = fusedkd.topk(head, k), (head.hidden.double() @ head.weight.double().T).log_softmax(-1)
    assert (found.logprobs.double() - dense.topk(k).values).abs().max() < 1e-4
    for given in (logits, head):
        never_waits(lambda given=given: fusedkd.topk(given, k))


MEMCHECK = """
import torch
import fusedkd

torch.manual_seed(0)
labels = torch.tensor([5, -100, 1000], device="cuda")
for name in fusedkd.divergences():
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (torch.randn(3, 1003, device="cuda").to(dtype)[:, 1:] for _ in range(2))
        fusedkd.kd_loss(student.requires_grad_(), teacher, labels, divergence=name).backward()
        fusedkd.kd_value_and_grad(student.detach(), teacher, labels, divergence=name)
torch.cuda.synchronize()
print("done")
"""


def test_memcheck() -> None:
    """compute-sanitizer sees no access out of bounds; every tensor has an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", MEMCHECK]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    output = done.stdout + done.stderr
    if "not supported" in output and "done" not in output:
        pytest.skip(f"compute-sanitizer refuses this device: {output.strip().splitlines()[0]}")
    assert done.returncode == 0, output[-3000:]
    assert "done" in output
