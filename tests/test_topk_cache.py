"""`topk`, which makes a top-k teacher, and the files and formats that one comes from."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each
from test_memory import measure
from torch import Tensor

import fusedkd
from fusedkd import Head, TopK
from fusedkd.schedules import gemm, planner

safetensors_torch = pytest.importorskip("safetensors.torch")

ABSENT = -torch.inf
ROUNDING = 2.0**-24  # of float32, relative


def expected(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities in float64, of equal logits the lower id first, absent where a logit is −inf."""
    values, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    logp = (logits.double() / temperature).log_softmax(-1).gather(-1, ids)[..., :k]
    return ids[..., :k].masked_fill(values[..., :k] == ABSENT, -1), logp.masked_fill(values[..., :k] == ABSENT, ABSENT)


def assert_found(found: TopK, ids: Tensor, logp: Tensor, bound: float = 1e-6) -> None:
    """The same tokens in the same order, and log-probabilities within `bound` and the rounding of the result."""
    assert found.ids.dtype == torch.int32
    assert found.logprobs.dtype == torch.float32
    assert torch.equal(found.ids.long(), ids)
    gap = torch.where(found.logprobs == logp, 0.0, (found.logprobs.double() - logp).abs())
    assert bool((gap <= bound + ROUNDING * logp.abs().clamp(max=1e30)).all()), float(gap.max())
    assert bool((found.logprobs.diff(dim=-1).nan_to_num() <= 0).all())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows at a time, and columns of a Head, in small calls."""
    monkeypatch.setattr(sys.modules["fusedkd.topk"], "_CPU_LOGITS", 1000)
    for name, value in {"_STREAM_LEAST": 64, "_CPU_STREAM": 64}.items():
        monkeypatch.setattr(planner, name, value)


# topk of logits


@pytest.mark.smoke
@each(
    ("offset", "scale", "temperature"), [(0, 3, 1), (1e3, 1, 1), (-1e3, 1, 0.7), (0, 0.1, 1), (0, 20, 2.5), (1e4, 5, 3)]
)
def test_log_probabilities(offset: float, scale: float, temperature: float) -> None:
    """Of a large vocabulary, wherever its logits lie."""
    logits = torch.randn(6, 150_000) * scale + offset
    assert_found(fusedkd.topk(logits, 40, temperature), *expected(logits, 40, temperature))


@each("temperature", [1.0, 1.3, 1.52])
def test_logits_that_all_round_alike(temperature: float) -> None:
    """The bound of the docstring where errors do not average."""
    for top, gap in torch.tensor([[-4.541, 12.373], [13.112, 11.467], [-6.97, 12.47], [0.3, 9.7]]):
        logits = (top - gap * temperature).expand(1, 150_000).clone()
        logits[0, 77] = top
        bound = 2**-23 * (math.log(150_000) + 2)
        assert_found(fusedkd.topk(logits, 3, temperature), *expected(logits, 3, temperature), bound=bound)


@each("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each("k", [1, 7, 60])
@pytest.mark.usefixtures("small_parts")
def test_equal_logits(dtype: torch.dtype, k: int) -> None:
    """The lower id is listed, and listed first; in half precision most logits have equals."""
    logits = torch.randint(-3, 3, (2, 20, 60)).to(dtype)
    logits[0, 0] = 0
    logits[0, 1] = torch.tensor([0.0, -0.0]).repeat(30)
    assert_found(fusedkd.topk(logits, k), *expected(logits, k))


def test_dtypes() -> None:
    """float64 logits keep what float32 would have lost."""
    logits = torch.randn(4, 500, dtype=torch.float64) + 1e8
    assert_found(fusedkd.topk(logits, 9, 0.5), *expected(logits, 9, 0.5))
    for dtype in (torch.bfloat16, torch.float16):
        half = (logits - 1e8).to(dtype)
        assert_found(fusedkd.topk(half, 9), *expected(half, 9))


@pytest.mark.usefixtures("small_parts")
def test_outside_the_support() -> None:
    """−inf is absent; a row of it has nothing."""
    logits = torch.randn(3, 40)
    logits[0, 5:] = ABSENT
    logits[1] = ABSENT
    logits[2, ::2] = ABSENT
    found = fusedkd.topk(logits, 8)
    assert_found(found, *expected(logits, 8))
    assert (found.ids[0] >= 0).sum() == 5
    assert (found.ids[1] == -1).all()
    assert fusedkd.topk(torch.tensor([3e38, -3e38, 0.0]), 3).ids.tolist() == [0, 2, -1]  # float32 has no such log p
    head = Head(
        torch.ones(1, 2), torch.randn(100, 2), torch.full((100,), ABSENT).index_fill(0, torch.tensor([93]), 0.0)
    )
    assert fusedkd.topk(head, 3).ids.tolist() == [[93, -1, -1]]
    assert fusedkd.topk(head, 3).logprobs.tolist() == [[0.0, ABSENT, ABSENT]]


@each("bad", [torch.nan, torch.inf])
@each("k", [2, 40])
def test_rows_without_a_softmax(bad: float, k: int) -> None:
    """NaN, as everywhere, with distinct ids; other rows do not mind."""
    logits = torch.randn(2, 40)
    logits[0, 7] = bad
    found = fusedkd.topk(logits, k)
    assert found.logprobs[0].isnan().all()
    assert len(set(found.ids[0].tolist())) == k
    assert_found(TopK(found.ids[1:], found.logprobs[1:]), *expected(logits[1:], k))


@each("shape", [(), (7,), (0,), (2, 5), (3, 1, 4), (2, 2, 2, 2), (2, 0)])
@pytest.mark.usefixtures("small_parts")
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    """Any, of logits and of hidden states."""
    logits, hidden, weight = torch.randn(*shape, 300), torch.randn(*shape, 4), torch.randn(300, 4)
    assert_found(fusedkd.topk(logits, 3), *expected(logits, 3))
    assert_found(fusedkd.topk(Head(hidden, weight), 3), *expected(hidden @ weight.T, 3), bound=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_strides() -> None:
    """Logits lie as they like."""
    base = torch.randn(80, 6, 9, 2)
    for logits in (
        base[..., 0].permute(1, 2, 0),
        base[:, 0, 0].T,
        base[::2, 1, :, 1].T,
        base[:, :1, :1, 0].squeeze(2).T[0],
    ):
        assert_found(fusedkd.topk(logits, 5), *expected(logits, 5))


# topk of a Head


def head_of(dtype: torch.dtype = torch.float32, n: int = 30, v: int = 1000, **more: Any) -> Head:
    """Hidden states of 16 numbers."""
    return Head(torch.randn(n, 16).to(dtype), torch.randn(v, 16).to(dtype), **more)


def logits_of(head: Head) -> Tensor:
    """In float64, from the operands as they are."""
    x = head.hidden.double() @ head.weight.double().T
    x = head.scale * (x if head.bias is None else x + head.bias.double())
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


HEADS: dict[str, Callable[[], Head]] = {
    "plain": head_of,
    "bias, scale, softcap": lambda: head_of(bias=torch.randn(1000), scale=0.7, softcap=5.0),
    "bfloat16": lambda: head_of(torch.bfloat16),
    "float16, bias": lambda: head_of(torch.float16, bias=torch.randn(1000).half()),
    "bfloat16, float32 bias": lambda: head_of(torch.bfloat16, bias=torch.randn(1000)),
    "float64": lambda: head_of(torch.float64, scale=2.0),
    "strided": lambda: Head(torch.randn(30, 32)[:, ::2], torch.randn(16, 1000).T),
}


@pytest.mark.smoke
@each("name", list(HEADS))
@each("k", [1, 12, 300])
@pytest.mark.usefixtures("small_parts")
def test_heads(name: str, k: int) -> None:
    """As the product in float64; two tokens may change places where their logits are that near."""
    head = HEADS[name]()
    found, logits = fusedkd.topk(head, k, 1.5), logits_of(head)
    ids, logp = expected(logits, k, 1.5)
    at = found.ids.long()
    same = (at == ids).float().mean()
    assert same > 0.99
    assert all(len(set(row)) == k for row in at.tolist())
    exact = (logits / 1.5).log_softmax(-1)
    assert (found.logprobs - exact.gather(-1, at)).abs().max() <= 5e-6
    assert (found.logprobs - logp).abs().max() <= 5e-6


def test_heads_have_the_logits_of_the_same_product() -> None:
    """In one chunk or in several, the log-probabilities are those of its float32 logits."""
    head = head_of(v=5000)
    logits = head.hidden @ head.weight.T
    assert_found(fusedkd.topk(head, 20, 0.8), *expected(logits, 20, 0.8), bound=5e-6)


def test_padded_vocabulary() -> None:
    """Columns beyond vocab_size are nowhere in the softmax."""
    head, logits = head_of(v=200), torch.randn(5, 200)
    logits[:, 190:] = 100.0
    found = fusedkd.topk(logits, 4, vocab_size=190)
    assert_found(found, *expected(logits[:, :190], 4))
    assert (found.vocab_size, found.tail, found.temperature) == (190, "bucket", 1.0)
    whole = fusedkd.topk(head._replace(weight=head.weight[:150]), 4)
    assert torch.equal(fusedkd.topk(head, 4, vocab_size=150).logprobs, whole.logprobs)
    assert fusedkd.topk(logits, 4).vocab_size == 200


def test_autocast() -> None:
    """The product in its dtype, the rest in float32."""
    head = head_of(bias=torch.randn(1000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fusedkd.topk(head, 9)
        of_logits = fusedkd.topk(logits_of(head).float(), 9)
    half = Head(head.hidden.bfloat16(), head.weight.bfloat16(), head.bias)
    assert torch.equal(found.logprobs, fusedkd.topk(half, 9).logprobs)
    assert_found(of_logits, *expected(logits_of(head).float(), 9))


def test_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, and nothing of torch's default dtype and device or of inference mode."""
    head = head_of()
    plain = fusedkd.topk(head, 6)
    hidden = head.hidden.clone().requires_grad_()
    found = fusedkd.topk(Head(hidden, head.weight), 6)
    assert not found.logprobs.requires_grad
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            found = fusedkd.topk(head, 6)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.ids, plain.ids)
    assert torch.equal(found.logprobs, plain.logprobs)


def test_the_matrix_of_logits_is_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Head: chunks of columns, and the results. On either side some rows at a time beside them."""
    monkeypatch.setattr(planner, "_CPU_STREAM", 1 << 17)
    monkeypatch.setattr(sys.modules["fusedkd.topk"], "_CPU_LOGITS", 1 << 15)
    n, v, width = 128, 16_000, 1 << 10
    head, logits = Head(torch.randn(n, 8), torch.randn(v, 8)), torch.randn(n, v)
    for k in (64, 512):
        some = 8 * (1 << 15) * 4
        memory = measure(lambda k=k: fusedkd.topk(head, k))
        assert max(memory.sizes) <= 4 * n * width
        product = 4 * min(n, gemm.BLOCK_TOKENS) * width  # before it is in its place
        assert memory.peak + memory.kept <= 4 * n * width + product + 8 * n * k + some
        memory = measure(lambda k=k: fusedkd.topk(logits, k))
        assert memory.peak + memory.kept <= 8 * n * k + max(some, 8 * 4 * v)


BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "k of 0": (ValueError, "k must lie in [1, 60], got 0", lambda: fusedkd.topk(torch.randn(2, 60), 0)),
    "k above the vocabulary": (ValueError, "k must lie in [1, 60]", lambda: fusedkd.topk(torch.randn(2, 60), 61)),
    "k above vocab_size": (
        ValueError,
        "k must lie in [1, 8]",
        lambda: fusedkd.topk(torch.randn(2, 60), 9, vocab_size=8),
    ),
    "k above 4096": (ValueError, "k must lie in [1, 4096]", lambda: fusedkd.topk(torch.randn(1, 5000), 4097)),
    "a float": (TypeError, "k must be an int", lambda: fusedkd.topk(torch.randn(2, 60), 4.0)),  # pyright: ignore
    "vocab_size": (ValueError, "vocab_size must lie in [1, 60]", lambda: fusedkd.topk(torch.randn(2, 60), 4, 1.0, 61)),
    "temperature": (ValueError, "temperature must be > 0", lambda: fusedkd.topk(torch.randn(2, 60), 4, 0.0)),
    "integers": (TypeError, "side must be float32", lambda: fusedkd.topk(torch.ones(2, 60, dtype=torch.int64), 4)),
    "a Head": (ValueError, "side.hidden", lambda: fusedkd.topk(Head(torch.randn(2, 3), torch.randn(9, 4)), 4)),
    "a TopK": (
        TypeError,
        "side must be a torch.Tensor",
        lambda: fusedkd.topk(fusedkd.topk(torch.randn(2, 60), 4), 2),  # pyright: ignore
    ),
}


@each("name", list(BAD_CALLS))
def test_bad_calls(name: str) -> None:
    """The argument is named."""
    kind, text, call = BAD_CALLS[name]
    with pytest.raises(kind, match=re.escape(text)):
        call()


@each("divergence", ["fkl", "rkl", "jsd"])
def test_as_a_teacher(divergence: str) -> None:
    """With k = V the loss is that of the teacher itself."""
    student, teacher = torch.randn(2, 9, 30)
    whole = fusedkd.kd_loss(student, teacher, divergence=divergence, temperature=2.0)
    loss = fusedkd.kd_loss(student, fusedkd.topk(teacher, 30, 2.0), divergence=divergence, temperature=2.0)
    assert torch.allclose(loss, whole, rtol=2e-5)


# Files


def a_teacher(**more: Any) -> TopK:
    """Of 2 sequences of 5 positions, one of them without a token."""
    logits = torch.randn(2, 5, 50)
    logits[1, 4] = ABSENT
    return fusedkd.topk(logits, 6)._replace(**more)


TEACHERS: dict[str, Callable[[], TopK]] = {
    "as made": a_teacher,
    "int64 ids": lambda: a_teacher(ids=a_teacher().ids.long()),
    "bfloat16": lambda: a_teacher(logprobs=a_teacher().logprobs.bfloat16()),
    "float16": lambda: a_teacher(logprobs=a_teacher().logprobs.half()),
    "fields": lambda: a_teacher(tail="renormalize", temperature=1 / 3, vocab_size=None),
    "strided": lambda: TopK(a_teacher().ids[:, ::2, 1:3], a_teacher().logprobs[:, ::2, 1:3], "truncate"),
    "no rows": lambda: TopK(a_teacher().ids[:0], a_teacher().logprobs[:0]),
    "one row": lambda: TopK(a_teacher().ids[0, 0], a_teacher().logprobs[0, 0]),
}


@pytest.mark.smoke
@each("name", list(TEACHERS))
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Bit for bit, with all fields; ids as int32."""
    teacher = TEACHERS[name]()
    for path in (tmp_path / "teacher.safetensors", str(tmp_path / "as a string")):
        teacher.save(path)
        found = TopK.load(path)
        assert isinstance(found, TopK)
        assert found[2:] == teacher[2:]
        assert found.ids.dtype == torch.int32
        assert torch.equal(found.ids, teacher.ids.int())
        assert found.logprobs.dtype == teacher.logprobs.dtype
        assert torch.equal(found.logprobs, teacher.logprobs)
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left over


ELSEWHERE = """
import os, signal, sys, torch, fusedkd
from fusedkd import caches
teacher = fusedkd.TopK.load(sys.argv[1])
student = torch.load(sys.argv[2]).requires_grad_()
loss = fusedkd.kd_loss(student, teacher, divergence="jsd", reduction="none")
gradient, = torch.autograd.grad(loss.sum(), student)
torch.save((loss.detach(), gradient), sys.argv[3])
caches.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
teacher._replace(tail="renormalize").save(sys.argv[1])
"""


def test_another_process(tmp_path: Path) -> None:
    """It has the same loss and gradient, bit for bit; killed while it saves, it leaves the old file."""
    teacher, student = a_teacher(), torch.randn(2, 5, 50, requires_grad=True)
    names = [str(tmp_path / name) for name in ("teacher", "student", "result")]
    teacher.save(names[0])
    torch.save(student.detach(), names[1])
    run = subprocess.run([sys.executable, "-c", ELSEWHERE, *names], timeout=120)
    assert run.returncode == -signal.SIGKILL
    assert TopK.load(names[0]).tail == "bucket"
    loss = fusedkd.kd_loss(student, teacher, divergence="jsd", reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    theirs = torch.load(names[2])
    assert torch.equal(theirs[0], loss)
    assert torch.equal(theirs[1], gradient)
    assert (loss[1, 4], gradient[1, 4].abs().max()) == (0, 0)


def test_a_loaded_cache_is_the_file(tmp_path: Path) -> None:
    """Mapped, not read; writing to the tensors does not write to the file; saving over it leaves them as they were."""
    ids = torch.arange(256, dtype=torch.int32).repeat(1 << 12, 1)
    path = tmp_path / "teacher"
    TopK(ids, torch.full(ids.shape, -6.0)).save(path)
    before = path.read_bytes()
    found = TopK.load(path)
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
    found.logprobs[0] = -7.0
    assert path.read_bytes() == before
    found._replace(tail="renormalize").save(path)
    assert (found.logprobs[0] == -7.0).all()
    assert torch.equal(TopK.load(path).logprobs, found.logprobs)


def test_permissions(tmp_path: Path) -> None:
    """A file of the user's umask, as any other."""
    a_teacher().save(tmp_path / "teacher")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "teacher").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing beside it."""
    path, teacher = tmp_path / "teacher", a_teacher()
    teacher.save(path)
    before = path.read_bytes()

    def half_way(tensors: Any, name: Path, metadata: Any) -> None:
        Path(name).write_bytes(before[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_torch, "save_file", half_way)
    with pytest.raises(KeyboardInterrupt):
        teacher._replace(tail="renormalize").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_saves(tmp_path: Path) -> None:
    """What no call would take is not written; the file system's complaints are OSErrors."""
    teacher = a_teacher()
    with pytest.raises(ValueError, match=r"TopK\.tail must be one of"):
        teacher._replace(tail="none").save(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"TopK\.ids must lie in \[0, 2147483647\]"):
        teacher._replace(ids=teacher.ids.long() + (1 << 31)).save(tmp_path / "teacher")
    with pytest.raises(FileNotFoundError):
        teacher.save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(OSError):
        teacher.save(tmp_path)
    assert not list(tmp_path.iterdir())


METADATA = {"format": "fusedkd.TopK", "version": "1", "tail": "bucket", "temperature": "2.0", "vocab_size": "none"}
IDS, LOGPROBS = torch.arange(3, dtype=torch.int32).repeat(2, 1), torch.full((2, 3), -3.0)
WRONG: dict[str, tuple[str, dict[str, Tensor], dict[str, str] | None]] = {
    "another program's": ("format None, and must have 'fusedkd.TopK'", {"weight": LOGPROBS}, None),
    "another format": ("format 'pt'", {"ids": IDS, "logprobs": LOGPROBS}, {**METADATA, "format": "pt"}),
    "newer": (
        "it has version 2 of the format, and this fusedkd reads up to 1",
        {"ids": IDS, "logprobs": LOGPROBS},
        {**METADATA, "version": "2"},
    ),
    "no version": ("incomplete", {"ids": IDS, "logprobs": LOGPROBS}, {"format": "fusedkd.TopK"}),
    "no temperature": (
        "incomplete ('temperature')",
        {"ids": IDS, "logprobs": LOGPROBS},
        {k: v for k, v in METADATA.items() if k != "temperature"},
    ),
    "temperature": ("temperature must be > 0", {"ids": IDS, "logprobs": LOGPROBS}, {**METADATA, "temperature": "-1"}),
    "tail": ("tail must be one of", {"ids": IDS, "logprobs": LOGPROBS}, {**METADATA, "tail": "long"}),
    "vocab_size": ("vocab_size must be > 0", {"ids": IDS, "logprobs": LOGPROBS}, {**METADATA, "vocab_size": "0"}),
    "no logprobs": ("it has no logprobs, but ids", {"ids": IDS}, METADATA),
    "no tensors": ("it has no ids and no logprobs, but nothing", {}, METADATA),
    "shapes": ("logprobs must have the shape (2, 3)", {"ids": IDS, "logprobs": LOGPROBS[:1]}, METADATA),
    "no K": ("K from 1 to 4096", {"ids": IDS[:, :0], "logprobs": LOGPROBS[:, :0]}, METADATA),
    "int64": ("its ids are torch.int64, and must be int32", {"ids": IDS.long(), "logprobs": LOGPROBS}, METADATA),
    "float64": ("logprobs must be float32", {"ids": IDS, "logprobs": LOGPROBS.double()}, METADATA),
}


@each("name", list(WRONG))
def test_other_files(name: str, tmp_path: Path) -> None:
    """The file is named, and what is wrong with it."""
    text, tensors, metadata = WRONG[name]
    path = tmp_path / "teacher"
    safetensors_torch.save_file({k: x.contiguous() for k, x in tensors.items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        TopK.load(path)
    assert str(path) in str(error.value)


@each("keep", [0, 5, 100, -1])
def test_truncated_files(keep: int, tmp_path: Path) -> None:
    """Wherever they end."""
    path = tmp_path / "teacher"
    a_teacher().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read .* or not all of one"):
        TopK.load(path)


def test_no_safetensors_files(tmp_path: Path) -> None:
    """Nor a file at all."""
    path = tmp_path / "teacher"
    path.write_bytes(b"PAR1" * 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        TopK.load(path)
    path.write_bytes(pickle.dumps(a_teacher()))
    with pytest.raises(ValueError, match="no safetensors file"):
        TopK.load(path)
    for other in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{other} is no file")):
            TopK.load(other)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: a_teacher().save(tmp_path / "teacher"), lambda: TopK.load(tmp_path / "teacher")):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_the_tuple_that_it_was() -> None:
    """Fields and their order; pickled, too."""
    assert TopK._fields == ("ids", "logprobs", "tail", "temperature", "vocab_size")
    assert pickle.loads(pickle.dumps(a_teacher()))[2:] == ("bucket", 1.0, 50)


# vLLM


def entry(logprob: float, rank: int = 1) -> Any:
    """As vLLM's Logprob."""
    return types.SimpleNamespace(logprob=logprob, rank=rank, decoded_token="?")


def test_vllm_adds_the_token_that_is_there() -> None:
    """Rows of k, k + 1 or no entries; one whose token is among the k likeliest has it once."""
    prompt = [None, {5: entry(-2.5, 3), 9: entry(-0.5), 2: entry(-1.5, 2)}, {7: entry(-0.2), 1: entry(-2.0, 2)}, {}]
    found = TopK.from_vllm(prompt)
    assert found.ids.tolist() == [[-1, -1, -1], [9, 2, 5], [7, 1, -1], [-1, -1, -1]]
    assert found.logprobs[1].tolist() == [-0.5, -1.5, -2.5]
    assert (found.logprobs[found.ids < 0] == ABSENT).all()
    assert found[2:] == ("bucket", 1.0, None)
    assert TopK.from_vllm(prompt, k=2).ids.tolist() == [[-1, -1], [9, 2], [7, 1], [-1, -1]]
    assert TopK.from_vllm(prompt, shift=True).ids.tolist() == [[9, 2, 5], [7, 1, -1], [-1, -1, -1], [-1, -1, -1]]
    merged = TopK.from_vllm([{"4": {"logprob": -1.0}, "token_id:4": {"logprob": -1.0}, 4: -1.0, 3: -1.0}])
    assert merged.ids.tolist() == [[3, 4]]


def test_vllm_objects() -> None:
    """Floats, Logprob, the server's JSON, and numbers of other libraries."""
    logits = torch.randn(4, 20)
    teacher = fusedkd.topk(logits, 3)
    rows = [list(zip(*x, strict=True)) for x in zip(teacher.ids.tolist(), teacher.logprobs.tolist(), strict=True)]
    kinds: dict[str, list[dict[Any, Any]]] = {
        "floats": [dict(row) for row in rows],
        "objects": [{i: entry(x) for i, x in row} for row in rows],
        "json": [{str(i): {"logprob": x, "rank": 1, "decoded_token": "?"} for i, x in row} for row in rows],
        "token ids": [{f"token_id:{i}": x for i, x in row} for row in rows],
        "tensors": [{torch.tensor(i): torch.tensor(x) for i, x in row} for row in rows],
    }
    for name, prompt in kinds.items():
        found = TopK.from_vllm(prompt, temperature=2.0, tail="renormalize", vocab_size=20)
        assert torch.equal(found.ids, teacher.ids.long()), name
        assert torch.equal(found.logprobs, teacher.logprobs), name
        assert found[2:] == ("renormalize", 2.0, 20)


def test_vllm_batches() -> None:
    """Shorter requests have absent positions behind them."""
    first, second = [None, {1: -1.0, 2: -1.5}, {3: -0.5}], [None, {4: -0.1}]
    found = TopK.from_vllm([first, second, None])
    assert found.ids.tolist() == [
        [[-1, -1], [1, 2], [3, -1]],
        [[-1, -1], [4, -1], [-1, -1]],
        [[-1, -1], [-1, -1], [-1, -1]],
    ]
    shifted = TopK.from_vllm([tuple(first), second], shift=True)
    assert shifted.ids[1].tolist() == [[4, -1], [-1, -1], [-1, -1]]
    assert TopK.from_vllm([None, None]).ids.tolist() == [[-1], [-1]]
    assert TopK.from_vllm([]).ids.shape == (0, 1)
    assert TopK.from_vllm([[], [None]]).ids.shape == (2, 1, 1)
    assert TopK.from_vllm([{1: ABSENT, 2: -0.5}]).ids.tolist() == [[2]]


def test_vllm_as_a_teacher() -> None:
    """Shifted, row i is about what the student's logits of position i are about, and the first position is no loss."""
    tokens, logits, student = torch.randint(30, (6,)), torch.randn(6, 30), torch.randn(6, 30)
    logp = logits.log_softmax(-1)
    top = logp.topk(4).indices
    prompt = [None, *({int(i): entry(float(logp[n, i])) for i in (tokens[n + 1], *top[n])} for n in range(5))]
    loss = fusedkd.kd_loss(student, TopK.from_vllm(prompt, k=4, shift=True), reduction="none")
    teacher = fusedkd.topk(logits[:5], 4)
    assert torch.allclose(loss[:5], fusedkd.kd_loss(student[:5], teacher, reduction="none"), rtol=1e-5)
    assert loss[5] == 0


VLLM_ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "chat completions": (ValueError, "tokenizer", [{"token": " the", "logprob": -0.1, "top_logprobs": []}]),
    "completions": (ValueError, "prompt_logprobs[1] has the key ' the'", [None, {" the": -0.1}]),
    "a digit as text": (ValueError, "OpenAI's top_logprobs", [{"7": -0.1}]),
    "pairs": (TypeError, "prompt_logprobs[0][0] must be a dict", [[(3, -0.1)]]),
    "one dict": (TypeError, "prompt_logprobs must be a list", {3: -0.1}),
    "text": (TypeError, "prompt_logprobs must be a list", "3"),
    "no number": (TypeError, "prompt_logprobs[0][3] must have a log-probability", [{3: "x"}]),
    "nothing": (TypeError, "prompt_logprobs[0][3] must have a log-probability", [{3: None}]),
    "NaN": (ValueError, "TopK.from_vllm(...).logprobs must be numbers", [{3: torch.nan}]),
    "logits": (ValueError, "must be log-probabilities of one softmax", [{3: 4.0}]),
    "negative": (ValueError, "TopK.from_vllm(...).ids must lie in", [{-3: -1.0}]),
    "beyond": (ValueError, "TopK.from_vllm(...).ids must lie in [0, 50), or be -1", [{50: -1.0}]),
}


@each("name", list(VLLM_ERRORS))
def test_vllm_errors(name: str) -> None:
    """The position is named where there is one."""
    kind, text, prompt = VLLM_ERRORS[name]
    with pytest.raises(kind, match=re.escape(text)):
        TopK.from_vllm(prompt, vocab_size=50)


# Tensors and columns of others


def test_distillkit() -> None:
    """Log-probabilities as decoded, with the masks of its losses."""
    teacher = a_teacher(ids=a_teacher().ids.long())
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    for given in (mask, mask.bool(), mask.float().unsqueeze(-1)):
        found = TopK.from_distillkit(teacher.ids.clamp(min=0), teacher.logprobs, given, temperature=2.0, vocab_size=50)
        assert torch.equal(found.ids, teacher.ids.masked_fill(mask.unsqueeze(-1) == 0, -1))
        assert torch.allclose(found.logprobs[mask == 1], teacher.logprobs[mask == 1], atol=1e-6)
        assert found[2:] == ("bucket", 2.0, 50)
    entries = torch.arange(6).expand(2, 5, 6) < 4
    assert torch.equal(TopK.from_distillkit(teacher.ids, teacher.logprobs, entries).ids[..., :4], teacher.ids[..., :4])
    assert (TopK.from_distillkit(teacher.ids, teacher.logprobs, entries).ids[..., 4:] == -1).all()


def test_distillkit_quantised() -> None:
    """Probabilities that sum to more than 1 are divided by their sum; those of no softmax are refused."""
    ids, logp = torch.arange(3).expand(2, 3), torch.tensor([[0.6, 0.4, 0.05], [0.5, 0.2, 0.1]]).log()
    found = TopK.from_distillkit(ids, logp)
    assert torch.allclose(found.logprobs.exp().sum(-1), torch.tensor([1.0, 0.8]))
    assert torch.equal(found.logprobs[1], logp[1])
    with pytest.raises(ValueError, match="sum is at most 1"):
        TopK.from_distillkit(ids, logp + 1)


def test_distillkit_logits() -> None:
    """Of the listed tokens alone, so that there is no bucket."""
    logits, ids, student = torch.randn(4, 7), torch.randperm(20)[:7].expand(4, 7), torch.randn(4, 20)
    found = TopK.from_distillkit(ids, logits + 100, log_target=False, tail="renormalize")
    logp, logq = logits.log_softmax(-1), student.gather(1, ids).log_softmax(-1)
    exact = (logp.exp() * (logp - logq)).sum(-1).mean()
    assert torch.allclose(fusedkd.kd_loss(student, found), exact, rtol=1e-4)
    with pytest.raises(ValueError, match=r"log_target=False .* use tail='renormalize'"):
        TopK.from_distillkit(ids, logits, log_target=False)


def test_axolotl_batches() -> None:
    """As its collator pads them, with -1e9 at id 0, and as its data sets do, with −inf and any ids."""
    ids = torch.tensor([[[4, 9, 0], [3, 0, 0], [0, 0, 0], [0, 1, 2]]])
    logp = torch.tensor([[[-0.5, -1.0, -1e9], [0.0, -1e9, -1e9], [-1e9] * 3, [ABSENT] * 3]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]], dtype=torch.int)
    for given in (mask, mask.bool(), None):
        for dtype in (torch.float32, torch.bfloat16):
            found = TopK.from_axolotl(ids, logp.to(dtype), given, temperature=2.0)
            assert found.ids.tolist() == [[[4, 9, -1], [3, -1, -1], [-1] * 3, [-1] * 3]]
            assert found.logprobs.dtype == dtype
            assert found[2:] == ("renormalize", 2.0, None)
    assert TopK.from_axolotl(ids, logp, torch.tensor([[1, 0, 1, 1]])).ids[0, 1].tolist() == [-1, -1, -1]


def test_axolotl_rows() -> None:
    """Nested lists of a data set, ragged; positions without anything, arrays in lists."""
    ids, logp, mask = [[[4, 9], [3], []], [[7, 1, 2]]], [[[-0.5, -1.0], [-0.1], []], [[-0.6, -1.0, -3.0]]], None
    found = TopK.from_axolotl(ids, logp, mask, tail="bucket")
    assert found.ids.tolist() == [[[4, 9, -1], [3, -1, -1], [-1] * 3], [[7, 1, 2], [-1] * 3, [-1] * 3]]
    masked = TopK.from_axolotl(ids, logp, [[[1, 1], [0], []], [[1, 0, 1]]])
    assert masked.ids.tolist() == [[[4, 9, -1], [-1] * 3, [-1] * 3], [[7, -1, 2], [-1] * 3, [-1] * 3]]
    single = TopK.from_axolotl([None, [5, 6]], [None, [-1.0, -2.0]], [[], [1, 1]])
    assert single.ids.tolist() == [[-1, -1], [5, 6]]
    arrays = [torch.tensor([[4, 9], [3, 1]]).numpy()], [torch.tensor([[-1.0, -2.0], [-0.6, -1.0]])]
    assert TopK.from_axolotl(*arrays).ids.tolist() == [[[4, 9], [3, 1]]]
    whole = [torch.tensor([[4, 9]]).numpy(), torch.tensor([[-1.0, -2.0]], dtype=torch.float64).numpy()]
    assert TopK.from_axolotl(*whole).logprobs.dtype == torch.float32


def packed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """As Megatron does: the low 16 bits, and the 17th."""
    return (ids & 0xFFFF).to(torch.uint16), (ids >> 16).bool()


@each("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_megatron(dtype: torch.dtype) -> None:
    """A payload: (S, B, K) in two parts, absent entries with −1e3 and what −1 becomes in 17 bits."""
    ids = torch.tensor([[[70_000, 3, -1]], [[131_071, 65_535, 65_536]], [[-1, -1, -1]]])
    logp = torch.tensor([[[-0.25, -2.0, -1e3]], [[-1.0, -1.5, -3.0]], [[-1e3] * 3]], dtype=dtype)
    assert packed(ids)[0][0, 0, 2] == 65_535
    found = TopK.from_megatron(logp, *packed(ids), vocab_size=1 << 17)
    assert found.ids.tolist() == ids.tolist()
    assert torch.equal(found.logprobs, torch.where(ids < 0, ABSENT, logp))
    assert (found.ids.dtype, found.logprobs.dtype, found.tail) == (torch.int32, dtype, "bucket")
    assert torch.equal(TopK.from_megatron(logp, ids).ids, found.ids)
    small = torch.tensor([[4, 40_000]])
    assert TopK.from_megatron(torch.full((1, 2), -1.0), packed(small)[0]).ids.tolist() == small.tolist()
    loss = fusedkd.kd_loss(torch.randn(3, 1, 1 << 17), found, reduction="none")
    assert loss[2] == 0
    assert (loss[:2] > 0).all()


COLUMNS = torch.arange(3).expand(2, 3), torch.full((2, 3), -2.0)
READER_ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "shapes": (
        ValueError,
        "target_values must have the shape (..., K) of target_ids, (2, 3), got (2, 2)",
        lambda: TopK.from_distillkit(COLUMNS[0], COLUMNS[1][:, :2]),
    ),
    "ids": (TypeError, "target_ids must be int32 or int64", lambda: TopK.from_distillkit(COLUMNS[1], COLUMNS[1])),
    "a mask": (
        ValueError,
        "mask must have the shape (2, 3) of the ids, or that without the last axis, got (3,)",
        lambda: TopK.from_distillkit(*COLUMNS, torch.ones(3)),
    ),
    "no lists": (TypeError, "target_logprobs must be a tensor", lambda: TopK.from_axolotl(COLUMNS[0], 3.0)),
    "twice": (
        ValueError,
        "TopK.from_axolotl(...).ids must be distinct in each row, got 0 twice",
        lambda: TopK.from_axolotl(COLUMNS[0] * 0, COLUMNS[1]),
    ),
    "beyond": (
        ValueError,
        "TopK.from_distillkit(...).ids must lie in [0, 2)",
        lambda: TopK.from_distillkit(*COLUMNS, vocab_size=2),
    ),
    "tail": (ValueError, "tail must be one of", lambda: TopK.from_axolotl(*COLUMNS, tail="zero")),
    "no tensor": (TypeError, "values must be a torch.Tensor", lambda: TopK.from_megatron([1.0], COLUMNS[0])),  # pyright: ignore
    "parts": (
        ValueError,
        "indices_low must have the shape (2, 3) of values",
        lambda: TopK.from_megatron(COLUMNS[1], COLUMNS[0][:1]),
    ),
    "a plane": (
        TypeError,
        "indices_low and bit_17 must be uint16 and bool",
        lambda: TopK.from_megatron(COLUMNS[1], COLUMNS[0], COLUMNS[0] > 0),
    ),
    "floats": (TypeError, "indices_low must be uint16", lambda: TopK.from_megatron(COLUMNS[1], COLUMNS[1])),
}


@each("name", list(READER_ERRORS))
def test_reader_errors(name: str) -> None:
    """The argument is named."""
    kind, text, call = READER_ERRORS[name]
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_readers_are_documented() -> None:
    """Each has its arguments, and what it raises."""
    for name in ("save", "load", "from_vllm", "from_distillkit", "from_axolotl", "from_megatron"):
        method = getattr(TopK, name)
        text = inspect.getdoc(method) or ""
        assert "Raises:" in text
        for argument in list(inspect.signature(method).parameters)[name == "save" :]:
            assert argument in text, (name, argument)
