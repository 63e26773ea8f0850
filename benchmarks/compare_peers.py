"""Our all-reduce beside its peers: gloo (by torch.distributed) and Open MPI (by mpi4py). See README.md.

Each system has a process for each rank, and sums a buffer of float64 on each rank in place. All systems take turns in one
run; a turn is one all-reduce that does not count and some that do, because what others leave in the cache, or drive out of
it, is nobody's merit.

ours    dsml-p2p is what communicators choose by themselves, dsml-grpc is made to use gRPC. The time is that of the client's
        call, at whose end all devices have the result; client, coordinator and devices are processes of their own.
peers   Each call comes after a barrier, and its time is that of the rank that takes longest: a rank that has to wait for
        one that left the barrier late counts that. No control process takes part.

Exit status 1 when a result is wrong, or when no system is there to be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Protocol

import grpc
import numpy as np

from benchmarks.peers import GLOO, OPENMPI, LeftOut, Peer
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import count_wrong, expected, inputs
from dsml_gpu.cli.units import parse_size
from dsml_gpu.client import Client, DeviceArray, connect
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.stubs import channel_options, coordinator_stub

FLOAT64 = np.dtype(np.float64)
P2P, GRPC = "dsml-p2p", "dsml-grpc"
SYSTEMS = (P2P, GRPC, GLOO, OPENMPI)
#: Ours, and the transport that its communicator is asked for.
TRANSPORTS = {P2P: "auto", GRPC: "grpc"}
EMPTY_RPC = "empty RPC"


class System(Protocol):
    """What takes turns."""

    def prepare(self, nbytes: int) -> int:
        """Makes a buffer for each rank, runs one all-reduce, and returns how many elements it got wrong."""

    def run(self, times: int) -> list[float]:
        """Seconds of each of so many all-reduces."""


#: What each of our communicators does first, so that all ranks have had work.
_WARM_UP_BYTES, _WARM_UP_S = 4_000_000, 1.5


@dataclass(frozen=True)
class Row:
    """One system at one size; bytes are those of each rank's buffer."""

    system: str
    ranks: int
    bytes: int
    median_us: float


# ---- systems ---------------------------------------------------------------------------------------------------------


class Ours:
    """Our client with a communicator of all ranks.

    Raises:
        LeftOut: p2p is to be measured, and is not what the communicator uses.
    """

    def __init__(self, client: Client, name: str, nranks: int) -> None:
        # By their ids, because the communicators of both transports have the same devices.
        self._comm = client.communicator(device_ids=range(1, nranks + 1), transport=TRANSPORTS[name])
        self._arrays: list[DeviceArray] = self._comm.array([np.zeros(_WARM_UP_BYTES // FLOAT64.itemsize)] * nranks)
        result = self._comm.all_reduce(self._arrays)
        assert result is not None
        # Servers compile their loops (the extra `fast`) beside their first operations, which takes both cores.
        until_s = time.monotonic() + _WARM_UP_S
        while time.monotonic() < until_s:
            self._comm.all_reduce(self._arrays)
        if name == P2P and result.transports != ("p2p",):
            self._comm.close()
            raise LeftOut(f"p2p was not used, but {'+'.join(result.transports) or 'nothing'}")

    def prepare(self, nbytes: int) -> int:
        for array in self._arrays:
            array.free()
        sources = inputs(self._comm.nranks, nbytes // FLOAT64.itemsize, FLOAT64, "sum")
        right = expected(sources, "sum")
        self._arrays = self._comm.array(sources)
        self._comm.all_reduce(self._arrays)
        wrong = sum(count_wrong(array.get(), right) for array in self._arrays)
        for array in self._arrays:
            array.set(np.zeros_like(right))  # sums of sums would overflow
        return wrong

    def run(self, times: int) -> list[float]:
        return timed(partial(self._comm.all_reduce, self._arrays), times)

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *exception: object) -> None:
        self._comm.close()


class EmptyRpc:
    """The cheapest call to the coordinator, to compare with: over the wire stub, with a request made beforehand."""

    def __init__(self, address: str, comm_id: int) -> None:
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._call = partial(coordinator_stub(self._channel).GetCommStatus, pb.GetCommStatusRequest(commId=comm_id))

    def prepare(self, nbytes: int) -> int:
        return 0

    def run(self, times: int) -> list[float]:
        return timed(self._call, times)

    def __enter__(self) -> EmptyRpc:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()


def timed(call: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of so many calls."""
    times_s = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started)
    return times_s


@contextmanager
def opened(names: Sequence[str], nranks: int) -> Iterator[tuple[dict[str, System], dict[str, str]]]:
    """The systems that are there, with an empty RPC where ours are among them, and why the others are not."""
    systems: dict[str, System] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        if not TRANSPORTS.keys().isdisjoint(names):
            fleet = stack.enter_context(Fleet(nranks))
            client = stack.enter_context(connect(fleet.address))
            comm = stack.enter_context(client.communicator(device_ids=[1]))
            systems[EMPTY_RPC] = stack.enter_context(EmptyRpc(fleet.address, comm.comm_id))
        for name in names:
            try:
                if name in TRANSPORTS:
                    systems[name] = stack.enter_context(Ours(client, name, nranks))
                else:
                    systems[name] = stack.enter_context(Peer(name, nranks))
            except LeftOut as reason:
                left_out[name] = str(reason)
        yield systems, left_out


# ---- measuring -------------------------------------------------------------------------------------------------------


def burst_of(nbytes: int) -> int:
    """How many all-reduces of a turn count."""
    return 10 if nbytes <= 100_000 else 3 if nbytes <= 4_000_000 else 1


def medians_us(systems: Mapping[str, System], rounds: int, burst: int) -> dict[str, float]:
    """Median microseconds of each system; the first all-reduce of a turn does not count."""
    times_s: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            times_s[name] += system.run(1 + burst)[1:]
    return {name: median(runs_s) * 1e6 for name, runs_s in times_s.items()}


def main() -> int:
    options = parsed(sys.argv[1:])
    rows: list[Row] = []
    failures: list[str] = []
    for nranks in options.ranks:
        with opened(options.systems, nranks) as (systems, left_out):
            print(f"\nall-reduce of float64 on {nranks} ranks, medians of {options.repeat} rounds in turn, in us")
            for name, reason in left_out.items():
                print(f"{name} is left out: {reason}")
            names = [name for name in systems if name != EMPTY_RPC]
            if not names:
                continue
            print(heading(names), flush=True)
            notes = []
            for nbytes in options.sizes:
                # An empty RPC is as long at every size.
                turns = {name: systems[name] for name in systems if name != EMPTY_RPC or nbytes == min(options.sizes)}
                for name, system in turns.items():
                    wrong = system.prepare(nbytes)
                    if wrong:
                        failures.append(f"{name} on {nranks} ranks, {nbytes} bytes: {wrong} elements are wrong")
                medians = medians_us(turns, options.repeat, burst_of(nbytes))
                empty_us = medians.pop(EMPTY_RPC, None)
                if empty_us is not None:
                    notes = in_empty_rpcs(medians, nbytes, empty_us)
                print(line(nbytes, medians, names), flush=True)
                rows += [Row(name, nranks, nbytes, median_us) for name, median_us in medians.items()]
            print("".join(f"{note}\n" for note in notes), end="", flush=True)
    if options.json is not None:
        options.json.write_text(as_json(rows), encoding="utf-8")
    if options.plot is not None and rows:
        plot(rows, options.plot)
    if not rows:
        failures.append("there is nothing to measure")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; ends the program where one does not do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=system_names, default=",".join(SYSTEMS), help=f"default: {','.join(SYSTEMS)}")
    parser.add_argument("--ranks", type=numbers, default="2,4")
    parser.add_argument(
        "--sizes", type=sizes, default="8B,8KB,80KB,512KB,3.6MB,16MB,64MB,256MB", help="of each rank's buffer"
    )
    parser.add_argument("--repeat", type=int, default=7, help="rounds of turns; a turn has up to 10 runs, by the size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the medians to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against size (PNG)")
    options = parser.parse_args(arguments)
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install 'dsml_gpu[bench]'")
    if options.repeat < 1:
        parser.error("--repeat needs at least 1")
    return options


def system_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}")
    return names


def numbers(text: str) -> list[int]:
    values = [int(number) for number in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def sizes(text: str) -> list[int]:
    """Bytes; what is over a whole number of float64 is not used."""
    values = [parse_size(size) // FLOAT64.itemsize * FLOAT64.itemsize for size in text.split(",")]
    if min(values) < FLOAT64.itemsize:
        raise ValueError
    return values


# ---- output ----------------------------------------------------------------------------------------------------------


def base_of(names: Sequence[str]) -> str | None:
    """Whose time the others' are divided by: p2p, or what we have in its place."""
    return next((name for name in (P2P, GRPC) if name in names), None)


def ratios(medians: Mapping[str, float]) -> dict[str, float]:
    """The times of the others, in times of ours: more than 1 where ours is faster."""
    base = base_of(list(medians))
    return {} if base is None else {name: median_us / medians[base] for name, median_us in medians.items() if name != base}


def in_empty_rpcs(medians: Mapping[str, float], nbytes: int, empty_us: float) -> list[str]:
    """Our times beside an empty RPC to the same coordinator."""
    return [
        f"{nbytes} B: {name} takes {medians[name] / empty_us:.1f} empty RPCs, of {empty_us:.0f} us each"
        for name in (P2P, GRPC)
        if name in medians
    ]


def heading(names: Sequence[str]) -> str:
    base = base_of(names)
    others = [f"{name}/{base}" for name in names if base not in (None, name)]
    return f"{'size (B)':>10}" + "".join(f"{name:>13}" for name in names) + "".join(f"{other:>20}" for other in others)


def line(nbytes: int, medians: Mapping[str, float], names: Sequence[str]) -> str:
    times = "".join(f"{medians[name]:>13.1f}" for name in names)
    return f"{nbytes:>10}{times}" + "".join(f"{ratio:>20.3g}" for ratio in ratios(medians).values())


def as_json(rows: Sequence[Row]) -> str:
    """A JSON list with one object for each row: ``system``, ``ranks``, ``bytes`` (of each rank), ``median_us``."""
    return json.dumps([vars(row) for row in rows], indent=2) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws time against size, one line for each system and one picture for each number of ranks, to a PNG file."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    numbers_of_ranks = list(dict.fromkeys(row.ranks for row in rows))
    figure = Figure(figsize=(7 * len(numbers_of_ranks), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(numbers_of_ranks), sharey=True, squeeze=False)[0]
    for axes, nranks in zip(all_axes, numbers_of_ranks, strict=True):
        for number, system in enumerate(SYSTEMS):
            of_system = sorted(
                (row.bytes, row.median_us / 1e6) for row in rows if (row.system, row.ranks) == (system, nranks)
            )
            if of_system:
                axes.plot(*zip(*of_system, strict=True), "o-", markersize=4, color=f"C{number}", label=system)
        axes.set(xscale="log", yscale="log")
        for axis, unit in ((axes.xaxis, "B"), (axes.yaxis, "s")):
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_major_formatter(EngFormatter(unit))
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"All-reduce on {nranks} ranks: float64, in place")
        axes.set_xlabel("buffer of each rank (bytes)")
        axes.grid(alpha=0.3)
        axes.legend(title="system")
    all_axes[0].set_ylabel("time (seconds): median")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
