"""What the data hands to the detector: the target of an image, a padded batch, the categories.

Boxes are corners ``(x1, y1, x2, y2)`` in pixels of the transformed image before padding; labels
are contiguous class indices.  The ids of the COCO file live in `Categories` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detection.data.errors import DataError


@dataclass(frozen=True)
class Categories:
    """The classes of a data set: contiguous index = position, in ascending order of COCO id.

    Args:
        names: one name per class.
        ids: the category ids of the annotation file, ascending.

    Raises:
        DataError: no class, lengths that differ, or ids that do not ascend.

    Example:
        >>> categories = Categories(names=("cat", "dog"), ids=(17, 18))
        >>> categories.index_of(18), len(categories)
        (1, 2)
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.ids):
            raise DataError(
                f"Categories: {len(self.names)} names for {len(self.ids)} ids; "
                "give one name per id, and at least one."
            )
        if any(a >= b for a, b in zip(self.ids, self.ids[1:], strict=False)):
            raise DataError(f"Categories: the ids {self.ids} must ascend without repetition.")

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, category_id: int) -> int:
        """Contiguous index of a COCO category id; `DataError` if there is no such category."""
        try:
            return self.ids.index(category_id)
        except ValueError:
            raise DataError(
                f"There is no category with id {category_id}; the ids are {self.ids}."
            ) from None


@dataclass(frozen=True, eq=False)
class Target:
    """The objects of one image.

    Args:
        boxes: ``(G, 4)`` float32, corners in pixels of the transformed, unpadded image.
        labels: ``(G,)`` int64, contiguous class indices.
        image_id: the id in the annotation file.
        original_size: ``(height, width)`` of the file.

    Example:
        >>> target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7, (480, 640))
        >>> target.to("cpu").image_id
        7
    """

    boxes: Tensor
    labels: Tensor
    image_id: int
    original_size: tuple[int, int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """The same target with its tensors on ``device``."""
        return replace(
            self,
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step, padded right and bottom with 0 to a common multiple of 32.

    Args:
        images: ``(B, 3, H, W)`` uint8, RGB.
        sizes: ``(B, 2)`` int64, ``(height, width)`` of each image without its padding.
        targets: one `Target` per image.

    Example:
        >>> images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
        >>> target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7, (60, 90))
        >>> len(Batch(images, torch.tensor([[60, 90]]), (target,)).to("cpu"))
        1
    """

    images: Tensor
    sizes: Tensor
    targets: tuple[Target, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with all its tensors on ``device``."""
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            targets=tuple(target.to(device, non_blocking) for target in self.targets),
        )

    def split(self, parts: int) -> list[Batch]:
        """So many equal batches of consecutive images, with the padding of the whole."""
        size = len(self) // parts
        return [
            Batch(self.images[i : i + size], self.sizes[i : i + size], self.targets[i : i + size])
            for i in range(0, len(self), size)
        ]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a `torch.utils.data.DataLoader` calls this."""
        return Batch(
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            targets=tuple(
                replace(target, boxes=target.boxes.pin_memory(), labels=target.labels.pin_memory())
                for target in self.targets
            ),
        )
