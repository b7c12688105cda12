"""The global random generators: their state as something to store, and chance that is repeatable.

Those of PyTorch (the CPU's and the current CUDA device's), of Python's `random` and of NumPy's
legacy interface.  The library draws from PyTorch's alone; a transform of a user may draw from any.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """State of every global generator, as tensors, numbers, strings and tuples of these."""
    version, words, following = random.getstate()
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": (version, torch.tensor(words), following),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave; that of CUDA only where there is CUDA.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(()), random.random()
        >>> set_random_states(states)
        >>> first == (torch.rand(()), random.random())
        True
    """
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, words, following = states["python"]
    random.setstate((version, tuple(words.tolist()), following))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def seed_all(seed: int) -> None:
    """Begin every global generator anew.

    Example:
        >>> seed_all(3)
        >>> first = random.random()
        >>> seed_all(3)
        >>> first == random.random()
        True
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Chance on the CPU that ``seed`` decides; afterwards it goes on as if nothing had been drawn.

    Example:
        >>> with seeded(5):
        ...     first = torch.rand(2)
        >>> with seeded(5):
        ...     print(bool((torch.rand(2) == first).all()))
        True
    """
    # Not CUDA's: nothing is drawn there, and to read its state would wait for the device.
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
