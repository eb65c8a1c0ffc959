"""backend="compiled": the rows of a CPU through torch.compile, against the same float64 oracle and bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    ARGMAX,
    LARGE_VOCABULARY,
    ODD,
    ROW,
    VALUE,
    Case,
    Rows,
    check_heads,
    check_logits,
    each,
    near,
    random_labels,
    side,
    unrelated,
)
from compare import assert_close

import fusedkd
from fusedkd.backends import torch_rows

pytestmark = pytest.mark.xdist_group("compiled")  # one process, so that a graph is compiled once
KINDS: list[Case] = [("rkl", {}), ("hellinger", ARGMAX)]  # one sweep; two, and a target of its own


@each("case", KINDS)
def test_rows(case: Case) -> None:
    """Apart and close, ignored rows between others, one token nearly certain, −inf on both sides."""
    check_logits(unrelated(5, ODD), case, "compiled")
    check_logits(near(1.4e-2, 6, ODD), case, "compiled", per_row=ROW)
    check_logits(near(1.4e-4, 7, ODD), case, "compiled", per_row=ROW)
    rows = unrelated(4, ODD, std=2.0, ignored=False)
    top = (rows.labels + 5) % ODD
    certain = rows.student.scatter(-1, top[:, None], rows.student.amax(-1, keepdim=True) + 20.0)
    check_logits(Rows.of(certain, rows.teacher, rows.labels), case, "compiled", per_row=ROW)
    student, teacher = rows.student.clone(), rows.teacher.clone()
    student[:, 1::4] = teacher[:, 1::2] = -torch.inf
    check_logits(Rows.of(student, teacher, rows.labels // 2 * 2), case, "compiled")
    for broken in (rows.student, rows.teacher):
        broken[1, 7] = torch.nan
        name, params = case
        loss, _ = fusedkd.kd_loss(
            rows.student.float().requires_grad_(),
            rows.teacher.float(),
            rows.labels,
            divergence=fusedkd.divergence(name, **params),
            reduction="none",
            return_stats=True,
            backend="compiled",
        )
        assert loss.isnan().tolist() == [False, True, False, False]


def test_top_k() -> None:
    """The row work of outcomes."""
    student, teacher = 3 * torch.randn(2, 5, ODD)
    logprobs, ids = teacher.log_softmax(-1).topk(20)
    listed, found = fusedkd.TopK(ids, logprobs), []
    for backend in ("compiled", "torch"):
        leaf = student.clone().requires_grad_()
        given = {"divergence": "rkl", "reduction": "none", "return_stats": True, "backend": backend}
        loss, _ = fusedkd.kd_loss(leaf, listed, torch.full((5,), 7), **given)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        found.append((loss.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs.double(), VALUE)


def test_long_rows() -> None:
    """A real vocabulary: loops that add one by one must not lose what torch's sums keep."""
    check_logits(unrelated(4, LARGE_VOCABULARY, ignored=False), ("rkl", {}), "compiled", per_row=VALUE)


def test_half_precision_and_strides() -> None:
    """bfloat16 logits are widened column by column, and views are read and written in place."""
    rows = unrelated(5, 260, dtype=torch.bfloat16)
    check_logits(rows, ("rkl", {}), "compiled", prepare=lambda x: x.mT.contiguous().mT)


def test_heads() -> None:
    """Everything that shapes logits, a mixed teacher with a weight per token, a cross-entropy over more columns; the
    gradient is written over the logits that it comes from."""
    student = side((2, 3), 515, 32, bias=True, scale=0.7, softcap=8.0)
    teacher = side((2, 3), 515, 48, bias=True, softcap=8.0)
    case = ("taid", {"t": torch.linspace(0.1, 0.9, 6).view(2, 3), "base": "drkl"})
    labels = random_labels((2, 3), 400)
    options = {"reduction": "mean", "ce_weight": 0.3, "temperature": 2.0, "vocab_size": 400}
    check_heads(student, teacher, labels, case, "compiled", **options)


@pytest.mark.smoke
@each(
    "refused", [({"divergence": "amid"}, "amid"), ({"divergence": "akl"}, "akl"), ({"dtype": torch.float64}, "float64")]
)
def test_what_is_not_compiled(refused: tuple[dict[str, Any], str]) -> None:
    """The kernels' series are those of float32, and what searches its rows takes minutes to compile."""
    given, word = refused
    logits = torch.randn(2, 8, dtype=given.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=rf"{word}.* need.* backend=\"torch\", got backend=\"compiled\""):
        fusedkd.kd_loss(logits, logits, backend="compiled", **given)


def test_other_refusals() -> None:
    """A schedule without whole rows, log-probabilities, a device that is no CPU."""
    head, logits = fusedkd.Head(torch.randn(3, 4), torch.randn(8, 4)), torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match='"streaming" cannot do backend="compiled"'):
        fusedkd.kd_loss(head, head, backend="compiled", schedule="streaming")
    with pytest.raises(ValueError, match='token_logprobs has no backend="compiled"'):
        fusedkd.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), backend="compiled")
    with pytest.raises(ValueError, match=r'backend="compiled" .*a CPU.*on meta.*"auto"'):
        fusedkd.kd_loss(logits.to("meta"), logits.to("meta"), backend="compiled")


def test_inside_torch_compile() -> None:
    """A training step that is itself compiled."""
    rows = near(0.1, 6, ODD)

    def loss(student: torch.Tensor) -> torch.Tensor:
        loss, _ = fusedkd.kd_loss(
            student * 1.0, rows.teacher.float(), rows.labels, divergence="rkl", return_stats=True, backend="compiled"
        )
        return loss

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        leaf = rows.student.float().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"\"compiled\" needs a C\+\+ compiler.*'no-such-compiler'.*\"torch\""):
        fusedkd.kd_loss(torch.randn(2, 8), torch.randn(2, 8), backend="compiled")


@each("labels", [None, [0, -1, 3, 4, -1, -1, 2, 5, 6, 7]])
def test_blocks(labels: list[int] | None) -> None:
    """Every row that has a label, in order, in blocks of no more than fit; the others of the output are zeroed."""
    n, width = 10, torch_rows.PIECE // 3
    given, out = None if labels is None else torch.tensor(labels), torch.ones(n, 2)
    blocks = list(torch_rows.row_blocks(width, given, n, torch.device("cpu"), out))
    rows = [int(row) for block in blocks for row in torch.arange(n)[block]]
    wanted = [row for row in range(n) if labels is None or labels[row] >= 0]
    assert rows == wanted
    assert max(len(torch.arange(n)[block]) for block in blocks) == 3
    assert out.all(-1).nonzero().flatten().tolist() == wanted
