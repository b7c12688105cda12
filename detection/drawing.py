"""Boxes and labels on an image: colours, lines and places for the labels.

Line widths and letters follow the size of the picture, not of the data, and a label stands where
it covers the least of other labels and boxes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

PALETTE: tuple[str, ...] = (
    *("#F0524F", "#4C9AFF", "#2DBE73", "#FFB020", "#A56BFA"),
    *("#1CC4CE", "#FF6FB1", "#B3CC2C", "#D08449", "#8C9BFF"),
)
"""Ten colours that differ in hue and stand out from photographs; dark letters read on all."""

INK: Colour = (24, 28, 36)
PAPER: Colour = (250, 250, 248)
WHITE: Colour = (255, 255, 255)


def class_colour(label: int) -> Colour:
    """The colour of a class; from the eleventh class on the ten repeat in other shades.

    Example:
        >>> class_colour(1), class_colour(11)
        ((76, 154, 255), (165, 204, 255))
    """
    red, green, blue = ImageColor.getrgb(PALETTE[label % len(PALETTE)])[:3]
    shade = (None, WHITE, INK)[label // len(PALETTE) % 3]
    if shade is None:
        return red, green, blue
    return (red + shade[0]) // 2, (green + shade[1]) // 2, (blue + shade[2]) // 2


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that pictures look the same everywhere."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


def fitted(text: str, letters: ImageFont.FreeTypeFont, width: float) -> str:
    """``text``, shortened with an ellipsis where it is wider than ``width`` pixels.

    Example:
        >>> fitted("a very long name", font(12), 40)
        'a ver…'
    """
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def as_picture(image: Tensor | Image.Image, scale: float) -> Image.Image:
    """A new RGB picture of an image, enlarged ``scale`` times.

    Raises:
        ValueError: if a tensor is not ``(3, H, W)`` of uint8, or ``scale`` not positive.

    Example:
        >>> as_picture(torch.zeros(3, 4, 6, dtype=torch.uint8), 2).size
        (12, 8)
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                "An image to draw on must be (3, H, W) of uint8, not "
                f"{tuple(image.shape)} of {image.dtype}."
            )
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    if not scale > 0:
        raise ValueError(f"scale={scale}: must be positive.")
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def legible_scale(size: tuple[int, int]) -> float:
    """How far to enlarge an image of ``size (h, w)`` so that labels on it can be read.

    Example:
        >>> legible_scale((128, 128)), legible_scale((600, 800)), legible_scale((10, 1000))
        (3, 1, 2)
    """
    return max(1, min(480 // min(size), 2000 // max(size)))


class Canvas:
    """A picture to draw boxes and labels on.

    Args:
        picture: RGB, drawn upon as it is.
        scale: pixels of the picture per pixel of the boxes.

    Attributes:
        tags: where labels stand already, ``(left, top, right, bottom)`` in the picture.

    Example:
        >>> canvas = Canvas(Image.new("RGB", (64, 64)), scale=2.0)
        >>> canvas.outline(torch.tensor([4.0, 4.0, 28.0, 28.0]), WHITE)
        >>> canvas.picture.getpixel((8, 30))
        (255, 255, 255)
    """

    def __init__(self, picture: Image.Image, scale: float) -> None:
        self.picture, self.scale = picture, scale
        self.line = max(2, round(max(picture.size) / 200))
        self.font = font(min(max(round(max(picture.size) / 32), 12), 28))
        self._draw = ImageDraw.Draw(picture, "RGBA")  # colours with opacity are blended
        self._boxes: list[Rectangle] = []
        self.tags: list[Rectangle] = []

    def outline(self, box: Tensor, colour: Colour, opacity: float = 1.0) -> None:
        """A solid box between two hairlines of shadow; fainter and thinner with the opacity."""
        place = self._visible(box)
        if place is None:
            return
        if opacity > 0.5:
            self._boxes.append(place)
        line = max(1, round(self.line * min(1.0, 0.4 + opacity)))
        self._frame(_grown(place, 1), 1, (*INK, round(110 * opacity)))
        self._frame(place, line, (*colour, round(255 * opacity)))
        self._frame(_grown(place, -line), 1, (*INK, round(110 * opacity)))

    def dashed(self, box: Tensor) -> None:
        """A thin box of white dashes on a shadow."""
        place = self._visible(box)
        if place is None:
            return
        self._boxes.append(place)
        line = max(1, self.line // 2)
        x1, y1, x2, y2 = place
        self._frame(_grown(place, line), 3 * line, (*INK, 90))
        for low, high, across in ((x1, x2, (y1, y2)), (y1, y2, (x1, x2))):
            # An odd number of pieces begins and ends with a dash, so corners are closed.
            count = 2 * round((high - low) / (9 * line + 5)) + 1
            piece = (high - low) / count
            for start in (low + piece * n for n in range(0, count, 2)):
                for side in (across[0], across[1] - line + 1):
                    ends = (start, side, start + piece, side + line - 1)
                    if across == (x1, x2):
                        ends = (side, start, side + line - 1, start + piece)
                    self._draw.rectangle(ends, fill=WHITE)

    def tag(self, box: Tensor, name: str, colour: Colour, note: str = "") -> None:
        """A label for a box, beside it or in a corner of it, never outside the picture.

        The name stands on the colour, the note after it on a dark ground.
        """
        place = self._visible(box)
        if place is None:
            return
        pad = max(2, round(self.font.size / 4))
        ascent, descent = self.font.getmetrics()
        note_width = self.font.getlength(note) + 2 * pad if note else 0.0
        name = fitted(name, self.font, self.picture.width - note_width - 2 * pad)
        name_width = self.font.getlength(name) + 2 * pad
        spot = self._spot(place, name_width + note_width, ascent + descent + pad // 2)
        self.tags.append(spot)
        left, top, right, bottom = map(round, spot)
        split, y = round(left + name_width), top + pad // 4
        self._draw.rounded_rectangle((left, top, right - 1, bottom - 1), pad, fill=(*INK, 225))
        ends = (True, not note, not note, True)
        self._draw.rounded_rectangle((left, top, split - 1, bottom - 1), pad, colour, corners=ends)
        self._draw.text((left + pad, y), name, INK if _light(colour) else WHITE, self.font)
        self._draw.text((split + pad, y), note, WHITE, self.font)

    def _spot(self, place: Rectangle, width: float, height: float) -> Rectangle:
        """Where a label covers the least; among equals where one looks first."""
        x1, y1, x2, y2 = place
        right, below = x2 - width + 1, y2 - height + 1
        wishes = (
            *((x1, y1 - height), (right, y1 - height), (x1, y2 + 1), (right, y2 + 1)),
            *((x2 + 1, y1), (x1 - width, y1), (x2 + 1, below), (x1 - width, below)),
            *((x1, y1), (right, y1), (x1, below), (right, below)),
            *((x, y2 + 1 + row * height) for row in (1, 2, 3) for x in (x1, right)),
            *((x, y1 - (1 + row) * height) for row in (1, 2, 3) for x in (x1, right)),
        )
        options = []
        for rank, (x, y) in enumerate(wishes):
            left = min(max(x, 0.0), max(self.picture.width - width, 0.0))
            top = min(max(y, 0.0), max(self.picture.height - height, 0.0))
            spot = (left, top, left + width, top + height)
            # As a share of the other label: a long one may hide a short one altogether.
            tags = sum(_overlap(spot, other) / _overlap(other, other) for other in self.tags)
            boxes = sum(_overlap(spot, other) for other in self._boxes) / (width * height)
            moved = abs(left - x) + abs(top - y)
            cost = 6 * tags + boxes + moved / height + rank / 20
            options.append((cost, spot))
        return min(options)[1]

    def _visible(self, box: Tensor) -> Rectangle | None:
        """The part of a box inside the picture, in its pixels; `None` if there is none."""
        width, height = self.picture.size
        x1, y1, x2, y2 = (float(value) * self.scale for value in box.tolist())
        if not (x1 < width and y1 < height and x2 > 0 and y2 > 0):
            return None
        left, top = min(round(max(x1, 0)), width - 1), min(round(max(y1, 0)), height - 1)
        right, bottom = round(min(x2, width)) - 1, round(min(y2, height)) - 1
        return left, top, max(right, left), max(bottom, top)

    def _frame(self, place: Rectangle, line: int, colour: tuple[int, int, int, int]) -> None:
        x1, y1, x2, y2 = place
        if x2 - x1 >= 2 * line and y2 - y1 >= 2 * line:
            self._draw.rectangle(place, outline=colour, width=line)
        elif x2 >= x1 and y2 >= y1:
            self._draw.rectangle(place, fill=colour)


def _grown(place: Rectangle, by: int) -> Rectangle:
    return place[0] - by, place[1] - by, place[2] + by, place[3] + by


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    return max(width, 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def _light(colour: Colour) -> bool:
    """Whether dark letters read better (by the weights of ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 110
