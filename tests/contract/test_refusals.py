"""Every refusal of the contract, over a real connection to a real process.

Each row of `CASES` is one request that must be refused: with a code, with a name in the trailing metadata
"dsml-refusal", and with a message that names what was expected and what came. After each of them the servers are asked
for their health and for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.contract.refusal_cases import CASES, MIN_ADDR, Case, World, addr
from tests.support.rpc import (
    CALL_TIMEOUT_S,
    MIB,
    Rpc,
    all_reduce_on,
    all_reduce_works,
    assert_refused,
    failure_of,
    naive,
    ring,
    rpc_to,
)


@pytest.fixture(scope="module")
def servers() -> Iterator[World]:
    with (
        ServerProcess("coordinator", "--memory", "16MiB") as alone,
        Fleet(2, ["--memory", "16MiB", "--min-addr", str(MIN_ADDR)]) as fleet,
        rpc_to(alone.address) as coordinator,
        rpc_to(fleet.address) as of_fleet,
        rpc_to(fleet.devices[0].address) as device,
        coordinator.comm(4) as comm,
        of_fleet.comm(2) as fleet_comm,
    ):
        peers = [pb.Peer(deviceId=number, address=fleet.devices[number - 1].address) for number in (1, 2)]
        device.device.JoinComm(pb.JoinCommRequest(rank=0, peers=peers), timeout=CALL_TIMEOUT_S)
        yield World(coordinator, comm, of_fleet, fleet_comm, device)


@pytest.fixture
def world(servers: World) -> Iterator[World]:
    yield servers
    servers.serves_on()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refusal(world: World, case: Case):
    stub = world.coordinator.coordinator if case.service == "GPUCoordinator" else world.device.device
    request = case.request(world)
    assert_refused(
        lambda: getattr(stub, case.method)(iter(request) if isinstance(request, list) else request, timeout=CALL_TIMEOUT_S),
        case.code,
        case.refusal,
        case.words(world),
    )


@pytest.mark.parametrize("service", ["GPUCoordinator", "GPUDevice"])
def test_the_table_has_an_unknown_id_for_every_rpc_that_takes_one(service: str):
    """An RPC added later must say what it does about ids that name nothing."""
    makes_its_own = {
        ("GPUDevice", "JoinComm"),
        ("GPUDevice", "LeaveComm"),
        ("GPUDevice", "Malloc"),
        # The allocation is what is not found, where the commId is not the one it was made for.
        ("GPUDevice", "Free"),
        ("GPUCoordinator", "Free"),
    }  # a commId, that is
    refused = {
        (case.method, case.refusal)
        for case in CASES
        if case.service == service and case.code in ("NOT_FOUND", "FAILED_PRECONDITION")
    }
    for method in pb.DESCRIPTOR.services_by_name[service].methods:
        fields = {field.name for field in method.input_type.fields}
        for oneof in method.input_type.oneofs:
            fields |= {field.name for option in oneof.fields for field in option.message_type.fields}
        wanted = []
        if fields & {"commId", "comm_id"} and (service, method.name) not in makes_its_own:
            wanted.append({"COMM_NOT_FOUND", "COMM_NOT_READY"})
        if fields & {"deviceId", "deviceIds", "dstDeviceId", "srcDeviceId"} and method.name != "StreamSend":
            wanted.append({"DEVICE_NOT_FOUND"})
        for names in wanted:
            assert any((method.name, name) in refused for name in names), f"{service}.{method.name}: none of {names}"


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_group_cannot_be_opened_twice(world: World):
    rpc, comm_id = world.coordinator, world.comm.commId
    rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm_id), timeout=CALL_TIMEOUT_S)
    rpc.coordinator.AllReduceRing(ring(world.comm, 8), timeout=CALL_TIMEOUT_S)
    assert_refused(
        lambda: rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm_id), timeout=CALL_TIMEOUT_S),
        "FAILED_PRECONDITION",
        "GROUP_MISUSE",
        [comm_id, "1 operation"],
    )
    # The refusal leaves the group as it was: it still ends, with its one operation.
    result = rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm_id), timeout=CALL_TIMEOUT_S).result
    assert result.algorithm == "ring"


@pytest.mark.parametrize("fields", [{}, {"nonBlocking": True}, {"discard": True}], ids=str)
def test_a_group_that_is_not_open_cannot_be_ended(world: World, fields: dict[str, bool]):
    request = pb.GroupEndRequest(commId=world.comm.commId, **fields)
    assert_refused(
        lambda: world.coordinator.coordinator.GroupEnd(request, timeout=CALL_TIMEOUT_S),
        "FAILED_PRECONDITION",
        "GROUP_MISUSE",
        [world.comm.commId],
    )


def test_a_refused_operation_is_not_queued_in_the_group(world: World):
    rpc, comm_id = world.coordinator, world.comm.commId
    rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm_id), timeout=CALL_TIMEOUT_S)
    assert_refused(
        lambda: rpc.coordinator.AllReduceRing(ring(world.comm, 12), timeout=CALL_TIMEOUT_S),
        "INVALID_ARGUMENT",
        "COUNT_NOT_MULTIPLE",
    )
    assert_refused(
        lambda: rpc.coordinator.AllReduceRing(ring(world.comm, 8, offset=16 * MIB), timeout=CALL_TIMEOUT_S),
        "OUT_OF_RANGE",
        "ADDRESS_OUT_OF_RANGE",
    )
    response = rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm_id), timeout=CALL_TIMEOUT_S)
    assert response.success
    assert response.result.bytesSent == 0


def test_a_finalized_communicator_takes_no_operations(world: World):
    rpc = world.coordinator
    with rpc.comm(2) as comm:
        rpc.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        again = rpc.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        assert again.status == pb.IN_PROGRESS
        for call in (
            lambda: rpc.coordinator.AllReduceRing(ring(comm, 8), timeout=CALL_TIMEOUT_S),
            lambda: rpc.coordinator.NaiveAllReduce(naive(comm, 8), timeout=CALL_TIMEOUT_S),
            lambda: rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S),
        ):
            assert_refused(call, "FAILED_PRECONDITION", "COMM_NOT_READY", [comm.commId, "finalized"])
        # Its memory is there until it is destroyed.
        rpc.write(comm.devices[0].deviceId.value, 0, b"12345678")
        assert rpc.read(comm.devices[0].deviceId.value, 0, 8) == b"12345678"


def test_a_destroyed_communicator_and_its_devices_are_gone(world: World):
    rpc = world.coordinator
    with rpc.comm(1) as comm:
        pass
    assert_refused(lambda: rpc.comm_destroy(comm.commId), "NOT_FOUND", "COMM_NOT_FOUND", [comm.commId])
    gone = comm.devices[0].deviceId.value
    assert_refused(lambda: rpc.read(gone, 0, 8), "NOT_FOUND", "DEVICE_NOT_FOUND", [gone])


def test_a_stream_has_one_receiver(world: World):
    def receive() -> Any:
        request = pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=777), recvBuffAddr=addr(MIN_ADDR), numBytes=8, srcRank=pb.Rank(value=1)
        )
        return world.device.device.BeginReceive(request, timeout=CALL_TIMEOUT_S)

    assert receive().initiated
    assert_refused(receive, "ALREADY_EXISTS", "STREAM_IN_USE", [777])
    # Its sender comes after all, so that no open stream is left behind.
    world.device.device.StreamSend(iter([pb.DataChunk(streamId=777, data=bytes(8))]), timeout=CALL_TIMEOUT_S)
    assert_refused(receive, "ALREADY_EXISTS", "STREAM_IN_USE", [777])


def test_data_without_a_stream_id_is_refused_where_two_receives_wait(world: World):
    for stream_id in (901, 902):
        request = pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=stream_id), recvBuffAddr=addr(MIN_ADDR), numBytes=8, srcRank=pb.Rank(value=1)
        )
        world.device.device.BeginReceive(request, timeout=CALL_TIMEOUT_S)
    assert_refused(
        lambda: world.device.device.StreamSend(iter([pb.DataChunk(data=bytes(8))]), timeout=CALL_TIMEOUT_S),
        "FAILED_PRECONDITION",
        "AMBIGUOUS_STREAM",
        ["2 receives", 1],
    )
    for stream_id in (901, 902):
        chunk = pb.DataChunk(streamId=stream_id, data=bytes(8))
        world.device.device.StreamSend(iter([chunk]), timeout=CALL_TIMEOUT_S)


def test_bytes_that_are_no_message_are_refused(world: World):
    for rpc, path, name in (
        (world.coordinator, "/gpu_sim.GPUCoordinator/CommInit", "CommInitRequest"),
        (world.device, "/gpu_sim.GPUDevice/BeginSend", "BeginSendRequest"),
    ):
        call = rpc.channel.unary_unary(path)
        assert_refused(
            lambda call=call: call(b"\xff\xff\xff\xff", timeout=CALL_TIMEOUT_S),
            "INVALID_ARGUMENT",
            "MALFORMED_MESSAGE",
            [4, name],
        )
    call = world.device.channel.stream_unary("/gpu_sim.GPUDevice/StreamHostToDevice")
    assert_refused(
        lambda: call(iter([b"\xff\xff\xff"]), timeout=CALL_TIMEOUT_S),
        "INVALID_ARGUMENT",
        "MALFORMED_MESSAGE",
        [3, "DataChunk"],
    )


def test_peer_to_peer_cannot_be_forced_between_processes(world: World):
    ids = [device.deviceId.value for device in world.fleet_comm.devices]
    request = pb.CommInitRequest(numDevices=2, deviceIds=ids, transport=pb.P2P)
    error = failure_of(lambda: world.fleet.coordinator.CommInit(request, timeout=CALL_TIMEOUT_S))
    assert error.code().name == "INVALID_ARGUMENT"
    for word in ("p2p", "device 1", "device 2", *(device.address for device in world.fleet_comm.devices)):
        assert word in error.details()
    # A communicator that could not be made holds no devices.
    listed = world.fleet.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
    assert [list(status.commIds) for status in listed] == [[world.fleet_comm.commId]] * 2


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_limit_of_embedded_devices_is_refused_and_free_again_after_destroy():
    with ServerProcess("coordinator", "--embedded", "3") as server, rpc_to(server.address) as rpc:
        kept = rpc.comm_init(2)
        assert_refused(lambda: rpc.comm_init(2), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["2 devices", "1 of 3"])
        assert_refused(lambda: rpc.comm_init(2**32 - 1), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", [2**32 - 1])
        all_reduce_on(rpc, kept)
        rpc.comm_destroy(kept.commId)
        all_reduce_works(rpc, 3)
        assert rpc.is_serving()


def test_the_limit_of_embedded_devices_on_demand(world: World):
    rpc = world.coordinator
    assert_refused(lambda: rpc.comm_init(1025), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["1025", "1020 more"])
    # The refused communicator has taken none of them: all can be had.
    comms = [rpc.comm_init(ndevices) for ndevices in (255, 255, 255, 255)]
    assert_refused(lambda: rpc.comm_init(1), "RESOURCE_EXHAUSTED", "OUT_OF_DEVICES", ["1 devices", "0 more"])
    rpc.comm_destroy(comms.pop().commId)
    comms.append(rpc.comm_init(255))
    for comm in comms:
        rpc.comm_destroy(comm.commId)
    all_reduce_works(rpc, 4)


def test_device_memory_is_exhausted_and_free_again():
    with ServerProcess("device", "--memory", "4MiB") as server, rpc_to(server.address) as rpc:
        kept = [rpc.device.Malloc(pb.MallocRequest(numBytes=MIB), timeout=CALL_TIMEOUT_S).memAddr.value for _ in range(4)]
        assert len(set(kept)) == 4
        assert_refused(
            lambda: rpc.device.Malloc(pb.MallocRequest(numBytes=256), timeout=CALL_TIMEOUT_S),
            "RESOURCE_EXHAUSTED",
            "OUT_OF_MEMORY",
            [256, 4 * MIB],
        )
        rpc.device.Free(pb.FreeRequest(memAddr=addr(kept[2])), timeout=CALL_TIMEOUT_S)
        again = rpc.device.Malloc(pb.MallocRequest(numBytes=MIB), timeout=CALL_TIMEOUT_S).memAddr.value
        assert again == kept[2]


@pytest.fixture(scope="module")
def small_messages() -> Iterator[Rpc]:
    with (
        ServerProcess("coordinator", "--max-message", "4MiB", "--memory", "3GiB") as server,
        rpc_to(server.address) as rpc,
    ):
        yield rpc


def test_a_message_over_the_limit_is_refused_and_the_limit_itself_is_not(small_messages: Rpc):
    rpc = small_messages
    with rpc.comm(1) as comm:
        device = comm.devices[0].deviceId.value
        payload = bytes(range(256)) * (4 * MIB // 256)
        rpc.write(device, 0, payload)
        assert rpc.read(device, 0, 4 * MIB) == payload
        error = failure_of(lambda: rpc.write(device, 0, bytes(5 * MIB)))
        assert error.code().name == "RESOURCE_EXHAUSTED"
        assert str(5 * MIB)[:3] in error.details()  # the message is a few bytes longer than its payload
        assert rpc.read(device, 0, 4 * MIB) == payload
        all_reduce_works(rpc, 2)
        assert rpc.is_serving()


@pytest.mark.parametrize("nbytes", [5 * MIB, 2500 * MIB], ids=["5 MiB", "2500 MiB"])
def test_an_answer_over_the_limit_is_refused(small_messages: Rpc, nbytes: int):
    """The client's own limit is far above: it is the server that must not try. No protobuf message can hold 2 GiB."""
    rpc = small_messages
    with rpc.comm(1) as comm:
        error = failure_of(lambda: rpc.read(comm.devices[0].deviceId.value, 0, nbytes))
        assert error.code().name == "RESOURCE_EXHAUSTED", error.details()
        all_reduce_works(rpc, 2)
        assert rpc.is_serving()
