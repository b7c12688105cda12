"""The README's Python runs as it stands, and its commands are those of CI and of the example."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks import report
from detection.models.detector import Detector
from detection.recipes import recipe, recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_recipe_is_in_the_table_with_its_size() -> None:
    pattern = r"^\| (`\w+`.*?) \|.*\| ((?:[\d.]+ M(?:, )?)+) \|$"
    rows = re.findall(pattern, README, flags=re.MULTILINE)
    stated = {
        name: size
        for names, sizes in rows
        for name, size in zip(re.findall(r"`(\w+)`", names), sizes.split(", "), strict=True)
    }
    assert sorted(stated) == sorted(recipe_names())
    for name, size in stated.items():
        with torch.device("meta"):
            model = Detector(recipe(name).without_pretraining().model)
        count = sum(p.numel() for p in model.parameters())
        assert size == f"{count / 1e6:.1f} M", name


def test_headline_figures_are_those_of_the_benchmarks() -> None:
    results = ROOT / "benchmarks" / "results"
    assert report.with_headlines(README, results) == README
    assert len(report.headlines(results).splitlines()) > 7
