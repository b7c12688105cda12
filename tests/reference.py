"""The layers that the fixtures were made with: weights by rule, under our names for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.decoder.layer import LayerConfig, RefinementLayer

FIXTURES = Path(__file__).parent / "fixtures"

CONFIG = LayerConfig(
    content_dim=64,
    feature_channels=64,
    heads=4,
    groups=4,
    points=8,
    out_points=16,
    ffn_channels=128,
    num_classes=7,
)
"""Of the fixtures' initialisation and refinement layer."""

NAMES = {
    "iof_tau": "attention.tau",
    "attention.attn.in_proj_weight": "attention.project_in.weight",
    "attention.attn.in_proj_bias": "attention.project_in.bias",
    "attention.attn.out_proj": "attention.project_out",
    "attention_norm": "attention_norm",
    "sampling_n_mixing.sampling_offset_generator.0": "sampling.offset",
    "sampling_n_mixing.adaptive_mixing.parameter_generator.0": "mixing.generator",
    "sampling_n_mixing.adaptive_mixing.out_proj": "mixing.project_out",
    "sampling_n_mixing.norm": "mixing_norm",
    "ffn.layers.0.0": "ffn.0",
    "ffn.layers.1": "ffn.2",
    "ffn_norm": "ffn_norm",
    "cls_fcs.0": "class_head.0",
    "cls_fcs.1": "class_head.1",
    "fc_cls": "class_head.3",
    "reg_fcs.0": "box_head.0",
    "reg_fcs.1": "box_head.1",
    "fc_reg": "box_head.3",
}
"""Published name of a tensor, or of the module that holds weight and bias, to ours."""


def numbers(name: str) -> dict[str, Tensor]:
    """The arrays of numbers in a fixture."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    return {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind != "U"}


def published_weights(seed: int = 101, file: str = "weights.tsv") -> dict[str, Tensor]:
    """Every floating tensor of ``file``, drawn in its order (unused ones, too)."""
    draw = np.random.RandomState(seed)
    weights = {}
    for line in (FIXTURES / file).read_text().splitlines():
        name, sizes, _, rule, _ = line.split("\t")
        if rule == "zero":  # counts, not weights
            continue
        shape = tuple(int(size) for size in sizes.split("x"))
        if rule == "box":
            value = np.tile([0.5, 0.5, 1.0, 1.0], (shape[0], 1))
        else:
            noise = draw.standard_normal(shape)
            root = np.sqrt(noise.size / shape[0])
            value = {
                "one": 1 + 0.05 * noise,
                "var": 1 + 0.05 * abs(noise),
                "small": 0.05 * noise,
                "fan": noise / root,
                "offset": 0.3 * noise / root,
                "fcreg": 0.02 * noise,
            }[rule]
        weights[name] = torch.from_numpy(value)
    return weights


def our_name(name: str, prefix: str) -> str | None:
    """Our name of a published tensor; ``None`` if it is not of this layer, or never used."""
    short = name.removeprefix(prefix)
    if short == name or "instance_interactive_conv" in short:
        return None
    module, _, kind = short.rpartition(".")
    return NAMES[short] if short in NAMES else f"{NAMES[module]}.{kind}"


def layer(index: int) -> RefinementLayer:
    """The initialisation layer (0) or the refinement layer (1) of the fixtures, in float64."""
    prefix = f"roi_head.bbox_head.{index}."
    named = {our_name(name, prefix): value for name, value in published_weights().items()}
    state = {name: value for name, value in named.items() if name is not None}
    filled = RefinementLayer(CONFIG).double()
    filled.load_state_dict(state)
    return filled


def feature_maps() -> list[Tensor]:
    """Of the fixtures: two images padded to 128×160."""
    draw = np.random.RandomState(202)
    return [
        torch.from_numpy(draw.standard_normal((2, 64, 128 // stride, 160 // stride)))
        for stride in CONFIG.strides
    ]
