"""What refinement starts from: learned contents, and the whole image as everybody's box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.boxes import encode_boxes
from detection.decoder.queries import Queries


class LearnedQueries(nn.Module):
    """``N`` learned content vectors, normalised to mean 0 and variance 1 on every use.

    The box of every query is the whole image without its padding; it is not learned.

    Args:
        num_queries: ``N``.
        content_dim: ``C``.

    Example:
        >>> queries = LearnedQueries(3, 8)(torch.tensor([[48, 64]]))
        >>> queries.content.shape, queries.boxes[0, 0].tolist()
        (torch.Size([1, 3, 8]), [0.0, 0.0, 64.0, 48.0])
    """

    def __init__(self, num_queries: int, content_dim: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.randn(num_queries, content_dim))

    def forward(self, sizes: Tensor) -> Queries:
        """Queries for images of ``sizes (B, 2)``, (h, w) in pixels."""
        batch, number = sizes.shape[0], len(self.content)
        content = F.layer_norm(self.content, self.content.shape[1:]).expand(batch, -1, -1)
        # bfloat16 has no room for the pixels of an image.
        dtype = torch.promote_types(content.dtype, torch.float32)
        boxes = F.pad(sizes.flip(1).to(dtype), (2, 0))[:, None].expand(-1, number, -1)
        return Queries(encode_boxes(boxes), content, boxes)
