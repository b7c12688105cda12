"""Folders that commands write to: a new one where none was named, and never one in use."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from detection.distributed import Distributed


def new_folder(name: str, distributed: Distributed) -> Path:
    """A new folder below ``runs/`` named after the time, the same for all processes."""
    return Path(distributed.gather_objects(_make(name) if distributed.is_main else "")[0])


def require_unused(folder: Path) -> Path:
    """The folder, if it is not there yet or empty.

    Raises:
        ValueError: otherwise; nothing is changed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output {folder}: this is not an empty folder; what is in it is left as it is. "
            "Choose another."
        )
    return folder


def _make(name: str) -> str:
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Two runs may begin in the same second.
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError("unreachable")
