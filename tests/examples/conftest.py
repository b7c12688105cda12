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


@pytest.fixture
def refusal(command: Callable[..., None], tmp_path: Path) -> Callable[..., str]:
    """``refusal("deq_graph", "--updates", "0")`` is the message that the command ends with.

    ``{file}`` and ``{folder}`` in an argument stand for a file and a folder that exist.
    """
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder.png"}

    def message(name: str, *arguments: object) -> str:
        places["file"].touch()
        places["folder"].mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as stopped:
            command(name, *(str(argument).format(**places) for argument in arguments))
        assert str(stopped.value).startswith("error: ")
        return str(stopped.value)

    return message
