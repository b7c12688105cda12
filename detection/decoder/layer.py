"""One query refinement layer: AdaMixer's decoder layer (Gao et al., CVPR 2022), as DEQDet uses it.

Self-attention among the queries, adaptive sampling and mixing of image features, a feed-forward
network, and two heads.  Norms follow each block.  The position is detached at the entry, so a box
loss reaches only the step of its own call, and the Jacobian of the layer acts through the content.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detection.boxes import decode_position
from detection.decoder.attention import BoxBiasedAttention
from detection.decoder.embedding import PositionEmbedding
from detection.decoder.mixing import AdaptiveMixing
from detection.decoder.queries import Queries, QueryLayer, output_head
from detection.decoder.sampling import Sampling3D


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of a refinement layer.

    Args:
        content_dim: channels of a query's content.
        feature_channels: channels of the feature maps.
        heads: of the self-attention.
        groups: channel groups, each with its own sampling points and mixing.
        points: sampling points per group.
        out_points: rows of the spatial mixing.
        ffn_channels: hidden width of the feed-forward network.
        num_classes: sigmoid logits per query; there is no background class.
        strides: of the feature maps, in pixels.
    """

    content_dim: int = 256
    feature_channels: int = 256
    heads: int = 8
    groups: int = 4
    points: int = 32
    out_points: int = 128
    ffn_channels: int = 2048
    num_classes: int = 80
    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "strides" and value < 1:
                raise ValueError(f"LayerConfig({name}={value}): must be at least 1.")


class RefinementLayer(QueryLayer):
    """Refines object queries once, by features sampled around their boxes.

    Example:
        >>> config = LayerConfig(
        ...     content_dim=16, feature_channels=8, heads=2, groups=2, points=4, out_points=4,
        ...     ffn_channels=32, num_classes=3,
        ... )
        >>> layer = RefinementLayer(config)
        >>> maps = [torch.randn(1, 8, 64 // s, 64 // s) for s in config.strides]
        >>> boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
        >>> position = torch.tensor([[[32.0, 32.0, 6.0, 0.0]]])
        >>> queries = layer(Queries(position, torch.randn(1, 1, 16), boxes), maps)
        >>> queries.boxes.shape, layer.classify(queries.content).shape
        (torch.Size([1, 1, 4]), torch.Size([1, 1, 3]))
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        c = config.content_dim
        self.embedding = PositionEmbedding(c)
        self.attention = BoxBiasedAttention(c, config.heads)
        self.attention_norm = nn.LayerNorm(c)
        self.sampling = Sampling3D(c, config.groups, config.points, config.strides)
        self.mixing = AdaptiveMixing(
            c, config.feature_channels, config.groups, config.points, config.out_points
        )
        self.mixing_norm = nn.LayerNorm(c)
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
        for part in (self.ffn, self.class_head, self.box_head):
            for module in part:
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(self.class_head.get_parameter("3.bias"), -math.log(99))
        nn.init.zeros_(self.box_head.get_parameter("3.weight"))
        nn.init.zeros_(self.box_head.get_parameter("3.bias"))

    def forward(self, queries: Queries, features: Sequence[Tensor]) -> Queries:
        """Queries after one refinement against feature maps ``(B, C, H/s, W/s)``."""
        position, boxes = queries.position.detach(), queries.boxes.detach()
        content = queries.content
        content = content + self.embedding(position).to(content.dtype)
        content = self.attention_norm(content + self.attention(content, boxes))
        sampled = self.sampling(content, position, features)
        content = self.mixing_norm(content + self.mixing(content, sampled))
        content = self.ffn_norm(content + self.ffn(content))
        position = self._move(position, self.box_head(content).to(position.dtype))
        return Queries(position, content, decode_position(position))

    def prepare(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Channels last; but not on a CPU in training, whose backward pass is slower so."""
        training = torch.is_grad_enabled() and features[0].is_cpu
        layout = torch.contiguous_format if training else torch.channels_last
        return [feature.contiguous(memory_format=layout) for feature in features]

    def classify(self, content: Tensor) -> Tensor:
        """Class logits ``(B, N, num_classes)`` of contents ``(B, N, C)``."""
        logits: Tensor = self.class_head(content)
        return logits

    @staticmethod
    def _move(position: Tensor, delta: Tensor) -> Tensor:
        """Shift the centre in units of the box's size, change log2 size and log2 aspect."""
        size = position[..., 2:3].exp2()
        return torch.cat(
            [position[..., :2] + delta[..., :2] * size, position[..., 2:] + delta[..., 2:]], dim=-1
        )
