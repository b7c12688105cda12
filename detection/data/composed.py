"""Data sets that are composed on the spot: an ordinary COCO folder, written once and then reused.

What the embedded data sets have in common: the manifest that says with which parameters a folder
was composed, the fingerprint that tells whether it was changed since, the annotations, and the
publication of a finished folder under its name.  What an image shows is a `Composition`'s own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from detection.data.errors import DataError
from detection.data.types import Categories

ABANDONED_AFTER = 600.0
"""Seconds without a write after which a half-written folder is nobody's."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pixels ``(h, w, 3)`` uint8, boxes ``(n, 4)`` as corners, and the label of each box."""


@dataclass(frozen=True)
class Composition:
    """A data set that can be composed.

    Attributes:
        name: what its images show, in the plural; the manifest is ``NAME.json``.
        format: changes whenever the same parameters give other images.
        description: for the annotations.
        categories: its classes.
        supercategories: of each class.
        least_size: smallest side of its images in pixels.
        materials: what the images of the split "train" or "val" are made of.
        draw: one image of a side from materials and all its randomness.
    """

    name: str
    format: int
    description: str
    categories: Categories
    supercategories: tuple[str, ...]
    least_size: int
    materials: Callable[[str], Any]
    draw: Callable[[Any, int, Generator], Drawn]

    @property
    def manifest(self) -> str:
        """The file that says with which parameters a folder was composed."""
        return f"{self.name}.json"


def compose(
    composition: Composition,
    root: Path,
    *,
    train_images: int,
    val_images: int,
    size: int,
    seed: int,
) -> Path:
    """Compose a data set, or find it composed already.

    The folder appears under its name only when it is complete; several processes may compose it
    at once.

    Args:
        composition: what to compose.
        root: the folder to write.
        train_images: number of training images.
        val_images: number of validation images.
        size: side of the images in pixels.
        seed: not negative.

    Returns:
        ``root``.

    Raises:
        DataError: ``root`` exists and is something else, has other parameters, or was changed
            since it was composed; it is then left as it is.
        ValueError: a parameter is out of its range.
    """
    root = Path(root)
    for name, value, least in (
        ("train_images", train_images, 1),
        ("val_images", val_images, 1),
        ("size", size, composition.least_size),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"compose_{composition.name}({name}={value}): at least {least}.")
    parameters = {
        "format": composition.format,
        "train_images": train_images,
        "val_images": val_images,
        "size": size,
        "seed": seed,
    }
    if is_composed(composition, root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(root)
    partial = root.parent / f"{_partial_prefix(root)}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for number, (split, count) in enumerate((("train", train_images), ("val", val_images))):
            materials = composition.materials(split)
            write_split(
                composition, partial, f"{split}2017", materials, count, size, (seed, number)
            )
        manifest = {"parameters": parameters, "sha256": fingerprint(partial)}
        (partial / composition.manifest).write_text(json.dumps(manifest, indent=2) + "\n")
        _publish(composition, partial, root, parameters)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def is_composed(composition: Composition, root: Path, parameters: dict[str, int]) -> bool:
    """Whether ``root`` is the wanted data set; ``False`` if there is nothing at all.

    Raises:
        DataError: it is something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    name = composition.name
    remedy = "it is left untouched; choose another folder, or delete it to have it composed anew."
    try:
        manifest = json.loads((root / composition.manifest).read_bytes())
        found, stated = dict(manifest["parameters"]), manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{root}: this exists and is no {name} data set; {remedy}") from None
    if found != parameters:
        differing = [
            f"{key} {found.get(key)} (wanted: {parameters.get(key)})"
            for key in sorted({*found, *parameters})
            if found.get(key) != parameters.get(key)
        ]
        raise DataError(f"{root}: the {name} here have {', '.join(differing)}; {remedy}")
    if stated != fingerprint(root):
        raise DataError(f"{root}: files were changed since the {name} were composed; {remedy}")
    return True


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of all files but the manifest and hidden ones."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*/[!.]*")):
        if not path.is_file():
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def write_split(
    composition: Composition,
    folder: Path,
    name: str,
    materials: Any,
    count: int,
    size: int,
    entropy: tuple[int, int],
) -> None:
    """Draw the images of a split, as JPEG files of quality 95, and write their annotations.

    Args:
        composition: what to compose.
        folder: of the data set.
        name: of the split's folder.
        materials: of the split.
        count: number of images.
        size: side of the images in pixels.
        entropy: seed of the data set and number of the split.
    """
    (folder / name).mkdir(parents=True)
    ids = composition.categories.ids
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        # Its own generator for every image: image 7 is the same however many there are.
        chance = np.random.default_rng((*entropy, image_id))
        pixels, boxes, labels = composition.draw(materials, size, chance)
        file_name = f"{image_id:06d}.jpg"
        Image.fromarray(pixels).save(folder / name / file_name, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for box, label in zip(boxes.round(2).tolist(), labels.tolist(), strict=True):
            width, height = round(box[2] - box[0], 2), round(box[3] - box[1], 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [box[0], box[1], width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories = [
        {"id": number, "name": title, "supercategory": kind}
        for number, title, kind in zip(
            ids, composition.categories.names, composition.supercategories, strict=True
        )
    ]
    document = {
        "info": {"description": composition.description},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))


def _publish(
    composition: Composition, partial: Path, root: Path, parameters: dict[str, int]
) -> None:
    """Give a finished folder its name, unless another process was faster."""
    try:
        if root.exists():
            root.rmdir()  # an empty folder, which some systems do not replace
        partial.rename(root)
    except OSError:
        if not is_composed(composition, root, parameters):
            raise


def _partial_prefix(root: Path) -> str:
    return f".{root.name}.partial-"


def _clear_abandoned(root: Path) -> None:
    """Remove what processes that were killed have left, but nothing that is being written."""
    for partial in root.parent.glob(f"{_partial_prefix(root)}*"):
        folders = [partial, *(path for path in partial.glob("*") if path.is_dir())]
        if time.time() - max(path.stat().st_mtime for path in folders) > ABANDONED_AFTER:
            shutil.rmtree(partial, ignore_errors=True)
