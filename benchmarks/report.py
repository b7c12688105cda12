"""Writes ``README.md`` beside the results: each command, what it measures, its tables, its plot.

    python -m benchmarks.report

Everything in it is taken from the files that the commands wrote.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import output_folder

HEAD = """# Benchmarks

`python -m benchmarks` runs all that two cores do in a quarter of an hour and writes this page
(`python -m benchmarks.report` writes it alone). What a command measures is told in its own words;
figures are those of the machine and the day that stand above them. A figure that missed its goal
stays.
"""


def section(name: str, written: dict[str, Any], folder: Path) -> str:
    """One command: its docstring, where and when it ran, what it printed, its plot."""
    module = importlib.import_module(f"benchmarks.{name}")
    title, _, rest = (module.__doc__ or "").partition("\n\n")
    said = rest.strip().replace(f"    python -m benchmarks.{name}", "", 1).strip()
    versions = ", ".join(f"{package} {number}" for package, number in written["versions"].items())
    parts = [
        f"## `{written['command']}`",
        title.replace("``", "`"),
        said.replace("``", "`"),
        f"*{written['date'][:10]}, {written['machine']}; {versions}.*",
    ]
    if "printed" in written:
        lines = [line.rstrip() for line in written["printed"].splitlines()]
        parts.append("```text\n" + "\n".join(lines).strip("\n") + "\n```")
    if (folder / f"{name}.png").exists():
        parts.append(f"![{title.rstrip('.')}]({folder.name}/{name}.png)")
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    """Write the page."""
    folder = output_folder(__doc__)
    sections = [HEAD.strip()]
    for path in sorted(folder.glob("*.json")):
        written = json.loads(path.read_text(encoding="utf-8"))
        sections.append(section(path.stem, written, folder))
    page = folder.parent / "README.md"
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
