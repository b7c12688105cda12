"""What all arms begin from: cut-outs, and what is learnt from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks.claims import backbone
from benchmarks.claims.backbone import SIDE, Classifier, cut_out, fit, prepare_backbone
from benchmarks.claims.presets import PRESETS, with_backbone
from detection.data import compose_digits, eval_transform, load_coco_folder
from detection.models.backbones import build_backbone
from detection.models.detector import Detector
from detection.recipes import recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    return compose_digits(folder, train_images=6, val_images=3, size=64)


def test_a_cut_out_is_the_square_around_its_object(root: Path) -> None:
    plain = eval_transform(recipe("deqdet_digits").augmentation)
    dataset, _ = load_coco_folder(root, plain, plain)
    crops, classes = cut_out(dataset, 0)
    image, target = dataset[0]
    assert torch.equal(classes[: len(target.labels)], target.labels)
    x1, y1, x2, y2 = target.boxes[0].tolist()
    side = backbone.AROUND * max(x2 - x1, y2 - y1)
    centre = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])
    # The same square by another function, where it lies within the image.
    height, width = image.shape[1:]
    ticks = (torch.arange(SIDE) + 0.5) / SIDE * side - side / 2
    rows, columns = torch.meshgrid(centre[1] + ticks, centre[0] + ticks, indexing="ij")
    grid = torch.stack([2 * columns / width - 1, 2 * rows / height - 1], dim=-1)
    wanted = F.grid_sample(image[None].float(), grid[None], align_corners=False)[0]
    inside = (grid.abs() < 1 - 4 / min(height, width)).all(dim=-1)
    assert inside.float().mean() > 0.2
    difference = (crops[0].float() - wanted).abs()[:, inside]
    assert difference.mean() < 6  # of 255: they sample at other points


def test_copies_are_cut_anew_and_the_same_each_time(root: Path) -> None:
    plain = eval_transform(recipe("deqdet_digits").augmentation)
    dataset, _ = load_coco_folder(root, plain, plain)
    (crops, classes), (again, _) = cut_out(dataset, 2), cut_out(dataset, 2)
    one, _ = cut_out(dataset, 0)
    assert len(crops) == len(classes) == 2 * len(one)
    assert torch.equal(crops, again)


def test_classes_are_learnt() -> None:
    """Cut-outs that are all red, green or blue."""
    torch.manual_seed(0)
    classes = torch.arange(192) % 3
    crops = torch.zeros(192, 3, SIDE, SIDE, dtype=torch.uint8)
    crops[torch.arange(192), classes] = 200
    network = Classifier(build_backbone("small"), 3)
    assert backbone.accuracy(network, crops, classes) < 0.9
    fit(network, crops, classes, epochs=5)
    assert backbone.accuracy(network, crops, classes) == 1


def test_every_arm_begins_from_the_weights_that_are_found(root: Path, tmp_path: Path) -> None:
    path, console = tmp_path / "backbone.safetensors", Console(quiet=True)
    made = PRESETS["smoke"].recipes()
    for _ in range(2):  # the second time they are there
        prepare_backbone(root, made["deqdet"], 1, path, torch.device("cpu"), console)
        written = path.stat().st_mtime_ns
    models = [Detector(with_backbone(made[arm], str(path)).model) for arm in ("deqdet", "adamixer")]
    states = [model.backbone.state_dict() for model in models]
    fresh = Detector(made["deqdet"].model).backbone.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, fresh[name]) for name, value in states[0].items())
    assert path.stat().st_mtime_ns == written


def test_teaching_is_part_of_what_a_run_is() -> None:
    from dataclasses import replace

    preset = PRESETS["smoke"]
    untaught = replace(preset, teaching=0)
    assert not set(preset.runs()) & set(untaught.runs())
