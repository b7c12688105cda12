"""A detector at inference on a GPU, with nothing between the device and its work.

Eagerly, 25 refinements are some two thousand small kernels, and the host needs longer to launch
them than the device to run them.  A CUDA graph is launched as a whole.  It replays what was
recorded for one shape of images, so there is one graph for each shape, recorded at its first use
(`detection.cuda_graphs`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from detection.cuda_graphs import Recorded
from detection.decoder.queries import Queries
from detection.decoder.sparse_rcnn import SparseRCNNLayer
from detection.models.decoders import EquilibriumDecoder, Output
from detection.models.detector import Detector
from detection.narrowing import narrowed
from implicit import Best, NewtonKrylov
from implicit.solvers import WholeSolver


class Engine:
    """``engine(images, sizes)`` is ``model(images, sizes)``, faster on a GPU.

    Every image takes the same number of refinements there, since a graph cannot wait to see whether
    an image is done: those of the configuration, or its most where that says ``"auto"``.  But for
    that its output is the model's, ``queries`` and ``steps`` included.  Matrix products run in
    ``dtype``, as under autocast, and their weights are cast once, at the beginning
    (`detection.narrowing`); boxes, and the logarithms of their overlaps, stay in float32.  Calls
    wait for each other, and belong on one stream.  Elsewhere than on a GPU nothing is recorded, and
    neither is what waits for the device, Sparse R-CNN's layer or a solver such as
    `implicit.NewtonKrylov`: the model then runs as it does without an engine.

    Args:
        model: on the device where it is to run; put in evaluation mode, and otherwise left alone.
            Make another engine when its weights have changed or moved: this one has a copy of
            them, except in float32, where it has none and a graph reads those of the model.
        dtype: of matrix products: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        most_shapes: graphs that are kept, each with memory of its own; the one that was not used
            for longest goes.

    Raises:
        ValueError: if ``dtype`` is another, or ``most_shapes`` is below 1.

    Example:
        >>> from detection.recipes import recipe
        >>> model = Detector(recipe("deqdet_digits").model)
        >>> engine = Engine(model, dtype=torch.float32)
        >>> engine(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]])).boxes.shape
        torch.Size([1, 20, 4])
    """

    def __init__(
        self, model: Detector, *, dtype: torch.dtype = torch.bfloat16, most_shapes: int = 8
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"Engine(dtype={dtype}): use torch.bfloat16, float16 or float32.")
        if most_shapes < 1:
            raise ValueError(f"Engine(most_shapes={most_shapes}): must be at least 1.")
        self.model, self.dtype, self.most_shapes = model.eval(), dtype, most_shapes
        # Where nothing is to be cast it needs no memory of its own.
        self._own = model if dtype == torch.float32 else narrowed(model, dtype)
        self._can_record = not any(isinstance(m, SparseRCNNLayer) for m in model.modules())
        self._lock = Lock()
        self._recorded: OrderedDict[tuple[Any, ...], Recorded] = OrderedDict()

    # Not in inference mode: the buffers of a graph that was recorded in it could not be written to
    # outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> Output:
        """The output for ``images (B, 3, H, W)`` and ``sizes (B, 2)``, on the model's device."""
        if not self._records:
            return self._run(images.to(self._device), sizes.to(self._device))
        with self._lock:
            return self._replay(images, sizes)

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, images: Tensor, sizes: Tensor) -> tuple[Sequence[Tensor], Queries]:
        """`Detector.encode` as a call has it, in the same precision; nothing is recorded."""
        with self._precision(images.device.type):
            return self._own.encode(images, sizes)

    @property
    def _device(self) -> torch.device:
        return self.model.pixel_mean.device

    @property
    def _config(self) -> Any:
        """That of the model's decoder: it says how many refinements there are, and may change."""
        return getattr(self.model.decoder, "config", None)

    @property
    def _records(self) -> bool:
        return (
            self._can_record
            and self._device.type == "cuda"
            and not _waits(getattr(self._config, "eval_solver", None))
        )

    def _replay(self, images: Tensor, sizes: Tensor) -> Output:
        key = images.shape, images.dtype, sizes.dtype, self._config
        if key not in self._recorded:
            while len(self._recorded) >= self.most_shapes:
                self._recorded.popitem(last=False)  # before, so that its memory can be used
            self._recorded[key] = Recorded(self._run, (images, sizes), self._device)
        self._recorded.move_to_end(key)
        output: Output = self._recorded[key](images, sizes)
        return output

    def _run(self, images: Tensor, sizes: Tensor) -> Output:
        decoder = self._own.decoder
        with self._precision(images.device.type):
            if isinstance(decoder, EquilibriumDecoder):
                decoder.config = self._config
            if not (self._records and isinstance(decoder, EquilibriumDecoder)):
                output: Output = self._own(images, sizes)
            else:
                encoded = self._own.encode(images, sizes)
                output = decoder(*encoded, stop=decoder.config.fixed_stop)
        return output

    def _precision(self, device: str) -> torch.autocast:
        if self.dtype == torch.float32:  # also where the caller is under autocast
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, self.dtype)


def _waits(solver: Any) -> bool:
    """Whether a solver reads what the device has found, at every step or in a loop of its own."""
    inner = solver.solver if isinstance(solver, Best) else solver
    return isinstance(inner, (NewtonKrylov, WholeSolver))
