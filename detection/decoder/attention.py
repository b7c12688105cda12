"""Self-attention among queries, biased by how far their boxes cover each other (AdaMixer)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.boxes import intersection_over_foreground


class BoxBiasedAttention(nn.Module):
    """Multi-head attention with logits ``q·k/√d + τ_head · log(IoF + 1e-7)``.

    ``IoF`` is that of the attending box (`detection.boxes.intersection_over_foreground`), without
    gradient; ``τ`` is learned, one per head.  Where tokens are multiplied in less precision than
    boxes have (float32), under autocast or in a module in bfloat16, products alone are in that:
    the logarithm, the logits and their softmax stay in float32.

    Args:
        content_dim: channels ``C`` of a query.
        heads: number of heads.

    Example:
        >>> attention = BoxBiasedAttention(16, heads=2)
        >>> boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(2, 3, 4)
        >>> attention(torch.randn(2, 3, 16), boxes).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, content_dim: int, heads: int) -> None:
        super().__init__()
        if content_dim % heads:
            raise ValueError(f"{content_dim} channels cannot be shared by {heads} heads.")
        self.heads = heads
        self.project_in = nn.Linear(content_dim, 3 * content_dim)
        self.project_out = nn.Linear(content_dim, content_dim)
        self.tau = nn.Parameter(torch.empty(heads))
        nn.init.xavier_uniform_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)
        nn.init.xavier_uniform_(self.project_out.weight)
        nn.init.uniform_(self.tau, 0.0, 4.0)

    def forward(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """Attended ``tokens (B, N, C)`` for boxes ``(B, N, 4)``; no residual is added."""
        batch, queries, channels = tokens.shape
        split = self.project_in(tokens).view(batch, queries, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = _attended(query, key, value, self.bias(boxes))
        return self.project_out(attended.transpose(1, 2).reshape(batch, queries, channels))

    def bias(self, boxes: Tensor) -> Tensor:
        """``(B, heads, N, N)`` what is added to the attention logits."""
        overlap = (intersection_over_foreground(boxes.detach()) + 1e-7).log()
        return self.tau[:, None, None] * overlap[:, None]


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q·k/√d + bias) v``, of ``(B, heads, N, d)`` and a bias ``(B, heads, N, N)``."""
    scale = 1 / math.sqrt(query.shape[-1])
    if query.dtype == bias.dtype:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    # torch's operator wants the bias in the dtype of the query.  It reaches τ·log 1e-7, where
    # neighbours in bfloat16 differ by a half.
    logits = torch.add(bias, query @ key.mT, alpha=scale)
    return logits.softmax(dim=-1).to(value.dtype) @ value
