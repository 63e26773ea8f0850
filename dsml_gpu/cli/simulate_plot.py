"""The picture of `dsml-gpu simulate`: time against size, time against ranks, and who is fastest where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from dsml_gpu.cli.simulate import Row, fastest
from dsml_gpu.cli.units import format_duration, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: A place on the horizontal axis, and the times there by the name of the algorithm.
Point = tuple[int, dict[str, float]]
#: Names on an axis for which there is room.
_MOST_NAMES = 10


def plot(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draws predictions to a PNG file.

    One panel is against size, on the most ranks, and one against ranks, at the size in the middle. Where both vary, a third
    one shows for each number of ranks and each size which algorithm is fastest.

    Args:
        title: what stands above.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.lines import Line2D

    ranks = sorted({row.nranks for row in rows})
    sizes = sorted({row.size_bytes for row in rows})
    names = list(rows[0].times_s)
    # Ten colours that are told apart easily.
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    has_map = len(ranks) > 1 and len(sizes) > 1
    figure = Figure(figsize=(17 if has_map else 12, 5.2), layout="constrained")
    panels = figure.subplots(1, 3 if has_map else 2)
    middle = sizes[len(sizes) // 2]
    by_size = sorted((row.size_bytes, row.times_s) for row in rows if row.nranks == ranks[-1])
    by_ranks = sorted((row.nranks, row.times_s) for row in rows if row.size_bytes == middle)
    draw_lines(panels[0], colors, by_size, format_size)
    panels[0].set(title=f"{ranks[-1]} ranks", xlabel="buffer of each rank", ylabel="predicted time")
    draw_lines(panels[1], colors, by_ranks, str)
    panels[1].set(title=f"{format_size(middle)} on each rank", xlabel="ranks", ylabel="predicted time")
    if has_map:
        draw_map(panels[2], colors, rows)
    handles = [Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()]
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_lines(axes: Axes, colors: dict[str, str], points: Sequence[Point], name_of: Callable[[int], str]) -> None:
    """Time against place; rings mark where another algorithm becomes the fastest.

    Args:
        points: by place.
        name_of: a place for people.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places = [place for place, _ in points]
    for number, (name, color) in enumerate(colors.items()):
        width = 3.2 - 2.2 * number / len(colors)  # where lines coincide, the later ones leave the earlier ones to be seen
        axes.plot(places, [times_s[name] for _, times_s in points], "o-", color=color, markersize=width + 2, linewidth=width)
    for place, time_s in crossovers(points):
        axes.plot(place, time_s, "o", markersize=11, markerfacecolor="none", markeredgecolor="black", zorder=3)
        name = name_of(_about(place))
        axes.annotate(name, (place, time_s), (7, -7), textcoords="offset points", va="top", fontsize=9, zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _name_places(axes.xaxis, places, places, name_of)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_duration(seconds)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(alpha=0.3)


def draw_map(axes: Axes, colors: dict[str, str], rows: Sequence[Row]) -> None:
    """For each number of ranks and each size, the colour of the fastest algorithm."""
    from matplotlib.colors import ListedColormap

    ranks = sorted({row.nranks for row in rows})
    sizes = sorted({row.size_bytes for row in rows})
    names = list(colors)
    best = {(row.nranks, row.size_bytes): names.index(row.best) for row in rows}
    cells = [[best[nranks, size] for nranks in ranks] for size in sizes]
    axes.pcolormesh(
        cells,
        cmap=ListedColormap(list(colors.values())),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        edgecolors="white",
        linewidth=0.6,
    )
    _name_places(axes.xaxis, ranks, [place + 0.5 for place in range(len(ranks))], str)
    _name_places(axes.yaxis, sizes, [place + 0.5 for place in range(len(sizes))], format_size)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set(title="the fastest", xlabel="ranks", ylabel="buffer of each rank")


def _name_places(axis: Axis, values: Sequence[int], places: Sequence[float], name_of: Callable[[int], str]) -> None:
    """Names as many of the places as there is room for."""
    from matplotlib.ticker import FixedLocator, NullLocator

    every = -(-len(values) // _MOST_NAMES)
    axis.set_major_locator(FixedLocator(list(places[::every])))
    axis.set_ticklabels([name_of(value) for value in values[::every]])
    axis.set_minor_locator(NullLocator())


def _about(place: float) -> int:
    """Its first two digits, in the unit that it has as a number of bytes."""
    unit = 1024.0 ** int(math.log(place, 1024))
    return round(float(f"{place / unit:.2g}") * unit)


def crossovers(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Places and times at which another algorithm becomes the fastest, on straight lines between points in log-log scale.

    Args:
        points: by place. Those with a time of 0 are left out: they are nowhere on such a scale.
    """
    met = []
    shown = [point for point in points if min(point[1].values()) > 0]
    for (place, times_s), (next_place, next_times_s) in pairwise(shown):
        before, after = fastest(times_s), fastest(next_times_s)
        if before == after:
            continue
        ahead = abs(math.log(times_s[after] / times_s[before]))
        behind = abs(math.log(next_times_s[before] / next_times_s[after]))
        part = ahead / (ahead + behind) if ahead + behind else 0.5
        where = math.exp((1 - part) * math.log(place) + part * math.log(next_place))
        when = math.exp((1 - part) * math.log(times_s[before]) + part * math.log(next_times_s[before]))
        met.append((where, when))
    return met
