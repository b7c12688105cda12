"""What the tests of the examples share: ``examples/`` is no package, its files load by path."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@lru_cache
def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """``example("deq_graph")`` is ``examples/deq_graph.py`` as a module; each is loaded once."""
    return _load


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``command("deq_graph", "--updates", "0")`` runs the file as the command line would."""

    def run(name: str, *arguments: object) -> None:
        file = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        runpy.run_path(file, run_name="__main__")

    return run
