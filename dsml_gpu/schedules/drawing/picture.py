"""From a schedule to shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby

from dsml_gpu.schedules.collectives import Layout
from dsml_gpu.schedules.drawing.grid import BAR, CELL_FONT, MARGIN, Grid, grid_of
from dsml_gpu.schedules.drawing.legend import legend_of
from dsml_gpu.schedules.drawing.meaning import Meaning
from dsml_gpu.schedules.drawing.palette import on
from dsml_gpu.schedules.drawing.shapes import Cell, Picture, Rect, Shape, Text, text_width
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.verify import Held, initial_contributions, run_symbolically

_TITLE_FONT, _LINE_FONT, _RANK_FONT, _SMALL_FONT = 20.0, 13.0, 12.0, 9.0
#: Space between what is above a rank's cells and the cells; with the numbers of chunks.
_HOST_HEIGHT, _RANK_HEIGHT, _NUMBERS_HEIGHT = 22.0, 20.0, 13.0


def draw(schedule: Schedule, *, source: str = "", hosts: Sequence[int] = ()) -> Picture:
    """The picture of a schedule.

    Columns are ranks, and between two rows of cells, which show what each rank holds, is a step with its transfers.

    Args:
        source: of the algorithm; see `Algorithm`.
        hosts: the host of each rank, which is shown where there are several.
    """
    meaning = Meaning(schedule)
    rows = _rows(schedule)
    lines = _lines(schedule, source, hosts)
    labels = {meaning.label(chunk, held[chunk]) for row in rows for held in row for chunk in held}
    grid = grid_of(schedule, rows, sorted(labels))
    width = max([grid.right + MARGIN, *(line.x + line.width + MARGIN for line in lines)])
    legend, top = legend_of(meaning, MARGIN, lines[-1].y + 14, width - MARGIN)
    numbers = _has_numbers(grid, meaning)
    head = _HOST_HEIGHT * (len(set(hosts)) > 1) + _RANK_HEIGHT + (_NUMBERS_HEIGHT if numbers else 4)
    grid = grid.moved((width - MARGIN - grid.right) / 2, top + 10 + head)
    shapes = [*lines, *legend, *_columns(grid, hosts, top + 10), *(_numbers(grid) if numbers else ())]
    for number, row in enumerate(rows):
        if number:
            shapes += _transfers(grid, meaning, number - 1)
        shapes += _cells(grid, meaning, number, row)
    return Picture(lines[0].text, width, grid.bottom + MARGIN, len(schedule.steps), tuple(shapes))


def _rows(schedule: Schedule) -> list[list[Held]]:
    """What each rank holds at the start and after each step."""
    held = initial_contributions(schedule)
    rows = [[dict(of_rank) for of_rank in held]]
    rows += [[dict(of_rank) for of_rank in held] for _ in run_symbolically(schedule, held)]
    return rows


# ---- what stands above --------------------------------------------------------------------------------------------------


def _lines(schedule: Schedule, source: str, hosts: Sequence[int]) -> list[Text]:
    meaning = Meaning(schedule)
    title = f"{schedule.algorithm} {schedule.collective} on {_count(schedule.nranks, 'rank')}"
    if meaning.collective.rooted:
        title += f", root {schedule.root}"
    if len(set(hosts)) > 1:
        title += f" of {len(set(hosts))} hosts"
    texts = [_figures(schedule)] + ([source] if source else [])
    return [
        Text(MARGIN, MARGIN + 16, title, _TITLE_FONT, "ink", bold=True),
        *(Text(MARGIN, MARGIN + 38 + 18 * place, text, _LINE_FONT, "muted") for place, text in enumerate(texts)),
    ]


def _figures(schedule: Schedule) -> str:
    """Steps, messages, and how much each rank sends: of its buffer, or of the blocks that are parts of it."""
    sent = Counter(transfer.src for step in schedule.steps for transfer in step)
    least, most = (bound(sent[rank] for rank in range(schedule.nranks)) for bound in (min, max))
    data = [float(Fraction(chunks, schedule.parts)) for chunks in (least, most)]
    whole = Meaning(schedule).collective.layout is Layout.WHOLE
    amounts = f"{data[1]:.3g}" if least == most else f"{data[0]:.3g} to {data[1]:.3g}"
    unit = "times the data" if whole else "block" if data[1] == 1 else "blocks"
    who = f"each rank sends {most}" if least == most else f"a rank sends {least} to {most}"
    figures = f"{_count(len(schedule.steps), 'step')}, {_count(sum(sent.values()), 'message')}; {who} of them"
    return figures if schedule.collective == "barrier" else f"{figures}, in all {amounts} {unit}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _columns(grid: Grid, hosts: Sequence[int], top: float) -> Iterator[Shape]:
    """The bands behind the cells, and the names of ranks and hosts over them."""
    if len(set(hosts)) > 1:
        for host, ranks in groupby(range(len(hosts)), key=lambda rank: hosts[rank]):
            neighbours = list(ranks)
            left, right = grid.left[neighbours[0]] - 6, grid.left[neighbours[-1]] + grid.rank_width + 6
            yield Rect(left, top, right - left, 18, "host")
            yield Text((left + right) / 2, top + 13, f"host {host}", _RANK_FONT, "ink", "middle")
        top += _HOST_HEIGHT
    for rank, left in enumerate(grid.left):
        yield Rect(left - 6, top, grid.rank_width + 12, grid.bottom + 6 - top, "band")
        yield Text(left + grid.rank_width / 2, top + 15, f"rank {rank}", _RANK_FONT, "ink", "middle", bold=True)


def _has_numbers(grid: Grid, meaning: Meaning) -> bool:
    """Whether chunks are numbered: where they have their places in all columns, on one line."""
    return not meaning.names_ways and grid.lines == 1 and grid.per_line > 1


def _numbers(grid: Grid) -> Iterator[Shape]:
    """The numbers of chunks, above the first row."""
    chunks = range(grid.per_line)
    if text_width(str(grid.per_line - 1), _SMALL_FONT) + 2 > grid.cell_width:
        chunks = range(0, grid.per_line, grid.per_line - 1)  # the first and the last
    for rank in range(len(grid.left)):
        for chunk in chunks:
            yield Text(grid.middle(rank, chunk), grid.top[0] - 4, str(chunk), _SMALL_FONT, "muted", "middle")


# ---- rows and steps -----------------------------------------------------------------------------------------------------


def _cells(grid: Grid, meaning: Meaning, row: int, held: Sequence[Held]) -> Iterator[Shape]:
    name = "start" if row == 0 else "end" if row == len(grid.top) - 1 else ""
    if name:
        middle = grid.top[row] + grid.row_height / 2
        yield Text(grid.left[0] - 14, middle + 4, name, _RANK_FONT, "muted", "end", stage=row)
    width, height = grid.cell_width - 1, grid.cell_height - 1
    for rank, of_rank in enumerate(held):
        for chunk in grid.chunks[rank]:
            x, y = grid.corner(row, rank, chunk)
            contributions = of_rank.get(chunk, 0)
            cell = Cell(row, rank, chunk, contributions, meaning.is_result(rank, chunk, contributions))
            colour, label = meaning.colour(chunk, contributions), meaning.label(chunk, contributions)
            yield Rect(x, y, width, height, colour or "paper", "hairline", row, meaning.note(cell), cell)
            if cell.is_result:
                yield Rect(x, y + height - BAR, width, BAR, "ink", stage=row)
            if label and grid.has_labels:
                yield Text(x + width / 2, y + 12, label, CELL_FONT, on(colour), "middle", stage=row)


def _transfers(grid: Grid, meaning: Meaning, step: int) -> Iterator[Shape]:
    """The arrows of a step, between the rows before and after it."""
    begin, end = grid.top[step] + grid.row_height + 1, grid.top[step + 1] - 2
    yield Text(grid.left[0] - 14, (begin + end) / 2 + 4, f"step {step}", _RANK_FONT, "muted", "end", stage=step + 1)
    transfers = meaning.schedule.steps[step]
    crowd = len(transfers) / meaning.schedule.nranks
    width = 1.6 if crowd <= 3 else 1.2 if crowd <= 6 else 0.8
    for transfer in transfers:
        x1, x2 = grid.middle(transfer.src, transfer.chunk), grid.middle(transfer.dst, transfer.chunk)
        arrow = meaning.arrow(transfer.reduce, (x1, begin), (x2, end), width)
        yield replace(arrow, stage=step + 1, note=meaning.note_of_transfer(step, transfer), transfer=transfer)
