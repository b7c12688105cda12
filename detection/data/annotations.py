"""The instances file of COCO (https://cocodataset.org/#format-data), checked line by line.

Every data set becomes such a document, whatever its format, and the rules here are the only ones:
each fault is stated as a `Problem` that names its record, and the reading goes on.  The boxes of
training are packed into arrays: a data set of 10^5 images then costs its loader's workers no
copies of Python objects.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from detection.data.images import MOST_PIXELS
from detection.data.problems import Problem, Problems, shown
from detection.data.reading import inside, is_plain, read_json
from detection.data.types import Categories

MOST = 1e9
"""Coordinates in pixels and areas are below this, their squares therefore finite."""

NOT_TRAINED_ON = "box without area"
"""The rule of annotations that are no training targets though they are no crowds."""

_OVERRUN = 1.0
"""Pixels by which a box may leave its image without being mentioned: rounding."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """A checked instances file; images are in ascending order of id.

    Args:
        source: where it was read: a file, or the folder of many.
        document: the parsed file, with ``area`` and ``iscrowd`` filled in.
        categories: the classes.
        image_ids: id of each image.
        names: file name of each image.
        sizes: ``(height, width)`` of each image.
        boxes: ``(M, 4)`` float32 corners of all training targets, image after image.
        labels: ``(M,)`` int64 contiguous classes.
        starts: ``(images + 1,)`` int64; image ``i`` owns the rows ``starts[i]:starts[i + 1]``.
        crowds: number of crowd regions.
        not_trained_on: a problem for each annotation whose box has no area in its image.
    """

    source: Path
    document: dict[str, Any]
    categories: Categories
    image_ids: list[int]
    names: list[str]
    sizes: list[tuple[int, int]]
    boxes: Tensor
    labels: Tensor
    starts: Tensor
    crowds: int
    not_trained_on: tuple[Problem, ...]


def read_annotations(path: Path) -> Annotations:
    """Read and check an instances file.

    Crowd regions (``iscrowd`` 1) stay in ``document`` for the evaluation and are no training
    targets.  Boxes are clipped to their image; those with no area left are not trained on and
    are listed in ``not_trained_on``.  An absent ``area`` is that of the box, an absent
    ``iscrowd`` 0.  Polygons and whatever else a detector has no use for are not kept.

    Raises:
        DataError: the file is missing, too large, not JSON or not an instances file; an id is
            repeated or unknown; a box is malformed; there are no images or no annotations.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "instances.json"
        >>> _ = path.write_text(json.dumps({
        ...     "images": [{"id": 3, "file_name": "3.jpg", "height": 40, "width": 60}],
        ...     "categories": [{"id": 9, "name": "cup"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 3, "category_id": 9, "bbox": [50, 10, 20, 5]}],
        ... }))
        >>> read_annotations(path).boxes
        tensor([[50., 10., 60., 15.]])
    """
    problems = Problems()
    document = parse_instances(path, problems)
    content = None if document is None else check_annotations(document, path, problems)
    problems.raise_errors()
    assert content is not None
    return content


def parse_instances(path: Path, problems: Problems) -> dict[str, Any] | None:
    """The document of an instances file, or `None` and a problem where it is none."""
    document = read_json(path, problems)
    expected = ("images", "annotations", "categories")
    if document is None and problems.number_of_errors:
        return None
    if not isinstance(document, dict):
        fact = f"a COCO instances file is an object with the lists {', '.join(expected)}"
        problems.error("not COCO", path, "", fact, "give such a file")
        return None
    absent = [key for key in expected if not isinstance(document.get(key), list)]
    if absent:
        fact = f"this is no COCO instances file, for it has no list of {', '.join(absent)}"
        problems.error("not COCO", path, "", fact, "give an instances file")
        return None
    return document


def check_annotations(
    document: dict[str, Any],
    source: Path,
    problems: Problems,
    places: Sequence[str] | None = None,
) -> Annotations | None:
    """Check a document and state all that is wrong with it.

    Args:
        document: of COCO's instances format; missing fields are filled in.
        source: what problems name as their file.
        problems: is added to.
        places: what problems call each annotation, where it has not come from a COCO file.

    Returns:
        What is in order, which is of use for training only if there were no errors; `None` if
        there is no class or no image in order.
    """
    categories = _check_categories(document["categories"], source, problems)
    index, names, sizes = _check_images(document["images"], source, problems)
    records = document["annotations"]
    if not records:
        fact = "the annotation list is empty; there is nothing to learn or to evaluate"
        problems.error("no annotations", source, "", fact, "give a file with annotations")
    if categories is None or not names:
        return None
    class_of = {category_id: i for i, category_id in enumerate(categories.ids)}
    owners, labels, corners, which = [], [], [], []
    crowds, absent = 0, {"area": 0, "iscrowd": 0}

    def place(position: int) -> str:
        if places is not None:
            return places[position]
        record = records[position]
        return f"annotation {record['id']} (image {shown(record.get('image_id'))})"

    for position, record in _unique(records, "annotation", source, problems):
        image = _look_up(index, record.get("image_id"))
        label = _look_up(class_of, record.get("category_id"))
        for kind, found in (("image", image), ("category", label)):
            if found is None:
                fact = f"there is no {kind} with id {shown(record.get(f'{kind}_id'))}"
                remedy = f"add the {kind}, or remove the annotation"
                problems.error(f"unknown {kind}", source, place(position), fact, remedy)
        box: Any = record.get("bbox")
        fault = _fault_of(box)
        if fault is not None:
            remedy = "correct the bbox, or remove the annotation"
            problems.error(fault[0], source, place(position), fault[1], remedy)
        for key in absent:
            absent[key] += key not in record
        if fault is None:
            record.setdefault("area", box[2] * box[3])
        area = record.get("area", 0.0)
        if not _is_number(area, MOST**2) or area < 0:
            remedy = "give a number not below 0, or leave it out"
            problems.error(
                "bad area", source, place(position), f"the area is {shown(area)}", remedy
            )
        crowd = record.setdefault("iscrowd", 0)
        if isinstance(crowd, bool) or not isinstance(crowd, int) or crowd not in (0, 1):
            fact = f"iscrowd is {shown(crowd)}"
            problems.error("bad iscrowd", source, place(position), fact, "it must be 0 or 1")
        elif crowd:
            crowds += 1
        elif image is not None and label is not None and fault is None:
            owners.append(image)
            labels.append(label)
            corners.append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
            which.append(position)
    for key, meaning in (("area", "that of its box"), ("iscrowd", "0")):
        if absent[key]:
            fact = f"{absent[key]} of {len(records)} annotations have no {key}"
            remedy = f"each is taken to be {meaning}, so nothing need be done if that is right"
            problems.warn(f"no {key}", source, "", fact, remedy)

    def mention(rows: np.ndarray, rule: str, fact: str, remedy: str) -> None:
        for i in rows.tolist():
            box, (height, width) = records[which[i]]["bbox"], sizes[owners[i]]
            text = f"the box {shown(box)} {fact} the image of {width}x{height} pixels"
            problems.warn(rule, source, place(which[i]), text, remedy)

    owner = np.array(owners, dtype=np.int64)
    whole = np.array(corners, dtype=np.float64).reshape(-1, 4)
    limits = np.array(sizes, dtype=np.float64)[owner][:, [1, 0, 1, 0]]
    boxes = np.clip(whole, 0.0, limits).astype(np.float32)
    visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    before = len(problems.kept)
    mention(np.flatnonzero(~visible), NOT_TRAINED_ON, "has no area inside", "it is not trained on")
    not_trained_on = tuple(problems.kept[before:])
    excess = np.abs(whole - np.clip(whole, 0.0, limits)).max(axis=1, initial=0.0)
    overruns: np.ndarray = excess > _OVERRUN
    if looks_like_corners(
        np.column_stack([whole[:, :2], whole[:, 2:] - whole[:, :2]]), limits[:, :2], overruns
    ):
        fact = (
            f"{overruns.sum()} of {len(overruns)} boxes leave their images, and nearly all would "
            "fit if they were (x1, y1, x2, y2)"
        )
        problems.error(
            *("corners given as sizes", source, "", fact),
            "write every bbox as (x, y, width, height)",
        )
    else:
        rows = np.flatnonzero(overruns & visible)
        mention(rows, "box leaves the image", "reaches beyond", "the part outside is cut off")
    order = np.flatnonzero(visible)[np.argsort(owner[visible], kind="stable")]
    counts = np.bincount(owner[visible], minlength=len(names))
    return Annotations(
        source=source,
        document=document,
        categories=categories,
        image_ids=list(index),
        names=names,
        sizes=sizes,
        boxes=torch.from_numpy(boxes[order]),
        labels=torch.from_numpy(np.array(labels, dtype=np.int64)[order]),
        starts=torch.from_numpy(np.concatenate(([0], np.cumsum(counts)))),
        crowds=crowds,
        not_trained_on=not_trained_on,
    )


def looks_like_corners(boxes: np.ndarray, limits: np.ndarray, overruns: np.ndarray) -> bool:
    """Whether boxes that should be two numbers of place and two of size are two corners.

    Told only where it is all but certain: most boxes leave their image as they stand, and nearly
    all would lie inside it as ``(x1, y1, x2, y2)``.

    Args:
        boxes: ``(M, 4)`` as they were given.
        limits: ``(M, 2)`` width and height of the image of each, in the same unit.
        overruns: ``(M,)`` whether each leaves its image as it stands.
    """
    if len(boxes) < 3 or overruns.mean() <= 0.5:
        return False
    fits = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits * 1.001 + 1e-3)
    return bool(((boxes[:, :2] >= 0) & fits).all(axis=1).mean() >= 0.95)


def _unique(
    records: list[Any], kind: str, source: Path, problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Position and record of those that are objects with an integer id of their own."""
    seen: set[int] = set()
    for position, record in enumerate(records):
        number = record.get("id") if isinstance(record, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**63:
            place = f"{kind} number {position} of the list"
            problems.error("no id", source, place, "it has no integer id of 64 bits", "give it one")
        elif number in seen:
            fact = f"the {kind} id {number} occurs more than once"
            problems.error("repeated id", source, "", fact, "give each an id of its own")
        else:
            seen.add(number)
            yield position, record


def _check_categories(records: list[Any], source: Path, problems: Problems) -> Categories | None:
    found: dict[int, str] = {}
    names: set[str] = set()
    for _, record in _unique(records, "category", source, problems):
        name = record.get("name")
        if not isinstance(name, str) or not is_plain(name):
            given = "" if name is None else f" that can be printed, but {shown(name)}"
            fact = f"category {record['id']} has no name{given}"
            problems.error("bad category name", source, "", fact, "give it one")
            name = f"category {record['id']}"
        elif name in names:
            fact = f"the category name {shown(name)} occurs more than once"
            problems.warn("repeated name", source, "", fact, "the classes are told apart by id")
        found[record["id"]] = name
        names.add(name)
    if not records:
        problems.error("no categories", source, "", "the category list is empty", "add the classes")
    if not found:
        return None
    ids = tuple(sorted(found))
    return Categories(names=tuple(found[i] for i in ids), ids=ids)


def _check_images(
    records: list[Any], source: Path, problems: Problems
) -> tuple[dict[int, int], list[str], list[tuple[int, int]]]:
    """Position by id, file names and sizes, in ascending order of id."""
    if not records:
        problems.error("no images", source, "", "the image list is empty", "add the images")
    found: list[tuple[int, str, tuple[int, int]]] = []
    owner_of: dict[str, int] = {}
    for _, record in _unique(records, "image", source, problems):
        number, name = record["id"], record.get("file_name")
        if not isinstance(name, str) or not name.strip():
            fact = f"image {number} has no file_name"
            problems.error("no file name", source, "", fact, "add it, or remove the image")
            continue
        if not inside(name):
            fact = (
                f"the file name {shown(name)} leads out of the folder of images, or has control "
                "characters"
            )
            remedy = "name files inside that folder, relative to it"
            problems.error("file name leads outside", source, f"image {number}", fact, remedy)
            continue
        place = f"image {number} ({name})"
        height, width = (_check_side(record, key, source, problems) for key in ("height", "width"))
        if height is not None and width is not None:
            if height * width > MOST_PIXELS:
                fact = f"it has {width}x{height} pixels, and more than {MOST_PIXELS:,} are not read"
                remedy = "correct the size, or make the image smaller"
                problems.error("too many pixels", source, place, fact, remedy)
            other = owner_of.setdefault(posixpath.normpath(name), number)
            if other != number:
                fact = f"image {other} has the same file"
                remedy = "give all its annotations one image id: now each lacks those of the other"
                problems.warn("repeated file name", source, place, fact, remedy)
            found.append((number, name, (height, width)))
    found.sort()
    index = {number: i for i, (number, _, _) in enumerate(found)}
    return index, [name for _, name, _ in found], [size for _, _, size in found]


def _check_side(record: dict[str, Any], key: str, source: Path, problems: Problems) -> int | None:
    side = record.get(key)
    if _is_number(side, MOST) and side >= 1 and side == int(side):
        return int(side)
    place = f"image {record['id']} ({record['file_name']})"
    remedy = "give a positive whole number of pixels"
    problems.error("bad size", source, place, f"it has the {key} {shown(side)}", remedy)
    return None


def _look_up(index: dict[int, int], key: Any) -> int | None:
    return index.get(key) if isinstance(key, int) and not isinstance(key, bool) else None


def _is_number(value: Any, below: float) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < below  # NaN is not, and an integer may be too large for a float


def _fault_of(box: Any) -> tuple[str, str] | None:
    """The rule that a bbox breaks, and how."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x, MOST) for x in box):
        return "bad bbox", (
            f"the bbox {shown(box)} is not a list of four finite numbers of pixels "
            "(x, y, width, height)"
        )
    if box[2] < 0 or box[3] < 0:
        return "negative bbox", f"the bbox {shown(box)} has a negative width or height"
    return None
