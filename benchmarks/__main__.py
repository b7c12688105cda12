"""All benchmarks that a CPU with two cores does in a quarter of an hour, one after the other.

    python -m benchmarks

Each is a command of its own, told and timed here.  What they print and measure goes to
``benchmarks/results/`` (or ``--output``), and from there into ``benchmarks/README.md``.  Two are
not among them, for they need trained detectors: `benchmarks.detectors` takes hours, and
`benchmarks.steps` needs the run of the main job.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measure import output_folder, wide_console

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


def main() -> None:
    """Run them; stop at the first that fails."""
    folder, console = output_folder(__doc__), wide_console()
    start = time.perf_counter()
    for name in COMMANDS:
        console.rule(f"python -m benchmarks.{name}")
        began = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(folder)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"python -m benchmarks.{name} failed; the results so far are kept.")
        console.print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes")
    subprocess.run([sys.executable, "-m", "benchmarks.report", "--output", str(folder)], check=True)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
