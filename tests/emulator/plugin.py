"""pytest --emulate: the suite's Triton calls run as compiled, and a test that the sanitizer objects to fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .driver import check, clear, findings, install
from .machine import BENIGN


class Plugin:
    """The hooks of a session.

    Two kinds of finding fail no test. "replicas differ by rounding": threads that hold copies of one sum got there by
    multiplications and additions that contraction paired differently; the last bits depend on which copy is used.
    "unsynchronised lanes": two accesses by threads of one warp, in the order of the program, which a warp that is
    together keeps.
    """

    def __init__(self, capability: int, order: str, ulps: int, fuse: bool) -> None:
        try:
            check(capability, order, ulps)
        except ValueError as error:
            raise pytest.UsageError(f"--emulate: {error}") from None
        install(capability, order=order, ulps=ulps, fuse=fuse)
        import cases

        cases.cuts = lambda backend: False  # compiled kernels round to bfloat16, the interpreter cuts

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Leave out what runs no kernel: tests of the torch backend."""
        torch_only = [i for i in items if "torch" in getattr(getattr(i, "callspec", None), "params", {}).values()]
        config.hook.pytest_deselected(items=torch_only)
        items[:] = [item for item in items if item not in torch_only]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """What a test says that needs the interpreter."""
        if marker := item.get_closest_marker("interpreter"):
            pytest.skip(marker.args[0])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Fail with what was found, or say it beside another failure."""
        clear()
        try:
            result = yield
        finally:
            bad = [finding for finding in findings() if finding.kind not in BENIGN]
            text = "\n".join(f"{f.kind}: {f.kernel}, {f.source}: {f.where}" for f in bad)
            if bad:
                item.add_report_section("call", "emulator", text)
        if bad:
            pytest.fail("see what the emulator found", pytrace=False)
        return result
