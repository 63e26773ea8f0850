"""What it costs that a collective which fails leaves all buffers as they were.

For each transport two fleets of four ranks, one with --atomic and one without, in turns: all-reduces in place, 64 MB.

    python benchmarks/atomic.py
    python benchmarks/atomic.py --transport p2p --size 64KB --runs 300
    python benchmarks/atomic.py --transport grpc --size 16MB --algorithm ring --runs 30
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack

import numpy as np

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.units import format_size, parse_size

#: How much longer it may take, by transport: over memory every result is written once more.
LIMITS = {"grpc": 1.10, "p2p": 1.50}
_OPTIONS = ("--no-atomic", "--atomic")
_UNTIMED_RUNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64MB", type=parse_size, help="bytes of each rank's buffer")
    parser.add_argument("--ranks", default=4, type=int)
    parser.add_argument("--transport", choices=["both", *LIMITS], default="both")
    parser.add_argument("--algorithm", default="ring", help="over gRPC")
    parser.add_argument("--out-of-place", action="store_true")
    parser.add_argument("--runs", default=15, type=int, help="of each")
    options = parser.parse_args()
    chosen = list(LIMITS) if options.transport == "both" else [options.transport]
    ratios = {transport: measure(transport, options) for transport in chosen}
    return any(ratio > LIMITS[transport] for transport, ratio in ratios.items())


def measure(transport: str, options: argparse.Namespace) -> float:
    """Prints what one transport takes without and with it; returns how many times as long."""
    times_s: dict[str, list[float]] = {option: [] for option in _OPTIONS}
    algorithm = options.algorithm if transport == "grpc" else "direct"
    with ExitStack() as stack:
        runs = []
        for option in times_s:
            fleet = stack.enter_context(Fleet(options.ranks, coordinator_options=["--transport", transport, option]))
            comm = stack.enter_context(dsml_gpu.connect(fleet.address)).communicator(options.ranks)
            arrays = comm.array([np.ones(options.size // 8)] * options.ranks)
            out = comm.array([np.zeros(options.size // 8)] * options.ranks) if options.out_of_place else None
            runs.append((option, comm, arrays, out))
        for number in range(options.runs + _UNTIMED_RUNS):
            for option, comm, arrays, out in runs:
                started = time.perf_counter()
                comm.all_reduce(arrays, out, op="max", algorithm=algorithm)
                if number >= _UNTIMED_RUNS:
                    times_s[option].append(time.perf_counter() - started)
    medians = {option: statistics.median(some) for option, some in times_s.items()}
    pairs = [on / off for off, on in zip(*times_s.values(), strict=True)]
    for option, median in medians.items():
        print(f"{transport} {option:12} median {median * 1e3:8.2f} ms")
    ratio = medians["--atomic"] / medians["--no-atomic"]
    print(
        f"{format_size(options.size)} on {options.ranks} ranks, {transport}, {algorithm}, "
        f"{'out of' if options.out_of_place else 'in'} place: atomic takes {ratio:.3f} times as long "
        f"(median of pairs {statistics.median(pairs):.3f}); limit {LIMITS[transport]}",
        flush=True,
    )
    return ratio


if __name__ == "__main__":
    sys.exit(main())
