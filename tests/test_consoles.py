"""Every command that a page shows is one that its program takes, option for option."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.claims.__main__ import options as claims_options
from benchmarks.claims.presets import preset
from detection.cli import COMMANDS
from detection.commands.options import read
from detection.commands.running import command_named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the console blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if words := shlex.split(command, comments=True):
                    yield words


EVERY = [(page, words) for page in PAGES for words in commands(page)]


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def example() -> ModuleType:
    path = ROOT / "examples" / "deqdet_coco.py"
    spec = importlib.util.spec_from_file_location("deqdet_coco", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["deqdet_coco"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take(words: list[str]) -> None:
    """Read a command as its program would, and let it check its options; nothing is run."""
    match words:
        case ["deqdet", name, *arguments]:
            assert name in COMMANDS
            kind = command_named(name)
            read(kind, arguments, prog=name, default=kind.begun(arguments)).check()
        case ["python", "examples/deqdet_coco.py", *arguments]:
            options = example().Options
            default = options.begun(arguments)
            read(options, arguments, prog="example", default=default).command().check()
        case ["torchrun", "--nproc_per_node", number, *script]:
            assert int(number) > 1
            take(["python", *script])
        case ["python", script] if script.startswith("examples/"):
            assert (ROOT / script).is_file()
        case ["python", "-m", "pytest"] | ["python", "-m", "pytest", "-m", "fault"]:
            pass
        case ["python", "-m", module] if module.startswith(("benchmarks.", "tests.")):
            assert importlib.util.find_spec(module) is not None
        case ["python", "-m", "benchmarks.claims", *options]:
            preset(claims_options().parse_args(options).preset)
        case ["pip", "install", what]:
            found = re.fullmatch(r"\.(?:\[(.*)\])?", what)
            assert found is not None
            assert set(filter(None, (found[1] or "").split(","))) <= extras()
        case ["sbatch", script, _, _]:
            subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
        case _:
            raise AssertionError(f"nobody knows how to check {' '.join(words)!r}")


@pytest.mark.parametrize(
    ("page", "words"), EVERY, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(EVERY)]
)
def test_a_command_that_is_shown_is_taken(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--resume" in words:  # there must be a run to go on with
        Path(words[words.index("--output") + 1], "checkpoints").mkdir(parents=True)
    try:
        take(words)
    except SystemExit as stop:
        raise AssertionError(f"{page.name}: {' '.join(words)} is refused") from stop


def test_a_wrong_option_would_be_found() -> None:
    for words in (["deqdet", "train", "--sead", "1"], ["deqdet", "predict"]):
        with pytest.raises(SystemExit):
            take(words)
    with pytest.raises(AssertionError):
        take(["pip", "install", ".[detecton]"])
    with pytest.raises(AssertionError):
        take(["curl", "somewhere"])


def test_every_command_is_shown_somewhere() -> None:
    shown = {words[1] for _, words in EVERY if words[0] == "deqdet"}
    assert shown >= set(COMMANDS)
