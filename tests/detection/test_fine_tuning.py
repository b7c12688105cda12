"""Training that begins from other weights: what is taken over, and what is refused."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import small_recipe
from published_models import MODELS, published, saved
from rich.console import Console

from detection.checkpoints import CheckpointError, load_weights, save_checkpoint
from detection.configuration import to_json
from detection.data import compose_digits, load_coco_folder
from detection.data.transforms import eval_transform, train_transform
from detection.data.types import Categories
from detection.models.config import RecurrentConfig, StackedConfig
from detection.models.detector import Detector
from detection.pretrained import convert_published
from detection.training.fine_tuning import begin_from
from detection.training.loop import train
from detection.training.recipe import Recipe

ANIMALS = Categories(("Emu", "yak", "CAT", "dog"), (1, 2, 3, 9))
"""Cat and emu are in the checkpoint, in another order and in other letters; yak and dog are not."""


def checkpoint(path: Path, recipe: Recipe, names: tuple[str, ...] = ("cat", "ox", "emu")) -> Path:
    torch.manual_seed(1)
    recipe = recipe.for_classes(len(names))
    model = Detector(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save_checkpoint(
        path,
        weights=model.state_dict(),
        metadata={
            "config": to_json(recipe),
            "class_names": list(names),
            "category_ids": list(range(len(names))),
            "step": 7,
            "metrics": {},
        },
    )


def new(recipe: Recipe, classes: int = 4) -> Detector:
    torch.manual_seed(2)
    return Detector(recipe.for_classes(classes).model)


def with_decoder(decoder: Any) -> Recipe:
    return replace(small_recipe(), model=replace(small_recipe().model, decoder=decoder))


@pytest.mark.parametrize(
    "recipe",
    [small_recipe(), with_decoder(StackedConfig(layers=2)), with_decoder(RecurrentConfig(steps=2))],
    ids=["equilibrium", "stacked", "recurrent"],
)
def test_rows_are_reused_by_class_name_in_every_layer(tmp_path: Path, recipe: Recipe) -> None:
    """The others begin as in a new model, everything else is that of the checkpoint."""
    path = checkpoint(tmp_path / "a.safetensors", recipe)
    theirs, model = load_weights(path)[0], new(recipe)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = begin_from(model, ANIMALS, path)
    assert "2 of 4 classes had a row in its head by their name (Emu, CAT)" in told
    heads = 0
    for name, tensor in model.state_dict().items():
        if ".class_head.3." in name:
            heads += 1
            assert torch.equal(tensor[0], theirs[name][2])
            assert torch.equal(tensor[2], theirs[name][0])
            assert torch.equal(tensor[[1, 3]], fresh[name][[1, 3]])
            if name.endswith("bias"):
                assert tensor[[1, 3]].tolist() == pytest.approx([-math.log(99)] * 2)
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert heads == 4


def test_no_class_in_common_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", small_recipe())
    told = begin_from(new(small_recipe(), 1), Categories(("gnu",), (1,)), path)
    assert "0 of 1 classes had a row in its head by their name." in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: replace(model, num_queries=9), r"other shape: queries\.content \(6, 32\)"),
        (
            lambda model: replace(model, layer=replace(model.layer, ffn_channels=32)),
            r"decoder\.initial\.ffn\.0\.weight",
        ),
        (lambda model: replace(model, decoder=StackedConfig(2)), r"missing: decoder\.layers\.0"),
    ],
)
def test_other_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = checkpoint(tmp_path / "a.safetensors", small_recipe())
    model = new(replace(small_recipe(), model=change(small_recipe().model)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        begin_from(model, ANIMALS, path)
    assert "use its recipe (deqdet_digits)" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_converted_published_checkpoint_is_begun_from(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", published("DEQDet"))
    path = convert_published(source, tmp_path / "b.safetensors", ["cat", "ox", "emu"])
    model = new(Recipe("published", model=MODELS["DEQDet"]))
    assert "2 of 4 classes" in begin_from(model, ANIMALS, path)


def test_a_run_begins_from_another_and_its_average_too(tmp_path: Path) -> None:
    """At a rate of next to nothing it ends where the other ended; resuming needs no file."""
    recipe = small_recipe(1)
    recipe = replace(recipe, optimization=replace(recipe.optimization, lr=1e-12))
    root = compose_digits(tmp_path / "digits", train_images=8, val_images=2, size=64)
    path = checkpoint(tmp_path / "a.safetensors", recipe, tuple("9876543210"))
    sets = load_coco_folder(
        root, train_transform(recipe.augmentation), eval_transform(recipe.augmentation)
    )
    said = io.StringIO()
    console = Console(file=said, width=1000)
    trained = train(recipe, *sets, tmp_path / "run", begin_from=path, console=console)
    assert "10 of 10 classes" in said.getvalue()
    theirs = load_weights(path)[0]
    for name, tensor in trained.model.state_dict().items():
        wanted = theirs[name].flip(0) if ".class_head.3." in name else theirs[name]
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    path.unlink()
    train(recipe, *sets, tmp_path / "run", begin_from=path, resume=True, console=console)
