"""Is `algorithm="auto"` as fast as the best single algorithm? See README.md.

Device servers in processes of their own are tuned as `dsml-gpu tune` does it, then every algorithm and auto run in turn.
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
from dsml_gpu.cli.measure import time_interleaved
from dsml_gpu.cli.tune import Setup, fitted_model
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import Client, Communicator, connect
from dsml_gpu.schedules import algorithms_of

#: Auto may take so many times what the best algorithm takes.
LIMIT = 1.25


@dataclass(frozen=True)
class Row:
    """One size on one number of ranks; times are medians in seconds."""

    ranks: int
    nbytes: int
    chosen: str
    auto_s: float
    best: str
    best_s: float

    @property
    def ratio(self) -> float:
        return self.auto_s / self.best_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--sizes", default="8B,64B,512B,4KiB,32KiB,256KiB,1MiB,4MiB,16MB,64MB")
    parser.add_argument(
        "--transport", default="grpc", help="default: grpc, where algorithms differ; auto takes one pass over shared memory"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numbers = [int(number) for number in options.ranks.split(",")]
    rows: list[Row] = []
    with Fleet(max(numbers)) as fleet, connect(fleet.address) as client:
        client.set_cost_model(fitted_model(client, Setup(fleet.address)))
        print(f"{'ranks':>5}{'size':>10}  {'auto chose':<20}{'auto':>12}  {'best':<20}{'best':>12}{'auto / best':>13}")
        for nranks in numbers:
            with client.communicator(device_ids=first_ids(client, nranks), transport=options.transport) as comm:
                for size in options.sizes.split(","):
                    rows.append(measure(comm, parse_size(size)))
                    row = rows[-1]
                    print(
                        f"{nranks:>5}{format_size(row.nbytes):>10}  {row.chosen:<20}{row.auto_s * 1e3:>9.2f} ms  "
                        f"{row.best:<20}{row.best_s * 1e3:>9.2f} ms{row.ratio:>13.2f}",
                        flush=True,
                    )
    failures = [row for row in rows if row.ratio > LIMIT]
    print(f"\nauto takes at most {max(row.ratio for row in rows):.2f} times the best; the limit is {LIMIT}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 1 if failures else 0


def first_ids(client: Client, count: int) -> list[int]:
    return [device.device_id for device in client.devices()[:count]]


def measure(comm: Communicator, nbytes: int) -> Row:
    """Times all algorithms and auto, in turn."""
    arrays = comm.array([np.zeros(nbytes // 8)] * comm.nranks)
    names = [*algorithms_of("all_reduce"), "auto"]
    runs = 41 if nbytes <= 1 << 16 else 15 if nbytes <= 4 << 20 else 5
    times_s = time_interleaved({name: partial(comm.all_reduce, arrays, algorithm=name) for name in names}, runs, warmup=2)
    result = comm.all_reduce(arrays)
    assert result is not None
    for array in arrays:
        array.free()
    medians_s = {name: median(runs_s) for name, runs_s in times_s.items()}
    auto_s = medians_s.pop("auto")
    best = min(medians_s, key=lambda name: medians_s[name])
    return Row(comm.nranks, nbytes, result.algorithm, auto_s, best, medians_s[best])


if __name__ == "__main__":
    sys.exit(main())
