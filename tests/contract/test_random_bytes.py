"""Whatever arrives, the servers answer, with a code of the contract, and work on.

Two kinds of requests go to every RPC of both services: bytes that are random, and messages that are valid but filled at
random, with ids that exist among those that do not, and with numbers around the powers of two. Each call must end by the
server's own doing: well, or refused with one of `REFUSALS`. INTERNAL and UNKNOWN are what a defect of the server looks
like, and the client's own deadline what a hang looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.client.collectives import wire_schedule
from dsml_gpu.memory.shared import boot_id
from dsml_gpu.schedules import algorithms_of, find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.rpc import CALL_TIMEOUT_S, MIB, Rpc, all_reduce_on, all_reduce_works, refusal_of, rpc_to

EXAMPLES = 15
#: What a server may answer to a random request. DEADLINE_EXCEEDED only where the server says it, with its refusal.
REFUSALS = {
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "FAILED_PRECONDITION",
    "ALREADY_EXISTS",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "DATA_LOSS",
}
SMALL_TIMEOUTS = ["--stall-timeout", "0.1"]


@dataclass(frozen=True)
class World:
    """The servers, and ids that exist there.

    Attributes:
        rpcs: a coordinator with embedded devices, the coordinator of a fleet, and a device server of the fleet.
        kept: a communicator of the first, which must still work at the end.
    """

    rpcs: list[Rpc]
    kept: pb.CommInitResponse

    @property
    def known(self) -> list[int]:
        """Devices 1 and 2 exist everywhere; the communicator 0 and the rank 0 on the device server."""
        return [0, 1, 2, self.kept.commId]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Both kinds of servers, with memory and limits that are small enough to be reached."""
    with (
        ServerProcess(
            "coordinator", "--memory", "4MiB", "--embedded", "6", "--operation-timeout", "2", *SMALL_TIMEOUTS
        ) as alone,
        Fleet(2, ["--memory", "4MiB", *SMALL_TIMEOUTS], ["--operation-timeout", "2", *SMALL_TIMEOUTS]) as fleet,
        rpc_to(alone.address) as coordinator,
        rpc_to(fleet.address) as of_fleet,
        rpc_to(fleet.devices[0].address) as device,
    ):
        peers = [pb.Peer(deviceId=number, address=fleet.devices[number - 1].address) for number in (1, 2)]
        device.device.JoinComm(pb.JoinCommRequest(peers=peers), timeout=CALL_TIMEOUT_S)
        yield World([coordinator, of_fleet, device], coordinator.comm_init(4))
        assert all(server.process.poll() is None for server in (alone, fleet.coordinator, *fleet.devices))


COLLECTIVE = pb.DESCRIPTOR.services_by_name["GPUCoordinator"].methods_by_name["Collective"]
METHODS = [method for name in ("GPUCoordinator", "GPUDevice") for method in pb.DESCRIPTOR.services_by_name[name].methods]
_ALGORITHMS = ["", "auto", "ring", "direct", "binomial_tree", "dissemination", "star"]
_ADDRESSES = ["", "127.0.0.1:1", "[::1]:1", ":", "127.0.0.1:99999", "unix:/"]
_URLS = ["", "memory://checkpoint", "memory://checkpoint/rank0.safetensors", "nowhere://x", "file:///dev/null/x"]
_KEYS = ["", *map(str, range(1000))]
#: Streams that the caller ends.
_ENDLESS = ("Heartbeat", "RegisterDevices")
#: What strings are filled with.
STRINGS = {
    "gpu_sim.Peer.address": _ADDRESSES,
    "gpu_sim.RegisterDevicesRequest.address": _ADDRESSES,
    "gpu_sim.UnregisterDevicesRequest.address": _ADDRESSES,
    "gpu_sim.SharedMemory.bootId": ["", "elsewhere", boot_id()],
    "gpu_sim.SharedMemory.token": ["", "/", "0" * 32],
    "gpu_sim.CollectiveRequest.algorithm": _ALGORITHMS,
    "gpu_sim.Schedule.algorithm": _ALGORITHMS,
    **{
        f"gpu_sim.{name}.idempotencyKey": _KEYS
        for name in (
            "AllReduceRingRequest",
            "CollectiveRequest",
            "CommGrowRequest",
            "CommInitRequest",
            "FreeRequest",
            "GroupEndRequest",
            "MallocRequest",
            "NaiveAllReduceRequest",
        )
    },
    **{f"gpu_sim.{name}.url": _URLS for name in ("CheckpointRequest", "LoadedPart", "RestoreRequest", "SaveShardRequest")},
    **{f"gpu_sim.{name}.name": ["", "a", "b/c", "__metadata__"] for name in ("ArrayRange", "CheckpointArray", "LoadedPart")},
    "gpu_sim.LoadedPart.json": ["", "{}", "[" * 9999, '{"name": "rank0.safetensors"}'],
    "gpu_sim.SetCostModelRequest.json": ["", "{}", "[" * 9999, DEFAULT_COST_MODEL.to_json(), LINKS_ONLY.to_json()],
}
_EDGES = sorted(
    {
        number
        for power in (0, 3, 8, 12, 16, 20, 22, 24, 31, 32, 53, 63, 64)
        for number in (2**power - 8, 2**power - 1, 2**power, 2**power + 1)
    }
)


def number(bits: int, known: list[int]) -> st.SearchStrategy[int]:
    top = 2**bits - 1
    edges = [edge for edge in (*_EDGES, *known) if 0 <= edge <= top]
    return st.sampled_from(edges) | st.integers(0, top) | st.sampled_from([n for n in known if n <= top])


def value_of(field: Any, known: list[int], depth: int) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return message_of(field.message_type, known, depth + 1)
    if field.type == FieldDescriptor.TYPE_ENUM:
        # Open enums: any number comes through, known or not.
        return st.sampled_from([value.number for value in field.enum_type.values]) | st.sampled_from([-1, 17, 2**31 - 1])
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(STRINGS[field.full_name])
    strategies: dict[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.TYPE_BOOL: st.booleans(),
        FieldDescriptor.TYPE_BYTES: st.binary(max_size=64),
        FieldDescriptor.TYPE_DOUBLE: st.floats() | st.sampled_from([0.0, 1.0, 2.0]),
        FieldDescriptor.TYPE_UINT32: number(32, known),
        FieldDescriptor.TYPE_UINT64: number(64, known),
    }
    return strategies[field.type]


@st.composite
def message_of(draw: st.DrawFn, descriptor: Any, known: list[int], depth: int = 0) -> Any:
    """A message of a type in which each field is there or not."""
    message = getattr(pb, descriptor.full_name.removeprefix("gpu_sim.").split(".")[0])
    for name in descriptor.full_name.removeprefix("gpu_sim.").split(".")[1:]:
        message = getattr(message, name)
    message = message()
    for field in descriptor.fields:
        if not draw(st.integers(0, 5)):
            continue
        entries = field.message_type.fields_by_name if field.type == FieldDescriptor.TYPE_MESSAGE else {}
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys = draw(st.lists(st.sampled_from([*range(6), 2**32 - 1]), max_size=6) | st.just([0, 1, 2, 3]))
            for key in keys:
                getattr(message, field.name)[key].CopyFrom(draw(value_of(entries["value"], known, depth)))
        elif field.is_repeated:
            # 4: as many as the kept communicator has ranks.
            one = value_of(field, known, depth)
            values = draw(st.lists(one, max_size=3) | st.lists(one, min_size=4, max_size=4))
            getattr(message, field.name).extend(values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(draw(value_of(field, known, depth)))
        else:
            setattr(message, field.name, draw(value_of(field, known, depth)))
    return message


def send(rpc: Rpc, method: MethodDescriptor, requests: list[bytes]) -> bytes | None:
    """Sends raw bytes to an RPC; returns the last message of the answer, None where it is refused as it may be."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    channel = rpc.channel
    try:
        if method.client_streaming:
            return bytes(channel.stream_unary(path)(iter(requests), timeout=CALL_TIMEOUT_S))
        if method.name in _ENDLESS:
            stream = channel.unary_stream(path)(requests[0], timeout=CALL_TIMEOUT_S)
            first = next(stream)
            stream.cancel()
            return bytes(first)
        if method.server_streaming:
            answer = [b"", *channel.unary_stream(path)(requests[0], timeout=CALL_TIMEOUT_S)]
            return bytes(answer[-1])
        return bytes(channel.unary_unary(path)(requests[0], timeout=CALL_TIMEOUT_S))
    except grpc.RpcError as error:
        refused = error
    said = f"{path} of {[request.hex() for request in requests]}: {refused.code().name}: {refused.details()}"
    assert refused.code().name in REFUSALS, said
    assert refusal_of(refused) is not None, f"{said}: not the server's own words"
    return None


def send_and_clean_up(world: World, method: MethodDescriptor, requests: list[bytes]) -> None:
    """Sends to all servers that have the service; a communicator or a group that comes of it goes at once."""
    if method.name in ("CommDestroy", "CommFinalize", "JoinComm", "LeaveComm") and any(
        names_kept(world, method, one) for one in requests
    ):
        return  # the others need it
    has_coordinator = method.containing_service.name == "GPUCoordinator"
    for rpc in world.rpcs[:2] if has_coordinator else world.rpcs:
        answer = send(rpc, method, requests)
        if method.name == "CommInit" and answer is not None:
            rpc.comm_destroy(pb.CommInitResponse.FromString(answer).commId)
        if method.name == "GroupStart" and answer is not None:
            comm_id = pb.GroupStartRequest.FromString(requests[0]).commId
            rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm_id, discard=True), timeout=CALL_TIMEOUT_S)


def names_kept(world: World, method: MethodDescriptor, request: bytes) -> bool:
    try:
        return bool(getattr(pb, method.input_type.name).FromString(request).commId == world.kept.commId)
    except DecodeError:
        return False


def requests_of(method: MethodDescriptor, one: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    if method.client_streaming:
        return st.lists(one, max_size=3)
    return one.map(lambda request: [request])


BUDGET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.containing_service.name}.{method.name}")
@given(data=st.data())
@BUDGET
def test_random_bytes(world: World, method: MethodDescriptor, data: st.DataObject):
    requests = data.draw(requests_of(method, st.binary(max_size=64)))
    send_and_clean_up(world, method, requests)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.containing_service.name}.{method.name}")
@given(data=st.data())
@BUDGET
def test_random_messages(world: World, method: MethodDescriptor, data: st.DataObject):
    one = message_of(method.input_type, world.known).map(lambda message: bytes(message.SerializeToString()))
    send_and_clean_up(world, method, data.draw(requests_of(method, one)))


@st.composite
def collective_of(draw: st.DrawFn, comm_id: int) -> pb.CollectiveRequest:
    """A collective of four ranks, most of which is right: what is wrong is seen only behind many checks, or by nobody."""
    kind = draw(st.sampled_from([name for name, number in pb.CollectiveRequest.Kind.items() if number]))
    places = st.sampled_from([(0, MIB), (4096, 2 * MIB), (MIB + 8, MIB + 8)])
    if draw(st.integers(0, 3)) == 0:
        addr = st.sampled_from([0, 8, 4096, MIB, 4 * MIB - 64, 4 * MIB, 2**64 - 8])
        places = st.tuples(addr, addr)
    request = pb.CollectiveRequest(
        commId=comm_id,
        kind=kind,
        dtype=draw(st.sampled_from(pb.DataType.keys())),
        op=draw(st.sampled_from(pb.ReduceOp.keys())),
        algorithm=draw(st.sampled_from(["", *algorithms_of(kind.lower())])),
    )
    if draw(st.integers(0, 5)) == 0:
        request.weights.extend(draw(st.lists(st.sampled_from([0.0, 0.5, 2.0, float("nan")]), min_size=4, max_size=4)))
    if kind in ("REDUCE", "BROADCAST", "GATHER", "SCATTER"):
        request.root = draw(st.sampled_from([0, 1, 2, 3, 3, 4]))
    if kind == "SEND_RECV":
        rank, count = st.sampled_from([0, 1, 2, 3, 3, 4]), st.sampled_from([0, 8, 64, MIB])
        for src, dst, nbytes, (send_addr, recv_addr) in draw(st.lists(st.tuples(rank, rank, count, places), max_size=3)):
            request.sendRecvs.add(src=src, dst=dst, count=nbytes, sendAddr=send_addr, recvAddr=recv_addr)
    elif kind != "BARRIER":
        nblocks = {"ALL_TO_ALL": 16, "ALL_REDUCE": 1, "REDUCE": 1, "BROADCAST": 1}.get(kind, 4)
        number = draw(st.sampled_from([1, nblocks]))
        request.counts.extend(draw(st.lists(st.sampled_from([0, 8, 64, 4096]), min_size=number, max_size=number)))
        for send_addr, recv_addr in draw(st.lists(places, min_size=4, max_size=4)):
            request.buffers.add(sendAddr=send_addr, recvAddr=recv_addr)
    if draw(st.booleans()):
        schedule = find_algorithm(kind.lower(), draw(st.sampled_from([*algorithms_of(kind.lower())]))).schedule(
            4, root=request.root % 4, pairs=tuple((entry.src % 4, entry.dst % 4) for entry in request.sendRecvs)
        )
        request.algorithm = ""
        request.schedule.CopyFrom(wire_schedule(schedule))
        for step in request.schedule.steps:
            if step.transfers and draw(st.integers(0, 4)) == 0:
                transfer = step.transfers[draw(st.integers(0, len(step.transfers) - 1))]
                transfer.dst = draw(st.integers(0, 4))
                transfer.chunk = draw(st.integers(0, 4))
    return request


@given(data=st.data())
@settings(BUDGET, max_examples=150)
def test_random_collectives(world: World, data: st.DataObject):
    request = data.draw(collective_of(world.kept.commId))
    send(world.rpcs[0], COLLECTIVE, [request.SerializeToString()])


def test_the_servers_work_on(world: World):
    """Runs after the others of this file."""
    coordinator, of_fleet, device = world.rpcs
    for rpc in world.rpcs:
        assert rpc.is_serving()
    all_reduce_on(coordinator, world.kept)
    all_reduce_works(coordinator, 2)
    all_reduce_works(of_fleet, 2)
    assert device.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S).metadata.deviceId.value
