"""The scenes data set: whole classes, sizes of every kind, objects that can be seen and named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detection.data import check_images, compose_scenes, load_coco_folder, scene_categories
from detection.data import scenes as module
from detection.data.compositing import LUMA, extent, iou
from detection.data.materials import TRAIN_FONTS, VAL_FONTS, faces, is_held_out
from detection.data.scene_images import (
    LEAST_VISIBLE,
    LEAST_VISIBLE_SMALL,
    MAX_IOU,
    SMALL,
    CutOut,
    Handwriting,
    Pose,
    Scene,
    SceneMaterials,
    Thing,
    compose_scene,
    draw_length,
    draw_scene,
)

IMAGES = 120


@pytest.fixture(scope="module", params=["train", "val"])
def drawn(request: pytest.FixtureRequest) -> list[Scene]:
    materials = module._materials(request.param)
    return [draw_scene(materials, 256, np.random.default_rng(seed)) for seed in range(IMAGES)]


def test_is_an_ordinary_coco_folder(tmp_path: Path) -> None:
    root = compose_scenes(tmp_path / "scenes", train_images=6, val_images=3)
    train, val = load_coco_folder(root)
    assert (len(train), len(val)) == (6, 3)
    assert train.categories == val.categories == scene_categories
    document = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    kinds = [category["supercategory"] for category in document["categories"]]
    assert [kinds.count(kind) for kind in ("digit", "letter", "coin", "face")] == [10, 12, 1, 1]
    for dataset in (train, val):
        check_images(dataset)
        assert not dataset.problems
        for image, target in dataset:
            assert image.shape == (3, 256, 256)
            assert 1 <= len(target.boxes) <= 10


def test_training_and_validation_share_nothing() -> None:
    def contents(split: str) -> list[bytes]:
        materials = module._materials(split)
        assert all(materials.classes) and len(materials.classes) == len(scene_categories.names)
        pictures = [*materials.distractors, *(one for many in materials.classes for one in many)]
        return [
            *(one.ink.tobytes() for one in pictures if isinstance(one, Handwriting)),
            *(one.picture.tobytes() for one in pictures if isinstance(one, CutOut)),
            *(photograph.tobytes() for photograph in materials.photographs),
        ]

    train, val = contents("train"), contents("val")
    assert not {*train} & {*val}
    assert len({*train}) == len(train) and len({*val}) == len(val)
    designs = [{name.split("-")[0][:6] for name in names} for names in (TRAIN_FONTS, VAL_FONTS)]
    assert designs[0] == {"DejaVu", "cmr10", "cmb10"} and not designs[0] & designs[1]


def test_every_fifth_of_a_label_is_held_out() -> None:
    labels = np.array([0, 1] * 10)
    assert np.flatnonzero(is_held_out(labels)).tolist() == [8, 9, 18, 19]


def test_faces_are_not_among_the_distractors() -> None:
    shown, others = faces("train")
    assert (len(shown), len(others)) == (80, 80)
    assert not {one.tobytes() for one in shown} & {other.tobytes() for other in others}


def test_boxes_are_inside_and_sizes_between_their_bounds(drawn: list[Scene]) -> None:
    lengths = []
    for scene in drawn:
        assert 1 <= len(scene.objects) <= 10
        for thing in scene.objects:
            whole, box = thing.whole_box, thing.box
            assert (whole[:2] >= 0).all() and (whole[2:] <= 256).all()
            assert (box[:2] >= whole[:2]).all() and (box[2:] <= whole[2:]).all()
            assert (box[2:] - box[:2] > 1).all()
            assert 7 < (whole[2:] - whole[:2]).max() < 165
            lengths.append((thing.length, (whole[2:] - whole[:2]).max()))
    wanted, found = np.array(lengths).T
    assert wanted.min() >= 8 and wanted.max() <= 160
    off = np.abs(found - wanted) - np.maximum(1.5, 0.05 * wanted)
    assert np.mean(off > 0) < 0.01  # hairlines of fine print


def test_every_object_stays_visible_and_many_are_covered(drawn: list[Scene]) -> None:
    things = [thing for scene in drawn for thing in scene.objects]
    for thing in things:
        assert thing.share >= (LEAST_VISIBLE_SMALL if thing.length < SMALL else LEAST_VISIBLE)
    assert LEAST_VISIBLE >= 0.5
    assert np.mean([thing.share < 0.95 for thing in things]) > 0.1
    for scene in drawn:
        for i, thing in enumerate(scene.objects):
            for other in scene.objects[:i]:
                assert iou(thing.whole_box, other.whole_box) <= MAX_IOU


def test_small_medium_and_large_are_well_populated(drawn: list[Scene]) -> None:
    sides = np.array([thing.box[2:] - thing.box[:2] for scene in drawn for thing in scene.objects])
    areas = sides.prod(axis=1)
    shares = [np.mean(areas < 32**2), np.mean(areas > 96**2)]
    assert min(*shares, 1 - sum(shares)) >= 0.15
    assert len(areas) / IMAGES > 2000 / 600  # so that 600 images have more than 2000


def test_classes_are_balanced(drawn: list[Scene]) -> None:
    labels = [thing.label for scene in drawn for thing in scene.objects]
    counts = np.bincount(labels, minlength=len(scene_categories.names))
    mean, spread = counts.mean(), math.sqrt(counts.mean())
    assert len(counts) >= 20
    assert counts.min() > mean - 3.5 * spread and counts.max() < mean + 3.5 * spread


def test_objects_stand_out(drawn: list[Scene]) -> None:
    """What nothing has covered differs from what is around, though clutter may come close."""
    differences = []
    for scene in drawn:
        for thing in scene.objects:
            if thing.share < 0.999:
                continue
            row, column = thing.corner
            rows, columns = thing.visible.shape
            there = scene.canvas[row : row + rows, column : column + columns] @ LUMA
            inside = there[thing.visible >= 0.75 * thing.visible.max()].mean()
            differences.append(abs(inside - there[thing.visible == 0].mean()))
    assert np.mean(np.array(differences) > 25) > 0.97


def test_an_image_is_its_scene() -> None:
    materials = module._materials("val")
    pixels, boxes, labels = compose_scene(materials, 96, np.random.default_rng(3))
    scene = draw_scene(materials, 96, np.random.default_rng(3))
    assert pixels.dtype == np.uint8 and pixels.shape == (96, 96, 3)
    np.testing.assert_allclose(pixels, scene.canvas, atol=0.51)
    assert [thing.label for thing in scene.objects] == labels.tolist()
    np.testing.assert_array_equal([thing.box for thing in scene.objects], boxes)


@given(size=st.integers(64, 1024), seed=st.integers(0, 1000))
def test_lengths_are_between_their_bounds(size: int, seed: int) -> None:
    length = draw_length(size, np.random.default_rng(seed))
    assert 8 - 1e-9 <= length <= 0.625 * size + 1e-9


def bar(textured: bool) -> CutOut:
    coverage = np.zeros((80, 80), dtype=np.uint8)
    coverage[8:72, 32:48] = 255
    luminance = np.tile(np.arange(80, dtype=np.uint8), (80, 1))
    bands = (Image.fromarray(luminance), Image.fromarray(coverage))
    return CutOut(Image.merge("LA", bands), textured)


def ink() -> Handwriting:
    drawing = np.zeros((8, 8))
    drawing[:, 3:5] = 1.0
    return Handwriting(drawing)


@pytest.mark.parametrize("exemplar", [bar(True), bar(False), ink()], ids=["photo", "print", "ink"])
def test_rotation_and_shear_go_where_they_should(exemplar: CutOut | Handwriting) -> None:
    def lean(pose: Pose) -> float:
        """Column of the bar's top minus that of its foot."""
        alpha, _ = exemplar.render(2.0, pose)
        box = extent(alpha)
        columns = np.arange(alpha.shape[1])
        top, foot = alpha[int(box[1]) + 6], alpha[int(box[3]) - 6]
        return float((top @ columns) / top.sum() - (foot @ columns) / foot.sum())

    assert abs(lean(Pose())) < 0.5
    assert lean(Pose(angle=0.2)) < -4  # anticlockwise: the top goes left
    assert lean(Pose(shear=0.2)) < -4  # the foot goes right


@given(scale=st.floats(0.3, 5.0), stretch=st.floats(0.87, 1.15))
def test_cut_outs_have_the_size_asked_for(scale: float, stretch: float) -> None:
    alpha, luminance = bar(True).render(scale, Pose(stretch=stretch))
    assert luminance is not None and luminance.shape == alpha.shape
    x1, y1, x2, y2 = extent(alpha)
    length = 32 * scale  # of the whole picture, margin included
    assert y2 - y1 == pytest.approx(0.8 * length, abs=0.7)
    assert x2 - x1 == pytest.approx(0.2 * length * stretch, abs=0.7)
    inside = luminance[alpha > 0.99]
    if inside.size > 20:
        assert inside.mean() == pytest.approx(39.5, abs=6)


def square(label: int, corner: tuple[int, int], side: int = 20) -> Thing:
    return Thing(label, corner, np.pad(np.ones((side, side)), 1), float(side))


def test_what_is_covered_no_longer_counts() -> None:
    scene = Scene(np.zeros((64, 64, 3), dtype=np.float32))
    below = square(0, (10, 10), side=30)
    scene.add(below)
    assert below.box.tolist() == [11, 11, 41, 41] and below.share == 1
    assert scene.cover((0, 0), np.ones((64, 20)))  # 9 of its 30 columns
    assert below.box.tolist() == [20, 11, 41, 41] and below.share == pytest.approx(0.7)
    assert below.whole_box.tolist() == [11, 11, 41, 41]
    assert not scene.cover((0, 44 - 20), np.ones((64, 20)))  # too much, all told
    assert below.share == pytest.approx(0.7)
    assert scene.cover((50, 50), np.ones((5, 5)))


def test_small_objects_are_hardly_covered() -> None:
    scene = Scene(np.zeros((64, 64, 3), dtype=np.float32))
    scene.add(square(0, (10, 10)))
    assert not scene.cover((0, 0), np.ones((64, 13)))  # two of its 20 columns
    assert scene.cover((0, 0), np.ones((64, 12)))


def test_objects_below_count_as_surroundings_however_little_there_is_of_them() -> None:
    scene = Scene(np.full((64, 64, 3), 200, dtype=np.float32))
    thin = Thing(0, (10, 10), np.pad(np.ones((40, 2)), 1), 40.0)
    scene.paint(thin.corner, thin.visible, np.zeros(3, dtype=np.float32))
    everything = np.ones((64, 64), dtype=bool)
    assert scene.luminance((0, 0), everything) == pytest.approx((200, 200))
    scene.add(thin)
    assert scene.luminance((0, 0), everything) == pytest.approx((0, 200))


def test_an_image_too_busy_for_any_object_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from detection.data import scene_images

    materials: SceneMaterials = module._materials("val")
    backgrounds = []

    def lay(scene: Scene, *arguments: object) -> None:
        backgrounds.append(scene)
        if len({id(one) for one in backgrounds}) > 1:
            scene.add(square(0, (10, 10)))

    monkeypatch.setattr(scene_images, "_lay_object", lay)
    scene = draw_scene(materials, 64, np.random.default_rng(0))
    assert scene is backgrounds[-1] is not backgrounds[0] and scene.objects
