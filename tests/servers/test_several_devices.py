"""Device servers that host several devices. Host memory stands for their GPUs, see `numpy_gpus`."""

from __future__ import annotations

import re
import signal
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.client import in_process
from dsml_gpu.client.in_process import local
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support import numpy_gpus
from tests.support.faults import FROZEN_S, SOON_S, STALL_S, fail_within
from tests.support.processes import Running, run_to_end, running, wait_until
from tests.support.rpc import (
    CALL_TIMEOUT_S,
    MIB,
    Rpc,
    all_reduce_on,
    all_reduce_works,
    assert_refused,
    device_to_host,
    host_to_device,
    naive,
    refusal_of,
    ring,
    rpc_to,
)

TWO_GPUS = ("--gpu", "0", "--gpu", "1")


def serving(folder: Path, *options: str, command: str = "device") -> AbstractContextManager[Running]:
    return running(folder, command, "--memory", "8MiB", *options, command=numpy_gpus.COMMAND)


def port_of(address: str) -> str:
    return address.rpartition(":")[2]


def metadata_of(rpc: Rpc, device_id: int = 0) -> pb.GetDeviceMetadataResponse:
    request = pb.GetDeviceMetadataRequest(deviceId=device_id)
    response: pb.GetDeviceMetadataResponse = rpc.device.GetDeviceMetadata(request, timeout=CALL_TIMEOUT_S)
    return response


def ids(devices: Any) -> list[int]:
    return [device.deviceId.value for device in devices]


def listed(rpc: Rpc) -> list[tuple[int, bool]]:
    """Id of each device that the coordinator knows, and whether it is reachable."""
    response = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S)
    return [(status.metadata.deviceId.value, status.reachable) for status in response.devices]


# ---- one server ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ([], [0, 1]),
        (["--gpu", "5"], [5]),
        (["--gpu", "0", "--gpu", "0"], [0, 0]),
        (["--gpu", "3", "--gpu", "1", "--gpu", "3"], [3, 1, 3]),
    ],
    ids=str,
)
def test_there_is_one_device_for_each_gpu_that_is_named_or_there(tmp_path: Path, options: list[str], gpus: list[int]):
    with serving(tmp_path, "--id", "7", *options) as server, rpc_to(server.address) as rpc:
        devices = metadata_of(rpc).devices
        assert [device.gpu for device in devices] == gpus
        assert ids(devices) == list(range(7, 7 + len(gpus)))
        assert {device.maxMemAddr.value for device in devices} == {8 * MIB}
        assert len({(device.address, device.processUid) for device in devices}) == 1


def test_the_ready_line_names_all_devices(tmp_path: Path):
    with serving(tmp_path, "--id", "123", *TWO_GPUS) as server:
        assert server.ready_line.startswith(
            f"dsml-gpu devices 123, 124 listening on {server.address} (8 MiB of device memory each; "
        )
    with serving(tmp_path, "--id", "123", "--gpu", "0") as server:
        assert server.ready_line.startswith(f"dsml-gpu device 123 listening on {server.address} (8 MiB of device memory; ")


def test_the_default_ids_are_the_same_at_every_start(tmp_path: Path):
    found = []
    port = "0"
    for options in (TWO_GPUS, TWO_GPUS, ["--gpu", "0"]):
        with serving(tmp_path, "--port", port, *options) as server, rpc_to(server.address) as rpc:
            found.append(ids(metadata_of(rpc).devices))
            port = port_of(server.address)
            assert server.ends(signal.SIGKILL) == -signal.SIGKILL
    assert found[0] == found[1]
    assert len(set(found[0])) == 2
    assert 0 not in found[0]
    # A server that gets a second device keeps the id of its first.
    assert found[2] == found[0][:1] == [zlib.crc32(f"{socket.gethostname()}:{port}".encode())]


def test_ids_that_leave_64_bits_are_said_in_one_line():
    last = str((1 << 64) - 1)
    ended = run_to_end("device", "--port", "0", "--id", last, *TWO_GPUS, command=numpy_gpus.COMMAND)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert last in line


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rpc]:
    """A server of the devices 1 and 2."""
    with serving(tmp_path_factory.mktemp("server"), "--id", "1", *TWO_GPUS) as server, rpc_to(server.address) as rpc:
        yield rpc


def test_metadata_is_of_the_device_that_is_named(two_devices: Rpc):
    answers = [metadata_of(two_devices, device_id) for device_id in (0, 1, 2)]
    assert ids(answer.metadata for answer in answers) == [1, 1, 2]
    for answer in answers:
        assert ids(answer.devices) == [1, 2]
    assert_refused(lambda: metadata_of(two_devices, 3), "NOT_FOUND", "DEVICE_NOT_FOUND", ["3", "[1, 2]"])


@pytest.mark.parametrize(
    ("method", "request_without_id"),
    [
        ("BeginSend", pb.BeginSendRequest(sendBuffAddr=pb.MemAddr(), numBytes=8, dstRank=pb.Rank())),
        (
            "BeginReceive",
            pb.BeginReceiveRequest(streamId=pb.StreamId(value=9), recvBuffAddr=pb.MemAddr(), numBytes=8, srcRank=pb.Rank()),
        ),
        ("JoinComm", pb.JoinCommRequest(commId=1, peers=[pb.Peer()])),
        ("LeaveComm", pb.LeaveCommRequest(commId=1)),
        ("Execute", pb.ExecuteRequest(commId=1)),
        ("Malloc", pb.MallocRequest(numBytes=8)),
        ("Free", pb.FreeRequest(memAddr=pb.MemAddr())),
        ("StreamHostToDevice", [pb.DataChunk(memAddr=pb.MemAddr(), data=bytes(8))]),
        ("StreamDeviceToHost", pb.StreamDeviceToHostRequest(memAddr=pb.MemAddr(), numBytes=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_acts_on_a_device_must_name_it(two_devices: Rpc, method: str, request_without_id: Any):
    def call() -> Any:
        request = iter(request_without_id) if isinstance(request_without_id, list) else request_without_id
        return getattr(two_devices.device, method)(request, timeout=CALL_TIMEOUT_S)

    assert_refused(call, "INVALID_ARGUMENT", "INVALID_VALUE", ["2 devices"])


def test_the_low_level_way_between_two_devices_of_one_server(two_devices: Rpc):
    stub = two_devices.device
    data = np.random.default_rng(1).bytes(3 * MIB)
    peers = [pb.Peer(deviceId=device_id, address=two_devices.address) for device_id in (1, 2)]
    for rank, device_id in enumerate((1, 2)):
        stub.JoinComm(pb.JoinCommRequest(rank=rank, peers=peers, deviceId=device_id), timeout=CALL_TIMEOUT_S)
    chunks = [pb.DataChunk(deviceId=pb.DeviceId(value=1), memAddr=pb.MemAddr()), pb.DataChunk(data=data)]
    stub.StreamHostToDevice(iter(chunks), timeout=CALL_TIMEOUT_S)
    send = pb.BeginSendRequest(sendBuffAddr=pb.MemAddr(), numBytes=len(data), dstRank=pb.Rank(value=1), deviceId=1)
    stream_id = stub.BeginSend(send, timeout=CALL_TIMEOUT_S).streamId
    receive = pb.BeginReceiveRequest(
        streamId=stream_id, recvBuffAddr=pb.MemAddr(value=64), numBytes=len(data), srcRank=pb.Rank(), deviceId=2
    )
    stub.BeginReceive(receive, timeout=CALL_TIMEOUT_S)
    status = pb.GetStreamStatusRequest(streamId=stream_id)
    wait_until(lambda: stub.GetStreamStatus(status, timeout=CALL_TIMEOUT_S).status == pb.SUCCESS, "the end of the transfer")
    read = pb.StreamDeviceToHostRequest(deviceId=pb.DeviceId(value=2), memAddr=pb.MemAddr(value=64), numBytes=len(data))
    assert b"".join(chunk.data for chunk in stub.StreamDeviceToHost(read, timeout=CALL_TIMEOUT_S)) == data


# ---- a coordinator over such servers -------------------------------------------------------------------------------------


class World:
    """A coordinator over two servers, of the devices 1 and 2 and of the devices 11 and 12."""

    def __init__(self, folder: Path, one: Running, other: Running, coordinator: Running, rpc: Rpc) -> None:
        self.folder = folder
        self.one, self.other = one, other
        self.coordinator = coordinator
        self.rpc = rpc

    def kill_other(self) -> None:
        assert self.other.ends(signal.SIGKILL) == -signal.SIGKILL

    def restart_other(self, first_id: int = 11) -> AbstractContextManager[Running]:
        """The second server at its old address."""
        return serving(self.folder, "--id", str(first_id), "--port", port_of(self.other.address), *TWO_GPUS)

    def wait_for(self, expected: list[tuple[int, bool]]) -> None:
        """Until these devices are listed; gRPC does not try again at once where it could not connect."""
        wait_until(lambda: listed(self.rpc) == expected, str(expected), timeout_s=SOON_S)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    timeouts = ["--stall-timeout", str(STALL_S)]
    with (
        serving(tmp_path, "--id", "1", *TWO_GPUS, *timeouts) as one,
        serving(tmp_path, "--id", "11", *TWO_GPUS, *timeouts) as other,
        running(
            tmp_path, "coordinator", *("--device", one.address, "--device", other.address), *timeouts, "--on-failure", "fail"
        ) as coordinator,
        rpc_to(coordinator.address) as rpc,
    ):
        yield World(tmp_path, one, other, coordinator, rpc)


def test_a_communicator_over_all_devices_of_two_servers(world: World):
    rpc = world.rpc
    assert "2 of 2 device servers answer and have 4 devices" in world.coordinator.ready_line
    assert listed(rpc) == [(1, True), (2, True), (11, True), (12, True)]
    with rpc.comm(4) as comm:
        assert ids(comm.devices) == [1, 2, 11, 12]
        assert [device.address for device in comm.devices] == [world.one.address] * 2 + [world.other.address] * 2
        all_reduce_on(rpc, comm, elements=100_003)
        for call, request in ((rpc.coordinator.AllReduceRing, ring), (rpc.coordinator.NaiveAllReduce, naive)):
            for rank, device_id in enumerate(ids(comm.devices)):
                rpc.write(device_id, 8, np.full(1001, 10.0**rank).tobytes())
            result = call(request(comm, 8008, offset=8), timeout=CALL_TIMEOUT_S).result
            assert list(result.transports) == [pb.P2P, pb.GRPC]
            for device_id in ids(comm.devices):
                np.testing.assert_array_equal(np.frombuffer(rpc.read(device_id, 8, 8008), "<f8"), np.full(1001, 1111.0))
    with rpc.comm(2, deviceIds=[12, 11], transport=pb.P2P) as pair:
        all_reduce_on(rpc, pair)
    with rpc.comm(2, deviceIds=[2, 11], transport=pb.P2P) as pair:  # of two processes
        assert_refused(lambda: all_reduce_on(rpc, pair), "INVALID_ARGUMENT", "INVALID_VALUE", ["ring", "direct"])


def test_every_device_has_a_memory_of_its_own(world: World):
    devices = [1, 2, 11, 12]
    for device_id in devices:
        world.rpc.write(device_id, 4096, bytes([device_id]) * 100)
    for device_id in devices:
        assert world.rpc.read(device_id, 4096, 100) == bytes([device_id]) * 100
    for device_id in devices:
        request = pb.MallocRequest(deviceId=pb.DeviceId(value=device_id), numBytes=8 * MIB)
        world.rpc.coordinator.Malloc(request, timeout=CALL_TIMEOUT_S)


def test_both_devices_of_a_server_that_dies_are_unreachable_until_it_is_back(world: World):
    rpc = world.rpc
    comm = rpc.comm_init(4)
    all_reduce_on(rpc, comm)
    world.kill_other()

    error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=30), SOON_S)
    assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
    assert re.search(f"device 1[12] at {world.other.address}", str(error.details()))
    for device_id in (11, 12):
        for request in (host_to_device(device_id, 0, bytes(8)), device_to_host(device_id, 0, 8)):
            error = fail_within(lambda request=request: rpc.coordinator.Memcpy(request, timeout=30), SOON_S)
            assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
            assert f"device {device_id}" in error.details()
    assert listed(rpc) == [(1, True), (2, True), (11, False), (12, False)]
    rpc.comm_destroy(comm.commId)
    error = fail_within(lambda: rpc.comm_init(4), SOON_S)
    assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE")
    assert error.details().count(world.other.address) == 1
    all_reduce_works(rpc, 2)

    def all_work() -> bool:
        try:
            all_reduce_works(rpc, 4)
        except grpc.RpcError as error:
            # The first server, too, does not try again at once where it could not connect.
            if refusal_of(error) == "PEER_UNAVAILABLE":
                return False
            raise
        return True

    with world.restart_other():
        world.wait_for([(1, True), (2, True), (11, True), (12, True)])
        wait_until(all_work, "an all-reduce over all devices", timeout_s=SOON_S)


def test_a_frozen_server_holds_nobody_up_and_is_used_again(world: World):
    """Also is each of its devices told of the end of the communicator that it slept through."""
    rpc = world.rpc
    comm, pair = rpc.comm_init(4), rpc.comm_init(2, deviceIds=[1, 2])
    for device_id in (11, 12):
        request = pb.MallocRequest(deviceId=pb.DeviceId(value=device_id), numBytes=8 * MIB, commId=comm.commId)
        rpc.coordinator.Malloc(request, timeout=CALL_TIMEOUT_S)
    world.other.process.send_signal(signal.SIGSTOP)
    try:
        error = fail_within(lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=40), FROZEN_S)
        assert error.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        all_reduce_on(rpc, pair)
        assert listed(rpc) == [(1, True), (2, True), (11, False), (12, False)]
        rpc.comm_destroy(comm.commId)
    finally:
        world.other.process.send_signal(signal.SIGCONT)
    world.wait_for([(1, True), (2, True), (11, True), (12, True)])
    for device_id in (11, 12):
        request = pb.MallocRequest(deviceId=pb.DeviceId(value=device_id), numBytes=8 * MIB)
        rpc.coordinator.Malloc(request, timeout=CALL_TIMEOUT_S)
    rpc.comm_destroy(pair.commId)
    all_reduce_works(rpc, 4)


def test_a_server_that_comes_back_with_other_devices(world: World):
    """Device 11 is gone, 12 is there again and 13 is new; a communicator has the first two, and nobody replaces them."""
    rpc = world.rpc
    comm, first = rpc.comm_init(2, deviceIds=[11, 12]), rpc.comm_init(1, deviceIds=[11])
    world.kill_other()
    with world.restart_other(first_id=12):
        world.wait_for([(1, True), (2, True), (12, True), (13, True), (11, False)])
        calls: list[Callable[[], Any]] = [
            lambda: rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=30),
            lambda: rpc.coordinator.AllReduceRing(ring(first, 800), timeout=30),
            lambda: rpc.coordinator.Memcpy(host_to_device(11, 0, bytes(8)), timeout=30),
            lambda: rpc.coordinator.Memcpy(device_to_host(11, 0, 8), timeout=30),
            lambda: rpc.comm_init(1, deviceIds=[11]),
        ]
        for call in calls:
            error = fail_within(call, SOON_S)
            assert (error.code().name, refusal_of(error)) == ("UNAVAILABLE", "PEER_UNAVAILABLE"), error.details()
            assert "device 11 at" in error.details() or call is calls[0]
        with rpc.comm(2, deviceIds=[12, 13]) as other:
            all_reduce_on(rpc, other)
        rpc.comm_destroy(comm.commId)
        assert (11, False) in listed(rpc)
        rpc.comm_destroy(first.commId)
        # Nobody has it any more: it is forgotten.
        assert listed(rpc) == [(1, True), (2, True), (12, True), (13, True)]
        assert_refused(
            lambda: rpc.coordinator.Memcpy(device_to_host(11, 0, 8), timeout=30), "NOT_FOUND", "DEVICE_NOT_FOUND", [11, 13]
        )
        all_reduce_works(rpc, 4)


def test_a_server_that_comes_later_brings_all_its_devices(world: World):
    world.kill_other()
    options = ["--device", world.one.address, "--device", world.other.address]
    with ServerProcess("coordinator", *options) as coordinator, rpc_to(coordinator.address) as rpc:
        assert "1 of 2 device servers answer and have 2 devices" in coordinator.ready_line
        assert listed(rpc) == [(1, True), (2, True), (0, False)]
        # How many devices it has is not known, so it may be enough.
        assert_refused(lambda: rpc.comm_init(4), "UNAVAILABLE", "PEER_UNAVAILABLE", [world.other.address])
        with world.restart_other():
            wait_until(lambda: len(listed(rpc)) == 4, "the two devices", timeout_s=SOON_S)
            all_reduce_works(rpc, 4)


def test_servers_whose_ids_overlap_are_refused_at_the_start(tmp_path: Path):
    with serving(tmp_path, "--id", "1", *TWO_GPUS) as one, serving(tmp_path, "--id", "2", *TWO_GPUS) as two:
        ended = run_to_end("coordinator", "--port", "0", "--device", one.address, "--device", two.address)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    for word in (one.address, two.address, "both have 2;", "--id"):
        assert word in line


def test_a_device_that_comes_up_with_the_id_of_another_is_not_used(world: World):
    """Its server's other devices are."""
    rpc = world.rpc
    world.kill_other()
    with world.restart_other(first_id=2) as other, rpc_to(other.address) as intruder:
        world.wait_for([(1, True), (2, True), (2, False), (3, True)])
        with rpc.comm(3) as comm:
            assert ids(comm.devices) == [1, 2, 3]
            all_reduce_on(rpc, comm)
            assert {device.address for device in comm.devices if device.deviceId.value == 2} == {world.one.address}
        rpc.write(2, 0, b"12345678")
        request = pb.StreamDeviceToHostRequest(deviceId=pb.DeviceId(value=2), memAddr=pb.MemAddr(), numBytes=8)
        answer = intruder.device.StreamDeviceToHost(request, timeout=CALL_TIMEOUT_S)
        assert b"".join(chunk.data for chunk in answer) == bytes(8)
        assert_refused(lambda: rpc.comm_init(4), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["3 of 4"])


# ---- embedded devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["coordinator", "serve"])
@pytest.mark.parametrize("embedded", [["--embedded", "5"], []], ids=["from the start", "on demand"])
def test_embedded_devices_take_the_gpus_in_turn(tmp_path: Path, command: str, embedded: list[str]):
    options = [*embedded, "--gpu", "0", "--gpu", "1", "--gpu", "1"]
    with serving(tmp_path, *options, command=command) as server, rpc_to(server.address) as rpc:
        comm = rpc.comm_init(5)
        assert [device.gpu for device in comm.devices] == [0, 1, 1, 0, 1]
        all_reduce_on(rpc, comm)


def test_local_devices_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_process, "select_backends", numpy_gpus.select_backends)
    with local(devices=3, memory_bytes=8 * MIB, gpus=[4, 2]) as client, rpc_to(client.target) as rpc:
        devices = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
        assert [status.metadata.gpu for status in devices] == [4, 2, 4]


def test_a_coordinator_uses_the_embedded_devices_of_another(tmp_path: Path):
    """It is a device server too, of several devices."""
    with (
        ServerProcess("coordinator", "--embedded", "3") as one,
        ServerProcess("coordinator", "--device", one.address) as two,
    ):
        assert "1 of 1 device servers answer and have 3 devices" in two.ready_line
        with rpc_to(two.address) as rpc:
            all_reduce_works(rpc, 3)
