"""Small folders of labelled images in each format, to be changed by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (60, 40)
"""Width and height of every image."""

BOX = (6.0, 4.0, 24.0, 16.0)
"""``x, y, width, height`` of the one object of each image."""

CLASSES = ("cup", "car")


def picture(path: Path, number: int, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    """An image that no other number gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def instances(count: int = 3) -> dict[str, Any]:
    """A COCO document with ids 1, 2, ... and one object per image, of changing classes."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
        for i in range(1, count + 1)
    ]
    return {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1 + i % 2,
                "bbox": list(BOX),
                "area": BOX[2] * BOX[3],
                "iscrowd": 0,
            }
            for i in range(1, count + 1)
        ],
    }


def coco_folder(root: Path, train: Any = None, val: Any = None, count: int = 3) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", val)):
        content = instances(count) if content is None else content
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for i in range(1, count + 1):
            picture(root / split / f"{i}.png", i + 100 * (split == "val"))
    return root


YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cup, car]\n"
ROW = "{} 0.3 0.3 0.4 0.4\n"
"""`BOX` as fractions of `SIZE`."""


def yolo_folder(root: Path, yaml: str | None = YAML, count: int = 3) -> Path:
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        for i in range(1, count + 1):
            picture(root / "images" / split / f"{i}.png", i + 100 * (split == "val"))
            (root / "labels" / split / f"{i}.txt").write_text(ROW.format(i % 2))
    if yaml is None:
        (root / "classes.txt").write_text("cup\ncar\n")
    else:
        (root / "data.yaml").write_text(yaml)
    return root


def page(name: str = "cup", corners: tuple[float, ...] = (7, 5, 30, 20), more: str = "") -> str:
    """An XML file of Pascal VOC; the corners are `BOX` counted from 1, ends included."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners, strict=True))
    size = f"<width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth>"
    thing = f"<object><name>{name}</name><bndbox>{box}</bndbox>{more}</object>"
    return f"<annotation><filename>x.jpg</filename><size>{size}</size>{thing}</annotation>"


def voc_folder(root: Path, count: int = 3) -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}_{i}" for i in range(1, count + 1)]
        for i, name in enumerate(names, start=1):
            picture(root / "JPEGImages" / f"{name}.png", i + 100 * (split == "val"))
            (root / "Annotations" / f"{name}.xml").write_text(page(CLASSES[i % 2]))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root
