"""Pictures of schedules: ranks are columns, time goes down, cells are chunks, arrows are transfers.

`draw` makes a list of shapes of a schedule; a writer makes a file of it:

    from dsml_gpu.schedules import find_algorithm
    from dsml_gpu.schedules.drawing import draw, to_svg

    ring = find_algorithm("all_reduce", "ring")
    svg = to_svg(draw(ring.schedule(4), source=ring.source))

The same picture always gives the same file, byte for byte, but for PNG, whose bytes are those of the installed Pillow.
"""

from __future__ import annotations

from dsml_gpu.schedules.drawing.bitmap import PillowMissing, to_png
from dsml_gpu.schedules.drawing.page import to_html
from dsml_gpu.schedules.drawing.picture import draw
from dsml_gpu.schedules.drawing.shapes import Arrow, Cell, Picture, Rect, Shape, Text
from dsml_gpu.schedules.drawing.svg import to_svg

__all__ = [
    "Arrow",
    "Cell",
    "Picture",
    "PillowMissing",
    "Rect",
    "Shape",
    "Text",
    "draw",
    "to_html",
    "to_png",
    "to_svg",
]
