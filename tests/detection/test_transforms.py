"""Boxes follow their pixels, sizes follow the published rule, chance follows torch's seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detection.data import AugmentationConfig, Target, eval_transform, train_transform
from detection.data.transforms import PIXEL_MEAN, fit_size

FIXED = AugmentationConfig(short_sides=(96,), max_size=400, horizontal_flip=0.0)


def scene(height: int = 96, width: int = 128) -> tuple[Tensor, Target]:
    """A black image with a white rectangle and its box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 30:54, 40:80] = 255
    box = torch.tensor([[40.0, 30.0, 80.0, 54.0]])
    return image, Target(box, torch.tensor([3]), 1, (height, width))


def extent(image: Tensor) -> Tensor:
    """Corners of the white rectangle, from the mass of its mean profiles."""
    bright = image.float().mean(0) / 255
    rows, columns = bright.amax(1), bright.amax(0)
    y1, x1 = (rows > 0.5).nonzero().min(), (columns > 0.5).nonzero().min()
    return torch.stack([x1.float(), y1.float(), x1 + columns.sum(), y1 + rows.sum()])


@given(
    size=st.tuples(st.integers(8, 3000), st.integers(8, 3000)),
    short=st.integers(16, 1000),
    extra=st.integers(0, 1000),
)
def test_fit_size(size: tuple[int, int], short: int, extra: int) -> None:
    new = fit_size(size, short, short + extra)
    assert max(new) <= short + extra and min(new) <= short
    # One of the two limits is reached, to the pixel.
    assert min(new) == short or max(new) == short + extra
    scale = min((short + extra) / max(size), short / min(size))
    assert all(abs(a - b * scale) <= 0.5 + 1e-6 or a == 1 for a, b in zip(new, size, strict=True))


def test_fit_size_of_known_images() -> None:
    assert fit_size((480, 640), 800, 1333) == (800, 1067)  # 1066.67 rounds up
    assert fit_size((427, 640), 800, 1333) == (800, 1199)
    assert fit_size((640, 200), 800, 1333) == (1333, 417)  # limited by the long side


def test_evaluation_resizes_image_and_boxes_alike() -> None:
    image, target = scene()
    transform = eval_transform(AugmentationConfig(short_sides=(64, 192), max_size=400))
    resized, new = transform(image, target)
    assert tuple(resized.shape) == (3, 192, 256) == (3, *transform.output_size((96, 128)))
    assert new.boxes.tolist() == [[80, 60, 160, 108]]
    assert type(resized) is Tensor and type(new.boxes) is Tensor
    assert (new.image_id, new.original_size) == (1, (96, 128))


def test_nothing_changes_without_augmentation() -> None:
    image, target = scene()
    same, new = train_transform(FIXED)(image, target)
    assert same.equal(image) and new.boxes.equal(target.boxes)


def test_flip_is_an_involution_with_the_right_probability() -> None:
    image, target = scene()
    always = train_transform(AugmentationConfig((96,), 400, horizontal_flip=1.0))
    once = always(image, target)
    assert once[1].boxes.tolist() == [[48, 30, 88, 54]]
    twice = always(*once)
    assert twice[0].equal(image) and twice[1].boxes.equal(target.boxes)
    torch.manual_seed(0)
    sometimes = train_transform(AugmentationConfig((96,), 400, horizontal_flip=0.25))
    flips = sum(sometimes(image, target)[1].boxes[0, 0] == 48 for _ in range(400))
    assert 70 <= flips <= 130  # 100 ± 3.5 standard deviations


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_zoom_and_shift_keep_boxes_on_their_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    config = AugmentationConfig((96,), 400, 0.0, scale_jitter=(0.7, 1.3), translate=0.1)
    image, target = train_transform(config)(*scene())
    assert image.shape == (3, 96, 128)
    # What the window uncovers is grey: look at the black image with the white rectangle only.
    background = torch.tensor(PIXEL_MEAN, dtype=torch.uint8)[:, None, None]
    image = torch.where(image == background, torch.zeros_like(image), image)
    image = torch.where(image.amin(0) < 125, torch.zeros_like(image), image)
    torch.testing.assert_close(extent(image), target.boxes[0], atol=1.5, rtol=0)


def test_zoom_has_the_range_that_was_asked_for() -> None:
    torch.manual_seed(0)
    config = AugmentationConfig((96,), 400, 0.0, scale_jitter=(0.5, 1.5))
    transform = train_transform(config)
    boxes = torch.cat([transform(*scene())[1].boxes for _ in range(200)])
    zooms = (boxes[:, 2] - boxes[:, 0]) / 40
    assert 0.49 <= zooms.min() <= 0.55 and 1.4 <= zooms.max() <= 1.52


def test_boxes_that_leave_the_image_are_dropped_with_their_labels() -> None:
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 4, 4], [45, 45, 55, 55], [0, 40, 60, 60]])
    target = Target(boxes, torch.tensor([0, 1, 2]), 1, (100, 100))
    config = AugmentationConfig((100,), 100, 0.0, scale_jitter=(2.0, 2.0))
    _, new = train_transform(config)(image, target)
    assert new.labels.tolist() == [1, 2]
    assert new.boxes.tolist() == [[40, 40, 60, 60], [0, 30, 70, 70]]


def test_published_crop() -> None:
    torch.manual_seed(1)
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    image[:, 100:400, 200:500] = 255
    target = Target(torch.tensor([[200.0, 100, 500, 400]]), torch.tensor([3]), 1, (480, 640))
    config = AugmentationConfig(short_sides=(480, 800), crop=True, horizontal_flip=0.0)
    transform = train_transform(config)
    shapes = set()
    for _ in range(24):
        new_image, new = transform(image, target)
        height, width = new_image.shape[-2:]
        shapes.add((height, width))
        assert min(height, width) in (480, 800) or max(height, width) == 1333
        assert len(new.boxes) <= 1
        if len(new.boxes):
            torch.testing.assert_close(extent(new_image), new.boxes[0], atol=3.0, rtol=0)
            assert (new.boxes[0] >= 0).all()
            assert new.boxes[0, 2] <= width and new.boxes[0, 3] <= height
    plain = {(480, 640), (800, 1067)}
    assert plain & shapes and shapes - plain  # with and without a crop


def test_crops_may_be_empty() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 600, 1200, dtype=torch.uint8)
    target = Target(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), 1, (600, 1200))
    transform = train_transform(AugmentationConfig((64,), 256, 0.0, crop=True))
    counts = [len(transform(image, target)[1].boxes) for _ in range(20)]
    assert 0 in counts and 1 in counts


def test_images_without_objects() -> None:
    config = AugmentationConfig(
        (64,), 256, 1.0, crop=True, scale_jitter=(0.8, 1.2), translate=0.1, colour_jitter=0.3
    )
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1, (96, 128))
    image, new = train_transform(config)(scene()[0], target)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert new.boxes.shape == (0, 4) and new.labels.shape == (0,)


def test_colour_changes_pixels_only() -> None:
    torch.manual_seed(0)
    image, target = scene()
    image = image // 2 + 40
    new_image, new = train_transform(AugmentationConfig((96,), 400, 0.0, colour_jitter=0.5))(
        image, target
    )
    assert not new_image.equal(image) and new.boxes.equal(target.boxes)


def test_seed_decides() -> None:
    config = AugmentationConfig(
        (64, 80, 96), 256, scale_jitter=(0.8, 1.2), translate=0.1, colour_jitter=0.3
    )

    def draw(seed: int) -> tuple[Tensor, Target]:
        torch.manual_seed(seed)
        return train_transform(config)(*scene())

    first, again, other = draw(5), draw(5), draw(6)
    assert first[0].equal(again[0]) and first[1].boxes.equal(again[1].boxes)
    assert not first[1].boxes.equal(other[1].boxes)


@pytest.mark.parametrize(
    "fields",
    [
        {"short_sides": ()},
        {"short_sides": (0,)},
        {"max_size": 799},
        {"horizontal_flip": 1.5},
        {"scale_jitter": (0.0, 1.0)},
        {"scale_jitter": (1.2, 0.8)},
        {"translate": 1.0},
        {"colour_jitter": -0.1},
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        AugmentationConfig(**fields)
