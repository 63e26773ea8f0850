"""All-reduce between four devices on one GPU, against the bare kernel that does the same to memory.

The same sum of four buffers into all four, 256 MB of float32 each, in place, GPU 0:

kernel      One launch of the kernel by this process, by CUDA's own clock.
one process The client's call, four devices of one server.
processes   The client's call, four servers with one device each, which open each other's memory by CUDA IPC.

Needs a GPU. Exit status 1 when an element is wrong, or a call takes more than 1.2 times the kernel within one process, or
1.3 times between processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import Client, connect
from dsml_gpu.reduction import DTYPES, OPERATORS

DEVICES = 4
FLOAT32 = DTYPES["FLOAT32"]
SUM = OPERATORS[0]
#: How many times the kernel's time a call may take.
ALLOWED = {"one process": 1.2, "processes": 1.3}
#: Runs before those that count: kernels are compiled, memory is taken.
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="256MB", help="of each device's buffer")
    parser.add_argument("--repeat", type=int, default=20, help="runs whose median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    rows, failures = measure(options.size // 4 * 4, options.repeat)
    print("\n".join(failures or ["all as it should be"]))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


def measure(nbytes: int, repeat: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures and prints; gives the rows, and what is not as it should be."""
    kernel_ms = kernel_time_ms(nbytes, repeat)
    print(f"all-reduce of {format_size(nbytes)} float32 on {DEVICES} devices of GPU 0, medians of {repeat}")
    print(f"{'kernel':<12}{kernel_ms:9.3f} ms")
    rows: list[dict[str, Any]] = [{"what": "kernel", "bytes": nbytes, "median_ms": kernel_ms}]
    failures = []
    for what, servers in (("one process", [DEVICES]), ("processes", [1] * DEVICES)):
        with serving(servers, nbytes) as client:
            call_ms, wrong, transports = call_time_ms(client, nbytes, repeat)
        ratio = call_ms / kernel_ms
        print(f"{what:<12}{call_ms:9.3f} ms {ratio:6.2f} times the kernel, by {'+'.join(transports)}", flush=True)
        rows.append({"what": what, "bytes": nbytes, "median_ms": call_ms, "to_kernel": ratio, "allowed": ALLOWED[what]})
        if wrong:
            failures.append(f"{what}: {wrong} elements are wrong")
        if ratio > ALLOWED[what]:
            failures.append(f"{what}: {ratio:.2f} times the kernel, not {ALLOWED[what]}")
    return rows, failures


def kernel_time_ms(nbytes: int, repeat: int) -> float:
    """Median time of the kernel."""
    import cupy as cp

    from dsml_gpu.memory.cuda import CudaMemory
    from dsml_gpu.reduction.cuda import CudaReducer

    memory = CudaMemory(0)
    reducer = CudaReducer(0, memory.compute)
    buffers = [memory.allocate(nbytes) for _ in range(DEVICES)]
    times_ms = []
    with cp.cuda.Device(0), memory.compute:
        for _ in range(WARM_UP + repeat):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            memory.compute.record(start)
            reducer.reduce(SUM, FLOAT32, buffers, buffers)
            memory.compute.record(end)
            end.synchronize()
            times_ms.append(float(cp.cuda.get_elapsed_time(start, end)))
    return median(times_ms[WARM_UP:])


@contextmanager
def serving(devices_of_servers: Sequence[int], nbytes: int) -> Iterator[Client]:
    """A coordinator over servers with so many devices each, all on GPU 0."""
    memory = ["--memory", str(nbytes + (8 << 20)), "--backend", "cupy"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess("device", *memory, *["--gpu", "0"] * number)) for number in devices_of_servers
        ]
        addresses = [option for server in servers for option in ("--device", server.address)]
        coordinator = stack.enter_context(ServerProcess("coordinator", "--backend", "numpy", *addresses))
        yield stack.enter_context(connect(coordinator.address))


def call_time_ms(client: Client, nbytes: int, repeat: int) -> tuple[float, int, tuple[str, ...]]:
    """Median time of the client's call, elements that are wrong, and the transports that were used."""
    with client.communicator(DEVICES) as comm:
        arrays = comm.array([np.full(nbytes // 4, rank + 1, np.float32) for rank in range(DEVICES)])
        result = comm.all_reduce(arrays)
        assert result is not None
        wrong = sum(int(np.count_nonzero(array.get() != sum(range(DEVICES + 1)))) for array in arrays)
        for array in arrays:
            array.set(np.zeros(nbytes // 4, np.float32))
        times_s = []
        for _ in range(WARM_UP + repeat):
            started_s = time.perf_counter()
            comm.all_reduce(arrays)
            times_s.append(time.perf_counter() - started_s)
    return median(times_s[WARM_UP:]) * 1e3, wrong, result.transports


if __name__ == "__main__":
    sys.exit(main())
