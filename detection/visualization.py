"""Pictures of a run: detections on images, pages of them, a film of the refinement, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from detection.boxes import generalized_iou
from detection.curves import plot_training
from detection.data.types import Categories
from detection.detections import Detections
from detection.drawing import (
    INK,
    PALETTE,
    PAPER,
    WHITE,
    Canvas,
    as_picture,
    class_colour,
    fitted,
    font,
)
from detection.files import replacing

__all__ = ["contact_sheet", "draw_detections", "plot_training", "refinement_film", "save_image"]


def save_image(image: Image.Image, path: Path | str) -> None:
    """Write an image in the format that the path's ending names.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pictures" / "black.png"
        >>> save_image(Image.new("RGB", (4, 4)), path)
        >>> with Image.open(path) as picture:
        ...     picture.size
        (4, 4)
    """
    with replacing(path) as temporary:
        image.save(temporary)


def draw_detections(
    image: Tensor | Image.Image,
    detections: Detections,
    categories: Categories,
    *,
    truth: tuple[Tensor, Tensor] | None = None,
    threshold: float = 0.3,
    scale: float = 1,
) -> Image.Image:
    """An image with its detections, each in the colour of its class with name and score.

    True boxes are dashed white lines; those that no drawn detection agrees with (same class,
    GIoU above 1/2) carry their class name as well.

    Args:
        image: ``(3, H, W)`` uint8 RGB, or a Pillow image.
        detections: boxes in pixels of ``image``.
        categories: their classes.
        truth: boxes ``(G, 4)`` in pixels of ``image``, and labels ``(G,)``.
        threshold: lowest score that is drawn.
        scale: enlargement of the image; small images need it for legible labels.

    Raises:
        ValueError: if a tensor is not ``(3, H, W)`` of uint8, or ``scale`` not positive.

    Example:
        >>> image = torch.full((3, 32, 48), 90, dtype=torch.uint8)
        >>> found = Detections(
        ...     torch.tensor([[8.0, 8.0, 40.0, 24.0]]), torch.tensor([0.8]), torch.tensor([0])
        ... )
        >>> draw_detections(image, found, Categories(("cat",), (17,)), scale=4).size
        (192, 128)
    """
    canvas = Canvas(as_picture(image, scale), scale)
    shown = detections.above(threshold)
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    boxes, labels = (part.cpu() for part in truth or empty)
    # Below the detections: where both agree, the colour of the class is seen.
    for box in boxes:
        canvas.dashed(box)
    # The surest lies on top, and its label has the first choice of a place.
    for box, label in zip(shown.boxes.flip(0), shown.labels.flip(0).tolist(), strict=True):
        canvas.outline(box, class_colour(label))
    for box, score, label in zip(
        shown.boxes, shown.scores.tolist(), shown.labels.tolist(), strict=True
    ):
        canvas.tag(box, categories.names[label], class_colour(label), f"{score:.2f}")
    agrees = generalized_iou(boxes[:, None], shown.boxes[None]) > 0.5
    agrees &= labels[:, None] == shown.labels
    for row in (~agrees.any(1)).nonzero().flatten().tolist():
        canvas.tag(boxes[row], categories.names[int(labels[row])], WHITE)
    return canvas.picture


def contact_sheet(
    images: Sequence[Image.Image], columns: int, title: str | None = None
) -> Image.Image:
    """A page of images in rows, each in the middle of a cell as large as the largest.

    Raises:
        ValueError: if there are no images or no columns.

    Example:
        >>> page = contact_sheet([Image.new("RGB", (100, 80))] * 3, columns=2)
        >>> page.width > 200, page.height > 160
        (True, True)
    """
    if not images or columns < 1:
        raise ValueError(
            f"contact_sheet: {len(images)} images in {columns} columns; at least one of each."
        )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    gap = max(6, round(0.035 * min(width, height)))
    margin = 2 * gap
    page_width = 2 * margin + columns * width + (columns - 1) * gap
    letters = font(min(max(page_width // 52, 12), 40))
    head = margin if title is None else margin + 2 * int(letters.size)
    page_height = head + rows * height + (rows - 1) * gap + margin
    page = Image.new("RGB", (page_width, page_height), PAPER)
    if title is not None:
        middle = (margin + head - int(letters.size) // 4) // 2
        text = fitted(title, letters, page_width - 2 * margin)
        ImageDraw.Draw(page).text((margin, middle), text, INK, letters, anchor="lm")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        x = margin + column * (width + gap) + (width - image.width) // 2
        y = head + row * (height + gap) + (height - image.height) // 2
        page.paste(image.convert("RGB"), (x, y))
    return page


def refinement_film(
    image: Tensor | Image.Image,
    boxes_per_step: Sequence[Tensor],
    scores_per_step: Sequence[Tensor],
    labels_per_step: Sequence[Tensor],
    categories: Categories,
    path: Path | str,
    *,
    scale: float = 1,
) -> None:
    """Write a GIF of how the boxes of all queries move from refinement to refinement.

    One frame per step; the first is the initialisation layer, the last stays longest.  Boxes are
    the stronger the surer they are, and named from a score of 0.3.

    Args:
        image: ``(3, H, W)`` uint8 RGB, or a Pillow image.
        boxes_per_step: ``(N, 4)`` each, in pixels of ``image``.
        scores_per_step: ``(N,)`` each, of the best class.
        labels_per_step: ``(N,)`` each, the best class.
        categories: the classes.
        path: of the GIF.
        scale: enlargement of the image.

    Raises:
        ValueError: if there is no step, or the three sequences differ in length.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "film.gif"
        >>> boxes = [torch.tensor([[2.0, 2.0, 20.0 + step, 30.0]]) for step in range(3)]
        >>> refinement_film(
        ...     Image.new("RGB", (40, 40)), boxes, [torch.tensor([0.5])] * 3,
        ...     [torch.tensor([0])] * 3, Categories(("cat",), (17,)), path, scale=4,
        ... )
        >>> with Image.open(path) as film:
        ...     film.n_frames
        3
    """
    steps = len(boxes_per_step)
    if not steps or steps != len(scores_per_step) or steps != len(labels_per_step):
        raise ValueError(
            f"refinement_film: {steps} steps of boxes, {len(scores_per_step)} of scores and "
            f"{len(labels_per_step)} of labels; give as many of each, and at least one."
        )
    picture = as_picture(image, scale)
    background = Image.blend(picture, Image.new("RGB", picture.size, INK), 0.3)
    frames = []
    for step, (boxes, scores, labels) in enumerate(
        zip(boxes_per_step, scores_per_step, labels_per_step, strict=True)
    ):
        canvas = Canvas(background.copy(), scale)
        order = scores.argsort().tolist()
        for query in order:
            opacity = min(1.0, 0.25 + float(scores[query]))
            canvas.outline(boxes[query], class_colour(int(labels[query])), opacity)
        for query in (query for query in reversed(order) if scores[query] >= 0.3):
            label = int(labels[query])
            canvas.tag(boxes[query], categories.names[label], class_colour(label))
        frames.append(_captioned(canvas.picture, step, steps - 1))
    still = _captioned(background, steps - 1, steps - 1)
    first, *others = _with_one_palette(frames, still)
    durations = [900, *[280] * (steps - 2), 2800] if steps > 1 else [2800]
    with replacing(path) as temporary:
        first.save(
            temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0
        )


def _captioned(picture: Image.Image, step: int, last: int) -> Image.Image:
    """A picture over a strip with the number of the step and a bar that fills."""
    letters = font(min(max(picture.width // 32, 11), 24))
    bar, height = max(3, int(letters.size) // 4), 2 * int(letters.size)
    whole = Image.new("RGB", (picture.width, picture.height + bar + height), INK)
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    top = picture.height
    draw.rectangle((0, top, picture.width, top + bar - 1), fill=(58, 64, 76))
    if step:
        end = round(picture.width * step / last)
        draw.rectangle((0, top, end - 1, top + bar - 1), fill=PALETTE[1])
    text = f"refinement {step} / {last}" if step else "initialisation"
    draw.text((letters.size * 0.7, top + bar + height / 2), text, PAPER, letters, anchor="lm")
    return whole


def _with_one_palette(frames: Sequence[Image.Image], still: Image.Image) -> list[Image.Image]:
    """Frames in 256 common colours.

    Only what never moves is dithered, and once for all frames: it neither bands nor flickers.
    """
    sample = Image.new("RGB", (still.width, 2 * still.height))
    sample.paste(still)
    sample.paste(frames[-1], (0, still.height))
    fixed = [*PALETTE, "#FFFFFF", "#{:02X}{:02X}{:02X}".format(*INK)]
    common = sample.quantize(256 - len(fixed), kmeans=2).getpalette() or []
    colours = [value for name in fixed for value in ImageColor.getrgb(name)[:3]] + common
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours[: 3 * 256])
    base = np.asarray(still.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    result = []
    for frame in frames:
        flat = np.asarray(frame.quantize(palette=palette, dither=Image.Dither.NONE))
        unmoved = (np.asarray(frame) == np.asarray(still)).all(-1)
        image = Image.fromarray(np.where(unmoved, base, flat))
        image.putpalette(colours[: 3 * 256])
        result.append(image)
    return result
