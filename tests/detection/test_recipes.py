"""Recipes: whole models of the published size, and every table row's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import reference
import torch

import implicit
from detection.models.config import (
    EquilibriumConfig,
    ModelConfig,
    NeckConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.models.detector import Detector
from detection.recipes import recipe, recipe_names
from detection.training.recipe import Recipe

PUBLISHED: dict[str, Any] = json.loads((reference.FIXTURES / "param_counts.json").read_text())

SIZES = {
    "adamixer_r50_1x": (134_790_504, "adamixer_derived_r50_100q_6x32"),
    "adamixer_p64_r50_1x": (160_646_760, "adamixer_derived_r50_100q_6x64"),
    "rnndet_r50_1x": (61_275_640, "r50_100q_init32_refine32"),
    "deqdet_r50_1x": (61_275_640, "r50_100q_init32_refine32"),
    "deqdet_p64_r50_1x": (69_894_392, "r50_100q_init64_refine64"),
    "deqdet_r50_2x": (65_636_216, "r50_300q_init64_refine32"),
    "deqdet_p64_r50_2x": (69_945_592, "r50_300q_init64_refine64"),
    "deqdet_r101_2x": (84_628_344, "r101_300q_init64_refine32"),
    "deqdet_p64_r101_2x": (88_937_720, "r101_300q_init64_refine64"),
    "deqdet_swins_2x": (90_352_386, "swins_300q_init64_refine32"),
}
"""Parameters with a 1×1 neck, and the name of the published variant."""

MILLIONS = {
    "adamixer_r50_1x": 134,
    "adamixer_p64_r50_1x": 160,
    "rnndet_r50_1x": 61,
    "deqdet_r50_1x": 61,
    "deqdet_p64_r50_1x": 69,
    "deqdet_r50_2x": 65,
    "deqdet_p64_r50_2x": 69,
    "deqdet_r101_2x": 84,
    "deqdet_p64_r101_2x": 88,
    "deqdet_swins_2x": 90,
}
"""As the paper prints them."""


def parameters(model: ModelConfig) -> dict[bool, int]:
    """Numbers of frozen and of trainable parameters; no memory is taken."""
    with torch.device("meta"):
        detector = Detector(replace(model, backbone=replace(model.backbone, pretrained=False)))
    counts = {False: 0, True: 0}
    for parameter in detector.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name: str) -> None:
    wanted, variant = SIZES[name]
    published = PUBLISHED[f"{variant}_neck1x1"]
    count = parameters(recipe(name).model)
    assert sum(count.values()) == wanted
    # Start boxes and a dynamic convolution that nothing calls are parameters there alone.
    assert wanted == published["total_without_unused"] - published["init_proposal_bboxes"]
    assert count[False] == published["frozen"] - published["init_proposal_bboxes"]
    assert wanted // 1_000_000 == MILLIONS[name]


@pytest.mark.parametrize("name", ["deqdet_p64_r50_1x", "deqdet_p64_r50_2x", "deqdet_p64_r101_2x"])
def test_sizes_with_the_neck_of_the_published_code(name: str) -> None:
    official = {
        "deqdet_p64_r50_1x": "r50_1x_official",
        "deqdet_p64_r50_2x": "r50_2x_official",
        "deqdet_p64_r101_2x": "r101_2x_official",
    }
    published = PUBLISHED[official[name]]
    model = replace(recipe(name).model, neck=NeckConfig(kernel_size=3, activation=True))
    wanted = published["total_without_unused"] - published["init_proposal_bboxes"]
    assert sum(parameters(model).values()) == wanted


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_knows_its_name_and_never_changes(name: str) -> None:
    made = recipe(name)
    assert made.name == name and made == recipe(name)
    with pytest.raises(FrozenInstanceError):
        made.seed = 1  # type: ignore[misc]


def coco() -> Iterator[Recipe]:
    return (recipe(name) for name in SIZES)


def test_schedules_are_those_of_the_names() -> None:
    for made in coco():
        long = made.name.endswith("2x")
        optimization, augmentation = made.optimization, made.augmentation
        assert optimization.epochs == (24 if long else 12)
        drops = [milestone * optimization.epochs for milestone in optimization.milestones]
        assert drops == pytest.approx([16, 22] if long else [8, 11])
        assert optimization.batch_size == 16 and optimization.warmup_steps == 500
        assert augmentation.crop == long and augmentation.horizontal_flip == 0.5
        assert augmentation.short_sides == (tuple(range(480, 801, 32)) if long else (800,))
        assert augmentation.max_size == 1333


def test_rates_are_the_published_ones() -> None:
    for made in coco():
        rates = made.optimization
        assert (rates.lr, rates.lr * rates.decoder_lr_multiplier) == pytest.approx((2.5e-5, 1e-4))
        assert (rates.weight_decay, rates.decoder_weight_decay) == (0.01, 0.1)
        assert rates.clip_norm == 1 and rates.schedule == "step"
        assert rates.spare_norms == ("swins" in made.name)
        assert made.model.backbone.pretrained
        assert (made.loss.classification, made.loss.l1, made.loss.giou) == (2, 5, 2)
        assert (made.cost.classification, made.cost.l1, made.cost.giou) == (2, 5, 2)


def test_points_and_queries() -> None:
    for made in coco():
        model = made.model
        assert model.layer.points == (64 if "p64" in made.name else 32)
        assert model.num_queries == (300 if made.name.endswith("2x") else 100)
        assert model.layer.num_classes == 80


def test_decoders() -> None:
    for made in coco():
        decoder = made.model.decoder
        if made.name.startswith("adamixer"):
            assert decoder == StackedConfig(layers=6)
        elif made.name.startswith("rnndet"):
            assert decoder == RecurrentConfig(steps=6, initial_points=32)
        else:
            assert isinstance(decoder, EquilibriumConfig)
            assert decoder.positions == (1, 3, 6, 9, 12, 20)
            assert decoder.gradient == implicit.RAG(2)
            assert decoder.solver == implicit.Naive()
            assert (decoder.steps, decoder.extra_supervision) == (25, 2)
            noise = decoder.perturbation
            assert (noise.content, noise.position, noise.probability) == (0.1, 25, 0.2)
            assert noise.entry == "multi-step"


def test_changing_the_classes_changes_nothing_else() -> None:
    made = recipe("deqdet_r50_1x")
    changed = made.for_classes(7)
    assert changed.model.layer.num_classes == 7
    assert changed.for_classes(80) == made


def test_without_pretraining_changes_nothing_else() -> None:
    made = recipe("deqdet_r50_1x")
    changed = made.without_pretraining()
    assert not changed.model.backbone.pretrained
    backbone = replace(changed.model.backbone, pretrained=True)
    assert replace(changed, model=replace(changed.model, backbone=backbone)) == made


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deqdet_r50_1", "deqdet_r50_1x"),
        ("adamixer_r50_2x", "adamixer_r50_1x"),
        ("deqdet-digits", "deqdet_digits"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no recipe '{name}'. Did you mean '{near}'") as caught:
        recipe(name)
    assert all(known in str(caught.value) for known in recipe_names())


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(ValueError, match="no recipe 'zzz'. Known: deqdet_digits, "):
        recipe("zzz")


def test_the_small_recipe_builds_without_downloads() -> None:
    assert sum(parameters(recipe("deqdet_digits").model).values()) < 2_000_000
    assert not recipe("deqdet_digits").model.backbone.pretrained
