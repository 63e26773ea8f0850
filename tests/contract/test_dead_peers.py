"""Devices and coordinators that die: who is gone is said soon, all others work on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.faults import SOON_S, fail_within, kill, moving_group
from tests.support.processes import run_to_end, running, wait_until
from tests.support.rpc import (
    Rpc,
    all_reduce_on,
    all_reduce_works,
    device_to_host,
    failure_of,
    host_to_device,
    refusal_of,
    ring,
    rpc_to,
)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(3, ["--memory", "32MiB"], ["--on-failure", "fail"]) as fleet:
        yield fleet


@pytest.fixture
def rpc(fleet: Fleet) -> Iterator[Rpc]:
    with rpc_to(fleet.address) as rpc:
        yield rpc


def test_a_dead_device_is_named_and_the_others_work_on(fleet: Fleet, rpc: Rpc):
    comm = rpc.comm_init(3)
    all_reduce_on(rpc, comm)
    kill(fleet.devices[1])

    error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=30), SOON_S)
    assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
    assert f"device 2 at {fleet.devices[1].address}" in error.details()
    for innocent in (0, 2):
        assert f"{fleet.devices[innocent].address} does not answer" not in error.details()
    status = rpc.status(comm.commId)
    assert status.status == pb.FAILED
    assert status.message == error.details()

    for request in (host_to_device(2, 0, bytes(8)), device_to_host(2, 0, 8)):
        error = fail_within(lambda request=request: rpc.coordinator.Memcpy(request, timeout=30), SOON_S)
        assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE"), error.details()
        assert "device 2" in error.details()

    # The survivors serve others while the communicator is still there, and are free once it is not.
    with rpc.comm(2, deviceIds=[1, 3]) as survivors:
        all_reduce_on(rpc, survivors)
    rpc.comm_destroy(comm.commId)
    all_reduce_works(rpc, 2)
    error = fail_within(lambda: rpc.comm_init(3), SOON_S)
    assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
    assert fleet.devices[1].address in error.details()
    listed = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=10).devices
    assert [status.reachable for status in listed] == [True, False, True]
    assert rpc.is_serving()


def test_a_device_that_dies_in_the_middle_of_a_group_is_named(fleet: Fleet, rpc: Rpc):
    comm = rpc.comm_init(3)
    with moving_group(rpc, comm, fleet) as future:
        kill(fleet.devices[2])
        error = fail_within(future.result, SOON_S)
    assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
    assert f"device 3 at {fleet.devices[2].address}" in error.details()
    assert rpc.status(comm.commId).status == pb.FAILED
    assert rpc.is_serving()
    with rpc.comm(2, deviceIds=[1, 2]) as survivors:
        all_reduce_on(rpc, survivors)


def test_the_coordinator_dies_and_the_devices_serve_the_next_one(fleet: Fleet, rpc: Rpc):
    comm = rpc.comm_init(3)
    with moving_group(rpc, comm, fleet) as future:
        kill(fleet.coordinator)
        assert failure_of(future.result).code().name == "UNAVAILABLE"
    options = [option for device in fleet.devices for option in ("--device", device.address)]
    with ServerProcess("coordinator", *options) as successor, rpc_to(successor.address) as to_successor:
        all_reduce_works(to_successor, 3)


def test_a_device_server_that_was_restarted_has_lost_the_communicator(tmp_path: Path):
    with running(tmp_path, "device", "--id", "1") as one, running(tmp_path, "device", "--id", "2") as two:
        options = ["--device", one.address, "--device", two.address, "--on-failure", "fail"]
        with ServerProcess("coordinator", *options) as coordinator, rpc_to(coordinator.address) as rpc:
            comm = rpc.comm_init(2)
            all_reduce_on(rpc, comm)
            two.ends(signal.SIGKILL)
            port = two.address.rpartition(":")[2]
            with running(tmp_path, "device", "--id", "2", "--port", port):
                error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=30), SOON_S)
                assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
                assert "device 2" in error.details()
                rpc.comm_destroy(comm.commId)
                all_reduce_works(rpc, 2)


def test_two_device_servers_of_one_id_are_refused_at_the_start():
    with ServerProcess("device", "--id", "5") as one, ServerProcess("device", "--id", "5") as two:
        ended = run_to_end("coordinator", "--port", "0", "--device", one.address, "--device", two.address)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    for word in (one.address, two.address, "5", "--id"):
        assert word in line


def test_a_device_server_that_comes_later_is_used(tmp_path: Path):
    with running(tmp_path, "device", "--id", "1") as one:
        address = one.address
        one.ends(signal.SIGKILL)
        with running(tmp_path, "coordinator", "--device", address) as coordinator, rpc_to(coordinator.address) as rpc:
            error = fail_within(lambda: rpc.comm_init(1), SOON_S)
            assert error.code().name == "UNAVAILABLE"
            assert address in error.details()
            with running(tmp_path, "device", "--id", "1", "--port", address.rpartition(":")[2]):

                def is_known() -> bool:
                    listed = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=10).devices
                    return [status.reachable for status in listed] == [True]

                # gRPC does not try again at once where it could not connect.
                wait_until(is_known, "the device server to be known", timeout_s=SOON_S)
                all_reduce_works(rpc, 1)
