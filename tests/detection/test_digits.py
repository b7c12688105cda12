"""The digits data set: readable, tightly boxed, disjoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detection.data import check_images, compose_digits, digits_categories, load_coco_folder
from detection.data import digits as module
from detection.data.compositing import LUMA, draw_colour, render_stroke
from detection.data.digit_images import CONTRAST, MAX_IOU, compose_image

COUNTS = {"train_images": 12, "val_images": 6}
BOXES = [
    [12.66, 28.18, 23.27, 29.77],
    [44.05, 10.16, 12.1, 14.97],
    [39.05, 43.62, 9.33, 16.81],
    [11.61, 33.09, 12.51, 19.24],
    [6.18, 13.83, 9.82, 14.23],
    [28.88, 44.36, 8.08, 11.34],
    [42.0, 7.74, 7.94, 16.59],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_digits(tmp_path_factory.mktemp("digits") / "digits", **COUNTS)


def test_is_an_ordinary_coco_folder(root: Path) -> None:
    train, val = load_coco_folder(root)
    assert (len(train), len(val)) == (12, 6)
    assert train.categories == digits_categories
    assert digits_categories.names[digits_categories.index_of(1)] == "0"
    for dataset in (train, val):
        check_images(dataset)
        assert not dataset.problems
        for image, target in dataset:
            assert image.shape == (3, 128, 128)
            assert 1 <= len(target.boxes) <= 5
            assert (target.boxes >= 0).all() and (target.boxes <= 128).all()
            heights = target.boxes[:, 3] - target.boxes[:, 1]
            assert (heights > 14).all() and (heights < 80).all()
        for record in dataset.coco.anns.values():
            assert record["area"] == pytest.approx(record["bbox"][2] * record["bbox"][3], abs=0.01)


def test_training_and_validation_share_nothing() -> None:
    train, val = module._materials("train"), module._materials("val")
    ours = {exemplar.tobytes() for exemplar in train.exemplars}
    theirs = {exemplar.tobytes() for exemplar in val.exemplars}
    assert not ours & theirs
    assert len(train.labels) + len(val.labels) == 1797 - 15
    assert set(val.labels) == set(train.labels) == set(range(10))
    assert not set(module.TRAIN_PHOTOGRAPHS) & set(module.VAL_PHOTOGRAPHS)
    pixels = [photograph.tobytes() for photograph in (*train.photographs, *val.photographs)]
    assert len(pixels) == len(set(pixels))


@given(
    height=st.floats(20, 64),
    angle=st.floats(-0.2, 0.2),
    shear=st.floats(-0.2, 0.2),
    stretch=st.floats(0.87, 1.15),
    exemplar=st.integers(0, 2**31),
)
def test_boxes_are_tight(
    height: float, angle: float, shear: float, stretch: float, exemplar: int
) -> None:
    ink = np.random.default_rng(exemplar).random((8, 8)) > 0.6
    ink[2:6, 3:5] = True  # something to see in any case
    alpha, box = render_stroke(ink.astype(float), height, angle, shear, stretch)
    rows, columns = (np.flatnonzero((alpha >= 0.5).any(axis=axis)) for axis in (1, 0))
    whole = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(box - whole).max() <= 0.5 + 1e-6  # the ½ crossing is within half a pixel


@given(height=st.floats(20, 64), angle=st.floats(-0.2, 0.2))
def test_stroke_of_a_disc_has_the_size_asked_for(height: float, angle: float) -> None:
    y, x = np.mgrid[:8, :8] - 3.5
    disc = np.clip(3.0 - np.hypot(x, y) + 0.5, 0.0, 1.0)  # radius 3 of the 4 pixels that fit
    _, box = render_stroke(disc, height, angle)
    expected = 6 * height / 8
    np.testing.assert_allclose(box[2:] - box[:2], expected, atol=0.04 * height)


def test_rotation_and_shear_go_where_they_should() -> None:
    bar = np.zeros((8, 8))
    bar[:, 3:5] = 1.0

    def lean(**change: float) -> float:
        """Column of the stroke's top minus that of its foot."""
        alpha, box = render_stroke(bar, 48.0, **change)
        columns = np.arange(alpha.shape[1])
        top, foot = alpha[int(box[1]) + 4], alpha[int(box[3]) - 4]
        return float((top @ columns) / top.sum() - (foot @ columns) / foot.sum())

    assert abs(lean()) < 0.5
    assert lean(angle=0.2) < -4  # anticlockwise: the top goes left
    assert lean(shear=0.2) < -4  # the foot goes right


@given(low=st.floats(0, 255), span=st.floats(0, 255), seed=st.integers(0, 1000))
def test_colours_keep_their_distance(low: float, span: float, seed: int) -> None:
    high = min(255.0, low + span)
    colour = draw_colour(low, high, CONTRAST, np.random.default_rng(seed))
    if colour is None:
        assert low <= CONTRAST and high >= 255 - CONTRAST
        return
    luminance = float(colour @ LUMA)
    assert luminance <= low - CONTRAST + 0.01 or luminance >= high + CONTRAST - 0.01
    assert colour.min() >= -0.01 and colour.max() <= 255.01


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_digit_stands_out_and_none_overlap(split: str) -> None:
    materials = module._materials(split)
    for seed in range(30):
        pixels, boxes, digits = compose_image(materials, 128, np.random.default_rng(seed))
        assert pixels.dtype == np.uint8 and len(boxes) == len(digits)
        luminance = pixels @ LUMA
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            inside = luminance[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
            darkest, lightest = np.percentile(inside, (3, 97))
            assert lightest - darkest > 0.8 * CONTRAST
            for a1, b1, a2, b2 in boxes[:i]:
                common = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
                union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
                assert common / union <= MAX_IOU


def test_bytes_are_those_of_ever(tmp_path: Path) -> None:
    """A composed data set is found again by later versions, and benchmarks on it compare."""
    root = compose_digits(tmp_path / "digits", train_images=2, val_images=1, size=64)
    boxes = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert [record["bbox"] for record in boxes["annotations"]] == BOXES
