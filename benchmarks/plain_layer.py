"""DEQDet's refinement layer as a plain composition of torch's operators, to compare ours with.

The same mathematics on the same weights, each step one operator of torch in eager mode, none slower
than it need be; nothing is written over, split up, kept out of the graph or prepared beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detection.boxes import decode_position, side_lengths
from detection.decoder.layer import RefinementLayer
from detection.decoder.queries import Queries
from detection.decoder.sampling import TAU


def refine(layer: RefinementLayer, queries: Queries, features: Sequence[Tensor]) -> Queries:
    """What ``layer(queries, features)`` computes."""
    position, boxes = queries.position.detach(), queries.boxes.detach()
    content = queries.content + layer.embedding(position)
    content = layer.attention_norm(content + layer.attention(content, boxes))
    sampled = _sample(layer, content, position, features)
    content = layer.mixing_norm(content + _mix(layer, content, sampled))
    content = layer.ffn_norm(content + layer.ffn(content))
    delta, size = layer.box_head(content), position[..., 2:3].exp2()
    position = torch.cat(
        [position[..., :2] + delta[..., :2] * size, position[..., 2:] + delta[..., 2:]], dim=-1
    )
    return Queries(position, content, decode_position(position))


def _sample(
    layer: RefinementLayer, content: Tensor, position: Tensor, features: Sequence[Tensor]
) -> Tensor:
    """Bilinear samples ``(B, N, G, P, C/G)``, level by level."""
    sampling = layer.sampling
    batch, queries, _ = content.shape
    groups, points = sampling.groups, sampling.points
    offset = sampling.offset(content).view(batch, queries, groups * points, 3)
    scale = torch.cat([side_lengths(position), torch.ones_like(position[..., :1])], dim=-1)
    place = position[:, :, None, :3] + offset * scale[:, :, None]
    place = place.view(batch, queries, groups, points, 3).transpose(1, 2).flatten(0, 1)
    scales = place.new_tensor([math.log2(stride) for stride in sampling.strides])
    weights = (-(place[..., 2:] - scales).square() / TAU).softmax(dim=-1)
    total = torch.zeros((), dtype=content.dtype, device=content.device)
    for level, (feature, stride) in enumerate(zip(features, sampling.strides, strict=True)):
        height, width = feature.shape[-2:]
        extent = place.new_tensor([width * stride, height * stride])
        by_group = feature.reshape(batch * groups, -1, height, width)
        read = F.grid_sample(by_group, place[..., :2] * (2 / extent) - 1, align_corners=False)
        total = total + read * weights[:, None, ..., level]
    return total.view(batch, groups, -1, queries, points).permute(0, 3, 1, 4, 2)


def _mix(layer: RefinementLayer, content: Tensor, sampled: Tensor) -> Tensor:
    """Channel mixing, spatial mixing and projection, all queries and groups at once."""
    mixing = layer.mixing
    x = sampled.reshape(-1, mixing.points, mixing.channels)
    channel, spatial = mixing.generator(content).view(len(x), -1).split(mixing.sizes, dim=1)
    x = x @ channel.view(-1, mixing.channels, mixing.channels)
    x = F.relu(F.layer_norm(x, x.shape[1:]))
    x = spatial.view(-1, mixing.out_points, mixing.points) @ x
    x = F.relu(F.layer_norm(x, x.shape[1:]))
    mixed: Tensor = mixing.project_out(x.view(*content.shape[:2], -1))
    return mixed
