"""Where the time of an all-reduce goes, on four device servers.

First by stages, from clocks: what the client's call takes, what of it the coordinator's control round takes, and what the
cheapest call to the coordinator takes, over gRPC and by its lane. Then by functions, from samples: py-spy (pip install
py-spy) looks at the client, the coordinator and the devices at the same time while the client repeats the operation. Only
threads that run are counted; a share of 100 % is one core.

Left out where py-spy is not there; it needs the right to trace other processes (root, or kernel.yama.ptrace_scope = 0).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import grpc
import numpy as np

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import time_interleaved
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import Communicator, DeviceArray, connect
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.stubs import channel_options, coordinator_stub

RANKS = 4
SAMPLES_PER_S = 250
#: Servers compile their loops (the extra `fast`) beside their first operations.
WARM_UP_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8KB,3.6MB")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--algorithm", default="auto")
    parser.add_argument("--seconds", type=float, default=6.0, help="of sampling at each size")
    parser.add_argument("--functions", type=int, default=8, help="how many of each process are shown")
    options = parser.parse_args()
    with (
        Fleet(RANKS) as fleet,
        connect(fleet.address) as client,
        client.communicator(RANKS, transport=options.transport) as comm,
        grpc.insecure_channel(fleet.address, options=channel_options()) as channel,
    ):
        for size in map(parse_size, options.sizes.split(",")):
            arrays = comm.array([np.zeros(size // 8)] * RANKS)
            repeat(comm, arrays, options.algorithm, WARM_UP_S)
            print(f"\nall-reduce of {format_size(size)} float64 on {RANKS} device servers")
            stages(comm, arrays, options.algorithm, channel)
            processes = {"client": os.getpid(), "coordinator": fleet.coordinator.process.pid}
            processes |= {f"device of rank {rank}": server.process.pid for rank, server in enumerate(fleet.devices)}
            sample(processes, partial(repeat, comm, arrays, options.algorithm), options.seconds, options.functions)
            for array in arrays:
                array.free()
    return 0


def repeat(comm: Communicator, arrays: list[DeviceArray], algorithm: str, seconds: float) -> int:
    """Runs the all-reduce for so long; returns how often."""
    until_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < until_s:
        comm.all_reduce(arrays, algorithm=algorithm)
        count += 1
    return count


def stages(comm: Communicator, arrays: list[DeviceArray], algorithm: str, channel: grpc.Channel) -> None:
    """Prints medians of calls in turn."""
    rounds_s = []

    def all_reduce() -> None:
        result = comm.all_reduce(arrays, algorithm=algorithm)
        assert result is not None
        rounds_s.append(result.elapsed_s)

    over_grpc = partial(coordinator_stub(channel).GetCommStatus, pb.GetCommStatusRequest(commId=comm.comm_id))
    times_s = time_interleaved({"call": all_reduce, "grpc": over_grpc, "lane": comm.status}, 200)
    call_us, grpc_us, lane_us = (median(times_s[name]) * 1e6 for name in ("call", "grpc", "lane"))
    print(f"  the client's call                            {call_us:8.0f} us")
    print(f"    of it the control round                    {median(rounds_s) * 1e6:8.0f} us")
    print(f"  the cheapest call to the coordinator by lane {lane_us:8.0f} us")
    print(f"  the same over gRPC                           {grpc_us:8.0f} us")


def sample(processes: dict[str, int], work: partial[int], seconds: float, functions: int) -> None:
    """Prints what the processes do while the work goes on."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        print("  not sampled: py-spy is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{pid}.raw" for name, pid in processes.items()}
        how = ["--duration", str(int(seconds)), "--rate", str(SAMPLES_PER_S), "--nonblocking", "--threads"]
        profilers = [
            subprocess.Popen(
                [program, "record", "--pid", str(pid), *how, "--format", "raw", "--output", str(files[name])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, pid in processes.items()
        ]
        work(seconds + 2)
        for profiler in profilers:
            _, complaint = profiler.communicate()
            if profiler.returncode:
                print(f"  not sampled: {complaint.strip().splitlines()[0]}")
                return
        for name, file in files.items():
            show(name, file.read_text(encoding="utf-8"), int(seconds) * SAMPLES_PER_S, functions)


def show(name: str, raw: str, samples: int, functions: int) -> None:
    """Prints the functions of one process in which most samples ended. A line of `raw` is a stack and a count."""
    ended: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        ended[stack.rpartition(";")[2].rpartition(":")[0]] += int(count)
    print(f"  {name}: {ended.total() / samples:.0%} of a core")
    for function, number in ended.most_common(functions):
        print(f"    {number / samples:6.1%}  {function})")


if __name__ == "__main__":
    sys.exit(main())
