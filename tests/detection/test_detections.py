"""Detections: what is selected, in which order, and where the boxes land."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from detection.data.types import Categories
from detection.detections import Detections, select_detections
from detection.sources import NamedImage


def select(
    logits: Tensor, boxes: Tensor | None = None, most: int = 100, **sizes: list[tuple[int, int]]
) -> list[Detections]:
    batch, queries, _ = logits.shape
    boxes = torch.rand(batch, queries, 4) if boxes is None else boxes
    transformed = torch.tensor(sizes.get("transformed", [(64, 64)] * batch))
    return select_detections(
        logits, boxes, transformed, sizes.get("original", [(64, 64)] * batch), most
    )


@settings(max_examples=50, deadline=None)
@given(
    queries=st.integers(1, 6),
    classes=st.integers(1, 5),
    most=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_are_the_most_probable_pairs_of_query_and_class(
    queries: int, classes: int, most: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are frequent.
    logits = torch.randint(-3, 4, (2, queries, classes), generator=generator).float()
    boxes = torch.rand(2, queries, 4, generator=generator)
    for row, found in enumerate(select(logits, boxes, most)):
        pairs = [(q, k) for q in range(queries) for k in range(classes)]
        # Python's sort is stable: equal scores keep the order of the pairs.
        pairs.sort(key=lambda pair: -logits[row][pair])
        pairs = pairs[:most]
        assert found.labels.tolist() == [k for _, k in pairs]
        torch.testing.assert_close(found.boxes, boxes[row, [q for q, _ in pairs]])
        torch.testing.assert_close(
            found.scores, torch.stack([logits[row][pair] for pair in pairs]).sigmoid()
        )


def test_one_query_may_yield_several_classes() -> None:
    found = select(torch.tensor([[[3.0, 2.0, 1.0], [-5.0, -5.0, -5.0]]]), most=3)[0]
    assert found.labels.tolist() == [0, 1, 2]
    assert (found.boxes == found.boxes[0]).all()


def test_saturated_scores_keep_the_order_of_queries_and_classes() -> None:
    found = select(torch.full((1, 40, 80), 200.0), most=100)[0]
    assert found.labels.tolist() == [n % 80 for n in range(100)]


def test_each_axis_has_its_own_scale() -> None:
    boxes = torch.tensor([[[10.0, 20.0, 50.0, 100.0]], [[10.0, 20.0, 50.0, 100.0]]])
    found = select(
        torch.zeros(2, 1, 1),
        boxes,
        transformed=[(100, 50), (100, 50)],  # (h, w)
        original=[(400, 100), (100, 50)],
    )
    assert found[0].boxes.tolist() == [[20.0, 80.0, 100.0, 400.0]]
    assert found[1].boxes.tolist() == [[10.0, 20.0, 50.0, 100.0]]


def test_low_precision_is_widened_before_scores_are_compared() -> None:
    # In bfloat16 both scores would round to 1 and the order would be that of the queries.
    found = select(torch.tensor([[[8.0], [8.5]]], dtype=torch.bfloat16), most=2)[0]
    assert found.scores[0] > found.scores[1]
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    assert found.labels.dtype == torch.int64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    boxes = torch.zeros(2, 1, 4)
    boxes[1, 0, 2] = value
    with pytest.raises(ValueError, match="image 1 of the batch"):
        select(torch.zeros(2, 1, 3), boxes)
    logits = torch.zeros(2, 200, 3)
    logits[1, 199, 2] = float("nan")
    with pytest.raises(ValueError, match="image 1 of the batch"):
        select(logits)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="max_detections=0"):
        select(torch.zeros(1, 2, 3), most=0)
    with pytest.raises(ValueError, match="do not belong together"):
        select(torch.zeros(1, 2, 3), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="do not belong together"):
        select(torch.zeros(2, 2, 3), original=[(4, 4)])
    with pytest.raises(ValueError, match=r"\(2, 4\), \(3,\) and \(2,\)"):
        Detections(torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_above_keeps_the_threshold_itself() -> None:
    found = Detections(torch.rand(3, 4), torch.tensor([0.75, 0.5, 0.25]), torch.tensor([2, 0, 1]))
    kept = found.above(0.5)
    assert kept.labels.tolist() == [2, 0]
    assert len(found.above(0.0)) == 3
    assert len(found.above(0.9)) == 0


def test_to_coco_gives_sides_and_the_original_ids() -> None:
    found = Detections(
        torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]]),
        torch.tensor([0.75, 0.5]),
        torch.tensor([1, 0]),
    )
    records = found.to_coco(42, Categories(("a", "b"), (3, 90)))
    assert records == [
        {"image_id": 42, "category_id": 90, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.75},
        {"image_id": 42, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5},
    ]
    assert (
        Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).to_coco(
            1, Categories(("a",), (1,))
        )
        == []
    )


CATEGORIES = Categories(("cat", "dog"), (17, 18))


def known(**more: Any) -> Detections:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 9.0, 9.0], [3.0, 3.0, 5.0, 5.0]])
    scores, labels = torch.tensor([0.75, 0.5, 0.25]), torch.tensor([1, 0, 1])
    return Detections(boxes, scores, labels, CATEGORIES, **more)


def test_names_ids_and_single_detections() -> None:
    found = known()
    assert found.class_names == ["dog", "cat", "dog"] and found.category_ids == [18, 17, 18]
    assert found[0] == next(iter(found)) == ((1.0, 2.0, 4.0, 8.0), 0.75, 1, "dog", 18)
    assert [one.class_name for one in found] == found.class_names
    assert found[-1].score == 0.25
    with pytest.raises(IndexError):
        _ = found[3]
    unnamed = Detections(found.boxes, found.scores, found.labels)
    assert [(one.label, one.class_name, one.category_id) for one in unnamed] == [
        (1, None, None),
        (0, None, None),
        (1, None, None),
    ]


def test_a_choice_keeps_what_is_known() -> None:
    source = NamedImage("here", np.zeros((8, 8), np.uint8))
    found = known(steps=4, residual=0.5, source=source)
    for chosen in (found[:2], found[found.scores >= 0.5], found[[0, 1]], found.above(0.5)):
        assert chosen.scores.tolist() == [0.75, 0.5] and chosen.boxes.shape == (2, 4)
        assert (chosen.steps, chosen.residual) == (4, 0.5)
        assert chosen.source is source and chosen.categories is CATEGORIES
    assert len(found[3:]) == 0


def test_repr_reads_well() -> None:
    found = known(steps=4, residual=0.00123)
    assert repr(found) == (
        "Detections(3: dog 0.75, cat 0.50, dog 0.25; 4 refinements, residual 1.2e-03)"
    )
    assert repr(found[3:]) == "Detections(none; 4 refinements, residual 1.2e-03)"
    many = Detections(torch.zeros(9, 4), torch.ones(9), torch.zeros(9, dtype=torch.int64))
    assert repr(many) == "Detections(9: class 0 1.00" + ", class 0 1.00" * 4 + ", …)"


def test_without_classes_or_image_there_is_a_remedy(tmp_path: Path) -> None:
    found = known()
    unnamed = Detections(found.boxes, found.scores, found.labels)
    for ask in (lambda: unnamed.class_names, lambda: unnamed.category_ids, unnamed.to_coco):
        with pytest.raises(ValueError, match="give their Categories"):
            ask()
    with pytest.raises(ValueError, match=r"give plot\(image\)"):
        found.save(tmp_path / "a.png")
    assert unnamed.to_coco(1, CATEGORIES) == found.to_coco(1)
    assert not list(tmp_path.iterdir())


def test_is_drawn_upon_its_image_or_another(tmp_path: Path) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    found = known(source=NamedImage("here", image))
    blank = np.asarray(found.plot(threshold=0.9, scale=1))
    drawn = np.asarray(found.plot(threshold=0.3, scale=1))
    assert blank.shape == drawn.shape == (48, 64, 3)
    assert not blank.any() and drawn.any()
    assert found.plot(np.zeros((20, 30, 3)), scale=2).size == (60, 40)
    assert found.plot().size == (640, 480)  # enlarged, so that labels can be read
    assert not image.any()


def test_is_saved_as_picture_or_records(tmp_path: Path) -> None:
    found = known(source=NamedImage("here", np.zeros((48, 64, 3), np.uint8)))
    for name in ("a.png", "a.jpg", "below/a.webp"):
        path = found.save(tmp_path / name)
        with Image.open(path) as picture:
            assert picture.size == (640, 480)
    records = json.loads(found.save(tmp_path / "a.json", image_id=5).read_text())
    assert records == found.to_coco(5) and len(records) == 3
    for name in ("a", "a.xyz"):
        with pytest.raises(ValueError, match=r"must end in \.json, or as pictures do"):
            found.save(tmp_path / name)
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"a.png", "a.jpg", "a.webp", "a.json"}


def test_a_full_disk_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = known().save(tmp_path / "a.json")
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        known()[:1].save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_to_supervision() -> None:
    converted = known().to_supervision()
    assert converted.xyxy.tolist() == known().boxes.tolist()
    assert converted.confidence.tolist() == [0.75, 0.5, 0.25]
    assert converted.class_id.tolist() == [1, 0, 1]
    assert converted.data["class_name"].tolist() == ["dog", "cat", "dog"]
    assert converted.data["category_id"].tolist() == [18, 17, 18]
    assert len(known()[3:].to_supervision()) == 0


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"implicit\[supervision\]"):
        known().to_supervision()
