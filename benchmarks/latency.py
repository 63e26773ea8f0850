"""What a small all-reduce costs beside the RPC that asks for it.

A coordinator with embedded devices in a process of its own; an all-reduce of 1000 float64 on four devices and an empty
RPC to the same server are measured in turn, over the wire stub with requests made beforehand and through the client.

Exit status 1 when a result is wrong, or when over the wire stub the all-reduce takes more than three times as long as
the empty RPC.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import grpc
import numpy as np

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.cli.measure import count_wrong, expected, inputs, time_interleaved
from dsml_gpu.client import connect
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.stubs import channel_options, coordinator_stub

DEVICES = 4
FLOAT64 = np.dtype(np.float64)
STUB, CLIENT = "wire stub", "Python client"
ALL_REDUCE, EMPTY = "all-reduce", "empty RPC"
#: What an all-reduce may take, in empty RPCs.
ALLOWED_RATIO = 3.0


def measure(elements: int, repeat: int, algorithm: str) -> tuple[dict[str, dict[str, float]], int]:
    """Median seconds by caller and call, and how many elements a first all-reduce got wrong."""
    with (
        ServerProcess("coordinator") as server,
        connect(server.address) as client,
        client.communicator(DEVICES) as comm,
        grpc.insecure_channel(server.address, options=channel_options()) as channel,
    ):
        sources = inputs(DEVICES, elements, FLOAT64, "sum")
        arrays = comm.array(sources)
        comm.all_reduce(arrays, algorithm=algorithm)
        wrong = sum(count_wrong(array.get(), expected(sources, "sum")) for array in arrays)

        stub = coordinator_stub(channel)
        addrs = {rank: pb.MemAddr(value=array.addr) for rank, array in enumerate(arrays)}
        requests = {
            "ring": pb.AllReduceRingRequest(commId=comm.comm_id, count=arrays[0].nbytes, memAddrs=addrs),
            "naive": pb.NaiveAllReduceRequest(comm_id=comm.comm_id, count=arrays[0].nbytes, mem_addrs=addrs),
        }
        methods = {"ring": stub.AllReduceRing, "naive": stub.NaiveAllReduce}
        calls: dict[tuple[str, str], Callable[[], object]] = {
            (STUB, EMPTY): partial(stub.GetCommStatus, pb.GetCommStatusRequest(commId=comm.comm_id)),
            (STUB, ALL_REDUCE): partial(methods[algorithm], requests[algorithm]),
            (CLIENT, EMPTY): comm.status,
            (CLIENT, ALL_REDUCE): partial(comm.all_reduce, arrays, algorithm=algorithm),
        }
        times_s = time_interleaved(calls, repeat, warmup=20)
    medians_s = {caller: {call: median(times_s[caller, call]) for call in (EMPTY, ALL_REDUCE)} for caller in (STUB, CLIENT)}
    return medians_s, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1_000, help="float64 in each rank's buffer")
    parser.add_argument("--repeat", type=int, default=300, help="runs of each, whose median counts")
    parser.add_argument("--algorithm", choices=("ring", "naive"), default="ring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()

    medians_s, wrong = measure(arguments.elements, arguments.repeat, arguments.algorithm)
    ratios = {caller: medians[ALL_REDUCE] / medians[EMPTY] for caller, medians in medians_s.items()}
    what = f"{arguments.algorithm} all-reduce of {arguments.elements} float64"
    print(f"{what} on {DEVICES} embedded devices, medians of {arguments.repeat} runs")
    print(f"{'':<14}{EMPTY:>12}{ALL_REDUCE:>12}{'ratio':>8}")
    for caller, medians in medians_s.items():
        print(f"{caller:<14}{medians[EMPTY] * 1e6:9.0f} us{medians[ALL_REDUCE] * 1e6:9.0f} us{ratios[caller]:8.2f}")
    if arguments.json is not None:
        figures = {
            "elements": arguments.elements,
            "repeat": arguments.repeat,
            "algorithm": arguments.algorithm,
            "median_s": medians_s,
            "ratio": ratios,
            "wrong_elements": wrong,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if wrong:
        print(f"FAILED: {wrong} wrong elements")
        return 1
    if ratios[STUB] > ALLOWED_RATIO:
        print(f"FAILED: over the {STUB} an all-reduce takes more than {ALLOWED_RATIO:g} empty RPCs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
