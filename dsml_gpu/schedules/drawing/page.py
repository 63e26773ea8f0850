"""Pictures as a page for a browser: one file, which shows the picture step by step and says what one points at."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from dsml_gpu.schedules.drawing.palette import DARK, LIGHT, Palette
from dsml_gpu.schedules.drawing.shapes import Picture
from dsml_gpu.schedules.drawing.svg import to_svg

#: What the page's own parts are coloured with.
_OF_THE_PAGE = ("band", "hairline", "ink", "paper")


def to_html(picture: Picture) -> str:
    """An HTML file's text. It needs nothing else, and follows the browser's choice of light or dark colours."""
    names = dict.fromkeys(_OF_THE_PAGE)

    def variable(name: str) -> str:
        names[name] = None
        return f"var(--{name.replace(':', '-')})"

    svg = to_svg(picture, variable)

    def definitions(palette: Palette) -> str:
        return "\n".join(f"  --{name.replace(':', '-')}: {palette.colour(name)};" for name in sorted(names))

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    for place, content in (
        ("<!-- title -->", escape(picture.title)),
        ("/* light colours */", definitions(LIGHT)),
        ("/* dark colours */", definitions(DARK)),
        ("<!-- picture -->", svg),
    ):
        page = page.replace(place, content)
    return page
