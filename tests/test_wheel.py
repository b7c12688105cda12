"""What is built and installed is whole, small, and needs little."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 2 * 2**20


def run(*command: str, path: Path | None = None, cwd: Path) -> str:
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is here, so that nothing is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("implicit", "detection", "tests", "benchmarks", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)
    run(sys.executable, "-m", "pip", "wheel", *build, str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_is_small_and_holds_the_two_packages_alone(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"implicit/py.typed", "detection/py.typed"} <= set(names)
    for page in (ROOT / "detection" / "report" / "templates").iterdir():
        assert f"detection/report/templates/{page.name}" in names
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"implicit", "detection"}
    for package in ("implicit", "detection"):
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert here == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_the_core_needs_three_packages_at_most(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    needed = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert 0 < len(needed) <= 3
    # Semantic versions (https://semver.org), with Python's spelling of a pre-release.
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", metadata["Version"])


@pytest.mark.slow
def test_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = "--no-deps", "--no-index", "--target", str(target)
    run(sys.executable, "-m", "pip", "install", *install, str(wheel), cwd=tmp_path)
    code = (
        "import detection, implicit\n"
        "print(detection.__file__, implicit.__file__, detection.Predictor.__name__)"
    )
    printed = run(sys.executable, "-c", code, path=target, cwd=tmp_path).split()
    assert printed == [
        str(target / "detection" / "__init__.py"),
        str(target / "implicit" / "__init__.py"),
        "Predictor",
    ]
    told = run(str(target / "bin" / "deqdet"), "--help", path=target, cwd=tmp_path)
    assert "recipes" in told and "convert" in told
