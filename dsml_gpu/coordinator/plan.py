"""Decisions of the coordinator, as pure functions: which transport between two ranks, and what each rank is told to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from dsml_gpu.coordinator.call import CollectiveCall, Place, schedule_of_wire
from dsml_gpu.errors import InvalidValue, ScheduleNotProved
from dsml_gpu.schedules import (
    InvalidSchedule,
    Kind,
    Program,
    Roles,
    Schedule,
    UnknownAlgorithm,
    find_algorithm,
    programs_of,
)
from dsml_gpu.transport.link import new_stream_id
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Proving a schedule takes time and memory with the square of its ranks; on 256 it is seconds, once.
MAX_RANKS = 256


def choose_transport(one: pb.DeviceMetadata, other: pb.DeviceMetadata, forced: int = pb.AUTO) -> int:
    """The transport of slices between two devices; passes over memory (`passes`) need none.

    Args:
        forced: GRPC where nothing else may be used.
    """
    same_process = bool(one.processUid) and one.processUid == other.processUid
    return pb.P2P if same_process and one.backend == other.backend and forced != pb.GRPC else pb.GRPC


def peers_of(
    devices: Sequence[pb.DeviceMetadata],
    rank: int,
    forced: int = pb.AUTO,
    memories: Sequence[pb.SharedMemory | None] = (),
) -> list[pb.Peer]:
    """What one rank is told of all ranks.

    Args:
        memories: of each rank, where it can be opened; empty: nowhere.
    """
    return [
        pb.Peer(
            deviceId=device.deviceId.value,
            address=device.address,
            transport=pb.Transport.Name(choose_transport(devices[rank], device, forced)),
            sharedMemory=memory,
        )
        for device, memory in zip(devices, memories or [None] * len(devices), strict=True)
    ]


def execute_requests(
    comm_id: int,
    device_ids: Sequence[int],
    operations: Sequence[tuple[CollectiveCall, Plan]],
    stall_timeout_ms: int = 0,
    epoch: int = 0,
    *,
    atomic: bool = False,
) -> list[pb.ExecuteRequest]:
    """One request for each rank that together run the operations, one after the other, over one stream per pair.

    Args:
        epoch: of the communicator; 0: any.
        atomic: ranks keep what they overwrite until the round is settled.
    """
    round_id = new_stream_id() if atomic else 0  # any number that no other round has
    plans = list(dict.fromkeys(plan for _, plan in operations))
    number = {plan: index for index, plan in enumerate(plans)}
    streams = {pair: new_stream_id() for pair in dict.fromkeys(pair for plan in plans for pair in plan.pairs)}
    sends: list[dict[int, int]] = [{} for _ in device_ids]
    recvs: list[dict[int, int]] = [{} for _ in device_ids]
    for (src, dst), stream in streams.items():
        sends[src][dst] = recvs[dst][src] = stream
    return [
        pb.ExecuteRequest(
            commId=comm_id,
            deviceId=device_id,
            programs=[plan.programs[rank] for plan in plans],
            operations=[_operation(call, plan, rank, number[plan]) for call, plan in operations],
            links=[
                pb.Link(peer=peer, sendStreamId=sends[rank].get(peer, 0), recvStreamId=recvs[rank].get(peer, 0))
                for peer in sorted({*sends[rank], *recvs[rank]})
            ],
            stallTimeoutMs=stall_timeout_ms,
            round=round_id,
            epoch=epoch,
        )
        for rank, device_id in enumerate(device_ids)
    ]


def _operation(call: CollectiveCall, plan: Plan, rank: int, program: int) -> pb.Operation:
    places = call.places[rank]
    nowhere = Place(None, None)
    operation = pb.Operation(
        dtype=cast("pb.DataType", call.dtype),
        op=cast("pb.ReduceOp", call.op),
        program=program,
        weight=call.weights[rank] if call.weights else None,
        copiesInput=rank in call.copies_input,
    )
    for block in plan.blocks[rank]:
        place = places.get(block, nowhere)
        wire = operation.blocks.add(count=call.counts[block], sendAddr=place.send, recvAddr=place.recv)
        if place is not nowhere:  # what passes through is one piece
            for part in call.parts:
                piece = part.places[rank][block]
                wire.pieces.add(count=part.counts[block], sendAddr=piece.send, recvAddr=piece.recv)
    return operation


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Which schedule.

    Attributes:
        collective, algorithm: by name.
        roles: who takes part, and as what.
        hosts: the host of each rank, as numbers from 0.
        own_schedule: wire bytes of a client's own schedule; empty: the algorithm's.
    """

    collective: str
    algorithm: str
    roles: Roles
    hosts: tuple[int, ...]
    own_schedule: bytes = b""


def key_of(call: CollectiveCall, algorithm: str, hosts: tuple[int, ...]) -> PlanKey:
    """The key of a call's schedule, by an algorithm where the call does not bring its own.

    Args:
        hosts: the host of each rank.
    """
    if call.own_schedule:
        return PlanKey(call.name, "", call.roles, (), call.own_schedule)
    return PlanKey(call.name, algorithm, call.roles, hosts)


def require_known(collective: str, algorithm: str) -> None:
    """Raises InvalidValue where a collective has no algorithm of that name."""
    try:
        find_algorithm(collective, algorithm)
    except UnknownAlgorithm as error:
        raise InvalidValue(str(error)) from None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A schedule as it is shipped.

    Attributes:
        schedule: the schedule.
        programs: of each rank.
        blocks: by rank, the blocks of its program, in the order of `pb.Operation.blocks`.
        pairs: (src, dst) of ranks between which data moves.
    """

    schedule: Schedule
    programs: tuple[pb.Program, ...]
    blocks: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]


@lru_cache(maxsize=128)
def plan_of(key: PlanKey) -> Plan:
    """The plan of a schedule. Takes seconds the first time on hundreds of ranks, then nothing.

    Raises:
        InvalidValue: the collective has no such algorithm.
        ScheduleNotProved: a client's own schedule, or that of a plug-in, is not proved.
    """
    schedule = schedule_of(key)
    programs = programs_of(schedule)
    return Plan(
        schedule,
        tuple(map(_wire_program, programs)),
        tuple(program.blocks for program in programs),
        tuple(dict.fromkeys((transfer.src, transfer.dst) for step in schedule.steps for transfer in step)),
    )


def schedule_of(key: PlanKey) -> Schedule:
    """The schedule of a key. Raises as `plan_of`."""
    if key.own_schedule:
        return schedule_of_wire(key.collective, key.roles, key.own_schedule)
    try:
        algorithm = find_algorithm(key.collective, key.algorithm)
        return algorithm.schedule(key.roles.nranks, root=key.roles.root, pairs=key.roles.pairs, hosts=key.hosts)
    except UnknownAlgorithm as error:
        raise InvalidValue(str(error)) from None
    except InvalidSchedule as error:
        raise ScheduleNotProved(str(error)) from None


def hosts_of(devices: Sequence[pb.DeviceMetadata]) -> tuple[int, ...]:
    """The host of each device, as numbers from 0 in the order in which they first come.

    A device server that does not name its host is alone on it unless another one has the same address but for the port.
    """
    names = [device.host or device.address.rpartition(":")[0] for device in devices]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)


def _wire_program(program: Program) -> pb.Program:
    return pb.Program(
        parts=program.parts,
        steps=[
            pb.Step(moves=[pb.Move(kind=_WIRE_KIND[move.kind], peer=move.peer, chunk=move.chunk) for move in step])
            for step in program.steps
        ],
        nblocks=len(program.blocks),
        storeAndForward=program.store_and_forward,
    )


_WIRE_KIND = {kind: pb.Move.Kind.Name(kind.value) for kind in Kind}
