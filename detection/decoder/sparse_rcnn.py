"""Another query refinement layer: that of Sparse R-CNN (Sun et al., CVPR 2021).

It shows that the equilibrium decoder asks nothing of AdaMixer: self-attention without boxes, the
features of each box pooled to a grid (RoIAlign, He et al., ICCV 2017) from the one level that fits
its size (Lin et al., CVPR 2017), and mixed by two matrices that the query makes.

As in `detection.decoder.layer`, the position is detached at the entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign

from detection.boxes import decode_position, encode_boxes, side_lengths
from detection.decoder.queries import Queries, QueryLayer, output_head

CENTRE_SCALE = 0.5
"""A centre moves by half the side of its box for each unit of the head, as in Sparse R-CNN."""
LARGEST_GROWTH = math.log2(1000 / 16)
"""Most doublings of a side in one refinement."""


@dataclass(frozen=True)
class SparseRCNNLayerConfig:
    """Sizes of a refinement layer of Sparse R-CNN.

    Args:
        content_dim: channels of a query's content.
        feature_channels: channels of the feature maps.
        heads: of the self-attention.
        pooled: side of the grid that a box is pooled to.
        dynamic_dim: channels between the two matrices of the dynamic convolution.
        ffn_channels: hidden width of the feed-forward network.
        num_classes: sigmoid logits per query; there is no background class.
        strides: of the feature maps, in pixels.
    """

    content_dim: int = 256
    feature_channels: int = 256
    heads: int = 8
    pooled: int = 7
    dynamic_dim: int = 64
    ffn_channels: int = 2048
    num_classes: int = 80
    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "strides" and value < 1:
                raise ValueError(f"SparseRCNNLayerConfig({name}={value}): must be at least 1.")


class SparseRCNNLayer(QueryLayer):
    """Refines object queries once, by what lies inside their boxes.

    Example:
        >>> config = SparseRCNNLayerConfig(
        ...     content_dim=16, feature_channels=8, heads=2, pooled=3, dynamic_dim=4,
        ...     ffn_channels=32, num_classes=3,
        ... )
        >>> layer = SparseRCNNLayer(config)
        >>> maps = [torch.randn(1, 8, 64 // s, 64 // s) for s in config.strides]
        >>> boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
        >>> queries = layer(Queries(encode_boxes(boxes), torch.randn(1, 1, 16), boxes), maps)
        >>> queries.boxes.shape, layer.classify(queries.content).shape
        (torch.Size([1, 1, 4]), torch.Size([1, 1, 3]))
    """

    def __init__(self, config: SparseRCNNLayerConfig) -> None:
        super().__init__()
        c = config.content_dim
        self.strides = config.strides
        self.attention = nn.MultiheadAttention(c, config.heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(c)
        levels = [str(level) for level in range(len(config.strides))]
        self.pooling = MultiScaleRoIAlign(levels, config.pooled, sampling_ratio=2)
        self.interaction = DynamicConvolution(
            c, config.feature_channels, config.dynamic_dim, config.pooled**2
        )
        self.interaction_norm = nn.LayerNorm(c)
        self.ffn = nn.Sequential(
            nn.Linear(c, config.ffn_channels),
            nn.ReLU(inplace=True),
            nn.Linear(config.ffn_channels, c),
        )
        self.ffn_norm = nn.LayerNorm(c)
        self.class_head = output_head(c, config.num_classes)
        self.box_head = output_head(c, 4)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier weights; every class at a probability of 0.01; every box stays where it is."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_head.get_parameter("3.bias"), -math.log(99))
        nn.init.zeros_(self.box_head.get_parameter("3.weight"))
        nn.init.zeros_(self.box_head.get_parameter("3.bias"))

    def forward(self, queries: Queries, features: Sequence[Tensor]) -> Queries:
        """Queries after one refinement against feature maps ``(B, C, H/s, W/s)``."""
        position, content = queries.position.detach(), queries.content
        attended, _ = self.attention(content, content, content, need_weights=False)
        content = self.attention_norm(content + attended)
        pooled = self._pool(decode_position(position), features)
        content = self.interaction_norm(content + self.interaction(content, pooled))
        content = self.ffn_norm(content + self.ffn(content))
        position = self._move(position, self.box_head(content).to(position.dtype))
        return Queries(position, content, decode_position(position))

    def classify(self, content: Tensor) -> Tensor:
        """Class logits ``(B, N, num_classes)`` of contents ``(B, N, C)``."""
        logits: Tensor = self.class_head(content)
        return logits

    def _pool(self, boxes: Tensor, features: Sequence[Tensor]) -> Tensor:
        """``(B, N, pooled², C)``: features on a grid in each box."""
        batch, number, _ = boxes.shape
        maps = {str(level): feature for level, feature in enumerate(features)}
        height, width = (int(side) * self.strides[0] for side in features[0].shape[-2:])
        pooled = self.pooling(maps, list(boxes.to(features[0].dtype)), [(height, width)] * batch)
        return pooled.flatten(2).mT.unflatten(0, (batch, number))

    @staticmethod
    def _move(position: Tensor, delta: Tensor) -> Tensor:
        """Shift the centre in units of the sides, and double the sides so many times."""
        sides = side_lengths(position)
        centre = position[..., :2] + CENTRE_SCALE * delta[..., :2] * sides
        half = 0.5 * sides * delta[..., 2:].clamp(max=LARGEST_GROWTH).exp2()
        return encode_boxes(torch.cat([centre - half, centre + half], dim=-1))


class DynamicConvolution(nn.Module):
    """``x ← relu(LN(x A)); x ← relu(LN(x B))`` with ``A`` and ``B`` made from the content.

    Args:
        content_dim: channels of the content.
        feature_channels: channels of the features.
        inner: channels between ``A`` and ``B``.
        cells: of the grid, ``P``.

    Example:
        >>> mixing = DynamicConvolution(16, feature_channels=8, inner=4, cells=9)
        >>> mixing(torch.randn(2, 3, 16), torch.randn(2, 3, 9, 8)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, content_dim: int, feature_channels: int, inner: int, cells: int) -> None:
        super().__init__()
        self.shapes = ((feature_channels, inner), (inner, feature_channels))
        self.generator = nn.Linear(content_dim, 2 * feature_channels * inner)
        self.norms = nn.ModuleList([nn.LayerNorm(inner), nn.LayerNorm(feature_channels)])
        self.project_out = nn.Linear(cells * feature_channels, content_dim)
        self.norm_out = nn.LayerNorm(content_dim)

    def forward(self, content: Tensor, pooled: Tensor) -> Tensor:
        """Mixed features ``(B, N, content_dim)`` of ``pooled (B, N, P, feature_channels)``."""
        x = pooled
        matrices = self.generator(content).chunk(2, dim=-1)
        for matrix, shape, norm in zip(matrices, self.shapes, self.norms, strict=True):
            x = F.relu(norm(x @ matrix.unflatten(-1, shape)))
        mixed: Tensor = F.relu(self.norm_out(self.project_out(x.flatten(2))))
        return mixed
