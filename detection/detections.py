"""Detections of one image, and how they are read off a decoder's output.

A set predictor needs no suppression of overlaps: every (query, class) pair is a candidate, and the
highest sigmoid scores are the detections (Zhu et al., *Deformable DETR*, ICLR 2021, whose
selection AdaMixer and DEQDet share).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.data.types import Categories
from detection.drawing import legible_scale
from detection.files import replacing
from detection.sources import ImageLike, NamedImage, read_image_of


class Detection(NamedTuple):
    """One object.

    Attributes:
        box: ``(x1, y1, x2, y2)`` in pixels of the original image.
        score: in [0, 1].
        label: contiguous class index.
        class_name: `None` where the classes are not known.
        category_id: of the data that the model was trained on; `None` where it is not known.
    """

    box: tuple[float, float, float, float]
    score: float
    label: int
    class_name: str | None
    category_id: int | None


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, the surest first.

    ``len`` counts them, iteration gives each as a `Detection`, and an index, a slice or a mask
    chooses: ``found[0]`` is a `Detection`, ``found[:5]`` and ``found[found.scores > 0.5]`` are
    `Detections` again.

    Attributes:
        boxes: ``(K, 4)`` float32, xyxy in pixels of the original image; not clipped to it.
        scores: ``(K,)`` float32 in [0, 1], falling.
        labels: ``(K,)`` int64, contiguous class indices.
        categories: what the labels stand for; `None` if nobody has said.
        steps: refinements that the image took; `None` where no fixed point is solved for.
        residual: relative residual of the last of them.
        source: the image that this was found in; it is read again when it is drawn upon.

    Raises:
        ValueError: if the shapes do not belong together.

    Example:
        >>> found = Detections(
        ...     torch.tensor([[8.0, 8.0, 40.0, 24.0], [0.0, 0.0, 9.0, 9.0]]),
        ...     torch.tensor([0.9, 0.2]),
        ...     torch.tensor([1, 0]),
        ...     Categories(("cat", "dog"), (17, 18)),
        ... )
        >>> len(found), len(found.above(0.5)), found.class_names, found.category_ids
        (2, 1, ['dog', 'cat'], [18, 17])
        >>> found
        Detections(2: dog 0.90, cat 0.20)
        >>> [(one.class_name, one.box) for one in found[:1]]
        [('dog', (8.0, 8.0, 40.0, 24.0))]
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    categories: Categories | None = None
    steps: int | None = None
    residual: float | None = None
    source: NamedImage | None = None

    def __post_init__(self) -> None:
        count = self.scores.shape[0] if self.scores.ndim == 1 else -1
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,):
            raise ValueError(
                "Detections: boxes, scores and labels must be (K, 4), (K,) and (K,), not "
                f"{tuple(self.boxes.shape)}, {tuple(self.scores.shape)} and "
                f"{tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        names: Sequence[str | None] = [None] * len(self)
        ids: Sequence[int | None] = [None] * len(self)
        if self.categories is not None:
            names, ids = self.class_names, self.category_ids
        columns = (self.scores.tolist(), self.labels.tolist(), names, ids)
        for box, *others in zip(self.boxes.tolist(), *columns, strict=True):
            yield Detection(tuple(box), *others)

    @overload
    def __getitem__(self, which: int) -> Detection: ...

    @overload
    def __getitem__(self, which: slice | Tensor | Sequence[int]) -> Detections: ...

    def __getitem__(self, which: int | slice | Tensor | Sequence[int]) -> Detection | Detections:
        if isinstance(which, int):
            place = range(len(self))[which]  # IndexError beyond the last
            return next(iter(self[place : place + 1]))
        return replace(
            self, boxes=self.boxes[which], scores=self.scores[which], labels=self.labels[which]
        )

    def __repr__(self) -> str:
        names = self.class_names if self.categories else [f"class {n}" for n in self.labels]
        shown = [f"{n} {s:.2f}" for n, s in zip(names, self.scores.tolist(), strict=True)][:5]
        text = f"{len(self)}: " + ", ".join(shown) if shown else "none"
        text += ", …" if len(self) > len(shown) else ""
        if self.steps is not None:
            text += f"; {self.steps} refinements"
        if self.residual is not None:
            text += f", residual {self.residual:.1e}"
        return f"Detections({text})"

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class.

        Raises:
            ValueError: if the classes are not known.
        """
        names = self._known(None).names
        return [names[label] for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        """The id of each detection's class in the data that the model was trained on.

        Raises:
            ValueError: if the classes are not known.
        """
        ids = self._known(None).ids
        return [ids[label] for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """Those with a score of at least ``threshold``."""
        return self[self.scores >= threshold]

    def plot(
        self,
        image: ImageLike | None = None,
        *,
        threshold: float = 0.3,
        scale: float | None = None,
    ) -> Image.Image:
        """A picture of the image with the detections on it.

        Args:
            image: to draw on; by default the one that this was found in, which is read again.
            threshold: lowest score that is drawn.
            scale: enlargement; by default small images are enlarged until labels can be read.

        Raises:
            ValueError: if there is no image, or the classes are not known.
            DataError: if the image cannot be read (any more).
        """
        from detection.visualization import draw_detections  # which knows Detections

        if image is None and self.source is None:
            raise ValueError("These detections do not know their image: give plot(image).")
        pixels = read_image_of(image) if image is not None else cast(NamedImage, self.source).read()
        scale = legible_scale((pixels.shape[1], pixels.shape[2])) if scale is None else scale
        return draw_detections(pixels, self, self._known(None), threshold=threshold, scale=scale)

    def save(self, path: Path | str, *, threshold: float = 0.3, image_id: int = 0) -> Path:
        r"""Write a picture (``.png``, ``.jpg``, …) as `plot` draws it, or COCO records (``.json``).

        The file appears whole or not at all.

        Args:
            path: its ending says which; folders are made.
            threshold: lowest score that is drawn; a ``.json`` file has all detections.
            image_id: of the image in the ``.json`` file.

        Returns:
            The path.

        Raises:
            ValueError: if the ending is of no kind of picture that Pillow writes; as `plot` does.

        Example:
            >>> import tempfile
            >>> found = Detections(
            ...     torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([0]),
            ...     Categories(("cat",), (17,)),
            ... )
            >>> found.save(Path(tempfile.mkdtemp()) / "found.json").read_text()
            '[{"image_id": 0, "category_id": 17, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}]\n'
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            text = json.dumps(self.to_coco(image_id)) + "\n"
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return path
        from detection.visualization import save_image

        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(
                f"{path}: the name must end in .json, or as pictures do (.png, .jpg, …)."
            )
        save_image(self.plot(threshold=threshold), path)
        return path

    def to_coco(
        self, image_id: int = 0, categories: Categories | None = None
    ) -> list[dict[str, Any]]:
        """COCO result records: ``[x, y, w, h]`` boxes and the original category ids.

        Args:
            image_id: of the image in the annotations.
            categories: what the labels stand for, where the detections do not know it.

        Raises:
            ValueError: if the classes are not known.

        Example:
            >>> found = Detections(
            ...     torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([1])
            ... )
            >>> found.to_coco(7, Categories(("cat", "dog"), (17, 18)))
            [{'image_id': 7, 'category_id': 18, 'bbox': [1.0, 2.0, 3.0, 6.0], 'score': 0.5}]
        """
        ids = self._known(categories).ids
        corners = self.boxes.double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        return [
            {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
            for box, score, label in zip(
                boxes, self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``, with names and original ids in its ``data``.

        Raises:
            ImportError: if the package is not installed.
            ValueError: if the classes are not known.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                'to_supervision() needs a package: pip install "implicit[supervision]".'
            ) from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={
                "class_name": np.array(self.class_names, dtype=str),
                "category_id": np.array(self.category_ids, dtype=np.int64),
            },
        )

    def _known(self, categories: Categories | None) -> Categories:
        categories = categories or self.categories
        if categories is None:
            raise ValueError(
                "These detections do not know what their labels stand for: predict with a "
                "Predictor (detection.load), or give their Categories."
            )
        return categories


def select_detections(
    logits: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    original_sizes: Sequence[tuple[int, int]],
    max_detections: int = 100,
) -> list[Detections]:
    """The highest scores over queries and classes; a query may yield several classes.

    No threshold and no suppression of overlaps.  Equal scores keep the order of queries and
    classes, so the result does not depend on the device's sorting.

    Args:
        logits: ``(B, N, K)``.
        boxes: ``(B, N, 4)`` xyxy in pixels of the transformed images.
        sizes: ``(B, 2)`` (h, w) of the transformed images without padding.
        original_sizes: (h, w) of the files.
        max_detections: at most so many per image.

    Returns:
        One `Detections` per image, on the CPU.

    Raises:
        ValueError: if a shape does not fit, ``max_detections`` is below 1, or a score or a box to
            be returned is not finite; the image is named by its place in the batch.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0], [-1.0, 1.0]]])
        >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 8.0, 8.0]]])
        >>> found = select_detections(logits, boxes, torch.tensor([[8, 8]]), [(16, 16)], 2)[0]
        >>> found.labels.tolist(), found.boxes[1].tolist()
        ([1, 1], [8.0, 8.0, 16.0, 16.0])
    """
    batch, queries, classes = logits.shape
    if boxes.shape != (batch, queries, 4) or not batch == len(sizes) == len(original_sizes):
        raise ValueError(
            f"select_detections: logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}, "
            f"{len(sizes)} sizes and {len(original_sizes)} original sizes do not belong together; "
            "they must be (B, N, K), (B, N, 4), B and B."
        )
    if max_detections < 1:
        raise ValueError(f"max_detections={max_detections}: must be at least 1.")
    # Image by image: a processor rounds the last few elements of a tensor otherwise than the many
    # before them, and which these are depends on the batch.
    scores = torch.stack([image.sigmoid() for image in logits.float().flatten(1)])
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :max_detections]
    original = torch.tensor(original_sizes, device=sizes.device)
    scale = (original / sizes).flip(1).repeat(1, 2).to(boxes.device)
    picked = (boxes.float() * scale[:, None]).gather(
        1, (order // classes)[:, :, None].expand(-1, -1, 4)
    )
    picked, top, labels = picked.cpu(), scores.gather(1, order).cpu(), (order % classes).cpu()
    # NaN sorts first, so a score that is not a number is always among those picked.
    finite = picked.isfinite().all(-1) & top.isfinite()
    if not finite.all():
        place = int((~finite).any(1).nonzero()[0])
        raise ValueError(
            f"The model gave scores or boxes that are not finite for image {place} of the batch: "
            "its weights are damaged or its refinement diverges. Use an earlier checkpoint."
        )
    return [Detections(*found) for found in zip(picked, top, labels, strict=True)]
