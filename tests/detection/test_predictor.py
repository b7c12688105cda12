"""Prediction: whatever holds an image gives the same, alone or in a batch; nonsense is refused."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_predictor import CATEGORIES, picture, small_predictor

import detection
from detection.checkpoints import CheckpointError
from detection.data import DataError
from detection.decoder.movement import Settled
from detection.detections import Detections
from detection.distributed import DeviceError
from detection.models.config import EquilibriumConfig, RecurrentConfig, StackedConfig
from detection.prediction import predict
from detection.predictor import Predictor
from detection.sources import NamedImage


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return small_predictor()


def assert_same(a: Detections, b: Detections, pixels: float = 0.0) -> None:
    torch.testing.assert_close(a.boxes, b.boxes, atol=pixels, rtol=0)
    torch.testing.assert_close(a.scores, b.scores, atol=pixels / 10, rtol=0)
    assert a.labels.tolist() == b.labels.tolist()
    assert a.steps == b.steps


def test_every_form_of_an_image_gives_the_same(predictor: Predictor, tmp_path: Path) -> None:
    array = picture()
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    alpha = np.full((*array.shape[:2], 1), 9, np.uint8)
    expected = predictor.predict(path)
    assert len(expected) == 10
    forms: list[Any] = [
        str(path),
        Image.open(path),
        array,
        array / 255,
        (array / 255).astype(np.float16),
        np.asfortranarray(array),
        array[::-1][::-1],
        np.concatenate([array, alpha], axis=2),
        tensor,
        tensor.double() / 255,
        NamedImage("by another name", array),
    ]
    for form in forms:
        assert_same(predictor.predict(form), expected)
    for found in predictor.predict(forms, batch_size=4):
        assert_same(found, expected)


def test_grey_is_the_same_in_three_channels(predictor: Predictor) -> None:
    grey = picture()[..., 0]
    expected = predictor.predict(np.stack([grey] * 3, axis=2))
    assert_same(predictor.predict(grey), expected)
    assert_same(predictor.predict(Image.fromarray(grey)), expected)


@pytest.mark.fault(13)
def test_exif_rotation_is_obeyed_as_a_viewer_does(predictor: Predictor, tmp_path: Path) -> None:
    """Fault 13: EXIF rotation of an image that is predicted on.

    Expected: the boxes are those of the image as a viewer shows it.
    """
    stored = Image.fromarray(picture(50, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    stored.save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(stored), -1)
    expected = predictor.predict(upright)
    assert_same(predictor.predict(tmp_path / "a.png"), expected)
    with Image.open(tmp_path / "a.png") as opened:
        assert_same(predictor.predict(opened), expected)
        assert opened.size == (80, 50)  # the caller's image is as it was
    picture_of_it = predictor.predict(tmp_path / "a.png").plot(scale=1)
    assert picture_of_it.size == (50, 80)


@pytest.mark.fault(25)
def test_a_list_keeps_its_order_and_ignores_its_batches(predictor: Predictor) -> None:
    """Fault 25: the detections of an image depend on its batch.

    Expected: they do not, and a list keeps its order.
    """
    shapes = ((50, 70), (96, 40), (50, 71), (64, 64), (33, 90), (96, 40), (50, 70))
    images = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
    alone = [predictor.predict(image) for image in images]
    for size in (1, 2, 7, 100):
        together = predictor.predict(tuple(images), batch_size=size)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other, pixels=1e-4)
    assert len({tuple(found.scores.tolist()) for found in alone}) == len(alone)


def test_an_empty_list_gives_an_empty_list(predictor: Predictor) -> None:
    assert predictor.predict([]) == [] and predictor.predict(()) == []
    assert list(predictor.stream([])) == []


def test_detections_know_classes_ids_steps_residual_and_image(
    predictor: Predictor, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    found = predictor.predict(path)
    assert found.class_names == [CATEGORIES.names[n] for n in found.labels]
    assert found.category_ids == [CATEGORIES.ids[n] for n in found.labels]
    assert found.steps == 4 and found.residual is not None and 0 < found.residual < 1
    assert found.source is not None and found.source.name == str(path)
    assert found.plot(threshold=0.0, scale=2).size == (140, 100)
    found.boxes.mul_(2)  # an ordinary tensor, to do with as one likes
    assert {r["category_id"] for r in found.to_coco(5)} <= set(CATEGORIES.ids)


def test_an_array_in_a_list_is_drawn_upon(predictor: Predictor) -> None:
    found = predictor.predict([picture(), picture(40, 40)])[1]
    assert found.source is not None and found.source.name == "image 1"
    assert found.plot(scale=1).size == (40, 40)


def test_steps_are_taken_and_told(predictor: Predictor) -> None:
    image = picture()
    three = predictor.predict(image, steps=3)
    assert three.steps == 3
    assert_same(predictor.predict(image, steps=4), predictor.predict(image))
    assert not torch.equal(three.boxes, predictor.predict(image, steps=5).boxes)
    images = [image, picture(seed=1)]
    assert [found.steps for found in predictor.predict(images, steps=2, batch_size=2)] == [2, 2]


def test_tolerance_is_what_a_box_may_still_move() -> None:
    """An image ends at the first refinement after which no box moves farther, times its score."""
    settled = Settled(score=1.0, least_steps=0)
    loose = small_predictor(EquilibriumConfig(steps=25, settled=settled))
    image = picture(64, 96)  # of the size that the detector gets
    with torch.inference_mode():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        encoded = loose.detector.encode(pixels, torch.tensor([[64, 96]]))
        features, state = encoded
        decoder: Any = loose.detector.decoder
        state, path = decoder.first(state, features), []
        for _ in range(26):
            path.append((decoder.refinement.classify(state.content).sigmoid(), state.boxes))
            state = decoder.refinement(state, features)
    moved = [
        float((torch.maximum(seen, then).amax(-1) * (after - before).abs().amax(-1)).max())
        for (seen, before), (then, after) in pairwise(path)
    ]
    for tolerance in (2 * max(moved), *(1.001 * m for m in sorted(moved)[::5]), min(moved) / 2):
        within = [n for n, m in enumerate(moved) if m <= tolerance]
        assert loose.predict(image, tolerance=tolerance).steps == (within[0] if within else 25)
    assert loose.predict(image, tolerance=min(moved) / 2, steps=6).steps == 6
    default = loose.recipe.model.decoder.settled.pixels  # type: ignore[union-attr]
    auto = loose.predict(image, steps="auto")
    assert_same(auto, loose.predict(image, tolerance=default))


@pytest.mark.parametrize("decoder", [StackedConfig(layers=2), RecurrentConfig(steps=2)])
def test_without_a_fixed_point_there_are_no_steps(decoder: Any) -> None:
    fixed = small_predictor(decoder)
    found = fixed.predict(picture())
    assert found.steps is None and found.residual is None
    for options in ({"steps": 3}, {"tolerance": 1.0}, {"steps": "auto"}):
        with pytest.raises(ValueError, match="not solved for a fixed point"):
            fixed.predict(picture(), **options)
    with pytest.raises(ValueError, match="warm=True"):
        list(fixed.stream([picture()], warm=True))
    assert_same(next(fixed.stream([picture()])), found)


def test_numbers_out_of_range_are_refused(predictor: Predictor) -> None:
    bad: list[dict[str, Any]] = [
        *({"steps": n} for n in (0, -1, 2.5, True, "many")),
        *({"tolerance": t} for t in (0, -1.0, float("nan"), float("inf"))),
        *({"max_detections": n} for n in (0, 1.5)),
        {"batch_size": 0},
    ]
    for options in bad:
        (name,) = options
        with pytest.raises(ValueError, match=name):
            predictor.predict(picture(), **options)


def test_as_many_detections_as_the_recipe_says(predictor: Predictor) -> None:
    assert len(predictor.predict(picture())) == predictor.recipe.max_detections == 10
    assert len(predictor.predict(picture(), max_detections=3)) == 3
    assert len(predictor.predict(picture(), max_detections=1000)) == 18  # 6 queries, 3 classes
    few = predict(predictor.detector, [picture()], predictor.recipe.augmentation, 2)
    assert len(few[0]) == 2


def test_a_film_starts_where_the_frame_before_has_ended(predictor: Predictor) -> None:
    image = picture()
    for warm in (True, None):
        first, second = predictor.stream([image, image], steps=2, warm=warm)
        assert_same(first, predictor.predict(image, steps=2))
        longer = predictor.predict(image, steps=4)
        torch.testing.assert_close(second.boxes, longer.boxes)
    _, cold = predictor.stream([image, image], steps=2, warm=False)
    assert_same(cold, first)


def test_a_film_of_another_size_starts_anew(predictor: Predictor) -> None:
    films = [picture(), picture(64, 64), picture(64, 64, seed=3)]
    found = list(predictor.stream(films, steps=2))
    assert_same(found[1], predictor.predict(films[1], steps=2))
    named = [NamedImage("a", films[1], Path("a.mp4"), 0), NamedImage("b", films[2], Path("b.mp4"))]
    _, other = predictor.stream(named, steps=2)
    assert_same(other, predictor.predict(films[2], steps=2))
    assert other.source is named[1]


def test_a_frame_after_another_may_be_done_sooner() -> None:
    """Where nothing is asked to rest: six refinements of the first frame, none of the next."""
    settled = Settled(pixels=1e9, score=2.0)
    loose = small_predictor(EquilibriumConfig(settled=settled))
    frames = [picture(), picture(seed=1)]
    for options in ({}, {"steps": "auto"}, {"tolerance": 1e9}):
        assert [found.steps for found in loose.stream(frames, **options)] == [6, 0]
        assert [found.steps for found in loose.stream(frames, warm=False, **options)] == [6, 6]


def test_a_stream_is_lazy(predictor: Predictor) -> None:
    def frames():
        yield picture()
        raise RuntimeError("nobody asked for this frame")

    assert len(next(predictor.stream(frames()))) == 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_tiny_and_extreme_images(predictor: Predictor, shape: tuple[int, int]) -> None:
    found = predictor.predict(np.full((*shape, 3), 90, np.uint8))
    assert len(found) == 10 and found.boxes.isfinite().all()
    assert found.plot().size[0] >= shape[1]


def test_a_bad_image_is_named_before_anything_runs(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(predictor.detector), "forward", lambda *_, **__: pytest.fail("ran"))
    for bad, words in (
        (tmp_path / "absent.png", "no such image"),
        (tmp_path, "is a folder"),
        (17, "image 1 is a int"),
        (None, "image 1 is a NoneType"),
    ):
        with pytest.raises(DataError, match=words):
            predictor.predict([picture(), bad])


def test_saved_and_loaded_it_predicts_the_same(predictor: Predictor, tmp_path: Path) -> None:
    path = predictor.save_checkpoint(tmp_path / "run" / "checkpoints" / "best.safetensors")
    expected = predictor.predict(picture())
    for place in (path, str(path), tmp_path / "run", tmp_path / "run" / "checkpoints"):
        loaded = detection.load(place)
        assert_same(loaded.predict(picture()), expected)
        assert loaded.recipe == predictor.recipe and loaded.categories == CATEGORIES
        assert loaded.metrics == predictor.metrics and loaded.step == 7
        assert not loaded.detector.training
    assert "3 classes: cat, dog, emu; cpu" in repr(loaded)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_refused_and_runs_no_code(
    predictor: Predictor, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    good = predictor.save_checkpoint(tmp_path / "good.safetensors")
    for name in ("a.pth", "a.pt", "a.pkl", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(touched)))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("a.pth", "deqdet convert"),
        ("a.pt", "pickled"),
        ("a.pkl", "pickled"),
        ("a.safetensors", "is not a .safetensors file"),
        ("cut.safetensors", "cut short or damaged"),
        ("empty.safetensors", "cut short or damaged"),
        ("absent.safetensors", "does not exist"),
        ("empty", "folder without a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            detection.load(tmp_path / name)
        assert name in str(raised.value)
    assert not touched.exists()


def test_a_device_that_is_not_there_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    path = predictor.save_checkpoint(tmp_path / "a.safetensors")
    for device in ("nonsense", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(DeviceError, match=device):
            detection.load(path, device=device)
    assert detection.load(path, device="cpu").device == torch.device("cpu")


def test_head_and_class_names_must_agree(predictor: Predictor) -> None:
    fewer = detection.Categories(("cat", "dog"), (1, 2))
    with pytest.raises(CheckpointError, match="3 classes and there are 2 names"):
        Predictor(predictor.detector, predictor.recipe, fewer)


def test_public_names_are_there_and_loaded_late() -> None:
    for name in detection.__all__:
        assert getattr(detection, name).__name__ == name
        assert name in dir(detection)
    with pytest.raises(AttributeError, match="nothing"):
        _ = detection.nothing
    code = "import sys, detection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_moves_takes_its_model_along(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save_pretrained(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert_same(
        Predictor.from_pretrained(tmp_path / "b").predict(picture()), predictor.predict(picture())
    )
