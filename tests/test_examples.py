"""The examples of one process: each runs as its first lines say, and what it trains gets better.

Those of several ranks are in test_distillation_head.py and test_sharded_training.py, those with the trainers of other
programs in compat/.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from example_runs import ROOT, losses, outputs

FOLDER = ROOT / "examples"
STEPS = 4
ALONE = ["loop", "accumulation", "packed", "lora_frozen_head", "on_policy", "cald", "taid", "ema"]
ELSEWHERE = {"fsdp", "tensor_parallel", "hf_trainer", "trl_distillation", "trl_gkd"}
SHARED = {"tiny"}

installed = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
together = pytest.mark.xdist_group("examples")


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return outputs(ALONE, STEPS, timeout=240)


@installed
@together
@pytest.mark.parametrize("name", ALONE)
def test_example(name: str, printed: dict[str, str]) -> None:
    """It ends without an error, and its held-out loss falls."""
    before, after = losses(printed[name], STEPS)
    assert 0 < after < 0.99 * before


@installed
@together
def test_what_the_scripts_compare(printed: dict[str, str]) -> None:
    """The numbers that some print beside the loss."""
    (apart,) = re.findall(r"whole batch: (\S+) apart", printed["accumulation"])
    assert float(apart) < 1e-5
    documents, together, alone = re.findall(r"^(\d+) documents.*: (\S+) nats, .* (\S+)$", printed["packed"], re.M)[0]
    assert int(documents) > 1
    assert together == alone
    frozen, whole = map(float, re.findall(r"(\S+) GFLOPs", printed["lora_frozen_head"]))
    assert frozen < whole
    assert printed["taid"].startswith("t: 0.40 -> 1.00")


@installed
def test_the_gradient_on_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the expectation over every response there is, of three tokens out of three."""
    monkeypatch.syspath_prepend(str(FOLDER))
    surrogate = importlib.import_module("on_policy").surrogate
    size, length = 3, 3
    student, teacher = torch.randn(2, length, size, size, dtype=torch.float64)  # by position and previous token
    student.requires_grad_()
    responses = torch.cartesian_prod(*[torch.arange(size)] * length)
    previous = torch.cat((torch.zeros_like(responses[:, :1]), responses[:, :-1]), 1)
    logq, logp = (x.log_softmax(-1)[torch.arange(length), previous] for x in (student, teacher))
    kl = (logq.exp() * (logq - logp)).sum(-1)
    logprobs = logq.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    mass = logprobs.sum(-1).exp()
    (expected,) = torch.autograd.grad((mass * kl.sum(-1)).sum(), student, retain_graph=True)
    (found,) = torch.autograd.grad((mass.detach() * surrogate(kl, logprobs).sum(-1)).sum(), student, retain_graph=True)
    torch.testing.assert_close(found, expected)
    (analytic,) = torch.autograd.grad((mass.detach() * kl.sum(-1)).sum(), student)
    assert (analytic - expected).norm() > 0.01 * expected.norm()  # the other term is seen


@installed
def test_training_that_does_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a loss that is NaN."""
    monkeypatch.syspath_prepend(str(FOLDER))
    tiny = importlib.import_module("tiny")
    tiny.report("loss", STEPS, 2.0, 1.0)
    for after in (2.0, float("nan")):
        with pytest.raises(SystemExit, match="did not fall"):
            tiny.report("loss", STEPS, 2.0, after)


def scripts() -> set[str]:
    return {path.stem for path in FOLDER.glob("*.py")} - SHARED


def test_every_example_is_run_and_listed() -> None:
    """By a test, and in the table."""
    assert scripts() == {*ALONE, *ELSEWHERE}
    table = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", table, re.M)) == scripts()
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__))
    for name in ELSEWHERE:
        assert f'"examples/{name}.py"' in tests or f'"{name}"' in tests, name


@pytest.mark.parametrize("name", sorted(scripts()))
def test_how_an_example_is_started(name: str) -> None:
    """Its docstring has the command."""
    about = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert re.search(rf"^    (python|torchrun .*) examples/{name}\.py$", about, re.M)
