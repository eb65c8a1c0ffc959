"""Files of other programs, each of which runs alone: what it imports beside the loss is a stand-in."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import pytest
import torch


class Anything(types.ModuleType):
    """A module that has every name, of a class of its own."""

    __path__ = ()  # what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A file of an installed distribution as a module, with stand-ins for what it imports."""

    def load(distribution: str, name: str, stands: dict[str, dict[str, Any]] | None = None) -> Any:
        packages = {**(stands or {}), name.rpartition(".")[0]: {}}
        for module, contents in packages.items():
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                package = ".".join(parts[:i])
                if package not in sys.modules:
                    monkeypatch.setitem(sys.modules, package, Anything(package))
                if i > 1:
                    vars(sys.modules[".".join(parts[: i - 1])])[parts[i - 1]] = sys.modules[package]
            vars(sys.modules[module]).update(contents)
        path = metadata.distribution(distribution).locate_file(name.replace(".", "/") + ".py")
        spec = util.spec_from_file_location(name, str(path))
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
