"""Algorithms by name: those of the catalog, and those of plug-ins.

A plug-in is any installed distribution with entry points in the group ``dsml_gpu.schedules``. Each is named
``COLLECTIVE.ALGORITHM`` and is an `Algorithm`, or a callable without arguments that returns one. In the plug-in's
``pyproject.toml``:

    [project.entry-points."dsml_gpu.schedules"]
    "all_reduce.my_ring" = "my_package.my_ring:ALGORITHM"

and in ``my_package/my_ring.py``:

    from dsml_gpu.schedules import Algorithm, Builder, Schedule

    def my_ring(nranks: int) -> Schedule:
        b = Builder("all_reduce", "my_ring", nranks, parts=nranks)
        ...
        return b.build()

    ALGORITHM = Algorithm("all_reduce", "my_ring", my_ring, source="I. Myself, 2026")

Where coordinators run, it is then an algorithm like any other. What the package brings cannot be replaced: an entry point
with the name of an algorithm of the catalog, like one whose name has another form, is ignored, with a warning in the log.

Nothing of a plug-in is imported before one of its algorithms, or all of the collective's, are asked for. Installed
distributions are looked at once in a process.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from dsml_gpu.schedules.algorithm import Algorithm
from dsml_gpu.schedules.catalog import algorithms_of
from dsml_gpu.schedules.collectives import COLLECTIVES

#: Of entry points.
GROUP = "dsml_gpu.schedules"


class UnknownAlgorithm(ValueError):
    """The collective has no algorithm of that name; the message lists those that it has."""


class BrokenPlugin(UnknownAlgorithm):
    """A plug-in has promised the algorithm and does not give it; the message names distribution and entry point."""


def find_algorithm(collective: str, name: str) -> Algorithm:
    """The algorithm of a collective by name: the catalog's, else that of a plug-in.

    Raises:
        BrokenPlugin: it is of a plug-in that fails to load or gives something else.
        UnknownAlgorithm: there is none.
    """
    own = algorithms_of(collective)
    if name in own:
        return own[name]
    if name in _plugged_in(collective):
        return _load(collective, name)
    raise UnknownAlgorithm(f"unknown algorithm {name!r} of {collective}; known: {', '.join(known_algorithms(collective))}")


def known_algorithms(collective: str) -> dict[str, Algorithm]:
    """All algorithms of a collective by name: the catalog's in its order, then those of plug-ins; without broken ones."""
    known = algorithms_of(collective)
    for name in _plugged_in(collective):
        try:
            known[name] = _load(collective, name)
        except BrokenPlugin as error:
            _log(str(error))
    return known


@cache
def _log(warning: str) -> None:
    """Logs a warning, each one once."""
    logging.getLogger(__name__).warning(warning)


@cache
def _plugged_in(collective: str) -> dict[str, list[EntryPoint]]:
    """The entry points for a collective's algorithms by their names, sorted; of one name there should be one."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        of, _, name = point.name.partition(".")
        if of not in COLLECTIVES or not name:
            _log(f"{_describe(point)} is ignored: its name must be COLLECTIVE.ALGORITHM")
        elif of == collective and name in ("auto", *algorithms_of(collective)):
            _log(f"{_describe(point)} is ignored: its name is taken by the package")
        elif of == collective:
            found.setdefault(name, []).append(point)
    return dict(sorted(found.items()))


def _load(collective: str, name: str) -> Algorithm:
    """The algorithm of a plug-in. Raises BrokenPlugin."""
    points = _plugged_in(collective)[name]
    if len(points) > 1:
        raise BrokenPlugin(f"several plug-ins claim {points[0].name}: {'; '.join(map(_describe, points))}")
    outcome = _loaded(points[0])
    if isinstance(outcome, Algorithm):
        return outcome
    raise BrokenPlugin(f"{_describe(points[0])}: {outcome}")


@cache
def _loaded(point: EntryPoint) -> Algorithm | str:
    """What an entry point gives, or what is wrong with it."""
    try:
        given = point.load()
        if callable(given):
            given = given()
    except Exception as error:  # noqa: BLE001  # whatever a plug-in does must not disturb others; _load says what it was
        return f"{type(error).__name__}: {error}"
    if not isinstance(given, Algorithm):
        return f"it is no dsml_gpu.schedules.Algorithm but {given!r}"
    if f"{given.collective}.{given.name}" != point.name:
        return f"it is the algorithm {given.name!r} of {given.collective}"
    return given


def _describe(point: EntryPoint) -> str:
    distribution = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
    return f"entry point {point.name!r} ({point.value}) of {distribution}"
