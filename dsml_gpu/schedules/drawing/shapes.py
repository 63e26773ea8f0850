"""What a picture consists of. Lengths are in pixels, from the upper left corner; colours are names, of `palette`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsml_gpu.schedules.schedule import Transfer
from dsml_gpu.schedules.verify import Contributions

#: Widths of characters as parts of the font's size: a little more than those of Helvetica and its likes.
_WIDTHS = {".,:;'|!ijlI()[] ": 0.32, "ftr-/": 0.4, "mwMW@%": 0.92}
_WIDTH_OF = {character: width for characters, width in _WIDTHS.items() for character in characters}
_OTHER_WIDTHS = {True: 0.76, False: 0.62}  # capitals and others
_BOLD = 1.08


@dataclass(frozen=True, slots=True)
class Cell:
    """What a rectangle stands for: one chunk on one rank at one time.

    Attributes:
        row: after so many steps.
        rank, chunk: which.
        contributions: whose it holds; 0: it holds nothing.
        is_result: it is what the collective promises to this rank.
    """

    row: int
    rank: int
    chunk: int
    contributions: Contributions
    is_result: bool


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle.

    Attributes:
        x, y: its upper left corner.
        fill, outline: colours; "" for none.
        stage: see `Picture`.
        note: what there is to say about it to who points at it.
        cell: what it stands for, if it is one.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str
    outline: str = ""
    stage: int | None = None
    note: str = ""
    cell: Cell | None = None


@dataclass(frozen=True, slots=True)
class Arrow:
    """A straight arrow from (x1, y1) to its tip at (x2, y2).

    Attributes:
        width: of the line.
        open_head: the head is two strokes; otherwise a filled triangle.
        dashed: the line is.
        transfer: what it stands for, if it is one.
        stage, note: as of a `Rect`.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    width: float
    open_head: bool
    dashed: bool = False
    stage: int | None = None
    note: str = ""
    transfer: Transfer | None = None

    @property
    def head(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The two ends of the head that are not its tip."""
        angle = math.atan2(self.y2 - self.y1, self.x2 - self.x1)
        length = 3.5 + 2.5 * self.width
        left, right = (
            (self.x2 - length * math.cos(angle + turn), self.y2 - length * math.sin(angle + turn)) for turn in (-0.42, 0.42)
        )
        return left, right

    @property
    def line_end(self) -> tuple[float, float]:
        """Where the line ends: at the tip, or where a filled head begins, so that it does not blunt the tip."""
        if self.open_head:
            return self.x2, self.y2
        (x1, y1), (x2, y2) = self.head
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def dash(self) -> tuple[float, float]:
        """Lengths of a dash and of the gap after it."""
        return 5 + 2 * self.width, 2 + self.width


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text.

    Attributes:
        x, y: left, middle or right end of the base line, as `anchor` says: "start", "middle" or "end".
        size: of the font.
        stage: as of a `Rect`.
    """

    x: float
    y: float
    text: str
    size: float
    colour: str
    anchor: str = "start"
    bold: bool = False
    stage: int | None = None

    @property
    def width(self) -> float:
        """See `text_width`."""
        return text_width(self.text, self.size, self.bold)

    @property
    def left(self) -> float:
        """Where it begins."""
        return self.x - self.width * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]


Shape = Rect | Arrow | Text


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, as shapes from back to front.

    Attributes:
        title: in words, for who cannot see it.
        stages: number of steps. A shape of stage s belongs to what is there after s steps, one without stage to all.
    """

    title: str
    width: float
    height: float
    stages: int
    shapes: tuple[Shape, ...]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """The width of a text, rather too much than too little: nobody knows here with which font it will be written."""
    ems = sum(_WIDTH_OF.get(character, _OTHER_WIDTHS[character.isupper()]) for character in text)
    return ems * size * (_BOLD if bold else 1)
