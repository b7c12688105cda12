"""The neck: every feature map brought to the same number of channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ChannelMapper(nn.Module):
    """One convolution (and perhaps a ReLU) per level, then one GroupNorm shared by all levels.

    AdaMixer, and the parameter counts of the paper, have a 1×1 kernel and no activation; the
    published code of DEQDet has 3×3 and a ReLU.

    Args:
        in_channels: of each level.
        out_channels: of all levels; a multiple of the norm's groups.
        kernel_size: 1 or 3.
        activation: a ReLU before the norm.
        norm_groups: groups of the norm.

    Example:
        >>> import torch
        >>> neck = ChannelMapper([8, 16], 32)
        >>> [m.shape[1] for m in neck([torch.randn(1, 8, 4, 4), torch.randn(1, 16, 2, 2)])]
        [32, 32]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        kernel_size: int = 1,
        activation: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)
            for channels in in_channels
        ]
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.constant_(convolution.bias, 0.0)  # type: ignore[arg-type]
        self.convolutions = nn.ModuleList(convolutions)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()
        self.norm = nn.GroupNorm(norm_groups, out_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``(B, out_channels, H_l, W_l)``."""
        return [
            self.norm(self.activation(convolution(feature)))
            for convolution, feature in zip(self.convolutions, features, strict=True)
        ]
