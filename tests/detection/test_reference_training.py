"""Training losses and their gradients against those of the published implementation.

Six refinements, supervised at 1, 3 and 6, two more on top of the initialisation layer, no
perturbation.  The published code divides by the number of matched queries plus float32's epsilon;
here that number is never taken below 1.  The two differ for batches without objects alone, but
for the epsilon; where it matters, it is given to our criterion as its normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

import implicit
from detection.data.types import Target
from detection.models.config import EquilibriumConfig, PerturbationConfig
from detection.models.decoders import EquilibriumDecoder, Supervised
from detection.models.queries import LearnedQueries
from detection.training.losses import Criterion, matched_queries
from detection.training.matching import Matches

TOLERANCE = 1e-9
EPSILON = float(np.finfo(np.float32).eps)
OUTPUTS = {
    "init": "init_",
    "init+1": "init^1_",
    "init+2": "init^2_",
    "iter1": "iter1_",
    "iter3": "iter3_",
    "iter6": "iter6_",
}
"""Our names of the supervised outputs, to the published ones."""
PARTS = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}
ROUNDING = "roi_head.bbox_head.0.iof_tau"
"""Has no gradient but for rounding: at the start all boxes are the same."""

numbers = cache(reference.numbers)


class RecordingCriterion(Criterion):
    """Keeps what each output gave, in the order of the outputs."""

    def __call__(
        self, logits: Tensor, boxes: Tensor, matches: Matches | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[dict[str, Tensor], Matches]] = []
        loss, parts = super().__call__(logits, boxes, matches)
        self.seen.append((parts, matches or self.match(logits, boxes)))
        return loss, parts


@dataclass
class Run:
    """One training step."""

    losses: Supervised
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    matches: dict[str, Matches] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)


def targets(objects: int) -> list[Target]:
    """The first ``objects`` of the first image; the second image has none."""
    stored, found = numbers("training"), []
    for image, (height, width) in enumerate(numbers("forward")["sizes_hw"].tolist()):
        boxes, labels = stored[f"gt{image}_boxes"], stored[f"gt{image}_labels"]
        found.append(Target(boxes[:objects], labels[:objects], image, (height, width)))
    return found


@cache
def run(
    k: int = 2,
    *,
    objects: int = 3,
    extra: int = 2,
    steps: int = 6,
    normaliser: float | None = None,
) -> Run:
    """Losses and gradients; ``normaliser`` in place of ours."""
    config = EquilibriumConfig(
        train_steps=steps,
        multiples=2 if steps == 6 else 0,
        spacing=3,
        initial_points=reference.CONFIG.points,
        extra_supervision=extra,
        gradient=implicit.RAG(k),
        perturbation=PerturbationConfig(content=0, position=0),
    )
    decoder = EquilibriumDecoder(reference.CONFIG, config).double()
    decoder.initial.load_state_dict(reference.layer(0).state_dict())
    decoder.refinement.load_state_dict(reference.layer(1).state_dict())
    learned = LearnedQueries(12, 64).double()
    with torch.no_grad():
        content = reference.published_weights()["rpn_head.init_proposal_features.weight"]
        learned.content.copy_(content)
    features = [feature.requires_grad_() for feature in reference.feature_maps()]
    sizes, truth = numbers("forward")["sizes_hw"], targets(objects)
    criterion = RecordingCriterion(
        truth,
        sizes,
        normaliser=matched_queries(truth, 12) if normaliser is None else normaliser,
    )
    result = Run(decoder.losses(features, learned(sizes), criterion))
    result.losses.total.backward()
    for name, (parts, matches) in zip(result.losses.losses, criterion.seen, strict=True):
        result.parts[name] = {part: float(value) for part, value in parts.items()}
        result.matches[name] = matches
    for index, module in enumerate((decoder.initial, decoder.refinement)):
        assert module is not None
        ours = dict(module.named_parameters())
        for theirs, name in reference.names(index).items():
            result.gradients[theirs] = ours.pop(name).grad
        assert not ours
    result.gradients["rpn_head.init_proposal_features.weight"] = learned.content.grad
    for feature in features:
        assert feature.grad is not None
        result.features.append(feature.grad)
    return result


def check_losses(result: Run, case: str, scale: float = 1.0) -> None:
    """Every part of every output equals the published one times ``scale``."""
    wanted = {
        key.removeprefix(f"{case}/loss/"): float(value) * scale
        for key, value in numbers("training").items()
        if key.startswith(f"{case}/loss/") and not key.endswith("pos_acc")
    }
    found = {
        OUTPUTS[output] + PARTS[part]: value
        for output, parts in result.parts.items()
        for part, value in parts.items()
    }
    assert found == pytest.approx(wanted, rel=TOLERANCE, abs=0)
    total = sum(wanted.values())
    assert float(result.losses.total.detach()) == pytest.approx(total, rel=TOLERANCE)
    by_output = sum(float(value) for value in result.losses.losses.values())
    assert by_output == pytest.approx(total, rel=TOLERANCE)
    for part, name in PARTS.items():
        over_outputs = sum(v for k, v in wanted.items() if k.endswith(name))
        assert float(result.losses.parts[part]) == pytest.approx(over_outputs, rel=TOLERANCE, abs=0)


def check_gradient_norms(result: Run, case: str, scale: float = 1.0) -> None:
    prefix = f"{case}/grad_norm/"
    wanted = {
        key.removeprefix(prefix): float(value) * scale
        for key, value in numbers("training").items()
        if key.startswith(prefix)
    }
    found = {
        name: float(gradient.norm())
        for name, gradient in result.gradients.items()
        if gradient is not None
    }
    assert found.pop(ROUNDING) < 1e-15 * max(found.values())
    del wanted[ROUNDING]
    assert found == pytest.approx(wanted, rel=TOLERANCE, abs=0)


def projection(gradient: Tensor) -> float:
    along = torch.from_numpy(np.random.RandomState(7).standard_normal(gradient.numel()))
    return float(gradient.flatten() @ along)


def check_close(found: Tensor, wanted: Tensor, norm: float) -> None:
    """Equal, up to a billionth of the norm of the gradient they are taken from."""
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * norm)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_losses(k: int) -> None:
    check_losses(run(k), f"rag{k}")
    wanted = float(numbers("training")[f"rag{k}/outer_sum"])
    assert float(run(k).losses.total.detach()) == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_assignments(k: int) -> None:
    for output, name in OUTPUTS.items():
        image, query, target = run(k).matches[output]
        assigned = torch.zeros(2, 12, dtype=torch.int64)
        assigned[image, query] = target + 1
        assert torch.equal(assigned, numbers("training")[f"rag{k}/assign/{name}"]), output


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_of_parameters(k: int) -> None:
    stored, result = numbers("training"), run(k)
    check_gradient_norms(result, f"rag{k}")
    for name, gradient in result.gradients.items():
        assert gradient is not None, name
        if name == ROUNDING:
            continue
        norm = float(gradient.norm())
        wanted = float(stored[f"rag{k}/grad_proj/{name}"])
        # The projection is as long as the gradient in the mean, and may be much shorter.
        assert projection(gradient) == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE * norm)
        if f"rag{k}/grad/{name}" in stored:
            check_close(gradient, stored[f"rag{k}/grad/{name}"], norm)
        else:
            check_close(gradient.flatten()[:8], stored[f"rag{k}/grad_first8/{name}"], norm)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_of_features(k: int) -> None:
    stored, result = numbers("training"), run(k)
    for level, gradient in enumerate(result.features):
        wanted = {
            kind: stored[f"rag{k}/feat{level}_grad_{kind}"]
            for kind in ("norm", "index", "value", "proj")
        }
        norm = float(gradient.norm())
        assert norm == pytest.approx(float(wanted["norm"]), rel=TOLERANCE)
        check_close(gradient.flatten()[wanted["index"]], wanted["value"], norm)
        assert projection(gradient) == pytest.approx(
            float(wanted["proj"]), rel=TOLERANCE, abs=TOLERANCE * norm
        )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_published_parameters_without_gradient_do_not_exist_here(k: int) -> None:
    with np.load(reference.FIXTURES / "training.npz") as stored:
        dead = {str(name) for name in stored[f"rag{k}/no_grad_names"]}
    assert dead == set(reference.published_weights()) - set(run(k).gradients)


def test_without_extra_supervision() -> None:
    result = run(extra=0)
    assert list(result.parts) == ["init", "iter1", "iter3", "iter6"]
    check_losses(result, "edge_noextra")
    check_gradient_norms(result, "edge_noextra")


def test_a_single_step() -> None:
    result = run(steps=1)
    assert list(result.parts) == ["init", "init+1", "init+2", "iter1"]
    check_losses(result, "edge_refine1")
    check_gradient_norms(result, "edge_refine1")


def test_one_object_in_the_batch() -> None:
    """The published normaliser is 1 + ε here, ours is 1."""
    check_losses(run(objects=1, normaliser=1 + EPSILON), "edge_onegt")
    check_gradient_norms(run(objects=1, normaliser=1 + EPSILON), "edge_onegt")
    check_losses(run(objects=1), "edge_onegt", scale=1 + EPSILON)


def test_no_object_in_the_batch() -> None:
    """The published code divides by ε here, which gives a loss of 7e8; we divide by 1."""
    published = sum(
        float(numbers("training")[f"edge_nogt/loss/{name}loss_cls"]) for name in OUTPUTS.values()
    )
    assert published > 1e9
    check_losses(run(objects=0, normaliser=EPSILON), "edge_nogt")
    check_gradient_norms(run(objects=0, normaliser=EPSILON), "edge_nogt")
    ours = run(objects=0)
    check_losses(ours, "edge_nogt", scale=EPSILON)
    check_gradient_norms(ours, "edge_nogt", scale=EPSILON)
    assert all(parts["l1"] == parts["giou"] == 0 for parts in ours.parts.values())
    assert 0 < float(ours.losses.total.detach()) < 1000
