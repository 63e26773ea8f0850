"""Pictures: what is in them, where it is, in which colours, and what the files say."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import pytest

from dsml_gpu.schedules import ALGORITHMS, COLLECTIVES, Algorithm, Builder, Schedule, Transfer, find_algorithm
from dsml_gpu.schedules.drawing import Arrow, Picture, PillowMissing, Rect, Text, draw, to_html, to_png, to_svg
from dsml_gpu.schedules.drawing.meaning import Meaning
from dsml_gpu.schedules.drawing.palette import DARK, LIGHT, Palette, luminance, on, owner
from dsml_gpu.schedules.drawing.shapes import text_width

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def schedule_of(algorithm: Algorithm, nranks: int) -> Schedule:
    """On two hosts, taken in turn; a rooted one has the last rank as its root."""
    collective = COLLECTIVES[algorithm.collective]
    pairs = tuple((rank, (rank + 1) % nranks) for rank in range(nranks)) if algorithm.collective == "send_recv" else ()
    hosts = tuple(rank % 2 for rank in range(nranks))
    return algorithm.schedule(nranks, root=nranks - 1 if collective.rooted else 0, pairs=pairs, hosts=hosts)


def picture_of(collective: str, name: str, nranks: int) -> Picture:
    algorithm = find_algorithm(collective, name)
    return draw(schedule_of(algorithm, nranks), source=algorithm.source)


Kind = TypeVar("Kind", Rect, Arrow, Text)


def of_kind(picture: Picture, kind: type[Kind]) -> Iterator[Kind]:
    return (shape for shape in picture.shapes if isinstance(shape, kind))


def cells_of(picture: Picture) -> dict[tuple[int, int, int], Rect]:
    """By row, rank and chunk."""
    return {(rect.cell.row, rect.cell.rank, rect.cell.chunk): rect for rect in of_kind(picture, Rect) if rect.cell}


# ---- shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nranks", range(1, 17))
def test_every_algorithm_is_drawn_whole_and_legible(nranks: int) -> None:
    for algorithm in ALGORITHMS:
        schedule = schedule_of(algorithm, nranks)
        picture = draw(schedule, source=algorithm.source, hosts=tuple(rank % 2 for rank in range(nranks)))
        require_inside(picture)
        require_texts_apart(picture)
        require_arrows(picture, schedule)
        require_results(picture, schedule)
        assert picture.stages == len(schedule.steps)


def require_inside(picture: Picture) -> None:
    for shape in picture.shapes:
        if isinstance(shape, Rect):
            left, top, right, bottom = shape.x, shape.y, shape.x + shape.width, shape.y + shape.height
        elif isinstance(shape, Arrow):
            points = [(shape.x1, shape.y1), (shape.x2, shape.y2), *shape.head]
            (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
        else:
            left, top, right, bottom = shape.left, shape.y - shape.size, shape.left + shape.width, shape.y + shape.size / 4
        assert left >= 0, shape
        assert top >= 0, shape
        assert right <= picture.width, shape
        assert bottom <= picture.height, shape


def require_texts_apart(picture: Picture) -> None:
    """No text overlaps another, taken with the height of its capitals."""
    by_line = defaultdict(list)
    for text in of_kind(picture, Text):
        by_line[text.y].append(text)
    for line in by_line.values():
        for text, following in pairwise(sorted(line, key=lambda text: text.left)):
            assert text.left + text.width <= following.left, (text, following)
    for y, below in pairwise(sorted(by_line)):
        closest = {text.size for text in by_line[below]}
        if below - 0.75 * max(closest) < y:
            for lower in by_line[below]:
                for upper in by_line[y]:
                    apart = upper.left + upper.width <= lower.left or lower.left + lower.width <= upper.left
                    assert apart or below - 0.75 * lower.size >= y, (upper, lower)


def require_arrows(picture: Picture, schedule: Schedule) -> None:
    """Each transfer has one, from under the cell of its source to over the cell of its destination, one row further down."""
    cells = cells_of(picture)
    drawn: list[Counter[Transfer]] = [Counter() for _ in schedule.steps]
    bottoms = {row: max(cell.y + cell.height for key, cell in cells.items() if key[0] == row) for row in range(len(drawn))}
    tops = {row: min(cell.y for key, cell in cells.items() if key[0] == row) for row in range(len(drawn) + 1)}
    for arrow in of_kind(picture, Arrow):
        if arrow.transfer is None:
            continue  # in the legend
        step, transfer = arrow.stage - 1, arrow.transfer
        drawn[step][transfer] += 1
        source, target = cells[step, transfer.src, transfer.chunk], cells[step + 1, transfer.dst, transfer.chunk]
        assert source.x < arrow.x1 < source.x + source.width
        assert target.x < arrow.x2 < target.x + target.width
        assert bottoms[step] < arrow.y1 < arrow.y2 < tops[step + 1]
        assert (arrow.colour, arrow.open_head) == (("reduce", False) if transfer.reduce else ("copy", True))
    assert drawn == [Counter(step) for step in schedule.steps]


def require_results(picture: Picture, schedule: Schedule) -> None:
    """In the end row exactly what the collective promises is underlined, and underlined is what is a result."""
    collective = COLLECTIVES[schedule.collective]
    cells = cells_of(picture)
    bars = {(rect.x, rect.y + rect.height) for rect in of_kind(picture, Rect) if rect.fill == "ink"}
    underlined = {key for key, rect in cells.items() if (rect.x, rect.y + rect.height) in bars}
    assert underlined == {key for key, rect in cells.items() if rect.cell.is_result}
    promised = {
        (rank, block * schedule.parts + part)
        for block in range(schedule.nblocks)
        for rank in collective.takers(schedule.roles, block)
        for part in range(schedule.parts)
    }
    assert {(rank, chunk) for row, rank, chunk in underlined if row == len(schedule.steps)} == promised
    if collective.reduces:
        full = (1 << schedule.nranks) - 1
        for rect in cells.values():
            assert (rect.fill == "complete") == (rect.cell.contributions == full)


def test_a_ring_of_two_by_hand() -> None:
    picture = draw(find_algorithm("all_reduce", "ring").schedule(2), source="somebody, 1999")
    texts = [text.text for text in of_kind(picture, Text)]
    assert texts[:3] == [
        "ring all_reduce on 2 ranks",
        "2 steps, 4 messages; each rank sends 2 of them, in all 1 times the data",
        "somebody, 1999",
    ]
    rows = {key: rect.cell.contributions for key, rect in cells_of(picture).items()}
    assert rows == {
        (0, 0, 0): 0b01, (0, 0, 1): 0b01, (0, 1, 0): 0b10, (0, 1, 1): 0b10,
        (1, 0, 0): 0b11, (1, 0, 1): 0b01, (1, 1, 0): 0b10, (1, 1, 1): 0b11,
        (2, 0, 0): 0b11, (2, 0, 1): 0b11, (2, 1, 0): 0b11, (2, 1, 1): 0b11,
    }  # fmt: skip
    notes = {rect.note for rect in cells_of(picture).values()}
    assert "rank 0, chunk 1, after step 0: 1 of 2 contributions, of rank 0" in notes
    assert "rank 1, chunk 1, after step 0: all 2 contributions, the result" in notes
    assert "step 0: chunk 1 goes from rank 0 to rank 1, reduced into what it holds" in {
        arrow.note for arrow in of_kind(picture, Arrow)
    }
    numbers = [text.text for text in of_kind(picture, Text) if text.stage == 1]
    assert Counter(numbers) == Counter({"step 0": 1, "1": 2, "2": 2})


@pytest.mark.parametrize(
    ("collective", "name", "figures"),
    [
        ("all_reduce", "naive", "2 steps, 6 messages; a rank sends 1 to 3 of them, in all 1 to 3 times the data"),
        ("reduce_scatter", "ring", "3 steps, 12 messages; each rank sends 3 of them, in all 3 blocks"),
        ("gather", "direct", "1 step, 3 messages; a rank sends 0 to 1 of them, in all 0 to 1 block"),
        ("barrier", "dissemination", "2 steps, 8 messages; each rank sends 2 of them"),
    ],
)
def test_figures(collective: str, name: str, figures: str) -> None:
    assert figures in {text.text for text in of_kind(picture_of(collective, name, 4), Text)}


def test_of_an_all_to_all_only_what_a_rank_ever_holds_is_shown() -> None:
    """In its column: what it has, what passes by, what is for it."""
    schedule = find_algorithm("all_to_all", "bruck").schedule(4)
    cells = cells_of(draw(schedule))
    shown = sorted((rect.x, chunk) for (row, rank, chunk), rect in cells.items() if (row, rank) == (0, 1))
    assert [chunk for _, chunk in shown] == [4, 6, 7, 5, 3, 1, 9, 13]
    assert cells[0, 1, 13].fill == "paper"
    assert cells[0, 1, 13].note == "rank 1, chunk 13 (from rank 3 to rank 1), at the start: nothing"
    assert cells[2, 1, 13].note == "rank 1, chunk 13 (from rank 3 to rank 1), after step 1: what rank 3 had, the result"
    assert cells[2, 1, 13].fill == owner(1)


def test_the_root_and_the_hosts_are_named() -> None:
    schedule = find_algorithm("broadcast", "direct").schedule(4, root=2)
    picture = draw(schedule, hosts=(0, 0, 1, 0))
    assert picture.title == "direct broadcast on 4 ranks, root 2 of 2 hosts"
    hosts = [text for text in of_kind(picture, Text) if text.text.startswith("host ")]
    assert [text.text for text in sorted(hosts, key=lambda text: text.x)] == ["host 0", "host 1", "host 0"]
    assert not [text for text in of_kind(draw(schedule), Text) if text.text.startswith("host")]


# ---- colours ------------------------------------------------------------------------------------------------------------

#: G. Machado, M. Oliveira and L. Fernandes, 2009: what is left of linear RGB without one of the three cones.
DEFICIENCIES = {
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def seen(colour: str, deficiency: str) -> list[float]:
    """RGB from 0 to 1, as somebody with a colour deficiency sees it."""
    linear = [(int(colour[first : first + 2], 16) / 255) ** 2.2 for first in (1, 3, 5)]
    left = (sum(a * b for a, b in zip(row, linear, strict=True)) for row in DEFICIENCIES[deficiency])
    return [min(1.0, max(0.0, part)) ** (1 / 2.2) for part in left]


def counts_of(nranks: int) -> list[str]:
    """Names of the colours of 1 to all contributions."""
    meaning = Meaning(find_algorithm("all_reduce", "ring").schedule(nranks))
    return [meaning.colour(0, (1 << count) - 1) for count in range(1, nranks + 1)]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("nranks", range(2, 17))
def test_colours_go_one_way_with_contributions(palette: Palette, nranks: int) -> None:
    lights = [luminance(palette.colour(name)) for name in counts_of(nranks)]
    empty = luminance(palette.paper)
    away = [abs(light - empty) for light in (empty, *lights)]
    assert all(less < more for less, more in pairwise(away)), "each contribution takes it further away from empty paper"


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_complete_is_told_from_partial_by_everybody(palette: Palette, deficiency: str) -> None:
    *partial, complete = (seen(palette.colour(name), deficiency) for name in counts_of(16))
    for colour in partial:
        assert sum((a - b) ** 2 for a, b in zip(colour, complete, strict=True)) ** 0.5 > 0.25
    arrows = [seen(colour, deficiency) for colour in (palette.reduce, palette.copy)]
    assert sum((a - b) ** 2 for a, b in zip(*arrows, strict=True)) ** 0.5 > 0.25


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_stand_out(palette: Palette) -> None:
    """4.5 is what WCAG asks for at level AA."""

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((luminance(palette.colour(one)), luminance(palette.colour(other))))
        return (light + 0.05) / (dark + 0.05)

    fills = [*counts_of(16), *(owner(rank / 15) for rank in range(16))]
    for fill in fills:
        assert contrast(on(fill), fill) > 4.5, fill
    for ground, text in [("paper", "ink"), ("paper", "muted"), ("band", "ink"), ("band", "muted"), ("host", "ink")]:
        assert contrast(text, ground) > 4.5, (text, ground)


def test_owners_have_colours_of_their_own() -> None:
    colours = [LIGHT.colour(owner(rank / 15)) for rank in range(16)]
    assert len(set(colours)) == 16
    assert sorted(colours, key=luminance) == colours


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "name", "nranks"), [("all_reduce", "ring", 5), ("all_to_all", "bruck", 8), ("scatter", "direct", 3)]
)
def test_an_svg_has_all_shapes(collective: str, name: str, nranks: int) -> None:
    picture = picture_of(collective, name, nranks)
    root = ElementTree.fromstring(to_svg(picture))
    assert float(root.get("width", "")) == pytest.approx(picture.width, abs=0.01)
    assert root.get("aria-label") == picture.title
    assert [element.text for element in root.iter(f"{SVG}text")] == [text.text for text in of_kind(picture, Text)]
    assert len(list(root.iter(f"{SVG}rect"))) == len(list(of_kind(picture, Rect))) + 1, "and the paper"
    assert len(list(root.iter(f"{SVG}path"))) == 2 * len(list(of_kind(picture, Arrow))), "line and head"
    notes = [shape.note for shape in picture.shapes if isinstance(shape, Rect | Arrow) and shape.note]
    assert [element.text for element in root.iter(f"{SVG}title")] == notes
    stages = [int(group.get("data-stage", "")) for group in root.findall(f"{SVG}g") if group.get("data-stage")]
    assert stages == list(range(picture.stages + 1))


def test_names_of_algorithms_cannot_break_files() -> None:
    b = Builder("broadcast", "</title>\"'<&--><script>", 2)
    b.chunk(0, 0).send(1)
    picture = draw(b.build(), source="<b>&amp;")
    root = ElementTree.fromstring(to_svg(picture))
    assert root.get("aria-label") == picture.title
    assert "<b>&amp;" in [text.text for text in root.iter(f"{SVG}text")]
    assert "--><script>" not in to_html(picture)


def test_files_are_the_same_in_every_process() -> None:
    program = (
        "from dsml_gpu.schedules import find_algorithm\n"
        "from dsml_gpu.schedules.drawing import draw, to_html\n"
        "import sys; sys.stdout.write(to_html(draw(find_algorithm('all_to_all', 'bruck').schedule(5))))"
    )
    pages = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, timeout=60, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(pages) == 1


class Outside(HTMLParser):
    """Collects what a page would load, and the text of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [(tag, value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert tag not in ("link", "iframe", "img")


def test_a_page_needs_nothing_else_and_defines_its_colours() -> None:
    page = to_html(picture_of("all_reduce", "halving_doubling", 6))
    outside = Outside()
    outside.feed(page)
    assert not outside.loads
    assert re.findall(r"https?://[^\s\"']*", page) == ["http://www.w3.org/2000/svg"], "which is a name"
    assert "url(" not in page
    assert "@import" not in page
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    for definitions in page.split("@media (prefers-color-scheme: dark)"):
        assert used <= set(re.findall(r"--([a-z0-9-]+):", definitions))
    assert "/* light" not in page
    assert "<!--" not in page


def test_a_png_has_the_colours() -> None:
    image_of = pytest.importorskip("PIL.Image").open
    picture = draw(find_algorithm("all_reduce", "ring").schedule(3))
    with image_of(io.BytesIO(to_png(picture))) as image:
        assert image.format == "PNG"
        assert abs(image.width - 2 * picture.width) <= 1
        assert abs(image.height - 2 * picture.height) <= 1
        pixels = image.convert("RGB")
        for rect in cells_of(picture).values():
            # In a corner, where no label is.
            colour = pixels.getpixel((round(2 * rect.x + 6), round(2 * rect.y + 6)))
            assert "#{:02x}{:02x}{:02x}".format(*colour) == LIGHT.colour(rect.fill)
        for arrow in of_kind(picture, Arrow):
            x, y = round(2 * arrow.x2), round(2 * arrow.y2)
            around = pixels.crop((x - 3, y - 3, x + 3, y + 3))
            assert len(around.getcolors()) > 1, "the tip of the arrow"


def test_a_large_png_is_drawn_smaller() -> None:
    image_of = pytest.importorskip("PIL.Image").open
    picture = Picture("", 40_000, 3_000, 0, (Rect(20_000, 1_000, 20_000, 2_000, "complete"),))
    with image_of(io.BytesIO(to_png(picture))) as image:
        assert image.width * image.height < 31e6
        assert image.width / image.height == pytest.approx(40 / 3, rel=0.01)
        assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((image.width - 2, image.height - 2))) == LIGHT.complete


def test_texts_are_no_wider_than_they_are_taken_for() -> None:
    """In the font of the PNG files, and in that which browsers take for Helvetica and Arial where it is installed."""
    fonts = pytest.importorskip("PIL.ImageFont")
    texts = {
        text.text
        for algorithm in ALGORITHMS
        for text in of_kind(draw(schedule_of(algorithm, 16), source=algorithm.source), Text)
    }
    measured = [fonts.load_default(100)]
    liberation = Path("/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf")
    if liberation.exists():
        measured.append(fonts.truetype(str(liberation), 100))
    for text in texts:
        for font in measured:
            assert font.getlength(text) <= text_width(text, 100) + 2, (text, font.getname())


@pytest.mark.parametrize("broken", ["missing", "old"])
def test_without_pillow_png_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "PIL", None)
    else:
        fonts = pytest.importorskip("PIL.ImageFont")
        monkeypatch.setattr(fonts, "load_default", lambda: None)
    with pytest.raises(PillowMissing, match=r"^PNG files need Pillow 10.1 or newer: pip install 'dsml_gpu\[draw\]'$"):
        to_png(draw(find_algorithm("all_reduce", "ring").schedule(2)))


def test_an_arrow_that_copies_is_dashed_only_where_others_reduce() -> None:
    arrows = [*of_kind(picture_of("all_reduce", "ring", 3), Arrow), *of_kind(picture_of("broadcast", "ring", 3), Arrow)]
    kinds = {(arrow.colour, arrow.dashed) for arrow in arrows}
    assert kinds == {("reduce", False), ("copy", True), ("copy", False)}


def test_every_cell_has_its_place() -> None:
    cells = [rect for rect in of_kind(picture_of("all_to_all", "bruck", 6), Rect) if rect.cell is not None]
    assert len({rect.cell for rect in cells}) == len({(rect.x, rect.y) for rect in cells}) == len(cells)
