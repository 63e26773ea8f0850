"""Decisions of the coordinator, as pure functions: which transport between two ranks, and what each rank is told to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dsml_gpu.errors import InvalidValue
from dsml_gpu.schedules import ALL_REDUCE, Kind, programs_of
from dsml_gpu.transport.link import new_stream_id
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Proving a schedule takes time and memory with the square of its ranks; on 256 it is seconds, once.
MAX_RANKS = 256


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective, checked and ready to run.

    Attributes:
        name, algorithm: for example ``"all_reduce"`` and ``"ring"``.
        addrs: each rank's buffer.
        count: bytes of each.
        dtype, op: numbers on the wire.
    """

    name: str
    algorithm: str
    addrs: tuple[int, ...]
    count: int
    dtype: int
    op: int

    def __str__(self) -> str:
        return f"{self.name} ({self.algorithm}, {self.count} bytes, {len(self.addrs)} ranks)"


def choose_transport(one: pb.DeviceMetadata, other: pb.DeviceMetadata, forced: int = pb.AUTO) -> int:
    """The transport between two devices.

    Args:
        forced: AUTO for the fastest that the pair allows.

    Raises:
        InvalidValue: P2P is forced where neither can read the other's memory.
    """
    same_process = bool(one.processUid) and one.processUid == other.processUid
    if same_process and one.backend == other.backend and forced != pb.GRPC:
        return pb.P2P
    if forced == pb.P2P:
        raise InvalidValue(
            f"p2p is not possible between device {one.deviceId.value} ({one.backend} at {one.address}) and device "
            f"{other.deviceId.value} ({other.backend} at {other.address}): they are not of one process and one backend"
        )
    return pb.GRPC


def peers_of(devices: Sequence[pb.DeviceMetadata], rank: int, forced: int = pb.AUTO) -> list[pb.Peer]:
    """What one rank is told of all ranks."""
    return [
        pb.Peer(
            deviceId=device.deviceId.value,
            address=device.address,
            transport=pb.Transport.Name(choose_transport(devices[rank], device, forced)),
        )
        for device in devices
    ]


def execute_requests(
    comm_id: int, device_ids: Sequence[int], collectives: Sequence[Collective], stall_timeout_ms: int = 0
) -> list[pb.ExecuteRequest]:
    """One request for each rank that together run the collectives, one after the other, over one stream per pair."""
    algorithms = list(dict.fromkeys(collective.algorithm for collective in collectives))
    plans = [plan_of(algorithm, len(device_ids)) for algorithm in algorithms]
    pairs = dict.fromkeys(pair for plan in plans for pair in plan.pairs)
    streams = {pair: new_stream_id() for pair in pairs}
    requests = []
    for rank, device_id in enumerate(device_ids):
        sends = {dst: stream for (src, dst), stream in streams.items() if src == rank}
        recvs = {src: stream for (src, dst), stream in streams.items() if dst == rank}
        requests.append(
            pb.ExecuteRequest(
                commId=comm_id,
                deviceId=device_id,
                programs=[plan.programs[rank] for plan in plans],
                operations=[
                    pb.Operation(
                        memAddr=collective.addrs[rank],
                        count=collective.count,
                        dtype=pb.DataType.Name(collective.dtype),
                        op=pb.ReduceOp.Name(collective.op),
                        program=algorithms.index(collective.algorithm),
                    )
                    for collective in collectives
                ],
                links=[
                    pb.Link(peer=peer, sendStreamId=sends.get(peer, 0), recvStreamId=recvs.get(peer, 0))
                    for peer in sorted({*sends, *recvs})
                ],
                stallTimeoutMs=stall_timeout_ms,
            )
        )
    return requests


@dataclass(frozen=True, slots=True)
class Plan:
    """An algorithm for a number of ranks, as it is shipped.

    Attributes:
        programs: of each rank.
        pairs: (src, dst) of ranks between which data moves.
    """

    programs: tuple[pb.Program, ...]
    pairs: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def plan_of(algorithm: str, nranks: int) -> Plan:
    """The plan of an all-reduce. Takes seconds the first time on hundreds of ranks, then nothing."""
    schedule = ALL_REDUCE[algorithm](nranks)
    programs = tuple(
        pb.Program(
            nchunks=program.nchunks,
            steps=[
                pb.Step(moves=[pb.Move(kind=_WIRE_KIND[move.kind], peer=move.peer, chunk=move.chunk) for move in step])
                for step in program.steps
            ],
        )
        for program in programs_of(schedule)
    )
    pairs = dict.fromkeys((transfer.src, transfer.dst) for step in schedule.steps for transfer in step)
    return Plan(programs, tuple(pairs))


_WIRE_KIND = {kind: pb.Move.Kind.Name(kind.value) for kind in Kind}
