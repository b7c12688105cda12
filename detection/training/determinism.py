"""The same bits from the same seed: no operation whose result depends on chance or timing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from detection.training.errors import TrainingError

WORKSPACES = (":4096:8", ":16:8")
"""Of cuBLAS: with these alone its products are the same each time."""


@contextmanager
def deterministic(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Make PyTorch refuse what is not deterministic; afterwards all is as it was.

    On the CPU training is deterministic anyway; there this proves it.

    Args:
        device: where the work is done.
        wanted: with ``False`` nothing is changed.

    Raises:
        TrainingError: on CUDA, if the environment does not make cuBLAS deterministic, which it
            has to before CUDA is first used.

    Example:
        >>> with deterministic(torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not wanted:
        yield
        return
    if device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        raise TrainingError(
            "deterministic=True on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG to "
            f"be {' or '.join(WORKSPACES)} from the start: export "
            f"CUBLAS_WORKSPACE_CONFIG={WORKSPACES[0]}, then run the same command."
        )
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2:]
