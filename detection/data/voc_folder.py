"""Folders of Pascal VOC annotations: one XML file per image.

The layouts are that of the challenge (``JPEGImages/``, ``Annotations/`` and the lists of
``ImageSets/Main/``, also below ``VOCdevkit/VOC2012/``), and XML files beside their images, in one
folder or in one for each split.

Coordinates are those of the challenge's development kit: pixels are counted from 1, and a box
includes its last row and column.  So ``xmin 1, xmax 10`` is ten pixels wide from the left edge, and
becomes ``x 0, width 10``.  Tools that count from 0 write boxes one pixel to the left of it.

An object marked ``difficult`` is neither trained on nor scored, as in the challenge: it becomes a
crowd region of COCO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from detection.data.errors import DataError
from detection.data.images import stored_size
from detection.data.problems import Problem, Problems, shown
from detection.data.reading import is_plain, read_text, read_xml
from detection.data.splits import SPLITS, WHOLE, Layout, Reading, is_image, split_folders


def find_voc(root: Path) -> Layout | None:
    """The splits of a folder of Pascal VOC; `None` if it is none.

    Raises:
        DataError: it holds several years.
    """
    for parent in (root, root / "VOCdevkit"):
        years = [
            path
            for path in sorted(parent.glob("VOC20*"))
            if (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir()
        ]
        if len(years) > 1:
            names = ", ".join(path.name for path in years)
            raise DataError(f"{parent}: cannot tell which of {names} to use; give one's path.")
        if years:
            root = years[0]
            break
    annotations = root / "Annotations"
    places = [root / name for name in ("JPEGImages", "images") if (root / name).is_dir()]
    pictures = places[0] if places else root
    complaints: dict[str, str] = {}
    folder = _Folder(root)
    if annotations.is_dir() and any(annotations.glob("*.xml")):
        lists = root / "ImageSets" / "Main"
        for split in SPLITS:
            if (lists / f"{split}.txt").is_file():
                folder.add(split, pictures, annotations, lists / f"{split}.txt")
            else:
                complaints[split] = f"there is no ImageSets/Main/{split}.txt"
        if not folder.parts:
            folder.add(WHOLE, pictures, annotations, None)
    else:
        for split in SPLITS:
            found = [path for path in split_folders(root, split) if any(path.glob("*.xml"))]
            if len(found) == 1:
                folder.add(split, found[0], found[0], None)
            else:
                names = ", ".join(path.name for path in found)
                complaints[split] = (
                    f"cannot tell which of {names} is {split}"
                    if found
                    else f"there is no folder {split} of images and XML files"
                )
        if not folder.parts and any(root.glob("*.xml")):
            folder.add(WHOLE, root, root, None)
    if not folder.parts:
        return None
    splits: dict[str, Callable[[Problems], Reading | None]] = {
        split: partial(folder.read, split) for split in folder.parts
    }
    return Layout("Pascal VOC", root, splits, complaints)


@dataclass(frozen=True)
class _Object:
    name: str
    bbox: list[float]
    difficult: bool
    place: str


@dataclass(frozen=True)
class _Page:
    """The content of one XML file, as far as it is sound."""

    size: tuple[int, int] | None
    objects: list[_Object]
    problems: list[Problem]


@dataclass
class _Folder:
    """The splits of one root: each XML file is read once, for the classes are those of all."""

    root: Path
    parts: dict[str, tuple[Path, Path, Path | None]] = field(default_factory=dict)
    pages: dict[Path, _Page] = field(default_factory=dict)

    def add(self, split: str, images: Path, annotations: Path, listing: Path | None) -> None:
        self.parts[split] = (images, annotations, listing)

    def read(self, split: str, problems: Problems) -> Reading | None:
        images, annotations, _ = self.parts[split]
        names = self._names(split, problems)
        others = [name for other in self.parts for name in self._classes(other)]
        classes = {name: i for i, name in enumerate(sorted(set(others)), start=1)}
        files: dict[str, list[str]] = {}
        for path in sorted(images.iterdir()):
            if is_image(path.name):
                files.setdefault(path.stem, []).append(path.name)
        records: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        places: list[str] = []
        from_zero = 0
        for number, name in enumerate(names, start=1):
            page = self._page(annotations / f"{name}.xml")
            for problem in page.problems:
                problems.add(problem)
            found = files.get(name, [])
            if len(found) != 1:
                fact = f"there are {', '.join(found)}" if found else f"no image {name}.*"
                fact = fact if found else f"there is {fact} in {images}"
                problems.error(
                    *("no image", annotations / f"{name}.xml", "", fact),
                    "keep exactly one image of this name, or remove the annotation",
                )
                continue
            size = page.size or self._stored(images / found[0], problems)
            if size is None:
                continue
            records.append(
                {"id": number, "file_name": found[0], "height": size[0], "width": size[1]}
            )
            for item in page.objects:
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": classes[item.name],
                        "bbox": item.bbox,
                        "iscrowd": int(item.difficult),
                    }
                )
                if item.bbox[2] >= 0 and item.bbox[3] >= 0:
                    objects[-1]["area"] = item.bbox[2] * item.bbox[3]
                places.append(f"{name}.xml, {item.place}")
                from_zero += min(item.bbox[:2]) == -1
        if from_zero:
            fact = f"{from_zero} of {len(objects)} boxes begin at pixel 0, and VOC counts from 1"
            remedy = "add 1 to all coordinates, or live with boxes that are off by one pixel"
            problems.warn("pixels counted from 0", annotations, "", fact, remedy)
        categories = [{"id": number, "name": name} for name, number in classes.items()]
        document = {"images": records, "annotations": objects, "categories": categories}
        return Reading(images, annotations, document, places)

    def _names(self, split: str, problems: Problems) -> list[str]:
        _, annotations, listing = self.parts[split]
        if listing is None:
            return [path.stem for path in sorted(annotations.glob("*.xml"))]
        names = []
        for number, line in enumerate((read_text(listing, problems) or "").splitlines(), start=1):
            if not line.strip():
                continue
            name = line.split()[0]
            if is_plain(name) and "/" not in name and "\\" not in name:
                names.append(name)
            else:
                fact = f"{shown(name)} is no name of an annotation"
                problems.error("bad list", listing, f"line {number}", fact, "correct it")
        if len(names) != len(set(names)):
            fact = f"{len(names) - len(set(names))} names occur more than once"
            problems.warn("repeated name", listing, "", fact, "each is used once")
        return list(dict.fromkeys(names))

    def _classes(self, split: str) -> list[str]:
        annotations = self.parts[split][1]
        names = self._names(split, Problems())
        return [
            item.name for name in names for item in self._page(annotations / f"{name}.xml").objects
        ]

    def _page(self, path: Path) -> _Page:
        if path not in self.pages:
            self.pages[path] = _read_page(path)
        return self.pages[path]

    def _stored(self, path: Path, problems: Problems) -> tuple[int, int] | None:
        try:
            return stored_size(path, turned=False)
        except DataError as error:
            fact = str(error).removeprefix(f"{path}: ").rstrip(".")
            problems.error("unreadable image", path, "", fact, "fetch it again")
            return None


def _read_page(path: Path) -> _Page:
    problems = Problems()
    root = read_xml(path, problems)
    if root is None:
        return _Page(None, [], problems.kept)
    size = root.find("size")
    if size is not None and size.find("height") is None and size.find("width") is None:
        size = None
    sides = [_number(size, key) for key in ("height", "width")] if size is not None else [0.0, 0.0]
    whole = None
    if all(side is not None and side >= 1 and side == int(side) for side in sides):
        whole = int(sides[0] or 0), int(sides[1] or 0)
    elif any(side is None or side > 0 for side in sides):
        assert size is not None
        given = (size.findtext("height"), size.findtext("width"))
        fact = f"height and width are {shown(given[0])} and {shown(given[1])}"
        problems.error("bad size", path, "", fact, "give whole numbers of pixels, or remove size")
    else:
        fact, remedy = "it has no size of the image", "that of the image file is taken"
        problems.warn("no size", path, "", fact, remedy)
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        place = f"object {number}"
        name = (item.findtext("name") or "").strip()
        if not is_plain(name):
            fact = f"{shown(name)} is no name of a class"
            problems.error("bad category name", path, place, fact, "give the object a name")
            continue
        frame = item.find("bndbox")
        keys = ("xmin", "ymin", "xmax", "ymax")
        corners = [None] * 4 if frame is None else [_number(frame, key) for key in keys]
        if any(value is None for value in corners):
            fact = "it has no bndbox" if frame is None else f"its bndbox lacks one of {keys}"
            problems.error("bad bbox", path, place, fact, "give four finite numbers of pixels")
            continue
        x1, y1, x2, y2 = (float(value or 0) for value in corners)
        difficult = (item.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            fact = f"difficult is {shown(difficult)}"
            problems.error("bad difficult", path, place, fact, "it must be 0 or 1")
            continue
        bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        objects.append(_Object(name, bbox, difficult == "1", place))
    return _Page(whole, objects, problems.kept)


def _number(parent: Element, key: str) -> float | None:
    try:
        value = float(parent.findtext(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
