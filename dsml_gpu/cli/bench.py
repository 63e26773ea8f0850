"""`dsml-gpu bench`: times all-reduces and checks every element, with the columns and the definitions of nccl-tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import typer

from dsml_gpu.cli.fleet import Fleet, ServerDidNotStart
from dsml_gpu.cli.measure import algbw_gb_s, busbw_gb_s, count_wrong, expected, inputs, time_interleaved
from dsml_gpu.cli.serve import fail
from dsml_gpu.cli.units import parse_size
from dsml_gpu.client import Client, CollectiveResult, Communicator, connect, local
from dsml_gpu.client.collectives import OPS, TRANSPORTS
from dsml_gpu.errors import DsmlError, InvalidValue
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import UnknownAlgorithm, find_algorithm


@dataclass(frozen=True, slots=True)
class Setup:
    """What to measure, and where.

    Attributes:
        sizes: bytes of each rank's buffer; what is over a whole number of elements is not used.
        algorithms: measured in turn at each size.
        dtype, op, transport: by their names, in lower case.
        devices: number of ranks.
        target: host:port of a running coordinator; None: servers started for this.
        embedded: those servers are one coordinator with devices inside this process, not a process each.
        iterations, warmup: runs that count, and runs before them that do not.

    Raises:
        InvalidValue: on construction, where a value does not do.
    """

    sizes: tuple[int, ...]
    algorithms: tuple[str, ...] = ("ring", "naive")
    dtype: str = "float64"
    op: str = "sum"
    transport: str = "auto"
    devices: int = 4
    target: str | None = None
    embedded: bool = False
    iterations: int = 20
    warmup: int = 3

    def __post_init__(self) -> None:
        for algorithm in self.algorithms:
            if algorithm != "auto":
                _require_algorithm(algorithm)
        _require_known("data type", self.dtype, [name.lower() for name in DTYPES])
        _require_known("op", self.op, OPS)
        _require_known("transport", self.transport, TRANSPORTS)
        itemsize = DTYPES[self.dtype.upper()].itemsize
        for size in self.sizes:
            if size < itemsize:
                raise InvalidValue(f"{size} bytes hold no {self.dtype}, which takes {itemsize}")
        if self.target is not None and self.embedded:
            raise InvalidValue("a target and embedded devices exclude each other")


def parse_setup(*, sizes: str, algorithms: str, dtype: str, op: str, transport: str, **others: Any) -> Setup:
    """The setup that options ask for; several values of one option are separated by commas.

    Raises:
        ValueError: a value does not do.
    """
    return Setup(
        sizes=tuple(parse_size(size) for size in sizes.split(",")),
        algorithms=tuple(name.strip() for name in algorithms.split(",")),
        dtype=dtype.lower(),
        op=op.lower(),
        transport=transport.lower(),
        **others,
    )


def _require_algorithm(name: str) -> None:
    try:
        find_algorithm("all_reduce", name)
    except UnknownAlgorithm as error:
        raise InvalidValue(str(error)) from None


def _require_known(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise InvalidValue(f"unknown {what} {name!r}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm at one size.

    Attributes:
        size_bytes, count: of each rank's buffer, in bytes and in elements.
        transports: that carried data; empty where nothing had to move.
        times_us: of each run, from the client's call to its return, in microseconds.
        wrong: elements, over all ranks, that differ from numpy's result.
    """

    size_bytes: int
    count: int
    dtype: str
    op: str
    algorithm: str
    transports: tuple[str, ...]
    nranks: int
    times_us: tuple[float, ...]
    wrong: int

    @property
    def time_us(self) -> float:
        return median(self.times_us)

    @property
    def algbw_gb_s(self) -> float:
        return algbw_gb_s(self.size_bytes, self.time_us / 1e6)

    @property
    def busbw_gb_s(self) -> float:
        return busbw_gb_s(self.size_bytes, self.time_us / 1e6, self.nranks)

    def quartiles_us(self) -> tuple[float, float]:
        """Times that a quarter and three quarters of the runs stay below."""
        if len(self.times_us) == 1:
            return self.time_us, self.time_us
        first, _, third = quantiles(self.times_us, n=4, method="inclusive")
        return first, third


def run(setup: Setup, json_file: Path | None, plot_file: Path | None) -> None:
    """Measures and prints. Exit status 1 where an element is wrong, and with one line where something else is."""
    # Whatever would lose the results at the end is found out first.
    for file in (json_file, plot_file):
        if file is not None and not file.resolve().parent.is_dir():
            fail(f"{file}: there is no such folder")
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib; pip install 'dsml_gpu[bench]'")
    print(heading(setup), flush=True)
    rows = []
    try:
        for row in measure(setup):
            print(line(row), flush=True)
            rows.append(row)
        print(footing(rows))
        if json_file is not None:
            json_file.write_text(as_json(rows), encoding="utf-8")
        if plot_file is not None:
            plot(rows, plot_file)
    except (DsmlError, OSError, ServerDidNotStart) as error:
        fail(str(error))
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(setup: Setup) -> Iterator[Row]:
    """Starts what must be started, and yields rows as they are measured.

    Raises:
        DsmlError: a server refused or failed.
        ServerDidNotStart: a server did not start.
    """
    with _client(setup) as client, client.communicator(setup.devices, transport=setup.transport) as comm:
        for size in setup.sizes:
            yield from measure_size(comm, setup, size)


@contextmanager
def _client(setup: Setup) -> Iterator[Client]:
    if setup.target is not None:
        with connect(setup.target) as client:
            yield client
    elif setup.embedded:
        with local(setup.devices) as client:
            yield client
    else:
        with Fleet(setup.devices) as fleet, connect(fleet.address) as client:
            yield client


def measure_size(comm: Communicator, setup: Setup, size_bytes: int) -> list[Row]:
    """Checks, then times all algorithms at one size, in turn."""
    dtype = DTYPES[setup.dtype.upper()]
    count = size_bytes // dtype.itemsize
    arrays = comm.empty(count, dtype)  # before the host's arrays: the devices say clearly when they have no room
    sources = inputs(comm.nranks, count, dtype, setup.op)
    right = expected(sources, setup.op)

    def all_reduce(algorithm: str) -> CollectiveResult:
        result = comm.all_reduce(arrays, op=setup.op, algorithm=algorithm)
        assert result is not None  # it is None in a group only
        return result

    wrong: dict[str, int] = {}
    transports: dict[str, tuple[str, ...]] = {}
    for algorithm in setup.algorithms:
        for array, source in zip(arrays, sources, strict=True):
            array.set(source)
        transports[algorithm] = all_reduce(algorithm).transports
        wrong[algorithm] = sum(count_wrong(array.get(), right) for array in arrays)
    work = {algorithm: partial(all_reduce, algorithm) for algorithm in setup.algorithms}
    times_s = time_interleaved(work, setup.iterations, setup.warmup)
    for array in arrays:
        array.free()
    return [
        Row(
            size_bytes=arrays[0].nbytes,
            count=count,
            dtype=setup.dtype,
            op=setup.op,
            algorithm=algorithm,
            transports=transports[algorithm],
            nranks=comm.nranks,
            times_us=tuple(run_s * 1e6 for run_s in times_s[algorithm]),
            wrong=wrong[algorithm],
        )
        for algorithm in setup.algorithms
    ]


# ---- output ----------------------------------------------------------------------------------------------------------

_WIDTHS = (12, 12, 9, 6, 10, 10, 10, 9, 9, 7)
_HEADINGS = ("size", "count", "type", "redop", "algorithm", "transport", "time", "algbw", "busbw", "#wrong")
_UNITS = ("(B)", "(elements)", "", "", "", "", "(us)", "(GB/s)", "(GB/s)", "")


def heading(setup: Setup) -> str:
    """What stands above the rows."""
    started = "in this process" if setup.embedded else "in a process each"
    where = f"of {setup.target}" if setup.target else started
    return "\n".join(
        [
            f"# all-reduce in place on {setup.devices} devices {where}",
            f"# time: median of {setup.iterations} runs after {setup.warmup} to warm up, algorithms in turn",
            "#",
            "#" + _columns(_HEADINGS)[1:],
            "#" + _columns(_UNITS)[1:],
        ]
    )


def line(row: Row) -> str:
    """One row of the table."""
    return _columns(
        (
            str(row.size_bytes),
            str(row.count),
            row.dtype,
            row.op,
            row.algorithm,
            "+".join(row.transports) or "-",
            f"{row.time_us:.1f}",
            f"{row.algbw_gb_s:.3g}",
            f"{row.busbw_gb_s:.3g}",
            str(row.wrong),
        )
    )


def footing(rows: Sequence[Row]) -> str:
    """What stands below the rows."""
    wrong = sum(row.wrong for row in rows)
    average = sum(row.busbw_gb_s for row in rows) / len(rows)
    return f"# wrong elements: {wrong} {'FAILED' if wrong else 'OK'}\n# average busbw: {average:.3g} GB/s"


def _columns(cells: Sequence[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def as_json(rows: Sequence[Row]) -> str:
    """A JSON list with one object for each row.

    Keys: ``size_bytes`` and ``count`` (elements) of each rank's buffer; ``dtype``; ``op``; ``algorithm``;
    ``transports`` (a list, empty where nothing had to move); ``nranks``; ``iterations``; ``time_us`` (median), between
    ``time_us_quartile1`` and ``time_us_quartile3``; ``algbw_gb_s`` and ``busbw_gb_s`` (1e9 bytes a second); ``wrong``
    (elements, over all ranks).
    """
    return json.dumps([_json_object(row) for row in rows], indent=2) + "\n"


def _json_object(row: Row) -> dict[str, Any]:
    quartile1_us, quartile3_us = row.quartiles_us()
    return {
        "size_bytes": row.size_bytes,
        "count": row.count,
        "dtype": row.dtype,
        "op": row.op,
        "algorithm": row.algorithm,
        "transports": list(row.transports),
        "nranks": row.nranks,
        "iterations": len(row.times_us),
        "time_us": row.time_us,
        "time_us_quartile1": quartile1_us,
        "time_us_quartile3": quartile3_us,
        "algbw_gb_s": row.algbw_gb_s,
        "busbw_gb_s": row.busbw_gb_s,
        "wrong": row.wrong,
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws time against size, one line for each algorithm, to a PNG file."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        of_algorithm = sorted((row for row in rows if row.algorithm == algorithm), key=lambda row: row.size_bytes)
        sizes = [row.size_bytes for row in of_algorithm]
        (drawn,) = axes.plot(sizes, [row.time_us / 1e6 for row in of_algorithm], "o-", markersize=4, label=algorithm)
        lower_s, upper_s = np.transpose([row.quartiles_us() for row in of_algorithm]) / 1e6
        axes.fill_between(sizes, lower_s, upper_s, color=drawn.get_color(), alpha=0.2, linewidth=0)
    for axis, unit in ((axes.xaxis, "B"), (axes.yaxis, "s")):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=30)
    first = rows[0]
    over = f" over {'+'.join(first.transports)}" if first.transports else ""
    axes.set_title(f"All-reduce on {first.nranks} devices{over}: {first.dtype}, {first.op}")
    axes.set_xlabel("buffer of each rank (bytes)")
    axes.set_ylabel("time (seconds): median and quartiles")
    axes.grid(alpha=0.3)
    axes.legend(title="algorithm")
    figure.savefig(path, dpi=150)
