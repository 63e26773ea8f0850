"""How near the ring all-reduce over gRPC comes to gRPC: against processes that only pass the same bytes round a ring.

The bare processes use grpcio and nothing else (`bare_worker.py`). Each has one StreamSend-like call to its right neighbour,
which stays open, and one from its left one, on connections that stay. In each round each sends as many bytes as a rank of
the ring does, 2(N-1)/N of its buffer, in messages as long as the ring's, always from the same few `bytes`, and drops what it
receives: no memory is read or written beyond what gRPC needs, nothing is reduced, no message waits for another. They come
with gRPC's asyncio interface and with its threads, with glibc as it is, and told to keep freed memory as the servers of the
package tell it. Ours is timed from the client's call to its result. All are measured in turn.

Exit status 1 when a result is wrong, or when ring moves less than 0.85 of the bytes per second of the best of the bare ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import count_wrong, expected, inputs, time_interleaved
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import connect
from dsml_gpu.schedules import chunk_bounds

RANKS = 4
FLOAT64 = np.dtype(np.float64)
RING = "ring all-reduce"
VARIANTS = [("asyncio", "kept"), ("asyncio", "as it is"), ("threads", "kept"), ("threads", "as it is")]
#: Ring must move so much of the bytes per second that the best of the bare ones does.
ALLOWED_RATIO = 0.85


class BareRing:
    """Processes in a ring.

    Args:
        variant, memory: see `bare_worker.py`.
    """

    def __init__(self, variant: str, memory: str) -> None:
        worker = str(Path(__file__).with_name("bare_worker.py"))
        self._processes = [
            subprocess.Popen(
                [sys.executable, worker, variant, memory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # gRPC tells of each connection that ends
                text=True,
            )
            for _ in range(RANKS)
        ]
        addresses = [self._hear(process) for process in self._processes]
        for rank, process in enumerate(self._processes):
            self._tell(process, addresses[(rank + 1) % RANKS])

    def pass_on(self, lengths: list[int]) -> None:
        """One round: each process sends messages of these lengths; returns when all have all."""
        for process in self._processes:
            self._tell(process, json.dumps(lengths))
        for process in self._processes:
            self._hear(process)

    @staticmethod
    def _tell(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a bare process ended with status {process.wait()}")
        return line.strip()

    def __enter__(self) -> BareRing:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def lengths_of(size: int, slice_bytes: int) -> list[int]:
    """Of the messages that a rank sends: in each step one chunk, cut into slices."""
    lengths = []
    for step in range(2 * (RANKS - 1)):
        first, last = chunk_bounds(size // FLOAT64.itemsize, RANKS, step % RANKS)
        nbytes = (last - first) * FLOAT64.itemsize
        lengths += [min(slice_bytes, nbytes - start) for start in range(0, nbytes, slice_bytes)]
    return lengths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="16MB,64MB", help="of each rank's buffer")
    parser.add_argument("--slice", type=parse_size, default="512KiB", help="size of messages")
    parser.add_argument("--repeat", type=int, default=15, help="runs of each, whose median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()

    rows = []
    failed = False
    print(
        f"{RANKS} processes, float64, messages of {format_size(options.slice)}, medians of {options.repeat} runs in turn\n"
    )
    print(f"{'size':>9}  {'':<32}{'time':>10}{'GB/s':>8}  {'ring moves':>10}  {'wrong':>5}")
    with contextlib.ExitStack() as processes:
        fleet = processes.enter_context(Fleet(RANKS, ["--slice", str(options.slice)]))
        client = processes.enter_context(connect(fleet.address))
        bare = {f"bare, {variant}, memory {memory}": BareRing(variant, memory) for variant, memory in VARIANTS}
        for ring in bare.values():
            processes.enter_context(ring)
        for size in map(parse_size, options.sizes.split(",")):
            lengths = lengths_of(size, options.slice)
            with client.communicator(RANKS, transport="grpc") as comm:
                sources = inputs(RANKS, size // FLOAT64.itemsize, FLOAT64, "sum")
                right = expected(sources, "sum")
                arrays = comm.array(sources)
                comm.all_reduce(arrays, algorithm="ring")
                wrong = sum(count_wrong(array.get(), right) for array in arrays)
                work: dict[str, Callable[[], object]] = {RING: partial(comm.all_reduce, arrays, algorithm="ring")}
                work |= {name: partial(ring.pass_on, lengths) for name, ring in bare.items()}
                times_s = {name: median(runs_s) for name, runs_s in time_interleaved(work, options.repeat, 2).items()}
            for name, time_s in times_s.items():
                ratio = time_s / times_s[RING]
                row = {"size": size, "name": name, "median_s": time_s, "gb_s": RANKS * sum(lengths) / time_s / 1e9}
                rows.append({**row, "ring_moves": ratio, "wrong": wrong if name == RING else None})
                print(
                    f"{size / 1e6:>6.1f} MB  {name:<32}{time_s * 1e3:>7.1f} ms{row['gb_s']:>8.2f}  {ratio:>9.2f}x  "
                    f"{wrong if name == RING else '':>5}",
                    flush=True,
                )
                failed = failed or ratio < ALLOWED_RATIO or wrong > 0
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if failed:
        print(f"FAILED: wrong elements, or less than {ALLOWED_RATIO} of the bytes per second of a bare ring")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
