"""Folders of YOLO labels: a text file per image, in ``labels/`` where that is in ``images/``.

A row is ``class x y width height``, the centre and the size as fractions of the image as a viewer
shows it (https://docs.ultralytics.com/datasets/detect/), or ``class x1 y1 x2 y2 x3 y3 ...``, a
polygon, of which the box is taken.  ``data.yaml`` names the splits and the classes; without one,
the classes are the lines of ``classes.txt`` and the splits folders of ``images/``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotations import looks_like_corners
from detection.data.errors import DataError
from detection.data.images import stored_size
from detection.data.problems import Problems, shown
from detection.data.reading import is_plain, read_text, read_yaml
from detection.data.splits import (
    SPLITS,
    WHOLE,
    Layout,
    Reading,
    image_files,
    is_image,
    split_folders,
)

TOLERANCE = 0.01
"""By how much a fraction may exceed 0 to 1: label tools round."""

_CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
_THREADS = 8


def find_yolo(root: Path) -> Layout | None:
    """The splits of a YOLO folder, or of a ``data.yaml``; `None` if it is neither.

    Raises:
        DataError: a ``data.yaml`` is there that cannot be used, or several are.
    """
    file = root if root.is_file() else _find_yaml(root)
    return _without_yaml(root) if file is None else _with_yaml(file)


def label_file(image: Path) -> Path:
    """Where the labels of an image are.

    Example:
        >>> label_file(Path("own/images/train/a.jpg")).as_posix()
        'own/labels/train/a.txt'
        >>> label_file(Path("own/a.jpg")).as_posix()
        'own/a.txt'
    """
    parts = list(image.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _find_yaml(root: Path) -> Path | None:
    found = [path for path in sorted(root.iterdir()) if path.suffix.lower() in (".yaml", ".yml")]
    usual = [path for path in found if path.stem in ("data", "dataset")]
    if len(usual) == 1:
        return usual[0]
    found = [path for path in usual or found if _speaks_of_classes(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{root}: cannot tell which of {names} to use; give the path of one.")
    return found[0] if found else None


def _speaks_of_classes(path: Path) -> bool:
    content = read_yaml(path, Problems())
    return isinstance(content, dict) and "names" in content


def _with_yaml(file: Path) -> Layout:
    problems = Problems()
    content = read_yaml(file, problems)
    if (content is None and not problems.number_of_errors) or isinstance(content, (list, str, int)):
        problems.error("not YOLO", file, "", "this is no list of splits and names", "see the docs")
    problems.raise_errors()
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: this is no data.yaml; it must have the keys train, val and names."
        )
    if "kpt_shape" in content:
        raise DataError(
            f"{file}: kpt_shape says that the labels are key points, whose rows are no boxes; "
            "export the boxes."
        )
    names = _class_names(content, file, problems)
    base = file.parent
    if content.get("path") is not None:
        if not isinstance(content["path"], str) or not is_plain(content["path"]):
            fact = f"path is {shown(content['path'])}"
            problems.error("bad path", file, "", fact, "give a folder, or leave the line out")
        else:
            base = file.parent / os.path.expanduser(content["path"])
            if not base.is_dir():
                fact = f"path leads to {base}, which is no folder"
                remedy = "correct it, or leave the line out if the folder is that of this file"
                problems.error("bad path", file, "", fact, remedy)
    problems.raise_errors()
    splits: dict[str, Callable[[Problems], Reading | None]] = {}
    for split in SPLITS:
        key = "valid" if split == "val" and content.get("val") is None else split
        entries = content.get(key)
        if entries is None:
            continue
        entries = entries if isinstance(entries, list) else [entries]
        for entry in entries:
            if not isinstance(entry, str) or not is_plain(entry):
                raise DataError(
                    f"{file}: {split} is {shown(entries)}; give a folder of images, a text file "
                    "that lists images, or a list of such."
                )
        splits[split] = partial(_read_entries, entries, base, file, names)
    missing: dict[str, str] = {
        split: f"{file.name} has no {split}" for split in SPLITS if split not in splits
    }
    return Layout("YOLO", file.parent, splits, missing)


def _class_names(content: dict[Any, Any], file: Path, problems: Problems) -> dict[int, str]:
    given = content.get("names")
    remedy = "give a list of names, or one name for each number"
    if isinstance(given, list):
        given = dict(enumerate(given))
    if not isinstance(given, dict) or not given:
        problems.error("bad names", file, "", f"names is {shown(given)}", remedy)
        return {}
    names: dict[int, str] = {}
    for key, name in given.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
            problems.error("bad names", file, "", f"{shown(key)} is no class number", remedy)
        elif isinstance(name, (str, int)) and not isinstance(name, bool) and is_plain(str(name)):
            names[number] = str(name)
        else:
            fact = f"the name of class {number} is {shown(name)}"
            problems.error("bad names", file, "", fact, "put it in quotation marks")
    count = content.get("nc")
    if count is not None and count != len(given):
        fact = f"nc is {shown(count)}, and there are {len(given)} names"
        problems.error("bad names", file, "", fact, "correct one of them, or leave nc out")
    return names


def _without_yaml(root: Path) -> Layout | None:
    file = next((root / name for name in _CLASS_FILES if (root / name).is_file()), None)
    if file is None:
        return None
    problems = Problems()
    text = read_text(file, problems)
    problems.raise_errors()
    lines = (text or "").rstrip().splitlines()
    names = {i: line.strip() for i, line in enumerate(lines)}
    bad = [i for i, name in names.items() if not is_plain(name)]
    if bad or not names:
        line = bad[0] + 1 if bad else 1
        raise DataError(f"{file}, line {line}: this is no class name; give one name per line.")
    splits: dict[str, Callable[[Problems], Reading | None]] = {}
    missing: dict[str, str] = {}
    for split in SPLITS:
        places = split_folders(root / "images", split)
        places += [path / "images" for path in split_folders(root, split)]
        places = [path for path in places if path.is_dir()]
        places = places or [root / f"{split}.txt"] if (root / f"{split}.txt").is_file() else places
        if len(places) == 1:
            entries = [str(places[0].relative_to(root))]
            splits[split] = partial(_read_entries, entries, root, file, names)
        else:
            found = ", ".join(str(path.relative_to(root)) for path in places)
            missing[split] = (
                f"cannot tell which of {found} is {split}"
                if places
                else (f"there is neither images/{split}/ nor {split}/images/ nor {split}.txt")
            )
    if not splits and not any(places.startswith("cannot") for places in missing.values()):
        folder = "images" if (root / "images").is_dir() else "."
        splits[WHOLE] = partial(_read_entries, [folder], root, file, names)
    return Layout("YOLO", root, splits, missing)


def _read_entries(
    entries: Sequence[str], base: Path, source: Path, names: dict[int, str], problems: Problems
) -> Reading | None:
    files: list[Path] = []
    for entry in entries:
        files += _images_of(entry, base, source, problems)
    files = list(dict.fromkeys(files))
    if not files:
        if not problems.number_of_errors:
            fact = f"there are no images in {', '.join(entries)}"
            problems.error("no images", source, "", fact, "put them there, or correct the path")
        return None
    folder = Path(os.path.commonpath([path.parent for path in files]))
    return read_yolo(folder, files, names, source, problems)


def _images_of(entry: str, base: Path, source: Path, problems: Problems) -> list[Path]:
    place = base / entry
    if not place.exists() and entry.startswith("../"):
        # Roboflow writes "../train/images" into the folder that holds train/.
        place = base / entry.removeprefix("../")
    if place.is_dir():
        return [Path(os.path.abspath(path)) for path in image_files(place)]
    if place.suffix != ".txt" or not place.is_file():
        fact = f"{place} is neither a folder of images nor a text file that lists them"
        problems.error("bad path", source, "", fact, "correct the path")
        return []
    text = read_text(place, problems)
    found = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if not is_plain(name) or not is_image(os.path.basename(name)):
            fact = f"{shown(name)} is no image file"
            problems.error("bad list", place, f"line {number}", fact, "list one image per line")
            continue
        start = place.parent if name.startswith("./") else base
        found.append(Path(os.path.abspath(start / name)))
    return found


def read_yolo(
    folder: Path,
    files: Sequence[Path],
    names: dict[int, str],
    source: Path,
    problems: Problems,
) -> Reading:
    """The labels of images as a COCO document; ids count from 1, those of classes are YOLO's.

    Args:
        folder: above all images.
        files: the images.
        names: of the classes, by number.
        source: what problems name as their file where they are not of one label file.
        problems: is added to.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places: list[str] = []
    fractions: list[tuple[float, ...]] = []
    absent = 0
    with ThreadPoolExecutor(_THREADS) as threads:
        sizes = threads.map(_size_or_fault, files)
        for number, (path, size) in enumerate(zip(files, sizes, strict=True), start=1):
            labels = label_file(path)
            if isinstance(size, str):
                problems.error(
                    *("unreadable image", path, "", size),
                    "fetch the image again, or remove it and its labels",
                )
                continue
            height, width = size
            name = path.relative_to(folder).as_posix()
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            if not labels.exists():
                absent += 1
                fact = f"there is no label file {labels}"
                remedy = "it counts as an image without objects; add an empty file if it is one"
                problems.warn("no label file", path, "", fact, remedy)
                continue
            for line, row in _rows(labels, names, problems):
                x, y, w, h = row[1:]
                fractions.append((x, y, w, h))
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(row[0]),
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
                places.append(f"{labels}, line {line}")
    if images and absent == len(images):
        fact = f"none of the {len(images)} images has a label file; the first would be"
        where = label_file(folder / images[0]["file_name"])
        problems.error("no labels", source, "", f"{fact} {where}", "put the label files there")
    boxes = np.array(fractions, dtype=np.float64).reshape(-1, 4)
    centres, halves = boxes[:, :2], boxes[:, 2:] / 2
    excess = np.maximum(halves - centres, centres + halves - 1).max(axis=1, initial=-1.0)
    overruns: np.ndarray = excess > TOLERANCE
    if looks_like_corners(boxes, np.ones((len(boxes), 2)), overruns):
        fact = (
            f"{overruns.sum()} of {len(boxes)} boxes leave their images, and nearly "
            "all would fit if they were x1 y1 x2 y2"
        )
        remedy = "write every row as class, centre x, centre y, width, height"
        problems.error("corners given as sizes", source, "", fact, remedy)
    categories = [{"id": number, "name": name} for number, name in names.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return Reading(folder, source, document, places)


def _size_or_fault(path: Path) -> tuple[int, int] | str:
    try:
        return stored_size(path, turned=True)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ").rstrip(".")


def _rows(
    file: Path, names: dict[int, str], problems: Problems
) -> list[tuple[int, tuple[float, ...]]]:
    """Line numbers and ``(class, x, y, width, height)`` of the sound rows of a label file."""
    text = read_text(file, problems)
    found = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip():
            continue
        row = _row(line)
        fault = row if isinstance(row, str) else _fault_of(row, names)
        if fault is None and not isinstance(row, str):
            found.append((number, row))
        elif fault is not None:
            remedy = "write class, x, y, width, height: the centre and size as fractions"
            problems.error("bad label", file, f"line {number}", fault, remedy)
    return found


def _row(line: str) -> tuple[float, ...] | str:
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return f"{shown(line.strip())} are not all numbers"
    if not all(map(math.isfinite, numbers)):
        return f"{shown(line.strip())} are not all finite"
    if len(numbers) == 5:
        return tuple(numbers)
    if len(numbers) == 6:
        return "there are 6 numbers, as in predictions with a score, and not 5"
    if len(numbers) < 7 or len(numbers) % 2 == 0:
        return f"there are {len(numbers)} numbers, and not 5 (a box), 7, 9, 11, ... (a polygon)"
    xs, ys = numbers[1::2], numbers[2::2]
    if min(xs + ys) < -TOLERANCE or max(xs + ys) > 1 + TOLERANCE:
        return _not_a_fraction(min(xs + ys), max(xs + ys))
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return numbers[0], (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _fault_of(row: tuple[float, ...], names: dict[int, str]) -> str | None:
    if row[0] != int(row[0]) or int(row[0]) not in names:
        return f"there is no class {row[0]:g}; the numbers are {shown(sorted(names))}"
    low, high = min(row[1:]), max(row[1:])
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return None if min(row[3:]) >= 0 else f"width {row[3]:g} or height {row[4]:g} is negative"
    text = _not_a_fraction(low, high)
    if low >= 0 and row[3] > row[1] and row[4] > row[2]:
        text += "; these may be the corners x1 y1 x2 y2 in pixels"
    return text


def _not_a_fraction(low: float, high: float) -> str:
    wrong = high if high > 1 + TOLERANCE else low
    return f"{wrong:g} is no fraction of the image from 0 to 1 (pixels must be divided by its size)"
