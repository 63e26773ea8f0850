"""Faults of real server processes, and how fast and by whom they must be reported."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import wait_until
from tests.support.rpc import CALL_TIMEOUT_S, MIB, Rpc, failure_of, refusal_of, ring, rpc_to

#: A dead peer must be known after so long.
SOON_S = 5.0
#: What servers of frozen peers are told, and by when the coordinator must have said no: its stall and control timeouts
#: together, and the slowness of a loaded machine.
STALL_S = 1.0
FROZEN_S = 12.0
BIG = 16 * MIB
OPERATIONS = 60


def fail_within(call: Callable[[], Any], seconds: float) -> grpc.RpcError:
    """The error of a call, which must come from the server and in time."""
    started = time.monotonic()
    error = failure_of(call)
    elapsed = time.monotonic() - started
    said = f"{error.code().name} after {elapsed:.1f} s: {error.details()}"
    assert refusal_of(error) is not None, f"the server did not say it: {said}"
    assert elapsed < seconds, said
    return error


def kill(server: ServerProcess) -> None:
    server.process.kill()
    server.process.wait()


@contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


@contextmanager
def moving_group(rpc: Rpc, comm: pb.CommInitResponse, fleet: Fleet) -> Iterator[Any]:
    """The future of a group of all-reduces that has begun to change the memory of rank 0, and is far from its end."""
    ones = np.ones(BIG // 8).tobytes()
    for device in comm.devices:
        rpc.write(device.deviceId.value, 0, ones)
    rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
    for _ in range(OPERATIONS):
        rpc.coordinator.AllReduceRing(ring(comm, BIG), timeout=CALL_TIMEOUT_S)
    starts_of_chunks = [rank * BIG // len(comm.devices) // 8 * 8 for rank in range(len(comm.devices))]
    with rpc_to(fleet.devices[0].address) as rank0:

        def touched() -> bool:
            # Asked of the device itself, because the coordinator would answer after the group.
            for start in starts_of_chunks:
                request = pb.StreamDeviceToHostRequest(memAddr=pb.MemAddr(value=start), numBytes=8)
                answer = rank0.device.StreamDeviceToHost(request, timeout=5)
                if b"".join(chunk.data for chunk in answer) != ones[:8]:
                    return True
            return False

        future = rpc.coordinator.GroupEnd.future(pb.GroupEndRequest(commId=comm.commId), timeout=60)
        wait_until(touched, "the beginning of the group")
        assert not future.done(), "too fast for this test: make it larger"
        yield future
