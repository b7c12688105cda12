"""Recipes: whole models of the published size, and every table row's settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import reference
import torch

import implicit
from detection.decoder.layer import LayerConfig
from detection.models.config import (
    EquilibriumConfig,
    ModelConfig,
    NeckConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.models.detector import Detector
from detection.recipes import entries, recipe, recipe_names
from detection.training.recipe import Recipe

PUBLISHED: dict[str, Any] = json.loads((reference.FIXTURES / "param_counts.json").read_text())

SIZES = {
    "adamixer_r50_1x": "adamixer_derived_r50_100q_6x32_neck1x1",
    "adamixer_p64_r50_1x": "adamixer_derived_r50_100q_6x64_neck1x1",
    "rnndet_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "rnndet_t8_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "rnndet_t12_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "rnndet_t16_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "rnndet_t20_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "rnndet_r50_3x": "r50_300q_init64_refine32_neck1x1",
    "rnndet_p64_r50_3x": "r50_300q_init64_refine64_neck1x1",
    "deqdet_r50_1x": "r50_100q_init32_refine32_neck1x1",
    "deqdet_init64_r50_1x": "r50_100q_init64_refine32_neck1x1",
    "deqdet_p64_r50_1x": "r50_100q_init64_refine64_neck1x1",
    "deqdet_q300_r50_1x": "r50_300q_init64_refine32_neck1x1",
    "deqdet_r50_2x": "r50_300q_init64_refine32_neck1x1",
    "deqdet_p64_r50_2x": "r50_300q_init64_refine64_neck1x1",
    "deqdet_r101_2x": "r101_300q_init64_refine32_neck1x1",
    "deqdet_p64_r101_2x": "r101_300q_init64_refine64_neck1x1",
    "deqdet_swins_2x": "swins_300q_init64_refine32_neck1x1",
    "published_r50_1x": "r50_1x_official",
    "published_r50_2x": "r50_2x_official",
    "published_r101_2x": "r101_2x_official",
    "published_swins_2x": "swins_2x_official",
    "published_adamixer_r50_1x": "ffndet_r50_100q_6x64",
}
"""The name of each recipe's size among the published counts."""

PRINTED = {
    # Table 2 (and 1): millions of parameters, AP.
    "adamixer_r50_1x": (134, 42.7),
    "adamixer_p64_r50_1x": (160, 42.7),
    "rnndet_r50_1x": (61, 43.4),
    "rnndet_t8_r50_1x": (61, 44.2),
    "rnndet_t12_r50_1x": (61, 44.2),
    "rnndet_t16_r50_1x": (61, 43.8),
    "rnndet_t20_r50_1x": (61, 43.7),
    "deqdet_r50_1x": (61, 45.3),
    "deqdet_p64_r50_1x": (69, 46.0),
    # Table 3.
    "rnndet_r50_3x": (65, 48.1),
    "rnndet_p64_r50_3x": (69, 48.4),
    "deqdet_q300_r50_1x": (65, 46.6),
    "deqdet_r50_2x": (65, 48.6),
    "deqdet_p64_r50_2x": (69, 49.5),
    "deqdet_r101_2x": (84, 49.5),
    "deqdet_p64_r101_2x": (88, 50.1),
    "deqdet_swins_2x": (90, 52.7),
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
    published = PUBLISHED[SIZES[name]]
    count = parameters(recipe(name).model)
    # Start boxes and a dynamic convolution that nothing calls are parameters there alone.
    start = published["init_proposal_bboxes"]
    assert sum(count.values()) == published["total_without_unused"] - start
    assert count[False] == published["frozen"] - start


@pytest.mark.parametrize("name", PRINTED)
def test_figures_are_those_that_the_paper_prints(name: str) -> None:
    millions, ap = PRINTED[name]
    (entry,) = (entry for entry in entries() if entry.recipe.name == name)
    assert sum(parameters(entry.recipe.model).values()) // 1_000_000 == millions
    assert entry.ap == ap
    assert entry.source in ("Table 1", "Table 2", "Table 3")


def test_no_figure_is_without_a_source() -> None:
    for entry in entries():
        assert (entry.ap is None) == (not entry.source)


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
        epochs = {"1x": 12, "2x": 24, "3x": 36}[made.name[-2:]]
        optimization, augmentation = made.optimization, made.augmentation
        assert optimization.epochs == epochs
        drops = [milestone * epochs for milestone in optimization.milestones]
        assert drops == pytest.approx({12: [8, 11], 24: [16, 22], 36: [24, 33]}[epochs])
        assert optimization.batch_size == 16 and optimization.warmup_steps == 500
        assert augmentation.crop == (epochs > 12) and augmentation.horizontal_flip == 0.5
        scales = tuple(range(480, 801, 32)) if epochs > 12 else (800,)
        assert augmentation.short_sides == scales
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
        model, published = made.model, made.name.startswith("published")
        assert isinstance(model.layer, LayerConfig)
        assert model.layer.points == (64 if published or "p64" in made.name else 32)
        many = "q300" in made.name or made.name.endswith(("2x", "3x"))
        assert model.num_queries == (300 if many else 100)
        assert model.layer.num_classes == 80
        assert model.neck == (NeckConfig(3, activation=True) if published else NeckConfig())


def test_decoders() -> None:
    for made in coco():
        decoder = made.model.decoder
        if "adamixer" in made.name:
            assert decoder == StackedConfig(layers=6)
        elif made.name.startswith("rnndet"):
            steps = re.search(r"_t(\d+)_", made.name)
            default = 8 if made.name.endswith("3x") else 6  # as Table 3 says
            assert isinstance(decoder, RecurrentConfig)
            assert decoder.steps == (int(steps[1]) if steps else default)
        else:
            assert isinstance(decoder, EquilibriumConfig)
            assert decoder.positions == (1, 3, 6, 9, 12, 20)
            assert decoder.gradient == implicit.RAG(2)
            assert decoder.solver == implicit.Naive()
            published = made.name.startswith("published")
            assert (decoder.steps, decoder.extra_supervision) == (21 if published else 25, 2)
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


def test_the_small_recipes_build_without_downloads() -> None:
    for name in recipe_names():
        if name.endswith(("digits", "scenes")):
            assert sum(parameters(recipe(name).model).values()) < 4_000_000
            assert not recipe(name).model.backbone.pretrained
