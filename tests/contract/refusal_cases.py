"""The table of `test_refusals`: one request in each row, and what it must be refused with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.rpc import MIB, Rpc, addresses, all_reduce_on, device_to_host, host_to_device, naive, ring

NOBODY = 987_654_321
#: Unlike the embedded devices', so that an address below the first one can be asked for.
MIN_ADDR = 1 << 16
TWO_64 = 1 << 64
#: A program that has one block and does nothing with it, and a block that it could have.
ONE_BLOCK = pb.Program(parts=1, nblocks=1)
ONE_ELEMENT = pb.Block(count=8, sendAddr=MIN_ADDR, recvAddr=MIN_ADDR)


@dataclass(frozen=True)
class World:
    """The servers that refuse.

    Attributes:
        coordinator: one started alone.
        comm: a communicator of four of its embedded devices.
        fleet: the coordinator of a fleet of two.
        fleet_comm: a communicator of both.
        device: the first of its device servers; both have joined a communicator 0 as ranks 0 and 1.
    """

    coordinator: Rpc
    comm: pb.CommInitResponse
    fleet: Rpc
    fleet_comm: pb.CommInitResponse
    device: Rpc

    def serves_on(self) -> None:
        """Asserts that all servers are healthy and that collectives work."""
        assert self.coordinator.is_serving("gpu_sim.GPUCoordinator")
        assert self.fleet.is_serving("gpu_sim.GPUCoordinator")
        assert self.device.is_serving("gpu_sim.GPUDevice")
        all_reduce_on(self.coordinator, self.comm)
        all_reduce_on(self.fleet, self.fleet_comm)


@dataclass(frozen=True)
class Case:
    """One request that must be refused.

    Attributes:
        request: makes the request, or the list of requests of a stream.
        words: what the message must name.
        service: whose RPC it is.
    """

    method: str
    what: str
    request: Callable[[World], Any]
    code: str
    refusal: str
    words: Callable[[World], Sequence[object]] = lambda world: ()
    service: str = "GPUCoordinator"

    def __str__(self) -> str:
        return f"{self.service[3:]}.{self.method}-{self.what}"


def on_device(method: str, what: str, request: Callable[[World], Any], code: str, refusal: str, *words: object) -> Case:
    return Case(method, what, request, code, refusal, lambda world: words, "GPUDevice")


def on_coordinator(method: str, what: str, request: Callable[[World], Any], code: str, refusal: str, *words: object) -> Case:
    return Case(method, what, request, code, refusal, lambda world: words)


def device_id(value: int) -> pb.DeviceId:
    return pb.DeviceId(value=value)


def addr(value: int) -> pb.MemAddr:
    return pb.MemAddr(value=value)


def first_device(world: World) -> int:
    return world.comm.devices[0].deviceId.value


def size_of(dtype: int) -> int:
    return {"8": 1, "6": 2, "2": 4, "4": 8}[pb.DataType.Name(dtype)[-1]]


# ---- ids that name nothing -------------------------------------------------------------------------------------------

_UNKNOWN_COMM = [
    on_coordinator(method, "unknown comm", request, "NOT_FOUND", "COMM_NOT_FOUND", NOBODY)
    for method, request in {
        "GetCommStatus": lambda world: pb.GetCommStatusRequest(commId=NOBODY),
        "GroupStart": lambda world: pb.GroupStartRequest(commId=NOBODY),
        "GroupEnd": lambda world: pb.GroupEndRequest(commId=NOBODY),
        "AllReduceRing": lambda world: pb.AllReduceRingRequest(commId=NOBODY, count=8, memAddrs=addresses([0])),
        "NaiveAllReduce": lambda world: pb.NaiveAllReduceRequest(comm_id=NOBODY, count=8, mem_addrs=addresses([0])),
        "CommGrow": lambda world: pb.CommGrowRequest(commId=NOBODY, numDevices=1),
        "CommFinalize": lambda world: pb.CommFinalizeRequest(commId=NOBODY),
        "CommDestroy": lambda world: pb.CommDestroyRequest(commId=NOBODY),
        "Checkpoint": lambda world: pb.CheckpointRequest(commId=NOBODY, url="memory://nowhere"),
        "Restore": lambda world: pb.RestoreRequest(commId=NOBODY, url="memory://nowhere"),
        "Malloc": lambda world: pb.MallocRequest(deviceId=device_id(first_device(world)), numBytes=8, commId=NOBODY),
    }.items()
] + [
    on_device(
        "Execute", "unknown comm", lambda world: pb.ExecuteRequest(commId=NOBODY), "NOT_FOUND", "COMM_NOT_FOUND", NOBODY
    ),
    on_device(
        "BeginSend",
        "comm not joined",
        lambda world: pb.BeginSendRequest(sendBuffAddr=addr(MIN_ADDR), numBytes=8, dstRank=pb.Rank(value=1), commId=NOBODY),
        "FAILED_PRECONDITION",
        "COMM_NOT_READY",
        NOBODY,
        "JoinComm",
    ),
    on_device(
        "BeginReceive",
        "comm not joined",
        lambda world: pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=5),
            recvBuffAddr=addr(MIN_ADDR),
            numBytes=8,
            srcRank=pb.Rank(value=1),
            commId=NOBODY,
        ),
        "FAILED_PRECONDITION",
        "COMM_NOT_READY",
        NOBODY,
        "JoinComm",
    ),
]

_UNKNOWN_DEVICE = [
    Case(method, what, request, "NOT_FOUND", "DEVICE_NOT_FOUND", lambda world: (NOBODY, first_device(world)))
    for method, what, request in (
        ("CommInit", "unknown device", lambda world: pb.CommInitRequest(numDevices=1, deviceIds=[NOBODY])),
        (
            "CommGrow",
            "unknown device",
            lambda world: pb.CommGrowRequest(commId=world.comm.commId, numDevices=1, deviceIds=[NOBODY]),
        ),
        ("Memcpy", "unknown device, to device", lambda world: host_to_device(NOBODY, 0, b"12345678")),
        ("Memcpy", "unknown device, to host", lambda world: device_to_host(NOBODY, 0, 8)),
        ("Malloc", "unknown device", lambda world: pb.MallocRequest(deviceId=device_id(NOBODY), numBytes=8)),
        ("Free", "unknown device", lambda world: pb.FreeRequest(deviceId=device_id(NOBODY), memAddr=addr(0))),
        (
            "StreamHostToDevice",
            "unknown device",
            lambda world: [pb.DataChunk(deviceId=device_id(NOBODY), memAddr=addr(0), data=b"12345678")],
        ),
        (
            "StreamDeviceToHost",
            "unknown device",
            lambda world: pb.StreamDeviceToHostRequest(deviceId=device_id(NOBODY), memAddr=addr(0), numBytes=8),
        ),
        (
            "HoldMemory",
            "unknown device",
            lambda world: pb.HoldMemoryRequest(deviceId=device_id(NOBODY), memAddr=addr(0), numBytes=8),
        ),
    )
] + [
    # The message also says which device the server does host: its id is 1.
    on_device(method, "unknown device", request, "NOT_FOUND", "DEVICE_NOT_FOUND", NOBODY, "[1]")
    for method, request in {
        "GetDeviceMetadata": lambda world: pb.GetDeviceMetadataRequest(deviceId=NOBODY),
        "BeginSend": lambda world: pb.BeginSendRequest(
            sendBuffAddr=addr(MIN_ADDR), numBytes=8, dstRank=pb.Rank(value=1), deviceId=NOBODY
        ),
        "BeginReceive": lambda world: pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=5),
            recvBuffAddr=addr(MIN_ADDR),
            numBytes=8,
            srcRank=pb.Rank(value=1),
            deviceId=NOBODY,
        ),
        "JoinComm": lambda world: pb.JoinCommRequest(commId=3, peers=[pb.Peer(deviceId=1)], deviceId=NOBODY),
        "LeaveComm": lambda world: pb.LeaveCommRequest(commId=3, deviceId=NOBODY),
        "SaveShard": lambda world: pb.SaveShardRequest(deviceId=NOBODY, url="memory://nowhere/file"),
        "LoadShard": lambda world: pb.LoadShardRequest(deviceId=NOBODY),
        "Execute": lambda world: pb.ExecuteRequest(commId=0, deviceId=NOBODY),
        "ShareMemory": lambda world: pb.ShareMemoryRequest(deviceId=NOBODY),
        "Quiesce": lambda world: pb.QuiesceRequest(commId=3, deviceId=NOBODY),
        "Malloc": lambda world: pb.MallocRequest(deviceId=device_id(NOBODY), numBytes=8),
        "Free": lambda world: pb.FreeRequest(deviceId=device_id(NOBODY), memAddr=addr(MIN_ADDR)),
        "StreamHostToDevice": lambda world: [
            pb.DataChunk(deviceId=device_id(NOBODY), memAddr=addr(MIN_ADDR), data=b"12345678")
        ],
        "StreamDeviceToHost": lambda world: pb.StreamDeviceToHostRequest(
            deviceId=device_id(NOBODY), memAddr=addr(MIN_ADDR), numBytes=8
        ),
    }.items()
]

_UNKNOWN_STREAM = [
    on_device(
        "GetStreamStatus",
        "unknown stream",
        lambda world: pb.GetStreamStatusRequest(streamId=pb.StreamId(value=NOBODY)),
        "NOT_FOUND",
        "STREAM_NOT_FOUND",
        NOBODY,
    ),
    on_device(
        "BeginReceive",
        "stream 0",
        lambda world: pb.BeginReceiveRequest(
            streamId=pb.StreamId(), recvBuffAddr=addr(MIN_ADDR), numBytes=8, srcRank=pb.Rank(value=1)
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        0,
    ),
    on_device(
        "StreamSend",
        "no stream named, none waits",
        lambda world: [pb.DataChunk(data=b"12345678")],
        "FAILED_PRECONDITION",
        "AMBIGUOUS_STREAM",
        "0 receives",
        1,
    ),
    on_device("StreamSend", "no message at all", lambda world: [], "FAILED_PRECONDITION", "AMBIGUOUS_STREAM"),
    on_coordinator(
        "Free",
        "no allocation",
        lambda world: pb.FreeRequest(deviceId=device_id(first_device(world)), memAddr=addr(512)),
        "NOT_FOUND",
        "ALLOCATION_NOT_FOUND",
        hex(512),
    ),
    on_device(
        "Free",
        "no allocation",
        lambda world: pb.FreeRequest(memAddr=addr(512)),
        "NOT_FOUND",
        "ALLOCATION_NOT_FOUND",
        hex(512),
    ),
]

# ---- arguments that no state of the server could make valid ----------------------------------------------------------

_INVALID = [
    on_coordinator("CommInit", "no devices", lambda world: pb.CommInitRequest(), "INVALID_ARGUMENT", "INVALID_VALUE", 0, 1),
    on_coordinator(
        "CommInit",
        "other number of ids",
        lambda world: pb.CommInitRequest(numDevices=3, deviceIds=[first_device(world)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        3,
        1,
    ),
    on_coordinator(
        "CommInit",
        "one id twice",
        lambda world: pb.CommInitRequest(numDevices=2, deviceIds=[first_device(world)] * 2),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
    ),
    on_coordinator(
        "CommInit",
        "unknown transport",
        lambda world: pb.CommInitRequest(numDevices=1, transport=17),  # type: ignore[arg-type]
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        17,
        "P2P",
    ),
    on_coordinator(
        "CommInit",
        "unknown onFailure",
        lambda world: pb.CommInitRequest(numDevices=1, onFailure=17),  # type: ignore[arg-type]
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        17,
        "SHRINK",
    ),
    on_coordinator(
        "CommGrow",
        "no devices",
        lambda world: pb.CommGrowRequest(commId=world.comm.commId),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        0,
        1,
    ),
    on_coordinator(
        "CommGrow",
        "a device that is there already",
        lambda world: pb.CommGrowRequest(commId=world.comm.commId, numDevices=1, deviceIds=[first_device(world)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        "already",
    ),
    on_coordinator(
        "CommGrow",
        "too many",
        lambda world: pb.CommGrowRequest(commId=world.comm.commId, numDevices=253),
        "RESOURCE_EXHAUSTED",
        "OUT_OF_DEVICES",
        256,
        253,
    ),
    on_device(
        "Execute",
        "another epoch",
        lambda world: pb.ExecuteRequest(epoch=5),
        "FAILED_PRECONDITION",
        "STALE_EPOCH",
        5,
    ),
    on_coordinator(
        "Collective",
        "an epoch that never was",
        lambda world: pb.CollectiveRequest(commId=world.comm.commId, kind="BARRIER", epoch=9),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        9,
        1,
    ),
    on_coordinator(
        "AllReduceRing",
        "an epoch that never was",
        lambda world: pb.AllReduceRingRequest(commId=world.comm.commId, epoch=9),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        9,
        1,
    ),
    on_device(
        "JoinComm",
        "rank beyond peers",
        lambda world: pb.JoinCommRequest(commId=3, rank=7, peers=[pb.Peer(deviceId=1)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        7,
        1,
    ),
    on_device(
        "BeginSend",
        "unknown rank",
        lambda world: pb.BeginSendRequest(sendBuffAddr=addr(MIN_ADDR), numBytes=8, dstRank=pb.Rank(value=2)),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        2,
    ),
    on_device(
        "BeginReceive",
        "unknown rank",
        lambda world: pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=5), recvBuffAddr=addr(MIN_ADDR), numBytes=8, srcRank=pb.Rank(value=9)
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        9,
        2,
    ),
    on_device("Malloc", "no bytes", lambda world: pb.MallocRequest(), "INVALID_ARGUMENT", "INVALID_VALUE", 0, 1),
    on_coordinator(
        "Malloc",
        "no bytes",
        lambda world: pb.MallocRequest(deviceId=device_id(first_device(world))),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        0,
        1,
    ),
    on_device(
        "Execute",
        "slice of odd size",
        lambda world: pb.ExecuteRequest(sliceBytes=5001),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        5001,
        8,
    ),
    on_device(
        "Execute",
        "unknown program",
        lambda world: pb.ExecuteRequest(operations=[pb.Operation(program=3)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        3,
        0,
    ),
    on_device(
        "Execute",
        "program without parts",
        lambda world: pb.ExecuteRequest(programs=[pb.Program(nblocks=1)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        "1 part",
    ),
    on_device(
        "Execute",
        "program of too many chunks",
        lambda world: pb.ExecuteRequest(programs=[pb.Program(parts=2**16 + 1, nblocks=2)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        2**17 + 2,
        2**17,
    ),
    on_device(
        "Execute",
        "operations of too many chunks",
        lambda world: pb.ExecuteRequest(
            programs=[pb.Program(parts=2**16, nblocks=1)], operations=[pb.Operation(blocks=[ONE_ELEMENT])] * 3
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        3 * 2**16,
        2**17,
    ),
    on_device(
        "Execute",
        "block of too many slices",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[pb.Operation(blocks=[pb.Block(count=(2**20 + 1) * 4096)])],
            sliceBytes=4096,
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        (2**20 + 1) * 4096,
        f"{2**20} slices",
    ),
    *(
        on_device(
            "Execute",
            f"{nblocks} blocks for a program of 2",
            lambda world, nblocks=nblocks: pb.ExecuteRequest(
                programs=[pb.Program(parts=1, nblocks=2)], operations=[pb.Operation(blocks=[ONE_ELEMENT] * nblocks)]
            ),
            "INVALID_ARGUMENT",
            "INVALID_VALUE",
            "2 blocks",
            nblocks,
        )
        for nblocks in (0, 1, 3)
    ),
    on_device(
        "Execute",
        "move of no chunk",
        lambda world: pb.ExecuteRequest(
            programs=[pb.Program(parts=2, nblocks=1, steps=[pb.Step(moves=[pb.Move(kind=pb.Move.SEND, peer=1, chunk=2)])])]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        2,
    ),
    on_device(
        "Execute",
        "move of unknown kind",
        lambda world: pb.ExecuteRequest(
            programs=[pb.Program(parts=1, nblocks=1, steps=[pb.Step(moves=[pb.Move(kind=9, peer=1)])])]  # type: ignore[arg-type]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        9,
    ),
    on_device(
        "Execute",
        "move without link",
        lambda world: pb.ExecuteRequest(
            programs=[pb.Program(parts=1, nblocks=1, steps=[pb.Step(moves=[pb.Move(kind=pb.Move.SEND, peer=1)])])]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
    ),
    on_device(
        "Execute",
        "link to no rank",
        lambda world: pb.ExecuteRequest(links=[pb.Link(peer=6, sendStreamId=4)]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        6,
        2,
    ),
    on_device(
        "Execute",
        "count",
        lambda world: pb.ExecuteRequest(
            programs=[pb.Program(parts=1, nblocks=2)], operations=[pb.Operation(blocks=[ONE_ELEMENT, pb.Block(count=9)])]
        ),
        "INVALID_ARGUMENT",
        "COUNT_NOT_MULTIPLE",
        9,
        8,
    ),
    on_device(
        "Execute",
        "pieces of another length",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[pb.Operation(blocks=[pb.Block(count=16, pieces=[pb.Piece(count=8), pb.Piece(count=16)])])],
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        16,
        24,
    ),
    on_device(
        "Execute",
        "pieces of part of an element",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[pb.Operation(blocks=[pb.Block(count=16, pieces=[pb.Piece(count=9), pb.Piece(count=7)])])],
        ),
        "INVALID_ARGUMENT",
        "COUNT_NOT_MULTIPLE",
        9,
        8,
    ),
    on_device(
        "Execute",
        "piece outside the memory",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[
                pb.Operation(blocks=[pb.Block(count=8, sendAddr=0, pieces=[pb.Piece(count=8, sendAddr=TWO_64 - 8)])])
            ],
        ),
        "OUT_OF_RANGE",
        "ADDRESS_OUT_OF_RANGE",
        hex(TWO_64 - 8),
    ),
    on_device(
        "Execute",
        "pass without destinations",
        lambda world: pb.ExecuteRequest(passes=[pb.Pass(count=8, sources=[pb.RankAddress(addr=MIN_ADDR)])]),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        1,
        0,
    ),
    on_device(
        "Execute",
        "pass over memory that is not open",
        lambda world: pb.ExecuteRequest(
            passes=[
                pb.Pass(
                    count=8,
                    sources=[pb.RankAddress(rank=1, addr=MIN_ADDR)],
                    destinations=[pb.RankAddress(rank=1, addr=MIN_ADDR)],
                )
            ]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        "rank 1",
        "not open",
    ),
    on_device(
        "Execute",
        "unknown op",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[pb.Operation(blocks=[ONE_ELEMENT], op=17)],  # type: ignore[arg-type]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        17,
        "SUM",
    ),
    on_device(
        "Execute",
        "unknown dtype",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK],
            operations=[pb.Operation(blocks=[ONE_ELEMENT], dtype=99)],  # type: ignore[arg-type]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        99,
        "FLOAT64",
    ),
    on_device(
        "Execute",
        "half as a weight of integers",
        lambda world: pb.ExecuteRequest(
            programs=[ONE_BLOCK], operations=[pb.Operation(blocks=[ONE_ELEMENT], dtype=pb.INT32, weight=0.5)]
        ),
        "INVALID_ARGUMENT",
        "INVALID_VALUE",
        "int32",
        0.5,
    ),
]

_COLLECTIVES: tuple[tuple[str, Callable[..., Any], str], ...] = (
    ("AllReduceRing", ring, "memAddrs"),
    ("NaiveAllReduce", naive, "mem_addrs"),
)


def _collective_cases(method: str, make: Callable[..., Any], addrs_field: str) -> Iterator[Case]:
    def with_ranks(ranks: Sequence[int]) -> Callable[[World], Any]:
        def request(world: World) -> Any:
            message = make(world.comm, 8)
            message.ClearField(addrs_field)
            for rank in ranks:
                getattr(message, addrs_field)[rank].value = 0
            return message

        return request

    for dtype in pb.DataType.values():
        size = size_of(dtype)
        if size > 1:
            count = 5 * size + size // 2
            yield on_coordinator(
                method,
                f"{count} bytes of {pb.DataType.Name(dtype)}",
                lambda world, count=count, dtype=dtype: make(world.comm, count, dtype=dtype),
                "INVALID_ARGUMENT",
                "COUNT_NOT_MULTIPLE",
                count,
                size,
            )
    by_ranks: tuple[tuple[str, tuple[int, ...], tuple[object, ...]], ...] = (
        ("no rank at all", (), (0, 4)),
        ("rank 2 missing", (0, 1, 3), ("rank 2", "0, 1, 3")),
        ("surplus rank", (0, 1, 2, 3, 4), (5, 4)),
        ("rank 7 for rank 3", (0, 1, 2, 7), ("rank 3", "0, 1, 2, 7")),
        ("rank 2**32-1 beside the others", (0, 1, 2, 3, 2**32 - 1), (5, 4)),
    )
    for what, ranks, words in by_ranks:
        yield on_coordinator(method, what, with_ranks(ranks), "INVALID_ARGUMENT", "RANK_MISMATCH", *words)
    by_fields: tuple[tuple[str, dict[str, int], tuple[object, ...]], ...] = (
        ("unknown op 17", {"op": 17}, (17, "SUM")),
        ("unknown op -1", {"op": -1}, (-1, "SUM")),
        ("unknown dtype 99", {"dtype": 99}, (99, "FLOAT64")),
        ("unknown dtype -1", {"dtype": -1}, (-1, "FLOAT64")),
    )
    for what, fields, words in by_fields:
        yield on_coordinator(
            method,
            what,
            lambda world, fields=fields: make(world.comm, 8, **fields),
            "INVALID_ARGUMENT",
            "INVALID_VALUE",
            *words,
        )


_INVALID += [case for collective in _COLLECTIVES for case in _collective_cases(*collective)]

_MISSING = [
    on_coordinator(method, what, request, "INVALID_ARGUMENT", "MISSING_FIELD", *words)
    for method, what, request, words in (
        ("Memcpy", "empty oneof", lambda world: pb.MemcpyRequest(), ("hostToDevice", "deviceToHost")),
        (
            "Memcpy",
            "to device, empty",
            lambda world: pb.MemcpyRequest(hostToDevice=pb.MemcpyHostToDeviceRequest()),
            ("dstDeviceId",),
        ),
        (
            "Memcpy",
            "to device, no address",
            lambda world: pb.MemcpyRequest(
                hostToDevice=pb.MemcpyHostToDeviceRequest(dstDeviceId=device_id(first_device(world)))
            ),
            ("dstMemAddr",),
        ),
        (
            "Memcpy",
            "to host, empty",
            lambda world: pb.MemcpyRequest(deviceToHost=pb.MemcpyDeviceToHostRequest()),
            ("srcDeviceId",),
        ),
        (
            "Memcpy",
            "to host, no address",
            lambda world: pb.MemcpyRequest(
                deviceToHost=pb.MemcpyDeviceToHostRequest(srcDeviceId=device_id(first_device(world)))
            ),
            ("srcMemAddr",),
        ),
        ("Malloc", "no device", lambda world: pb.MallocRequest(numBytes=8), ("deviceId",)),
        ("Free", "no device", lambda world: pb.FreeRequest(memAddr=addr(0)), ("deviceId",)),
        (
            "Free",
            "no address",
            lambda world: pb.FreeRequest(deviceId=device_id(first_device(world))),
            ("memAddr",),
        ),
        ("StreamHostToDevice", "no message at all", lambda world: [], ("deviceId", "memAddr")),
        ("StreamHostToDevice", "data only", lambda world: [pb.DataChunk(data=b"12345678")], ("deviceId",)),
        (
            "StreamHostToDevice",
            "no address",
            lambda world: [pb.DataChunk(deviceId=device_id(first_device(world)), data=b"12345678")],
            ("memAddr",),
        ),
        ("StreamDeviceToHost", "no device", lambda world: pb.StreamDeviceToHostRequest(memAddr=addr(0)), ("deviceId",)),
        (
            "StreamDeviceToHost",
            "no address",
            lambda world: pb.StreamDeviceToHostRequest(deviceId=device_id(first_device(world))),
            ("memAddr",),
        ),
        ("HoldMemory", "no device", lambda world: pb.HoldMemoryRequest(memAddr=addr(0)), ("deviceId",)),
        (
            "HoldMemory",
            "no address",
            lambda world: pb.HoldMemoryRequest(deviceId=device_id(first_device(world))),
            ("memAddr",),
        ),
    )
] + [
    on_device(method, f"no {field}", request, "INVALID_ARGUMENT", "MISSING_FIELD", field)
    for method, field, request in (
        ("BeginSend", "sendBuffAddr", lambda world: pb.BeginSendRequest(dstRank=pb.Rank(value=1))),
        ("BeginSend", "dstRank", lambda world: pb.BeginSendRequest(sendBuffAddr=addr(MIN_ADDR))),
        (
            "BeginReceive",
            "streamId",
            lambda world: pb.BeginReceiveRequest(recvBuffAddr=addr(MIN_ADDR), srcRank=pb.Rank(value=1)),
        ),
        (
            "BeginReceive",
            "recvBuffAddr",
            lambda world: pb.BeginReceiveRequest(streamId=pb.StreamId(value=5), srcRank=pb.Rank(value=1)),
        ),
        (
            "BeginReceive",
            "srcRank",
            lambda world: pb.BeginReceiveRequest(streamId=pb.StreamId(value=5), recvBuffAddr=addr(MIN_ADDR)),
        ),
        ("GetStreamStatus", "streamId", lambda world: pb.GetStreamStatusRequest()),
        ("Free", "memAddr", lambda world: pb.FreeRequest()),
        ("StreamHostToDevice", "memAddr", lambda world: [pb.DataChunk(data=b"12345678")]),
        ("StreamDeviceToHost", "memAddr", lambda world: pb.StreamDeviceToHostRequest(numBytes=8)),
    )
]

# ---- outside the arena -----------------------------------------------------------------------------------------------


def ranges(low: int, high: int) -> dict[str, tuple[int, int]]:
    """(address, size) that leave [low, high)."""
    ranges = {
        "begins behind the end": (high, 8),
        "crosses the end": (high - 8, 16),
        "one byte more than all": (low, high - low + 1),
        "last address": (TWO_64 - 1, 8),
        "ends at 2**64": (TWO_64 - 4096, 4096),
        "wraps to the first byte": (TWO_64 - 8, 8 + low + 8),
        "largest size": (low, TWO_64 - 1),
        "largest address and size": (TWO_64 - 1, TWO_64 - 1),
        "wraps by size": (high - 8, TWO_64 - (high - 8) + low),
    }
    if low:
        ranges["begins before the beginning"] = (low - 8, 16)
    return ranges


def _range_words(at: int, nbytes: int, low: int, high: int) -> tuple[object, ...]:
    return hex(at), nbytes, hex(low), hex(high)


def _out_of_range_on_coordinator() -> Iterator[Case]:
    for what, (at, nbytes) in ranges(0, 16 * MIB).items():
        words = _range_words(at, nbytes, 0, 16 * MIB)

        def case(method: str, request: Callable[[World], Any], note: str = "", what=what, words=words) -> Case:
            return on_coordinator(method, f"{what}{note}", request, "OUT_OF_RANGE", "ADDRESS_OUT_OF_RANGE", *words)

        yield case(
            "Memcpy",
            lambda world, at=at, nbytes=nbytes: device_to_host(first_device(world), at, nbytes),
            ", to host",
        )
        if nbytes <= 17 * MIB:
            yield case(
                "Memcpy",
                lambda world, at=at, nbytes=nbytes: host_to_device(first_device(world), at, bytes(nbytes)),
                ", to device",
            )
        yield case(
            "StreamDeviceToHost",
            lambda world, at=at, nbytes=nbytes: pb.StreamDeviceToHostRequest(
                deviceId=device_id(first_device(world)), memAddr=addr(at), numBytes=nbytes
            ),
        )
        yield case(
            "HoldMemory",
            lambda world, at=at, nbytes=nbytes: pb.HoldMemoryRequest(
                deviceId=device_id(first_device(world)), memAddr=addr(at), numBytes=nbytes
            ),
        )
        yield case(
            "StreamHostToDevice",
            lambda world, at=at, nbytes=nbytes: [
                pb.DataChunk(deviceId=device_id(first_device(world)), memAddr=addr(at), numBytes=nbytes)
            ],
            ", announced",
        )
        for method, make, field in _COLLECTIVES:

            def collective(world: World, at=at, nbytes=nbytes, make=make, field=field) -> Any:
                message = make(world.comm, nbytes, dtype=pb.UINT8)
                getattr(message, field)[2].value = at
                return message

            # Rank 0's buffer is the one that is too long where the size alone is at fault.
            yield on_coordinator(
                method, f"rank 2 {what}", collective, "OUT_OF_RANGE", "ADDRESS_OUT_OF_RANGE", nbytes, hex(16 * MIB)
            )
    for what, at in (("crosses the end", 16 * MIB - 8), ("last address", TWO_64 - 1)):
        yield on_coordinator(
            "StreamHostToDevice",
            f"{what}, not announced",
            lambda world, at=at: [
                pb.DataChunk(deviceId=device_id(first_device(world)), memAddr=addr(at)),
                pb.DataChunk(data=bytes(8)),
                pb.DataChunk(data=bytes(8)),
            ],
            "OUT_OF_RANGE",
            "ADDRESS_OUT_OF_RANGE",
            hex(16 * MIB),
        )


def _out_of_range_on_device() -> Iterator[Case]:
    low, high = MIN_ADDR, MIN_ADDR + 16 * MIB
    for what, (at, nbytes) in ranges(low, high).items():
        words = _range_words(at, nbytes, low, high)
        requests: dict[str, Callable[[World], Any]] = {
            "BeginSend": lambda world, at=at, nbytes=nbytes: pb.BeginSendRequest(
                sendBuffAddr=addr(at), numBytes=nbytes, dstRank=pb.Rank(value=1)
            ),
            "BeginReceive": lambda world, at=at, nbytes=nbytes: pb.BeginReceiveRequest(
                streamId=pb.StreamId(value=5), recvBuffAddr=addr(at), numBytes=nbytes, srcRank=pb.Rank(value=1)
            ),
            "StreamDeviceToHost": lambda world, at=at, nbytes=nbytes: pb.StreamDeviceToHostRequest(
                memAddr=addr(at), numBytes=nbytes
            ),
            "StreamHostToDevice": lambda world, at=at, nbytes=nbytes: [pb.DataChunk(memAddr=addr(at), numBytes=nbytes)],
        }
        for method, request in requests.items():
            yield on_device(method, what, request, "OUT_OF_RANGE", "ADDRESS_OUT_OF_RANGE", *words)
        for field in ("sendAddr", "recvAddr"):
            # The other address, and the other block, are in order.
            block = pb.Block(count=nbytes, sendAddr=low, recvAddr=low)
            setattr(block, field, at)
            yield on_device(
                "Execute",
                f"{what}, {field}",
                lambda world, block=block: pb.ExecuteRequest(
                    programs=[pb.Program(parts=1, nblocks=2)],
                    operations=[pb.Operation(dtype=pb.UINT8, blocks=[ONE_ELEMENT, block])],
                ),
                "OUT_OF_RANGE",
                "ADDRESS_OUT_OF_RANGE",
                nbytes,
                hex(high),
            )


_OUT_OF_RANGE = [*_out_of_range_on_coordinator(), *_out_of_range_on_device()]

# ---- the rest --------------------------------------------------------------------------------------------------------

_EXHAUSTED = [
    on_coordinator(
        "Malloc",
        f"{nbytes} bytes",
        lambda world, nbytes=nbytes: pb.MallocRequest(deviceId=device_id(first_device(world)), numBytes=nbytes),
        "RESOURCE_EXHAUSTED",
        "OUT_OF_MEMORY",
        nbytes,
        16 * MIB,
    )
    for nbytes in (16 * MIB + 1, TWO_64 - 1)
] + [
    on_device(
        "Malloc",
        f"{nbytes} bytes",
        lambda world, nbytes=nbytes: pb.MallocRequest(numBytes=nbytes),
        "RESOURCE_EXHAUSTED",
        "OUT_OF_MEMORY",
        nbytes,
        16 * MIB,
    )
    for nbytes in (16 * MIB + 1, TWO_64 - 1)
]

_LENGTH = [
    on_coordinator(
        "StreamHostToDevice",
        what,
        lambda world, sent=sent: [
            pb.DataChunk(deviceId=device_id(first_device(world)), memAddr=addr(0), numBytes=20, data=bytes(8)),
            pb.DataChunk(data=bytes(sent - 8)),
        ],
        "DATA_LOSS",
        "STREAM_LENGTH",
        20,
        sent,
    )
    for what, sent in (("one byte more than announced", 21), ("one byte fewer than announced", 19))
] + [
    on_device(
        "StreamHostToDevice",
        what,
        lambda world, sent=sent: [
            pb.DataChunk(memAddr=addr(MIN_ADDR), numBytes=20, data=bytes(8)),
            pb.DataChunk(data=bytes(sent - 8)),
        ],
        "DATA_LOSS",
        "STREAM_LENGTH",
        20,
        sent,
    )
    for what, sent in (("one byte more than announced", 21), ("one byte fewer than announced", 19))
]

CASES = [
    *_UNKNOWN_COMM,
    *_UNKNOWN_DEVICE,
    *_UNKNOWN_STREAM,
    *_INVALID,
    *_MISSING,
    *_OUT_OF_RANGE,
    *_EXHAUSTED,
    *_LENGTH,
]
