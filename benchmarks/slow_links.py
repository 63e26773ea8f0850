"""All-reduce over slow links: what each algorithm takes, and what the simulator said it would. See README.md.

Each number of ranks gets device servers of its own, whose links are emulated. The simulator's cost model is fitted before
that, in the same run, on servers whose links are emulated as well, which takes processor time, but slow nobody down: it
learns nothing of the times that it predicts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import count_wrong, expected, inputs, time_interleaved
from dsml_gpu.cli.tune import Setup, fitted_model
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import connect
from dsml_gpu.coordinator.choice import topology_of
from dsml_gpu.schedules import algorithms_of, find_algorithm
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Emulated, and faster than any machine is.
FAST_LINK = ["--link-bandwidth", "1Tbit/s", "--link-latency", "1us"]
#: Bytes of each rank's buffer to which the cost model is fitted: what is predicted is large.
FITTED_TO = (1 << 20, 4 << 20, 16 << 20)
#: How far a prediction may be from the measured time, as a part of it.
TOLERANCE = 0.15
#: Naive moves all of N times the data over one link, ring none: so much of N must be seen from this many ranks on.
LEAST_GAIN, GAIN_FROM_RANKS = 0.85, 4


@dataclass(frozen=True)
class Row:
    """One algorithm on one number of ranks."""

    ranks: int
    algorithm: str
    measured_s: float
    predicted_s: float
    wrong: int

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.measured_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--size", type=parse_size, default="16MB", help="of each rank's buffer")
    parser.add_argument("--link-bandwidth", default="1Gbit/s")
    parser.add_argument("--link-latency", default="100us")
    parser.add_argument("--slice", default="1MiB", help="size of messages: the larger, the less work for the processors")
    parser.add_argument("--algorithms", default=",".join(algorithms_of("all_reduce")))
    parser.add_argument("--repeat", type=int, default=7, help="runs whose median counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numbers = [int(number) for number in options.ranks.split(",")]
    link = ["--link-bandwidth", options.link_bandwidth, "--link-latency", options.link_latency]
    cut = ["--slice", options.slice]

    with Fleet(max(numbers), [*FAST_LINK, *cut]) as fleet, connect(fleet.address) as client:
        model = fitted_model(client, Setup(fleet.address, sizes=FITTED_TO, slice_bytes=parse_size(options.slice)))
    print(
        f"all-reduce of {format_size(options.size)} float64 over links of {options.link_bandwidth} and "
        f"{options.link_latency}, slices of {options.slice}, medians of {options.repeat} runs in turn\n"
    )
    print(f"{'ranks':>5}  {'algorithm':<20}{'measured':>12}{'predicted':>12}{'ratio':>8}{'wrong':>7}")
    rows: list[Row] = []
    for nranks in numbers:
        with Fleet(nranks, [*link, *cut]) as fleet:
            rows += measure(fleet, nranks, options, model)
    failures = complaints(rows)
    print("\n" + "\n".join(failures or ["all as it should be"]))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 1 if failures else 0


def measure(fleet: Fleet, nranks: int, options: argparse.Namespace, model: CostModel) -> list[Row]:
    """Checks, times and prints all algorithms on one fleet."""
    rows = []
    names = options.algorithms.split(",")
    with connect(fleet.address) as client, client.communicator(nranks) as comm:
        sources = inputs(nranks, options.size // 8, np.dtype(np.float64), "sum")
        right = expected(sources, "sum")
        arrays = comm.array(sources)
        wrong = {}
        for name in names:
            for array, source in zip(arrays, sources, strict=True):
                array.set(source)
            comm.all_reduce(arrays, algorithm=name)
            wrong[name] = sum(count_wrong(array.get(), right) for array in arrays)
        times_s = time_interleaved(
            {name: partial(comm.all_reduce, arrays, algorithm=name) for name in names}, options.repeat
        )
        topology = topology_of([device.metadata for device in comm.devices], pb.AUTO)
    for name in names:
        schedule = find_algorithm("all_reduce", name).schedule(nranks, hosts=topology.host_of)
        predicted = simulate(schedule, options.size, topology, model)
        rows.append(Row(nranks, name, median(times_s[name]), predicted.time_s, wrong[name]))
        row = rows[-1]
        print(
            f"{nranks:>5}  {name:<20}{row.measured_s * 1e3:>9.1f} ms{row.predicted_s * 1e3:>9.1f} ms{row.ratio:>8.2f}"
            f"{row.wrong:>7}",
            flush=True,
        )
    by_name = {row.algorithm: row.measured_s for row in rows}
    if {"naive", "ring"} <= by_name.keys():
        gain = by_name["naive"] / by_name["ring"]
        print(f"{nranks:>5}  naive / ring = {gain:.2f} = {gain / nranks:.2f} N", flush=True)
    return rows


def complaints(rows: list[Row]) -> list[str]:
    """What is not as it should be."""
    failures = [f"{row.ranks} ranks, {row.algorithm}: {row.wrong} elements are wrong" for row in rows if row.wrong]
    failures += [
        f"{row.ranks} ranks, {row.algorithm}: predicted {row.ratio:.2f} of the measured time"
        for row in rows
        if abs(row.ratio - 1) > TOLERANCE
    ]
    times_s = {(row.ranks, row.algorithm): row.measured_s for row in rows}
    for (nranks, name), ring_s in times_s.items():
        naive_s = times_s.get((nranks, "naive"))
        if name == "ring" and naive_s is not None and nranks >= GAIN_FROM_RANKS and naive_s < LEAST_GAIN * nranks * ring_s:
            failures.append(f"{nranks} ranks: naive / ring is {naive_s / ring_s:.2f}, less than {LEAST_GAIN} N")
    return failures


if __name__ == "__main__":
    sys.exit(main())
