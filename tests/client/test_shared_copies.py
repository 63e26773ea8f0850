"""Copies of a client that has the device's memory open: right, in order, and safe from clients that never end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.client.shared_copies import SMALLEST_BYTES
from dsml_gpu.memory.shared import SharedHandle, open_shared
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.rpc import Rpc, rpc_to

LARGE = 4 * SMALLEST_BYTES // 8
STALL_S = 0.5


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, ["--memory", "64MiB"], ["--stall-timeout", str(STALL_S)]) as fleet:
        yield fleet


@pytest.fixture
def rpc(fleet: Fleet) -> Iterator[Rpc]:
    with rpc_to(fleet.address) as rpc:
        yield rpc


def forbid(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the copy went over gRPC")

    for method in methods:
        monkeypatch.setattr(CoordinatorConnection, method, refuse)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_large_copy_moves_no_data_over_grpc(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, embedded: bool) -> None:
    forbid(monkeypatch, "write", "read")
    source = np.random.default_rng(1).random(LARGE)
    with dsml_gpu.local() if embedded else dsml_gpu.connect(fleet.address) as client, client.communicator(2) as comm:
        arrays = comm.array([source, source + 1])
        np.testing.assert_array_equal(arrays[0].get(), source)
        comm.all_reduce(arrays)
        for array in arrays:
            np.testing.assert_array_equal(array.get(), source + (source + 1))


def test_a_client_that_cannot_open_the_memory_copies_over_grpc(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsml_gpu.memory.shared.boot_id", lambda: "that of another host")
    source = np.random.default_rng(2).random(LARGE)
    with dsml_gpu.connect(fleet.address) as client, client.communicator(1) as comm:
        array = comm.devices[0].array(source)
        np.testing.assert_array_equal(array.get(), source)


def test_devices_that_share_nothing_are_copied_to_over_grpc() -> None:
    source = np.random.default_rng(3).random(LARGE)
    with (
        Fleet(1, ["--memory", "64MiB", "--no-share-memory"]) as fleet,
        dsml_gpu.connect(fleet.address) as client,
        client.communicator(1) as comm,
    ):
        array = comm.devices[0].array(source)
        np.testing.assert_array_equal(array.get(), source)


def test_a_copy_comes_after_the_collectives_that_were_issued_before_it(fleet: Fleet) -> None:
    inputs = [np.full(LARGE, float(rank)) for rank in range(2)]
    with dsml_gpu.connect(fleet.address) as client, client.communicator(2, transport="grpc") as comm:
        arrays = comm.array(inputs)
        with comm.group(blocking=False):
            for _ in range(5):
                comm.all_reduce(arrays)
        np.testing.assert_array_equal(arrays[1].get(), np.full(LARGE, 2.0**4))


def test_work_waits_while_memory_is_held(fleet: Fleet, rpc: Rpc) -> None:
    with dsml_gpu.connect(fleet.address) as client, client.communicator(2) as comm, ThreadPoolExecutor() as pool:
        arrays = comm.array([np.ones(4), np.ones(4)])
        with client._connection.hold(hold(arrays[0].device.device_id, writes=False)):
            done = pool.submit(comm.all_reduce, arrays)
            with pytest.raises(TimeoutError):
                done.result(STALL_S / 4)
        assert done.result(10) is not None


def test_what_a_client_writes_that_was_given_up_reaches_nobody(fleet: Fleet, rpc: Rpc) -> None:
    with rpc.comm(1) as comm:
        device_id = comm.devices[0].deviceId.value
        rpc.write(device_id, 0, b"kept")
        held = rpc.coordinator.HoldMemory(hold(device_id, writes=True), timeout=20)
        shared = next(held)
        memory = open_shared(SharedHandle.of_message(shared))
        assert bytes(memory[:4]) == b"kept"
        with pytest.raises(grpc.RpcError) as failure:
            next(held)
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        memory[:4] = 0
        assert rpc.read(device_id, 0, 4) == b"kept"


def hold(device_id: int, writes: bool) -> pb.HoldMemoryRequest:
    return pb.HoldMemoryRequest(
        deviceId=pb.DeviceId(value=device_id), memAddr=pb.MemAddr(value=0), numBytes=64, writes=writes
    )
