"""What docs/sharding.md says of the wire: counted (bench/sharding.py), as it is on ranks, and as committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

import fusedkd
from fusedkd.__main__ import main
from fusedkd.bench import sharding
from fusedkd.kernels.device.args import CARRY, TERM_SUMS
from fusedkd.schedules.ranks import Ranks

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
N, V, D = 64, 40, 8
SEVERAL = ("fkl", "ab", "jsd", "amid", "akl")


def columns_told(rank: int) -> dict[str, list[int]]:
    """The widths of all gathers of a call in one chunk, by divergence; with an r the shapes of sums."""
    told: list[Any] = []
    gathered, reduce = Ranks.gathered, Ranks.reduce

    def noted(self: Ranks, x: torch.Tensor) -> torch.Tensor:
        told.append(x.shape[-1] * x.element_size() // 4)
        return gathered(self, x)

    def summed(self: Ranks, x: torch.Tensor) -> None:
        told.append(("r", *x.shape))
        reduce(self, x)

    Ranks.gathered, Ranks.reduce = noted, summed
    torch.manual_seed(0)
    hidden, weight, teacher = torch.randn(N, D), torch.randn(V // 2, D), torch.randn(N, V // 2)
    labels, found = torch.arange(N) % V, {}
    for name in SEVERAL:
        student = fusedkd.Head(hidden.requires_grad_(), weight)
        shard = fusedkd.VocabShard(start=rank * V // 2, stop=(rank + 1) * V // 2)
        fusedkd.kd_loss(student, teacher, labels, divergence=name, shard=shard).backward()
        found[name] = told.copy()
        told.clear()
    return found


@pytest.mark.xdist_group("ranks")
def test_on_ranks() -> None:
    """The counted gathers are those of a call, and one sum of the hidden gradient follows them."""
    for found in ranks.run(2, columns_told):
        for name, told in found.items():
            counted = sharding.told(name)
            assert told == [*counted.value, *counted.gradient, ("r", N, D)], name


@pytest.mark.parametrize("name", fusedkd.divergences())
def test_floats(name: str) -> None:
    """Statistics and online state; sums where there is no one-sweep form; the rest of the dominant token's entry."""
    definition = fusedkd.divergence(name).form.definition
    found = sharding.told(name)
    sweep = definition.sweep(fusedkd.divergence(name).form.theta)
    assert found.value[0] == CARRY + len(sweep.init.torch())
    if definition.separable:
        assert found.value[1:] == [TERM_SUMS] * (sweep.sums is None)
    assert found.gradient == [1]


@pytest.mark.smoke
def test_the_page_is_up_to_date() -> None:
    """Written again by python -m fusedkd bench sharding --out bench/results."""
    assert (ROOT / "bench" / "results" / sharding.PAGE).read_text(encoding="utf-8") == sharding.page()
    assert DOCS.count(f'--8<-- "bench/results/{sharding.PAGE}"') == 1


def test_what_the_text_quotes() -> None:
    """Its figures are the table's."""
    quoted = re.findall(r"(\d+\.\d) % at tp (\d)", DOCS)
    assert [int(size) for _, size in quoted] == list(sharding.SIZES)
    for percent, size in quoted:
        time = sharding.time_of("fkl", int(size))
        assert f"{100 * time.wire / time.products:.1f}" == percent
    assert f"{sharding.told().floats} numbers" in DOCS
    assert f"{sharding.told('akl').floats:,} numbers" in DOCS


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """Prints the tables, or writes them."""
    assert main(["bench", "sharding"]) == 0
    assert capsys.readouterr().out == sharding.page() + "\n"
    assert main(["bench", "sharding", "--out", str(tmp_path)]) == 0
    assert (tmp_path / sharding.PAGE).read_text(encoding="utf-8") == sharding.page()
