"""The detector: backbone, neck, queries, decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import implicit
from detection.decoder.queries import Queries
from detection.models.backbones import build_backbone, load_backbone
from detection.models.config import ModelConfig
from detection.models.decoders import Criterion, Output, Supervised, build_decoder
from detection.models.neck import ChannelMapper
from detection.models.queries import LearnedQueries
from implicit.perturbation import RandomSource

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""Of ImageNet, RGB, on the scale 0–255."""


class Detector(nn.Module):
    """A query-based detector: DEQDet, RNNDet or AdaMixer, as its configuration says.

    Shapes: images ``(B, 3, H, W)`` RGB on the scale 0–255 (uint8 or floating point), padded at
    the right and bottom to a multiple of 32; sizes ``(B, 2)`` int64, (h, w) without the padding.

    Example:
        >>> import torch
        >>> from detection.models.config import BackboneConfig, ModelConfig
        >>> from detection.decoder.layer import LayerConfig
        >>> layer = LayerConfig(
        ...     content_dim=32, feature_channels=32, heads=4, points=4, out_points=8,
        ...     ffn_channels=64, num_classes=3,
        ... )
        >>> config = ModelConfig(
        ...     BackboneConfig("small", pretrained=False), layer=layer, num_queries=5
        ... )
        >>> model = Detector(config).eval()
        >>> images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
        >>> with torch.no_grad():
        ...     output = model(images, torch.tensor([[64, 96], [50, 80]]))
        >>> output.logits.shape, output.boxes.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 4]))
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.layer.feature_channels
        backbone = config.backbone
        self.backbone = build_backbone(
            backbone.name,
            pretrained=backbone.pretrained and not backbone.weights,
            frozen_stages=backbone.frozen_stages,
        )
        if backbone.weights:
            load_backbone(self.backbone, backbone.weights)
        self.neck = ChannelMapper(
            self.backbone.channels,
            channels,
            kernel_size=config.neck.kernel_size,
            activation=config.neck.activation,
        )
        self.queries = LearnedQueries(config.num_queries, config.layer.content_dim)
        self.decoder = build_decoder(config.layer, config.decoder)
        self.register_buffer(
            "pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        *,
        stop: implicit.Steps | implicit.Tolerance | None = None,
        start: Queries | None = None,
    ) -> Output:
        """Detect: the output of the last refinement.

        ``stop`` and ``start`` are those of `EquilibriumDecoder.forward`; other decoders have none.

        In evaluation mode on a CPU images go through one by one: matrix products round otherwise
        in another batch, refinement makes the difference larger, and what is found in an image
        would depend on its neighbours.  That costs time with small images alone.
        """
        if self.training or not images.is_cpu or len(images) == 1:
            return self._detect(images, sizes, stop, start)
        return Output.joined(
            [
                self._detect(image, size, stop, start and Queries(*(x[i : i + 1] for x in start)))
                for i, (image, size) in enumerate(zip(images.split(1), sizes.split(1), strict=True))
            ]
        )

    def _detect(
        self,
        images: Tensor,
        sizes: Tensor,
        stop: implicit.Steps | implicit.Tolerance | None,
        start: Queries | None,
    ) -> Output:
        given = {"stop": stop, "start": start}
        options = {name: value for name, value in given.items() if value is not None}
        output: Output = self.decoder(*self.encode(images, sizes), **options)
        return output

    def losses(
        self,
        images: Tensor,
        sizes: Tensor,
        criterion: Criterion,
        generator: RandomSource | None = None,
        loss_scale: float = 1.0,
    ) -> Supervised:
        """The training loss of a batch; see `detection.training.losses.Criterion`."""
        features, queries = self.encode(images, sizes)
        return self.decoder.losses(features, queries, criterion, generator, loss_scale)

    def encode(self, images: Tensor, sizes: Tensor) -> tuple[Sequence[Tensor], Queries]:
        """What a decoder starts from: feature maps and initial queries."""
        features = self.neck(self.backbone(self.normalise(images, sizes)))
        return tuple(self.decoder.first.prepare(features)), self.queries(sizes)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Pixels in units of ImageNet's mean and deviation, with the padding set to 0."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, 0, None]
        columns = torch.arange(width, device=images.device) < sizes[:, 1, None]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        # Convolutions take the layout of their input, and are faster in this one.  Weights keep
        # theirs: torch's fused optimisers mistake one layout for another in a loaded state.
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.pixel_mean) / self.pixel_std * inside
