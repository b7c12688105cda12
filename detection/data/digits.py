"""The embedded data set: real handwritten digits on real photographs, as a COCO folder.

The digits are scikit-learn's (exemplars of 8x8 pixels, from E. Alpaydin and C. Kaynak,
Optical Recognition of Handwritten Digits, UCI 1998), the photographs those that come with
scikit-learn and scikit-image; nothing is downloaded.  Training and validation share neither an
exemplar nor a photograph.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from detection.data.errors import DataError
from detection.data.types import Categories

if TYPE_CHECKING:
    from detection.data.compositing import Materials

FORMAT = 1
"""Changes whenever the same parameters give other images."""

MANIFEST = "digits.json"

TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "china.jpg",
    "grass",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "rocket",
    "stereo_motorcycle",
)
VAL_PHOTOGRAPHS = ("chelsea", "coffee", "flower.jpg", "gravel")
VAL_SHARE = 5
"""Every fifth exemplar of each digit is for validation."""

ABANDONED_AFTER = 600.0
"""Seconds without a write after which a half-written folder is nobody's."""

digits_categories = Categories(
    names=tuple(str(digit) for digit in range(10)), ids=tuple(range(1, 11))
)
"""The digits 0 to 9 with the COCO ids 1 to 10."""


def compose_digits(
    root: Path,
    *,
    train_images: int = 4000,
    val_images: int = 500,
    size: int = 128,
    seed: int = 0,
) -> Path:
    """Compose the digits data set, or find it composed already.

    The folder is laid out as COCO 2017 (``train2017/``, ``val2017/``, ``annotations/``) with
    JPEG files of quality 95, and a manifest ``digits.json``.  Each image holds 1 to 5 digits of
    about 20 to 64 pixels (at ``size`` 128); an ``area`` is that of the box.  Equal parameters give
    equal bytes.  The folder appears under its name only when it is complete; several processes
    may compose it at once.

    Args:
        root: the folder to write.
        train_images: number of training images.
        val_images: number of validation images.
        size: side of the images in pixels, at least 64.
        seed: not negative.

    Returns:
        ``root``.

    Raises:
        DataError: ``root`` exists and is something else, has other parameters, or was changed
            since it was composed; it is then left as it is.
        ValueError: a parameter is out of its range.
        ImportError: scikit-learn or scikit-image is not installed.

    Example:
        >>> import tempfile
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> sorted(path.name for path in root.iterdir())
        ['annotations', 'digits.json', 'train2017', 'val2017']
    """
    root = Path(root)
    for name, value, least in (
        ("train_images", train_images, 1),
        ("val_images", val_images, 1),
        ("size", size, 64),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"compose_digits({name}={value}): at least {least}.")
    parameters = {
        "format": FORMAT,
        "train_images": train_images,
        "val_images": val_images,
        "size": size,
        "seed": seed,
    }
    if _is_composed(root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(root)
    partial = root.parent / f"{_partial_prefix(root)}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for number, (split, count) in enumerate((("train", train_images), ("val", val_images))):
            _write_split(partial, f"{split}2017", _materials(split), count, size, (seed, number))
        manifest = {"parameters": parameters, "sha256": _fingerprint(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _publish(partial, root, parameters)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _is_composed(root: Path, parameters: dict[str, int]) -> bool:
    """Whether ``root`` is the wanted data set; ``False`` if there is nothing at all."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = "it is left untouched; choose another folder, or delete it to have it composed anew."
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
        found, fingerprint = dict(manifest["parameters"]), manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{root}: this exists and is no digits data set; {remedy}") from None
    if found != parameters:
        differing = [
            f"{key} {found.get(key)} (wanted: {parameters.get(key)})"
            for key in sorted({*found, *parameters})
            if found.get(key) != parameters.get(key)
        ]
        raise DataError(f"{root}: the digits here have {', '.join(differing)}; {remedy}")
    if fingerprint != _fingerprint(root):
        raise DataError(f"{root}: files were changed since the digits were composed; {remedy}")
    return True


def _publish(partial: Path, root: Path, parameters: dict[str, int]) -> None:
    """Give a finished folder its name, unless another process was faster."""
    try:
        if root.exists():
            root.rmdir()  # an empty folder, which some systems do not replace
        partial.rename(root)
    except OSError:
        if not _is_composed(root, parameters):
            raise


def _partial_prefix(root: Path) -> str:
    return f".{root.name}.partial-"


def _clear_abandoned(root: Path) -> None:
    """Remove what processes that were killed have left, but nothing that is being written."""
    for partial in root.parent.glob(f"{_partial_prefix(root)}*"):
        folders = [partial, *(path for path in partial.glob("*") if path.is_dir())]
        if time.time() - max(path.stat().st_mtime for path in folders) > ABANDONED_AFTER:
            shutil.rmtree(partial, ignore_errors=True)


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of all files but the manifest and hidden ones."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*/[!.]*")):
        if not path.is_file():
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _write_split(
    folder: Path, name: str, materials: Materials, count: int, size: int, entropy: tuple[int, int]
) -> None:
    from detection.data.compositing import compose_image

    (folder / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        # Its own generator for every image: image 7 is the same however many there are.
        chance = np.random.default_rng((*entropy, image_id))
        pixels, boxes, digits = compose_image(materials, size, chance)
        file_name = f"{image_id:06d}.jpg"
        Image.fromarray(pixels).save(folder / name / file_name, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for box, digit in zip(boxes.round(2).tolist(), digits.tolist(), strict=True):
            width, height = round(box[2] - box[0], 2), round(box[3] - box[1], 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digits_categories.ids[digit],
                    "bbox": [box[0], box[1], width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "digit"}
        for number, name in zip(digits_categories.ids, digits_categories.names, strict=True)
    ]
    document = {
        "info": {"description": "Handwritten digits composed on photographs"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))


def _materials(split: str) -> Materials:
    """Exemplars and photographs of "train" or "val", which have none in common."""
    try:
        from skimage import data as photographs
        from sklearn.datasets import load_digits, load_sample_image

        from detection.data.compositing import Materials, sharpen
    except ImportError as error:
        raise ImportError(
            f"The digits data set needs scikit-learn, scikit-image and scipy ({error}); install "
            'them with: pip install ".[detection]"'
        ) from error
    levels, labels = load_digits(return_X_y=True)
    readable = _readable(levels, labels)
    levels, labels = levels[readable], labels[readable]
    rank = np.zeros(len(labels), dtype=np.int64)  # how many of the same digit came before
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    held_out = rank % VAL_SHARE == VAL_SHARE - 1
    chosen = held_out if split == "val" else ~held_out
    pictures = []
    for name in VAL_PHOTOGRAPHS if split == "val" else TRAIN_PHOTOGRAPHS:
        is_file = name.endswith(".jpg")
        pixels = load_sample_image(name) if is_file else getattr(photographs, name)()
        if isinstance(pixels, tuple):  # the left picture of a stereoscopic pair
            pixels = pixels[0]
        pictures.append(Image.fromarray(pixels).convert("RGB"))
    return Materials(
        exemplars=sharpen(levels[chosen].reshape(-1, 8, 8) / 16.0),
        labels=labels[chosen],
        photographs=tuple(pictures),
    )


def _readable(levels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which exemplars look like their label: at least 2 of their 5 nearest neighbours share it.

    It leaves out 15 of 1797 that a person cannot name either.
    """
    squares = (levels**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * levels @ levels.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :5]
    agreeing: np.ndarray = (labels[nearest] == labels[:, None]).sum(axis=1)
    return agreeing >= 2
