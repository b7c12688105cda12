"""The published checkpoints of DEQDet: which of our tensors each of theirs is.

They are state dicts of mmdetection.  What a detector is made of is read from the names and shapes
of the tensors alone; every tensor is either mapped to one of ours, or known to be of no use; any
other is refused by its name.  Nothing here needs the tensors' contents but for two that must hold
what the code takes for granted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from detection.checkpoints import CheckpointError, first_few
from detection.decoder.layer import LayerConfig
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    NeckConfig,
    StackedConfig,
)
from detection.models.detector import Detector
from detection.recipes import entries, recipe
from detection.training.recipe import Recipe

HEAD = "roi_head.bbox_head."
START_BOXES = "rpn_head.init_proposal_bboxes.weight"

_LAYER = {
    "attention.tau": "iof_tau",
    "attention.project_in.weight": "attention.attn.in_proj_weight",
    "attention.project_in.bias": "attention.attn.in_proj_bias",
    "attention.project_out": "attention.attn.out_proj",
    "attention_norm": "attention_norm",
    "sampling.offset": "sampling_n_mixing.sampling_offset_generator.0",
    "mixing.generator": "sampling_n_mixing.adaptive_mixing.parameter_generator.0",
    "mixing.project_out": "sampling_n_mixing.adaptive_mixing.out_proj",
    "mixing_norm": "sampling_n_mixing.norm",
    "ffn.0": "ffn.layers.0.0",
    "ffn.2": "ffn.layers.1",
    "ffn_norm": "ffn_norm",
    "class_head.0": "cls_fcs.0",
    "class_head.1": "cls_fcs.1",
    "class_head.3": "fc_cls",
    "box_head.0": "reg_fcs.0",
    "box_head.1": "reg_fcs.1",
    "box_head.3": "fc_reg",
}
"""Our tensors of a refinement layer, or the modules that hold a weight and a bias, and theirs."""

_SWIN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.relative_position_bias_table": "attn.w_msa.relative_position_bias_table",
    "attn.relative_position_index": "attn.w_msa.relative_position_index",
    "attn.qkv": "attn.w_msa.qkv",
    "attn.proj": "attn.w_msa.proj",
    "mlp.0": "ffn.layers.0.0",
    "mlp.3": "ffn.layers.1",
}
"""Likewise of a block of Swin."""

_UNUSED = {
    rf"{re.escape(HEAD)}\d+\.instance_interactive_conv(_norm)?\.": (
        "the dynamic convolution that the head inherits from Sparse R-CNN and never calls"
    ),
}
"""Patterns of tensors that no computation reads, and what they are."""

_RESNETS = {(2, False): "resnet18", (6, True): "resnet50", (23, True): "resnet101"}
"""By the blocks of the third stage, and whether a block is a bottleneck."""


@dataclass
class Plan:
    """How a published state dict becomes a detector.

    Attributes:
        recipe: the recipe that it was made by, as far as it shows.
        sources: the published name of each of our tensors.
        unused: published tensors that no computation reads, with the reason.
    """

    recipe: Recipe
    sources: dict[str, str]
    unused: dict[str, str] = field(default_factory=dict)


def plan(weights: Mapping[str, Tensor]) -> Plan:
    """How to read ``weights``, whose tensors may be on the meta device.

    Raises:
        CheckpointError: if they are not those of a published DEQDet or AdaMixer: naming the
            tensors that are missing, unknown or of another shape.
    """
    made = _recipe_of(weights)
    try:
        with torch.device("meta"):
            model = Detector(made.without_pretraining().model)
    except ValueError as error:
        raise CheckpointError(f"The sizes in this checkpoint make no model: {error}") from error
    ours = model.state_dict()
    sources = {name: published_name(name, made.model) for name in ours}
    known = set(sources.values())
    unused = {START_BOXES: "where queries start: the whole image, which is not learned"}
    unknown = []
    for name in weights:
        if name in known or name in unused:
            continue
        reasons = [why for pattern, why in _UNUSED.items() if re.match(pattern, name)]
        if reasons:
            unused[name] = reasons[0]
        else:
            unknown.append(name)
    problems = {
        "missing": [name for name in (*sources.values(), START_BOXES) if name not in weights],
        "unknown": unknown,
        "other shape": [
            f"{theirs} {tuple(weights[theirs].shape)} where {_their_shape(name, ours[name])} fits"
            for name, theirs in sources.items()
            if theirs in weights and tuple(weights[theirs].shape) != _their_shape(name, ours[name])
        ],
        "other kind of number": [
            f"{theirs} {weights[theirs].dtype}"
            for name, theirs in sources.items()
            if theirs in weights
            and weights[theirs].is_floating_point() != ours[name].is_floating_point()
        ],
    }
    refuse(problems)
    return Plan(made, sources, unused)


def convert(weights: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Our state dict, from published weights; half precision becomes float32.

    Raises:
        CheckpointError: if queries do not start from the whole image, if a window attention of
            Swin numbers its positions otherwise, or if a weight is not finite.
    """
    _check_contents(weights, plan)
    return {
        name: _widened(_rearranged(name, weights[theirs])) for name, theirs in plan.sources.items()
    }


def published_name(name: str, model: ModelConfig) -> str:
    """The published name of one of our tensors.

    Example:
        >>> published_name("decoder.refinement.class_head.3.bias", ModelConfig())
        'roi_head.bbox_head.1.fc_cls.bias'
        >>> published_name("neck.norm.weight", ModelConfig())
        'neck.gn_out.weight'
    """
    part, _, rest = name.partition(".")
    if part == "queries":
        return "rpn_head.init_proposal_features.weight"
    if part == "neck":
        module, _, kind = rest.rpartition(".")
        level = module.removeprefix("convolutions.")
        return f"neck.gn_out.{kind}" if module == "norm" else f"neck.convs.{level}.conv.{kind}"
    if part == "decoder":
        return _name_in_decoder(rest, model.decoder)
    return f"backbone.{_name_in_swin(rest) if model.backbone.name == 'swin_s' else rest}"


def refuse(problems: Mapping[str, list[str]]) -> None:
    """Raise `CheckpointError` if there is any problem, naming the first ones of each kind."""
    found = [f"{kind}: {first_few(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"This is no published checkpoint of DEQDet or AdaMixer: {'; '.join(found)}. "
            "Checkpoints of runs of this library are read by load_detector."
        )


def _recipe_of(weights: Mapping[str, Tensor]) -> Recipe:
    """The published recipe that these shapes belong to, or a new one of their sizes."""
    queries = _shape(weights, "rpn_head.init_proposal_features.weight", 2)[0]
    model = ModelConfig(
        backbone=_backbone_of(weights),
        neck=_neck_of(weights),
        layer=_layer_of(weights, _heads(weights) - 1),
        decoder=_decoder_of(weights),
        num_queries=queries,
    )
    classes = model.layer.num_classes
    for entry in entries():
        known = entry.recipe.for_classes(classes)
        if known.name.startswith("published_") and known.without_pretraining().model == model:
            return known
    base = "published_swins_2x" if model.backbone.name == "swin_s" else "published_r50_1x"
    return replace(recipe(base), name="published", model=model)


def _backbone_of(weights: Mapping[str, Tensor]) -> BackboneConfig:
    names = "\n".join(weights)
    if "backbone.patch_embed.projection.weight" in weights:
        return BackboneConfig("swin_s", pretrained=False, frozen_stages=0)
    blocks = len(set(re.findall(r"^backbone\.layer3\.(\d+)\.", names, re.MULTILINE)))
    bottleneck = "backbone.layer1.0.conv3.weight" in weights
    if (blocks, bottleneck) not in _RESNETS:
        refuse({"missing": ["a backbone that is ResNet-18, ResNet-50, ResNet-101 or Swin-S"]})
    name: Any = _RESNETS[blocks, bottleneck]
    return BackboneConfig(name, pretrained=False)


def _neck_of(weights: Mapping[str, Tensor]) -> NeckConfig:
    """A 3×3 neck is the published code's, with its ReLU; a 1×1 neck is AdaMixer's, without."""
    kernel: Any = _shape(weights, "neck.convs.0.conv.weight", 4)[-1]
    if kernel not in (1, 3):
        refuse({"other shape": [f"neck.convs.0.conv.weight: a kernel of {kernel}, not 1 or 3"]})
    return NeckConfig(kernel_size=kernel, activation=kernel == 3)


def _heads(weights: Mapping[str, Tensor]) -> int:
    pattern = re.compile(rf"{re.escape(HEAD)}(\d+)\.")
    indices = {int(match[1]) for name in weights if (match := pattern.match(name))}
    gaps = set(range(max(indices, default=0) + 1)) - indices
    if gaps:
        refuse({"missing": [f"{HEAD}{min(gaps)}.*"]})
    return len(indices)


def _decoder_of(weights: Mapping[str, Tensor]) -> DecoderConfig:
    heads = _heads(weights)
    if heads > 2:
        return StackedConfig(layers=heads)
    if heads == 1:
        return EquilibriumConfig(steps=21, initial="shared")
    first, second = (_layer_of(weights, i).points for i in (0, 1))
    return EquilibriumConfig(steps=21, initial_points=None if first == second else first)


def _layer_of(weights: Mapping[str, Tensor], index: int) -> LayerConfig:
    """Sizes of a layer: ``G·P·3`` offsets, ``G·(E² + P_out·P)`` numbers that mix, ``E = C/G``."""
    of = f"{HEAD}{index}."
    mixing = f"{of}sampling_n_mixing.adaptive_mixing."
    features = _shape(weights, "neck.convs.0.conv.weight", 4)[0]
    offsets = _shape(weights, f"{of}sampling_n_mixing.sampling_offset_generator.0.weight", 2)[0]
    mixed = _shape(weights, f"{mixing}parameter_generator.0.weight", 2)[0]
    out_points, uneven = divmod(_shape(weights, f"{mixing}out_proj.weight", 2)[1], features)
    squares = mixed - out_points * (offsets // 3)  # G E² = C² / G
    groups = features**2 // squares if squares > 0 else 0
    fits = groups > 0 and not features % groups and not offsets % (3 * groups) and not uneven
    if not fits or groups * squares != features**2:
        refuse({"other shape": [f"{of}sampling_n_mixing: sizes that do not fit each other"]})
    return LayerConfig(
        content_dim=_shape(weights, "rpn_head.init_proposal_features.weight", 2)[1],
        feature_channels=features,
        heads=_shape(weights, f"{of}iof_tau", 1)[0],
        groups=groups,
        points=offsets // (3 * groups),
        out_points=out_points,
        ffn_channels=_shape(weights, f"{of}ffn.layers.0.0.weight", 2)[0],
        num_classes=_shape(weights, f"{of}fc_cls.weight", 2)[0],
    )


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        refuse({"missing": [name]})
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or not all(shape):
        refuse({"other shape": [f"{name} {shape} where {dimensions} dimensions fit"]})
    return shape


def _name_in_decoder(name: str, decoder: DecoderConfig) -> str:
    layer, _, rest = name.partition(".")
    if layer == "layers":
        layer, _, rest = rest.partition(".")
    shared = isinstance(decoder, EquilibriumConfig) and decoder.initial == "shared"
    index = {"initial": "0", "refinement": "0" if shared else "1"}.get(layer, layer)
    return f"{HEAD}{index}.{_renamed(rest, _LAYER)}"


def _name_in_swin(name: str) -> str:
    if name.startswith("norms."):
        return f"norm{name[6:]}"
    _, number, rest = name.split(".", 2)
    stage, merging = divmod(int(number) - 1, 2)
    if number == "0":
        module, kind = rest.split(".")
        return f"patch_embed.{'projection' if module == '0' else 'norm'}.{kind}"
    if merging:
        return f"stages.{stage}.downsample.{rest}"
    block, _, rest = rest.partition(".")
    return f"stages.{stage}.blocks.{block}.{_renamed(rest, _SWIN_BLOCK)}"


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    return names[name] if name in names else f"{names[module]}.{kind}"


def _is_merging(name: str) -> bool:
    return re.match(r"backbone\.features\.[246]\.", name) is not None


def _their_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if name.endswith("relative_position_index"):
        return (math.isqrt(len(tensor)),) * 2
    return tuple(tensor.shape)


def _rearranged(name: str, theirs: Tensor) -> Tensor:
    """Swin's patch merging has each channel's four pixels side by side there, and here each
    pixel's channels: rows of pixels change faster than columns.
    """
    if name.endswith("relative_position_index"):
        return theirs.flatten()
    if not _is_merging(name):
        return theirs
    pixels = theirs.unflatten(-1, (-1, 2, 2))
    return pixels.movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()


def _widened(weight: Tensor) -> Tensor:
    narrow = weight.is_floating_point() and weight.dtype.itemsize < 4
    return weight.float() if narrow else weight


def _check_contents(weights: Mapping[str, Tensor], plan: Plan) -> None:
    start = weights[START_BOXES]
    if start.shape[-1] != 4 or not torch.allclose(
        start.float(), torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(start.shape)
    ):
        raise CheckpointError(
            f"{START_BOXES}: queries start from other boxes than the whole image, which this "
            "library does not have."
        )
    for name, theirs in plan.sources.items():
        weight = weights[theirs]
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{theirs} holds NaN or infinity: the file is damaged.")
        if name.endswith("relative_position_index") and not torch.equal(
            weight.flatten().cpu(), _window_positions(math.isqrt(len(weight)))
        ):
            raise CheckpointError(f"{theirs} numbers the positions in a window otherwise.")


def _window_positions(side: int) -> Tensor:
    """Number of each pair's offset in a window: ``(Δrow, Δcolumn)`` in reading order."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = ((x.flatten()[:, None] - x.flatten() + side - 1) for x in (rows, columns))
    return (row * (2 * side - 1) + column).flatten()
