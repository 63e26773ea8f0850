"""Pictures as SVG, with nothing but presentation attributes, which every viewer understands."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from dsml_gpu.schedules.drawing.palette import LIGHT
from dsml_gpu.schedules.drawing.shapes import Arrow, Picture, Rect, Shape, Text

_FONTS = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def to_svg(picture: Picture, colour: Callable[[str], str] = LIGHT.colour) -> str:
    """An SVG file's text. Pointing at a cell or an arrow shows what there is to say about it.

    Args:
        colour: name -> what is written for it.
    """
    width, height = _number(picture.width), _number(picture.height)
    size = f'width="{width}" height="{height}"'
    frame = f'{size} viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(picture.title)}'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} font-family="{_FONTS}">',
        f'<rect {size} fill="{colour("paper")}"/>',
    ]
    # Shapes of one stage are one group, for the page that shows them stage by stage.
    for stage, shapes in groupby(picture.shapes, key=lambda shape: shape.stage):
        lines.append("<g>" if stage is None else f'<g data-stage="{stage}">')
        lines.extend(_element(shape, colour) for shape in shapes)
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def _element(shape: Shape, colour: Callable[[str], str]) -> str:
    if isinstance(shape, Rect):
        return _rect(shape, colour)
    if isinstance(shape, Arrow):
        return _arrow(shape, colour)
    return _text(shape, colour)


def _rect(rect: Rect, colour: Callable[[str], str]) -> str:
    fill = colour(rect.fill) if rect.fill else "none"
    outline = f' stroke="{colour(rect.outline)}" stroke-width="0.75"' if rect.outline else ""
    attributes = (
        f'x="{_number(rect.x)}" y="{_number(rect.y)}" width="{_number(rect.width)}" height="{_number(rect.height)}" '
        f'fill="{fill}"{outline}'
    )
    return _with_note("rect", attributes, rect.note)


def _arrow(arrow: Arrow, colour: Callable[[str], str]) -> str:
    (x1, y1), (x2, y2) = arrow.head
    end_x, end_y = arrow.line_end
    paint = colour(arrow.colour)
    line = f"M{_number(arrow.x1)} {_number(arrow.y1)}L{_number(end_x)} {_number(end_y)}"
    head = f"M{_number(x1)} {_number(y1)}L{_number(arrow.x2)} {_number(arrow.y2)}L{_number(x2)} {_number(y2)}"
    stroke = f'stroke="{paint}" stroke-width="{_number(arrow.width)}"'
    dashes = f' stroke-dasharray="{_number(arrow.dash[0])} {_number(arrow.dash[1])}"' if arrow.dashed else ""
    tip = f'<path d="{head}" {stroke}/>' if arrow.open_head else f'<path d="{head}Z" fill="{paint}"/>'
    note = f"<title>{escape(arrow.note)}</title>" if arrow.note else ""
    return f'<g fill="none">{note}<path d="{line}" {stroke}{dashes}/>{tip}</g>'


def _text(text: Text, colour: Callable[[str], str]) -> str:
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    weight = ' font-weight="bold"' if text.bold else ""
    return (
        f'<text x="{_number(text.x)}" y="{_number(text.y)}" font-size="{_number(text.size)}" '
        f'fill="{colour(text.colour)}"{anchor}{weight}>{escape(text.text)}</text>'
    )


def _with_note(tag: str, attributes: str, note: str) -> str:
    if not note:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}><title>{escape(note)}</title></{tag}>"


def _number(value: float) -> str:
    """With at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
