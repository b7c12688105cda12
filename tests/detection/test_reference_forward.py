"""Layer calls against those of the published implementation, in float64 and to 1e-8."""

from __future__ import annotations

from functools import cache

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detection.boxes import intersection_over_foreground, perturb_boxes
from detection.decoder.layer import RefinementLayer
from detection.decoder.queries import Queries
from detection.models.queries import LearnedQueries

TOLERANCE = 1e-8

numbers = cache(reference.numbers)
layer = cache(reference.layer)
feature_maps = cache(reference.feature_maps)


def close(ours: Tensor, published: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, published, rtol=0, atol=tolerance)


def start() -> Queries:
    queries = LearnedQueries(12, 64).double()
    with torch.no_grad():
        content = reference.published_weights()["rpn_head.init_proposal_features.weight"]
        queries.content.copy_(content)
        started: Queries = queries(numbers("forward")["sizes_hw"])
    return started


def call(index: int, queries: Queries) -> tuple[Queries, dict[str, Tensor]]:
    """One layer call, and what went in and out of the layer's parts."""
    refine: RefinementLayer = layer(index)
    seen: dict[str, Tensor] = {}

    def record(name: str) -> RemovableHandle:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name}.in"], seen[name] = inputs[0], output.clone()

        return refine.get_submodule(name).register_forward_hook(keep)

    parts = "embedding attention_norm sampling sampling.offset mixing.generator mixing_norm"
    handles = [record(name) for name in [*parts.split(), "ffn_norm", "box_head"]]
    try:
        with torch.no_grad():
            refined: Queries = refine(queries, feature_maps())
    finally:
        for handle in handles:
            handle.remove()
    return refined, seen


def test_weights_are_those_of_the_fixtures() -> None:
    weights = reference.published_weights()
    lines = (reference.FIXTURES / "weights_check.tsv").read_text().splitlines()
    assert len(lines) == len(weights)
    for line in lines:
        name, total, first = line.split("\t")[:3]
        assert float(weights[name].sum()) == pytest.approx(float(total), rel=1e-9, abs=1e-9)
        assert float(weights[name].flatten()[0]) == pytest.approx(float(first), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("level", range(4))
def test_feature_maps_are_those_of_the_fixtures(level: int) -> None:
    feature, wanted = feature_maps()[level], numbers("forward")
    close(feature.norm(), wanted[f"feat{level}_norm"])
    close(feature.flatten()[:8], wanted[f"feat{level}_first8"])


def test_every_published_weight_that_is_used_has_a_place() -> None:
    used = [
        line.split("\t")[0]
        for line in (reference.FIXTURES / "weights.tsv").read_text().splitlines()
        if line.startswith("roi_head.bbox_head.1.") and line.endswith("\tused")
    ]
    assert len(used) == len(layer(1).state_dict())


def test_start() -> None:
    wanted, queries = numbers("forward"), start()
    close(queries.content, wanted["init_content"])
    close(queries.boxes, wanted["init_boxes"])
    close(queries.position, wanted["init_position"])


def test_nine_calls() -> None:
    wanted, queries = numbers("forward"), start()
    for t in range(9):
        queries, _ = call(min(t, 1), queries)
        close(queries.position, wanted["position"][t])
        close(queries.content, wanted["content"][t])
        close(queries.boxes, wanted["boxes"][t])
        close(layer(min(t, 1)).classify(queries.content), wanted["logits"][t])


def state_before(prefix: str) -> tuple[int, Queries]:
    """Layer and state of a recorded call."""
    wanted = numbers("forward")
    if prefix == "mid0":
        return 0, start()
    if prefix == "mid1":
        return 1, Queries(*(wanted[name][0] for name in ("position", "content", "boxes")))
    return 1, Queries(*(wanted[f"unit_in_{name}"] for name in ("position", "content", "boxes")))


@pytest.mark.parametrize("prefix", ["mid0", "mid1", "unit_mid"])
def test_every_intermediate(prefix: str) -> None:
    wanted = {
        key.removeprefix(prefix + "_"): value
        for key, value in numbers("forward").items()
        if key.startswith(prefix)
    }
    index, queries = state_before(prefix)
    _, seen = call(index, queries)
    with torch.no_grad():
        close(intersection_over_foreground(queries.boxes), wanted["iof"])
        close(layer(index).attention.bias(queries.boxes), wanted["attn_bias"])
        points = layer(index).sampling.place(seen["sampling.offset.in"], queries.position)
        # Without a graph it is called group by group, and so not seen.
        matrices = layer(index).mixing.generator(seen["attention_norm"])
    close(points.flatten(2, 3), wanted["sample_points_xyz"].squeeze(2))
    close(matrices, wanted["mixing_parameters"])
    close(seen["attention_norm.in"], wanted["attention_out_with_residual"].transpose(0, 1))
    close(seen["attention_norm"], wanted["attention_norm"].transpose(0, 1))
    for ours, name in {
        "embedding": "position_embedding",
        "sampling.offset": "offset_raw",
        "sampling": "sampled",
        "mixing_norm.in": "mixing_out_with_residual",
        "mixing_norm": "mixing_norm",
        "ffn_norm.in": "ffn_out_with_residual",
        "ffn_norm": "ffn_norm",
        "box_head": "fc_reg_delta",
    }.items():
        close(seen[ours], wanted[name])


def test_boxes_that_are_not_those_of_the_positions() -> None:
    """Swapped, tiny, empty and twin boxes reach the attention as they are."""
    wanted = numbers("forward")
    queries, _ = call(*state_before("unit"))
    close(queries.position, wanted["unit_position"])
    close(queries.content, wanted["unit_content"])
    close(queries.boxes, wanted["unit_boxes"])
    close(layer(1).classify(queries.content), wanted["unit_logits"])


@pytest.mark.parametrize("case", ["content", "position", "both"])
def test_box_noise_and_the_call_after_it(case: str) -> None:
    stored = numbers("perturbation")
    wanted = {
        key.split("/")[1]: value for key, value in stored.items() if key.startswith(case + "/")
    }
    position, content, boxes = (wanted[f"in_{name}"] for name in ("position", "content", "boxes"))
    if case != "content":
        position, boxes = perturb_boxes(boxes, stored["box_intensity_px"] * wanted["box_noise"])
        assert bool((boxes[..., 2:] < boxes[..., :2]).any())
    close(position, wanted["noisy_position"])
    close(boxes, wanted["noisy_boxes"])
    if case != "position":
        content = wanted["noisy_content"]
    queries, _ = call(1, Queries(position, content, boxes))
    close(queries.position, wanted["next_position"])
    close(queries.content, wanted["next_content"])
    close(queries.boxes, wanted["next_boxes"])
    close(layer(1).classify(queries.content), wanted["next_logits"])
