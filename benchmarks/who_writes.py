"""All-reduce over shared memory: what it would cost if every rank wrote to its own memory only.

As many processes as ranks, each with memory that all have open, float64, in place. Two ways take turns:

all         Each rank reduces its part of all buffers into its part of all buffers: one pass. This is what device servers do
            (`dsml_gpu/coordinator/passes.py`).
own         Each rank reduces its part into its own buffer; when all have, each copies the other parts from the others.
            No rank writes to the memory of another one, which would make ranks that were given up harmless.

No server is involved, only what they would do to memory. Exit status 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np

from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.memory.shared import SharedHandle, SharedRange, open_shared
from dsml_gpu.reduction import DTYPES, OPERATORS, HostReducer
from dsml_gpu.wire import gpu_sim_pb2 as pb

FLOAT64 = DTYPES["FLOAT64"]


def rank_process(pipe: Connection, rank: int, nbytes: int, barrier: Any) -> None:
    """Serves one rank: tells where its memory is, is told where all are, and runs what it is told by name."""
    own = SharedRange(nbytes)
    pipe.send(own.handle())
    handles: list[SharedHandle] = pipe.recv()
    memories = [own.array if other == rank else open_shared(handle) for other, handle in enumerate(handles)]
    reducer = HostReducer()
    total = OPERATORS[pb.SUM]
    reducer.prepare(total, FLOAT64)
    while (order := pipe.recv()) is not None:
        way, size = order
        starts = [size // 8 * part // len(memories) * 8 for part in range(len(memories) + 1)]
        mine = slice(starts[rank], starts[rank + 1])
        sources = [memory[mine] for memory in memories]
        if way == "all":
            reducer.reduce(total, FLOAT64, sources, sources)
        else:
            reducer.reduce(total, FLOAT64, sources, [own.array[mine]])
            barrier.wait()
            for other, memory in enumerate(memories):
                if other != rank:
                    own.array[starts[other] : starts[other + 1]] = memory[starts[other] : starts[other + 1]]
        pipe.send(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--sizes", default="80KB,3.6MB,16MB,64MB,256MB")
    parser.add_argument("--repeat", type=int, default=11, help="runs whose median counts")
    options = parser.parse_args()
    sizes = [parse_size(size) // 8 * 8 for size in options.sizes.split(",")]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(options.ranks)
    pipes, processes = [], []
    for rank in range(options.ranks):
        here, there = context.Pipe()
        process = context.Process(target=rank_process, args=(there, rank, max(sizes), barrier), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    handles = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(handles)
    memories = [open_shared(handle) for handle in handles]

    def run(way: str, size: int) -> float:
        started_s = time.perf_counter()
        for pipe in pipes:
            pipe.send((way, size))
        for pipe in pipes:
            pipe.recv()
        return time.perf_counter() - started_s

    wrong = 0
    for size in sizes:
        for way in ("all", "own"):
            for rank, memory in enumerate(memories):
                memory[:size].view(np.float64)[:] = rank + 1
            run(way, size)
            right = sum(range(1, options.ranks + 1))
            wrong += sum(int(np.count_nonzero(memory[:size].view(np.float64) != right)) for memory in memories)
        for memory in memories:
            memory[:size] = 0
        times_s: dict[str, list[float]] = {"all": [], "own": []}
        for _ in range(options.repeat):
            for way, times in times_s.items():
                times.append(run(way, size))
        all_ms, own_ms = (median(times_s[way]) * 1e3 for way in ("all", "own"))
        print(f"{format_size(size):>10}  all {all_ms:8.2f} ms  own {own_ms:8.2f} ms  own / all {own_ms / all_ms:5.2f}")
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    if wrong:
        print(f"{wrong} elements are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
