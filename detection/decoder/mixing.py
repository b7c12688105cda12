"""Adaptive mixing: a query makes the weights that mix its sampled features (AdaMixer).

First the channels of all points are mixed by one matrix, then the points by another; both are
generated from the content of the query, for each channel group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.decoder.recomputation import forgetting


class AdaptiveMixing(nn.Module):
    """``x ← relu(LN(x M)); x ← relu(LN(S x))``, then a linear layer to the content's width.

    ``M`` (E×E, channel mixing) and ``S`` (P_out×P, spatial mixing) come from a linear layer on
    the content; the norms run over the whole matrix and have no parameters.

    Args:
        content_dim: channels of the content.
        feature_channels: ``C``; ``E = C/groups``.
        groups: channel groups.
        points: ``P`` per group.
        out_points: ``P_out``.

    Example:
        >>> import torch
        >>> mixing = AdaptiveMixing(16, feature_channels=8, groups=2, points=4, out_points=6)
        >>> mixing(torch.randn(2, 3, 16), torch.randn(2, 3, 2, 4, 4)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self, content_dim: int, feature_channels: int, groups: int, points: int, out_points: int
    ) -> None:
        super().__init__()
        if feature_channels % groups:
            raise ValueError(f"{feature_channels} channels cannot be split into {groups} groups.")
        self.groups, self.points, self.out_points = groups, points, out_points
        self.channels = feature_channels // groups
        self.sizes = (self.channels**2, out_points * points)
        self.generator = nn.Linear(content_dim, groups * sum(self.sizes))
        self.project_out = nn.Linear(groups * out_points * self.channels, content_dim)
        nn.init.zeros_(self.generator.weight)
        nn.init.xavier_uniform_(self.project_out.weight)

    def forward(self, content: Tensor, sampled: Tensor) -> Tensor:
        """Mixed features ``(B, N, content_dim)`` of ``sampled (B, N, G, P, C/G)``."""
        batch, queries, width = content.shape
        content, sampled = content.flatten(0, 1), sampled.flatten(0, 1)
        by_group = content.is_cpu and not torch.is_grad_enabled()
        mix = self._mix_by_group if by_group else self._mix_at_once
        return mix(content, sampled).view(batch, queries, width)

    def _mix_at_once(self, content: Tensor, sampled: Tensor) -> Tensor:
        """All groups together, as autograd likes it.

        Where it is much, the generated matrices alone are kept for the backward pass, and what
        they make is made again: a tenth of the work and two thirds of the memory.
        """
        weight, bias = self.project_out.weight, self.project_out.bias
        matrices = self.generator(content)
        elements = len(content) * weight.shape[1]
        return forgetting(self._mix, sampled, matrices, weight, elements=elements) + bias

    def _mix_by_group(self, content: Tensor, sampled: Tensor) -> Tensor:
        """Group after group, so that each finds its memory where the last one has left it.

        A processor would otherwise spend a quarter of the time on getting new memory.
        """
        into = self.generator.weight.view(self.groups, -1, content.shape[1])
        bias = self.generator.bias.view(self.groups, -1)
        out_of = self.project_out.weight.view(content.shape[1], self.groups, -1)
        mixed: Tensor = self.project_out.bias
        for g in range(self.groups):
            matrices = F.linear(content, into[g], bias[g])
            mixed = mixed + self._mix(sampled[:, g : g + 1], matrices, out_of[:, g])
        return mixed

    def _mix(self, sampled: Tensor, matrices: Tensor, projection: Tensor) -> Tensor:
        """``(n, content_dim)`` without the bias, of some groups: ``sampled (n, g, P, E)``."""
        x = sampled.flatten(0, 1)
        channel, spatial = matrices.view(x.shape[0], -1).split(self.sizes, dim=1)
        x = x @ channel.view(-1, self.channels, self.channels)
        x = F.relu(F.layer_norm(x, x.shape[1:]), inplace=True)
        x = spatial.view(-1, self.out_points, self.points) @ x
        x = F.relu(F.layer_norm(x, x.shape[1:]), inplace=True)
        return F.linear(x.view(sampled.shape[0], -1), projection)
