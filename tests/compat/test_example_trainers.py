"""The examples with other programs' trainers."""

from __future__ import annotations

import pytest
from example_runs import losses, outputs

STEPS = 4
NAMES = ["hf_trainer", "trl_distillation", "trl_gkd"]


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return outputs(NAMES, STEPS, timeout=240)


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, printed: dict[str, str]) -> None:
    """It ends without an error, and its held-out loss falls."""
    before, after = losses(printed[name], STEPS)
    assert 0 < after < 0.99 * before
