"""How large a comparison is: recipes, data, arms, seeds, and how many runs at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from benchmarks.claims.arms import Arm
from benchmarks.claims.data import Data
from benchmarks.claims.grid import arms
from detection.configuration import from_json, to_json
from detection.models.config import EquilibriumConfig, StackedConfig
from detection.recipes import recipe
from detection.training.recipe import Recipe


@dataclass(frozen=True)
class Preset:
    """A size of the comparison.

    Args:
        name: on the command line.
        about: in words.
        bases: names of the recipes that arms begin from.
        data: what they are trained on.
        arms: by name.
        seeds: of every arm; all arms get their first seed first.
        epochs: of every run.
        evaluate_every: epochs between two evaluations.
        jobs: runs at once.
        device: where they run.
        sample: validation images on which fixed points are looked at closely.
        teaching: epochs of `benchmarks.claims.backbone`, where there are no ImageNet weights; 0
            for none.
        changes: further fields that all recipes have otherwise than their bases, the same for all.
    """

    name: str
    about: str
    bases: tuple[tuple[str, str], ...]
    data: Data
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    evaluate_every: int
    jobs: int
    device: Literal["cpu", "cuda"]
    sample: int
    teaching: int = 0
    changes: Callable[[Recipe], Recipe] = field(default=lambda made: made)

    def base(self, name: str) -> Recipe:
        """The recipe that arms of a kind begin from, as long as the preset says."""
        made = recipe(dict(self.bases)[name])
        decoder = made.model.decoder
        if isinstance(decoder, EquilibriumConfig) and decoder.steps == "auto":
            decoder = replace(decoder, steps=decoder.most_steps)  # as the paper reads it
        return self.changes(
            replace(
                made,
                model=replace(made.model, decoder=decoder),
                optimization=replace(made.optimization, epochs=self.epochs),
                evaluate_every=self.evaluate_every,
                save_minutes=2.0,
            )
        )

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every arm of the grid at this size, by name; all of seed 0."""
        bases = {name: self.base(name) for name, _ in self.bases}
        return {name: arm.recipe(bases) for name, arm in arms().items()}

    def runs(self) -> dict[str, tuple[str, ...]]:
        """What is to be run: identity, and the names of all arms that it is."""
        identities = {name: self.identity(made) for name, made in self.recipes().items()}
        wanted = dict.fromkeys(identities[arm] for arm in self.arms)
        return {
            run: tuple(name for name, found in identities.items() if found == run) for run in wanted
        }

    def identity(self, made: Recipe) -> str:
        """What tells runs apart, but for the seed: all that decides what comes out."""
        # These decide nothing, and a name is not the thing.
        plain = replace(made, name="", seed=0, workers=0, save_minutes=0.0)
        told: Mapping[str, Any] = {
            "recipe": to_json(from_json(Recipe, to_json(plain))),  # as it reads when it was stored
            "data": asdict(self.data),
            "teaching": self.teaching,
        }
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_DECIDING = ("deqdet", "rnndet-6", "adamixer", "quiet-jfb", "quiet")


def _bases(of: str) -> tuple[tuple[str, str], ...]:
    return tuple((base, f"{base}_{of}") for base in ("deqdet", "rnndet", "adamixer"))


def _toy(made: Recipe) -> Recipe:
    """As small as it goes."""
    layer = replace(
        made.model.layer, content_dim=32, feature_channels=32, heads=2, groups=2, points=4,
        out_points=8, ffn_channels=32,
    )  # fmt: skip
    decoder = made.model.decoder
    if not isinstance(decoder, StackedConfig):
        decoder = replace(decoder, initial_points=8)
    if isinstance(decoder, EquilibriumConfig):
        decoder = replace(decoder, perturbation=replace(decoder.perturbation, position=2.0))
    return replace(
        made,
        model=replace(made.model, layer=layer, decoder=decoder, num_queries=5),
        augmentation=replace(made.augmentation, short_sides=(64,), max_size=64),
        optimization=replace(made.optimization, batch_size=8, warmup_steps=2),
        workers=0,
        save_minutes=0.0,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            about="two minutes on two cores: shows that all of it runs, and decides nothing",
            bases=_bases("digits"),
            data=Data("digits", train_images=32, val_images=8, size=64),
            arms=_DECIDING,
            seeds=(0, 1),
            epochs=2,
            evaluate_every=1,
            jobs=2,
            device="cpu",
            sample=2,
            teaching=1,
            changes=_toy,
        ),
        Preset(
            name="cpu",
            about="about three hours on two cores: the arms that decide the expected orders",
            bases=_bases("scenes"),
            data=Data("scenes", train_images=2000, val_images=600, size=256),
            arms=_DECIDING,
            seeds=(0, 1, 2),
            epochs=10,
            evaluate_every=2,
            jobs=2,
            device="cpu",
            sample=16,
            teaching=6,
        ),
        Preset(
            name="gpu",
            about="the whole grid on one card",
            bases=_bases("scenes"),
            data=Data("scenes", train_images=2000, val_images=600, size=256),
            arms=tuple(arms()),
            seeds=(0, 1, 2),
            epochs=6,
            evaluate_every=1,
            jobs=14,
            device="cuda",
            sample=16,
            teaching=6,
        ),
        Preset(
            name="coco",
            about="the paper's own size: ResNet-50, 12 epochs of COCO; needs --data",
            bases=(
                ("deqdet", "deqdet_init64_r50_1x"),
                ("rnndet", "rnndet_r50_1x"),
                ("adamixer", "adamixer_r50_1x"),
            ),
            data=Data("folder"),
            arms=tuple(arms()),
            seeds=(0, 1, 2),
            epochs=12,
            evaluate_every=1,
            jobs=1,
            device="cuda",
            sample=32,
        ),
    )
}


def nearest(kind: str, name: str, known: list[str]) -> str:
    """The sentence that refuses an unknown name."""
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} {name!r}.{hint} Known: {', '.join(known)}."


def preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        SystemExit: with the nearest name, if there is none.
    """
    if name not in PRESETS:
        raise SystemExit(nearest("preset", name, list(PRESETS)))
    return PRESETS[name]


def with_backbone(made: Recipe, weights: str) -> Recipe:
    """The recipe, beginning from other weights of the backbone."""
    backbone = replace(made.model.backbone, weights=weights)
    return replace(made, model=replace(made.model, backbone=backbone))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen(preset: Preset, names: tuple[str, ...], known: Mapping[str, tuple[Arm, ...]]) -> Preset:
    """The preset with the arms of some claims or comparisons alone.

    Raises:
        SystemExit: for a name that is neither, or if the preset has none of their arms.
    """
    if not names:
        return preset
    wanted: set[str] = set()
    for name in names:
        if name not in known:
            raise SystemExit(nearest("claim", name, list(known)))
        wanted |= {arm.name for arm in known[name]}
    mine = [same for same in preset.runs().values() if wanted & set(same)]
    if not mine:
        raise SystemExit(
            f"The preset {preset.name!r} has none of the arms of {', '.join(names)}: "
            f"{', '.join(sorted(wanted))}. Choose a larger preset."
        )
    return replace(preset, arms=tuple(same[0] for same in mine))
