"""A whole detector against the published implementation: an image in, boxes out, in float64.

ResNet-18, the published code's 3×3 neck with its ReLU, an initialisation layer and seven
refinements.  The weights are rounded to float32, as they were there.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.pretrained import load_published

HEIGHT, WIDTH = 96, 128
SEED = 404

numbers = cache(reference.numbers)


def close(ours: Tensor, published: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, published, rtol=0, atol=tolerance)


@cache
def detector() -> Detector:
    """As `load_published` reads it, with the seven refinements of the fixture."""
    weights = reference.published_weights(SEED, "model_weights.tsv")
    rounded = {name: value.float().double() for name, value in weights.items()}
    counts = {
        f"{name.removesuffix('running_var')}num_batches_tracked": torch.tensor(0)
        for name in weights
        if name.endswith("running_var")
    }
    model = load_published({**rounded, **counts})
    assert isinstance(model.decoder, EquilibriumDecoder)
    model.decoder.config = replace(model.decoder.config, steps=7)
    return model


def image() -> Tensor:
    """``(1, 3, H, W)`` uint8, RGB; drawn as BGR."""
    drawn = np.random.RandomState(SEED + 1).randint(0, 256, size=(3, HEIGHT, WIDTH))
    return torch.from_numpy(drawn.astype(np.uint8)).flip(0)[None]


def sizes() -> Tensor:
    return torch.tensor([[HEIGHT, WIDTH]])


def test_the_image_is_that_of_the_fixtures() -> None:
    wanted = numbers("model")
    assert torch.equal(wanted["image_sizes_hw"], sizes())
    assert torch.equal(image()[0, 2].flatten()[:8], wanted["image_bgr_u8_first8"][0])
    normalised = detector().normalise(image(), sizes()).float()
    assert tuple(normalised.shape) == tuple(wanted["input_shape"].tolist())
    assert float(normalised.norm()) == pytest.approx(float(wanted["input_norm"]), rel=1e-6)


@pytest.mark.parametrize("level", range(4))
def test_features(level: int) -> None:
    wanted, model = numbers("model"), detector()
    with torch.no_grad():
        deep = model.backbone(model.normalise(image(), sizes()))
        features = {"backbone": deep[level], "neck": model.neck(deep)[level]}
    assert tuple(features["neck"].shape) == tuple(wanted[f"neck{level}_shape"].tolist())
    for part, found in features.items():
        norm = float(wanted[f"f64_{part}{level}_norm"])
        assert float(found.norm()) == pytest.approx(norm, rel=1e-9)
        first = found.flatten()[:8]
        torch.testing.assert_close(first, wanted[f"f64_{part}{level}_first8"], rtol=1e-8, atol=1e-9)


def test_detections() -> None:
    wanted, model = numbers("model"), detector()
    with torch.no_grad():
        output = model(image(), sizes())
        outputs = list(model.decoder.trajectory(*model.encode(image(), sizes())))
    assert isinstance(model.decoder, EquilibriumDecoder)
    assert len(outputs) == int(wanted["layer_calls"])
    close(outputs[0].boxes, wanted["f64_init_boxes_input_px"], 1e-9)
    close(output.logits, wanted["f64_final_logits"], 1e-10)
    close(output.boxes, wanted["f64_final_boxes_input_px"], 1e-9)


def test_detections_in_float32() -> None:
    """As near to the published float32 numbers as those are to the float64 ones."""
    wanted, model = numbers("model"), copy.deepcopy(detector()).float()
    with torch.no_grad():
        output = model(image(), sizes())
    close(output.logits, wanted["final_logits"], 2e-5)
    close(output.boxes, wanted["final_boxes_input_px"], 1e-3)
