"""The grid: every row of the paper is there, and every arm is one change."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import implicit
from benchmarks.claims.arms import DEQDET, Arm
from benchmarks.claims.grid import COMPARISONS, arms
from benchmarks.claims.presets import PRESETS, chosen, preset
from benchmarks.claims.statements import CLAIMS
from benchmarks.claims.statistics import LEAST_SEEDS
from detection.models.config import EquilibriumConfig, PerturbationConfig, RecurrentConfig
from detection.models.detector import Detector
from detection.recipes import recipe
from detection.training.recipe import Recipe

PAPER = {
    "2": (42.7, 42.7, 43.4, 44.2, 44.2, 43.8, 43.7, 44.3, 44.9, 45.2, 45.3, 45.7, 46.0),
    "4a": (45.2, 45.3, 45.5),
    "4b": (44.7, 45.1, 45.5),
    "4c": (41.9, 45.5, 45.5, 45.7, None, None, None, None, None, 44.3),
    "4d": (45.5, 45.4, 45.1, 45.2),
    "4e": (44.3, 44.9, 45.1, 45.5),
    "4f": (44.3, 45.4, 45.5, 45.0, 45.2),
    "4g": (45.5, 45.5, 45.2, 45.2),
    "4h": (45.1, 45.5, 45.3),
}
"""AP as the paper prints it, row by row."""
COCO = PRESETS["coco"].recipes()


def test_every_row_of_the_paper_is_there() -> None:
    found = {c.name: tuple(row.paper for row in c.rows) for c in COMPARISONS}
    assert found == PAPER
    for comparison in COMPARISONS:
        labels = [row.label for row in comparison.rows]
        assert len(set(labels)) == len(labels)


def changed(a: Any, b: Any) -> set[str]:
    return {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}


@pytest.mark.parametrize("name", arms())
@pytest.mark.parametrize("size", ["coco", "cpu"])
def test_an_arm_is_one_change_of_its_base(name: str, size: str) -> None:
    made, arm = PRESETS[size].recipes()[name], arms()[name]
    before = arm.of.recipe(bases(size)) if arm.of else bases(size)[arm.base]
    assert changed(before, made) <= {"model"}
    model = changed(before.model, made.model)
    assert len(model) <= 1 and model <= {"decoder", "layer"}
    if "layer" in model:
        assert changed(before.model.layer, made.model.layer) == {"points"}
    if "decoder" in model:
        told = changed(before.model.decoder, made.model.decoder)
        groups = ({"initial", "initial_points"}, {"multiples", "spacing"})
        assert len(told) == 1 or any(told <= group for group in groups)


def bases(size: str) -> dict[str, Recipe]:
    return {name: PRESETS[size].base(name) for name, _ in PRESETS[size].bases}


def test_names_are_told_apart() -> None:
    assert len({arm.label for arm in arms().values()}) == len(arms())
    names = [row.arm.name for comparison in COMPARISONS for row in comparison.rows]
    assert {name: arms()[name].name for name in names} == {name: name for name in names}


def test_at_the_papers_size_an_arm_is_as_the_paper_says() -> None:
    decoder = COCO["noise-0.2-50"].model.decoder
    assert isinstance(decoder, EquilibriumConfig)
    assert decoder.perturbation == PerturbationConfig(content=0.2, position=50.0)
    assert COCO["init-32"].model.decoder.initial_points == 32  # type: ignore[union-attr]
    assert COCO["deqdet-64"].model.layer == recipe("deqdet_p64_r50_1x").model.layer
    steps = {n: COCO[f"rnndet-{n}"].model.decoder for n in (6, 8, 12, 16, 20)}
    assert steps == {n: RecurrentConfig(steps=n) for n in steps}
    assert COCO["rag-4"].model.decoder.gradient == implicit.RAG(4)  # type: ignore[union-attr]
    for made in COCO.values():
        assert made.optimization == recipe("deqdet_r50_1x").optimization


def test_pixels_and_points_are_brought_to_the_size_of_the_images() -> None:
    """256 px of 800, and 8 points of 32."""
    made = PRESETS["cpu"].recipes()
    noise = made["noise-0-50"].model.decoder
    assert noise.perturbation == PerturbationConfig(content=0, position=16.0)  # type: ignore[union-attr]
    assert made["init-64"] == made["deqdet"] != made["init-32"]
    assert made["deqdet-64"].model.layer.points == 16  # type: ignore[union-attr]


def test_an_arm_that_is_another_is_run_once() -> None:
    runs = PRESETS["cpu"].runs()
    assert len(runs) == 5
    (full,) = (names for names in runs.values() if "deqdet" in names)
    assert {"rag-2", "init-64", "extra-2", "multi-step", "train-20", "omega-4-3"} <= set(full)
    assert len(PRESETS["gpu"].runs()) == len(PRESETS["coco"].runs()) == 36


def test_an_identity_is_of_all_that_decides_and_of_nothing_else() -> None:
    size = PRESETS["cpu"]
    made = size.recipes()["deqdet"]
    same = replace(made, name="other", seed=3, workers=7, save_minutes=9.0)
    assert size.identity(made) == size.identity(same)
    assert size.identity(made) != size.identity(replace(made, average=0.9))
    assert size.identity(made) != replace(size, data=PRESETS["smoke"].data).identity(made)


@pytest.mark.parametrize("name", arms())
def test_every_arm_can_be_built(name: str) -> None:
    model = PRESETS["cpu"].recipes()[name].model
    with torch.device("meta"):
        count = sum(p.numel() for p in Detector(model).parameters())
    assert 1_000_000 < count < 6_000_000
    if arms()[name].base == "deqdet" and name not in ("init-none", "init-32", "deqdet-64"):
        with torch.device("meta"):
            full = sum(p.numel() for p in Detector(PRESETS["cpu"].recipes()["deqdet"].model).parameters())  # fmt: skip  # noqa: E501
        assert count == full


def test_budgets_are_equal() -> None:
    """The arms differ in the decoder, or the points of its layer, alone."""
    for size in PRESETS.values():
        first = size.recipes()["deqdet"]
        for made in size.recipes().values():
            plain = replace(made, name=first.name, model=first.model)
            assert plain == first
            layer = replace(made.model.layer, points=first.model.layer.points)  # type: ignore[call-arg, union-attr]
            assert replace(made.model, decoder=first.model.decoder, layer=layer) == first.model


def test_claims_have_the_papers_differences() -> None:
    assert {claim.name: claim.paper for claim in CLAIMS} == {
        "rag": 3.6, "rag-quiet": None, "rap": 1.2, "deqdet-rnndet": 1.9,
        "deqdet-rnndet-6": 0.9, "rnndet-adamixer": 0.7,
        "deqdet-adamixer-6": 1.6, "more-refinements": 1.0, "rnndet-depth": 0.5, "init": 0.3,
        "extra": 0.8, "omega": 0.4, "rap-zero": 0.6, "rap-multi": 0.4, "noise-position": 1.1,
        "noise-content": 0.7, "noise-much": 0.3, "train-steps": 0.4, "neumann": None, "bptt": None,
    }  # fmt: skip


def test_what_the_paper_prints_agrees_with_itself() -> None:
    """What is trained once has the same costs, and what is read once the same figures."""
    size = PRESETS["coco"]
    costs: dict[str, Any] = {}
    figures: dict[tuple[str, int], Any] = {}
    for row in (row for comparison in COMPARISONS for row in comparison.rows if row.printed):
        made = COCO[row.arm.name]
        run, printed = size.identity(made), row.printed
        assert printed is not None
        if printed.costs is not None:
            assert costs.setdefault(run, printed.costs) == replace(
                printed.costs, rate=costs[run].rate
            )
        read = run, row.refinements or getattr(made.model.decoder, "steps", 6)
        common = figures.setdefault(read, printed.figures)
        assert common[:3] == printed.figures[:3]
        small, medium, large = printed.figures[3:] or (0, 1, 2)
        assert small < medium < large and printed.figures[2] < printed.figures[1]
    assert len(costs) == 9 and figures[size.identity(COCO["deqdet"]), 25][:3] == (45.5, 64.4, 49.1)
    assert figures[size.identity(COCO["init-32"]), 25][:3] == (45.3, 64.0, 48.9)


def test_a_figure_of_another_table_says_so() -> None:
    quiet = {
        row.label: row.printed for c in COMPARISONS for row in c.rows if row.arm.name == "quiet"
    }
    assert {label: said.table for label, said in quiet.items() if said} == {
        "RAG(2), no perturbation": "4e", "/": "4e", "0 / 0": "4f",
    }  # fmt: skip


def test_what_decides_nothing_has_too_few_seeds_for_a_verdict() -> None:
    enough = {name for name, size in PRESETS.items() if len(size.seeds) >= LEAST_SEEDS}
    assert enough == {"cpu", "gpu", "coco"}


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(SystemExit, match="no preset 'smokes'. Did you mean 'smoke'"):
        preset("smokes")
    known: dict[str, tuple[Arm, ...]] = {"rag": (DEQDET,)}
    with pytest.raises(SystemExit, match="no claim 'rga'. Did you mean 'rag'"):
        chosen(PRESETS["cpu"], ("rga",), known)


def test_a_claim_alone_needs_its_arms_alone() -> None:
    known = {claim.name: (claim.better.arm, claim.worse.arm) for claim in CLAIMS}
    assert len(chosen(PRESETS["cpu"], ("rap",), known).runs()) == 2
    assert chosen(PRESETS["cpu"], (), known) == PRESETS["cpu"]
    with pytest.raises(SystemExit, match="has none of the arms of train-steps"):
        chosen(replace(PRESETS["cpu"], arms=("adamixer",)), ("train-steps",), known)


def test_coco_asks_for_its_folder() -> None:
    with pytest.raises(SystemExit, match="give its folder, --data PATH"):
        PRESETS["coco"].data.prepare(None)
