"""The command line: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from published_models import model, published, saved

from detection.cli import main
from detection.pretrained import load_detector
from detection.recipes import entries


def test_recipes_are_listed_with_size_groups_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for entry in entries():
        assert entry.recipe.name in printed
    row = next(line for line in printed.splitlines() if "deqdet_p64_r50_2x" in line)
    for cell in ("resnet50", "1×1", "64 points", "300", "69.9 M", "24", "480–800, flip, crop"):
        assert cell in row
    assert "49.5" in row and "Table 3" in row and "base 2.5e-05, 0.01" in row


def test_a_published_checkpoint_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "a.pth", published("AdaMixer"))
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(source), str(target), "--classes", "x", "y", "z"]) == 0
    _, recipe, categories = load_detector(target)
    assert recipe.model == model("AdaMixer").config and categories.names == ("x", "y", "z")
    assert f"{target}: published" in capsys.readouterr().out.replace("\n", "")


def test_mistakes_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("nothing")
    for source, words in (("nowhere.pth", "does not exist"), ("text.pth", "no PyTorch file")):
        target = tmp_path / "b.safetensors"
        assert main(["convert", str(tmp_path / source), str(target)]) == 2
        said = capsys.readouterr()
        assert words in said.err and source in said.err and "Traceback" not in said.err
        assert not target.exists()


def test_the_module_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "detection", "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and "recipes" in run.stdout and "convert" in run.stdout
