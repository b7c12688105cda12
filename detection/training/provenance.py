"""Where a run comes from: ``run.json``, for whoever finds its folder later."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import implicit
from detection.data.errors import DataError
from detection.distributed import Distributed
from detection.files import replacing


def write_provenance(path: Path, distributed: Distributed, about: Mapping[str, Any]) -> None:
    """Write when, how and with what a run was begun; or add to it that it was resumed.

    Args:
        path: of ``run.json``.  What it says of the beginning stays.
        distributed: the processes.
        about: more to say, JSON types or paths.
    """
    now: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": _device(distributed.device),
        "processes": distributed.world_size,
        "versions": {
            "implicit": implicit.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        **about,
    }
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        begun["resumed"] = [*begun.get("resumed", []), now]
    except (OSError, ValueError, AttributeError):
        begun = now
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(begun, indent=2, default=str) + "\n", encoding="utf-8")


def read_provenance(path: Path) -> dict[str, Any]:
    """What `write_provenance` has written; nothing where there is no such file.

    Raises:
        DataError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"{path}: this is no JSON object. Remove it, or restore it.") from None


def recorded_data(about: Mapping[str, Any]) -> Path | None:
    """Where the data lay when the run was begun, of what `read_provenance` gives."""
    return Path(str(about["data"])) if "data" in about else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
