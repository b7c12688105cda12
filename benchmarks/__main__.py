"""All benchmarks that a CPU with two cores does in a quarter of an hour, one after the other.

    python -m benchmarks

Each is a command of its own, told and timed here.  What they print and measure goes to
``benchmarks/results/`` (or ``--output``), and from there into ``benchmarks/README.md``.  Two are
not among them, for they need trained detectors: `benchmarks.claims` takes hours and has a page of
its own (``docs/claims.md``), and `benchmarks.steps` needs the run of the main job.
"""

from __future__ import annotations

import subprocess
import sys
import time

from rich.table import Table

from benchmarks.measure import Goal, device, goals_table, output_folder, wide_console, write_results

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


def main() -> None:
    """Run them; stop at the first that fails."""
    folder, console = output_folder(__doc__), wide_console()
    minutes: dict[str, float] = {}
    for name in COMMANDS:
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
