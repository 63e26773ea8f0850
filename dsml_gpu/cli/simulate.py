"""`dsml-gpu simulate`: how long algorithms would take on clusters that are not here, and which is best where."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dsml_gpu.cli.measure import algbw_gb_s
from dsml_gpu.cli.serve import fail
from dsml_gpu.cli.topology_file import load_cluster
from dsml_gpu.cli.units import format_bandwidth, format_duration, format_size, parse_size
from dsml_gpu.schedules import COLLECTIVES, Algorithm, Layout, find_algorithm, known_algorithms
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel
from dsml_gpu.schedules.outlines import has_outline
from dsml_gpu.schedules.ranking import predictors
from dsml_gpu.schedules.topology import DEFAULT_CLUSTER, Cluster, Link

#: Largest number of ranks of algorithms that have no outline, whose schedules must be written out.
MOST_RANKS_BY_EVENTS = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """What to predict.

    Attributes:
        algorithms: all of one collective.
        ranks, sizes: numbers of ranks, and bytes of the larger one of a rank's two buffers; every one with every other one.
        cluster: where.
        model: what processors cost.
        slice_bytes: into which devices cut chunks.
        max_messages: of a simulation by events; what has more is predicted by rounds.

    Raises:
        ValueError: on construction, where a value does not do.
    """

    algorithms: tuple[Algorithm, ...]
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    cluster: Cluster = DEFAULT_CLUSTER
    model: CostModel = LINKS_ONLY
    slice_bytes: int = 512 << 10
    max_messages: int = 2000

    def __post_init__(self) -> None:
        if min(self.ranks) < 1:
            raise ValueError("at least 1 rank is needed")
        if min(self.sizes) < 1:
            raise ValueError("at least 1 byte is needed")
        if self.slice_bytes < 1:
            raise ValueError(f"slices cannot have {self.slice_bytes} bytes")
        for algorithm in self.algorithms:
            if max(self.ranks) > MOST_RANKS_BY_EVENTS and not has_outline(algorithm):
                raise ValueError(
                    f"{algorithm.collective} {algorithm.name} has no outline, so it can be simulated event by event only: "
                    f"on at most {MOST_RANKS_BY_EVENTS} ranks, not {max(self.ranks)}"
                )
        self.cluster.topology(max(self.ranks))  # raises where there are not so many devices

    @property
    def collective(self) -> str:
        return self.algorithms[0].collective


def parse_setup(
    *,
    collective: str,
    algorithms: str,
    ranks: str,
    sizes: str,
    topology: Path | None,
    cost_model: str,
    **others: Any,
) -> Setup:
    """The setup that options ask for.

    Args:
        algorithms: names with commas; empty: all of the collective. See `algorithm_of`.
        ranks, sizes: see `parse_list`.
        topology: a TOML file (see `topology_file`).
        cost_model: see `parse_cost_model`.

    Raises:
        ValueError: a value does not do, or a file cannot be read.
    """
    if collective not in COLLECTIVES or collective in ("send_recv", "barrier"):
        known = [name for name in COLLECTIVES if name not in ("send_recv", "barrier")]
        raise ValueError(f"unknown collective {collective!r}; known: {', '.join(known)}")
    names = [name.strip() for name in algorithms.split(",")] if algorithms else list(known_algorithms(collective))
    return Setup(
        algorithms=tuple(dict.fromkeys(algorithm_of(collective, name) for name in names)),
        ranks=parse_list(ranks, _parse_whole),
        sizes=parse_list(sizes, parse_size),
        cluster=DEFAULT_CLUSTER if topology is None else load_cluster(topology),
        model=parse_cost_model(cost_model),
        **others,
    )


def algorithm_of(collective: str, name: str) -> Algorithm:
    """An algorithm by name; ``tree`` is the double binary tree where the collective has one, else the binomial tree.

    Raises:
        UnknownAlgorithm: there is none.
    """
    if name == "tree":
        trees = [tree for tree in ("double_binary_tree", "binomial_tree") if tree in known_algorithms(collective)]
        name = trees[0] if trees else name
    return find_algorithm(collective, name)


def parse_cost_model(text: str) -> CostModel:
    """``links``: processors cost nothing; ``default``: what was measured on an ordinary machine; else a file of `tune`.

    Raises:
        ValueError: it is none of these.
    """
    known = {"links": LINKS_ONLY, "default": DEFAULT_COST_MODEL}
    if text in known:
        return known[text]
    try:
        return CostModel.from_json(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{text}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


def parse_list(text: str, parse: Callable[[str], int]) -> tuple[int, ...]:
    """Numbers with commas; ``A..B`` stands for A, 2A, 4A ... up to B: for the powers of two where A is one.

    Raises:
        ValueError: it is no such list.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        number = parse(first)
        if dots and not 0 < number <= parse(last):
            raise ValueError(f"{part!r} is not a range such as 8..1024: it must begin above 0 and not end below that")
        numbers.append(number)
        while dots and 2 * numbers[-1] <= parse(last):
            numbers.append(2 * numbers[-1])
    return tuple(dict.fromkeys(numbers))


def _parse_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of ranks") from None


@dataclass(frozen=True, slots=True)
class Row:
    """All algorithms on one number of ranks, at one size.

    Attributes:
        nranks: number of ranks.
        size_bytes: see `Setup.sizes`.
        times_s: predicted, by the name of the algorithm.
        methods: by which, as many: ``"events"`` or ``"rounds"``.
    """

    nranks: int
    size_bytes: int
    times_s: dict[str, float]
    methods: dict[str, str]

    @property
    def best(self) -> str:
        """The fastest."""
        return fastest(self.times_s)


def fastest(times_s: Mapping[str, float]) -> str:
    """The name with the least time; of several that differ by less than a thousandth, the first one."""
    nearly = min(times_s.values()) * 1.001
    return next(name for name, time_s in times_s.items() if time_s <= nearly)


def predict(setup: Setup) -> Iterator[Row]:
    """Rows in the order of ranks, then of sizes."""
    layout = COLLECTIVES[setup.collective].layout
    for nranks in setup.ranks:
        those = predictors(
            setup.algorithms,
            setup.cluster.topology(nranks),
            setup.model,
            slice_bytes=setup.slice_bytes,
            max_messages=setup.max_messages,
        )
        methods = {predictor.algorithm.name: predictor.method for predictor in those}
        for size in setup.sizes:
            block_bytes = size if layout is Layout.WHOLE else size // nranks
            times_s = {predictor.algorithm.name: predictor.time_s(block_bytes) for predictor in those}
            yield Row(nranks, size, times_s, methods)


def run(setup: Setup, json_file: Path | None, plot_file: Path | None) -> None:
    """Predicts and prints. Exit status 1 with one line where a file cannot be written."""
    for file in (json_file, plot_file):
        if file is not None and not file.resolve().parent.is_dir():
            fail(f"{file}: there is no such folder")
    if plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib; pip install 'dsml_gpu[bench]'")
    print(heading(setup), flush=True)
    rows = []
    for row in predict(setup):
        print(line(row), flush=True)
        rows.append(row)
    print(footing(rows))
    try:
        if json_file is not None:
            json_file.write_text(as_json(setup.collective, rows), encoding="utf-8")
        if plot_file is not None:
            from dsml_gpu.cli.simulate_plot import plot

            plot(f"{setup.collective}: {describe(setup.cluster)}", rows, plot_file)
    except OSError as error:
        fail(str(error))


# ---- output ----------------------------------------------------------------------------------------------------------


def heading(setup: Setup) -> str:
    """What stands above the rows."""
    costs = "processors cost nothing" if setup.model == LINKS_ONLY else "with the costs of processors"
    names = [algorithm.name for algorithm in setup.algorithms]
    return "\n".join(
        [
            f"# {setup.collective}, predicted time: {describe(setup.cluster)}; {costs}",
            "# *: the fastest; events: simulated message by message; rounds: worked out from the rounds of the algorithm",
            "#",
            "#" + _columns("ranks", "size", [(name, name, " ") for name in names], "method")[1:],
        ]
    )


def describe(cluster: Cluster) -> str:
    """A cluster in a few words."""
    parts = [f"{cluster.ranks_per_host} rank{'s' * (cluster.ranks_per_host > 1)} to a host"]
    parts += [
        f"{name} {_link(link)}"
        for name, link in (("device", cluster.device), ("inside", cluster.inside), ("NIC", cluster.nic))
        if link != Link()
    ]
    if cluster.oversubscription > 1:
        parts.append(f"core oversubscribed {cluster.oversubscription:g} times")
    return ", ".join(parts)


def _link(link: Link) -> str:
    bandwidth = "" if link.byte_s == 0 else f"{format_bandwidth(link.bytes_per_s)} "
    return f"{bandwidth}{format_duration(link.latency_s)}"


def line(row: Row) -> str:
    """One row of the table."""
    cells = [(name, format_duration(time_s), "*" if name == row.best else " ") for name, time_s in row.times_s.items()]
    return _columns(str(row.nranks), format_size(row.size_bytes), cells, "+".join(sorted(set(row.methods.values()))))


def _columns(nranks: str, size: str, cells: Sequence[tuple[str, str, str]], method: str) -> str:
    """A line; `cells` are the name of a column, what stands in it, and what marks that."""
    columns = [f"{text:>{max(9, len(name))}} {mark}" for name, text, mark in cells]
    return " ".join([f"{nranks:>7} {size:>9}", *columns, method])


def footing(rows: Sequence[Row]) -> str:
    """What stands below the rows: which algorithm is the fastest, in words."""
    lines = ["#"]
    for nranks, of_ranks in groupby(sorted(rows, key=lambda row: (row.nranks, row.size_bytes)), lambda row: row.nranks):
        lines.append(f"# {nranks} rank{'s' * (nranks > 1)}: {in_words(list(of_ranks))}")
    return "\n".join(lines)


def in_words(rows: Sequence[Row]) -> str:
    """From which size on which algorithm is the fastest: ``bruck is fastest up to 1 MiB, ring from 2 MiB on``.

    Args:
        rows: of one number of ranks, by size.
    """
    stretches = [(best, [row.size_bytes for row in those]) for best, those in groupby(rows, lambda row: row.best)]
    if len(stretches) == 1:
        return f"{stretches[0][0]} is fastest at {'this size' if len(rows) == 1 else 'all sizes'}"
    words = [f"{stretches[0][0]} is fastest up to {format_size(stretches[0][1][-1])}"]
    for best, sizes in stretches[1:-1]:
        first, last = format_size(sizes[0]), format_size(sizes[-1])
        words.append(f"{best} at {first}" if first == last else f"{best} from {first} to {last}")
    words.append(f"{stretches[-1][0]} from {format_size(stretches[-1][1][0])} on")
    return ", ".join(words)


def as_json(collective: str, rows: Sequence[Row]) -> str:
    """A JSON list with one object for each algorithm of each row.

    Keys: ``collective``; ``algorithm``; ``nranks``; ``size_bytes`` of the larger one of a rank's two buffers; ``time_us``;
    ``algbw_gb_s`` (1e9 bytes a second); ``method`` (``events`` or ``rounds``); ``best`` (whether it is the fastest of its
    ranks and size).
    """
    objects = [
        {
            "collective": collective,
            "algorithm": name,
            "nranks": row.nranks,
            "size_bytes": row.size_bytes,
            "time_us": time_s * 1e6,
            "algbw_gb_s": algbw_gb_s(row.size_bytes, time_s) if time_s else None,
            "method": row.methods[name],
            "best": name == row.best,
        }
        for row in rows
        for name, time_s in row.times_s.items()
    ]
    return json.dumps(objects, indent=2) + "\n"
