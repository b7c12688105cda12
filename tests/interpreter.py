"""Code in a Python of its own: what an import brings shows only where nothing was imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import implicit


def in_a_fresh_interpreter(code: str) -> str:
    """What ``code`` prints in a new Python that can import what this one can."""
    root = str(Path(implicit.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
