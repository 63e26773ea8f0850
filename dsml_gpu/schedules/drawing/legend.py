"""The legend of a picture: what in it means what, but only what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsml_gpu.schedules.drawing.grid import BAR
from dsml_gpu.schedules.drawing.meaning import Meaning
from dsml_gpu.schedules.drawing.shapes import Rect, Shape, Text, text_width

FONT = 12.0
#: Height of a line of the legend.
LINE = 22.0
_SWATCH = 14.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample and what it means.

    Attributes:
        width: of the sample.
        sample: (x, y of the upper left corner) -> its shapes.
    """

    width: float
    sample: Callable[[float, float], list[Shape]]
    text: str


def legend_of(meaning: Meaning, left: float, top: float, right: float) -> tuple[list[Shape], float]:
    """The shapes of the legend between two edges, and where it ends below."""
    shapes: list[Shape] = []
    x, y = left, top
    for entry in _entries(meaning):
        width = entry.width + 6 + text_width(entry.text, FONT)
        if x > left and x + width > right:
            x, y = left, y + LINE
        shapes += entry.sample(x, y)
        shapes.append(Text(x + entry.width + 6, y + _SWATCH - 3, entry.text, FONT, "muted"))
        x += width + 20
    return shapes, y + LINE


def _entries(meaning: Meaning) -> list[_Entry]:
    schedule = meaning.schedule
    entries = []
    if meaning.collective.reduces:
        most = schedule.nranks
        counts = sorted({1, (most + 2) // 3, (2 * most + 1) // 3, most - 1} & set(range(1, most)))
        if counts:
            which = "1" if counts == [1] else f"1 to {most - 1}"
            colours = [meaning.colour_of_count(count, most) for count in counts]
            entries.append(_cells(colours, f"{which} of {most} contributions"))
        entries.append(_cells(["complete"], f"all {most}"))
    else:
        owners = sorted({meaning.holder(chunk) for chunk in range(schedule.nchunks)})
        which = f"rank {owners[0]}" if len(owners) == 1 else f"ranks {owners[0]} to {owners[-1]}"
        entries.append(_cells([meaning.colour_of_owner(rank) for rank in owners], f"what {which} had"))
    entries.append(_Entry(_SWATCH, _result, "underlined: the promised result"))
    kinds = {transfer.reduce for step in schedule.steps for transfer in step}
    for reduce, text in ((True, "reduced into what is there"), (False, "copied")):
        if reduce in kinds:
            entries.append(_Entry(30, _arrow(meaning, reduce), text))
    return entries


def _cells(colours: Iterable[str], text: str) -> _Entry:
    every = list(colours)

    def sample(x: float, y: float) -> list[Shape]:
        return [Rect(x + place * _SWATCH, y, _SWATCH, _SWATCH, colour, "hairline") for place, colour in enumerate(every)]

    return _Entry(len(every) * _SWATCH, sample, text)


def _result(x: float, y: float) -> list[Shape]:
    return [Rect(x, y, _SWATCH, _SWATCH, "", "hairline"), Rect(x, y + _SWATCH - BAR, _SWATCH, BAR, "ink")]


def _arrow(meaning: Meaning, reduce: bool) -> Callable[[float, float], list[Shape]]:
    def sample(x: float, y: float) -> list[Shape]:
        return [meaning.arrow(reduce, (x, y + _SWATCH / 2), (x + 30, y + _SWATCH / 2), 1.6)]

    return sample
