"""`dsml-gpu draw`: the picture of an algorithm's schedule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dsml_gpu.cli.serve import fail
from dsml_gpu.schedules import COLLECTIVES, InvalidSchedule, Layout, Schedule, find_algorithm
from dsml_gpu.schedules.drawing import Picture, PillowMissing, draw, to_html, to_png, to_svg

#: More make pictures of hundreds of thousands of cells, which nobody can read.
MAX_RANKS = 32
DEFAULT_RANKS = 4


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be drawn, and into which file.

    Attributes:
        output: its suffix says what kind of file it is.
        algorithm, collective: by name.
        nranks: number of ranks.
        root: of a rooted collective.
        hosts: the host of each rank, as numbers from 0; empty: all on one.

    Raises:
        ValueError: on construction, where a value does not do.
    """

    output: Path
    algorithm: str
    collective: str = "all_reduce"
    nranks: int = DEFAULT_RANKS
    root: int = 0
    hosts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.output.suffix.lower() not in (".svg", ".png", ".html"):
            raise ValueError(f"cannot draw {self.output}: its name must end in .svg, .png or .html")
        if self.collective not in COLLECTIVES:
            raise ValueError(f"unknown collective {self.collective!r}; known: {', '.join(COLLECTIVES)}")
        find_algorithm(self.collective, self.algorithm)
        if not 1 <= self.nranks <= MAX_RANKS:
            raise ValueError(f"a picture can have 1 to {MAX_RANKS} ranks, not {self.nranks}")
        if not 0 <= self.root < self.nranks:
            raise ValueError(f"root {self.root} is not one of {self.nranks} ranks")
        if self.hosts and len(self.hosts) != self.nranks:
            raise ValueError(f"the hosts of {len(self.hosts)} ranks are given, and there are {self.nranks}")


def parse_setup(*, ranks: int | None, hosts: str | None, **others: Any) -> Setup:
    """The setup that options ask for; where hosts are given, they say how many ranks there are.

    Raises:
        ValueError: a value does not do.
    """
    host_of = parse_hosts(hosts) if hosts is not None else ()
    nranks = ranks if ranks is not None else len(host_of) or DEFAULT_RANKS
    return Setup(nranks=nranks, hosts=host_of, **others)


def parse_hosts(text: str) -> tuple[int, ...]:
    """The host of each rank: ``"2x4"`` is 2 hosts with 4 ranks each, ``"0,0,1"`` names the host of each rank.

    Raises:
        ValueError: it is neither.
    """
    if match := re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text):
        hosts, ranks_per_host = map(int, match.groups())
        return tuple(rank // ranks_per_host for rank in range(hosts * ranks_per_host))
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        return tuple(map(int, text.split(",")))
    raise ValueError(
        f"{text!r} says neither hosts and ranks of each, such as 2x4, nor the host of each rank, such as 0,0,1,1"
    )


def run(setup: Setup) -> None:
    """Writes the file and says what is in it. Exit status 1, with one line, where that is not possible."""
    try:
        schedule, picture = drawn(setup)
        setup.output.write_bytes(encoded(picture, setup.output.suffix.lower()))
    except (InvalidSchedule, PillowMissing) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {setup.output}: {error.strerror or error}")
    typer.echo(f"{setup.output}: {schedule}")


def drawn(setup: Setup) -> tuple[Schedule, Picture]:
    """The schedule and its picture.

    Raises:
        InvalidSchedule: a plug-in's algorithm is wrong.
    """
    algorithm = find_algorithm(setup.collective, setup.algorithm)
    ranks = range(setup.nranks)
    is_listed = COLLECTIVES[setup.collective].layout is Layout.LISTED
    pairs = tuple((rank, (rank + 1) % setup.nranks) for rank in ranks) if is_listed else ()
    schedule = algorithm.schedule(setup.nranks, root=setup.root, pairs=pairs, hosts=setup.hosts)
    return schedule, draw(schedule, source=algorithm.source, hosts=setup.hosts)


def encoded(picture: Picture, suffix: str) -> bytes:
    """The bytes of a file with this suffix. Raises PillowMissing."""
    if suffix == ".png":
        return to_png(picture)
    return (to_svg if suffix == ".svg" else to_html)(picture).encode()
