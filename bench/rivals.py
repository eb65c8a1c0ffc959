"""Every implementation that is measured, behind one signature: inputs in, the mean loss out.

A rival's `loss(divergence)` builds it, importing its package there and only there, and returns a function of the inputs
(`HeadInputs`, `RowInputs`) to the mean loss, or to (loss, gradient) where the gradient comes with it. Settings are the
package's own defaults, the ones that its users get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import Head, TopK, kd_loss, kd_value_and_grad
from ..cli.eager import EAGER
from ..kernels.language import interpreted
from .cases import Case, HeadInputs, ListedInputs, Loss, RowInputs, eager_loss

KLS_AND_JSD = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}  # GKD's β, which Liger, TRL and Unsloth share
# ORDA's name of a divergence, and the parameters that it wants beside it: those of fusedkd's default. Its α-β has the
# exponent of the student first.
ORDA: dict[str, dict[str, Any]] = {
    "fkl": {"kl_divergence": "forward"},
    "rkl": {"kl_divergence": "reverse"},
    "jsd": {"kl_divergence": "skew_js", "kl_beta": 0.5},
    "ab": {"kl_divergence": "abkd", "kl_alpha": 0.7, "kl_beta": 0.2},
}
OURS = "fusedkd"


class Package(NamedTuple):
    """The module that a package is imported as, and what installs it."""

    module: str
    name: str
    alone: bool = False  # without what it depends on, which wants a GPU

    @property
    def install(self) -> str:
        """The command."""
        return f"pip install {'--no-deps ' * self.alone}{self.name}"


PACKAGES = {
    "liger": Package("liger_kernel", "liger-kernel"),
    "trl": Package("trl", "trl"),
    "unsloth": Package("unsloth_zoo", "unsloth_zoo", alone=True),
    "orda": Package("orda_kernel", "orda-kernel"),
    "fla": Package("fla", "flash-linear-attention"),
}
FAMILIES = ("eager", "compile", "torch", *PACKAGES)


@dataclass(frozen=True)
class Rival:
    """An implementation and what it can do.

    triton: it has Triton kernels only. cpu: it is for CPUs only. compiles: it goes through torch.compile. softcap: it
    caps logits. tails: those that it has for a teacher's likeliest tokens. shifted: its loss is the divergence and a
    number that is the teacher's alone, so that only gradients are compared.
    """

    name: str
    family: str
    path: str
    loss: Callable[[str], Loss]
    divergences: tuple[str, ...] = tuple(EAGER)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    triton: bool = False
    cpu: bool = False
    compiles: bool = False
    softcap: bool = False
    tails: tuple[str, ...] = ("bucket", "truncate")
    shifted: bool = False

    def suits(self, case: Case) -> bool:
        """Whether this is something that the rival offers at all."""
        capped = case.shape.softcap is not None
        known = case.divergence in self.divergences and case.tail in self.tails
        return known and case.dtype in self.dtypes and (self.softcap or not capped)

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, if it cannot."""
        package = PACKAGES.get(self.family)
        if package and find_spec(package.module) is None:
            return f"not installed: {package.install}, or make bench-rivals"
        if self.triton and device == "cpu" and not interpreted():
            return "needs a GPU"
        return "for CPUs only" if self.cpu and device != "cpu" else None


def chosen(case: Case, families: tuple[str, ...]) -> list[Rival]:
    """Return the implementations that a case can have: fusedkd's own, and those of some families."""
    wanted = {OURS, *families}.intersection((OURS, *(families if case.families is None else case.families)))
    return [rival for rival in RIVALS if rival.path == case.kind and rival.family in wanted and rival.suits(case)]


def named(path: str, name: str) -> Rival:
    """Return one implementation."""
    return next(rival for rival in RIVALS if (rival.path, rival.name) == (path, name))


def versions() -> dict[str, str | None]:
    """Return the version of each rival's package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES.values():
        try:
            found[package.name] = version(package.name)
        except PackageNotFoundError:
            found[package.name] = None
    return found


def _fused_heads(divergence: str, **options: Any) -> Loss:
    def loss(x: HeadInputs) -> Tensor:
        student = Head(x.hidden, x.weight, softcap=x.softcap)
        teacher = Head(x.teacher_hidden, x.teacher_weight, softcap=x.softcap)
        labels = x.labels if divergence == "drkl" else None
        return kd_loss(student, teacher, labels, divergence=divergence, **options)

    return loss


def _fused_rows(divergence: str) -> Loss:
    return lambda x: kd_loss(x.student, x.teacher, x.labels if divergence == "drkl" else None, divergence=divergence)


def _fused_rows_at_once(divergence: str, **options: Any) -> Loss:
    def loss(x: RowInputs) -> tuple[Tensor, ...]:
        labels = x.labels if divergence == "drkl" else None
        return kd_value_and_grad(x.student, x.teacher, labels, divergence=divergence, **options)

    return loss


def _compiled(divergence: str, of: Callable[[str], Loss] = eager_loss) -> Loss:
    return torch.compile(of(divergence), dynamic=False)


def _fused_listed(divergence: str, **options: Any) -> Loss:
    def loss(x: ListedInputs) -> Any:
        teacher = TopK(x.ids, x.logprobs, x.tail)
        if isinstance(x.sides, RowInputs):
            return kd_value_and_grad(x.sides.student, teacher, divergence=divergence, **options)
        student = Head(x.sides.hidden, x.sides.weight, softcap=x.sides.softcap)
        return kd_loss(student, teacher, divergence=divergence, **options)

    return loss


def _listed(x: ListedInputs) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities at the listed tokens; of the student's logits only a sum is kept."""
    logits = x.sides.student_logits()
    return logits.gather(-1, x.ids.long()) - logits.logsumexp(-1, keepdim=True), x.logprobs


def _distillkit(divergence: str) -> Loss:
    """KL over the listed tokens and the rest of each side, which is kept above 1e-8."""

    def loss(x: ListedInputs) -> Tensor:
        logq, logp = _listed(x)
        p_rest, q_rest = ((1.0 - log.exp().sum(-1)).clamp(min=1e-8) for log in (logp, logq))
        return ((logp.exp() * (logp - logq)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())).mean()

    return loss


def _veomni(divergence: str) -> Loss:
    """Σ p log(p/q) over the listed tokens, of raw probabilities."""

    def loss(x: ListedInputs) -> Tensor:
        logq, logp = _listed(x)
        return (logp.exp() * (logp - logq)).sum(-1).mean()

    return loss


def _liger_fused_linear_jsd(divergence: str) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSD(jsd_beta=KLS_AND_JSD[divergence])
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


def _liger_chunked(divergence: str) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    # Left alone it adds half of the cross-entropy of the labels.
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=KLS_AND_JSD[divergence])
    return lambda x: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


def _trl_chunked(divergence: str) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    beta = KLS_AND_JSD[divergence]

    def loss(x: HeadInputs) -> Tensor:
        sides = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None)
        per_token, _ = ChunkedDivergenceFunction.apply(*sides, beta, 1.0, 1.0, x.softcap, 1.0, x.softcap)
        return per_token.mean()

    return loss


@cache
def _unsloth() -> ModuleType:
    """Unsloth's module of fused heads from its file: importing the package wants `unsloth` and a GPU, this does not."""
    package = find_spec(PACKAGES["unsloth"].module)
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "fused_losses" / "fused_linear.py"
    spec = spec_from_file_location("unsloth_fused_linear", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unsloth_jsd(divergence: str) -> Loss:
    beta, loss = KLS_AND_JSD[divergence], _unsloth().fused_linear_jsd

    def mean(x: HeadInputs) -> Tensor:
        caps = {f"{side}_logit_softcapping": x.softcap or 0.0 for side in ("student", "teacher")}
        return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, beta=beta, **caps)

    return mean


def _orda(divergence: str) -> Loss:
    from orda_kernel import DistillationLoss, SeparateTeacher  # pyright: ignore[reportMissingImports]

    # Left alone it is the cross-entropy of the labels.
    loss = DistillationLoss(student_ce_weight=0.0, teacher_ce_weight=0.0, kl_weight=1.0, **ORDA[divergence])
    return lambda x: loss(x.hidden, x.weight, x.labels, SeparateTeacher(x.teacher_hidden, x.teacher_weight)).loss


def _linear_cross_entropy(divergence: str) -> Loss:
    """The cross-entropy of the teacher's probabilities, all in memory: forward KL and the teacher's entropy."""
    from torch.nn.functional import linear_cross_entropy  # torch >= 2.13

    def loss(x: HeadInputs) -> Tensor:
        return linear_cross_entropy(x.hidden, x.weight, (x.teacher_hidden @ x.teacher_weight.t()).softmax(-1))

    return loss


def _fla(divergence: str, fp32_sums: bool) -> Loss:
    from fla.modules.fused_kl_div import FusedKLDivLoss  # pyright: ignore[reportMissingImports]

    loss = FusedKLDivLoss(accumulate_grad_in_fp32=fp32_sums)
    return lambda x: loss(x.hidden, x.teacher_hidden, x.weight, x.teacher_weight)


def _log_probabilities(x: RowInputs) -> tuple[Tensor, Tensor]:
    """What Liger's row losses take; in float32, because bfloat16 log-probabilities have two digits."""
    student, teacher = x.logits()
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _liger_jsd(divergence: str) -> Loss:
    from liger_kernel.transformers import LigerJSD  # pyright: ignore[reportMissingImports]

    loss = LigerJSD(beta=KLS_AND_JSD[divergence])
    return lambda x: loss(*_log_probabilities(x))


def _liger_kl_div(divergence: str) -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss  # pyright: ignore[reportMissingImports]

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda x: loss(*_log_probabilities(x))


BETAS = tuple(KLS_AND_JSD)
FKL = ("fkl",)


def _beside_listed(path: str) -> tuple[Rival, ...]:
    """Implementations for a teacher's likeliest tokens; the programs' formulas are written here, in their order."""
    kind = f"top-k {path}"
    distillkit, veomni = "DistillKit's formula", "VeOmni's formula"
    return (
        Rival("eager torch", "eager", kind, eager_loss, FKL, softcap=True),
        Rival("torch.compile", "compile", kind, _compiled, FKL, softcap=True, compiles=True),
        Rival(distillkit, "eager", kind, _distillkit, FKL, softcap=True, tails=("bucket",)),
        Rival(
            f"{distillkit}, torch.compile", "compile", kind, partial(_compiled, of=_distillkit), FKL,
            softcap=True, compiles=True, tails=("bucket",),
        ),
        Rival(veomni, "eager", kind, _veomni, FKL, softcap=True, tails=("truncate",)),
        Rival(
            f"{veomni}, torch.compile", "compile", kind, partial(_compiled, of=_veomni), FKL,
            softcap=True, compiles=True, tails=("truncate",),
        ),
        Rival(
            "fusedkd compiled", "compile", kind, partial(_fused_listed, backend="compiled"), FKL,
            cpu=True, compiles=True, softcap=True,
        ),
        Rival(OURS, OURS, kind, _fused_listed, FKL, softcap=True),
    )  # fmt: skip


RIVALS = (
    Rival("eager torch", "eager", "heads", eager_loss, softcap=True),
    Rival("torch.compile", "compile", "heads", _compiled, softcap=True, compiles=True),
    Rival(
        "fusedkd compiled", "compile", "heads", partial(_fused_heads, backend="compiled"),
        cpu=True, compiles=True, softcap=True,
    ),
    Rival("Liger FusedLinearJSD", "liger", "heads", _liger_fused_linear_jsd, BETAS, triton=True),
    Rival("Liger FusedLinearJSDLoss", "liger", "heads", _liger_chunked, BETAS, compiles=True),
    Rival("TRL ChunkedDivergence", "trl", "heads", _trl_chunked, BETAS, softcap=True),
    Rival("Unsloth fused_linear_jsd", "unsloth", "heads", _unsloth_jsd, BETAS, softcap=True),
    Rival("ORDA DistillationLoss", "orda", "heads", _orda, tuple(ORDA)),
    Rival("torch linear_cross_entropy", "torch", "heads", _linear_cross_entropy, ("fkl",), shifted=True),
    Rival("FLA FusedKLDiv, fp32 sums", "fla", "heads", partial(_fla, fp32_sums=True), ("fkl",), triton=True),
    Rival("FLA FusedKLDiv", "fla", "heads", partial(_fla, fp32_sums=False), ("fkl",), triton=True),
    Rival(OURS, OURS, "heads", _fused_heads, softcap=True),
    Rival("fusedkd streaming", OURS, "heads", partial(_fused_heads, schedule="streaming"), softcap=True),
    Rival(
        "fusedkd bf16 logits", OURS, "heads", partial(_fused_heads, logits_dtype=torch.bfloat16),
        dtypes=("bfloat16",), softcap=True,
    ),
    Rival("eager torch", "eager", "rows", eager_loss),
    Rival("torch.compile", "compile", "rows", _compiled, compiles=True),
    Rival(
        "fusedkd compiled", "compile", "rows", partial(_fused_rows_at_once, backend="compiled"),
        cpu=True, compiles=True,
    ),
    Rival("Liger JSD", "liger", "rows", _liger_jsd, BETAS, triton=True),
    Rival("Liger KLDIVLoss", "liger", "rows", _liger_kl_div, ("fkl",), triton=True),
    Rival(OURS, OURS, "rows", _fused_rows_at_once),
    Rival("fusedkd, autograd", OURS, "rows", _fused_rows),
    *_beside_listed("heads"),
    Rival("fusedkd streaming", OURS, "top-k heads", partial(_fused_listed, schedule="streaming"), FKL, softcap=True),
    *_beside_listed("rows"),
)  # fmt: skip
