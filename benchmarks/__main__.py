"""All benchmarks that a CPU with two cores does in a quarter of an hour, one after the other.

    python -m benchmarks

Behind it may stand the names of those that are to be measured anew, ``gradient_memory`` for one:
the others keep what they found, and the minutes that they took.

Each is a command of its own, told and timed here.  What they print and measure goes to
``benchmarks/results/`` (or ``--output``), and from there into ``benchmarks/README.md``.  Two are
not among them, for they need trained detectors: `benchmarks.claims` takes hours and has a page of
its own (``docs/claims.md``), and `benchmarks.steps` needs the run of the main job.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from benchmarks.goals import Goal, goals_table
from benchmarks.measure import argument_parser, device, stem, wide_console, write_results

COMMANDS = (
    "robustness",
    "mixed_batches",
    "gradient_error",
    "overhead",
    "gradient_memory",
    "refinement",
    "scaling",
    "throughput",
    "training_step",
)


GOAL = 15
"""Minutes on two cores, all together."""


def tables(minutes: dict[str, float]) -> tuple[Table]:
    """What is shown of the results that were written."""
    table = Table("command", "minutes")
    for name, taken in minutes.items():
        table.add_row(f"python -m benchmarks.{name}", f"{taken:.1f}")
    return (table,)


def goals(minutes: dict[str, float]) -> list[Goal]:
    """Of all commands together."""
    return [Goal("minutes in all", sum(minutes.values()), most=GOAL)]


def _former(folder: Path) -> dict[str, float]:
    """Minutes that the commands took when they were last run."""
    path = folder / f"{stem('__main__', device())}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {name: minutes for name, minutes in found.items() if name in COMMANDS}


def main() -> None:
    """Run them; stop at the first that fails."""
    parser = argument_parser(__doc__)
    parser.add_argument("commands", nargs="*", metavar="NAME", help=", ".join(COMMANDS))
    given = parser.parse_args()
    if unknown := [name for name in given.commands if name not in COMMANDS]:
        parser.error(f"there is no {' or '.join(unknown)}; known: {', '.join(COMMANDS)}.")
    folder, console = given.output, wide_console()
    folder.mkdir(parents=True, exist_ok=True)
    minutes = _former(folder) if given.commands else {}
    for name in given.commands or COMMANDS:
        console.rule(f"python -m benchmarks.{name}")
        began = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(folder)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"python -m benchmarks.{name} failed; the results so far are kept.")
        minutes[name] = (time.perf_counter() - began) / 60
    write_results(folder, "__main__", minutes, place=device())
    console.print(*tables(minutes), goals_table(goals(minutes)))
    subprocess.run([sys.executable, "-m", "benchmarks.report", "--output", str(folder)], check=True)


if __name__ == "__main__":
    main()
