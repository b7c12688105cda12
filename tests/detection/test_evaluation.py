"""COCO metrics: exact where they can be worked out by hand, pycocotools' own elsewhere."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from detection.data.types import Categories
from detection.evaluation import CocoScores, evaluate_coco

CATEGORIES = Categories(("cat", "dog", "eel"), (3, 17, 90))
FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def index(
    annotations: list[dict[str, Any]], images: int = 2, categories: Categories = CATEGORIES
) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 10 * n + 10} for n in range(images)],
        "categories": [
            {"id": i, "name": name}
            for i, name in zip(categories.ids, categories.names, strict=True)
        ],
        "annotations": [{"id": n + 1, **record} for n, record in enumerate(annotations)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def box(image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(bbox), **more}


TRUTH = [
    box(10, 3, 0, 0, 20, 20),  # small
    box(10, 17, 50, 50, 60, 60),  # medium
    box(20, 3, 10, 10, 200, 120),  # large
    box(20, 17, 5, 5, 30, 30),  # small
]


def perfect(truth: list[dict[str, Any]] = TRUTH) -> list[dict[str, Any]]:
    return [{**record, "score": 0.9 - 0.1 * n} for n, record in enumerate(truth)]


def test_perfect_detections_score_one() -> None:
    scores = evaluate_coco(index(TRUTH), perfect(), CATEGORIES)
    assert {name: getattr(scores, name) for name in FIGURES} == pytest.approx(
        dict.fromkeys(FIGURES, 1.0)
    )
    assert scores.per_class == pytest.approx({"cat": 1, "dog": 1, "eel": math.nan}, nan_ok=True)


def test_no_detections_score_zero() -> None:
    scores = evaluate_coco(index(TRUTH), [], CATEGORIES)
    assert {name: getattr(scores, name) for name in FIGURES} == dict.fromkeys(FIGURES, 0.0)


def test_sizes_without_objects_are_nan() -> None:
    small = [TRUTH[0]]
    for results in (perfect(small), []):
        scores = evaluate_coco(index(small), results, CATEGORIES)
        assert math.isnan(scores.AP_medium)
        assert math.isnan(scores.AR_large)
        assert not math.isnan(scores.AP_small)


def test_localisation_counts_threshold_by_threshold() -> None:
    # IoU 0.72 clears 0.50, 0.55, 0.60, 0.65, 0.70: five of ten thresholds.
    truth = [box(10, 3, 0, 0, 100, 100)]
    found = [box(10, 3, 0, 0, 100, 72, score=0.8)]
    scores = evaluate_coco(index(truth), found, CATEGORIES)
    assert (scores.AP, scores.AP50, scores.AP75) == pytest.approx((0.5, 1.0, 0.0))


def test_a_surer_mistake_halves_the_precision() -> None:
    truth = [box(10, 3, 0, 0, 100, 100)]
    found = [box(10, 3, 300, 300, 9, 9, score=0.9), box(10, 3, 0, 0, 100, 100, score=0.8)]
    assert evaluate_coco(index(truth), found, CATEGORIES).AP == pytest.approx(0.5)
    found[0]["score"] = 0.7
    assert evaluate_coco(index(truth), found, CATEGORIES).AP == pytest.approx(1.0)


def test_half_of_the_objects_is_half_of_the_recall_levels() -> None:
    truth = [box(10, 3, 0, 0, 50, 50), box(10, 3, 100, 0, 50, 50)]
    scores = evaluate_coco(index(truth), perfect(truth)[:1], CATEGORIES)
    assert scores.AP == pytest.approx(51 / 101)  # recall levels 0, 0.01, ..., 0.50 of 101
    assert scores.AR100 == pytest.approx(0.5)


def test_detections_on_crowds_do_not_count() -> None:
    truth = [box(10, 3, 0, 0, 50, 50), box(10, 3, 100, 100, 90, 90, iscrowd=1)]
    found = [*perfect(truth[:1]), box(10, 3, 120, 120, 30, 30, score=0.99)]
    assert evaluate_coco(index(truth), found, CATEGORIES).AP == pytest.approx(1.0)
    truth[1]["iscrowd"] = 0
    assert evaluate_coco(index(truth), found, CATEGORIES).AP < 0.6


def test_the_annotated_area_decides_the_size() -> None:
    truth = [box(10, 3, 0, 0, 40, 40, area=900.0)]  # a mask smaller than its box
    scores = evaluate_coco(index(truth), perfect(truth), CATEGORIES)
    assert scores.AP_small == pytest.approx(1.0)
    assert math.isnan(scores.AP_medium)


def random_case(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Objects in 6 images, and detections that are shifted, doubled, spurious and mislabelled."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(10, 70, 10):
        for _ in range(rng.integers(0, 8)):
            low, sides = rng.uniform(0, 300, 2), rng.uniform(8, 160, 2)
            category = int(rng.choice(CATEGORIES.ids))
            area, crowd = float(sides.prod() * rng.uniform(0.6, 1)), int(rng.random() < 0.1)
            truth.append(box(image, category, *low, *sides, area=area, iscrowd=crowd))
            for _ in range(rng.integers(0, 4)):
                moved = np.concatenate([low, sides]) + rng.normal(0, 4, 4)
                label = category if rng.random() < 0.8 else int(rng.choice(CATEGORIES.ids))
                score = round(float(rng.random()), 1)  # with ties
                found.append(box(image, label, *moved, score=score))
    return truth, found


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_pycocotools_figure_by_figure(seed: int) -> None:
    truth, found = random_case(seed)
    coco = index(truth, images=6)
    before = copy.deepcopy((coco.dataset, found))
    scores = evaluate_coco(coco, found, CATEGORIES)
    assert (coco.dataset, found) == before  # neither is changed

    coco.dataset["info"] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    expected = np.where(reference.stats > -1, reference.stats, np.nan)
    np.testing.assert_array_equal([getattr(scores, name) for name in FIGURES], expected)
    known = [value for value in scores.per_class.values() if not math.isnan(value)]
    assert np.mean(known) == pytest.approx(scores.AP)


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_coco(index(TRUTH), perfect(), CATEGORIES)
    evaluate_coco(index(TRUTH), [], CATEGORIES)
    assert capsys.readouterr() == ("", "")


def test_only_the_chosen_images_are_scored() -> None:
    found = [record for record in perfect() if record["image_id"] == 20]
    assert evaluate_coco(index(TRUTH), found, CATEGORIES, [20]).AP == pytest.approx(1.0)
    assert evaluate_coco(index(TRUTH), found, CATEGORIES).AP < 0.6
    assert evaluate_coco(index(TRUTH), [], CATEGORIES, [10]).AP == 0.0


def test_more_than_a_hundred_detections_count_when_asked() -> None:
    truth = [box(10, 3, 20 * n, 0, 10, 10) for n in range(150)]
    found = [{**record, "score": 1.0} for record in truth]
    standard = evaluate_coco(index(truth), found, CATEGORIES)
    assert standard.AP == pytest.approx(67 / 101)  # 100 of 150: recall levels up to 0.66
    assert standard.AR100 == pytest.approx(100 / 150)
    more = evaluate_coco(index(truth), found, CATEGORIES, max_detections=300)
    assert more.AP == pytest.approx(1.0)
    assert more.AR100 == pytest.approx(100 / 150)
    assert more.AR_small == pytest.approx(1.0)
    with pytest.raises(ValueError, match="max_detections=99"):
        evaluate_coco(index(truth), found, CATEGORIES, max_detections=99)


def test_annotation_ids_may_be_zero_and_repeated() -> None:
    truth = [{**record, "id": 0} for record in TRUTH]
    assert evaluate_coco(index(truth), perfect(TRUTH), CATEGORIES).AP == pytest.approx(1.0)


def test_names_that_occur_twice_carry_their_id() -> None:
    categories = Categories(("cat", "dog", "cat"), CATEGORIES.ids)
    scores = evaluate_coco(index(TRUTH, categories=categories), perfect(), categories)
    assert list(scores.per_class) == ["cat (3)", "dog", "cat (90)"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_id": 11}, "Detection 1 on image 11: the image is not among the 2"),
        ({"category_id": 4}, "Detection 1 on image 10: there is no category with id 4"),
        ({"bbox": [0, 0, 5]}, "four finite"),
        ({"bbox": [0, 0, 5, math.nan]}, "four finite"),
        ({"score": math.nan}, "four finite"),
    ],
)
def test_bad_detections_are_named(wrong: dict[str, Any], message: str) -> None:
    results = perfect()
    results[1] = {**results[1], **wrong}
    with pytest.raises(ValueError, match=message):
        evaluate_coco(index(TRUTH), results, CATEGORIES)


def test_records_that_lack_a_field_are_named() -> None:
    results = perfect()
    del results[2]["score"]
    with pytest.raises(ValueError, match="Detection 2 has no score"):
        evaluate_coco(index(TRUTH), results, CATEGORIES)
    with pytest.raises(ValueError, match="Annotation 1 on image 10 has no bbox"):
        evaluate_coco(index([{"image_id": 10, "category_id": 3}]), [], CATEGORIES)


def test_images_and_classes_must_be_annotated() -> None:
    with pytest.raises(ValueError, match=r"1 of the images .* id 30"):
        evaluate_coco(index(TRUTH), [], CATEGORIES, [10, 30])
    with pytest.raises(ValueError, match=r"1 of the categories .* id 5"):
        evaluate_coco(index(TRUTH), [], Categories(("cat", "cow"), (3, 5)))


def printed(renderable: object) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_tables_say_every_figure() -> None:
    per_class = {f"class {n}": n / 100 for n in range(80)} | {"none": math.nan}
    values = [n / 1000 for n in range(101, 113)]
    scores = CocoScores(*values, per_class, max_detections=300)
    text = printed(scores.table())
    for name, value in zip(FIGURES, values, strict=True):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert line.split()[-1] == f"{value:.3f}"
        count = {"AR1": "1", "AR10": "10", "AR100": "100"}.get(name, "300")
        assert line.split()[-2] == count
    classes = printed(scores.class_table())
    assert len(classes.splitlines()) < 30
    for name, value in per_class.items():
        assert name in classes
        assert math.isnan(value) or f"{value:.3f}" in classes
    assert "–" in classes
