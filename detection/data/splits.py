"""What a folder of labelled images holds, whatever its format: splits that can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detection.data.images import SUFFIXES
from detection.data.problems import Problems

SplitName = Literal["train", "val", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")

WHOLE = "all"
"""The name of the one split of a folder that is not divided."""


@dataclass(frozen=True)
class Reading:
    """A split as a COCO document, not checked yet.

    Args:
        images: the folder that the names of image files are relative to.
        source: what problems name as their file.
        document: with the lists ``images``, ``annotations`` and ``categories``.
        places: what problems call each annotation; ``None`` calls them by their ids.
    """

    images: Path
    source: Path
    document: dict[str, Any]
    places: list[str] | None = None


@dataclass(frozen=True)
class Layout:
    """A folder that was recognised.

    Args:
        format: ``"COCO"``, ``"YOLO"`` or ``"Pascal VOC"``.
        root: the folder.
        splits: how to read each split that is there; `None` is read where it is unusable.
        complaints: what is missing of splits that are not there, or that leaves them unclear.
    """

    format: str
    root: Path
    splits: Mapping[str, Callable[[Problems], Reading | None]]
    complaints: Mapping[str, str]


def split_folders(parent: Path, split: str) -> list[Path]:
    """The folders in ``parent`` whose names begin with the name of a split."""
    return [
        path
        for path in sorted(parent.glob(f"{split}*"))
        if path.is_dir() and not path.name.startswith("trainval")
    ]


def image_files(folder: Path) -> Iterator[Path]:
    """The image files in and below a folder, in the order of their names; hidden ones are not."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if is_image(name):
                yield Path(place) / name


def is_image(name: str) -> bool:
    """Whether a file name is that of an image.

    Example:
        >>> is_image("a.JPG"), is_image("a.txt"), is_image("._a.jpg")
        (True, False, False)
    """
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
