"""Losses against numbers worked out by hand and against those of the published implementation.

``criterion_reference.npz`` holds logits and boxes of six supervised outputs of the published
DEQDet in float64, the assignments and the losses it computed for them (two images of twelve
queries and seven classes; three objects in the first image, none in the second).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.data.types import Target
from detection.training.losses import Criterion, LossWeights, matched_queries

PARTS = ("class", "l1", "giou")


def make_target(boxes: list[list[float]], labels: list[int], image_id: int = 1) -> Target:
    return Target(
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        image_id,
        (50, 100),
    )


def make_criterion(targets: list[Target], queries: int, **options: LossWeights) -> Criterion:
    sizes = torch.tensor([[50, 100]] * len(targets))
    return Criterion(targets, sizes, normaliser=matched_queries(targets, queries), **options)


def test_class_loss_by_hand() -> None:
    # Query 0 is matched to class 1; all four logits are 0, so p = 1/2 everywhere.
    target = make_target([[0, 0, 10, 10]], [1])
    boxes = torch.tensor([[[0, 0, 10, 10], [60, 20, 90, 40]]], dtype=torch.float64)
    _, parts = make_criterion([target], 2)(torch.zeros(1, 2, 2).double(), boxes)
    wanted = 2.0 * (0.25 + 3 * 0.75) * 0.25 * math.log(2)
    assert float(parts["class"]) == pytest.approx(wanted, rel=1e-12)
    assert float(parts["l1"]) == float(parts["giou"]) == 0


def test_box_losses_by_hand() -> None:
    # Half the box is found: IoU 1/2 and the hull is the union, so GIoU is 1/2; in an image 50 px
    # high the lower edge is 10 px off.
    target = make_target([[0, 0, 10, 20]], [0])
    boxes = torch.tensor([[[0, 0, 10, 10]]], dtype=torch.float64)
    _, parts = make_criterion([target], 1)(torch.zeros(1, 1, 1).double(), boxes)
    assert float(parts["l1"]) == pytest.approx(5.0 * 10 / 50, rel=1e-12)
    assert float(parts["giou"]) == pytest.approx(2.0 * 0.5, rel=1e-12)


def test_horizontal_errors_count_by_width() -> None:
    target = make_target([[0, 0, 20, 10]], [0])
    boxes = torch.tensor([[[0, 0, 10, 10]]], dtype=torch.float64)
    _, parts = make_criterion([target], 1)(torch.zeros(1, 1, 1).double(), boxes)
    assert float(parts["l1"]) == pytest.approx(5.0 * 10 / 100, rel=1e-12)


def test_disjoint_boxes_by_hand() -> None:
    # Two unit squares one apart: no intersection, union 2, hull 3, so GIoU is -1/3.
    target = make_target([[2, 0, 3, 1]], [0])
    boxes = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.float64)
    _, parts = make_criterion([target], 1)(torch.zeros(1, 1, 1).double(), boxes)
    assert float(parts["giou"]) == pytest.approx(2.0 * 4 / 3, rel=1e-12)


def test_the_total_is_the_sum_of_its_detached_parts() -> None:
    logits, boxes, targets = random_problem()
    total, parts = make_criterion(targets, 6)(logits.requires_grad_(), boxes)
    assert tuple(parts) == PARTS
    assert total.shape == ()
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    assert float(total.detach()) == pytest.approx(sum(float(p) for p in parts.values()))


def test_weights_scale_their_part() -> None:
    logits, boxes, targets = random_problem()
    _, plain = make_criterion(targets, 6, weights=LossWeights(1.0, 1.0, 1.0))(logits, boxes)
    _, scaled = make_criterion(targets, 6, weights=LossWeights(2.0, 3.0, 5.0))(logits, boxes)
    for part, factor in zip(PARTS, (2, 3, 5), strict=True):
        assert float(scaled[part]) == pytest.approx(factor * float(plain[part]))


def random_problem() -> tuple[Tensor, Tensor, list[Target]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 4, generator=generator).double()
    corner = torch.rand(3, 6, 2, generator=generator).double() * 30
    side = torch.rand(3, 6, 2, generator=generator).double() * 20 + 1
    targets = [
        make_target([[3, 4, 20, 30], [10, 2, 33, 17]], [0, 3], 1),
        make_target([], [], 2),
        make_target([[20, 20, 40, 45]], [2], 3),
    ]
    return logits, torch.cat([corner, corner + side], -1), targets


def test_gradients_are_those_of_finite_differences() -> None:
    logits, boxes, targets = random_problem()
    criterion = make_criterion(targets, 6)
    inputs = (logits.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, b: criterion(x, b)[0], inputs)


def test_only_matched_boxes_receive_gradient() -> None:
    logits, boxes, targets = random_problem()
    criterion = make_criterion(targets, 6)
    total, _ = criterion(logits.requires_grad_(), boxes.requires_grad_())
    total.backward()
    assert boxes.grad is not None
    assert logits.grad is not None
    found = criterion.match(logits, boxes)
    matched = torch.zeros(3, 6, dtype=torch.bool)
    matched[found.batch_index, found.query_index] = True
    assert (boxes.grad.abs().sum(-1) > 0).equal(matched)
    assert (logits.grad != 0).all()


def test_the_order_of_queries_does_not_matter() -> None:
    logits, boxes, targets = random_problem()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    criterion = make_criterion(targets, 6)
    total, _ = criterion(logits, boxes)
    shuffled, _ = criterion(logits[:, order], boxes[:, order])
    assert float(total) == pytest.approx(float(shuffled), rel=1e-12)


def test_images_add_up() -> None:
    logits, boxes, targets = random_problem()
    sizes = torch.tensor([[50, 100], [40, 60], [50, 90]])
    total, _ = Criterion(targets, sizes, normaliser=3.0)(logits, boxes)
    each = [
        Criterion([targets[i]], sizes[i : i + 1], normaliser=3.0)(
            logits[i : i + 1], boxes[i : i + 1]
        )[0]
        for i in range(3)
    ]
    assert float(total) == pytest.approx(sum(map(float, each)), rel=1e-12)


def test_a_batch_without_objects_trains_the_classes_alone() -> None:
    logits, boxes, _ = random_problem()
    targets = [make_target([], [], i) for i in range(3)]
    total, parts = make_criterion(targets, 6)(logits.requires_grad_(), boxes.requires_grad_())
    total.backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert float(parts["l1"]) == float(parts["giou"]) == 0 < float(parts["class"])
    assert logits.grad.isfinite().all()
    assert (logits.grad > 0).all()
    assert not boxes.grad.any()


def test_the_normaliser_counts_matched_queries_and_is_at_least_one() -> None:
    _, _, targets = random_problem()
    assert float(matched_queries(targets, 6)) == 3
    assert float(matched_queries(targets, 1)) == 2
    assert float(matched_queries([targets[1]], 6)) == 1


def test_more_objects_than_queries() -> None:
    logits, boxes, targets = random_problem()
    total, _ = make_criterion(targets, 1)(logits[:, :1], boxes[:, :1])
    assert total.isfinite()


def test_half_precision_is_scored_in_single() -> None:
    logits, boxes, targets = random_problem()
    total, _ = make_criterion(targets, 6)(logits.half(), boxes.float())
    assert total.dtype != torch.float16
    exact, _ = make_criterion(targets, 6)(logits.half().double(), boxes.float())
    assert float(total) == pytest.approx(float(exact), rel=1e-5)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "criterion_reference.npz") as stored:
        return dict(stored)


def reference_criterion(reference: dict[str, np.ndarray], objects: int) -> Criterion:
    boxes, labels = reference["target_boxes"][:objects], reference["target_labels"][:objects]
    targets = [
        Target(torch.from_numpy(boxes), torch.from_numpy(labels), 0, (120, 160)),
        Target(torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.int64), 1, (128, 150)),
    ]
    sizes = torch.from_numpy(reference["sizes"])
    return Criterion(targets, sizes, normaliser=matched_queries(targets, 12))


@pytest.mark.parametrize("output", range(6))
def test_assignments_and_losses_are_the_published_ones(
    reference: dict[str, np.ndarray], output: int
) -> None:
    criterion = reference_criterion(reference, objects=3)
    logits = torch.from_numpy(reference["logits"][output])
    boxes = torch.from_numpy(reference["boxes"][output])
    found = criterion.match(logits, boxes)
    assigned = torch.zeros(2, 12, dtype=torch.int64)
    assigned[found.batch_index, found.query_index] = found.target_index + 1
    assert assigned.tolist() == reference["assigned"][output].tolist()
    _, parts = criterion(logits, boxes)
    wanted = reference["losses"][output]
    assert [float(parts[name]) for name in PARTS] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("output", range(6))
def test_one_object_gives_the_published_losses(
    reference: dict[str, np.ndarray], output: int
) -> None:
    logits = torch.from_numpy(reference["logits"][output])
    boxes = torch.from_numpy(reference["boxes"][output])
    _, parts = reference_criterion(reference, objects=1)(logits, boxes)
    # There the normaliser has 2^-23 added, which shows where it is 1.
    wanted = reference["losses_of_first_object"][output] * (1 + 2.0**-23)
    assert [float(parts[name]) for name in PARTS] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("output", range(6))
def test_without_objects_the_normaliser_is_one_where_it_was_tiny(
    reference: dict[str, np.ndarray], output: int
) -> None:
    logits = torch.from_numpy(reference["logits"][output])
    boxes = torch.from_numpy(reference["boxes"][output])
    _, parts = reference_criterion(reference, objects=0)(logits, boxes)
    # There the sum is divided by 2^-23 alone (6.9e8 at the first output); here by 1.
    wanted = reference["losses_without_objects"][output] * 2.0**-23
    assert [float(parts[name]) for name in PARTS] == pytest.approx(wanted, rel=1e-12)
