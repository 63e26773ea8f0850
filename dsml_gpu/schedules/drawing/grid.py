"""Where ranks, chunks and steps are in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dsml_gpu.schedules.collectives import COLLECTIVES, Layout
from dsml_gpu.schedules.drawing.shapes import text_width
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.verify import Held

#: Free space left of the columns, which names the steps, and around everything.
LEFT, MARGIN = 66.0, 22.0
#: Height of the bar that underlines what is a result.
BAR = 3.0
#: Size of the font in cells.
CELL_FONT = 10.0
#: Cells of a rank that stand side by side at most; more go into lines below each other.
_CELLS_PER_LINE = 16
#: What a rank's cells take together, where they need not be wider or can be narrower.
_RANK_WIDTH = 130.0
_MIN_CELL, _MAX_CELL = 7.0, 30.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Where things are.

    Attributes:
        chunks: of each rank, the chunks that are shown, in order.
        per_line: cells in one line of a rank.
        lines: lines of cells of each rank.
        cell_width, cell_height: with the space to the next one.
        has_labels: there is room for labels in the cells.
        left: where the column of each rank begins.
        top: where each row of cells begins; row r is after r steps.
        right, bottom: where the last column and the last row end.
    """

    chunks: tuple[tuple[int, ...], ...]
    per_line: int
    lines: int
    cell_width: float
    cell_height: float
    has_labels: bool
    left: tuple[float, ...]
    top: tuple[float, ...]

    @property
    def rank_width(self) -> float:
        """Of a rank's cells."""
        return self.per_line * self.cell_width

    @property
    def row_height(self) -> float:
        """Of a rank's cells in one row."""
        return self.lines * self.cell_height

    @property
    def right(self) -> float:
        return self.left[-1] + self.rank_width

    @property
    def bottom(self) -> float:
        return self.top[-1] + self.row_height

    def moved(self, right: float, down: float) -> Grid:
        """The same, elsewhere."""
        return replace(self, left=tuple(x + right for x in self.left), top=tuple(y + down for y in self.top))

    def corner(self, row: int, rank: int, chunk: int) -> tuple[float, float]:
        """The upper left corner of a cell."""
        line, column = divmod(self.chunks[rank].index(chunk), self.per_line)
        return self.left[rank] + column * self.cell_width, self.top[row] + line * self.cell_height

    def middle(self, rank: int, chunk: int) -> float:
        """Where the middle of a chunk's cells is, from the left."""
        return self.corner(0, rank, chunk)[0] + self.cell_width / 2


def grid_of(schedule: Schedule, rows: Sequence[Sequence[Held]], labels: Sequence[str]) -> Grid:
    """The grid of a schedule, whose first row begins at 0.

    Args:
        rows: what each rank holds, row by row.
        labels: all that may be written into cells.
    """
    chunks = tuple(_shown(schedule, rows, rank) for rank in range(schedule.nranks))
    most = max([1, *map(len, chunks)])
    lines = -(-most // _CELLS_PER_LINE)
    per_line = -(-most // lines)
    cell_width = min(_MAX_CELL, max(_MIN_CELL, _RANK_WIDTH // per_line))
    label_width = 5 + max((text_width(label, CELL_FONT) for label in labels), default=0.0)
    if per_line <= _CELLS_PER_LINE // 2:
        cell_width = max(cell_width, label_width)
    has_labels = lines == 1 and label_width <= cell_width
    cell_height = 20.0 if lines == 1 else 12.0
    gap = max(22.0, cell_width)
    # Wide enough for the name of the rank, too.
    pitch = max(per_line * cell_width, text_width("rank 00", 12, bold=True)) + gap
    left = tuple(LEFT + rank * pitch for rank in range(schedule.nranks))
    tops = tuple(
        accumulate((lines * cell_height + _space_for(step, schedule.nranks) for step in schedule.steps), initial=0.0)
    )
    return Grid(chunks, per_line, lines, cell_width, cell_height, has_labels, left, tops)


def _space_for(step: Sequence[Transfer], nranks: int) -> float:
    """Between two rows. Arrows that go far, and many arrows, need more of it to be told from each other."""
    way = max((abs(transfer.dst - transfer.src) for transfer in step), default=0)
    return min(76.0, 34.0 + 6 * way) + min(100.0, 8 * max(0.0, len(step) / nranks - 3))


def _shown(schedule: Schedule, rows: Sequence[Sequence[Held]], rank: int) -> tuple[int, ...]:
    """The chunks that a rank's column has.

    Every chunk, where these are as many as ranks or fewer: then each has its place in all columns. Of the many blocks of an
    all-to-all, those that the rank ever holds: first what it has at the start, then what passes by, then what is for it.
    """
    collective = COLLECTIVES[schedule.collective]
    if collective.layout in (Layout.WHOLE, Layout.PER_RANK):
        return tuple(range(schedule.nchunks))
    ever = {chunk for row in rows for chunk in row[rank]}

    def place(chunk: int) -> tuple[bool, bool, int]:
        is_for_it = rank in collective.takers(schedule.roles, chunk // schedule.parts)
        return chunk not in rows[0][rank], is_for_it, chunk

    return tuple(sorted(ever, key=place))
