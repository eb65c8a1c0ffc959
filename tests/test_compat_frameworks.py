"""compat.torchtune, modelopt, automodel, megatron and swift beside the originals' formulas in float64."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import HEAD, IGNORE, VALUE, Rows, Side, each, near, side, unrelated
from compare import assert_close, relative, rounding
from torch import Tensor
from torch.nn import functional

from fusedkd.compat import automodel, megatron, modelopt, swift, torchtune

SHAPE = (3, 8, 67)  # B, T, V
DTYPES = (torch.float32, torch.bfloat16)
GONE = -torch.inf

Loss = Callable[[Any, Any, Tensor], Any]


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) per token, with 0·log 0 = 0 as in Automodel."""
    logp, logq = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return (logp.exp() * torch.where(logp > GONE, logp - logq, 0)).sum(-1)


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """−Σ p log q per token: torchtune's and DistiLLM's forward KL."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) per token."""
    return forward_kl(teacher, student, temperature)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """ms-swift's: M = βp + (1−β)q by logsumexp, and the two Kullback-Leibler divergences at the ends."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    logp, logq = teacher.log_softmax(-1), student.log_softmax(-1)
    share = torch.tensor(beta, dtype=student.dtype)
    logm = torch.stack([logq + (1 - share).log(), logp + share.log()]).logsumexp(0)
    parts = [(x.exp() * (x - logm)).sum(-1) for x in (logp, logq)]
    return share * parts[0] + (1 - share) * parts[1]


def counted(rows: Tensor, labels: Tensor) -> Tensor:
    """Σ over the tokens that count."""
    return (rows * (labels != IGNORE)).sum()


def average(rows: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens that count."""
    return counted(rows, labels) / (labels != IGNORE).sum()


def kl_div(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """ModelOpt's logits loss: F.kl_div's own reductions, but "none" without V, and T²."""
    logq, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    loss = functional.kl_div(logq, p, reduction=reduction)
    return temperature**2 * (loss.sum(-1) if reduction == "none" else loss)


class Shim(NamedTuple):
    """A shim and its original as functions of logits (B, T, V) and labels (B, T)."""

    ours: Loss
    original: Loss


def lists(loss: Any) -> Loss:
    """A chunked loss of torchtune as a function of whole logits."""
    return lambda s, t, y: loss(*(list(x.chunk(loss.num_output_chunks, dim=1)) for x in (s, t)), y)


def flat(loss: Any, **options: Any) -> Loss:
    """A loss of torchtune on (N, V), as its recipes call it."""
    return lambda s, t, y: loss(s.flatten(0, 1), t.flatten(0, 1), y.flatten(), **options)


def shims() -> dict[str, Shim]:
    """Every shim in every reduction."""
    table = {}
    kinds = {
        "Forward": ({}, cross_entropy),
        "Reverse": ({}, reverse_kl),
        "Symmetric": ({"sym_kd_ratio": 0.3}, lambda s, t: 0.3 * cross_entropy(s, t) + 0.7 * reverse_kl(s, t)),
    }
    for kind, (options, rows) in kinds.items():
        whole = getattr(torchtune, f"{kind}KLLoss")(**options)
        chunked = getattr(torchtune, f"{kind}KLWithChunkedOutputLoss")(3, **options)
        mean = lambda s, t, y, rows=rows: average(rows(s, t), y)  # noqa: E731
        table[f"torchtune-{kind}-mean"] = Shim(flat(whole), mean)
        table[f"torchtune-{kind}-3d"] = Shim(whole, mean)
        table[f"torchtune-{kind}-chunked"] = Shim(lists(chunked), mean)
        table[f"torchtune-{kind}-sum"] = Shim(
            flat(whole, normalize=False), lambda s, t, y, rows=rows: counted(rows(s, t), y)
        )
    ends = {1.0: cross_entropy, 0.0: reverse_kl}
    for ratio, rows in ends.items():
        table[f"torchtune-Symmetric-{ratio}"] = Shim(
            flat(torchtune.SymmetricKLLoss(ratio)), lambda s, t, y, rows=rows: average(rows(s, t), y)
        )
    for temperature in (1.0, 2.0):
        for reduction in ("mean", "batchmean", "sum", "none"):
            loss = modelopt.LogitsDistillationLoss(temperature, reduction)
            table[f"modelopt-{reduction}-{temperature}"] = Shim(
                lambda s, t, y, loss=loss: loss(s, t),
                lambda s, t, y, options=(temperature, reduction): kl_div(s, t, *options),
            )
        frugal = automodel.KDLoss(temperature=temperature, fp32_upcast=False, chunk_size=3)
        loss = automodel.KDLoss(temperature=temperature)
        rows = lambda s, t, tau=temperature: tau**2 * forward_kl(s, t, tau)  # noqa: E731
        table[f"automodel-mean-{temperature}"] = Shim(loss, lambda s, t, y, rows=rows: average(rows(s, t), y))
        table[f"automodel-frugal-{temperature}"] = Shim(frugal, lambda s, t, y, rows=rows: average(rows(s, t), y))
        table[f"automodel-num_batch_labels-{temperature}"] = Shim(
            lambda s, t, y, loss=loss: loss(s, t, y, num_batch_labels=7),
            lambda s, t, y, rows=rows: counted(rows(s, t), y) / 7,
        )
        for reverse, divergence in ((False, forward_kl), (True, reverse_kl)):
            loss = megatron.LogitsKLLoss(config(), temperature, reverse)
            table[f"megatron-{reverse}-{temperature}"] = Shim(
                lambda s, t, y, loss=loss: loss(s, t)[0],
                lambda s, t, y, options=(divergence, temperature): options[0](s, t, options[1]).transpose(0, 1),
            )
    for beta in (0.0, 0.3, 1.0):
        table[f"swift-{beta}"] = Shim(
            lambda s, t, y, beta=beta: swift.jsd_loss(s.flatten(0, 1), t.flatten(0, 1), beta),
            lambda s, t, y, beta=beta: jsd(s, t, beta).sum(),
        )
    table["swift-3d"] = Shim(lambda s, t, y: swift.jsd_loss(s, t, 0.3), lambda s, t, y: jsd(s, t, 0.3).sum())
    return table


def config(ranks: int = 1) -> Any:
    """As much of a TransformerConfig as the loss reads."""
    return SimpleNamespace(tensor_model_parallel_size=ranks)


SHIMS = shims()
FORWARD = ["torchtune-Forward-mean", "modelopt-mean-2.0", "modelopt-none-1.0", "automodel-mean-2.0"]


def check(shim: Shim, rows: Rows, bound: float = VALUE) -> None:
    """Value and gradient under a random upstream gradient, against the original's formula in float64."""
    assert rows.labels is not None
    leaf, exact = rows.student.to(rows.dtype).requires_grad_(), rows.student.clone().requires_grad_()
    value = shim.ours(leaf, rows.teacher.to(rows.dtype).requires_grad_(), rows.labels)
    wanted = shim.original(exact, rows.teacher, rows.labels)
    upstream = torch.randn(wanted.shape)
    value.backward(upstream)
    wanted.backward(upstream.double())
    assert exact.grad is not None
    assert_close(value, wanted.detach(), bound, what="value")
    allowed = bound + rounding(exact.grad, rows.dtype)
    assert_close(leaf.grad, exact.grad, allowed, dtype=rows.dtype, what="gradient")


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@each("name", list(SHIMS))
@each("dtype", DTYPES)
@each("ignored", [False, True])
def test_value_and_gradient(name: str, dtype: torch.dtype, ignored: bool) -> None:
    """The original's value and the gradient of that value, whatever it divides by."""
    check(SHIMS[name], unrelated(*SHAPE, dtype=dtype, ignored=ignored))


@each("name", ["torchtune-Reverse-mean", "modelopt-sum-2.0", "automodel-mean-2.0", "megatron-False-1.0", "swift-0.3"])
def test_close_to_the_teacher(name: str) -> None:
    """bfloat16 logits late in training: the originals that compute in bfloat16 lose the loss, the shims do not."""
    check(SHIMS[name], near(0.02, *SHAPE, dtype=torch.bfloat16))


@each("name", ["modelopt-sum-1.0", "swift-0.3"])
def test_bfloat16_originals_are_wrong_there(name: str) -> None:
    """The difference the docstrings name: in the logits' own bfloat16 these formulas are off by more than the loss."""
    rows = near(0.02, *SHAPE, dtype=torch.bfloat16)
    assert rows.labels is not None
    theirs = SHIMS[name].original(rows.student.bfloat16(), rows.teacher.bfloat16(), rows.labels)
    assert relative(theirs, SHIMS[name].original(rows.student, rows.teacher, rows.labels)) > 1


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@each("name", FORWARD)
def test_a_teacher_without_some_tokens(name: str) -> None:
    """Where the originals take p = 0 and keep the student's normaliser, so do the shims."""
    rows = unrelated(*SHAPE)
    rows.teacher[..., 60:] = GONE
    check(SHIMS[name], rows)


def log_target(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum per token of Megatron's F.kl_div."""
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    return functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


UNSTABLE = {
    "megatron-False-1.0": lambda s, t: log_target(s, t).transpose(0, 1),
    "swift-0.3": lambda s, t: jsd(s, t, 0.3).sum(),
    "torchtune-Reverse-sum": lambda s, t: torch.masked_fill(
        s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1)), t.isinf(), 0
    ).sum(),
}


@each("name", list(UNSTABLE))
def test_a_teacher_without_some_tokens_made_nan(name: str) -> None:
    """Where the originals give NaN, in value or gradient, the shims compare the columns that both sides have."""
    rows = unrelated(*SHAPE, ignored=False)
    rows.teacher[..., 60:] = GONE
    leaf = rows.student.clone().requires_grad_()
    theirs = UNSTABLE[name](leaf, rows.teacher)
    theirs.sum().backward()
    assert leaf.grad is not None
    assert (theirs.isnan().any() | leaf.grad.isnan().any()).item()
    shim = SHIMS[name]
    check(Shim(shim.ours, lambda s, t, y: shim.original(s[..., :60], t[..., :60], y)), rows)


@each("reduction", ["batchmean", "none"])
def test_modelopt_where_both_sides_lack_a_token(reduction: str) -> None:
    """NaN in the original; nothing here."""
    rows = unrelated(*SHAPE)
    for x in (rows.student, rows.teacher):
        x[..., 60:] = GONE
    assert kl_div(rows.student, rows.teacher, 1.0, reduction).isnan().all()
    loss = modelopt.LogitsDistillationLoss(1.0, reduction)
    shim = Shim(lambda s, t, y: loss(s, t), lambda s, t, y: kl_div(s[..., :60], t[..., :60], 1.0, reduction))
    check(shim, rows)


@each("name", ["torchtune-Forward-mean", "modelopt-mean-2.0", "automodel-mean-2.0"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_vocabularies_of_different_size(name: str) -> None:
    """An error in the originals: the columns of both are compared, and V in a mean is their number."""
    rows = unrelated(*SHAPE)
    shim = SHIMS[name]
    original = Shim(shim.ours, lambda s, t, y: shim.original(s[..., : SHAPE[-1] - 9], t, y))
    check(original, dataclasses.replace(rows, teacher=rows.teacher[..., :-9]))


LABELLED = [name for name in SHIMS if name.startswith(("torchtune", "automodel-mean"))]


@each("name", LABELLED)
def test_nothing_counts(name: str) -> None:
    """0 with a gradient graph: torchtune gives a 0 without one, or NaN where its chunked losses divide 0 by 0."""
    student, teacher = torch.randn(2, *SHAPE)
    student.requires_grad_()
    value = SHIMS[name].ours(student, teacher, torch.full(SHAPE[:2], IGNORE))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None and not student.grad.any()


def test_a_label_beyond_the_vocabulary() -> None:
    """The originals never look a label up, so it counts."""
    rows = unrelated(*SHAPE, ignored=False)
    assert rows.labels is not None
    rows.labels[0, 0] = 10**6
    for name in ("torchtune-Forward-mean", "torchtune-Symmetric-chunked", "automodel-mean-1.0"):
        check(SHIMS[name], rows)


def test_an_empty_batch() -> None:
    """ms-swift keeps the student's graph for a rank without tokens; ModelOpt's mean would be NaN."""
    student = torch.randn(0, 67, requires_grad=True)
    for value in (swift.jsd_loss(student, student, 0.5), modelopt.LogitsDistillationLoss()(student, student)):
        value.backward()
        assert value.item() == 0


HEADS = ["torchtune-Forward-3d", "modelopt-none-2.0", "automodel-mean-2.0", "megatron-True-2.0", "swift-3d"]


@each("name", HEADS)
def test_heads(name: str) -> None:
    """A Head instead of logits on either side; the gradient goes to the hidden states."""
    sides = [side(SHAPE[:2], SHAPE[2], 8), side(SHAPE[:2], SHAPE[2], 12)]
    operands = [x.rounded(torch.float32).operands(torch.float32, "cpu") for x in sides]
    doubles = [x.rounded(torch.float32).operands(torch.float64, "cpu") for x in sides]
    labels = unrelated(*SHAPE).labels
    assert labels is not None
    value = SHIMS[name].ours(*(Side.head(x, given) for x, given in zip(sides, operands, strict=True)), labels)
    wanted = SHIMS[name].original(*(given["hidden"] @ given["weight"].T for given in doubles), labels)
    value.sum().backward()
    wanted.sum().backward()
    assert_close(value, wanted.detach(), VALUE + HEAD, what="value")
    for key, exact in doubles[0].items():
        assert exact.grad is not None
        assert_close(operands[0][key].grad, exact.grad, VALUE + HEAD, what=key)
        assert operands[1][key].grad is None


@each("cuts", [[5, 3], [1, 4, 3], [8], [0, 8]])
@each("kind", ["Forward", "Reverse", "Symmetric"])
def test_chunks_of_any_length(kind: str, cuts: list[int]) -> None:
    """Labels are cut where the logits are: torchtune cuts them by torch.chunk, and fails at another cut's reshape."""
    loss, whole = (getattr(torchtune, f"{kind}KL{name}")() for name in ("WithChunkedOutputLoss", "Loss"))
    rows = unrelated(*SHAPE)
    original = SHIMS[f"torchtune-{kind}-mean"].original if kind != "Symmetric" else None
    chunked = lambda s, t, y: loss(*(x.split(cuts, 1) for x in (s, t)), y)  # noqa: E731
    check(Shim(chunked, original or (lambda s, t, y: whole(s, t, y))), rows)


COMPILED = [
    "torchtune-Symmetric-mean",
    "torchtune-Forward-chunked",
    "modelopt-sum-2.0",
    "automodel-mean-2.0",
    "swift-0.3",
]


@pytest.mark.unpoisoned
@each("name", COMPILED)
def test_compiled(name: str) -> None:
    """One graph, as torchtune's compile_loss and compiled trainers want it, and the same numbers."""
    torch.compiler.reset()
    rows = unrelated(*SHAPE)
    shim = SHIMS[name]
    check(shim._replace(ours=torch.compile(shim.ours, fullgraph=True, backend="aot_eager")), rows)


def test_megatron_returns_what_its_loss_balancer_unpacks() -> None:
    """(loss (b, s) contiguous, tp_reduce, is_sequence_parallel), from logits or a linear layer's (logits, bias)."""
    student, teacher = torch.randn(2, *SHAPE)
    loss, *flags = megatron.LogitsKLLoss(config())(student, teacher)
    assert loss.is_contiguous()
    assert flags == [True, False]
    assert torch.equal(megatron.LogitsKLLoss(config())((student, None), (teacher, None))[0], loss)


@pytest.fixture
def ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in of ms-swift's module, whose jsd_loss says with what it was called, with the shim in its place."""
    package = tmp_path / "swift" / "rlhf_trainers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "gkd_loss.py").write_text(
        "def default_log_softmax(logits): ...\n"
        "def default_kl_div(input_log_probs, target_log_probs): ...\n"
        "def jsd_loss(s_logits, t_logits, beta, log_softmax_fn=default_log_softmax, kl_div_fn=default_kl_div,\n"
        "             chunk_size=512):\n"
        "    return beta, log_softmax_fn.__name__, kl_div_fn.__name__, chunk_size\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "swift"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    swift._original.cache_clear()
    module = import_module(swift.ORIGINAL)
    monkeypatch.setattr(module, "jsd_loss", swift.jsd_loss)
    yield module
    swift._original.cache_clear()
    for name in ("swift", "swift.rlhf_trainers", swift.ORIGINAL):
        sys.modules.pop(name, None)


def test_swift_leaves_its_hooks_to_the_original(ms_swift: Any) -> None:
    """One overridden hook is enough, also where the shim has taken the original's name; its defaults are the shim."""
    student, teacher = torch.randn(2, 5, 67)

    def parallel(*log_probs: Tensor) -> Tensor:
        raise AssertionError(f"called with {len(log_probs)}")

    ours = swift.jsd_loss(student, teacher, 0.3)
    defaults = (ms_swift.default_log_softmax, ms_swift.default_kl_div)
    assert torch.equal(ms_swift.jsd_loss(student, teacher, 0.3, *defaults, 64), ours)
    theirs = ms_swift.jsd_loss(student, teacher, 0.3, defaults[0], parallel, 64)
    assert theirs == (0.3, "default_log_softmax", "parallel", 64)
    assert ms_swift.jsd_loss(student, teacher, 0.3, parallel) == (0.3, "parallel", "default_kl_div", 512)


def test_swift_without_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks need ms-swift, and the error says so."""
    monkeypatch.setattr(swift, "ORIGINAL", "no_such_package.gkd_loss")
    swift._original.cache_clear()
    with pytest.raises(ImportError, match="log_softmax_fn or kl_div_fn is not ms-swift's default"):
        swift.jsd_loss(torch.randn(2, 5), torch.randn(2, 5), 0.5, kl_div_fn=torch.sub)


def test_megatron_without_megatron() -> None:
    """Tensor parallelism needs its group, and the error says from where (test_compat_sharded.py has the rest)."""
    logits = torch.randn(2, *SHAPE)
    with pytest.raises(ImportError, match=r"tensor_model_parallel_size is 2, .* megatron.core.parallel_state's, which"):
        megatron.LogitsKLLoss(config(ranks=2))(*logits)
    for options, name in (({"hidden_grad": "sum"}, "hidden_grad"), ({"vocab_size": 9.0}, "vocab_size")):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
            megatron.LogitsKLLoss(config(), **options)


def test_automodel_on_dtensors() -> None:
    """Those whose vocabulary is whole are gathered."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rows = unrelated(*SHAPE)
    student, teacher, labels = rows.student.float(), rows.teacher.float(), rows.labels
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = [DTensor.from_local(x, mesh, [Replicate()]) for x in (student, teacher, labels)]
        assert torch.equal(automodel.KDLoss()(*whole), automodel.KDLoss()(student, teacher, labels))
    finally:
        dist.destroy_process_group()


def test_wrong_arguments_are_named() -> None:
    """Before any work."""
    logits = torch.randn(2, 4, 9)
    with pytest.raises(ValueError, match=r"sym_kd_ratio must be in the range \[0, 1\], got 1.5"):
        torchtune.SymmetricKLLoss(1.5)
    labels, chunks = torch.zeros(2, 4, dtype=torch.int64), logits.chunk(2, 1)
    with pytest.raises(ValueError, match=r"teacher_logits must be a list of chunks of \[2, 2\] tokens .* got \[4\]"):
        torchtune.ForwardKLWithChunkedOutputLoss(2)(chunks, [logits], labels)
    with pytest.raises(ValueError, match=r"student_logits must be .* of 4 tokens together, .* got chunks of \[2\]"):
        torchtune.ForwardKLWithChunkedOutputLoss(2)(chunks[:1], chunks[:1], labels)
    with pytest.raises(ValueError, match=r"reduction must be one of .*'batchmean'.*, got 'token_mean'"):
        modelopt.LogitsDistillationLoss(reduction="token_mean")
    for module in (modelopt.LogitsDistillationLoss, automodel.KDLoss, lambda **t: megatron.LogitsKLLoss(config(), **t)):
        with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
            module(temperature=0)
    with pytest.raises(ValueError, match="beta"):
        swift.jsd_loss(logits[0], logits[0], 1.5)


SIGNATURES = {  # torchtune 0.6.1, nvidia-modelopt 0.47.0, nemo-automodel 0.7.0, ms-swift 4.6.0
    torchtune.ForwardKLLoss: "ignore_index=-100",
    torchtune.ReverseKLLoss: "ignore_index=-100",
    torchtune.SymmetricKLLoss: "sym_kd_ratio=0.5, ignore_index=-100",
    torchtune.ForwardKLLoss.forward: "self, student_logits, teacher_logits, labels, normalize=True",
    torchtune.ForwardKLWithChunkedOutputLoss: "num_output_chunks=8, ignore_index=-100",
    torchtune.ReverseKLWithChunkedOutputLoss: "num_output_chunks=8, ignore_index=-100",
    torchtune.SymmetricKLWithChunkedOutputLoss: "num_output_chunks=8, sym_kd_ratio=0.5, ignore_index=-100",
    torchtune.ForwardKLWithChunkedOutputLoss.forward: "self, student_logits, teacher_logits, labels",
    modelopt.LogitsDistillationLoss: "temperature=1.0, reduction='mean'",
    modelopt.LogitsDistillationLoss.forward: "self, logits_s, logits_t",
    automodel.KDLoss: "ignore_index=-100, temperature=1.0, fp32_upcast=True, tp_group=None, chunk_size=0",
    automodel.KDLoss.forward: "self, student_logits, teacher_logits, labels, num_batch_labels=None",
    megatron.LogitsKLLoss: "model_config, temperature=1.0, reverse=False, vocab_size=None, hidden_grad='reduce'",
    megatron.LogitsKLLoss.forward: "self, predictions, targets",
    swift.jsd_loss: "s_logits, t_logits, beta, log_softmax_fn=None, kl_div_fn=None, chunk_size=512",
}


@pytest.mark.parametrize("shim", SIGNATURES, ids=lambda shim: f"{shim.__module__}.{shim.__qualname__}")
def test_signatures(shim: Callable[..., Any]) -> None:
    """Names, order and defaults of the released originals."""
    parameters = inspect.signature(shim).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters) == SIGNATURES[shim]


@pytest.mark.parametrize("module", [automodel, megatron, modelopt, swift, torchtune], ids=lambda m: m.__name__)
def test_nothing_of_the_originals_is_imported(module: Any) -> None:
    """torch, the standard library and fusedkd, at any depth of the file."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) if not node.level]
    assert names
    assert {name.split(".")[0] for name in names} <= {"torch"} | sys.stdlib_module_names
