"""What it costs that a collective which fails leaves all buffers as they were.

Two fleets of four ranks over gRPC, one with --atomic and one without, in turns: all-reduces in place, 64 MB.

    python benchmarks/atomic.py
    python benchmarks/atomic.py --size 16MB --algorithm ring --runs 30
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

#: How much longer it may take.
LIMIT = 1.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64MB", type=parse_size, help="bytes of each rank's buffer")
    parser.add_argument("--ranks", default=4, type=int)
    parser.add_argument("--algorithm", default="ring")
    parser.add_argument("--runs", default=15, type=int, help="of each")
    options = parser.parse_args()
    times_s: dict[str, list[float]] = {"--no-atomic": [], "--atomic": []}
    with ExitStack() as stack:
        runs = []
        for option in times_s:
            fleet = stack.enter_context(Fleet(options.ranks, coordinator_options=["--transport", "grpc", option]))
            comm = stack.enter_context(dsml_gpu.connect(fleet.address)).communicator(options.ranks)
            runs.append((option, comm, comm.array([np.ones(options.size // 8)] * options.ranks)))
        for number in range(options.runs + 3):
            for option, comm, arrays in runs:
                started = time.perf_counter()
                comm.all_reduce(arrays, op="max", algorithm=options.algorithm)
                if number >= 3:
                    times_s[option].append(time.perf_counter() - started)
    medians = {option: statistics.median(some) for option, some in times_s.items()}
    ratios = [on / off for off, on in zip(*times_s.values(), strict=True)]
    for option, median in medians.items():
        print(f"{option:12} median {median * 1e3:8.1f} ms")
    ratio = medians["--atomic"] / medians["--no-atomic"]
    print(
        f"{format_size(options.size)} on {options.ranks} ranks, {options.algorithm}: atomic takes {ratio:.3f} times as long "
        f"(median of pairs {statistics.median(ratios):.3f}); limit {LIMIT}"
    )
    return ratio > LIMIT


if __name__ == "__main__":
    sys.exit(main())
