"""Copies whose weights are cast beforehand: which are, and that nothing else is another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detection.decoder.layer import LayerConfig
from detection.models.config import BackboneConfig, ModelConfig
from detection.models.detector import Detector
from detection.narrowing import narrowed


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_products_are_cast_and_the_module_is_left_alone(dtype: torch.dtype) -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Linear(6, 8), nn.MultiheadAttention(8, 2)
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    copied = narrowed(module, dtype)
    assert {name for name, found in dtypes(copied).items() if found == torch.float32} == {
        "1.weight",
        "1.bias",
    }
    given_weights = module.state_dict()
    for name, mine in copied.state_dict().items():
        given = given_weights[name]
        assert torch.equal(mine, before[name].to(mine.dtype)) and torch.equal(given, before[name])
        assert given.dtype == torch.float32 and mine.data_ptr() != given.data_ptr()
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert copied[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_are_shared_stay_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    copied = narrowed(module, torch.bfloat16)
    assert copied[0].weight is copied[1].weight


def test_float64_is_left_alone_as_autocast_leaves_it() -> None:
    module, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrowed(module, torch.bfloat16)(x), module(x))


def test_a_bias_that_is_added_outside_of_its_product_is_not_rounded() -> None:
    layer = LayerConfig(points=4, out_points=8, ffn_channels=64)
    detector = Detector(ModelConfig(BackboneConfig("small", pretrained=False), layer=layer))
    kept = [name for name in dtypes(detector) if name.endswith("mixing.project_out.bias")]
    found = dtypes(narrowed(detector, torch.bfloat16))
    assert kept and all(found[name] == torch.float32 for name in kept)
    assert {found[name.replace("bias", "weight")] for name in kept} == {torch.bfloat16}
