"""Writes ``benchmarks/README.md``: each command, what it measures, its tables, its plot.

    python -m benchmarks.report

Everything in it is taken from the files that the commands wrote, and so are the headline figures
that it puts into the README of the project and the tables of ``docs/comparison.md``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks import training_step
from benchmarks.comparison import written
from benchmarks.goals import GOAL_COLUMNS, Goal
from benchmarks.measure import output_folder
from benchmarks.pages import put, table

ROOT = Path(__file__).parents[1]
FIGURES = "figures of the benchmarks"
"""What the marks in the README are called."""

HEAD = """# Benchmarks

`python -m benchmarks` runs all that two cores do in a quarter of an hour and writes this page
(`python -m benchmarks.report` writes it alone). What a command measures is told in its own words;
figures are those of the machine and the day that stand above them. A figure that missed its goal
stays, with the reason and, where there is one, the floor that was measured; figures beside goals
are rounded against themselves. What a GPU gave is kept apart (`results/*.cuda.json`) and stands
below what the CPU gave, under the GPU's name.
"""


def section(path: Path, written: dict[str, Any]) -> str:
    """One command: its docstring, where and when it ran, what it printed, its goals, its plot.

    What a GPU gave (``module.cuda.json``) is a part of that section, under the device's name.
    """
    module, folder = module_of(path), path.parent
    title, _, rest = (module.__doc__ or "").partition("\n\n")
    said = rest.replace(f"    {written['command']}\n", "", 1).strip("\n")
    versions = ", ".join(f"{package} {number}" for package, number in written["versions"].items())
    parts = [f"## `{written['command']}`", title.replace("``", "`"), said.replace("``", "`")]
    if path.suffixes[:-1]:
        first = path.with_name(f"{path.stem.partition('.')[0]}.json")
        parts = [*([] if first.exists() else parts), f"### On {written['device']}"]
    parts.append(f"*{written['date'][:10]}, {written['machine']}; {versions}.*")
    lines = [line.rstrip() for line in _printed(module, written).splitlines()]
    parts.append("```text\n" + "\n".join(lines).strip("\n") + "\n```")
    if hasattr(module, "goals"):
        parts.append(goals_in_markdown(module.goals(written["results"])))
    if (picture := folder / f"{path.stem}.png").exists():
        parts.append(f"![{title.rstrip('.')}]({folder.name}/{picture.name})")
    return "\n\n".join(part for part in parts if part)


def module_of(path: Path) -> ModuleType:
    """The benchmark that wrote a file of results."""
    return importlib.import_module(f"benchmarks.{path.stem.partition('.')[0]}")


def _printed(module: ModuleType, written: dict[str, Any]) -> str:
    """What the command printed; a module that can make its tables of its results makes them."""
    if not hasattr(module, "tables"):
        return str(written["printed"])
    console = Console(file=StringIO(), width=160, highlight=False, record=True)
    console.print(*module.tables(written["results"]))
    return console.export_text()


def goals_in_markdown(goals: Sequence[Goal]) -> str:
    """A table with a row for each goal."""
    return table([GOAL_COLUMNS, *(goal.cells() for goal in goals)])


def headlines(folder: Path) -> str:
    """The table in the project's README: figures of the CPU, whatever a GPU gave."""

    def results(name: str) -> Any:
        written = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return written["results"]

    rows = [("", "ours", "beside it")]

    def add(what: str, ours: str, beside: str) -> None:
        rows.append((what, ours, beside))

    memory = results("gradient_memory")
    call = memory["one_call"][0]
    add(
        "kept by one refinement, 100 queries, 32 points, its insides being made again",
        f"{call['ours'] / 2**20:.1f} MiB",
        f"{call['plain'] / 2**20:.1f} MiB: the same of torch's plain operators",
    )
    own = [row for row in memory["rows"] if row["layer"] == "refinement 100/32"]
    kept = {(row["gradient"], row["k"], row["steps"]): row["kept"] / 2**20 for row in own}
    peak = {(row["gradient"], row["k"], row["steps"]): row["peak"] / 2**20 for row in own}
    add(
        "kept by `JFB()`; by `Neumann(8)`; by `RAG(2)`",
        "; ".join(
            f"{kept[key]:.1f} MiB"
            for key in (("JFB", 1, 5), ("Neumann(k)", 8, 5), ("RAG(k)", 2, 5))
        ),
        f"{kept['BPTT', 1, 50]:.0f} MiB: BPTT through 50 steps",
    )
    add(
        "peak of `supervise` with `RAG(2)`: 5 steps; 50 steps; 8 positions of 20",
        "; ".join(
            f"{peak[key]:.0f} MiB"
            for key in (
                ("supervise at 1", 2, 5),
                ("supervise at 1", 2, 50),
                ("supervise at 8", 2, 20),
            )
        ),
        f"{peak['BPTT', 1, 50]:.0f} MiB: BPTT through 50 steps",
    )
    measured_times = results("refinement")["times"]
    first = measured_times[0]["queries"], measured_times[0]["points"]
    times = {
        row["contestant"]: row for row in measured_times if (row["queries"], row["points"]) == first
    }
    for name in ("ours", "ours, compiled"):
        add(
            f"time of one refinement on two cores{name.removeprefix('ours')}",
            f"{times[name]['median']:.1f} ms ({times[name]['ratio']:.2f}×)",
            f"{times['plain']['median']:.1f} ms: plain operators",
        )
    measured = (training_step.Measured(**row) for row in results("training_step")["steps"])
    steps = {row.detector: row for row in measured}
    for what, of in (
        ("training step, ResNet-50, batch 2, 800×1344", lambda name: f"{steps[name].total:.1f} s"),
        (
            "peak of its memory, weights and AdamW's state included",
            lambda name: f"{steps[name].memory / 2**30:.1f} GiB",
        ),
    ):
        add(what, f"{of('DEQDet')} (DEQDet)", f"{of('AdaMixer')}: AdaMixer in the same code")
    points = {(row["kind"], row["setting"]): row for row in results("steps")["points"]}
    auto, full = points["auto", "settled"], points["naive", "25 steps"]
    add(
        'steps of an image with `steps="auto"` (and one refinement to know it), trained on digits',
        f"{auto['steps']:.1f}, AP {100 * auto['AP']:.1f}",
        f"25, AP {100 * full['AP']:.1f}",
    )
    return table(rows)


def results_in(folder: Path) -> list[Path]:
    """All files of results, by module; a GPU's after those of the CPU."""
    return sorted(folder.glob("*.json"), key=lambda path: path.stem.split("."))


def main() -> None:
    """Write the page, and the headlines."""
    folder = output_folder(__doc__)
    sections = [HEAD.strip()]
    for path in results_in(folder):
        sections.append(section(path, json.loads(path.read_text(encoding="utf-8"))))
    page = folder.parent / "README.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    if folder.resolve() == ROOT / "benchmarks" / "results":
        for name, write in (("README.md", with_headlines), ("docs/comparison.md", written)):
            text = write((ROOT / name).read_text(encoding="utf-8"), folder)
            (ROOT / name).write_text(text, encoding="utf-8")


def with_headlines(text: str, folder: Path) -> str:
    """The project's README as the results in ``folder`` have it."""
    return put(text, FIGURES, headlines(folder))


if __name__ == "__main__":
    main()
