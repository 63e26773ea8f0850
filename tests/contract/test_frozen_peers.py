"""Devices that freeze: nobody waits for them for ever, all others work on, and awake they are used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.faults import FROZEN_S, STALL_S, fail_within, frozen, moving_group
from tests.support.rpc import (
    Rpc,
    all_reduce_on,
    all_reduce_works,
    device_to_host,
    ring,
    rpc_to,
)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    timeouts = ["--stall-timeout", str(STALL_S)]
    options = [*timeouts, "--operation-timeout", "4", "--on-failure", "fail"]
    with Fleet(3, ["--memory", "32MiB", *timeouts], options) as fleet:
        yield fleet


@pytest.fixture
def rpc(fleet: Fleet) -> Iterator[Rpc]:
    with rpc_to(fleet.address) as rpc:
        yield rpc
        # Whatever was frozen is awake again: everything works, on all devices.
        for comm_id in {
            comm_id
            for device in rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=15).devices
            for comm_id in device.commIds
        }:
            rpc.comm_destroy(comm_id)
        all_reduce_works(rpc, 3)


def test_an_all_reduce_with_a_frozen_device_ends(fleet: Fleet, rpc: Rpc):
    comm, pair = rpc.comm_init(3), rpc.comm_init(2, deviceIds=[1, 3])
    with frozen(fleet.devices[1]):
        error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=40), FROZEN_S)
        assert error.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        assert rpc.is_serving(timeout_s=2)
        status = rpc.status(comm.commId)
        assert (status.status, status.message) == (pb.FAILED, error.details())
        all_reduce_on(rpc, pair)


def test_a_device_that_freezes_in_the_middle_of_a_group_ends_it(fleet: Fleet, rpc: Rpc):
    comm, pair = rpc.comm_init(3), rpc.comm_init(2, deviceIds=[1, 3])
    with moving_group(rpc, comm, fleet) as future, frozen(fleet.devices[1]):
        error = fail_within(future.result, FROZEN_S)
        assert error.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        all_reduce_on(rpc, pair)


def test_an_all_reduce_of_the_frozen_device_alone_ends(fleet: Fleet, rpc: Rpc):
    """No other rank notices anything; the coordinator must."""
    comm = rpc.comm_init(1, deviceIds=[2])
    with frozen(fleet.devices[1]):
        error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=40), FROZEN_S)
        assert error.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        assert "device 2" in error.details()


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(
            lambda rpc, deadline: rpc.coordinator.Memcpy(device_to_host(2, 0, 8), timeout=deadline),
            id="Memcpy to host",
        ),
        pytest.param(
            lambda rpc, deadline: rpc.coordinator.StreamHostToDevice(
                iter([pb.DataChunk(deviceId=pb.DeviceId(value=2), memAddr=pb.MemAddr(), data=bytes(8))]),
                timeout=deadline,
            ),
            id="StreamHostToDevice",
        ),
    ],
)
def test_a_copy_with_a_frozen_device_ends(copy: Callable[[Rpc, float], Any]):
    """It must not wait longer than until the device is given up, nor keep what comes after it on the device waiting."""
    with Fleet(3, ["--memory", "32MiB", "--no-share-memory"]) as fleet, rpc_to(fleet.address) as rpc:
        pair = rpc.comm_init(2, deviceIds=[1, 3])
        with frozen(fleet.devices[1]):
            error = fail_within(lambda: copy(rpc, FROZEN_S + 1), FROZEN_S)
            assert error.code().name == "UNAVAILABLE"
            assert "device 2 at" in error.details()
            assert "no heartbeat" in error.details()
            all_reduce_on(rpc, pair)


def test_the_memory_of_a_frozen_device_can_be_copied_where_the_coordinator_has_it_open(fleet: Fleet, rpc: Rpc):
    rpc.write(2, 64, b"before")
    with frozen(fleet.devices[1]):
        assert rpc.read(2, 64, 6) == b"before"
        rpc.write(2, 64, b"frozen")
    assert rpc.read(2, 64, 6) == b"frozen"


def test_communicators_without_the_frozen_device_can_be_had(fleet: Fleet, rpc: Rpc):
    with frozen(fleet.devices[1]), rpc.comm(2) as comm:
        assert {device.deviceId.value for device in comm.devices} == {1, 3}
        all_reduce_on(rpc, comm)
