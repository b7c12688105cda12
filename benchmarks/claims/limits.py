"""What the machine has room for: a preset that does not fit says so before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Refuse what the disk has no room for.

    Raises:
        SystemExit: with a sentence.
    """
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SystemExit(
            f"{what} need {_size(needed)} in {folder} and there are {_size(free)} free: make room, "
            "or choose a smaller preset."
        )


def check_memory(needed: int, device: str, jobs: int, cards: int = 1) -> None:
    """Refuse what the memory has no room for.

    Args:
        needed: by all runs on a card, or on the machine where ``device`` is ``cpu``.
        jobs: runs there.
        cards: how many such cards there are.

    Raises:
        SystemExit: with a sentence.
    """
    free = free_memory(device)
    if needed > free:
        fewer = max(1, int(free * jobs / needed))
        hint = f"--jobs {cards * fewer}" if fewer < jobs else "a smaller preset"
        raise SystemExit(
            f"{jobs} runs at once need {_size(needed)} of memory and there are {_size(free)} free "
            f"on {device}: choose {hint}."
        )


def free_memory(device: str) -> int:
    """Bytes that can be had now; of GPUs on the one that has least."""
    if device == "cuda":
        return min(
            int(torch.cuda.mem_get_info(card)[0]) for card in range(torch.cuda.device_count())
        )
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (found,) = (line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(found.split()[1])
    except (OSError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
