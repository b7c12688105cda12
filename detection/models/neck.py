"""The neck: every feature map brought to the same number of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
            self._normalised(self.activation(convolution(feature)))
            for convolution, feature in zip(self.convolutions, features, strict=True)
        ]

    def _normalised(self, x: Tensor) -> Tensor:
        # CUDA's kernel copies x to contiguous memory, and its output would be laid out anew for
        # the decoder: two passes over the largest tensors of all.  In training they stay, since
        # autograd would keep more of the composition.
        has_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if x.is_cuda and has_channels_last and not torch.is_grad_enabled():
            return channels_last_norm(x, self.norm)
        normalised: Tensor = self.norm(x)
        return normalised


def channels_last_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm(x)`` for ``x (B, C, H, W)`` in ``torch.channels_last``, which it stays in.

    Computed in float32 at least; the result is in the wider dtype of ``x`` and the weights, which
    is what autocast makes of it.

    Example:
        >>> norm = nn.GroupNorm(2, 4)
        >>> x = torch.randn(1, 4, 3, 5).to(memory_format=torch.channels_last)
        >>> torch.allclose(channels_last_norm(x, norm), norm(x), atol=1e-5)
        True
    """
    cells = x.permute(0, 2, 3, 1).unflatten(-1, (norm.num_groups, -1))  # (B, H, W, G, C/G)
    cells = cells.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(cells, dim=(1, 2, 4), correction=0, keepdim=True)
    scale = (variance + norm.eps).rsqrt() * norm.weight.view(norm.num_groups, -1)
    shift = norm.bias.view(norm.num_groups, -1) - mean * scale
    normalised = torch.addcmul(shift, cells, scale).flatten(-2).permute(0, 3, 1, 2)
    return normalised.to(torch.promote_types(x.dtype, norm.weight.dtype))
