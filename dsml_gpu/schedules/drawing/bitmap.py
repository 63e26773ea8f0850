"""Pictures as PNG, by Pillow, which is the extra ``draw`` of the package."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from dsml_gpu.schedules.drawing.palette import LIGHT
from dsml_gpu.schedules.drawing.shapes import Arrow, Picture, Rect, Text

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

#: Pixels of the file for one of the picture.
_SCALE = 2
#: Pillow draws lines without smoothing their edges, so they are drawn larger and the whole is shrunk.
_OVERSAMPLING = 2
#: Where a picture would have more pixels than this while it is drawn, it gets smaller.
_MAX_PIXELS = 120e6


class PillowMissing(ImportError):
    """Pillow is not installed, or is too old to have a font of its own that scales."""


def to_png(picture: Picture) -> bytes:
    """A PNG file's bytes.

    Raises:
        PillowMissing: Pillow 10.1 or newer is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont

        ImageFont.load_default(10)  # which older ones have not in any size
    except (ImportError, TypeError):
        raise PillowMissing("PNG files need Pillow 10.1 or newer: pip install 'dsml_gpu[draw]'") from None
    scale = min(_SCALE, math.sqrt(_MAX_PIXELS / (picture.width * picture.height)) / _OVERSAMPLING)
    size = math.ceil(picture.width * scale), math.ceil(picture.height * scale)
    large = Image.new("RGB", (size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING), LIGHT.paper)
    pen = _Pen(ImageDraw.Draw(large), scale * _OVERSAMPLING, ImageFont.load_default)
    for shape in picture.shapes:
        pen.draw(shape)
    file = io.BytesIO()
    large.resize(size, Image.Resampling.BOX).save(file, "PNG", optimize=True)
    return file.getvalue()


class _Pen:
    """Draws shapes.

    Args:
        image: where.
        scale: pixels of the image for one of the picture.
        font: (size in pixels) -> a font.
    """

    def __init__(self, image: ImageDraw, scale: float, font: Callable[[float], Any]) -> None:
        self._image = image
        self._scale = scale
        self._font = cache(font)

    def draw(self, shape: Rect | Arrow | Text) -> None:
        """Draws a shape over what is there."""
        if isinstance(shape, Rect):
            self._rect(shape)
        elif isinstance(shape, Arrow):
            self._arrow(shape)
        else:
            self._text(shape)

    def _rect(self, rect: Rect) -> None:
        left, top, right, bottom = self._scaled(rect.x, rect.y, rect.x + rect.width, rect.y + rect.height)
        self._image.rectangle(
            (round(left), round(top), round(right) - 1, round(bottom) - 1),
            LIGHT.colour(rect.fill) if rect.fill else None,
            LIGHT.colour(rect.outline) if rect.outline else None,
            width=max(1, round(0.75 * self._scale)),
        )

    def _arrow(self, arrow: Arrow) -> None:
        colour, width = LIGHT.colour(arrow.colour), max(1, round(arrow.width * self._scale))
        (x1, y1), (x2, y2) = arrow.head
        for piece in _pieces(arrow):
            self._image.line(self._scaled(*piece), colour, width)
        head = self._scaled(x1, y1, arrow.x2, arrow.y2, x2, y2)
        if arrow.open_head:
            self._image.line(head, colour, width, joint="curve")
        else:
            self._image.polygon(head, colour)

    def _text(self, text: Text) -> None:
        self._image.text(
            (text.x * self._scale, text.y * self._scale),
            text.text,
            LIGHT.colour(text.colour),
            self._font(text.size * self._scale),
            anchor={"start": "ls", "middle": "ms", "end": "rs"}[text.anchor],
            stroke_width=round(self._scale * text.size / 50) if text.bold else 0,  # the font has no bold face
        )

    def _scaled(self, *lengths: float) -> tuple[float, ...]:
        return tuple(length * self._scale for length in lengths)


def _pieces(arrow: Arrow) -> Iterator[tuple[float, float, float, float]]:
    """The line of an arrow, or its dashes."""
    (x1, y1), (x2, y2) = (arrow.x1, arrow.y1), arrow.line_end
    length = math.hypot(x2 - x1, y2 - y1)
    dash, gap = arrow.dash if arrow.dashed else (length, 1.0)
    begin = 0.0
    while begin < length:
        first, last = begin / length, min(1.0, (begin + dash) / length)
        yield x1 + (x2 - x1) * first, y1 + (y2 - y1) * first, x1 + (x2 - x1) * last, y1 + (y2 - y1) * last
        begin += dash + gap
