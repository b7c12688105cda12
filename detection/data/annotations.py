"""The instances file of COCO (https://cocodataset.org/#format-data), checked line by line.

Everything is checked before anything is used, and every error names the record at fault.  The
boxes of training are packed into arrays: a data set of 10^5 images then costs its loader's
workers no copies of Python objects.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from detection.data.errors import DataError
from detection.data.types import Categories

_MOST = 1e300
"""Numbers of a file are below this; so a larger integer is refused, not converted."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """A checked instances file; images are in ascending order of id.

    Args:
        document: the parsed file, with the fields that pycocotools needs filled in.
        categories: the classes.
        image_ids: id of each image.
        names: file name of each image.
        sizes: ``(height, width)`` of each image.
        boxes: ``(M, 4)`` float32 corners of all training targets, image after image.
        labels: ``(M,)`` int64 contiguous classes.
        starts: ``(images + 1,)`` int64; image ``i`` owns the rows ``starts[i]:starts[i + 1]``.
        problems: one sentence for each annotation that is not used.
    """

    document: dict[str, Any]
    categories: Categories
    image_ids: list[int]
    names: list[str]
    sizes: list[tuple[int, int]]
    boxes: Tensor
    labels: Tensor
    starts: Tensor
    problems: tuple[str, ...]


def read_annotations(path: Path) -> Annotations:
    """Read and check an instances file.

    Crowd regions (``iscrowd`` 1) stay in ``document`` for the evaluation and are no training
    targets.  Boxes are clipped to their image; those with no area left are not trained on and
    are listed in ``problems``.  An absent ``area`` is that of the box, an absent ``iscrowd`` 0.

    Raises:
        DataError: the file is missing, not JSON or not an instances file; an id is repeated or
            unknown; a box is malformed; there are no images or no annotations.

    Example:
        >>> import tempfile
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
    document = _parse(path)
    categories = _read_categories(document["categories"], path)
    index, names, sizes = _read_images(document["images"], path)
    records = document["annotations"]
    if not records:
        raise DataError(
            f"{path}: the annotation list is empty; there is nothing to learn or to evaluate. "
            "Give a file with annotations."
        )
    class_of = {category_id: i for i, category_id in enumerate(categories.ids)}
    candidates, owners, labels, corners = [], [], [], []
    for record in _unique(records, "annotation", path):
        where = f"{path}: annotation {record['id']}"
        image = _look_up(index, record.get("image_id"), f"{where}: there is no image with id")
        label = _look_up(
            class_of, record.get("category_id"), f"{where}: there is no category with id"
        )
        x, y, width, height = _check_box(record.get("bbox"), where)
        area = record.setdefault("area", width * height)
        if not _is_number(area) or area < 0:
            raise DataError(
                f"{where}: the area is {area!r}; give a number not below 0, or leave it out."
            )
        if record.setdefault("iscrowd", 0) not in (0, 1):
            raise DataError(f"{where}: iscrowd is {record['iscrowd']!r}; it must be 0 or 1.")
        if not record["iscrowd"]:
            candidates.append(record)
            owners.append(image)
            labels.append(label)
            corners.append((x, y, x + width, y + height))
    owner = np.array(owners, dtype=np.int64)
    limits = np.array(sizes, dtype=np.float64)[owner][:, [1, 0, 1, 0]]
    boxes = np.clip(np.array(corners, dtype=np.float64).reshape(-1, 4), 0.0, limits)
    boxes = boxes.astype(np.float32)
    visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    problems = tuple(
        f"annotation {candidates[i]['id']} (image {candidates[i]['image_id']}): the box "
        f"{candidates[i]['bbox']} has no area inside the image of {sizes[owners[i]][1]}x"
        f"{sizes[owners[i]][0]} pixels; it is not trained on."
        for i in np.flatnonzero(~visible)
    )
    order = np.flatnonzero(visible)[np.argsort(owner[visible], kind="stable")]
    counts = np.bincount(owner[visible], minlength=len(names))
    return Annotations(
        document=_ready_for_pycocotools(document),
        categories=categories,
        image_ids=list(index),
        names=names,
        sizes=sizes,
        boxes=torch.from_numpy(boxes[order]),
        labels=torch.from_numpy(np.array(labels, dtype=np.int64)[order]),
        starts=torch.from_numpy(np.concatenate(([0], np.cumsum(counts)))),
        problems=problems,
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such annotation file.") from None
    except OSError as error:
        raise DataError(f"{path}: the annotation file cannot be read ({error}).") from error
    except ValueError as error:
        raise DataError(
            f"{path}: this is not JSON ({error}). Export or download the file again."
        ) from error
    except RecursionError:
        raise DataError(
            f"{path}: the JSON is nested too deeply for a COCO instances file. Export it again."
        ) from None
    expected = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise DataError(f"{path}: a COCO instances file is an object with the lists {expected}.")
    absent = [key for key in expected if not isinstance(document.get(key), list)]
    if absent:
        raise DataError(
            f"{path}: this is no COCO instances file, for it has no list of {', '.join(absent)}."
        )
    return document


def _unique(records: Iterable[Any], kind: str, path: Path) -> Iterable[dict[str, Any]]:
    """The records one by one, each an object with an integer id of its own."""
    seen: set[int] = set()
    for position, record in enumerate(records):
        number = record.get("id") if isinstance(record, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise DataError(f"{path}: {kind} number {position} of the list has no integer id.")
        if number in seen:
            raise DataError(f"{path}: the {kind} id {number} occurs more than once.")
        seen.add(number)
        yield record


def _read_categories(records: list[Any], path: Path) -> Categories:
    found = {}
    for record in _unique(records, "category", path):
        if not isinstance(record.get("name"), str):
            raise DataError(f"{path}: category {record['id']} has no name.")
        found[record["id"]] = record["name"]
    if not found:
        raise DataError(f"{path}: the category list is empty.")
    ids = tuple(sorted(found))
    return Categories(names=tuple(found[i] for i in ids), ids=ids)


def _read_images(
    records: list[Any], path: Path
) -> tuple[dict[int, int], list[str], list[tuple[int, int]]]:
    """Position by id, file names and sizes, in ascending order of id."""
    found = sorted(_unique(records, "image", path), key=operator.itemgetter("id"))
    if not found:
        raise DataError(f"{path}: the image list is empty.")
    names, sizes = [], []
    for record in found:
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {record['id']} has no file_name.")
        names.append(name)
        sizes.append((_side(record, "height", path), _side(record, "width", path)))
    return {record["id"]: i for i, record in enumerate(found)}, names, sizes


def _side(image: dict[str, Any], key: str, path: Path) -> int:
    value = image.get(key)
    if not _is_number(value) or value < 1 or value != int(value):
        raise DataError(
            f"{path}: image {image['id']} ({image['file_name']}) has the {key} {value!r}; "
            "it must be a positive whole number of pixels."
        )
    return int(value)


def _look_up(index: dict[int, int], key: Any, complaint: str) -> int:
    position = index.get(key) if isinstance(key, int) else None
    if position is None:
        raise DataError(f"{complaint} {key!r}. Add it, or remove the annotation.")
    return position


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _MOST  # NaN is not, and an integer may be too large for a float


def _check_box(box: Any, where: str) -> tuple[float, float, float, float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(
            f"{where}: the bbox {box!r} is not a list of four finite numbers (x, y, width, height)."
        )
    if box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: the bbox {box} has a negative width or height.")
    return box[0], box[1], box[2], box[3]


def _ready_for_pycocotools(document: dict[str, Any]) -> dict[str, Any]:
    """Fill in what pycocotools takes for granted.

    Its evaluation uses the annotation id 0 as "not matched", so an annotation that has it would
    count as missed however well it is found: that one gets a new id.
    """
    document.setdefault("info", {})
    document.setdefault("licenses", [])
    for record in document["annotations"]:
        if record["id"] == 0:
            record["id"] = max(other["id"] for other in document["annotations"]) + 1
            break
    return document
