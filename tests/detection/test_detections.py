"""Detections: what is selected, in which order, and where the boxes land."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detection.data.types import Categories
from detection.detections import Detections, select_detections


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
