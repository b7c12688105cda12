"""A function of tensors as a CUDA graph: recorded once, then launched as a whole.

What a graph asks of what it records, and who sees to it:

- It reads and writes the memory that it was recorded with: inputs are copied to buffers of its
  own, outputs are copied from others, and what the function closes over must neither move nor go.
- Nothing in it may wait for the device, nor be decided by what is on it: the function's part.
- Libraries choose their kernels and make their workspaces at first use, which cannot be recorded:
  the function runs some times before, on the stream that it is recorded on.
- Tensors made while recording come from a pool of the graph's own, which lives as long as it does.
  A weight that autocast has cast before lies elsewhere and would be freed: it is cast anew, at
  every replay, but for those that are cast beforehand (`detection.narrowing`).
- Random numbers would go on from replay to replay, as they do without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3
"""Runs before a graph is recorded."""


class Recorded:
    """``recorded(*inputs)`` is ``function(*inputs)``, for inputs of the shapes it was made with.

    Calls belong on one stream and do not overlap.  The graph is not differentiated.

    Args:
        function: of tensors or pytrees of them, and to such.  It is held, and with it what it
            closes over.
        inputs: to record with; they are copied.
        device: a GPU.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device
    ) -> None:
        self._function = function
        self._inputs = pytree.tree_map(lambda x: x.to(device, copy=True), inputs)
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*self._inputs)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        try:
            # Threads of a data loader may go on with what they do meanwhile.
            with (
                torch.cuda.device(device),
                torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"),
            ):
                self._output = function(*self._inputs)
        finally:
            torch.clear_autocast_cache()

    def __call__(self, *inputs: Any) -> Any:
        """The outputs, in memory of their own: the next replay writes to the graph's."""
        places, given = pytree.tree_leaves(self._inputs), pytree.tree_leaves(inputs)
        for place, value in zip(places, given, strict=True):
            place.copy_(value)
        self._graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._output)
