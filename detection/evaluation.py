"""COCO metrics of boxes (https://cocodataset.org/#detection-eval), matched by pycocotools.

Matching and precision–recall curves are those of `pycocotools.cocoeval.COCOeval`.  Around it: it
prints nothing, changes neither annotations nor results, takes an empty list of results, and says
which record is wrong where pycocotools would fail or, worse, score something else.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.box import SIMPLE_HEAD
from rich.table import Table

from detection.data.types import Categories

_SIZES = ("all", "small", "medium", "large")
"""Areas as COCO divides them: small is below 32² px, large above 96² px."""

_ROWS = (
    ("AP", "0.50:0.95", "all", None),
    ("AP50", "0.50", "all", None),
    ("AP75", "0.75", "all", None),
    ("AP_small", "0.50:0.95", "small", None),
    ("AP_medium", "0.50:0.95", "medium", None),
    ("AP_large", "0.50:0.95", "large", None),
    ("AR1", "0.50:0.95", "all", 1),
    ("AR10", "0.50:0.95", "all", 10),
    ("AR100", "0.50:0.95", "all", 100),
    ("AR_small", "0.50:0.95", "small", None),
    ("AR_medium", "0.50:0.95", "medium", None),
    ("AR_large", "0.50:0.95", "large", None),
)
"""Name, IoU, area and number of detections of each figure; ``None``: as many as are counted."""

METRICS = tuple(name for name, *_ in _ROWS)
"""Names of the twelve figures."""


@dataclass(frozen=True)
class CocoScores:
    """The twelve COCO figures of boxes, and AP class by class, all in [0, 1].

    Average precision (AP) is over IoU thresholds 0.50, 0.55, ..., 0.95 unless the name says
    one; average recall (AR) allows so many detections per image and class.  NaN where the
    annotations have no object of that size or class.

    Attributes:
        per_class: AP by class name; the category id is added to names that occur twice.
        max_detections: how many detections per image and class the figures count, but for those
            with a number of their own (AR1, AR10, AR100).

    Example:
        >>> CocoScores(0.5, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3, {}).AP50
        0.7
    """

    AP: float
    AP50: float
    AP75: float
    AP_small: float
    AP_medium: float
    AP_large: float
    AR1: float
    AR10: float
    AR100: float
    AR_small: float
    AR_medium: float
    AR_large: float
    per_class: dict[str, float]
    max_detections: int = 100

    def table(self) -> Table:
        """The twelve figures as a table to print with rich."""
        table = Table(title="COCO box metrics", box=SIMPLE_HEAD, title_justify="left")
        for heading in ("metric", "IoU", "area"):
            table.add_column(heading)
        table.add_column("detections", justify="right")
        table.add_column("value", justify="right")
        for name, iou, area, most in _ROWS:
            count = str(most or self.max_detections)
            bold = "bold" if name == "AP" else None
            table.add_row(name, iou, area, count, score_text(getattr(self, name)), style=bold)
        return table

    def class_table(self) -> Table:
        """AP of every class as a table to print with rich; many classes stand side by side."""
        table = Table(title="AP by class", box=SIMPLE_HEAD, title_justify="left")
        entries = [(name, score_text(value)) for name, value in self.per_class.items()]
        height = max(10, math.ceil(len(entries) / 4))
        columns = [entries[i : i + height] for i in range(0, len(entries), height)]
        for _ in columns:
            table.add_column("class")
            table.add_column("AP", justify="right")
        for row in range(min(height, len(entries))):
            cells = [column[row] if row < len(column) else ("", "") for column in columns]
            table.add_row(*(text for cell in cells for text in cell))
        return table


def evaluate_coco(
    coco: COCO,
    results: Sequence[Mapping[str, Any]],
    categories: Categories,
    image_ids: Iterable[int] | None = None,
    *,
    max_detections: int = 100,
) -> CocoScores:
    """Score COCO result records against annotations.

    An annotation without ``iscrowd`` is no crowd; one without ``area`` has that of its box.

    Args:
        coco: the annotations; they are left as they are.
        results: records as `Detections.to_coco` makes them; none at all scores 0.
        categories: the classes to score.
        image_ids: images to score; by default all of ``coco``.
        max_detections: counted per image and class, the surest first.  100 is COCO's protocol;
            more is for models with more.

    Raises:
        ValueError: if a record names an image or a category that is not scored, or lacks four
            finite box numbers and a finite score; if an image or a class to score is not in the
            annotations; if an annotation has no box; if ``max_detections`` is below 100.

    Example:
        >>> coco = COCO()
        >>> coco.dataset = {
        ...     "images": [{"id": 1}],
        ...     "categories": [{"id": 7, "name": "cup"}],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 4, 8, 8]}],
        ... }
        >>> coco.createIndex()
        creating index...
        index created!
        >>> found = [{"image_id": 1, "category_id": 7, "bbox": [4, 4, 8, 8], "score": 0.6}]
        >>> round(evaluate_coco(coco, found, Categories(("cup",), (7,))).AP, 6)
        1.0
    """
    if max_detections < 100:
        raise ValueError(
            f"max_detections={max_detections}: COCO's metrics count 100. To score fewer "
            "detections, hand over fewer."
        )
    images = sorted(set(coco.imgs if image_ids is None else image_ids))
    _require(set(images) - set(coco.imgs), "images")
    _require(set(categories.ids) - set(coco.cats), "categories")
    _check_results(results, set(images), set(categories.ids))
    truth = [_truth(record) for image in images for record in coco.imgToAnns.get(image, [])]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by print
        evaluation = COCOeval(_index(coco, truth), _index(coco, map(_found, results)), "bbox")
        evaluation.params.imgIds = images
        evaluation.params.catIds = list(categories.ids)
        evaluation.params.maxDets = sorted({1, 10, 100, max_detections})
        evaluation.evaluate()
        evaluation.accumulate()
    figures = {
        name: _figure(evaluation, name, iou, area, most or max_detections)
        for name, iou, area, most in _ROWS
    }
    per_class = _per_class(evaluation, categories)
    return CocoScores(**figures, per_class=per_class, max_detections=max_detections)


def _truth(record: Mapping[str, Any]) -> dict[str, Any]:
    if "bbox" not in record:
        raise ValueError(
            f"Annotation {record.get('id')} on image {record['image_id']} has no bbox; boxes can "
            "be scored against an instances file only."
        )
    box = record["bbox"]
    return {
        **{key: record[key] for key in ("image_id", "category_id", "bbox")},
        "area": record.get("area", box[2] * box[3]),
        "iscrowd": record.get("iscrowd", 0),
    }


def _found(record: Mapping[str, Any]) -> dict[str, Any]:
    box = record["bbox"]
    kept = {key: record[key] for key in ("image_id", "category_id", "bbox", "score")}
    return {**kept, "area": box[2] * box[3], "iscrowd": 0}


def _index(coco: COCO, records: Iterable[dict[str, Any]]) -> COCO:
    """Annotations or results for pycocotools.

    They are numbered from 1: it takes a match with the id 0 for no match, and annotations that
    share an id for one.
    """
    index = COCO()
    index.dataset = {
        "images": list(coco.imgs.values()),
        "categories": list(coco.cats.values()),
        "annotations": [{**record, "id": n} for n, record in enumerate(records, start=1)],
    }
    index.createIndex()
    return index


def _figure(evaluation: COCOeval, name: str, iou: str, size: str, most: int) -> float:
    params = evaluation.params
    chosen = np.s_[..., _SIZES.index(size), params.maxDets.index(most)]
    if name.startswith("AR"):
        return _mean(evaluation.eval["recall"][chosen])  # IoU, class
    values = evaluation.eval["precision"][chosen]  # IoU, recall, class
    single = np.isclose(params.iouThrs, float(iou)) if ":" not in iou else slice(None)
    return _mean(values[single])


def _per_class(evaluation: COCOeval, categories: Categories) -> dict[str, float]:
    precision = evaluation.eval["precision"][..., 0, -1]  # IoU, recall, class
    return {
        name if categories.names.count(name) == 1 else f"{name} ({number})": _mean(values)
        for name, number, values in zip(
            categories.names, categories.ids, np.moveaxis(precision, 2, 0), strict=True
        )
    }


def _mean(values: np.ndarray[Any, Any]) -> float:
    """The mean without the classes that have no object, which pycocotools marks by -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan


def score_text(value: float) -> str:
    """A figure as it is shown; a dash where there is nothing to score."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _require(absent: set[int], what: str) -> None:
    if absent:
        first = ", ".join(map(str, sorted(absent)[:3]))
        raise ValueError(
            f"{len(absent)} of the {what} to score are not in the annotations, the first with id "
            f"{first}. Score with the annotations of the same data set."
        )


def _check_results(
    results: Sequence[Mapping[str, Any]], images: set[int], categories: set[int]
) -> None:
    for place, record in enumerate(results):
        absent = {"image_id", "category_id", "bbox", "score"} - set(record)
        if absent:
            raise ValueError(f"Detection {place} has no {' and no '.join(sorted(absent))}.")
        where = f"Detection {place} on image {record['image_id']}"
        if record["image_id"] not in images:
            raise ValueError(
                f"{where}: the image is not among the {len(images)} that are scored. Score the "
                "set the detections were made on."
            )
        if record["category_id"] not in categories:
            raise ValueError(
                f"{where}: there is no category with id {record['category_id']}; the ids are "
                f"{', '.join(map(str, sorted(categories)))}."
            )
        numbers = [*record["bbox"], record["score"]]
        if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"{where}: bbox {record['bbox']} and score {record['score']} must be four finite "
                "numbers (x, y, width, height) and one."
            )
