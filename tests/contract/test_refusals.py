"""Every refusal of the contract, over a real connection to a real process.

Each row of `ROWS` is one request that must be refused: with a code, with a name in the trailing metadata
"dsml-refusal", and with a message that names what was expected and what came. After each of them the servers are asked
for their health and for an all-reduce.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.contract.collective_refusals import (
    COLLECTIVE_CASES,
    END,
    FROM_ZERO,
    KINDS,
    NEEDS,
    NRANKS,
    REDUCING,
    ROOT,
    ROOTED,
    TO_ZERO,
    UNPROVED,
    buffers,
    collective,
    in_place,
    own_schedule,
    send_recv,
)
from tests.contract.refusal_cases import CASES, MIN_ADDR, TWO_64, Case, World, addr
from tests.support.faults import frozen
from tests.support.rpc import (
    CALL_TIMEOUT_S,
    MIB,
    Rpc,
    all_reduce_on,
    all_reduce_works,
    assert_refused,
    failure_of,
    naive,
    refusal_of,
    ring,
    rpc_to,
)

ROWS = [*CASES, *COLLECTIVE_CASES]


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


@pytest.mark.parametrize("case", ROWS, ids=str)
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
        ("GPUDevice", "Quiesce"),
        ("GPUDevice", "Malloc"),
        # The allocation is what is not found, where the commId is not the one it was made for.
        ("GPUDevice", "Free"),
        ("GPUCoordinator", "Free"),
    }  # a commId, that is
    refused = {
        (case.method, case.refusal)
        for case in ROWS
        if case.service == service and case.code in ("NOT_FOUND", "FAILED_PRECONDITION")
    }
    for method in pb.DESCRIPTOR.services_by_name[service].methods:
        fields = {field.name for field in method.input_type.fields}
        for oneof in method.input_type.oneofs:
            fields |= {field.name for option in oneof.fields for field in getattr(option.message_type, "fields", ())}
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
def test_a_group_that_is_not_open_cannot_be_ended(world: World, fields: dict[str, Any]):
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
    for wrong, refusal in (
        ({"algorithm": "star"}, "INVALID_VALUE"),
        ({"schedule": own_schedule(TO_ZERO)}, "INVALID_SCHEDULE"),
        ({"buffers": buffers("ALL_REDUCE", {3: {"recvAddr": 4}})}, "BUFFER_OVERLAP"),
    ):
        assert_refused(
            lambda wrong=wrong: rpc.coordinator.Collective(collective(world, "ALL_REDUCE", **wrong), timeout=CALL_TIMEOUT_S),
            "INVALID_ARGUMENT",
            refusal,
        )
    response = rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm_id), timeout=CALL_TIMEOUT_S)
    assert response.success
    assert response.result.bytesSent == 0
    assert not response.result.operations


def test_a_finalized_communicator_takes_no_operations(world: World):
    rpc = world.coordinator
    with rpc.comm(2) as comm:
        rpc.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        again = rpc.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        assert again.status == pb.IN_PROGRESS
        for call in (
            lambda: rpc.coordinator.AllReduceRing(ring(comm, 8), timeout=CALL_TIMEOUT_S),
            lambda: rpc.coordinator.NaiveAllReduce(naive(comm, 8), timeout=CALL_TIMEOUT_S),
            lambda: rpc.coordinator.Collective(
                pb.CollectiveRequest(commId=comm.commId, kind=pb.CollectiveRequest.BARRIER), timeout=CALL_TIMEOUT_S
            ),
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
        (world.coordinator, "/gpu_sim.GPUCoordinator/Collective", "CollectiveRequest"),
        (world.coordinator, "/gpu_sim.GPUCoordinator/GetCostModel", "GetCostModelRequest"),
        (world.coordinator, "/gpu_sim.GPUCoordinator/SetCostModel", "SetCostModelRequest"),
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


def test_peer_to_peer_cannot_be_forced_between_processes_that_do_not_share_memory():
    with Fleet(2, ["--memory", "16MiB", "--no-share-memory"]) as fleet, rpc_to(fleet.address) as rpc:
        request = pb.CommInitRequest(numDevices=2, transport=pb.P2P)
        error = failure_of(lambda: rpc.coordinator.CommInit(request, timeout=CALL_TIMEOUT_S))
        assert error.code().name == "INVALID_ARGUMENT"
        for word in ("p2p", "device 1", fleet.devices[0].address, "told not to share"):
            assert word in error.details()
        # A communicator that could not be made holds no devices.
        listed = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=CALL_TIMEOUT_S).devices
        assert [list(status.commIds) for status in listed] == [[]] * 2
        with rpc.comm(2) as comm:
            all_reduce_on(rpc, comm)


# ---- collectives -----------------------------------------------------------------------------------------------------


def allowed() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Requests that are as near to a refusal as the rules allow: (collective, what is special, fields)."""
    at, block = 4096, 16
    for kind, needs in NEEDS.items():
        where = in_place(kind, at, block)
        yield kind, "in place", {"counts": [block], "buffers": buffers(kind, where)}
        rank, addrs = where.popitem()
        yield kind, "in place on one rank", {"counts": [block], "buffers": buffers(kind, {rank: addrs})}
        # Of an all-to-all a rank has a buffer as large as all of another collective's.
        end = at + block * min(needs.nblocks, NRANKS)
        wild = [
            pb.RankBuffers(
                sendAddr=at if addrs.HasField("sendAddr") else TWO_64 - 1,
                recvAddr=end if addrs.HasField("recvAddr") else TWO_64 - 1,
            )
            for addrs in buffers(kind)
        ]
        yield kind, "side by side, anything where no address is used", {"counts": [block], "buffers": wild}
        yield kind, "nothing at one address", {"counts": [0], "buffers": [pb.RankBuffers(sendAddr=8, recvAddr=8)] * 4}
        yield kind, "nothing at the end", {"counts": [0], "buffers": [pb.RankBuffers(sendAddr=END, recvAddr=END)] * 4}
        yield kind, "empty blocks", {"counts": [0] * (needs.nblocks - 1) + [8]}
    for kind in REDUCING:
        yield kind, "weights", {"weights": [0.5, 2, 0, -1]}
        yield kind, "whole weights", {"weights": [1, 2, 3, 4], "dtype": pb.INT64}
    own = own_schedule(TO_ZERO, FROM_ZERO)
    yield "ALL_REDUCE", "own schedule", {"schedule": own}
    yield "ALL_REDUCE", "own schedule by its name", {"schedule": own, "algorithm": "mine"}
    known = own_schedule(TO_ZERO, FROM_ZERO, algorithm="ring")
    yield "ALL_REDUCE", "own schedule with a known name", {"schedule": known, "algorithm": "ring"}
    yield "ALL_REDUCE", "unnamed schedule", {"schedule": own_schedule(TO_ZERO, FROM_ZERO, algorithm="")}
    yield "BARRIER", "own schedule", {"schedule": own}
    yield "SEND_RECV", "no pairs", {"sendRecvs": []}
    pairs = [
        send_recv(0, 1, at, at),
        send_recv(0, 2, at, at),  # one source for two
        send_recv(0, 1, at + 4, at + 8),  # sources that overlap, destinations side by side
        send_recv(3, 3, at, at),  # it is there
        send_recv(3, 0, at, at + 16),
        send_recv(2, 1, at + 64, at + 68, count=0),
    ]
    yield "SEND_RECV", "many at once", {"sendRecvs": pairs}


@pytest.mark.parametrize(("kind", "what", "fields"), [pytest.param(*row, id=f"{row[0]}, {row[1]}") for row in allowed()])
def test_what_the_rules_allow(world: World, kind: str, what: str, fields: dict[str, Any]):
    response = world.coordinator.coordinator.Collective(collective(world, kind, **fields), timeout=CALL_TIMEOUT_S)
    assert response.success
    (operation,) = response.result.operations
    assert pb.CollectiveRequest.Kind.Name(operation.kind) == kind
    assert operation.algorithm
    assert operation.reason


@pytest.mark.parametrize("kind", [*NEEDS])
def test_an_address_that_is_not_needed_is_not_looked_at_wherever_memory_begins(world: World, kind: str):
    """Memory of the fleet does not begin at 0, which is what an absent field reads as."""
    needs = NEEDS[kind]
    base = [{"sendAddr": MIN_ADDR, "recvAddr": MIN_ADDR + MIB}] * 2
    request = pb.CollectiveRequest(
        commId=world.fleet_comm.commId,
        kind=kind,
        root=ROOT if kind in ROOTED else 0,
        counts=[8],
        buffers=[
            pb.RankBuffers(**{field: at for field, at in base[rank].items() if rank in needs.ranks(field)})
            for rank in range(2)
        ],
    )
    assert world.fleet.coordinator.Collective(request, timeout=CALL_TIMEOUT_S).success


@pytest.mark.parametrize("field", ["sendAddr", "recvAddr"])
def test_a_buffer_below_the_beginning_of_memory_is_refused(world: World, field: str):
    request = pb.CollectiveRequest(
        commId=world.fleet_comm.commId,
        kind=pb.CollectiveRequest.ALL_REDUCE,
        counts=[8],
        buffers=[pb.RankBuffers(**{"sendAddr": MIN_ADDR, "recvAddr": MIN_ADDR + 8, field: MIN_ADDR - 8})] * 2,
    )
    assert_refused(
        lambda: world.fleet.coordinator.Collective(request, timeout=CALL_TIMEOUT_S),
        "OUT_OF_RANGE",
        "ADDRESS_OUT_OF_RANGE",
        [hex(MIN_ADDR - 8), 8, hex(MIN_ADDR)],
    )


@pytest.fixture(scope="module")
def four_processes() -> Iterator[tuple[Fleet, Rpc]]:
    with Fleet(4, ["--memory", "16MiB"]) as fleet, rpc_to(fleet.address) as rpc:
        yield fleet, rpc


def test_no_device_hears_of_a_schedule_that_is_not_proved(four_processes: tuple[Fleet, Rpc]):
    """All devices stand still meanwhile, so that whoever asked one of them would not get an answer."""
    fleet, rpc = four_processes
    with rpc.comm(4) as comm:
        world = World(rpc, comm, rpc, comm, rpc)
        all_reduce_on(rpc, comm)
        with ExitStack() as stack:
            for server in fleet.devices:
                stack.enter_context(frozen(server))
            for kind, _, schedule, words in UNPROVED:
                assert_refused(
                    lambda kind=kind, schedule=schedule: rpc.coordinator.Collective(
                        collective(world, kind, schedule=schedule), timeout=CALL_TIMEOUT_S
                    ),
                    "INVALID_ARGUMENT",
                    "INVALID_SCHEDULE",
                    words,
                )
            # A refusal is not the end of a collective.
            assert rpc.status(comm.commId).status == pb.SUCCESS
        right = collective(world, "ALL_REDUCE", schedule=own_schedule(TO_ZERO, FROM_ZERO))
        assert rpc.coordinator.Collective(right, timeout=CALL_TIMEOUT_S).result.algorithm == "mine"


def test_the_proof_of_a_long_schedule_ends(world: World):
    """A chunk goes to and fro 2**16 times after a deadlock, so that all of it is followed and nothing runs."""
    crossed = [(0, 1, 0, True), (0, 1, 1, True), (1, 0, 1, True), (1, 0, 0, True)]
    there, back = [(0, 1, 0, False)], [(1, 0, 0, False)]
    schedule = own_schedule(crossed, *[there, back] * 2**15, parts=2)
    request = pb.CollectiveRequest(
        commId=world.fleet_comm.commId,
        kind=pb.CollectiveRequest.ALL_REDUCE,
        counts=[16],
        buffers=[pb.RankBuffers(sendAddr=MIN_ADDR, recvAddr=MIN_ADDR)] * 2,
        schedule=schedule,
    )
    assert_refused(
        lambda: world.fleet.coordinator.Collective(request, timeout=CALL_TIMEOUT_S),
        "INVALID_ARGUMENT",
        "INVALID_SCHEDULE",
        ["deadlock"],
    )


def test_chunks_that_many_ranks_hold_are_counted(world: World):
    with world.coordinator.comm(16) as comm:
        request = pb.CollectiveRequest(
            commId=comm.commId,
            kind=pb.CollectiveRequest.ALL_REDUCE,
            counts=[8],
            buffers=[pb.RankBuffers(sendAddr=0, recvAddr=0)] * 16,
            schedule=own_schedule(parts=2**17),
        )
        assert_refused(
            lambda: world.coordinator.coordinator.Collective(request, timeout=CALL_TIMEOUT_S),
            "INVALID_ARGUMENT",
            "INVALID_SCHEDULE",
            [2**21, 2**20],
        )


def test_a_cost_model_that_is_refused_changes_nothing(world: World):
    rpc = world.coordinator.coordinator
    before = rpc.GetCostModel(pb.GetCostModelRequest(), timeout=CALL_TIMEOUT_S).json
    assert_refused(
        lambda: rpc.SetCostModel(pb.SetCostModelRequest(json=before[:-3]), timeout=CALL_TIMEOUT_S),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
    )
    assert rpc.GetCostModel(pb.GetCostModelRequest(), timeout=CALL_TIMEOUT_S).json == before


def test_every_cost_model_that_is_taken_can_be_chosen_by(world: World):
    """No costs at all, and the highest power of ten that is taken for all of them: every collective finds an algorithm."""
    rpc = world.coordinator.coordinator
    before = rpc.GetCostModel(pb.GetCostModelRequest(), timeout=CALL_TIMEOUT_S).json

    def use(cost: float) -> bool:
        content = json.loads(before)
        for transport in ("p2p", "grpc"):
            content[transport] = dict.fromkeys(content[transport], cost)
        try:
            rpc.SetCostModel(pb.SetCostModelRequest(json=json.dumps(content)), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            refusal = refusal_of(error)
        else:
            return True
        assert refusal == "INVALID_VALUE"
        return False

    try:
        highest = next(cost for cost in (10.0**exponent for exponent in range(308, -1, -1)) if use(cost))
        for cost in (0.0, highest):
            assert use(cost)
            for kind in KINDS:
                sizes = {"counts": [16 << 10], "buffers": buffers(kind)} if kind in NEEDS else {}
                result = rpc.Collective(collective(world, kind, **sizes), timeout=CALL_TIMEOUT_S).result
                assert (result.operations[0].predictedNs > 0) is (cost > 0)
    finally:
        rpc.SetCostModel(pb.SetCostModelRequest(json=before), timeout=CALL_TIMEOUT_S)


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
