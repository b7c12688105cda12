"""What is read from one path is what the detector says when it is asked anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import implicit
from benchmarks.claims import inference
from benchmarks.claims.fixed_points import FAR, LOOKS, closer
from benchmarks.claims.jobs import load
from benchmarks.claims.measuring import first_batches, memory
from benchmarks.claims.paths import ANDERSON, Path, distance
from benchmarks.claims.presets import PRESETS
from detection.data import compose_digits
from detection.data.coco import CocoDataset
from detection.data.loading import collate
from detection.data.types import Batch, Target
from detection.decoder.queries import Queries
from detection.distributed import Distributed
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.prediction import evaluate
from detection.training.recipe import Recipe

RECIPES = PRESETS["smoke"].recipes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, CocoDataset]:
    root = tmp_path_factory.mktemp("claims") / "digits"
    return load(compose_digits(root, train_images=8, val_images=3, size=64), RECIPES["deqdet"])


def detector(recipe: Recipe) -> Detector:
    """With boxes that move: those of a new detector do not."""
    torch.manual_seed(0)
    model = Detector(recipe.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def test_a_path_holds_every_way_to_end_it(data: tuple[CocoDataset, CocoDataset]) -> None:
    model = detector(RECIPES["deqdet"])
    decoder = model.decoder
    assert isinstance(decoder, EquilibriumDecoder)
    different = set()
    for batch in inference.batches(model, data[1]):
        with torch.no_grad():
            naive = Path(model, batch, implicit.Naive(), 25)
            anderson = Path(model, batch, ANDERSON, 25)
            encoded = model.encode(batch.images, batch.sizes)

            def same(path: Path, chosen: list[int], **how: object) -> None:
                output = decoder(*encoded, **how)  # noqa: B023
                (step,) = chosen
                assert torch.equal(output.boxes, path.states[step].boxes)
                assert torch.equal(output.logits, path.outputs()[step].logits)
                different.add(step)

            for steps in (1, 5, 25):
                same(naive, naive.fixed(steps), stop=implicit.Steps(steps))
            for steps in (4, 8, 25):
                how = {"stop": implicit.Steps(steps), "solver": ANDERSON}
                same(anderson, anderson.best(steps), **how)
            for rtol in (3e-1, 1e-1, 1e-2):
                stop = implicit.Tolerance(rtol=rtol, atol=0.0, max_steps=25)
                same(naive, naive.within(rtol), stop=stop)
                same(anderson, anderson.within_or_best(rtol), stop=stop, solver=ANDERSON)
            same(naive, naive.settled(), stop=decoder.until(decoder.config.settled, 25))
    assert len(different) > 5


@pytest.mark.parametrize("arm", ["deqdet", "rnndet-6", "adamixer"])
def test_a_study_ends_where_the_evaluation_does(
    data: tuple[CocoDataset, CocoDataset], arm: str
) -> None:
    model = detector(RECIPES[arm])
    found = inference.study(model, data[1], 100, 1)
    own = {"deqdet": ("naive", "25"), "rnndet-6": ("naive", "5"), "adamixer": ("layers", "6")}[arm]
    points = {(point["kind"], point["setting"]): point for point in found["curve"]}
    assert points[own]["AP"] == pytest.approx(evaluate(model, data[1]).AP, abs=1e-5)
    kinds = {kind for kind, _ in points}
    if arm == "deqdet":
        assert kinds == {"naive", "naive, tolerance", "auto", "Anderson", "Anderson, tolerance"}
        assert points["Anderson", "8"]["steps"] == 8
        assert points["naive, tolerance", "0.1"]["steps"] <= points["naive, tolerance", "0.01"]["steps"]  # fmt: skip  # noqa: E501
    if arm == "adamixer":
        assert set(found) == {"curve"} and len(points) == 6
    else:
        assert len(found["fixed_point"]) == 1
        assert [len(found["residuals"][name]) for name in ("state", "content", "boxes")] == [25] * 3


def test_a_distance_by_hand() -> None:
    def state(content: float, boxes: float) -> Queries:
        return Queries(torch.zeros(1, 2, 4), torch.full((1, 2, 3), content), torch.full((1, 2, 4), boxes))  # fmt: skip  # noqa: E501

    content, boxes = distance(state(1.5, 3.0), state(2.0, 5.0))
    assert (content.item(), boxes.item()) == pytest.approx((0.25, 2.0))


class Toward(torch.nn.Module):
    """Contents come nearer to 1, by factors of up to a half; boxes stay."""

    class_head = torch.nn.Sequential(torch.nn.Linear(3, 2))

    def forward(self, queries: Queries, features: object) -> Queries:
        factor = torch.linspace(0.01, 0.5, queries.content[0].numel()).view_as(queries.content)
        content = 1 + factor * (queries.content - 1)
        return Queries(queries.position.detach(), content, queries.boxes.detach())

    def classify(self, content: torch.Tensor) -> torch.Tensor:
        return content[..., :2]


def test_a_closer_look_at_a_known_layer(
    data: tuple[CocoDataset, CocoDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate and radius are 1/2, and every start leads to 1."""
    model = detector(RECIPES["deqdet"])
    layer = Toward()
    monkeypatch.setattr(
        "benchmarks.claims.fixed_points.layers", lambda model: (lambda queries, _: queries, layer)
    )
    found = closer(model, next(inference.batches(model, data[1])))
    assert found["radius"] == pytest.approx(0.5, abs=0.02)
    assert found["content"][-1] == 0 and found["boxes"] == [0.0] * len(LOOKS)
    assert found["anderson"] < 1e-5 and FAR == LOOKS[-1]
    for name, other in found["from"].items():
        assert other["content"] < 1e-6
        assert (other["boxes"] > 1) == (name == "boxes moved")
    assert found["from"]["contents drawn anew"]["agreeing"] == 1


def test_rates_are_told_by_refinements(data: tuple[CocoDataset, CocoDataset]) -> None:
    found = inference.rates(detector(RECIPES["deqdet"]), data[1], 2)
    assert list(found) == ["6", "8", "16", "25"]
    assert all(math.isfinite(rate) and rate > 0 for rate in found.values())
    assert list(inference.rates(detector(RECIPES["adamixer"]), data[1], 2)) == ["own"]


def test_rates_are_of_images_of_one_size() -> None:
    def image(width: int) -> Batch:
        target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, (64, width))
        return collate([(torch.zeros(3, 64, width, dtype=torch.uint8), target)])

    images = [image(width) for width in (90, 64, 96, 64, 64)]  # 90 and 96 are padded to one size
    chosen = inference.of_one_size(images)
    assert [batch.sizes.tolist() for batch in chosen] == [[[64, 64]]] * 5
    assert len({id(batch) for batch in chosen}) == 3


def test_memory_is_that_of_a_step_and_of_an_image(
    data: tuple[CocoDataset, CocoDataset],
) -> None:
    recipe = RECIPES["adamixer"]
    model = detector(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wide = replace(recipe, optimization=replace(recipe.optimization, batch_size=4))
    small, large = (memory(model, made, data[0], Distributed()) for made in (wide, recipe))
    weights = sum(value.nbytes for value in before.values())
    assert small["inference"] == large["inference"] > weights
    assert large["train"] >= small["train"] > 3 * weights  # with gradients and two moments
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # what was trained is left as it is


def test_first_batches_are_of_the_size_asked_for(data: tuple[CocoDataset, CocoDataset]) -> None:
    assert len(next(first_batches(data[0], RECIPES["deqdet"], 3))) == 3


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_reads_detectors_at_25_refinements(name: str) -> None:
    assert PRESETS[name].recipes()["deqdet"].model.decoder.steps == 25  # type: ignore[union-attr]
