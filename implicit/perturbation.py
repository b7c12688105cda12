"""Refinement-aware perturbation (RAP): noise on the solver path.

Wang, Teng and Wang, *Deep Equilibrium Object Detection*, ICCV 2023, §3.3.  A map that is trained
on states which noise has pushed off the path learns to bring them back.  Noise that the map has
already refined looks like the real error of a solver, more than noise added at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit.arguments import check_count, check_number
from implicit.state import State


@dataclass(frozen=True)
class BatchPart:
    """The chance of some samples of a batch, as it would be if the batch were whole.

    For a batch that is shared by processes, or done in parts: whoever holds a part draws the
    numbers of the whole batch, with a generator in the same state as that of the others, and keeps
    its own.  Then a sample meets the same noise however the batch is divided, and the coins of
    `Perturbation` are those of the whole batch.  It stands wherever a generator is asked for.

    Args:
        generator: in the same state for every part of the batch.
        size: samples in the whole batch.
        first: place in it of the first sample of this part.

    Example:
        >>> import torch
        >>> def seeded():
        ...     return torch.Generator().manual_seed(0)
        >>> y = torch.zeros(4, 3)
        >>> whole = standard_normal(y, seeded())
        >>> parts = [standard_normal(y[i : i + 2], BatchPart(seeded(), 4, i)) for i in (0, 2)]
        >>> torch.equal(torch.cat(parts), whole)
        True
    """

    generator: torch.Generator
    size: int
    first: int = 0

    def __post_init__(self) -> None:
        check_count("BatchPart", "size", self.size)
        if not 0 <= self.first < self.size:
            raise ValueError(
                f"BatchPart(first={self.first}): must lie from 0 to {self.size - 1}, for a batch "
                f"of {self.size}."
            )


RandomSource = torch.Generator | BatchPart
"""Where random numbers come from; ``None`` in its place is torch's global generator."""

Noise = Callable[[State, Any], State]
"""Takes a state and a `RandomSource` or ``None``; returns a noisy state of the same structure."""

Entry = Literal["zero-step", "one-step", "multi-step"]


def standard_normal(like: Tensor, generator: RandomSource | None = None) -> Tensor:
    """Standard normal numbers in the shape, dtype and place of ``like``, from ``generator``.

    With a `BatchPart` the first dimension of ``like`` counts the samples of the part.
    """
    shape, part = like.shape, slice(None)
    if isinstance(generator, BatchPart):
        end = generator.first + len(like)
        if end > generator.size:
            raise ValueError(
                f"{len(like)} samples from place {generator.first} on are more than a batch of "
                f"{generator.size} has: give BatchPart the size of the whole batch."
            )
        shape, part = torch.Size((generator.size, *shape[1:])), slice(generator.first, end)
        generator = generator.generator
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise[part].to(like.device)


@dataclass(frozen=True)
class GaussianNoise:
    """``y + ε`` with ``ε ~ N(0, σ² I)`` on every leaf of the state (Eq. 13).

    Example:
        >>> import torch
        >>> GaussianNoise(0.0)(torch.ones(2, 3), None).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    sigma: float

    def __post_init__(self) -> None:
        check_number("GaussianNoise", "sigma", self.sigma, least=0)

    def __call__(self, state: State, generator: RandomSource | None = None) -> State:
        def noisy(leaf: Tensor) -> Tensor:
            return leaf + self.sigma * standard_normal(leaf, generator)

        return pytree.tree_map(noisy, state)


@dataclass(frozen=True)
class NormScaledNoise:
    """``(1 − σ) q + σ ‖q‖₂ n`` with ``n ~ N(0, I)`` per element (Eq. 16).

    The norm is taken over the last dimension of each leaf, so the noise vector is about
    ``σ √C`` times as long as ``q`` for ``C`` channels.  A leaf ``(B,)`` has one channel.

    Example:
        >>> import torch
        >>> NormScaledNoise(0.1)(torch.zeros(2, 3), None).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    sigma: float

    def __post_init__(self) -> None:
        check_number("NormScaledNoise", "sigma", self.sigma, least=0, most=1)

    def __call__(self, state: State, generator: RandomSource | None = None) -> State:
        def noisy(leaf: Tensor) -> Tensor:
            alone = leaf.dim() == 1  # its only dimension is the batch
            length = leaf.abs() if alone else torch.linalg.vector_norm(leaf, dim=-1, keepdim=True)
            return (1 - self.sigma) * leaf + self.sigma * length * standard_normal(leaf, generator)

        return pytree.tree_map(noisy, state)


@dataclass(frozen=True)
class Perturbation:
    """Which noise, how often, and where it enters.

    Args:
        noise: `GaussianNoise`, `NormScaledNoise`, or any callable ``(state, generator) -> state``.
        probability: of each chance for noise being taken, one coin for the whole batch.
        entry: ``"multi-step"`` (Eq. 15): before every step of the path, where it stays and is
            refined on; ``"one-step"`` (Eq. 14): before the last step to a supervised position,
            which only that position sees; ``"zero-step"`` (Eq. 13): on the supervised state
            itself.

    Example:
        >>> Perturbation(GaussianNoise(0.1), probability=0.2).entry
        'multi-step'
    """

    noise: Noise
    probability: float = 0.2
    entry: Entry = "multi-step"

    def __post_init__(self) -> None:
        if not callable(self.noise):
            raise TypeError(f"Perturbation: noise must be callable, not {self.noise!r}.")
        check_number("Perturbation", "probability", self.probability, least=0, most=1)
        if self.entry not in ("zero-step", "one-step", "multi-step"):
            raise ValueError(
                f"Perturbation(entry={self.entry!r}): use 'zero-step', 'one-step' or 'multi-step'."
            )

    def __call__(self, state: State, generator: RandomSource | None = None) -> State:
        """The state with noise, or as it was, as the coin falls."""
        source = generator.generator if isinstance(generator, BatchPart) else generator
        device = "cpu" if source is None else source.device
        coin = torch.rand((), generator=source, device=device) < self.probability
        if coin.device.type == "cpu":  # known to the host already: nothing waits for the device
            return self.noise(state, generator) if bool(coin) else state
        noisy = self.noise(state, generator)
        return pytree.tree_map(lambda new, old: torch.where(coin, new, old), noisy, state)
