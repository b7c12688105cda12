"""Batches: padding, grouping by shape, sharding over ranks, and chance that can be repeated.

What an epoch draws depends on ``(seed, epoch)`` and nothing else: not on earlier epochs, not on
the number of workers or processes.  Every image has a seed of its own for its augmentation, so a
run that is resumed at any batch sees what the uninterrupted run would have seen.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from detection.data.coco import CocoDataset
from detection.data.errors import DataError
from detection.data.types import Batch, Target
from detection.randomness import seeded

STRIDE = 32
"""Images are padded to a multiple of the coarsest stride of the feature pyramid."""


WORKERS_ENDED = (
    "A process that reads images ended unexpectedly. Where new processes import the script again "
    "(Windows, macOS, multiprocessing's spawn and forkserver), its work must stand below "
    '`if __name__ == "__main__":`. Otherwise memory may be short, in /dev/shm as well: lower the '
    "number of workers; 0 reads the images in this process."
)


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """``(height, width)`` rounded up to multiples of 32.

    Example:
        >>> padded_size((800, 1067))
        (800, 1088)
    """
    return -(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad images right and bottom with 0 to a common multiple of 32 and stack them.

    Args:
        samples: pairs of an image ``(3, h, w)`` uint8 and its target.

    Example:
        >>> target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7, (60, 90))
        >>> batch = collate([(torch.ones(3, 60, 90, dtype=torch.uint8), target)])
        >>> batch.images.shape, batch.sizes.tolist()
        (torch.Size([1, 3, 64, 96]), [[60, 90]])
    """
    sizes = torch.tensor([image.shape[-2:] for image, _ in samples], dtype=torch.int64)
    height, width = padded_size((int(sizes[:, 0].max()), int(sizes[:, 1].max())))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    for canvas, (image, _) in zip(images, samples, strict=True):
        canvas[:, : image.shape[-2], : image.shape[-1]] = image
    return Batch(images=images, sizes=sizes, targets=tuple(target for _, target in samples))


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(index, seed)`` for one rank, shuffled anew in every epoch.

    What all ranks do in one step is one batch of ``world_size * batch_size`` images, of which each
    rank has the part of its number; so the steps are the same for any number of ranks.  Such a
    batch holds only landscape (width >= height) or only portrait images, which keeps padding low.
    No image occurs twice in an epoch, and what does not fill a batch is left out of it.

    Args:
        sizes: ``(height, width)`` of every image.
        batch_size: images per batch and rank.
        seed: not negative.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: there are too few images for one batch on every rank.

    Example:
        >>> batches = TrainingBatches([(4, 6)] * 7, batch_size=3, seed=0)
        >>> len(batches), [len(batch) for batch in batches]
        (2, [3, 3])
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._portrait = [height > width for height, width in sizes]
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        portrait, whole = sum(self._portrait), batch_size * world_size
        self._length = portrait // whole + (len(sizes) - portrait) // whole
        if not self._length:
            raise DataError(
                f"{len(sizes)} images ({portrait} of them portrait, which are batched apart) do "
                f"not fill one batch of {batch_size} on each of {world_size} processes; lower "
                "the batch size."
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iterations draw, and how many batches they leave out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        chance = np.random.default_rng((self.seed, self.epoch))
        order = chance.permutation(len(self._portrait)).tolist()
        seeds = chance.integers(2**62, size=len(order)).tolist()
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        emitted = 0
        for index in order:
            group = waiting[self._portrait[index]]
            group.append((index, seeds[index]))
            if len(group) == self.batch_size * self.world_size:
                if emitted >= self.start:
                    yield group[mine]
                group.clear()
                emitted += 1


class EvaluationBatches(Sampler[list[int]]):
    """Batches of indices in which all images have the same padded size.

    An image then meets the same padding however large the batches are and whoever is in them.
    Every image occurs once over all ranks; the batches are the same for any number of ranks.

    Args:
        sizes: ``(height, width)`` of every image after its transform.
        batch_size: most images per batch.
        rank: this process.
        world_size: number of processes.

    Example:
        >>> list(EvaluationBatches([(64, 64), (30, 64), (60, 50), (63, 64)], batch_size=2))
        [[0, 2], [3], [1]]
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(padded_size(size), []).append(index)
        batches = [
            group[start : start + batch_size]
            for group in groups.values()
            for start in range(0, len(group), batch_size)
        ]
        self._batches = batches[rank::world_size]

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Accepted for symmetry with `TrainingBatches`: every epoch of evaluation is the same."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class SeededDataset(Dataset[tuple[Tensor, Target]]):
    """A data set whose elements are asked for by ``(index, seed)``: the seed rules its chance."""

    def __init__(self, dataset: Dataset[tuple[Tensor, Target]]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        index, seed = key
        with seeded(seed):  # and then as before: without workers the generators are the model's too
            return self.dataset[index]


class HandingOn(Dataset["tuple[Tensor, Target] | DataError"]):
    """A data set that returns a `DataError` as an element, so that it leaves a worker whole.

    Raised in a worker, an error arrives as the text of two tracebacks.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, Target]]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> tuple[Tensor, Target] | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate_sound(samples: Sequence[tuple[Tensor, Target] | DataError]) -> Batch | DataError:
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    return errors[0] if errors else collate(samples)  # type: ignore[arg-type]


class BatchLoader(DataLoader[Any]):
    """A `torch.utils.data.DataLoader` of `Batch` whose epochs are chosen by `set_epoch`."""

    batch_sampler: TrainingBatches | EvaluationBatches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches of an epoch; a `DataError` of a worker is raised here as it was there."""
        try:
            for batch in super().__iter__():
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "bootstrapping" not in str(error):
                raise
            raise RuntimeError(WORKERS_ENDED) from error

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iterations draw, and how many batches they leave out."""
        self.batch_sampler.set_epoch(epoch, start)


def make_loader(
    dataset: CocoDataset,
    batch_size: int,
    *,
    training: bool,
    workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """A loader of `Batch` for one process.

    Args:
        dataset: its transform must have an ``output_size`` for evaluation (`eval_transform`).
        batch_size: images per batch and process.
        training: shuffled full batches of like orientation (`TrainingBatches`; call
            ``set_epoch`` before each epoch), or every image once (`EvaluationBatches`).
        workers: processes that read images; 0 reads in this one.  The batches are the same.
        seed: of the order and of the augmentation.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: an argument is out of its range.
        DataError: too few images for a training batch on every process.
        RuntimeError: called by a process that a loader has started, where the system starts
            processes by running the script anew (Windows, macOS, ``spawn``).

    Example:
        >>> import pathlib, tempfile
        >>> from detection.data import compose_digits, load_coco_folder
        >>> root = compose_digits(
        ...     pathlib.Path(tempfile.mkdtemp()) / "digits", train_images=5, val_images=1)
        >>> train, _ = load_coco_folder(root)
        >>> loader = make_loader(train, 2, training=True, workers=0, seed=0)
        >>> loader.set_epoch(3)
        >>> [batch.images.shape[0] for batch in loader]
        [2, 2]
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("seed", seed, 0),
        ("world_size", world_size, 1),
    ):
        if value < least:
            raise ValueError(f"make_loader({name}={value}): at least {least}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"make_loader(rank={rank}): must be from 0 to {world_size - 1}.")
    if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "A process that loads images runs the script anew, from its beginning. Put what the "
            'script does under\n\n    if __name__ == "__main__":\n\nor choose workers=0.'
        )
    source: Dataset[tuple[Tensor, Target]]
    sampler: TrainingBatches | EvaluationBatches
    if training:
        source = SeededDataset(dataset)
        sampler = TrainingBatches(dataset.sizes, batch_size, seed, rank, world_size)
    else:
        source = dataset
        sampler = EvaluationBatches(_output_sizes(dataset), batch_size, rank, world_size)
    return BatchLoader(
        HandingOn(source),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate_sound,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # The workers' base seed: drawn here, it leaves the global generator alone.
        generator=torch.Generator().manual_seed(seed),
    )


def _output_sizes(dataset: CocoDataset) -> list[tuple[int, int]]:
    if dataset.transform is None:
        return dataset.sizes
    output_size = getattr(dataset.transform, "output_size", None)
    if output_size is None:
        raise ValueError(
            "make_loader(training=False): the size of the data set's images after their transform "
            "cannot be told; give the data set an eval_transform(...)."
        )
    return [output_size(size) for size in dataset.sizes]
