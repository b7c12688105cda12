"""What importing the library costs and offers."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
from interpreter import in_a_fresh_interpreter

import implicit

HERE = Path(implicit.__file__).parent


def test_import_brings_nothing_of_the_detector() -> None:
    heavy = ["torchvision", "pycocotools", "matplotlib", "scipy", "PIL", "sklearn", "detection"]
    loaded = in_a_fresh_interpreter(
        "import sys, implicit\n"
        "implicit.fixed_point\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert "implicit" in loaded and "torch" in loaded
    assert not set(heavy) & set(loaded)


def test_library_works_with_torch_alone() -> None:
    """Every other package of the extras is made impossible to import; a solve still runs."""
    out = in_a_fresh_interpreter(
        "import sys\n"
        "for name in ('torchvision', 'pycocotools', 'matplotlib', 'scipy', 'PIL', 'detection'):\n"
        "    sys.modules[name] = None\n"
        "import torch, implicit\n"
        "a = torch.tensor(0.5, requires_grad=True)\n"
        "s = implicit.fixed_point(lambda y: a * y + 1, torch.zeros(1, 1)).raise_for_status()\n"
        "s.value.sum().backward()\n"
        "print(round(float(s.value.detach()), 2), round(float(a.grad), 1))"
    )
    assert out.split() == ["2.0", "4.0"]


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.py")), ids=lambda p: str(p.relative_to(HERE)))
def test_sources_import_only_the_standard_library_torch_and_numpy(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "implicit"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        assert {name.split(".")[0] for name in names} <= allowed


def test_exports_exist_are_unique_and_documented() -> None:
    assert len(implicit.__all__) == len(set(implicit.__all__))
    for name in implicit.__all__:
        thing = getattr(implicit, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), name


@pytest.mark.parametrize(
    "name",
    [
        "fixed_point", "FixedPoint", "Solution", "Naive", "Anderson", "Broyden", "Tolerance",
        "Steps", "JFB", "RAG", "Neumann", "Phantom", "Implicit", "BPTT", "positions", "supervise",
        "Perturbation", "GaussianNoise", "NormScaledNoise",
    ],
)  # fmt: skip
def test_promised_names(name: str) -> None:
    assert name in implicit.__all__


def test_marked_as_typed() -> None:
    assert (HERE / "py.typed").is_file()
